"""Read and check the JSON of a `tokenizers` file, and derive the tokenizer's properties from it."""

import dataclasses
import functools
import json
from collections.abc import Iterator, Sequence
from typing import Any

import tokenizers

from kdjax.errors import UserError
from kdjax.storage import paths

SEPARATOR = '<|endoftext|>'  # of kdjax's own tokenizers
# Fields that a BPE's file may omit.
_BPE_DEFAULTS = {
  'dropout': None,
  'unk_token': None,
  'continuing_subword_prefix': None,
  'end_of_word_suffix': None,
  'fuse_unk': False,
  'byte_fallback': False,
  'ignore_merges': False,
}
# Pre-tokenizers that drop no text, unless their behaviour is 'Removed'.
_KEEPING = ('ByteLevel', 'Digits', 'Split', 'Punctuation')


def parse_tokenizer(model_json: str, name: str) -> dict:
  """Parse a file's text. Raises UserError if it is not JSON with a vocabulary."""
  try:
    parsed = paths.parse_json(model_json)
  except ValueError as error:
    raise UserError(f'{name}: not JSON ({error}); give the path of a Hugging Face tokenizer.json') from error
  if not isinstance(parsed, dict) or not isinstance(parsed.get('model'), dict) or 'vocab' not in parsed['model']:
    raise UserError(f'{name}: has no model with a vocabulary; give the path of a Hugging Face tokenizer.json')
  return parsed


def build_tokenizer(parsed: dict, unmarked: Sequence[str], name: str) -> tokenizers.Tokenizer:
  """Build the model of a file's JSON, with the `unmarked` tokens made special. Raises UserError if `tokenizers` cannot use it."""
  added = [
    {**t, 'special': bool(t.get('special')) or t.get('content') in unmarked} if isinstance(t, dict) else t
    for t in added_tokens(parsed)
  ]
  try:
    model = tokenizers.Tokenizer.from_str(json.dumps({**parsed, 'added_tokens': added}))
  except Exception as error:  # the class that `tokenizers` raises
    raise UserError(f'{name}: the tokenizers package cannot read it ({error}); fetch it again') from error
  if not model.get_vocab(with_added_tokens=True):
    raise UserError(f'{name}: its vocabulary is empty; fetch it again')
  if missing := list(
    _undefined(parsed.get('post_processor'))
  ):  # `tokenizers` would abort the process at the first text
    raise UserError(f'{name}: its post-processor uses {", ".join(missing)} without defining it; fetch the file again')
  return model


def _undefined(processor: Any) -> Iterator[str]:
  """Yield the tokens that a post-processor's templates use but do not define."""
  if not isinstance(processor, dict):
    return
  for inner in processor.get('processors') or ():
    yield from _undefined(inner)
  for part in (*(processor.get('single') or ()), *(processor.get('pair') or ())):
    token = part.get('SpecialToken', {}).get('id') if isinstance(part, dict) else None
    if token is not None and token not in processor.get('special_tokens', ()):
      yield str(token)


def is_bytes(parsed: dict) -> bool:
  """Return whether it is equivalent to the file of `bytes_json`."""
  return parsed['model'].get('type') == 'BPE' and content(parsed) == content(json.loads(bytes_json()))


def content(parsed: dict) -> dict:
  """Return what the ids of a text depend on, normalised: two files with equal content hold the same tokenizer."""
  model = parsed['model']
  if model.get('type') == 'BPE':
    model = _BPE_DEFAULTS | model
    merges = model.get('merges')
    if isinstance(merges, list):
      model['merges'] = [merge.split(' ') if isinstance(merge, str) else merge for merge in merges]
  return {**parsed, 'model': model, 'truncation': None, 'padding': None, 'post_processor': None}


@functools.cache
def bytes_json() -> str:
  """Build a BPE without merges whose ids are the 256 bytes followed by the separator."""
  # The byte-level alphabet, sorted: first the printable bytes, then the others, in order.
  printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
  others = (byte for byte in range(256) if byte not in printed)
  characters = {byte: chr(byte) for byte in printed} | {byte: chr(256 + i) for i, byte in enumerate(others)}
  model = tokenizers.Tokenizer(tokenizers.models.BPE({c: byte for byte, c in characters.items()}, []))
  model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  model.decoder = tokenizers.decoders.ByteLevel()
  model.add_special_tokens([SEPARATOR])
  return model.to_str()


@dataclasses.dataclass(frozen=True)
class TextKept:
  """How a tokenizer's design preserves text (kdjax/data/fidelity.py measures the rest).

  Attributes:
    keeps_text: every text can be decoded from its tokens.
    changes_little: it is byte-level and changes at most how characters are composed (NFC). Corpora built before losses were measured stay valid.
    unknown_id: the unknown token; None: there is none.
  """

  keeps_text: bool
  changes_little: bool
  unknown_id: int | None = None


def text_kept(parsed: dict, model: tokenizers.Tokenizer) -> TextKept:
  found = parsed.get('normalizer')
  normalizer = found.get('type') if isinstance(found, dict) else found
  by_bytes = _is_byte_level(parsed)
  return TextKept(
    by_bytes and not normalizer, by_bytes and normalizer in (None, 'NFC'), _unknown_id(parsed['model'], model)
  )


def _is_byte_level(parsed: dict) -> bool:
  """Return whether it is a BPE with every byte in its vocabulary and a pre-tokenizer that drops nothing."""
  model = parsed['model']
  if model.get('type') != 'BPE' or model.get('end_of_word_suffix') or model.get('continuing_subword_prefix'):
    return False
  steps = list(_steps(parsed.get('pre_tokenizer')))
  drops = [step for step in steps if step.get('behavior') == 'Removed' or step.get('type') not in _KEEPING]
  strips = [token for token in added_tokens(parsed) if token.get('lstrip') or token.get('rstrip')]
  alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
  both = (steps, _steps(parsed.get('decoder')))
  reads = all(any(step.get('type') == 'ByteLevel' for step in part) for part in both)
  return reads and not drops and not strips and all(byte in model['vocab'] for byte in alphabet)


def _steps(part: Any) -> Iterator[dict]:
  """Yield a pre-tokenizer's or decoder's steps, with sequences flattened."""
  if not isinstance(part, dict):
    return
  inner = [step for name in ('pretokenizers', 'decoders') for step in part.get(name) or ()]
  if not inner:
    yield part
  for step in inner:
    yield from _steps(step)


def _unknown_id(model: dict, known: tokenizers.Tokenizer) -> int | None:
  """Find the id of the model's unknown token, which some model types give by id and others by name."""
  if isinstance(model.get('unk_id'), int):
    return model['unk_id']
  return known.token_to_id(model['unk_token']) if isinstance(model.get('unk_token'), str) else None


def added_tokens(parsed: dict) -> list:
  """Return the entries of the added tokens."""
  added = parsed.get('added_tokens') or []
  return added if isinstance(added, list) else [added]  # not a list: `tokenizers` reports it
