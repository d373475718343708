"""Read files of documents by suffix: text, JSON lines, Parquet, ArrayRecord; the first two may be compressed."""

import collections
import functools
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from kdjax.data import compressed, jsonl, parquet
from kdjax.data.compressed import OPENERS, File
from kdjax.data.records import NullText, field_of
from kdjax.data.store import token_dtype
from kdjax.data.text import decode_text
from kdjax.data.tokenizer import Tokenizer
from kdjax.errors import UserError

_KINDS = {
  '.txt': '.txt',
  '.jsonl': '.jsonl',
  '.json': '.jsonl',
  '.parquet': '.parquet',
  '.array_record': '.array_record',
  '.arrayrecord': '.array_record',
}
_COMPRESSED = ('.txt', '.jsonl')
SUFFIXES = '.txt, .jsonl or .json (each also with .gz, .xz or .zst), .parquet, .array_record'
_RECORDS = 256  # records of an ArrayRecord file read at once


def kind(path: File) -> tuple[str, str]:
  """Return ('.txt' | '.jsonl' | '.parquet' | '.array_record', suffix of the compression or ''). Raises UserError for any other suffix."""
  compression = path.suffix if path.suffix in OPENERS else ''
  found = _KINDS.get(pathlib.Path(path.stem).suffix if compression else path.suffix, '')
  if not found or (compression and found not in _COMPRESSED):
    raise UserError(f'{path}: unknown suffix; data files end in {SUFFIXES}')
  return found, compression


def texts(path: File, text_field: str) -> Iterator[str | NullText]:
  """Stream the documents of a file in order; a record without text becomes a NullText."""
  found = kind(path)[0]
  if found == '.parquet':
    yield from parquet.texts(path, text_field)
  elif found == '.array_record':
    yield from _array_record_texts(path, text_field)
  elif found == '.jsonl':
    for where, record in json_records(path):
      text = field_of(record, text_field, where)
      del record
      yield text
  else:
    with compressed.open_text(path, kind(path)[1]) as file:
      yield decode_text(compressed.read_all(file, str(path)), path)


def token_texts(path: File, tokenizer: Tokenizer, cut: collections.Counter | None = None) -> Iterator[str]:
  """Decode ArrayRecord records of token ids: little-endian, two bytes each (four if the vocabulary exceeds 65,536 tokens).

  A record may hold several documents, delimited by begin, end or separator tokens; each becomes a text. Other special tokens are dropped.

  Args:
    cut: counts characters that are cut by a record's edge; they are dropped.
  """
  if kind(path)[0] != '.array_record':
    raise UserError(
      f'{path}: only .array_record files can hold token ids; convert the file, or remove tokens: from the source'
    )
  cut = collections.Counter() if cut is None else cut
  dtype = token_dtype(tokenizer.vocab_size)
  for number, record in enumerate(_array_records(path)):
    if len(record) % dtype.itemsize:
      raise UserError(f'{path}, record {number}: {len(record)} bytes is not a whole number of {dtype.name} token ids')
    ids = np.frombuffer(record, dtype)
    if len(ids) and ids.max() >= tokenizer.vocab_size:
      raise UserError(
        f'{path}, record {number}: token {ids.max()} is outside the vocabulary of {tokenizer.vocab_size}; set data.tokenizer to the tokenizer that produced these ids'
      )
    for piece in tokenizer.split(ids) or [ids[:0]]:
      yield _whole_characters(tokenizer, piece, cut)


def _whole_characters(tokenizer: Tokenizer, ids: np.ndarray, cut: collections.Counter) -> str:
  """Decode token ids; drop and count incomplete characters at both edges."""
  text = tokenizer.decode(ids.tolist())
  kept = text.strip('\ufffd')
  if kept == text or np.array_equal(tokenizer.encode_batch([text])[0], ids):  # the text itself may contain U+FFFD
    return text
  for edge in (text[: len(text) - len(text.lstrip('\ufffd'))], text[len(text.rstrip('\ufffd')) :] if kept else ''):
    cut['characters'] += bool(edge)
  return kept


def json_records(path: File) -> Iterator[tuple[str, dict[str, Any]]]:
  """Stream the objects of a JSON lines file, each with its position (`path:line`) for messages."""
  with compressed.open_text(path, kind(path)[1]) as lines:
    yield from jsonl.read(lines, path)


def _array_record_texts(path: File, text_field: str) -> Iterator[str | NullText]:
  """Stream records that are all text or all JSON objects; the first record decides which."""
  as_text: Callable[[bytes, str], str | NullText] | None = None
  for number, record in enumerate(_array_records(path)):
    where = f'{path}, record {number}'
    if as_text is None:
      as_text = functools.partial(_json_text, text_field) if jsonl.is_object(record) else decode_text
    yield as_text(record, where)


def _json_text(text_field: str, record: bytes, where: str) -> str | NullText:
  return field_of(jsonl.parse_object(decode_text(record, where), where), text_field, where)


def _array_records(path: File) -> Iterator[bytes]:
  if not isinstance(path, pathlib.Path):
    raise UserError(f'{path}: an ArrayRecord file must be on a local disk; copy it there')
  try:
    reader = ArrayRecordReader(str(path), 'readahead_buffer_size:0')
    total = reader.num_records()
    if not reader.ok():  # the only sign of some truncations
      raise RuntimeError('it is incomplete')
    for first in range(0, total, _RECORDS):
      yield from reader.read(list(range(first, min(first + _RECORDS, total))))
  except (RuntimeError, ValueError, IndexError) as error:  # UserErrors are not raised in here
    raise UserError(
      f'{path}: the ArrayRecord file is damaged ({str(error).splitlines()[0][:160]}); fetch it again'
    ) from error
