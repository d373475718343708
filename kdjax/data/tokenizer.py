"""Text <-> token ids: raw bytes, a byte-level BPE trained here, or any Hugging Face `tokenizers` file (others are turned into one).

A document's tokens never contain the separator that starts each document in a store, whatever its text says: special
tokens that occur in text are encoded as plain text.
"""

import functools
import json
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import tokenizers

from kdjax import paths
from kdjax.data import foreign
from kdjax.data.files import StoreDamaged, canonical, check_files, describe, digest, read_json, write_json
from kdjax.data.pieces import Cutter, Encoder
from kdjax.errors import UserError

SEPARATOR = '<|endoftext|>'
# Names for "a document starts here", and then for "it ends here": models are trained to see the first before any text.
_KNOWN_SEPARATORS = (
  '<|endoftext|>',
  '<|begin_of_text|>',
  '<s>',
  '<bos>',
  '<|bos|>',
  '[BOS]',
  '<|end_of_text|>',
  '</s>',
  '<eos>',
  '<|eos|>',
  '<|im_end|>',
  '[EOS]',
  '[SEP]',
)
# What a BPE's file may leave out.
_BPE_DEFAULTS = {
  'dropout': None,
  'unk_token': None,
  'continuing_subword_prefix': None,
  'end_of_word_suffix': None,
  'fuse_unk': False,
  'byte_fallback': False,
  'ignore_merges': False,
}
_FILE, _META = 'tokenizer.json', 'tokenizer_meta.json'


class Tokenizer:
  """Bytes (256 ids and the separator, 256), or a `tokenizers` model.

  Args:
    model_json: the text of a `tokenizers` file; None: bytes.
    separator: the token that starts each document; '': guessed from the names that are usual.
    name: what errors call it.

  Raises:
    UserError: not a `tokenizers` file, or no separator in it.
  """

  def __init__(self, model_json: str | None = None, separator: str = '', name: str = 'tokenizer'):
    parsed = None if model_json is None else _parse(model_json, name)
    if parsed is not None and separator in ('', SEPARATOR) and _content(parsed) == _content(json.loads(_bytes_json())):
      parsed = model_json = None  # bytes, as `to_json` wrote them
    self._model_json = model_json
    self._name = name
    if parsed is None:
      self._model, self.separator = None, SEPARATOR
      self.vocab_size, self.separator_id = 257, 256
      self.fingerprint = digest(b'bytes')
      return
    self.separator = separator or _guess_separator(parsed, name)
    self._model = _model(parsed, self.separator, name)
    separator_id = self._model.token_to_id(self.separator)
    if separator_id is None:
      raise UserError(f'{name}: no token {self.separator!r}; {_name_one(parsed)}')
    self.separator_id = separator_id
    self.vocab_size = max(self._model.get_vocab(with_added_tokens=True).values()) + 1
    self.fingerprint = digest(canonical([_content(parsed), self.separator]))

  @functools.cached_property
  def _encoder(self) -> Encoder:
    assert self._model is not None
    return Encoder(self._model)

  @property
  def is_bytes(self) -> bool:
    return self._model is None

  @classmethod
  def from_file(cls, path: str | os.PathLike, separator: str = '') -> 'Tokenizer':
    """Reads a Hugging Face `tokenizer.json`, or the folder that holds one; what else there is, by way of transformers (foreign.py)."""
    file = paths.Path(paths.expand(path))
    in_store = paths.is_remote(file)
    if in_store and file.suffix in foreign.SUFFIXES:
      raise UserError(f'tokenizer {path}: of an object store only a tokenizer.json is read; copy this one to a disk')
    try:
      file = file / _FILE if (file / _FILE).exists() else file
      if not in_store and (file.suffix in foreign.SUFFIXES or file.is_dir()):
        text = foreign.to_json(pathlib.Path(file))
      else:
        text = file.read_bytes().decode('utf-8')
    except paths.errors(file) as error:
      raise UserError(
        f'tokenizer {path} cannot be read ({paths.said(error)}); give bpe, bytes, a tokenizer.json, .model or .tiktoken file, or a folder'
      ) from error
    return cls(text, separator, str(path))

  @classmethod
  def load(cls, folder: str | os.PathLike) -> 'Tokenizer':
    """Reads what `save` wrote; `StoreDamaged` if it has changed since."""
    folder = pathlib.Path(folder)
    meta = read_json(folder / _META)
    if meta['kind'] == 'bytes':
      return cls()
    check_files(folder, meta['files'])
    tokenizer = cls((folder / _FILE).read_text(encoding='utf-8'), meta['separator'], str(folder / _FILE))
    if tokenizer.fingerprint != meta['fingerprint']:
      raise StoreDamaged(folder, 'the tokenizer is not the one that was saved')
    return tokenizer

  def save(self, folder: str | os.PathLike) -> None:
    """Writes the tokenizer into a folder, which is made if need be. Other libraries can read its `tokenizer.json`."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if self._model_json is None:
      write_json(folder / _META, {'kind': 'bytes'})
      return
    (folder / _FILE).write_text(self._model_json, encoding='utf-8')
    meta = {'kind': 'tokenizers', 'separator': self.separator, 'fingerprint': self.fingerprint}
    write_json(folder / _META, {**meta, 'files': describe(folder, [_FILE])})

  def encode_batch(self, texts: Sequence[str], special: bool = False, dtype: Any = np.int32) -> list[np.ndarray]:
    """One array of token ids for each text. None is added; what stands for a special token in a text is read as such if `special`.

    Raises:
      UserError: the separator is an ordinary token, which text can contain.
    """
    if special:
      model = tokenizers.Tokenizer.from_str(self.to_json())
      model.no_truncation()
      model.no_padding()
      return [np.asarray(e.ids, dtype) for e in model.encode_batch(list(texts), add_special_tokens=False)]
    if self._model is None:
      return [np.frombuffer(text.encode(), np.uint8).astype(dtype) for text in texts]
    ids = self._encoder.encode(texts, dtype)
    if any((i == self.separator_id).any() for i in ids):
      raise UserError(
        f'{self._name}: the separator {self.separator!r} is an ordinary token, found inside a text; '
        'set data.separator to a special one'
      )
    return ids

  def decode(self, ids: Sequence[int]) -> str:
    """Ids -> text, separators included; bytes that are not UTF-8 become U+FFFD."""
    if self._model is not None:
      return self._model.decode([int(i) for i in ids], skip_special_tokens=False)
    return b''.join(SEPARATOR.encode() if i == self.separator_id else bytes([i]) for i in ids).decode(errors='replace')

  def to_json(self) -> str:
    """The text of a `tokenizers` file that gives the same ids. Bytes too have one."""
    return self._model_json if self._model_json is not None else _bytes_json()

  def __reduce__(self):
    # A pickled `tokenizers` model loses the switch that keeps special tokens out of text.
    return Tokenizer, (self._model_json, self.separator if self._model else '', self._name)


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
  """Trains a lossless byte-level BPE; the same texts and size give the same tokenizer.

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


def _parse(model_json: str, name: str) -> dict:
  try:
    parsed = json.loads(model_json)
  except (ValueError, RecursionError) as error:
    raise UserError(f'{name}: not JSON ({error}); give the path of a Hugging Face tokenizer.json') from error
  if not isinstance(parsed, dict) or not isinstance(parsed.get('model'), dict) or 'vocab' not in parsed['model']:
    raise UserError(f'{name}: no model with a vocabulary in it; give the path of a Hugging Face tokenizer.json')
  return parsed


def _model(parsed: dict, separator: str, name: str) -> tokenizers.Tokenizer:
  # Only tokens marked special are kept out of text; some files leave the mark off.
  added = [{**t, 'special': t.get('special') or t['content'] == separator} for t in parsed.get('added_tokens') or []]
  try:
    model = tokenizers.Tokenizer.from_str(json.dumps({**parsed, 'added_tokens': added}))
  except Exception as error:  # the class that `tokenizers` raises
    raise UserError(f'{name}: the tokenizers package cannot read it ({error}); fetch it again') from error
  model.no_truncation()
  model.no_padding()
  model.encode_special_tokens = True
  return model


@functools.cache
def _bytes_json() -> str:
  """A BPE without merges whose ids are the bytes, and then the separator."""
  # The byte-level alphabet, sorted: first the bytes that are printed as themselves, then the others, in order.
  printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
  others = (byte for byte in range(256) if byte not in printed)
  characters = {byte: chr(byte) for byte in printed} | {byte: chr(256 + i) for i, byte in enumerate(others)}
  model = tokenizers.Tokenizer(tokenizers.models.BPE({c: byte for byte, c in characters.items()}, []))
  model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  model.decoder = tokenizers.decoders.ByteLevel()
  model.add_special_tokens([SEPARATOR])
  return model.to_str()


def _content(parsed: dict) -> dict:
  """What the ids of a text depend on: two files that differ elsewhere, or in how they spell it, hold the same tokenizer."""
  model = parsed['model']
  if model.get('type') == 'BPE':
    model = _BPE_DEFAULTS | model
    model['merges'] = [merge.split(' ') if isinstance(merge, str) else merge for merge in model['merges']]
  return {**parsed, 'model': model, 'truncation': None, 'padding': None, 'post_processor': None}


def _name_one(parsed: dict) -> str:
  names = [t['content'] for t in parsed.get('added_tokens') or [] if t.get('special')]
  such = f', such as one of {names[:20]}' if names else ''
  return f'set data.separator (--separator of a command) to a token that starts each document{such}'


def _guess_separator(parsed: dict, name: str) -> str:
  vocab = parsed['model']['vocab']
  present = {t['content'] for t in parsed.get('added_tokens') or []}
  present |= set(vocab if isinstance(vocab, dict) else (piece for piece, _ in vocab))
  known = next((s for s in _KNOWN_SEPARATORS if s in present), None)
  if known is None:
    raise UserError(
      f'{name}: none of the usual separators ({" ".join(_KNOWN_SEPARATORS)}) is in it; {_name_one(parsed)}'
    )
  return known
