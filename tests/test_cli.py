"""The command line: each mistake is one line that says where it is; exit codes; no tracebacks."""

import os
import pathlib
import subprocess
import sys

import pytest

from kdjax import cli, train
from kdjax.errors import ConfigError, TrainingError, UserError
from tests import tiny

REPO = pathlib.Path(__file__).parents[1]
CONFIG = str(REPO / 'configs' / 'weak2strong.py')


def write(path: pathlib.Path, text: str) -> pathlib.Path:
  path.write_text(text)
  return path


def main_error(argv: list[str], capsys) -> list[str]:
  """stderr's lines of `python -m kdjax.train ARGV`, which must exit with 2 and no traceback."""
  with pytest.raises(SystemExit) as e:
    train.main(argv)
  assert e.value.code == 2
  out, err = capsys.readouterr()
  assert 'Traceback' not in out + err
  return err.splitlines()


def load_error(spec, overrides=None) -> list[str]:
  with pytest.raises(ConfigError) as e:
    cli.load_config(str(spec), overrides)
  return e.value.problems


def test_the_arguments_are_told_apart():
  argv = ['--workdir=w', '--config', 'c.py:scale=paper', '--config.a.b=1=2', '--config.c', 'x y', '--processes', '2']
  assert cli.split_args(argv) == ('c.py:scale=paper', {'a.b': '1=2', 'c': 'x y'}, ['--workdir=w', '--processes', '2'])
  assert cli.split_args(['--config=c.py']) == ('c.py', {}, [])
  assert cli.split_args([]) == (None, {}, [])


def test_the_last_of_two_overrides_counts():
  assert cli.split_args(['--config.a=1', '--config.a=2'])[1] == {'a': '2'}


def test_overrides_reach_teacher_and_student():
  config = cli.load_config(CONFIG, {'student.alpha': '0.3', 'teacher.model.n_layers': '7', 'teacher.tokens': '2e6'})
  assert (config.student.alpha, config.teacher.model.n_layers, config.teacher.tokens) == (0.3, 7, 2_000_000)


@pytest.mark.parametrize(
  ('argv', 'line'),
  [
    ([], 'config error: --config=FILE is missing, e.g. --config=configs/weak2strong.py'),
    (['--config.student.alpha=0.4'], 'config error: --config.student.alpha: there is no --config=FILE to change'),
    (['--config=configs/none.py'], 'config error: config file configs/none.py does not exist'),
    (['--config='], 'config error: '),
    (['--config'], 'config error: '),
    (['--config', '--workdir=x'], 'config error: '),
    ([f'--config={CONFIG}', '--config.student.alpha'], 'config error: --config.student.alpha: expected a number'),
    ([f'--config={CONFIG}:scale=huge'], "config error: unknown scale 'huge'; known: laptop, colab, paper"),
    ([f'--config={CONFIG}:sclae=paper'], "config error: unknown argument 'sclae' after the config file's colon; did"),
    ([f'--config={CONFIG}', '--config.student.alhpa=1'], 'config error: --config.student.alhpa: no such field; did you mean student.alpha?'),
    ([f'--config={CONFIG}', '--config.student.alpha=2'], 'config error: student.alpha: must be in [0, 1], got 2'),
    ([f'--config={CONFIG}', '--config.loss.temperature=0'], 'config error: loss.temperature: must be above 0, got 0'),
    ([f'--config={CONFIG}', '--config.data.seq_len=4096'], 'config error: data.seq_len: 4096 tokens are more than'),
  ],
)  # fmt: skip
def test_a_mistake_is_lines_on_stderr_and_exit_code_2(argv, line, capsys, monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  lines = main_error(argv, capsys)
  assert lines[0].startswith(line)
  assert all(found.startswith('config error: ') for found in lines)
  assert list(tmp_path.iterdir()) == []


def test_several_mistakes_are_a_line_each(capsys):
  changes = ['student.alpha=2', 'student.alhpa=1', 'loss.temperature=-1', 'teacher.tokens=many', 'data.seq_len=1e9']
  lines = main_error([f'--config={CONFIG}', *(f'--config.{change}' for change in changes)], capsys)
  wanted = ('student.alpha: ', 'student.alhpa: ', 'loss.temperature: ', 'teacher.tokens: ', 'data.seq_len: ')
  for start in wanted:
    assert any(start in line for line in lines), start
  assert len(lines) == len(set(lines))


def test_an_unknown_option_is_exit_code_2(capsys):
  lines = main_error([f'--config={CONFIG}', '--wrokdir=x'], capsys)
  assert '--wrokdir=x' in lines[-1]


def test_a_missing_config_file_names_the_nearest():
  near = str(REPO / 'configs' / 'weak2strong.py')
  assert load_error(REPO / 'configs' / 'weak2stong.py') == [
    f'config file {REPO / "configs" / "weak2stong.py"} does not exist; did you mean {near}?'
  ]


def test_a_folder_is_no_config_file(tmp_path):
  (found,) = load_error(tmp_path)
  assert str(tmp_path) in found and 'does not exist' not in found


@pytest.mark.parametrize(
  ('body', 'words'),
  [
    ('  x = {}\n  return x["batch"]\n', "line 3: KeyError: 'batch'"),
    ('  import nowhere_to_be_found\n', "line 2: ModuleNotFoundError: No module named 'nowhere_to_be_found'"),
    ('  return 1 / 0\n', 'line 2: ZeroDivisionError: division by zero'),
    ('  raise ValueError("first\\nsecond")\n', 'line 2: ValueError: first'),
    ('  return inner()\n\n\ndef inner():\n  return int("x")\n', 'line 6: ValueError: '),
  ],
)
def test_an_error_inside_get_config_names_file_and_line(tmp_path, body, words):
  path = write(tmp_path / 'mine.py', f'def get_config(arg=None):\n{body}')
  (found,) = load_error(path)
  assert found.startswith(f'{path}: {words}')
  assert '\n' not in found


def test_an_unknown_field_set_by_a_config_file_names_the_nearest(tmp_path):
  text = (
    'from kdjax import config\ndef get_config(arg=None):\n  c = config.default()\n  c.student.alhpa = 1.0\n  return c\n'
  )
  (found,) = load_error(write(tmp_path / 'mine.py', text))
  assert found == 'student.alhpa: no such field; did you mean alpha?'


def test_a_wrong_type_set_by_a_config_file_names_file_and_line(tmp_path):
  text = 'from kdjax import config\ndef get_config(arg=None):\n  c = config.default()\n  c.student.tokens = "x"\n  return c\n'
  (found,) = load_error(write(tmp_path / 'mine.py', text))
  assert 'line 4' in found and '\n' not in found


def test_a_syntax_error_names_file_and_line(tmp_path):
  path = write(tmp_path / 'mine.py', 'def get_config(arg=None):\n  return (\n')
  (found,) = load_error(path)
  assert found.startswith(f'{path}: line 2: SyntaxError: ')


def test_a_config_file_that_is_no_text_is_refused(tmp_path):
  path = tmp_path / 'mine.py'
  path.write_bytes(b'\x00\xff\xfe')
  (found,) = load_error(path)
  assert found.startswith(f'{path}: ')


@pytest.mark.parametrize('value', ['None', '{}', '3', "'text'"])
def test_get_config_that_returns_something_else_is_refused(tmp_path, value):
  path = write(tmp_path / 'mine.py', f'def get_config(arg=None):\n  return {value}\n')
  (found,) = load_error(path)
  assert 'get_config returned' in found and 'not a ConfigDict' in found


def test_a_file_without_get_config_is_refused(tmp_path):
  (found,) = load_error(write(tmp_path / 'mine.py', 'x = 3\n'))
  assert 'get_config' in found


def test_get_config_without_an_argument_is_refused(tmp_path):
  (found,) = load_error(write(tmp_path / 'mine.py', 'def get_config():\n  return None\n'))
  assert 'get_config' in found


def test_a_config_file_may_exit(tmp_path):
  """`sys.exit` in the user's code is no error that is swallowed, and no traceback either."""
  path = write(tmp_path / 'mine.py', 'import sys\ndef get_config(arg=None):\n  sys.exit(3)\n')
  with pytest.raises(SystemExit):
    cli.load_config(str(path))


def test_a_config_file_that_drops_fields_gets_their_defaults(tmp_path):
  text = 'import ml_collections\ndef get_config(arg=None):\n  return ml_collections.ConfigDict({"name": "small"})\n'
  config = cli.load_config(str(write(tmp_path / 'mine.py', text)))
  assert (config.name, config.student.batch_size) == ('small', 8)


def test_an_override_of_a_section_that_a_config_file_dropped_is_taken(tmp_path):
  text = 'import ml_collections\ndef get_config(arg=None):\n  return ml_collections.ConfigDict({"name": "small"})\n'
  path = write(tmp_path / 'mine.py', text)
  assert cli.load_config(str(path), {'student.alpha': '0.3'}).student.alpha == 0.3


@pytest.mark.parametrize(
  ('error', 'code', 'line'),
  [
    (UserError('the file is gone'), 2, 'error: the file is gone'),
    (ConfigError(['a: wrong', 'b: wrong']), 2, 'config error: a: wrong\nconfig error: b: wrong'),
    (TrainingError('not finite'), 1, 'error: not finite'),
    (KeyboardInterrupt(), 130, '\nstopped'),
  ],
)
def test_exit_codes(error, code, line, capsys):
  with pytest.raises(SystemExit) as e, cli.user_errors():
    raise error
  assert e.value.code == code
  assert capsys.readouterr().err == line + '\n'


def test_a_programming_error_keeps_its_traceback():
  with pytest.raises(ZeroDivisionError), cli.user_errors():
    _ = 1 / 0


def test_deterministic_flags_are_added_once(monkeypatch):
  monkeypatch.setenv('XLA_FLAGS', '--xla_a=1')
  cli.set_deterministic()
  cli.set_deterministic()
  assert os.environ['XLA_FLAGS'].split() == ['--xla_a=1', '--xla_gpu_deterministic_ops=true']


def test_the_users_own_determinism_flag_is_kept(monkeypatch):
  monkeypatch.setenv('XLA_FLAGS', '--xla_gpu_deterministic_ops=false')
  cli.set_deterministic()
  assert os.environ['XLA_FLAGS'] == '--xla_gpu_deterministic_ops=false'


def test_a_process_with_mistakes_exits_with_2_and_one_line_each(tmp_path):
  file = tiny.write_config(tmp_path)
  command = [
    sys.executable,
    '-m',
    'kdjax.train',
    f'--config={file}',
    '--config.student.alpha=2',
    '--config.student.alhpa=1',
  ]
  done = subprocess.run(
    command, cwd=tmp_path, env={**os.environ, 'PYTHONPATH': str(REPO)}, capture_output=True, text=True, check=False
  )
  assert done.returncode == 2
  assert done.stdout == ''
  assert sorted(done.stderr.splitlines()) == [
    'config error: --config.student.alhpa: no such field; did you mean student.alpha?',
    'config error: student.alpha: must be in [0, 1], got 2',
  ]
  assert not (tmp_path / 'runs').exists()


def test_the_tiny_config_is_the_same_in_a_file_and_in_process(tmp_path):
  assert cli.load_config(str(tiny.write_config(tmp_path))) == tiny.config(tmp_path)
