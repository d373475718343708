"""Text <-> token ids: raw bytes, a byte-level BPE trained here, or any Hugging Face `tokenizers` file (other formats are converted).

A document's tokens never contain the tokens that start and end each document in a store: special tokens that occur in
text are encoded as plain text.
"""

import functools
import json
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers

from kdjax.data import foreign, tokenizer_json
from kdjax.data import roles as roles_lib
from kdjax.data.pieces import Cutter, Encoder
from kdjax.data.roles import Roles
from kdjax.data.tokenizer_json import SEPARATOR
from kdjax.errors import UserError
from kdjax.storage import paths
from kdjax.storage.files import (
  StoreDamaged,
  canonical_json,
  check_files,
  describe_files,
  digest,
  read_sealed,
  write_sealed,
)

_FILE, _META = 'tokenizer.json', 'tokenizer_meta.json'
_WITH_FILES = (_FILE, 'tokenizer.model')  # their folder may have files that name roles


class Tokenizer:
  """Bytes (256 ids and the separator, 256), or a `tokenizers` model.

  Args:
    model_json: the text of a `tokenizers` file; None: bytes.
    separator: one token that starts and ends documents; '': the tokens with these roles (kdjax/data/roles.py).
    name: its name in error messages.
    files: the files of its folder that may name roles.
    roles: the roles it was saved with; None: read them from `files`.

  Attributes:
    separator, separator_id: the token that starts each document in a store.
    end_id: the token that ends a text; may equal the separator.
    begin_id, padding_id: the token that begins a text, and the one that pads a batch; None: there is none.
    stop_ids: the tokens that stop generation, `end_id` first.

  Raises:
    UserError: it is not a `tokenizers` file, or none of its tokens can start a document.
  """

  def __init__(
    self,
    model_json: str | None = None,
    separator: str = '',
    name: str = 'tokenizer',
    files: Mapping[str, Any] | None = None,
    roles: Roles | None = None,
  ):
    self._name = name
    parsed = None if model_json is None else tokenizer_json.parse_tokenizer(model_json, name)
    if parsed is not None and separator in ('', SEPARATOR) and tokenizer_json.is_bytes(parsed):
      parsed = model_json = None  # bytes, as `to_json` wrote them
    self._model_json = model_json
    if parsed is None:
      self._model, self.roles = None, roles_lib.share_token(SEPARATOR)
      self.vocab_size, self.fingerprint = 257, digest(b'bytes')
      self._text = tokenizer_json.TextKept(keeps_text=True, changes_little=True)
    else:
      self._model = _model(parsed, (), name)
      self.roles = roles or _read_roles(parsed, self._model, separator, files or {}, name)
      if unmarked := _unmarked(self._model, self.roles):
        self._model = _model(parsed, unmarked, name)
      self.vocab_size = max(self._model.get_vocab(with_added_tokens=True).values()) + 1
      self.fingerprint = _fingerprint(parsed, self.roles, unmarked)
      self._text = tokenizer_json.text_kept(parsed, self._model)
    self.separator = self.roles.separator
    self.separator_id, self.end_id = self._id(self.roles.separator), self._id(self.roles.end)
    self.begin_id = self._id(self.roles.begin) if self.roles.begin else None
    self.padding_id = self._id(self.roles.padding) if self.roles.padding else None
    self.stop_ids = tuple(map(self._id, self.roles.stops))

  @property
  def keeps_text(self) -> bool:
    """Return whether the tokenizer's design guarantees that every text can be decoded from its tokens."""
    return self._text.keeps_text

  @property
  def unknown_id(self) -> int | None:
    """The id of the unknown token; None: there is none."""
    return self._text.unknown_id

  def _id(self, name: str) -> int:
    found = 256 if self._model is None else self._model.token_to_id(name)
    if found is None:
      raise UserError(f'{self._name}: token {name!r} is missing, but it was saved with it; restore the file')
    return found

  @functools.cached_property
  def special_ids(self) -> frozenset[int]:
    """The ids that no text contains: special tokens, and tokens with a role."""
    roles = map(self._id, self.roles.tokens)
    if self._model is None:
      return frozenset(roles)
    return frozenset([*roles, *(i for i, t in self._model.get_added_tokens_decoder().items() if t.special)])

  def tokens_beyond(self, n_rows: int) -> list[str]:
    """Return the tokens of texts and documents that have no row in a table of `n_rows`. (Other special tokens need none.)"""
    if n_rows >= self.vocab_size:
      return []
    if self._model is None:
      return [SEPARATOR]
    needless = self.special_ids - {self.separator_id, self.end_id}
    vocab = sorted(self._model.get_vocab(with_added_tokens=True).items(), key=lambda item: item[1])
    return [token for token, id_ in vocab if id_ >= n_rows and id_ not in needless]

  def split(self, ids: np.ndarray) -> list[np.ndarray]:
    """Split a stream into documents at the tokens that start and end them; other special tokens are dropped."""
    edges = {self.separator_id, self.end_id, self.separator_id if self.begin_id is None else self.begin_id}
    at = np.flatnonzero(np.isin(ids, list(edges)))
    others = list(self.special_ids - edges)
    pieces = [piece[~np.isin(piece, [*edges, *others])] for piece in np.split(ids, at)]
    return [piece for piece in pieces if len(piece)]

  @functools.cached_property
  def _encoder(self) -> Encoder:
    assert self._model is not None
    return Encoder(self._model)

  @property
  def is_bytes(self) -> bool:
    return self._model is None

  @classmethod
  def from_file(cls, path: str | os.PathLike, separator: str = '') -> 'Tokenizer':
    """Load a Hugging Face `tokenizer.json` or the folder that holds one; foreign.py converts other formats."""
    file = paths.Path(paths.expand(path))
    in_store = paths.is_remote(file)
    if in_store and file.suffix in foreign.SUFFIXES:
      raise UserError(
        f'tokenizer {path}: only a tokenizer.json can be read from an object store; copy this file to a local disk'
      )
    try:
      file = file / _FILE if (file / _FILE).exists() else file
      if not in_store and (file.suffix in foreign.SUFFIXES or file.is_dir()):
        text = foreign.to_json(pathlib.Path(file))
      else:
        text = file.read_bytes().decode('utf-8')
      folder = file if file.is_dir() else file.parent if file.name in _WITH_FILES else None
      kept = _saved_roles(folder) if folder and not separator else {}
      files = {} if kept else roles_lib.read_files(folder)
    except paths.read_errors(file) as error:
      raise UserError(
        f'tokenizer {path} cannot be read ({paths.describe_error(error)}); give bpe, bytes, a tokenizer.json, .model or .tiktoken file, or a folder'
      ) from error
    return cls(text, name=str(path), **(kept or {'separator': separator, 'files': files}))

  @classmethod
  def load(cls, folder: str | os.PathLike) -> 'Tokenizer':
    """Read what `save` wrote; `StoreDamaged` if it has changed since."""
    folder = pathlib.Path(folder)
    meta = read_sealed(folder / _META)
    if meta['kind'] == 'bytes':
      return cls()
    check_files(folder, meta['files'])
    text = (folder / _FILE).read_text(encoding='utf-8')
    tokenizer = cls(text, name=str(folder / _FILE), **read_note(meta))
    if tokenizer.fingerprint != meta['fingerprint']:
      raise StoreDamaged(folder, 'the tokenizer is not the one that was saved')
    return tokenizer

  def save(self, folder: str | os.PathLike) -> None:
    """Write the tokenizer into a folder, which is made if need be. Other libraries can read its `tokenizer.json`."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if self._model_json is None:
      write_sealed(folder / _META, {'kind': 'bytes'})
      return
    (folder / _FILE).write_text(self._model_json, encoding='utf-8')
    meta = {**self.note(), 'fingerprint': self.fingerprint, 'files': describe_files(folder, [_FILE])}
    write_sealed(folder / _META, meta)

  def note(self) -> dict[str, Any]:
    """Return the metadata saved with the file, which `read_note` reads: kind and roles."""
    kind = 'bytes' if self.is_bytes else 'tokenizers'
    return {'kind': kind, 'separator': self.separator, 'roles': self.roles.as_dict()}

  def key(self) -> list[Any]:
    """Return the tokenizer's part of a corpus's key: the fingerprint; roles unless one token has all; 'measured' if losses are measured."""
    plain = not self.roles.closes and len(self.roles.stops) == 1
    roles = [] if plain else [self.roles.as_dict()]
    return [self.fingerprint, *roles, *([] if self._text.changes_little else ['measured'])]

  def encode_batch(self, texts: Sequence[str], special: bool = False, dtype: Any = np.int32) -> list[np.ndarray]:
    """Encode each text to an array of ids, without adding tokens. A special token's name in a text is that token if `special`, else plain text.

    Raises:
      UserError: the separator or the end token is an ordinary token, which text can contain.
    """
    if special:
      model = self.as_others_read_it()
      model.no_truncation()
      model.no_padding()
      encoded = model.encode_batch(list(texts), add_special_tokens=False)
      return [np.asarray(e.ids, dtype) for e in encoded]
    if self._model is None:
      return [np.frombuffer(text.encode(), np.uint8).astype(dtype) for text in texts]
    try:
      ids = self._encoder.encode(texts, dtype)
    except (
      Exception
    ) as error:  # the class that `tokenizers` raises for an unknown word, if the model has no unknown token
      raise UserError(
        f'{self._name}: cannot encode the text ({error}); set data.tokenizer to another tokenizer'
      ) from None
    for what, edge in (('separator', self.separator_id), ('end token', self.end_id)):
      if any((i == edge).any() for i in ids):
        token = self._model.id_to_token(edge)
        raise UserError(
          f'{self._name}: the {what} {token!r} is an ordinary token and occurs in a text; '
          'set data.separator to a special one'
        )
    return ids

  def decode(self, ids: Sequence[int]) -> str:
    """Ids -> text, separators included; bytes that are not UTF-8 become U+FFFD."""
    if self._model is not None:
      return self._model.decode([int(i) for i in ids], skip_special_tokens=False)
    return b''.join(SEPARATOR.encode() if i == self.separator_id else bytes([i]) for i in ids).decode(errors='replace')

  def decode_text(self, ids: Sequence[int]) -> str:
    """Decode ids to text, without special and unknown tokens."""
    left_out = {*self.special_ids, self.unknown_id}
    return self.decode([i for i in map(int, ids) if i not in left_out])

  def as_others_read_it(self) -> tokenizers.Tokenizer:
    """Build a separate `tokenizers` model that recognises special tokens in a text, as other libraries do."""
    return tokenizer_json.build_tokenizer(json.loads(self.to_json()), (), self._name)

  def to_json(self) -> str:
    """The text of a `tokenizers` file that gives the same ids. Bytes too have one."""
    return self._model_json if self._model_json is not None else tokenizer_json.bytes_json()

  def __reduce__(self):
    # A pickled `tokenizers` model loses the switch that keeps special tokens out of text.
    return Tokenizer, (self._model_json, '', self._name, None, self.roles)


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
  """Train a lossless byte-level BPE; the same texts and size give the same tokenizer.

  Args:
    texts: a stream; only the counts of its words are held in memory.
    vocab_size: number of ids, the 256 bytes and the separator `<|endoftext|>` included.
  """
  if vocab_size < 257:
    raise UserError(f'data.vocab_size={vocab_size} is too small for the 256 bytes and the separator; set at least 257')
  model = tokenizers.Tokenizer(tokenizers.models.BPE())
  model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  model.decoder = tokenizers.decoders.ByteLevel()
  model.encode_special_tokens = True  # a separator's name that occurs in the text is counted as text
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=[SEPARATOR],
    initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
    show_progress=False,
  )
  cutter = Cutter(json.loads(model.to_str()))
  model.train_from_iterator((piece for text in texts for piece in cutter.pieces(text)), trainer)
  return Tokenizer(model.to_str(), SEPARATOR, 'bpe')


def _read_roles(
  parsed: dict, model: tokenizers.Tokenizer, separator: str, files: Mapping[str, Any], name: str
) -> Roles:
  found = roles_lib.read_roles(model, files, name)
  if separator:
    if model.token_to_id(separator) is None:
      raise UserError(f'{name}: has no token {separator!r}; {_name_one(parsed)}')
    return roles_lib.share_token(separator, found, _unmarked(model, found))
  if found is None:
    usual = ' '.join(roles_lib.USUAL)
    raise UserError(f'{name}: has none of the usual separators ({usual}); {_name_one(parsed)}')
  return found


def read_note(note: Mapping[str, Any]) -> dict[str, Any]:
  """Convert the metadata of `Tokenizer.note` to arguments of Tokenizer. In older metadata, one token starts and ends documents."""
  if 'roles' not in note:
    return {'separator': note['separator']}
  return {'roles': Roles(**note['roles'] | {'stops': tuple(note['roles']['stops'])})}


def _saved_roles(folder: paths.Path) -> dict[str, Any]:
  """Read the same arguments from a folder in which kdjax has saved a tokenizer; {} for any other folder."""
  for file in (folder / 'run.json', folder / _META):
    if not file.exists():
      continue
    known = paths.read_json(file) or {}
    note = known.get('tokenizer') if file.name == 'run.json' else known
    if isinstance(note, dict) and 'separator' in note:
      return read_note(note)
  return {}


def _model(parsed: dict, unmarked: Sequence[str], name: str) -> tokenizers.Tokenizer:
  """Build the model with the `unmarked` tokens made special: only special tokens are kept out of text."""
  model = tokenizer_json.build_tokenizer(parsed, unmarked, name)
  model.no_truncation()
  model.no_padding()
  model.encode_special_tokens = True
  return model


def _unmarked(model: tokenizers.Tokenizer, roles: Roles | None) -> list[str]:
  """Return the added tokens that have a role but are not marked special: some files omit the mark."""
  plain = {token.content for token in model.get_added_tokens_decoder().values() if not token.special}
  return [token for token in roles.tokens if token in plain] if roles else []


def _fingerprint(parsed: dict, roles: Roles, unmarked: Sequence[str]) -> str:
  """Hash everything that a document's tokens depend on."""
  said = [tokenizer_json.content(parsed), roles.separator]
  said += [roles.end] if roles.closes else []
  others = sorted(set(unmarked) - {roles.separator, roles.end})
  return digest(canonical_json([*said, {'kept out of text': others}] if others else said))


def _name_one(parsed: dict) -> str:
  names = [t['content'] for t in tokenizer_json.added_tokens(parsed) if t.get('special')]
  such = f', such as one of {names[:20]}' if names else ''
  return f'set data.separator (--separator of a command) to a token that starts each document{such}'
