"""Where text comes from: a source's name -> a stream of documents.

    embedded:speeches            text that ordinary Python packages carry, so that a first run downloads nothing
    wiki/*.jsonl.zst             a path or a glob: text, JSON lines, Parquet (these also in an object store: gs://bucket/*.jsonl.zst), ArrayRecord
    tfds:wiki40b/en:train        a dataset that TFDS has prepared as ArrayRecord
    hf:folder-or-name:train      a dataset that Hugging Face's `datasets` reads
    tokens:part-*.array_record   token ids, which are made text again, so that documents are told apart and bytes are counted; a record may
                                 hold several documents
    A@0.7, B@0.3                 several, with commas between them; with weights: shares of the text (corpus.py)

A `.txt` file is one document; a `.jsonl` or `.json` file has one object a line. Files are read in the order of their paths, so the stream is
the same every time.
"""

import collections
import dataclasses
import functools
import glob
import logging
import os
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import fsspec

from kdjax import paths
from kdjax.data import embedded, hubs, readers
from kdjax.data.files import digest
from kdjax.data.readers import File
from kdjax.data.tokenizer import Tokenizer
from kdjax.errors import UserError

log = logging.getLogger('kdjax')
_TOKENS = 'tokens:'
_WEIGHT = re.compile(r'(.*\S)\s*@\s*(\d+(?:\.\d*)?|\.\d+)')


@dataclasses.dataclass(frozen=True)
class _Part:
  """A file or a dataset: its documents, given the field that holds their text and the tokenizer of their tokens, and what tells of a change."""

  name: str
  texts: Callable[[str, Tokenizer | None], Iterator[str]]
  stamp: Callable[[], tuple]
  file: File | None = None
  cut: collections.Counter | None = None  # characters of which the edges of records left a part


def documents(source: str, text_field: str = 'text', tokenizer: Tokenizer | None = None) -> Iterator[str]:
  """Streams the documents' texts, in a fixed order.

  Args:
    source: as above; weights are left to the caller (`mixture`).
    text_field: the field or column that holds a document's text.
    tokenizer: of token ids.

  Raises:
    UserError: a name, file or line that cannot be read, with where it is and how to mend it.
  """
  parts = _resolve(source)
  for part in parts:
    yield from part.texts(text_field, tokenizer)
  if n := sum(part.cut['characters'] for part in parts if part.cut):
    _log_cut(source, n)


@functools.cache  # a corpus is read several times
def _log_cut(source: str, n: int) -> None:
  log.warning('%s: records begin or end inside a character %d times; its parts are left out', source, n)


def records(source: str) -> Iterator[tuple[str, dict[str, Any]]]:
  """Streams the objects of JSON lines, in a fixed order, each with its place (`path:line`) for messages.

  Args:
    source: a path, a glob, or several with commas between them, of `.jsonl` or `.json` files as above.

  Raises:
    UserError: a name, file or line that cannot be read, with where it is and how to mend it.
  """
  for part in _resolve(source):
    if part.file is None or readers.kind(part.file)[0] != '.jsonl':
      raise UserError(f'{part.name}: not JSON lines; give .jsonl or .json, also with .gz, .xz or .zst')
    yield from readers.json_records(part.file)


def holds_tokens(source: str) -> bool:
  """Whether a part of a source holds token ids."""
  return any(name.startswith(_TOKENS) for name in _parsed(source)[0])


def signature(source: str) -> str:
  """16 hexadecimal digits over the names, sizes and modification times of a source's files. Nothing is read."""
  stamps = [part.stamp() for part in _resolve(source)]
  return digest(repr(stamps).encode())


def mixture(source: str) -> list[tuple[str, float]]:
  """The parts that are to be mixed, and their weights; the whole source with weight 1 where none is given.

  Raises UserError where some have a weight and some do not, or it is 0.
  """
  names, weights = _parsed(source)
  return list(zip(names, weights, strict=True)) if weights else [(source, 1.0)]


def _parsed(source: str) -> tuple[list[str], list[float]]:
  """The names of the source's parts, and their weights, if they have any."""
  parts = [source] if os.path.exists(source) else [p.strip() for p in source.split(',') if p.strip()]
  if not parts:
    raise UserError(f'data source {source!r} names nothing; give a path, a glob, or one of {embedded.names()}')
  found = [None if os.path.exists(part) else _WEIGHT.fullmatch(part) for part in parts]
  if not any(found):
    return parts, []
  bare = [part for part, match in zip(parts, found, strict=True) if not match or not float(match[2])]
  if bare:
    raise UserError(f'data source {source!r}: {", ".join(bare)} needs a weight above 0 beside the others (NAME@0.3)')
  return [match[1] for match in found if match], [float(match[2]) for match in found if match]


def _resolve(source: str) -> list[_Part]:
  """Each file or dataset once."""
  found: dict[str, _Part] = {}
  for name in _parsed(source)[0]:
    found.update((part.name, part) for part in _parts(name))
  return list(found.values())


def _parts(name: str) -> list[_Part]:
  if name.startswith(embedded.PREFIX):
    known = embedded.embedded(name)
    return [
      _Part(str(path), functools.partial(_embedded_texts, known, path), functools.partial(_stamp, path))
      for path in sorted(known.files(known.package))
    ]
  for prefix, kind in ((hubs.TFDS, hubs.TfdsSplit), (hubs.HF, hubs.HfSplit)):
    if name.startswith(prefix):
      split = kind(name)
      return [_Part(name, functools.partial(_without_tokenizer, split.texts), split.stamp)]
  tokens = name.startswith(_TOKENS)
  found = []
  for path in sorted(_match(name.removeprefix(_TOKENS))):
    stamp = functools.partial(_stamp, path)
    if tokens:
      cut: collections.Counter[str] = collections.Counter()
      found.append(_Part(str(path), functools.partial(_token_texts, path, cut), stamp, path, cut))
    else:
      texts = functools.partial(_without_tokenizer, functools.partial(readers.texts, path))
      found.append(_Part(str(path), texts, stamp, path))
  return found


def _embedded_texts(known: embedded.Embedded, path: pathlib.Path, *_) -> Iterator[str]:
  return known.read(path)


def _without_tokenizer(texts: Callable[[str], Iterator[str]], text_field: str, _: Tokenizer | None) -> Iterator[str]:
  return texts(text_field)


def _token_texts(path: File, cut: collections.Counter, text_field: str, tokenizer: Tokenizer | None) -> Iterator[str]:
  if tokenizer is None:
    raise UserError(f'{path}: token ids need the tokenizer that made them: set data.tokenizer to its file, or to bytes')
  return readers.token_texts(path, tokenizer, cut)


def _stamp(path: File) -> tuple:
  """Name, size and time of the last change."""
  if isinstance(path, pathlib.Path):
    return path.name, path.stat().st_size, path.stat().st_mtime_ns
  stat = path.stat()
  return path.name, stat.length, int(stat.mtime)


def _match(pattern: str) -> list[File]:
  found = _in_store(pattern) if paths.is_remote(pattern) else _on_disk(os.path.expanduser(pattern))
  for path in found:
    readers.kind(path)
  return found


def _on_disk(pattern: str) -> list[File]:
  if os.path.isdir(pattern):
    raise UserError(f'data source {pattern} is a folder; give a glob such as {os.path.join(pattern, "**", "*.jsonl")}')
  names = [pattern] if os.path.isfile(pattern) else glob.glob(pattern, recursive=True)
  found: list[File] = [pathlib.Path(name) for name in names if os.path.isfile(name)]
  if not found:
    raise UserError(
      f'data source {pattern!r} matches no file (seen from {os.getcwd()}); '
      f'mend the path, or use one of {embedded.names()}'
    )
  return found


def _in_store(pattern: str) -> list[File]:
  try:
    store, name = fsspec.core.url_to_fs(pattern)
    found = store.glob(name, detail=True)
    files: list[File] = [
      paths.Path(store.unstrip_protocol(file)) for file, about in found.items() if about['type'] != 'directory'
    ]
    is_folder = not files and store.isdir(name)
  except Exception as error:  # whatever the store's client raises
    raise UserError(f'data source {pattern!r} cannot be read ({paths.said(error)})') from None
  if is_folder:
    raise UserError(f'data source {pattern} is a folder; give a glob such as {pattern.rstrip("/")}/**/*.jsonl')
  if not files:
    raise UserError(f'data source {pattern!r} matches no file; mend the name of the bucket, or the pattern')
  return files
