"""Folders on a disk or in an object store (gs://): one way to write whole files, to create one once, and to name one from another.

Everything that a run keeps goes through `etils.epath` and these few functions. An object store has no rename, no append and no lock, but an
object appears there whole; a disk has a rename. What others must be able to see is written by `write_text` or `replacing`; who owns a folder is
settled by `create`; what grows line by line is written beside (`Mirror`) and copied.
"""

import contextlib
import functools
import glob
import hashlib
import json
import os
import pathlib
import posixpath
import re
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator
from typing import Any, TextIO

import fsspec
import fsspec.config
from etils.epath import Path

from kdjax import machine
from kdjax.errors import StoreUnavailable, UserError

# The stores that can hold runs: Orbax writes arrays to no other. Text is read from any that fsspec knows.
RUNS = ('gs',)
EXTRAS = {'gcsfs': 'gcs', 's3fs': 's3'}  # a store's client -> the extra of kdjax that brings it
PATIENCE = 240.0  # seconds for an object store to answer the first time; its client gives up sooner (cloud_storage.py)

for _protocol in ('gs', 'gcs'):
  fsspec.register_implementation(
    _protocol, 'kdjax.storage.cloud.CloudStorage', clobber=True, errtxt='Please install gcsfs to access Google Storage'
  )

# Others write there too: a listing that is kept is a listing that is wrong.
for _protocol in ('gs', 'gcs', 's3'):
  fsspec.config.conf.setdefault(_protocol, {})['use_listings_cache'] = False


_library_glob = type(Path()).glob


def _glob(folder: Path, pattern: str) -> Iterator[Path]:
  """Match names in a folder, taking the folder's own name literally. pathlib does so; epath, which Orbax also uses, does not."""
  return _library_glob(type(folder)(glob.escape(os.fspath(folder))), pattern)


type(Path()).glob = _glob


def is_remote(path: str | os.PathLike) -> bool:
  return '://' in os.fspath(path)


def expand(path: str | os.PathLike) -> str:
  """Expand a leading '~' or '~NAME' to the home folder: shells do not after '='."""
  return os.fspath(path) if is_remote(path) else os.path.expanduser(path)


def match(pattern: str) -> list[str]:
  """Return what a glob pattern matches on the disk, sorted. A path that exists is taken literally, and so is an existing folder at its beginning.

  A '[' elsewhere may be literal too.
  """
  if os.path.exists(pattern):
    return [pattern]
  root, rest = '', pattern
  while '/' in rest and os.path.isdir(root + rest[: rest.index('/') + 1]):
    root, rest = root + rest[: rest.index('/') + 1], rest[rest.index('/') + 1 :]
  for tried in (glob.escape(root) + rest, pattern, glob.escape(root) + rest.replace('[', '[[]')):
    if found := glob.glob(tried, recursive=True):
      return sorted(found)
  return []


def split_list(text: str, exists: Callable[[str], bool], matches: Callable[[str], bool]) -> list[str]:
  """Split a list of names at its commas, except commas within an existing name, and strip blanks.

  Args:
    exists: whether a text is an existing name; the longest one is used.
    matches: whether a text is a pattern that finds something; the shortest one is used.
  """
  pieces, parts = text.split(','), []
  while pieces:
    joined = [','.join(pieces[:n]).strip() for n in range(1, len(pieces) + 1)]
    existing = [n for n, name in enumerate(joined, 1) if exists(name)]
    found = (n for n, name in enumerate(joined, 1) if matches(name))
    n = max(existing) if existing else next(found, 1) if len(joined) > 1 else 1
    parts.append(joined[n - 1])
    pieces = pieces[n:]
  return [part for part in parts if part]


def resolve_from(folder: str, path: str | os.PathLike) -> str:
  """Resolve a relative path against `folder`; '' is the current folder."""
  return expand(path) if is_remote(path) else os.path.join(folder, expand(path))


def runs_path(path: str | os.PathLike) -> Path:
  """A folder of runs, or of one. Raises UserError if it is in a store that can hold none."""
  scheme, separator, _ = os.fspath(path).partition('://')
  if separator and scheme not in RUNS:
    raise UserError(
      f'{os.fspath(path)}: no run can be kept in {scheme}://, where Orbax writes no checkpoints; '
      'name a folder in a bucket of gs://, or on a disk that all hosts see'
    )
  if '\\' in os.fspath(path):
    raise UserError(f'{os.fspath(path)}: TensorStore reads a backslash as a slash; use a folder name without one')
  return Path(expand(path))


def absolute(path: str | os.PathLike) -> Path:
  return Path(path if is_remote(path) else os.path.abspath(expand(path)))


def relative(path: str | os.PathLike, folder: str | os.PathLike) -> str:
  """`path` as seen from `folder`, as os.path.relpath has it. A path of another store is kept whole: `resolve` understands both."""
  one, other = expand(path), expand(folder)
  if _store(one) != _store(other):
    return one if is_remote(one) else os.path.abspath(one)
  return os.path.relpath(one, other)


def resolve(folder: str | os.PathLike, name: str) -> Path:
  """The inverse of `relative`. An object store knows no '..': it is resolved here."""
  if is_remote(name):
    return Path(name)
  scheme, separator, rest = os.fspath(folder).rpartition('://')
  return Path(scheme + separator + posixpath.normpath(posixpath.join(rest, name)))


def write_text(path: str | os.PathLike, text: str, durable: bool = True) -> None:
  """Write a whole file; readers see the old one or the new one. A file with this text is left alone, so a finished run may be read-only."""
  file = Path(path)
  with contextlib.suppress(OSError, ValueError):
    if read_bytes(file) == text.encode():
      return
  with replacing(file, durable) as temporary:
    temporary.write_text(text, encoding='utf-8')


@contextlib.contextmanager
def replacing(path: str | os.PathLike, durable: bool = True) -> Iterator[pathlib.Path]:
  """Yield a local file to write, which then replaces `path` whole. Where the block fails, `path` stays as it was.

  Args:
    durable: flush the file and its folder, so that a crash of the host leaves the old file or the new one. Without it a crash
      may leave an empty file: for heartbeats.
  """
  file = Path(path)
  folder = pathlib.Path(tempfile.gettempdir() if is_remote(file) else file.parent)
  temporary = folder / f'.{_here()}{os.getpid()}-{uuid.uuid4().hex[:8]}.{file.name}'  # some writers go by the suffix
  try:
    with naming(path):
      folder.mkdir(parents=True, exist_ok=True)
      _remove_leftovers(folder, file.name)
      yield temporary
      if is_remote(file):
        file.write_bytes(temporary.read_bytes())
      else:
        if durable:
          flush(temporary)
        os.replace(temporary, file)
        if durable:
          flush(folder)
  finally:
    with contextlib.suppress(OSError):
      temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
  """Give a local disk's errors the name of the file: those of an open file, as for a full or failing disk, have none."""
  try:
    yield
  except OSError as e:
    if e.errno is not None:  # a store's own errors are text
      e.filename = str(path)
    raise


@functools.cache
def _here() -> str:
  """What begins the names of temporary files of processes that this one can see."""
  return hashlib.sha256(f'{machine.name()} {machine.pid_namespace()}'.encode()).hexdigest()[:8] + '-'


@functools.cache  # once a process: a heartbeat is written every other second
def _remove_leftovers(folder: pathlib.Path, name: str) -> None:
  """Remove temporary files for this file that killed processes of this machine have left."""
  for path in folder.glob(f'.{_here()}*.{glob.escape(name)}'):
    pid = path.name.split('-')[1]
    if pid.isdigit() and machine.start_time(int(pid)) is None:
      path.unlink(missing_ok=True)


def flush(path: str | os.PathLike) -> None:
  """Write a file, or the names in a folder, through to the disk."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def read_bytes(path: str | os.PathLike) -> bytes:
  """A file that may be replaced at this moment: the old one or the new one. An open object would be read in pieces of both."""
  if is_remote(path):
    store, name = fsspec.core.url_to_fs(os.fspath(path))
    return store.cat_file(name)
  return pathlib.Path(path).read_bytes()


def write_json(path: str | os.PathLike, value: Any, durable: bool = True) -> None:
  write_text(path, json.dumps(value, indent=1), durable)


def read_json(path: str | os.PathLike) -> dict[str, Any] | None:
  """The file's value; None where it is missing. Raises UserError if it is damaged."""
  try:
    value = parse_json(read_bytes(path))
    if not isinstance(value, dict):
      raise ValueError('not what was written')
    return value
  except FileNotFoundError:
    return None
  except ValueError as e:
    raise UserError(f'{path} is damaged ({e}); delete it if the run is not needed, or restore it') from None


def parse_json(text: str | bytes) -> Any:
  """Parse JSON. Raises ValueError for any that cannot be parsed, also where it is nested too deeply (RecursionError) or not UTF-8."""
  try:
    return json.loads(text)
  except RecursionError:
    raise ValueError('nested too deeply') from None


def create(path: str | os.PathLike, text: str) -> None:
  """Write a file that must not exist: of several that try at one moment one succeeds, and the others get a FileExistsError."""
  opened = fsspec.open(os.fspath(path), 'xb') if is_remote(path) else open(path, 'xb')  # noqa: SIM115 - closed below
  with naming(path):
    with opened as file:
      file.write(text.encode())
    if not is_remote(path):
      flush(path)
      flush(pathlib.Path(path).parent)


def check_writable(folder: str | os.PathLike) -> None:
  """Write to an object store, before any device is asked for; local disks raise on their own.

  Raises:
    UserError: the store refuses.
    StoreUnavailable: it does not answer.
  """
  path = runs_path(folder)
  if not is_remote(path):
    return
  found: list[Exception | None] = [StoreUnavailable('no answer')]
  # In a thread: some clients retry for ever if nobody answers.
  thread = threading.Thread(target=lambda: found.__setitem__(0, _trouble(path)), daemon=True)
  thread.start()
  thread.join(PATIENCE)
  if (error := found[0]) is None:
    return
  if is_outage(path, error):
    raise StoreUnavailable(f'{folder}: the store does not answer ({describe_error(error)})') from error
  raise UserError(
    f"{folder} cannot be written ({describe_error(error)}); correct the name of the bucket, or this machine's permissions"
  )


class Mirror:
  """A folder to append files in: the folder itself, or for one in an object store a local one, copied there by `push`."""

  def __init__(self, folder: str | os.PathLike):
    self.folder = Path(folder)
    self._scratch = tempfile.TemporaryDirectory(prefix='kdjax-') if is_remote(folder) else None  # goes with this object
    self.local = pathlib.Path(self._scratch.name if self._scratch else os.fspath(folder))
    self._pushed: dict[pathlib.Path, int] = {}

  def fetch(self, name: str) -> None:
    """Brings a file that an earlier process has pushed, if there is one."""
    self.local.mkdir(parents=True, exist_ok=True)
    if self._scratch and (self.folder / name).exists():
      (self.local / name).write_bytes(read_bytes(self.folder / name))

  def appending(self, name: str) -> TextIO:
    """A file of the folder, open at its end."""
    self.fetch(name)
    return open(self.local / name, 'a', encoding='utf-8')

  def push(self) -> None:
    """Copy what has grown since the last time. While the store does not answer, nothing is copied: the next push does it."""
    if not self._scratch:
      return
    with contextlib.suppress(StoreUnavailable):
      self._push()

  def _push(self) -> None:
    for file in (path for path in self.local.rglob('*') if path.is_file()):
      size = file.stat().st_size
      if self._pushed.get(file) != size:
        (self.folder / file.relative_to(self.local).as_posix()).write_bytes(file.read_bytes())
        self._pushed[file] = size


# What TensorStore, which writes the arrays of checkpoints, says of a store that does not answer. All its errors are ValueErrors.
# It retries some answers itself; a 401, as while credentials are being renewed, it does not.
_OUTAGE = re.compile(
  r"UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|All \d+ retry attempts failed|http_response_code='(401|408|429|5\d\d)'"
)


def is_outage(path: str | os.PathLike, error: BaseException | None) -> bool:
  """Return whether an error in reading or writing `path` is the object store's, and may pass."""
  while error is not None:
    if isinstance(error, StoreUnavailable) or (is_remote(path) and _OUTAGE.search(str(error))):
      return True
    error = error.__cause__ or error.__context__
  return False


def missing_extra(error: BaseException) -> str | None:
  """The extra that brings the client which, as an error says, is not installed; None for any other error."""
  client = getattr(error.__cause__, 'name', None) if isinstance(error, ImportError) else None
  return EXTRAS.get(client or '')


def read_errors(path: str | os.PathLike) -> tuple[type[Exception], ...]:
  """What reading a file of text may raise: in a store whatever its client does."""
  return (Exception,) if is_remote(path) else (OSError, UnicodeDecodeError)


def describe_error(error: BaseException) -> str:
  """An error of a store's client in one line."""
  if extra := missing_extra(error):
    return f"its client is not installed: pip install 'kdjax[{extra}]'"
  return f'{type(error).__name__}: {(str(error).splitlines() or [""])[0][:200]}'


def _trouble(folder: Path) -> Exception | None:
  """The error of writing a file there and removing it; None if there is none."""
  probe = folder / f'.probe-{uuid.uuid4().hex[:8]}'
  try:
    probe.write_text('may this be written?')
    probe.unlink()
    return None
  except Exception as e:  # whatever the store's client raises
    return e


def _store(path: str) -> str:
  """'gs://bucket', or '' for the disk."""
  scheme, separator, rest = path.partition('://')
  return f'{scheme}://{rest.partition("/")[0]}' if separator else ''
