"""Run a command: `kdjax train ...` and `python -m kdjax train ...` equal `python -m kdjax.train ...`."""

import ast
import difflib
import pathlib
import runpy
import sys
from collections.abc import Sequence

import kdjax
from kdjax.errors import WRONG
from kdjax.runtime import startup

COMMANDS = ('train', 'evaluate', 'grid', 'report', 'prepare', 'generate', 'convert', 'harness', 'aot')


def main(argv: Sequence[str] | None = None) -> None:
  """Run the command that the first argument names with the others; without one, list the commands."""
  name, *rest = (sys.argv[1:] if argv is None else argv) or ['--help']
  if name in ('-h', '--help'):
    print(_help())
  elif name == '--version':
    print(f'kdjax {kdjax.__version__}')
  elif name in COMMANDS:
    startup.prepare(name)
    sys.argv[1:] = rest
    runpy.run_module(f'kdjax.{name}', run_name='__main__', alter_sys=True)
  else:
    near = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f'; did you mean {near[0]}?' if near else ''
    print(f'error: {name!r} is not a command{hint} (commands: {", ".join(COMMANDS)})', file=sys.stderr)
    sys.exit(WRONG)


def _help() -> str:
  lines = [f'kdjax {kdjax.__version__}: pretrain language models with distillation', '', 'usage: kdjax COMMAND ...', '']
  lines += [f'  {name:<10} {_summary(name)}' for name in COMMANDS]
  return '\n'.join(
    [*lines, '', 'kdjax COMMAND --help explains a command. python -m kdjax.COMMAND is the same command.']
  )


def _summary(name: str) -> str:
  """The first line of a command's docstring. Importing the command would take seconds."""
  source = pathlib.Path(__file__).with_name(f'{name}.py').read_text(encoding='utf-8')
  return (ast.get_docstring(ast.parse(source)) or '').partition('\n')[0]


if __name__ == '__main__':
  main()
