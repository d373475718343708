"""Option types: any input gives a value or an error of one line."""

import argparse
import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdjax import aot, cli, convert, evaluate, generate, grid, harness, prepare, report, train
from kdjax.errors import UserError
from kdjax.runtime import options

HUGE = '99999999999999999999'
COUNTS = (HUGE, '-99999999999999999999', '-2', 'nan', 'inf', '1.5', '', 'x', '1e3', '9' * 5000, '٣x', '\udce9', '-nan')


@pytest.mark.parametrize('kind', [options.positive, options.count, options.seed, options.axis, options.machines])
@pytest.mark.parametrize('text', COUNTS)
def test_no_count_is_any_of_these(kind, text):
  with pytest.raises(argparse.ArgumentTypeError) as e:
    kind(text)
  assert len(str(e.value)) < 200 and '\n' not in str(e.value) and str(e.value).isprintable()


@pytest.mark.parametrize('kind', [generate.temperature, options.share])
@pytest.mark.parametrize('text', ['nan', 'inf', '-inf', '-1', '1e400', '1e300', '-1e-9', '', 'x', '\udce9'])
def test_no_temperature_or_share_is_any_of_these(kind, text):
  with pytest.raises(argparse.ArgumentTypeError) as e:
    kind(text)
  assert str(e.value).isprintable()


def test_the_ends_of_each_range_are_in_it():
  assert [options.seed('0'), options.seed('4294967295'), options.positive('1'), options.axis('-1')] == [
    0,
    2**32 - 1,
    1,
    -1,
  ]
  with pytest.raises(argparse.ArgumentTypeError):
    generate.temperature('1e-50')
  assert [generate.temperature('0'), options.share('1'), generate.temperature('1e6')] == [0.0, 1.0, 1e6]
  with pytest.raises(argparse.ArgumentTypeError, match='must be below 4,294,967,296, got 4294967296'):
    options.seed('4294967296')
  with pytest.raises(argparse.ArgumentTypeError, match=r'must be in \(0, 1\], got 0'):
    options.share('0')


@given(st.text())
def test_any_text_is_a_value_or_a_mistake(text):
  for kind in (options.count, options.seed, generate.temperature, options.share, options.text):
    with contextlib.suppress(argparse.ArgumentTypeError):
      assert kind(text) is not None


def test_text_must_be_utf_8():
  assert options.text('né') == 'né'
  with pytest.raises(argparse.ArgumentTypeError, match=r"must be UTF-8 text, got 'n\\udce9'"):
    options.text('n\udce9')


def test_an_option_without_a_type_is_text(capsys):
  with pytest.raises(SystemExit):
    convert.main(['from-hf', 'a', 'caf\udce9-out'])
  assert capsys.readouterr().err.startswith("error: argument OUT: must be UTF-8 text, got 'caf\\udce9-out'")
  parser = cli.Parser()
  parser.add_argument_group().add_argument('--name')
  parser.add_argument('--file', type=options.path)
  for option in ('name', 'file'):
    with pytest.raises(UserError, match=f'--{option}: must be UTF-8 text'):
      parser.parse_args([f'--{option}=\udce9'])


def test_a_mistake_of_the_command_line_is_one_line_without_the_usage():
  parser = cli.Parser(prog='python -m kdjax.x')
  parser.add_argument('--seed', type=options.seed)
  for argv in (['--seed', '-1'], ['--sed=1'], ['--seed'], ['more']):
    with pytest.raises(UserError, match=r'; python -m kdjax\.x --help shows the options$') as e:
      parser.parse_args(argv)
    assert '\n' not in str(e.value)


NUMERIC = [
  (generate, ['m', '--max-tokens']), (generate, ['m', '--top-k']), (generate, ['m', '--seed']), (generate, ['m', '--samples']),
  (generate, ['m', '--step']), (generate, ['m', 'p', '--temperature']), (generate, ['m', '--top-p']),
  (evaluate, ['--workdir=x', '--step']), (evaluate, ['--workdir=x', '--fsdp']), (evaluate, ['--workdir=x', '--processes']),
  (harness, ['m', '--tasks=a', '--num-fewshot']), (harness, ['m', '--tasks=a', '--batch-size']), (harness, ['m', '--tasks=a', '--max-length']),
  (harness, ['m', '--tasks=a', '--step']), (harness, ['m', '--tasks=a', '--tensor']),
  (convert, ['to-hf', 'a', 'b', '--step']), (convert, ['to-hf', 'a', 'b', '--shard-size']), (convert, ['to-hf', 'a', 'b', '--max-positions']),
  (aot, ['--topology=v6e-4', '--num-slices']), (aot, ['--topology=v6e-4', '--vocab-size']), (train, ['--profile']), (train, ['--process']),
  (grid, ['run', '--runners']), (grid, ['run', '--processes']),
]  # fmt: skip


@pytest.mark.parametrize('value', ['-99999999999999999999', 'nan', 'x'])
@pytest.mark.parametrize(
  ('command', 'argv'), NUMERIC, ids=lambda x: x[-1].strip('-') if isinstance(x, list) else x.__name__
)
def test_every_numeric_option_of_every_command_refuses_what_is_no_number_of_its_kind(command, argv, value, capsys):
  config = (
    ['--config=configs/weak2strong.py']
    if command in (train, aot)
    else ['--config=configs/grid.py']
    if command is grid
    else []
  )
  with pytest.raises(SystemExit) as e:
    command.main([*argv[:-1], f'{argv[-1]}={value}', *config])
  out, err = capsys.readouterr()
  assert e.value.code == 2 and out == ''
  (line,) = err.splitlines()
  assert line.startswith('error: ') and argv[-1] in line and value in line


def test_commands_are_all_covered():
  assert {command for command, _ in NUMERIC} | {report, prepare} == {
    aot,
    convert,
    evaluate,
    generate,
    grid,
    harness,
    prepare,
    report,
    train,
  }
