"""Files of documents, by suffix: text, JSON lines, Parquet, ArrayRecord; the first two also compressed."""

import collections
import contextlib
import functools
import gzip
import io
import json
import lzma
import pathlib
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import zstandard
from array_record.python.array_record_module import ArrayRecordReader

from kdjax import paths
from kdjax.data.store import token_dtype
from kdjax.data.text import decoded, without_surrogates
from kdjax.data.tokenizer import Tokenizer
from kdjax.errors import UserError

Lines = BinaryIO | gzip.GzipFile | lzma.LZMAFile | io.BufferedReader
File: TypeAlias = pathlib.Path | paths.Path  # on a disk, in an object store
_OPENERS: dict[str, Callable[[BinaryIO], Lines]] = {
  '': lambda file: file,
  '.gz': lambda file: gzip.open(file, 'rb'),  # noqa: SIM115 (the caller closes it)
  '.xz': lambda file: lzma.open(file, 'rb'),  # noqa: SIM115
  '.zst': lambda file: io.BufferedReader(_ZstdFile(file)),
}
_KINDS = {
  '.txt': '.txt',
  '.jsonl': '.jsonl',
  '.json': '.jsonl',
  '.parquet': '.parquet',
  '.array_record': '.array_record',
  '.arrayrecord': '.array_record',
}
_COMPRESSED = ('.txt', '.jsonl')
FIELDS = 'data.text_field (or eval.ood_text_field)'
SUFFIXES = '.txt, .jsonl or .json (each also with .gz, .xz or .zst), .parquet, .array_record'
_RECORDS = 256  # of an ArrayRecord file that are read at once


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


def kind(path: File) -> tuple[str, str]:
  """('.txt' | '.jsonl' | '.parquet' | '.array_record', compression's suffix or ''). Raises UserError for another suffix."""
  compression = path.suffix if path.suffix in _OPENERS else ''
  found = _KINDS.get(pathlib.Path(path.stem).suffix if compression else path.suffix, '')
  if not found or (compression and found not in _COMPRESSED):
    raise UserError(f'{path}: unknown suffix; data files end in {SUFFIXES}')
  return found, compression


def texts(path: File, text_field: str) -> Iterator[str]:
  """The documents of a file, in its order."""
  found = kind(path)[0]
  if found == '.parquet':
    yield from _parquet_texts(path, text_field)
  elif found == '.array_record':
    yield from _array_record_texts(path, text_field)
  else:
    with _opened(path) as f:
      if found == '.txt':
        yield decoded(f.read(), path)
      else:
        yield from _json_texts(f, path, text_field)


def token_texts(path: File, tokenizer: Tokenizer, cut: collections.Counter | None = None) -> Iterator[str]:
  """The texts of ArrayRecord records that hold token ids, little-endian, two bytes each (four above 65,536 tokens).

  A record may hold several documents, with their beginning, end or separator tokens: each is a text of its own. Special tokens are no text.

  Args:
    cut: counts the characters of which a record's edge left a part; these are left out.
  """
  if kind(path)[0] != '.array_record':
    raise UserError(f'{path}: token ids are read from .array_record files alone')
  cut = collections.Counter() if cut is None else cut
  dtype = token_dtype(tokenizer.vocab_size)
  for number, record in enumerate(_array_records(path)):
    if len(record) % dtype.itemsize:
      raise UserError(f'{path}, record {number}: {len(record)} bytes are no whole number of {dtype.name} token ids')
    ids = np.frombuffer(record, dtype)
    if len(ids) and ids.max() >= tokenizer.vocab_size:
      raise UserError(
        f'{path}, record {number}: token {ids.max()} is not in the vocabulary of {tokenizer.vocab_size}; data.tokenizer must be the one that made them'
      )
    for piece in tokenizer.split(ids) or [ids[:0]]:
      yield _whole_characters(tokenizer, piece, cut)


def _whole_characters(tokenizer: Tokenizer, ids: np.ndarray, cut: collections.Counter) -> str:
  """The text of token ids, less the parts of characters at its edges, which are counted."""
  text = tokenizer.decode(ids.tolist())
  kept = text.strip('\ufffd')
  if kept == text or np.array_equal(tokenizer.encode_batch([text])[0], ids):  # a text may hold that character itself
    return text
  for edge in (text[: len(text) - len(text.lstrip('\ufffd'))], text[len(text.rstrip('\ufffd')) :] if kept else ''):
    cut['characters'] += bool(edge)
  return kept


def json_records(path: File) -> Iterator[tuple[str, dict[str, Any]]]:
  """The objects of a file of JSON lines, each with its place (`path:line`) for messages."""
  with _opened(path) as lines:
    yield from _json_lines(lines, path)


@contextlib.contextmanager
def _opened(path: File) -> Iterator[Lines]:
  try:
    with path.open('rb') as file, _OPENERS[kind(path)[1]](file) as f:
      yield f
  except (gzip.BadGzipFile, lzma.LZMAError, zstandard.ZstdError, zlib.error, EOFError) as error:
    raise UserError(f'{path}: the compressed file is damaged ({error}); fetch it again') from error
  except PermissionError as error:
    raise UserError(f'{path}: cannot be read ({error.strerror}); mend its permissions') from error


def _json_texts(lines: Lines, path: File, text_field: str) -> Iterator[str]:
  for where, record in _json_lines(lines, path):
    yield field_of(record, text_field, where)


def field_of(record: dict[str, Any], text_field: str, where: str) -> str:
  """A record's text. Raises UserError where the field is not there, listing those that are, or holds no text."""
  if text_field not in record:
    raise UserError(f'{where}: no field {text_field!r}; it has {sorted(record)}; set {FIELDS} to one of them')
  value = record[text_field]
  if isinstance(value, bytes):
    value = decoded(value, where)
  if not isinstance(value, str):
    found = type(value).__name__
    raise UserError(f'{where}: field {text_field!r} holds a {found}, not a string; set {FIELDS} to another one')
  return without_surrogates(value, where)


def _json_lines(lines: Lines, path: File) -> Iterator[tuple[str, dict[str, Any]]]:
  position = 0
  for number, line in enumerate(lines, 1):
    text = decoded(line, path, position)
    position += len(line)
    if text.strip():
      where = f'{path}:{number}'
      yield where, _json_object(text, where)


def _json_object(text: str, where: str) -> dict[str, Any]:
  try:
    record = json.loads(text)
  except ValueError as error:
    raise UserError(f'{where}: not JSON ({error}); each line must be one JSON object') from error
  if not isinstance(record, dict):
    raise UserError(f'{where}: not a JSON object but a {type(record).__name__}; each line must be one JSON object')
  return record


def _parquet_texts(path: File, text_field: str) -> Iterator[str]:
  try:
    with path.open('rb') as raw, pyarrow.parquet.ParquetFile(raw) as file:
      schema = file.schema_arrow
      if text_field not in schema.names:
        raise UserError(f'{path}: no column {text_field!r}; it has {sorted(schema.names)}; set {FIELDS} to one of them')
      column = schema.field(text_field).type
      if not (pa.types.is_string(column) or pa.types.is_large_string(column)):
        raise UserError(f'{path}: column {text_field!r} holds {column}, not strings; set {FIELDS} to another one')
      number = 0
      for batch in file.iter_batches(columns=[text_field], batch_size=1024):
        for value in batch.column(0).to_pylist():
          number += 1
          if value is None:
            raise UserError(f'{path}, row {number}: column {text_field!r} is null; leave such rows out')
          yield value
  except (pa.ArrowException, OSError) as error:
    if getattr(error, 'errno', None):  # of the disk, not of what is on it
      raise
    raise UserError(f'{path}: the Parquet file is damaged ({str(error).splitlines()[0]}); fetch it again') from error


def _array_record_texts(path: File, text_field: str) -> Iterator[str]:
  """Records that are text, or all of them JSON objects: the first one tells."""
  as_text: Callable[[bytes, str], str] | None = None
  for number, record in enumerate(_array_records(path)):
    where = f'{path}, record {number}'
    if as_text is None:
      as_text = functools.partial(_json_text, text_field) if _is_json_object(record) else decoded
    yield as_text(record, where)


def _json_text(text_field: str, record: bytes, where: str) -> str:
  return field_of(_json_object(decoded(record, where), where), text_field, where)


def _is_json_object(record: bytes) -> bool:
  try:
    return isinstance(json.loads(record), dict)
  except ValueError:
    return False


def _array_records(path: File) -> Iterator[bytes]:
  if not isinstance(path, pathlib.Path):
    raise UserError(f'{path}: an ArrayRecord file must be on a disk; copy it there')
  try:
    reader = ArrayRecordReader(str(path), 'readahead_buffer_size:0')
    total = reader.num_records()
    if not reader.ok():  # it says so in no other way where a file is cut at certain places
      raise RuntimeError('it is not whole')
    for first in range(0, total, _RECORDS):
      yield from reader.read(list(range(first, min(first + _RECORDS, total))))
  except (RuntimeError, ValueError, IndexError) as error:  # UserErrors are not raised in here
    raise UserError(
      f'{path}: the ArrayRecord file is damaged ({str(error).splitlines()[0][:160]}); fetch it again'
    ) from error
