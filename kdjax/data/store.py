"""A token store: one folder that holds one stream of tokens and the table of the documents in it.

    tokens.array_record  blocks of 8192 tokens, one a record, the last one shorter; little-endian uint16 or uint32;
                         above 2^29 tokens several files, tokens-00000.array_record and so on, of that many each
    blocks.npy           a checksum of each block
    documents.npy        for each document: offset of its first token, bytes of its UTF-8 text, hash of its text
    meta.json            counts, dtype, fingerprints, sizes and digests of the other files

A document is stored as `[separator] + tokens`. So each token of a text is predicted, the first one from the separator
inside the document's own segment; and the label of a document's last token is the separator that follows: the end of
the document. If the tokenizer's end token differs from its begin token (kdjax/data/roles.py), a document is
`[begin] + tokens + [end]`, without the end if its text was cut. The begin token is then never a label.

Nothing is trusted: sizes, small files and token files of up to 256 MiB are checked when a store is opened, and each
block is checked each time that it is read.
"""

import errno
import itertools
import os
import pathlib
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from kdjax.data.tokenizer import Tokenizer
from kdjax.errors import UserError
from kdjax.storage import files
from kdjax.storage.files import StoreDamaged

VERSION = 1
BLOCK = 8192
SHARD_BLOCKS = (1 << 29) // BLOCK  # of one file: a gigabyte at two bytes a token
HASH_AT_OPEN = 256 << 20  # bytes: a larger token file is checked block by block as it is read
_TOKENS, _BLOCKS, _DOCUMENTS, _META = 'tokens.array_record', 'blocks.npy', 'documents.npy', 'meta.json'
_DOCUMENT = np.dtype([('offset', '<i8'), ('n_bytes', '<i8'), ('id', 'S16')])
_DTYPES: dict[str, np.dtype] = {'uint16': np.dtype('<u2'), 'uint32': np.dtype('<u4')}
# How ArrayRecord's reader reports what it cannot make sense of.
_DAMAGE = (RuntimeError, ValueError, IndexError, MemoryError)

_SLICE = 1 << 20  # tokens of a document written at once
COUNTED_TOKENS = 50_000_000  # that are read to know how frequent tokens are


def token_dtype(vocab_size: int) -> np.dtype:
  """The smallest of the store's dtypes that holds every id."""
  return _DTYPES['uint16' if vocab_size <= 1 << 16 else 'uint32']


class TokenStore:
  """A stream of tokens that can be read from any place; safe to share between threads, to pickle and to fork.

  Made by `TokenStore.open`.

  Attributes:
    folder: where it is.
    meta: what was written beside it (`extra_meta` under its own keys).
    offsets: int64[n_docs + 1], the place of each document's separator, and `n_tokens` at the end.
    n_bytes: int64[n_docs], the bytes of each document's text in UTF-8.
    doc_ids: S16[n_docs], the hash of each document's text.
    cut: the ids of documents whose text was cut, which have no end.
  """

  def __init__(self, folder: pathlib.Path, meta: dict, documents: np.ndarray, checksums: np.ndarray):
    self.folder = folder
    self.meta = meta
    self.offsets = np.append(documents['offset'], meta['n_tokens'])
    self.n_bytes = np.ascontiguousarray(documents['n_bytes'])
    self.doc_ids = np.ascontiguousarray(documents['id'])
    self.cut = frozenset(doc.encode() for doc in meta.get('cut', ()))
    self._checksums = checksums
    self._dtype = _DTYPES[meta['dtype']]
    self._lock = threading.Lock()
    self._readers: dict[int, ArrayRecordReader] = {}
    self._pid: int | None = None

  @classmethod
  def open(cls, folder: str | os.PathLike) -> 'TokenStore':
    """Open a store and check what can be checked at once.

    Raises:
      StoreDamaged: a file is missing, truncated or changed.
    """
    folder = pathlib.Path(folder)
    meta = files.read_sealed(folder / _META)
    if meta.get('version') != VERSION:
      raise StoreDamaged(folder, f'has format version {meta.get("version")}, this is version {VERSION}')
    if meta['dtype'] not in _DTYPES:
      raise StoreDamaged(folder, f'has the unknown dtype {meta["dtype"]}')
    files.check_files(folder, meta['files'], HASH_AT_OPEN)
    # These two are read whole anyway, whatever their size.
    files.check_files(folder, {n: meta['files'][n] for n in (_BLOCKS, _DOCUMENTS)})
    documents, checksums = np.load(folder / _DOCUMENTS), np.load(folder / _BLOCKS)
    if len(documents) != meta['n_docs'] or len(checksums) != -(-meta['n_tokens'] // BLOCK):
      raise StoreDamaged(folder / _META, 'does not fit the tables beside it')
    return cls(folder, meta, documents, checksums)

  @property
  def n_tokens(self) -> int:
    return self.meta['n_tokens']

  @property
  def n_docs(self) -> int:
    return self.meta['n_docs']

  @property
  def fingerprint(self) -> str:
    """Of the content: the tokenizer, the documents and their order, every token."""
    return self.meta['fingerprint']

  @property
  def separator_id(self) -> int:
    """The id of the token that starts each document."""
    return self.meta['separator_id']

  @property
  def end_id(self) -> int | None:
    """The id of the token that ends each document; None if the next document's separator does."""
    return self.meta.get('end_id')

  def document(self, i: int) -> np.ndarray:
    """Return a document from its separator to its end, inclusive, as int32; a cut document has no end."""
    tokens = self.read(int(self.offsets[i]), int(self.offsets[i + 1]))
    if self.end_id is None and self.doc_ids[i] not in self.cut:
      return np.append(tokens, self.separator_id)
    return tokens

  def text(self, i: int) -> np.ndarray:
    """Return a document's tokens as int32, without separator and end."""
    return self.text_of(self.read(int(self.offsets[i]), int(self.offsets[i + 1])))

  def text_of(self, tokens: np.ndarray) -> np.ndarray:
    """Strip separator and end from a document's tokens."""
    has_end = self.end_id is not None and tokens[-1] == self.end_id
    return tokens[1:-1] if has_end else tokens[1:]

  def read(self, start: int, stop: int) -> np.ndarray:
    """Tokens [start, stop) as int32.

    Raises:
      IndexError: outside the stream.
      StoreDamaged: a block is not what was written.
    """
    if not 0 <= start <= stop <= self.n_tokens:
      raise IndexError(f'tokens [{start}, {stop}) of a stream of {self.n_tokens}')
    if start == stop:
      return np.zeros(0, np.int32)
    first, last = start // BLOCK, (stop - 1) // BLOCK
    tokens = np.concatenate([self._block(i) for i in range(first, last + 1)])
    return tokens[start - first * BLOCK : stop - first * BLOCK].astype(np.int32)

  def counts(self, size: int, start: int = 0, stop: int | None = None) -> np.ndarray:
    """Count how often each of `size` tokens occurs as a label in [start, stop), by default in the whole stream; float64."""
    stop = self.n_tokens if stop is None else stop
    counts = np.zeros(size)
    for at in range(start, stop, 1 << 20):
      counts += np.bincount(self.read(at, min(at + (1 << 20), stop)), minlength=size)
    if self.end_id is not None:
      counts[self.separator_id] = 0
    return counts

  def verify(self) -> None:
    """Hashes every file whole and reads every block: `StoreDamaged` if a single bit has changed."""
    files.check_files(self.folder, self.meta['files'])
    for i in range(len(self._checksums)):
      self._block(i)

  def _block(self, index: int) -> np.ndarray:
    try:
      shard, place = divmod(index, self._shard_blocks)
      data = self._open_reader(shard).read([place])[0]
    except _DAMAGE as error:
      raise StoreDamaged(self._path(shard), f'block {index} cannot be read') from error
    n = min(BLOCK, self.n_tokens - index * BLOCK)
    if len(data) != n * self._dtype.itemsize or _checksum(index, data, self._dtype) != self._checksums[index]:
      raise StoreDamaged(self._path(shard), f'block {index} is not what was written')
    return np.frombuffer(data, self._dtype)

  @property
  def _shard_blocks(self) -> int:
    return self.meta.get('shard_blocks', SHARD_BLOCKS)

  def _path(self, shard: int) -> pathlib.Path:
    return self.folder / _shard_names(len(self._checksums), self._shard_blocks)[shard]

  def _open_reader(self, shard: int) -> ArrayRecordReader:
    with self._lock:
      if self._pid != os.getpid():  # not yet open, or opened by the process that this one was forked from
        self._readers, self._pid = {}, os.getpid()
      if shard not in self._readers:
        path = self._path(shard)
        if not path.is_file():
          raise StoreDamaged(path, 'is missing')
        self._readers[shard] = ArrayRecordReader(str(path), 'readahead_buffer_size:0', file_reader_buffer_size=1 << 15)
      return self._readers[shard]

  def __getstate__(self) -> dict:
    return {**self.__dict__, '_lock': None, '_readers': {}, '_pid': None}

  def __setstate__(self, state: dict) -> None:
    self.__dict__.update(state, _lock=threading.Lock())


def write_store(
  folder: str | os.PathLike,
  docs: Iterable[tuple[str, int, np.ndarray]],
  tokenizer: Tokenizer,
  extra_meta: Mapping[str, Any] | None = None,
) -> None:
  """Write a store; it appears under its name when it is whole and checked, or not at all.

  Args:
    folder: must not exist yet.
    docs: for each document the hash of its text (16 hexadecimal digits), the bytes of its text in UTF-8, its token ids
      without separator and end.
    tokenizer: whose ids they are.
    extra_meta: kept in `meta`, JSON values. `cut`: the hashes of documents whose text was cut, which get no end.

  Raises:
    UserError: no documents, an id outside the vocabulary, a full disk.
    FileExistsError: the folder exists.
  """
  with files.building(folder) as temporary:
    meta = _write_tokens(temporary, docs, tokenizer, frozenset((extra_meta or {}).get('cut', ())))
    names = [*_shard_names(-(-meta['n_tokens'] // BLOCK), SHARD_BLOCKS), _BLOCKS, _DOCUMENTS]
    meta |= {'version': VERSION, 'shard_blocks': SHARD_BLOCKS, 'files': files.describe_files(temporary, names)}
    files.write_sealed(temporary / _META, {**(extra_meta or {}), **meta})
    # A writer that failed in silence must not leave a store behind.
    TokenStore.open(temporary).verify()


def link_store(source: str | os.PathLike, folder: str | os.PathLike, extra_meta: Mapping[str, Any]) -> None:
  """Create a second folder for a store: the same files, hard-linked or copied, with updated metadata.

  Args:
    source: the folder of the existing store.
    folder: must not exist yet.
    extra_meta: overrides the same keys of the metadata of `source`.

  Raises:
    StoreDamaged: `source` is damaged.
  """
  with files.building(folder) as temporary:
    meta = TokenStore.open(source).meta
    for name in meta['files']:
      files.link_or_copy(pathlib.Path(source) / name, temporary / name)
    files.write_sealed(temporary / _META, {**meta, **extra_meta})
    TokenStore.open(temporary).verify()


def _write_tokens(
  folder: pathlib.Path, docs: Iterable[tuple[str, int, np.ndarray]], tokenizer: Tokenizer, cut: frozenset[str]
) -> dict:
  dtype = token_dtype(tokenizer.vocab_size)
  hasher = files.new_digest()
  rows: list[tuple[str, int, int]] = []  # of the documents' table: hash, bytes, tokens
  checksums: list[int] = []
  blocks = _blocks(_streams(docs, tokenizer, dtype, rows, cut))
  for shard in itertools.count():
    first = next(blocks, None)
    if first is None:
      break
    writer = ArrayRecordWriter(str(folder / _shard_name(shard)), 'group_size:1,uncompressed')
    try:
      for block in itertools.chain([first], itertools.islice(blocks, SHARD_BLOCKS - 1)):
        data = block.tobytes()
        hasher.update(data)
        checksums.append(_checksum(len(checksums), data, dtype))
        _checked(writer.write, data)
    finally:
      _checked(writer.close)
  if len(checksums) <= SHARD_BLOCKS and checksums:
    os.rename(folder / _shard_name(0), folder / _TOKENS)
  if not rows:
    raise UserError(f'{folder}: no documents to write')
  ids, n_bytes, lengths = zip(*rows, strict=True)
  documents = np.empty(len(rows), _DOCUMENT)
  documents['offset'] = np.cumsum((0, *lengths[:-1]))
  documents['n_bytes'] = n_bytes
  documents['id'] = ids
  files.save_array(folder / _DOCUMENTS, documents)
  files.save_array(folder / _BLOCKS, np.asarray(checksums, '<u4'))
  hasher.update(documents.tobytes() + tokenizer.fingerprint.encode())
  return {
    'n_tokens': sum(lengths),
    'n_docs': len(rows),
    'n_bytes': sum(n_bytes),
    'dtype': dtype.name,
    'block': BLOCK,
    'separator_id': tokenizer.separator_id,
    **({'end_id': tokenizer.end_id} if tokenizer.roles.closes else {}),
    'vocab_size': tokenizer.vocab_size,
    'tokenizer': tokenizer.fingerprint,
    'fingerprint': hasher.hexdigest(),
  }


def _shard_names(n_blocks: int, shard_blocks: int) -> list[str]:
  """The files of so many blocks."""
  n = -(-n_blocks // shard_blocks)
  return [_TOKENS] if n <= 1 else [_shard_name(shard) for shard in range(n)]


def _shard_name(shard: int) -> str:
  return f'tokens-{shard:05}.array_record'


def _streams(
  docs, tokenizer: Tokenizer, dtype: np.dtype, rows: list, cut: frozenset[str] = frozenset()
) -> Iterator[np.ndarray]:
  """Each document's part of the stream; its row of the documents' table is appended to `rows`."""
  first, none = np.array([tokenizer.separator_id]), np.zeros(0, np.int32)
  end = np.array([tokenizer.end_id]) if tokenizer.roles.closes else none
  for doc_id, n_bytes, tokens in docs:
    _check_ids(doc_id, tokens, tokenizer)
    last = none if doc_id in cut else end
    rows.append((doc_id, n_bytes, 1 + len(tokens) + len(last)))
    yield first.astype(dtype)
    for at in range(0, len(tokens), _SLICE):
      yield tokens[at : at + _SLICE].astype(dtype)
    if len(last):
      yield last.astype(dtype)


def _check_ids(doc_id: str, tokens: np.ndarray, tokenizer: Tokenizer) -> None:
  if len(tokens) and not 0 <= tokens.min() <= tokens.max() < tokenizer.vocab_size:
    ids = f'{tokens.min()}..{tokens.max()}'
    raise UserError(f'document {doc_id}: token ids {ids} are not in the vocabulary of {tokenizer.vocab_size}')
  for what, edge in (('separator', tokenizer.separator_id), ('end token', tokenizer.end_id)):
    if (tokens == edge).any():
      raise UserError(f'document {doc_id}: the {what} is among its tokens')


def _blocks(streams: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
  """Cut a stream into blocks of `BLOCK` tokens; the last one is shorter."""
  pending, n = [], 0
  for stream in streams:
    pending.append(stream)
    n += len(stream)
    if n >= BLOCK:
      joined = np.concatenate(pending)
      whole = n - n % BLOCK
      yield from joined[:whole].reshape(-1, BLOCK)
      pending, n = [joined[whole:]], n - whole
  if n:
    yield np.concatenate(pending)


def _checked(call: Callable[..., Any], *args) -> None:
  """Calls ArrayRecord's writer, which reports a full disk as a RuntimeError with the system's own words in it."""
  try:
    call(*args)
  except RuntimeError as error:
    code = next((c for c in files.NO_SPACE if os.strerror(c) in str(error)), errno.EIO)
    raise OSError(code, str(error)) from error


def _checksum(index: int, data: bytes, dtype: np.dtype) -> int:
  """CRC-32 of a block that also depends on its place and dtype, so that a swapped or reinterpreted block is seen."""
  return zlib.crc32(data, zlib.crc32(f'{index}:{dtype.name}'.encode()))
