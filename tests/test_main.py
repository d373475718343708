"""`kdjax COMMAND` is `python -m kdjax.COMMAND`; the package ships what it needs, and importing it stays light."""

import pathlib
import subprocess
import sys
import tomllib

import pytest

import kdjax
from kdjax.__main__ import COMMANDS
from kdjax.config import config_file
from kdjax.errors import ConfigError
from tests.commands import REPO

PROJECT = tomllib.loads((REPO / 'pyproject.toml').read_text())


def run(*arguments: str, cwd=REPO) -> subprocess.CompletedProcess:
  return subprocess.run(
    [sys.executable, '-m', *arguments], cwd=cwd, capture_output=True, text=True, check=False, timeout=120
  )


def test_without_a_command_all_are_listed_each_with_one_line():
  done = run('kdjax')
  assert done.returncode == 0
  listed = {line.split()[0]: line for line in done.stdout.splitlines() if line.startswith('  ')}
  files = {path.stem for path in (REPO / 'kdjax').glob('*.py') if "if __name__ == '__main__'" in path.read_text()}
  assert set(listed) == set(COMMANDS) == files - {'__main__'}
  assert max(len(line) for line in listed.values()) <= 100


@pytest.mark.parametrize('command', COMMANDS)
def test_both_spellings_are_one_command(command):
  short, full = run('kdjax', command, '--help'), run(f'kdjax.{command}', '--help')
  assert short.returncode == full.returncode == 0
  assert short.stdout == full.stdout
  assert f'python -m kdjax.{command}' in short.stdout


def test_a_wrong_command_names_the_nearest():
  done = run('kdjax', 'tain')
  assert (done.returncode, done.stdout) == (2, '')
  assert done.stderr.startswith("error: 'tain' is not a command; did you mean train?")


def test_errors_and_exit_codes_pass_through():
  done = run('kdjax', 'train', '--config=nowhere.py')
  assert done.returncode == 2
  assert 'Traceback' not in done.stderr
  assert 'nowhere.py does not exist' in done.stderr


def test_the_version_is_said_in_one_place():
  assert PROJECT['project']['dynamic'] == ['version']
  assert run('kdjax', '--version').stdout == f'kdjax {kdjax.__version__}\n'


def test_importing_the_package_imports_no_other_library():
  script = (
    'import sys, kdjax; print(sorted({name.partition(".")[0] for name in sys.modules} - set(sys.stdlib_module_names)))'
  )
  done = subprocess.run([sys.executable, '-S', '-c', script], cwd=REPO, capture_output=True, text=True, check=True)
  assert set(eval(done.stdout)) <= {'__main__', 'kdjax'}


def test_every_room_is_in_the_wheel_and_so_are_the_configs():
  rooms = {'.'.join(path.parent.relative_to(REPO).parts) for path in (REPO / 'kdjax').rglob('__init__.py')}
  assert set(PROJECT['tool']['setuptools']['packages']) == rooms | {'kdjax.configs'}
  code = {'.'.join(path.parent.relative_to(REPO).parts) for path in (REPO / 'kdjax').rglob('*.py')}
  assert code == rooms, 'a folder of code has no __init__.py'


def test_a_shipped_config_is_found_by_name_from_any_folder_and_a_path_wins(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  path, arg = config_file.split_spec('weak2strong:scale=paper')
  assert (path, arg) == (REPO / 'configs' / 'weak2strong.py', 'scale=paper')
  assert config_file.read_config(path, arg).scale == 'paper'
  pathlib.Path('weak2strong').write_text('mine')
  assert config_file.split_spec('weak2strong')[0] == pathlib.Path('weak2strong')


def test_a_misspelt_name_of_a_shipped_config_gets_the_right_one(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(ConfigError, match=r'config file weak2stong does not exist; did you mean weak2strong\?'):
    config_file.read_config(*config_file.split_spec('weak2stong'))


@pytest.mark.parametrize('command', ['train', 'grid', 'prepare', 'aot'])
def test_the_fields_of_a_config_are_explained(command):
  done = run('kdjax', command, '--help-config', 'teacher')
  assert done.returncode == 0
  assert ('--config.teacher=tiny-0.1m,' if command == 'grid' else '--config.teacher.dtype=auto') in done.stdout
  wrong = run('kdjax', command, '--help-config=nonsense')
  assert wrong.returncode == 2
  assert wrong.stderr.startswith("error: --help-config: no field begins with 'nonsense'; sections: ")


def test_the_usage_names_the_config():
  assert '--config FILE[:ARG]' in run('kdjax', 'train', '--help').stdout.partition('\n\n')[0]
