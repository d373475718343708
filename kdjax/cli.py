"""The commands' front: the config off the command line, and user errors as one line.

`--config=FILE[:ARG]` names a Python file with `get_config(arg)`; `--config.a.b=VALUE` changes a field. What is left goes to argparse.
Exit codes: 0 done, 2 the config or a file is wrong, 1 a run could not go on, 75 another process is gone, 130 stopped by the user.
"""

import argparse
import contextlib
import dataclasses
import difflib
import importlib.util
import logging
import os
import pathlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import ml_collections

from kdjax import config as config_lib
from kdjax import distributed, paths
from kdjax.config import Config
from kdjax.data.files import NO_SPACE
from kdjax.errors import ConfigError, ProcessLost, TrainingError, UserError

NO_MEMORY = (
  'out of memory: take a smaller model or batch_size, more microbatches, remat=full, or a mesh of more devices'
)

# What these log of a failed save or request, with tracebacks, before they raise it, is told in one line of ours.
QUIETER = dict.fromkeys(('jax', 'orbax', 'grain'), logging.ERROR) | dict.fromkeys(
  ('absl', 'asyncio', 'gcsfs'), logging.CRITICAL
)

log = logging.getLogger('kdjax')
T = TypeVar('T')


def load_config(spec: str, overrides: Mapping[str, str] | None = None) -> Config:
  """`configs/weak2strong.py:scale=paper` and its overrides -> a checked Config. Raises ConfigError with every problem."""
  return load_as(Config, config_lib.problems, spec, overrides or {})


def load_as(kind: type[T], check: Callable[[T], Iterable[str]], spec: str, overrides: Mapping[str, str]) -> T:
  """The same for a config of any kind and what checks it."""
  path, _, arg = spec.partition(':')
  config = _get_config(pathlib.Path(paths.expand(path)), arg)
  fields = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
  unknown = set(config.keys()) - fields
  if len(unknown) > max(3, len(config.keys()) / 2):
    raise ConfigError(
      [f'{path} is no config for this command: it knows nothing of {", ".join(sorted(unknown)[:4])}, ...']
    )
  problems = config_lib.override(config, overrides, kind)
  try:
    resolved = config_lib.resolve_as(kind, check, config)
  except ConfigError as e:
    raise ConfigError(problems + e.problems) from None
  if problems:
    raise ConfigError(problems)
  return resolved


def split_args(argv: Sequence[str]) -> tuple[str | None, dict[str, str], list[str]]:
  """(config spec, overrides, the rest). `--config X`, `--config=X`, `--config.a=v` and `--config.a v` all count."""
  spec, overrides, rest = None, {}, []
  args = iter(argv)
  for arg in args:
    if arg != '--config' and not arg.startswith(('--config=', '--config.')):
      rest.append(arg)
      continue
    name, equals, value = arg.partition('=')
    if not equals:
      value = next(args, '')
    if name == '--config':
      spec = value
    else:
      overrides[name.removeprefix('--config.')] = value
  return spec, overrides, rest


def parse(
  parser: argparse.ArgumentParser,
  argv: Sequence[str],
  load: Callable[[str, Mapping[str, str]], T],
) -> tuple[T, argparse.Namespace]:
  """The config and the command's own options."""
  spec, overrides, rest = split_args(argv)
  args = parser.parse_args(rest)
  if spec is None:
    if overrides:
      raise ConfigError([f'--config.{next(iter(overrides))}: there is no --config=FILE to change'])
    raise ConfigError(['--config=FILE is missing, e.g. --config=configs/weak2strong.py'])
  return load(spec, overrides), args


def positive(text: str) -> int:
  """Of an option: a whole number from 1 on."""
  value = int(text)
  if value < 1:
    raise argparse.ArgumentTypeError(f'must be at least 1, got {value}')
  return value


def set_up_logging() -> None:
  """What kdjax has to say, as lines; of the libraries under it, errors alone. For commands and notebooks."""
  logging.basicConfig(level=logging.INFO, format='%(message)s')
  log.setLevel(logging.INFO)  # these two, where a library has set up the root logger before
  for handler in logging.getLogger().handlers:
    handler.setFormatter(logging.Formatter('%(message)s'))
  for name, level in QUIETER.items():
    logging.getLogger(name).setLevel(level)


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
  """Prints a user's mistakes as lines on stderr, without a traceback, and exits."""
  set_up_logging()
  sys.unraisablehook = _unraisable
  try:
    yield
  except TrainingError as e:
    _exit(e, 1)
  except ProcessLost as e:
    _exit_lost(e)
  except UserError as e:
    _exit(e, 2)
  except ImportError as e:
    if not paths.missing_extra(e):
      raise
    _exit(UserError(f'an object store is named, and {paths.said(e)}'), 2)
  except OSError as e:
    if e.errno is None:
      raise
    where, full = e.filename or 'a file', e.errno in NO_SPACE
    mend = 'free some disk space and run the same command again' if full else 'mend the path or its permissions'
    _exit(UserError(f'{where} cannot be used ({e.strerror}); {mend}'), 1 if full else 2)
  except MemoryError:
    _exit(UserError(NO_MEMORY), 1)
  except (jax.errors.JaxRuntimeError, ValueError) as e:
    what = (str(e).splitlines() or [''])[0][:200]
    if isinstance(e, jax.errors.JaxRuntimeError) and ('RESOURCE_EXHAUSTED' in str(e) or 'Out of memory' in str(e)):
      _exit(UserError(f'{NO_MEMORY} ({what})'), 1)
    if not distributed.is_lost(e):
      raise
    _exit_lost(e)
  except KeyboardInterrupt:
    print('\nstopped', file=sys.stderr)
    sys.exit(130)


def _unraisable(what: Any) -> None:
  """Leaves out what TensorStore's threads print, once for each file, when a save has failed for lack of space."""
  if str(what.exc_value) != 'Event loop is closed':
    sys.__unraisablehook__(what)


def _exit_lost(error: Exception) -> None:
  what = (str(error).splitlines() or [''])[0][:200]
  _exit(UserError(f'another process is gone ({what}); {distributed.AGAIN}'), distributed.TEMPORARY)


def _exit(error: UserError, code: int) -> None:
  for line in str(error).splitlines():
    print(line if line.startswith('config error') else f'error: {line}', file=sys.stderr)
  sys.stderr.flush()
  sys.exit(code)


def _get_config(path: pathlib.Path, arg: str) -> ml_collections.ConfigDict:
  if not path.is_file():
    folder = path.parent if path.parent.is_dir() else pathlib.Path('.')
    near = difflib.get_close_matches(path.name, [p.name for p in folder.glob('*.py')], n=1)
    what = 'is no file' if path.exists() else 'does not exist'
    raise ConfigError([f'config file {path} {what}' + (f'; did you mean {folder / near[0]}?' if near else '')])
  spec = importlib.util.spec_from_file_location(f'kdjax_config_{path.stem}', path)
  assert spec is not None and spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
    config = module.get_config(arg or None)
  except UserError:
    raise
  except Exception as e:  # a config file is the user's code: whatever it raises is the user's to mend
    raise ConfigError([f'{path}: {_where(e, path)}{type(e).__name__}: {" ".join(str(e).split())}']) from None
  if not isinstance(config, ml_collections.ConfigDict):
    raise ConfigError(
      [f'{path}: get_config returned {type(config).__name__}, not a ConfigDict; start from kdjax.config.default()']
    )
  return config


def _where(error: Exception, path: pathlib.Path) -> str:
  """'line 12: ', the innermost line of the config file on the way to the error."""
  line, trace = getattr(error, 'lineno', None), error.__traceback__
  while trace is not None:
    if trace.tb_frame.f_code.co_filename == str(path):
      line = trace.tb_lineno
    trace = trace.tb_next
  return f'line {line}: ' if line else ''


def set_deterministic() -> None:
  """Same bits for the same seed on GPU too: XLA's deterministic reductions. To be called before JAX touches a device."""
  flags = os.environ.get('XLA_FLAGS', '')
  if 'xla_gpu_deterministic_ops' not in flags:
    os.environ['XLA_FLAGS'] = f'{flags} --xla_gpu_deterministic_ops=true'.strip()
