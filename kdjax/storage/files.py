"""Folders that appear whole or not at all, and small files that know their own checksum."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import pathlib
import secrets
import shutil
import tempfile
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np

from kdjax import machine
from kdjax.errors import UserError
from kdjax.storage import paths

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_CHUNK = 1 << 22
SIGN_OF_LIFE = 60.0  # seconds between two signs of life of a builder, for other machines
ABANDONED = 24 * 3600.0  # seconds without one


class StoreDamaged(UserError):
  """A store's files are not what was written. Nothing was read from it."""

  def __init__(self, path: str | os.PathLike, what: str):
    super().__init__(f'{path}: {what}; delete its folder and run again to rebuild it')


def digest(data: bytes, size: int = 8) -> str:
  """Hexadecimal blake2b of `data`, `size` bytes long."""
  return hashlib.blake2b(data, digest_size=size).hexdigest()


def new_digest() -> hashlib.blake2b:
  """An empty hash with `update` and `hexdigest`, for streams."""
  return hashlib.blake2b(digest_size=8)


def file_digest(path: str | os.PathLike) -> str:
  """Like `digest` with 16 bytes, of a whole file."""
  hasher = hashlib.blake2b(digest_size=16)
  with open(path, 'rb') as f:
    while chunk := f.read(_CHUNK):
      hasher.update(chunk)
  return hasher.hexdigest()


def canonical_json(value: Any) -> bytes:
  """The one JSON text of a value: the same value always gives the same bytes."""
  return json.dumps(value, sort_keys=True, indent=1, ensure_ascii=True).encode()


def write_sealed(path: pathlib.Path, value: dict) -> None:
  """Write `value` with its own checksum, so that `read_sealed` notices any changed bit."""
  path.write_bytes(canonical_json({**value, 'checksum': digest(canonical_json(value), 16)}))


def read_sealed(path: pathlib.Path) -> dict:
  """Read what `write_sealed` wrote.

  Raises:
    StoreDamaged: the file is missing or differs by a single bit from what was written.
  """
  data = read_bytes(path)
  try:
    value = paths.parse_json(data)
  except ValueError as error:  # bad JSON and bad UTF-8 alike
    raise StoreDamaged(path, 'is not the JSON that was written') from error
  if not isinstance(value, dict):
    raise StoreDamaged(path, 'is not the JSON that was written')
  checksum = value.pop('checksum', None)
  # The bytes are compared too: a flipped bit in white space or in an escape leaves the parsed value as it is.
  if checksum != digest(canonical_json(value), 16) or data != canonical_json({**value, 'checksum': checksum}):
    raise StoreDamaged(path, 'does not match its checksum')
  return value


def read_bytes(path: pathlib.Path) -> bytes:
  """The bytes of a store's file; `StoreDamaged` if it is not there."""
  try:
    return path.read_bytes()
  except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
    raise StoreDamaged(path, 'is missing') from error


def save_array(path: pathlib.Path, array: np.ndarray) -> None:
  """Write an array as .npy, without a copy of it. (np.save's own error for a full disk does not say that the disk is full.)"""
  array = np.ascontiguousarray(array)
  with path.open('wb') as file:
    np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
    file.write(array.reshape(-1).view(np.uint8).data)


def describe_files(folder: pathlib.Path, names: list[str]) -> dict[str, dict]:
  """Size and digest of each file, for `check_files`."""
  return {n: {'size': os.path.getsize(folder / n), 'digest': file_digest(folder / n)} for n in names}


def check_files(folder: pathlib.Path, files: dict[str, dict], hash_up_to: int | None = None) -> None:
  """Compare a folder's files with what `describe_files` saw.

  Args:
    hash_up_to: files larger than this many bytes are compared by size only; None: every file is hashed.

  Raises:
    StoreDamaged: a file is missing or differs.
  """
  for name, seen in files.items():
    path = folder / name
    if not path.is_file():
      raise StoreDamaged(path, 'is missing')
    size = path.stat().st_size
    if size != seen['size']:
      raise StoreDamaged(path, f'has {size:,} bytes where {seen["size"]:,} were written')
    if (hash_up_to is None or size <= hash_up_to) and file_digest(path) != seen['digest']:
      raise StoreDamaged(path, 'does not match its checksum')


def link_or_copy(source: pathlib.Path, target: pathlib.Path) -> None:
  """Put a file under a second name; a copy of it where the disk knows no hard links."""
  try:
    os.link(source, target)
  except FileNotFoundError:
    raise
  except OSError:
    shutil.copyfile(source, target)


@contextlib.contextmanager
def building(folder: str | os.PathLike) -> Iterator[pathlib.Path]:
  """Yield a temporary sibling to write into; rename it to `folder` once the block has ended well.

  Everything is flushed to disk before the rename, so a kill or a power cut leaves either the whole folder or none. If
  the block raises, the temporary folder is removed. What killed builders left behind is removed first.

  Raises:
    FileExistsError: `folder` exists, now or when it comes to renaming (another builder was faster). It is left alone.
    UserError: the disk is full, or the folder cannot be written.
  """
  folder = pathlib.Path(folder)
  if folder.exists():
    raise FileExistsError(folder)
  try:
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder.parent)
    temporary, lock = _temporary_sibling(folder)
  except OSError as error:
    raise UserError(f'cannot write to {folder.parent}: {error.strerror}; mend that, or set data.cache') from error
  try:
    with _alive(temporary):
      yield temporary
    _flush(temporary)
    _rename(temporary, folder)
  except OSError as error:
    if error.errno in NO_SPACE:
      raise UserError(f'no space left to write {folder}; free some, or set data.cache to a larger disk') from error
    raise
  finally:
    shutil.rmtree(temporary, ignore_errors=True)
    os.close(lock)


def remove_leftovers(parent: pathlib.Path) -> None:
  """Remove the temporary folders of dead builders.

  On this machine the lock of a living builder is held. A lock may not reach another machine (NFS, gcsfuse), so a folder of another machine is
  removed once it has had no sign of life for ABANDONED seconds, by the file system's own clock.
  """
  with contextlib.suppress(OSError), tempfile.TemporaryFile(dir=parent) as probe:
    now = os.fstat(probe.fileno()).st_mtime
    for path in parent.glob('.*.building-*'):
      with contextlib.suppress(FileNotFoundError):
        ours = path.name.rpartition('.building-')[2].startswith(machine.name())
        if _is_unlocked(path) if ours else now - path.stat().st_mtime > ABANDONED:
          shutil.rmtree(path, ignore_errors=True)


def _is_unlocked(path: pathlib.Path) -> bool:
  lock = os.open(path, os.O_RDONLY)
  try:
    return _lock(lock)
  finally:
    os.close(lock)


@contextlib.contextmanager
def _alive(folder: pathlib.Path) -> Iterator[None]:
  """Show other machines that the folder's builder lives: renew the folder's time of change."""
  done = threading.Event()

  def renew():
    while not done.wait(SIGN_OF_LIFE):
      with contextlib.suppress(OSError):
        os.utime(folder)

  thread = threading.Thread(target=renew, daemon=True)
  thread.start()
  try:
    yield
  finally:
    done.set()
    thread.join()


def discard(folder: pathlib.Path) -> None:
  """Remove a folder so that no half of it is ever seen under its own name."""
  trash = _temporary_name(folder)
  with contextlib.suppress(FileNotFoundError):  # another process was faster
    os.rename(folder, trash)
    shutil.rmtree(trash, ignore_errors=True)


def _temporary_name(folder: pathlib.Path) -> pathlib.Path:
  return folder.with_name(f'.{folder.name}.building-{machine.name()}-{secrets.token_hex(4)}')


def _temporary_sibling(folder: pathlib.Path) -> tuple[pathlib.Path, int]:
  while True:
    path = _temporary_name(folder)
    path.mkdir()
    try:
      lock = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
      continue
    _lock(lock)
    # A cleaner may have come between mkdir and the lock; then the folder is gone and we take another name.
    if path.exists():
      return path, lock
    os.close(lock)


def _lock(descriptor: int) -> bool:
  """Return whether the lock was free, and is ours now. The kernel frees it when its holder dies, in whatever way."""
  try:
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    return False
  except OSError as error:
    if error.errno in _NO_LOCKS:  # such a file system keeps leftovers rather than lose a living builder's work
      return False
    raise
  return True


def _flush(folder: pathlib.Path) -> None:
  for path in [folder, *folder.rglob('*')]:
    paths.flush(path)


def _rename(temporary: pathlib.Path, folder: pathlib.Path) -> None:
  try:
    os.rename(temporary, folder)
  except OSError as error:
    if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
      raise FileExistsError(folder) from error
    raise
  paths.flush(folder.parent)
