"""Sources of text: map a source's name to a stream of documents.

    embedded:speeches            text shipped with ordinary Python packages, so that a first run downloads nothing
    wiki/*.jsonl.zst             a path or glob: text, JSON lines, Parquet (these also in an object store: gs://bucket/*.jsonl.zst), ArrayRecord
    tfds:wiki40b/en:train        a dataset that TFDS has prepared as ArrayRecord
    hf:folder-or-name:train      a dataset that Hugging Face's `datasets` reads
    tokens:part-*.array_record   token ids, decoded to text so that documents can be hashed and bytes counted; a record may hold several
                                 documents
    A@0.7, B@0.3                 several sources, separated by commas; weights are shares of the text (corpus.py)

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

from kdjax.data import embedded, hubs, readers
from kdjax.data.compressed import File
from kdjax.data.records import MissingField, NullText
from kdjax.data.tokenizer import Tokenizer
from kdjax.errors import SourceGone, UserError
from kdjax.storage import paths
from kdjax.storage.files import digest

log = logging.getLogger('kdjax')
_TOKENS = 'tokens:'
_WEIGHT = re.compile(r'(.*\S)\s*@\s*(\d+(?:\.\d*)?|\.\d+)')


@dataclasses.dataclass(frozen=True)
class _Part:
  """A file or a dataset. `texts` streams its documents, given the text field and the tokenizer of its token ids; `stamp` changes with the data."""

  name: str
  texts: Callable[[str, Tokenizer | None], Iterator[str | NullText]]
  stamp: Callable[[], tuple]
  file: File | None = None
  cut: collections.Counter | None = None  # counts characters cut by the edges of records


def documents(
  source: str,
  text_field: str = 'text',
  tokenizer: Tokenizer | None = None,
  on_null: Callable[[NullText], Any] | None = None,
) -> Iterator[str]:
  """Stream the documents' texts in a fixed order.

  Args:
    source: as above; weights are ignored (the caller applies them, see `mixture`).
    text_field: the field or column that holds a document's text.
    tokenizer: decodes token ids.
    on_null: called for each record without text, which is then skipped; None: such a record is an error.

  Raises:
    UserError: a name, file or line cannot be read, or no record has the field. The message says where and how to fix it.
  """
  missing, has_field = None, False
  parts = _resolve(source)
  for part in parts:
    for text in part.texts(text_field, tokenizer):
      if isinstance(text, NullText):
        if on_null is None:
          raise text
        on_null(text)
        missing = missing or (text if isinstance(text, MissingField) else None)
      has_field = has_field or not isinstance(text, MissingField)
      if isinstance(text, str):
        yield text
      del text  # a document may fill much of the memory: keep one copy
  if missing is not None and not has_field:
    raise missing  # the field's name is wrong, rather than some records lacking text
  if n := sum(part.cut['characters'] for part in parts if part.cut):
    _log_cut(source, n)


@functools.cache  # a corpus is read several times
def _log_cut(source: str, n: int) -> None:
  log.warning('%s: records begin or end inside a character %d times; the partial characters are dropped', source, n)


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
  """Return whether any part of a source holds token ids."""
  return any(name.startswith(_TOKENS) for name in _parsed(source)[0])


def signature(source: str) -> str:
  """16 hexadecimal digits over the names, sizes and modification times of a source's files. Nothing is read."""
  stamps = [part.stamp() for part in _resolve(source)]
  return digest(repr(stamps).encode())


def mixture(source: str) -> list[tuple[str, float]]:
  """The parts that are to be mixed, and their weights; the whole source with weight 1 where none is given.

  Raises UserError if some have a weight and some do not, or it is 0.
  """
  names, weights = _parsed(source)
  return list(zip(names, weights, strict=True)) if weights else [(source, 1.0)]


def is_weighted(source: str) -> bool:
  """Return whether the parts of a source have weights."""
  return bool(_parsed(source)[1])


def seen_from(folder: str, source: str) -> str:
  """Resolve a source's relative paths against `folder`; '' is the current folder."""
  if not folder:
    return source
  return ', '.join(_moved(part, folder) for part in _split(source, folder))


def _moved(part: str, folder: str) -> str:
  if not _exists(part, folder):
    name = _bare(part)
    if name != part:
      return _moved(name, folder) + part[len(name) :]
  prefix, path = _prefixed(part)
  is_name = prefix in (hubs.HF, hubs.TFDS) and not _exists(part, folder)
  if part.startswith(embedded.PREFIX) or is_name or paths.is_remote(path):
    return part
  return prefix + paths.resolve_from(folder, path)


def _parsed(source: str) -> tuple[list[str], list[float]]:
  """The names of the source's parts, and their weights, if they have any."""
  parts = _split(source)
  if not parts:
    raise UserError(f'data source {source!r} names nothing; give a path, a glob, or one of {embedded.names()}')
  found = [None if _exists(part) else _WEIGHT.fullmatch(part) for part in parts]
  if not any(found):
    return parts, []
  bare = [part for part, match in zip(parts, found, strict=True) if not match or not float(match[2])]
  if bare:
    raise UserError(f'data source {source!r}: {", ".join(bare)} needs a weight above 0 beside the others (NAME@0.3)')
  return [match[1] for match in found if match], [float(match[2]) for match in found if match]


def _split(source: str, folder: str = '') -> list[str]:
  """Split a source at its commas, except commas in the name of an existing file or folder."""
  exists = lambda name: _exists(name, folder) or _exists(_bare(name), folder)
  return paths.split_list(source, exists, lambda name: _matches(_bare(name), folder))


def _bare(part: str) -> str:
  """Return a part's name without its weight, if it has one."""
  match = _WEIGHT.fullmatch(part)
  return match[1] if match else part


def _prefixed(name: str) -> tuple[str, str]:
  """Split a name into its prefix ('hf:', 'tfds:', 'tokens:' or '') and the rest."""
  prefix = next((p for p in (_TOKENS, hubs.HF, hubs.TFDS) if name.startswith(p)), '')
  return prefix, name.removeprefix(prefix)


def _exists(name: str, folder: str = '') -> bool:
  """Return whether a file or folder has exactly this name: 'a[1],b@2.txt' may be one."""
  prefix, path = _prefixed(name)
  if not path or paths.is_remote(path):
    return False
  # A config, version and split may follow a dataset's folder.
  names = [path] if prefix not in (hubs.HF, hubs.TFDS) else [path.rsplit(':', n)[0] for n in range(3)]
  return any(os.path.exists(paths.resolve_from(folder, one)) for one in names)


def _matches(name: str, folder: str) -> bool:
  """Return whether a local glob matches anything; True for names of other kinds (embedded, dataset, remote)."""
  prefix, path = _prefixed(name)
  if name.startswith(embedded.PREFIX) or prefix in (hubs.HF, hubs.TFDS) or paths.is_remote(path):
    return True
  return glob.has_magic(path) and bool(paths.match(paths.resolve_from(folder, path)))


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


def _without_tokenizer(
  texts: Callable[[str], Iterator[str | NullText]], text_field: str, _: Tokenizer | None
) -> Iterator[str | NullText]:
  return texts(text_field)


def _token_texts(path: File, cut: collections.Counter, text_field: str, tokenizer: Tokenizer | None) -> Iterator[str]:
  if tokenizer is None:
    raise UserError(
      f'{path}: token ids need the tokenizer that produced them; set data.tokenizer to its file, or to bytes'
    )
  return readers.token_texts(path, tokenizer, cut)


def _stamp(path: File) -> tuple:
  """Name, size and time of the last change."""
  if isinstance(path, pathlib.Path):
    return path.name, path.stat().st_size, path.stat().st_mtime_ns
  stat = path.stat()
  return path.name, stat.length, int(stat.mtime)


def _match(pattern: str) -> list[File]:
  pattern = pattern.removeprefix('file://')
  found = _in_store(pattern) if paths.is_remote(pattern) else _on_disk(paths.expand(pattern))
  for path in found:
    readers.kind(path)
  return found


def _on_disk(pattern: str) -> list[File]:
  if os.path.isdir(pattern):
    raise UserError(f'data source {pattern} is a folder; give a glob such as {os.path.join(pattern, "**", "*.jsonl")}')
  found: list[File] = [pathlib.Path(name) for name in paths.match(pattern) if os.path.isfile(name)]
  if not found:
    raise SourceGone(
      f'data source {pattern!r} matches no file (seen from {os.getcwd()}); '
      f'correct the path, or use one of {embedded.names()}'
    )
  return found


def _in_store(pattern: str) -> list[File]:
  try:
    store, name = fsspec.core.url_to_fs(pattern)
    # '[' may be literal: try an object of exactly this name first, and escaped brackets last.
    found = {name: store.info(name)} if glob.has_magic(name) and store.isfile(name) else {}
    found = found or store.glob(name, detail=True) or store.glob(name.replace('[', '[[]'), detail=True)
    files: list[File] = [
      paths.Path(store.unstrip_protocol(file)) for file, about in found.items() if about['type'] != 'directory'
    ]
    is_folder = not files and store.isdir(name)
  except Exception as error:  # whatever the store's client raises
    raise SourceGone(f'data source {pattern!r} cannot be read ({paths.describe_error(error)})') from None
  if is_folder:
    raise UserError(f'data source {pattern} is a folder; give a glob such as {pattern.rstrip("/")}/**/*.jsonl')
  if not files:
    raise SourceGone(f'data source {pattern!r} matches no file; correct the bucket or the pattern')
  return files
