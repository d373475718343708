"""Read and run config files, which are Python written by the user."""

import contextlib
import difflib
import inspect
import os
import pathlib
import sys
import types
from collections.abc import Iterator
from typing import Any

import ml_collections

from kdjax.errors import ConfigError, UserError

SUFFIX = '.py'
PACKAGE = pathlib.Path(__file__).parents[1]
SHIPPED = (PACKAGE / 'configs', PACKAGE.parent / 'configs')  # in a wheel; in a checkout
EXAMPLE = 'write def get_config(arg=None), as configs/weak2strong.py does'


def split_spec(spec: str) -> tuple[pathlib.Path, str]:
  """Split `configs/weak2strong.py:scale=paper` or `weak2strong:scale=paper` into (file, argument).

  The whole text is the file if such a file exists, even with colons. A path that exists wins over the name of a config that kdjax ships.
  """
  name, _, arg = (spec, '', '') if os.path.isfile(spec) else spec.partition(':')
  path = pathlib.Path(name)
  if not path.exists() and name in shipped():
    return shipped()[name], arg
  return path, arg


def shipped() -> dict[str, pathlib.Path]:
  """The config files that kdjax ships, by name."""
  folder = next((folder for folder in SHIPPED if folder.is_dir()), None)
  return {path.stem: path for path in sorted(folder.glob(f'*{SUFFIX}'))} if folder else {}


def read_config(path: pathlib.Path, arg: str) -> ml_collections.ConfigDict:
  """Run a config file and return the result of its get_config(arg). Raises a one-line ConfigError if that fails."""
  _check_name(path)
  module = types.ModuleType(f'kdjax_config_{path.stem}')
  module.__file__ = str(path)
  sys.modules[module.__name__] = module  # dataclasses look up their module there
  with convert_errors(path):
    # Not with importlib: its cache confuses a file with its previous version of the same size and second.
    exec(compile(path.read_bytes(), str(path), 'exec'), module.__dict__)
    config = _function(module, path)(arg or None)
  if not isinstance(config, ml_collections.ConfigDict):
    raise ConfigError(
      [f'{path}: get_config returned {type(config).__name__}, not a ConfigDict; start from kdjax.config.default()']
    )
  return ml_collections.ConfigDict(config) if isinstance(config, ml_collections.FrozenConfigDict) else config


@contextlib.contextmanager
def convert_errors(path: pathlib.Path) -> Iterator[None]:
  """Convert any exception of a config file, which is the user's code, into a ConfigError that names its line."""
  try:
    yield
  except UserError:
    raise
  except (Exception, SystemExit) as e:
    raise ConfigError([f'{path}: {_line(e, path)}{type(e).__name__}: {" ".join(str(e).split())}']) from None


def _check_name(path: pathlib.Path) -> None:
  if not path.name:
    raise ConfigError(['--config names no file; e.g. --config=configs/weak2strong.py'])
  if path.is_file() and path.suffix == SUFFIX:
    return
  what = 'is a folder' if path.is_dir() else 'is not a file' if path.exists() else 'does not exist'
  if path.is_file():
    what = f'is not a Python file: its name must end in {SUFFIX}'
  folder = path.parent if path.parent.is_dir() else pathlib.Path('.')
  names = [p.name for p in folder.glob(f'*{SUFFIX}') if p.is_file()]
  names = [f'{path.name}{SUFFIX}'] if f'{path.name}{SUFFIX}' in names else names
  near = [str(folder / name) for name in difflib.get_close_matches(f'{path.stem}{SUFFIX}', names, n=1)]
  if path.parent == pathlib.Path('.'):
    near += difflib.get_close_matches(path.name, list(shipped()), n=1)
  raise ConfigError([f'config file {path} {what}' + (f'; did you mean {near[0]}?' if near else '')])


def _function(module: types.ModuleType, path: pathlib.Path) -> Any:
  found = getattr(module, 'get_config', None)
  if not callable(found):
    raise ConfigError([f'{path}: has no function get_config; {EXAMPLE}'])
  try:
    inspect.signature(found).bind(None)
  except TypeError:
    raise ConfigError([f'{path}: get_config must take one argument; {EXAMPLE}']) from None
  return found


def _line(error: BaseException, path: pathlib.Path) -> str:
  """Format the innermost line of the config file in the traceback, as 'line 12: '."""
  line, trace = getattr(error, 'lineno', None), error.__traceback__
  while trace is not None:
    if trace.tb_frame.f_code.co_filename == str(path):
      line = trace.tb_lineno
    trace = trace.tb_next
  return f'line {line}: ' if line else ''
