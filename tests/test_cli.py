"""The command line: each mistake is one line that says where it is; exit codes; no tracebacks."""

import os
import pathlib
import subprocess
import sys

import ml_collections
import pytest

from kdjax import cli, train
from kdjax import config as config_lib
from kdjax.errors import ConfigError, TrainingError, UserError
from kdjax.runtime.preemption import Preempted
from kdjax.sweeps import config as grid_config
from kdjax.sweeps.config import GridConfig
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


def test_a_config_file_without_its_suffix_or_with_none_of_its_name_is_refused(tmp_path):
  write(tmp_path / 'mine.py', '')
  (found,) = load_error(tmp_path / 'mine')
  assert found.endswith(f'mine does not exist; did you mean {tmp_path / "mine.py"}?')
  assert load_error('') == ['--config names no file; e.g. --config=configs/weak2strong.py']
  (found,) = load_error('a\nb.py')
  assert found.startswith(r'config file a\nb.py does not exist')


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


def test_a_config_file_that_exits_is_refused(tmp_path):
  """The user's exit code would be read as the command's: 0 is "done", 1 "cannot continue"."""
  path = write(tmp_path / 'mine.py', 'import sys\ndef get_config(arg=None):\n  sys.exit(0)\n')
  assert load_error(path) == [f'{path}: line 3: SystemExit: 0']


@pytest.mark.parametrize('name', ['mine.yaml', 'mine', 'mine.json', 'mine.PY', 'mine.pyc', '.py'])
def test_a_file_that_is_not_python_by_its_name_is_refused_in_one_line(tmp_path, name):
  write(tmp_path / name, 'student:\n  alpha: 0.4\n')
  write(tmp_path / 'mine.py', '')
  (found,) = load_error(tmp_path / name)
  assert found.startswith(f'config file {tmp_path / name} is not a Python file: its name must end in .py')
  assert name == '.py' or f'did you mean {tmp_path / "mine.py"}?' in found


@pytest.mark.parametrize(
  ('body', 'words'),
  [
    ('', 'has no function get_config; write def get_config(arg=None)'),
    ('get_config = 3', 'has no function get_config'),
    ('def get_config(): ...', 'get_config must take one argument; write def get_config(arg=None)'),
    ('def get_config(a, b): ...', 'get_config must take one argument'),
    ('def get_config(*, arg=None): ...', 'get_config must take one argument'),
    ('def get_config(arg=None): return arg.x', "line 1: AttributeError: 'NoneType' object has no attribute 'x'"),
    ('def get_config(arg=None): return get_config(arg)', 'RecursionError: '),
  ],
)
def test_a_get_config_that_cannot_be_called_is_refused_by_what_is_wrong_with_it(tmp_path, body, words):
  path = write(tmp_path / 'mine.py', body)
  (found,) = load_error(path)
  assert found.startswith(f'{path}: ') and words in found and '\n' not in found


def test_a_config_file_is_read_anew_though_its_size_and_its_second_are_the_same(tmp_path):
  path = tmp_path / 'mine.py'
  for alpha in (0.1, 0.2):
    write(
      path,
      f'from kdjax import config\ndef get_config(a=None):\n  c = config.default()\n  c.student.alpha = {alpha}\n  return c',
    )
    os.utime(path, (1e9, 1e9))
    assert cli.load_config(str(path)).student.alpha == alpha
  assert [p.name for p in tmp_path.iterdir()] == ['mine.py']


def test_a_config_file_may_have_a_colon_in_its_name_and_a_dataclass(tmp_path):
  text = """
from __future__ import annotations
import dataclasses
from kdjax import config

@dataclasses.dataclass
class Mine:
  alpha: float = 0.3

def get_config(arg=None):
  c = config.default()
  c.student.alpha = Mine().alpha
  return c
"""
  assert cli.load_config(str(write(tmp_path / 'a:b.py', text))).student.alpha == 0.3


@pytest.mark.parametrize(
  ('body', 'words'),
  [
    ('c.student.tokens = config_dict.required_placeholder(int)', 'RequiredValueError: '),
    ('c.student.tokens = config_dict.placeholder(int)', 'student.tokens: expected a whole number, got None'),
    ('c.student.tokens = 1000 // config_dict.FieldReference(0)', 'line 6: ZeroDivisionError: '),
    ('with c.unlocked(), c.ignore_type(): c.student.model = c', 'student.model.'),
    (
      'with c.unlocked(), c.ignore_type(): c.student.alpha = lambda step: 1',
      'student.alpha: expected a number, got <function',
    ),
  ],
)
def test_references_and_values_that_are_no_config_are_lines(tmp_path, body, words):
  text = f'from kdjax import config\nfrom ml_collections import config_dict\ndef get_config(arg=None):\n  c = config.default()\n\n  {body}\n  return c'
  path = write(tmp_path / 'mine.py', text)
  for overrides in ({}, {'student.seed': '1'}):
    problems = load_error(path, overrides)
    assert all('\n' not in problem for problem in problems) and any(
      words in p or 'RecursionError' in p for p in problems
    )


def test_a_field_that_a_config_file_requires_may_come_from_the_command_line(tmp_path):
  text = 'from kdjax import config\nfrom ml_collections import config_dict\ndef get_config(arg=None):\n  c = config.default()\n  c.student.tokens = config_dict.required_placeholder(int)\n  return c'
  path = write(tmp_path / 'mine.py', text)
  assert cli.load_config(str(path), {'student.tokens': '2e6'}).student.tokens == 2_000_000


def test_a_frozen_config_and_numpys_numbers_are_taken(tmp_path):
  text = """
import ml_collections
import numpy as np
from kdjax import config

def get_config(arg=None):
  c = config.default()
  with c.ignore_type():
    c.student.tokens, c.student.alpha = np.int64(2**21), np.float64(0.25)
  return ml_collections.FrozenConfigDict(c)
"""
  config = cli.load_config(str(write(tmp_path / 'mine.py', text)), {'student.seed': '7'})
  assert (config.student.tokens, config.student.alpha, config.student.seed) == (2**21, 0.25, 7)
  assert type(config.student.tokens) is int and type(config.student.alpha) is float


LEAVES = ['../../x', '/abs', '', ' ', '.', '..', 'a/b', 'a\\b', 'a\0b', 'a\nb', 'x' * 300, 'é' * 100, 'a\udce9b']


@pytest.mark.parametrize('name', LEAVES)
def test_a_name_that_would_lead_out_of_the_runs_folder_is_refused_with_all_other_mistakes(name):
  problems = load_error(CONFIG, {'name': name, 'student.alpha': '2'})
  assert len(problems) == 2 and problems[0].startswith('student.alpha: ') and problems[1].startswith('name: must ')
  grid = REPO / 'configs' / 'grid.py'
  with pytest.raises(ConfigError) as e:
    cli.load_as(GridConfig, grid_config.problems, str(grid), {'name': name})
  assert [p for p in e.value.problems if p.startswith('name: must ')]


@pytest.mark.parametrize('text', ['a\0b', 'caf\udce9'])
@pytest.mark.parametrize(
  'field',
  [
    'runs',
    'data.tokenizer',
    'data.cache',
    'data.source',
    'teacher.run',
    'student.init',
    'eval.ood.mine',
    'eval.tasks.mine',
  ],
)
def test_a_path_that_no_disk_or_json_file_can_hold_is_refused(field, text):
  (problem,) = load_error(CONFIG, {field: text})
  assert problem.startswith(field.removesuffix('.mine') + ': must be UTF-8 text without NUL characters, got ')


def test_a_workdir_that_is_not_utf_8_is_refused(capsys):
  (line,) = main_error([f'--config={CONFIG}', '--workdir=caf\udce9'], capsys)
  assert line.startswith("error: argument --workdir: must be UTF-8 text, got 'caf\\udce9'")


@pytest.mark.parametrize('name', ['weak2strong', 'it is [v1], two', '.hidden', '-x', 'ünï', '~x', 'x' * 150])
def test_any_other_name_is_taken(name):
  assert cli.load_config(CONFIG, {'name': name}).name == name


@pytest.mark.parametrize('section', ['ood', 'tasks'])
@pytest.mark.parametrize('name', ['a/b', '-x', 'a\nb', 'x' * 200, 'lm-eval-x', 'in-domain', 'OOD mean'])
def test_names_of_sets_are_checked_with_all_other_mistakes(section, name):
  config = config_lib.default()
  config.student.alpha = 2.0
  config.eval[section] = ml_collections.ConfigDict({name: 'a.jsonl'})
  with pytest.raises(ConfigError) as e:
    config_lib.resolve(config)
  assert [p for p in e.value.problems if p.startswith(f'eval.{section}') and repr(name)[1:-1] in p]
  assert [p for p in e.value.problems if p.startswith('student.alpha')]


@pytest.mark.parametrize(
  'value', ['99999999999999999999', '-99999999999999999999', '1e30', '9' * 500, 'nan', 'inf', '1e400', '-1e400']
)
@pytest.mark.parametrize(
  'field',
  ['student.tokens', 'teacher.model.n_layers', 'checkpoint.every', 'data.split_seed', 'teacher.trunk', 'student.slice'],
)
def test_numbers_that_no_machine_holds_are_one_line(field, value):
  problems = load_error(CONFIG, {field: value})
  assert [p for p in problems if field in p] and all(len(p) < 400 and '\n' not in p for p in problems)


@pytest.mark.parametrize('value', [10**5000, -(10**5000), 10**400, float('nan')], ids=['5001', '-5001', '401', 'nan'])
def test_such_numbers_in_a_config_file_are_one_line_too(value):
  config = config_lib.default()
  with config.student.unlocked(), config.student.ignore_type(), config.ignore_type():
    config.student.tokens = value
  with pytest.raises(ConfigError) as e:
    config_lib.resolve(config)
  (problem,) = e.value.problems
  assert problem.startswith('student.tokens: expected ') and len(problem) < 400


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
    (KeyboardInterrupt(), 130, 'stopped'),
    (Preempted('work is left'), 75, 'work is left'),
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


def test_what_an_error_quotes_cannot_break_its_line():
  assert str(UserError('no file a\n\tb\u2028ü')) == r'no file a\n\tb\u2028ü'
  assert str(ConfigError(['name: a\nb', 'seed: 1'])) == 'config error: name: a\\nb\nconfig error: seed: 1'
  assert load_error(CONFIG, {'trackers': 'a\nb'}) == [r"trackers: unknown value 'a\nb'; known: tensorboard, csv, wandb"]
