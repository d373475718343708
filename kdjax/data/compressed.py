"""Open text files that may be compressed, and diagnose damaged or misnamed ones."""

import contextlib
import gzip
import io
import lzma
import pathlib
import zlib
from collections.abc import Callable, Iterator
from typing import BinaryIO, TypeAlias

import zstandard

from kdjax.errors import UserError
from kdjax.storage import paths

Lines = BinaryIO | gzip.GzipFile | lzma.LZMAFile | io.BufferedReader
File: TypeAlias = pathlib.Path | paths.Path  # on a local disk, in an object store
MAX_WINDOW = 1 << 31  # bytes: the largest window that the zstd library decompresses
LONGEST = 1 << 30  # bytes of a document: a few kilobytes of a compressed file can stand for more than the memory holds
_READ = 1 << 16  # bytes of a zstd file read at once; a block of four bytes can decompress to 128 KiB of text
_DAMAGE = (gzip.BadGzipFile, lzma.LZMAError, zstandard.ZstdError, zlib.error, EOFError)
OPENERS: dict[str, Callable[[BinaryIO], Lines]] = {
  # A store's file reads lines of any length only.
  '': lambda file: file if isinstance(file, io.BufferedReader) else io.BufferedReader(file, 1 << 20),  # type: ignore[type-var]
  '.gz': lambda file: gzip.open(file, 'rb'),  # noqa: SIM115 (the caller closes it)
  '.xz': lambda file: lzma.open(file, 'rb'),  # noqa: SIM115
  '.zst': lambda file: io.BufferedReader(_ZstdFile(file), 1 << 16),
}
_ZSTD = b'\x28\xb5\x2f\xfd'
# Magic bytes: (bytes, name of the format, the suffix kdjax expects; '': not supported).
_KNOWN = (
  (b'\x1f\x8b', 'gzip', '.gz'),
  (b'\xfd7zXZ\x00', 'xz', '.xz'),
  (_ZSTD, 'zstd', '.zst'),
  (b'PAR1', 'Parquet', '.parquet'),
  (b'BZh', 'bzip2', ''),
  (b'PK\x03\x04', 'zip', ''),
)


class _ZstdFile(io.RawIOBase):
  """Decompresses frame after frame. `zstandard`'s own reader silently accepts a truncated file."""

  def __init__(self, file: BinaryIO):
    self._file = file
    self._frame: zstandard.ZstdDecompressionObj | None = None
    self._ready = memoryview(b'')

  def readable(self) -> bool:
    return True

  def readinto(self, buffer) -> int:
    while not self._ready:
      data = self._frame.unused_data if self._frame and self._frame.eof else b''
      if not data and not (data := self._file.read(_READ)):
        if self._frame and not self._frame.eof:
          raise EOFError('it ends in the middle of a frame')
        return 0
      if self._frame is None or self._frame.eof:
        self._frame = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW).decompressobj()
      self._ready = memoryview(self._frame.decompress(data))
    n = min(len(buffer), len(self._ready))
    buffer[:n], self._ready = self._ready[:n], self._ready[n:]
    return n

  def close(self) -> None:
    self._file.close()
    super().close()


@contextlib.contextmanager
def open_text(path: File, compression: str) -> Iterator[Lines]:
  """Open a text file and decompress it while it is read.

  Args:
    compression: a key of OPENERS.

  Raises:
    UserError: the file is damaged or cannot be read, or its content does not match its suffix.
  """
  try:
    with path.open('rb') as file, OPENERS[compression](file) as f:
      yield f
  except _DAMAGE as error:
    raise UserError(f'{path}: {_damage(path, compression, error)}') from error
  except PermissionError as error:
    raise UserError(f'{path}: cannot be read ({error.strerror}); correct its permissions') from error
  except UserError as error:
    if misnamed := _misnamed(path, compression):
      raise UserError(f'{path}: {misnamed}') from error
    raise


def read_line(lines: Lines, where: str) -> bytes:
  """Read to the end of a line; b'' at the end of the file. Raises UserError for a line longer than LONGEST."""
  return _limited(lines.readline(LONGEST + 1), where)


def read_all(file: Lines, where: str) -> bytes:
  """Read a file to its end. Raises UserError if it holds more than LONGEST bytes."""
  return _limited(file.read(LONGEST + 1), where)


def _limited(data: bytes, where: str) -> bytes:
  if len(data) > LONGEST:
    raise UserError(f'{where}: a single document of more than {LONGEST:,} bytes, decompressed; split it')
  return data


def _damage(path: File, compression: str, error: BaseException) -> str:
  head = _head(path)
  if compression == '.zst' and head.startswith(_ZSTD) and (window := _window(head)) > MAX_WINDOW:
    return (
      f'it needs a window of {window:,} bytes, but zstd supports at most {MAX_WINDOW:,}; compress it with --long=31'
    )
  if compression == '.zst' and 'ictionary' in str(error):
    return 'it was compressed with a dictionary that it does not contain; compress it without one'
  if misnamed := _misnamed(path, compression):
    return f'the compressed file is damaged or misnamed: {misnamed}'
  return f'the compressed file is damaged ({error}); fetch it again'


def _window(head: bytes) -> int:
  """Return a zstd frame's window size in bytes (RFC 8878, 3.1.1.1.2); 0 for a single-segment frame or a cut header, which have none."""
  if len(head) < 6:
    return 0
  single, descriptor = head[4] & 0x20, head[5]
  return 0 if single else (1 << 10 + (descriptor >> 3)) * (8 + (descriptor & 7)) // 8


def _misnamed(path: File, compression: str) -> str:
  """Explain how a file's first bytes contradict its suffix; '' if they do not."""
  head = _head(path)
  found = next(((name, suffix) for begin, name, suffix in _KNOWN if head.startswith(begin)), None)
  if found is None:
    is_text = compression and len(head) >= 8 and all(byte >= 0x20 or byte in b'\t\r\n' for byte in head)
    return f'it begins with plain text; fetch it again, or remove {compression} from its name' if is_text else ''
  name, suffix = found
  if compression and suffix == compression:
    return ''
  return f'it begins like a {name} file; ' + (f'name it ...{suffix}' if suffix else 'unpack it first')


def _head(path: File) -> bytes:
  with path.open('rb') as file:
    return file.read(256)
