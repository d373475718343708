"""Shared by all commands: read the config from the command line, define option types, report errors as one line.

`--config=FILE[:ARG]` names a Python file with `get_config(arg)`; `--config.a.b=VALUE` changes a field. argparse handles the other options.
Exit codes (kdjax/errors.py): 0 done; 1 a run cannot continue; 2 the command line, the config or a file is wrong; 75 unfinished after SIGTERM
or the loss of another process, and the same command resumes it; 130 stopped by Ctrl-C; 141 nobody reads the output.
"""

import argparse
import contextlib
import dataclasses
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax

from kdjax import config as config_lib
from kdjax.config import Config, config_file, describe
from kdjax.errors import (
  FAILED,
  STOPPED,
  TEMPORARY,
  WRONG,
  ConfigError,
  ProcessLost,
  StoreUnavailable,
  TrainingError,
  UserError,
)
from kdjax.runtime import distributed, interrupts, preemption, progress, streams
from kdjax.runtime.options import Parser, axis, count, machines, positive, runners, seed, share  # noqa: F401 - of commands
from kdjax.runtime.preemption import Preempted
from kdjax.storage import paths
from kdjax.storage.files import NO_SPACE

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
  path, arg = config_file.split_spec(paths.expand(spec))
  config = config_file.read_config(path, arg)
  fields = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
  unknown = set(config.keys()) - fields
  if len(unknown) > max(3, len(config.keys()) / 2):
    raise ConfigError(
      [f'{path} is no config for this command: it knows nothing of {", ".join(sorted(unknown)[:4])}, ...']
    )
  with config_file.convert_errors(path):  # references between fields are resolved only here
    for former, name in config_lib.fields.former_names(kind).items():
      if _has(config, former):
        log.warning('note: %s: %s is called %s now', path, former, name)
    problems = config_lib.override(config, overrides, kind)
    try:
      resolved = config_lib.resolve_as(kind, check, config)
    except ConfigError as e:
      raise ConfigError(problems + e.problems) from None
  if problems:
    raise ConfigError(problems)
  return resolved


def _has(config: Any, key: str) -> bool:
  """Return whether a ConfigDict has a field of this dotted name."""
  name, _, rest = key.partition('.')
  return name in config and (not rest or (hasattr(config[name], 'keys') and _has(config[name], rest)))


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
  kind: type = Config,
) -> tuple[T, argparse.Namespace]:
  """The config, which is of this kind, and the command's own options."""
  group = parser.add_argument_group('config')
  shipped = ', '.join(config_file.shipped())
  group.add_argument(
    '--config', metavar='FILE[:ARG]', help=f'a config file, or the name of one that kdjax ships: {shipped}'
  )
  group.add_argument('--config.FIELD', metavar='VALUE', dest='field', help='change a field of the config')
  group.add_argument(
    '--help-config',
    metavar='PREFIX',
    nargs='?',
    action=_HelpConfig,
    kind=kind,
    help='explain the fields of the config, or those that begin with PREFIX, and exit',
  )
  spec, overrides, rest = split_args(argv)
  args = parser.parse_args(rest)
  if spec is None:
    if overrides:
      raise ConfigError([f'--config.{next(iter(overrides))}: there is no --config=FILE to change'])
    raise ConfigError(['--config=FILE is missing, e.g. --config=configs/weak2strong.py'])
  return load(spec, overrides), args


class _HelpConfig(argparse.Action):
  """Print the fields of a config at once, as --help does, whatever else is on the command line."""

  def __init__(self, *args, kind: type, **kwargs):
    super().__init__(*args, **kwargs)
    self.kind = kind

  def __call__(self, parser, namespace, values, option_string=None):
    print(describe.help_text(self.kind, (values or '').removeprefix('--').removeprefix('config.')))
    sys.exit()


def set_up_logging() -> None:
  """Print log messages of kdjax as plain lines, and only errors of other libraries. For commands and notebooks."""
  logging.basicConfig(level=logging.INFO, format='%(message)s', handlers=[progress.Handler()])
  log.setLevel(logging.INFO)  # these two, where a library has set up the root logger before
  for handler in logging.getLogger().handlers:
    handler.setFormatter(logging.Formatter('%(message)s'))
  for name, level in QUIETER.items():
    logging.getLogger(name).setLevel(level)


@contextlib.contextmanager
def user_errors(resumable: bool = False) -> Iterator[None]:
  """Print a user's mistakes as lines on stderr, without a traceback, and exit with their code.

  Args:
    resumable: the command saves its progress and can be resumed, so SIGTERM ends it with TEMPORARY.
  """
  set_up_logging()
  streams.make_printable()
  sys.unraisablehook = _unraisable
  with (
    interrupts.raise_on_signals(preemption.termination_error() if resumable else None),
    _reporting(),
    streams.exit_without_reader(),
  ):
    yield


@contextlib.contextmanager
def _reporting() -> Iterator[None]:
  try:
    yield
  except TrainingError as e:
    _exit(e, FAILED)
  except ProcessLost as e:
    _exit_lost(e)
  except StoreUnavailable as e:
    _exit(UserError(f'{e}; once it does, the same command resumes from the last checkpoint'), TEMPORARY)
  except UserError as e:
    _exit(e, WRONG)
  except ImportError as e:
    if not paths.missing_extra(e):
      raise
    _exit(UserError(f'a path is in an object store, but {paths.describe_error(e)}'), WRONG)
  except OSError as e:
    if e.errno is None:  # an object store's
      _exit(UserError(f"{paths.describe_error(e)}; correct the path, or this machine's permissions"), FAILED)
    where, full = e.filename or 'a file', e.errno in NO_SPACE
    fix = 'free some disk space and run the same command again' if full else 'correct the path or its permissions'
    _exit(UserError(f'{where} cannot be used ({e.strerror}); {fix}'), FAILED if full else WRONG)
  except MemoryError:
    _exit(UserError(NO_MEMORY), FAILED)
  except (jax.errors.JaxRuntimeError, ValueError) as e:
    what = (str(e).splitlines() or [''])[0][:200]
    if isinstance(e, jax.errors.JaxRuntimeError) and ('RESOURCE_EXHAUSTED' in str(e) or 'Out of memory' in str(e)):
      _exit(UserError(f'{NO_MEMORY} ({what})'), FAILED)
    if not distributed.is_lost(e):
      raise
    _exit_lost(e)
  except Preempted as e:
    interrupts.report_end(str(e))
    sys.exit(e.code)
  except KeyboardInterrupt:
    interrupts.report_end('stopped')
    sys.exit(STOPPED)


def _unraisable(what: Any) -> None:
  """Leave out what TensorStore's threads print, once for each file, when a save has failed for lack of space."""
  if str(what.exc_value) != 'Event loop is closed':
    sys.__unraisablehook__(what)


def _exit_lost(error: Exception) -> None:
  what = (str(error).splitlines() or [''])[0][:200]
  _exit(UserError(f'another process is gone ({what}); {distributed.AGAIN}'), TEMPORARY)


def _exit(error: UserError, code: int) -> None:
  with contextlib.suppress(BrokenPipeError):  # nobody reads it: only the exit code matters
    for line in str(error).splitlines():
      print(line if line.startswith('config error') else f'error: {line}', file=sys.stderr)
    sys.stderr.flush()
  sys.exit(code)
