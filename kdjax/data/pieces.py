"""Cut a long text into pieces whose concatenated tokens equal the tokens of the whole text: a tokenizer needs 120 or more bytes a character.

A text is cut only where the cut cannot change its tokens. At each candidate place, the actual text around it must satisfy:

- The normalizer and the pre-tokenizer give the same result for both sides together as for each side alone, wherever the pre-tokenizer starts.
- The pre-tokenizer splits there, so the model never sees both sides at once. Or, if it splits nowhere, the model is a BPE whose vocabulary
  has no entry with those two characters adjacent, so no merge can join the sides in any order.
- No added token has those two characters adjacent.

A text is not cut if no such place is found, or if the tokenizer has a component that is not known to depend on nearby characters only.
"""

import functools
import itertools
import json
import re
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tokenizers

SIZE = 1 << 16  # characters of a piece, or a few more
GROUP = 1 << 20  # characters encoded at once, on all cores
Span = tuple[int, int, int]  # (index of the text, first character, end)
_AROUND = 256  # characters checked on each side
_TRIED = 8  # places tried of each kind in a stretch of SIZE characters
# Distances before a cut at which the pre-tokenizer may start.
_STARTS = (1, 2, 3, 4, 6, 9, 14, 21, 33, 50, 76, 115, 175)
# Ends of words come first: most pre-tokenizers split there.
_PLACES = tuple(re.compile(place) for place in (r'(?<=\S)(?= )', r'(?<=\S)(?=\n)', r"(?<=\w)(?=[^\w\s'’])"))
_NORMALIZERS = (
  'NFC',
  'NFD',
  'NFKC',
  'NFKD',
  'Lowercase',
  'StripAccents',
  'BertNormalizer',
  'Nmt',
  'Precompiled',
  'ByteLevel',
)
_PRE_TOKENIZERS = (
  'ByteLevel', 'Metaspace', 'Digits', 'Punctuation', 'Whitespace', 'WhitespaceSplit', 'BertPreTokenizer', 'CharDelimiterSplit',
)  # fmt: skip
_SPACES = ' {2,}'  # the only regular expression of a normalizer known to be local
# The look-aheads that are allowed: at the next character, or at the digits that follow.
_NEARBY = (r'(?!\S)', r'(?=(\d{3})+(?!\d))', r'(?=(?:\d{3})+(?!\d))')
_FAR = re.compile(r'\(\?<?[=!]|\{\d{3,}|\{\d*,\d{3,}|\\G')


class Encoder:
  """Encodes texts of any length. Memory: one group of pieces, and the ids.

  Args:
    model: must encode special tokens in a text as plain text.
  """

  def __init__(self, model: tokenizers.Tokenizer):
    self._model = model

  def encode(self, texts: Sequence[str], dtype: Any = np.int32) -> list[np.ndarray]:
    """Return the ids of each text, without tokens that a post-processor adds."""
    parts: list[list[np.ndarray]] = [[] for _ in texts]
    for model, group in self._groups(texts):
      pieces = [texts[k][first:last] for k, first, last in group]
      for (k, _, _), encoded in zip(group, model.encode_batch_fast(pieces, add_special_tokens=False), strict=True):
        parts[k].append(np.asarray(encoded.ids, dtype))
    return [part[0] if len(part) == 1 else np.concatenate(part) for part in parts]

  def _groups(self, texts: Sequence[str]) -> Iterator[tuple[tokenizers.Tokenizer, list[Span]]]:
    """Yield all pieces in order, in groups of about GROUP characters, each with the model that encodes it."""
    group: list[Span] = []
    size, model = 0, self._model
    for k, text in enumerate(texts):
      for first, last in self._spans(text):
        wanted = self._rest if first else self._model
        if group and (size >= GROUP or wanted is not model):
          yield model, group
          group, size = [], 0
        group.append((k, first, last))
        size, model = size + last - first, wanted
    if group:
      yield model, group

  def _spans(self, text: str) -> list[tuple[int, int]]:
    return self._cutter.spans(text) if len(text) >= 2 * SIZE else [(0, len(text))]

  @functools.cached_property
  def _cutter(self) -> 'Cutter':
    return Cutter(json.loads(self._model.to_str()))

  @functools.cached_property
  def _rest(self) -> tokenizers.Tokenizer:
    if not self._cutter.has_rest:
      return self._model
    rest = tokenizers.Tokenizer.from_str(json.dumps(self._cutter.rest))
    rest.encode_special_tokens = self._model.encode_special_tokens
    return rest


class Cutter:
  """Finds where a text can be cut without changing its tokens.

  Args:
    parsed: the JSON of a `tokenizers` file.

  Attributes:
    rest: the JSON for all pieces but a text's first: without the prefix that a normalizer prepends to a text.
  """

  def __init__(self, parsed: dict[str, Any]):
    self.rest = {**parsed, 'normalizer': _without_prepend(parsed.get('normalizer'))}
    self.has_rest = self.rest['normalizer'] != parsed.get('normalizer')
    self._parsed = parsed
    self._can_cut = _is_local(parsed, self.has_rest)

  def spans(self, text: str) -> list[tuple[int, int]]:
    """Return the pieces of a text as (first character, end). A text that is short or cannot be cut is one piece."""
    cuts = [0, *(self._cuts(text) if self._can_cut and len(text) >= 2 * SIZE else ()), len(text)]
    return list(itertools.pairwise(cuts))

  def pieces(self, text: str) -> Iterator[str]:
    """Yield the text of each piece."""
    return (text[first:last] for first, last in self.spans(text))

  def _cuts(self, text: str) -> Iterator[int]:
    at = SIZE
    while at < len(text) - SIZE:
      cut = next((place for place in _places(text, at) if self._is_safe(text, place)), None)
      if cut is not None:
        yield cut
      at = (at if cut is None else cut) + SIZE

  def _is_safe(self, text: str, place: int) -> bool:
    if text[place - 1 : place + 1] in self._glued:
      return False
    left, right = text[max(0, place - _AROUND) : place], text[place : place + _AROUND]
    before, after, both = self._split(left), self._split(right), self._split(left + right)
    if before and after and both == before + after:
      # Wherever the pre-tokenizer starts, it splits here and then continues in the same way.
      return all(self._split(left[-n:] + right) == self._split(left[-n:]) + after for n in _STARTS)
    if not self._pairs or [len(before), len(after), len(both)] != [1, 1, 1] or both[0] != before[0] + after[0]:
      return False
    one, two = before[0][-1], after[0][0]
    return one + two not in self._pairs and one in self._pairs and two in self._pairs

  def _split(self, text: str) -> list[str]:
    """Normalize and pre-tokenize a text: return the parts that the model sees separately."""
    model = self._model
    normal = model.normalizer.normalize_str(text) if model.normalizer else text
    if model.pre_tokenizer is None:
      return [normal] if normal else []
    return [piece for piece, _ in model.pre_tokenizer.pre_tokenize_str(normal)]

  @functools.cached_property
  def _model(self) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(json.dumps(self.rest))

  @functools.cached_property
  def _glued(self) -> frozenset[str]:
    """Adjacent characters in added tokens, which match either the raw or the normalized text."""
    contents = [token['content'] for token in self._parsed.get('added_tokens') or []]
    normalizer = self._model.normalizer
    contents += [normalizer.normalize_str(content) for content in contents] if normalizer else []
    return frozenset(pair for content in contents for pair in _neighbours(content))

  @functools.cached_property
  def _pairs(self) -> frozenset[str]:
    """Adjacent characters in the entries of a BPE's vocabulary, and its entries of one character; empty for other models."""
    model = self._parsed['model']
    if model.get('type') != 'BPE' or model.get('continuing_subword_prefix') or model.get('end_of_word_suffix'):
      return frozenset()
    singles = (entry for entry in model['vocab'] if len(entry) == 1)
    return frozenset(itertools.chain(singles, *map(_neighbours, model['vocab'])))


def _neighbours(text: str) -> Iterator[str]:
  return (text[k : k + 2] for k in range(len(text) - 1))


def _places(text: str, first: int) -> Iterator[int]:
  """Yield candidate places for a cut from `first` on, the likeliest first, at most _TRIED of each kind."""
  for kind in _PLACES:
    found = (match.start() for match in kind.finditer(text, first, min(first + SIZE, len(text) - SIZE)))
    # Skip combining marks, which belong to the character before.
    yield from itertools.islice(
      (k for k in found if text[k].isascii() or unicodedata.category(text[k])[0] in 'PZ'), _TRIED
    )


def _is_local(parsed: dict[str, Any], has_prepend: bool) -> bool:
  """Return whether every component of a tokenizer depends on nearby characters only."""
  added = [token for token in parsed.get('added_tokens') or [] if not token.get('special')]
  if any(token.get(flag) for token in added for flag in ('lstrip', 'rstrip', 'single_word')) or (added and has_prepend):
    return False
  model = parsed['model']
  return (
    not model.get('dropout')
    and all(map(_is_local_normalizer, _flat(parsed.get('normalizer'), 'normalizers')))
    and all(map(_is_local_pre_tokenizer, _flat(parsed.get('pre_tokenizer'), 'pretokenizers')))
  )


def _flat(component: dict[str, Any] | None, children: str) -> list[dict[str, Any]]:
  if component is None:
    return []
  if component.get('type') != 'Sequence':
    return [component]
  return [inner for child in component[children] for inner in _flat(child, children)]


def _is_local_normalizer(component: dict[str, Any]) -> bool:
  if component['type'] == 'Replace':
    pattern = component['pattern']
    return len(pattern.get('String', '')) == 1 or pattern.get('Regex') == _SPACES
  return component['type'] in (*_NORMALIZERS, 'Prepend')


def _is_local_pre_tokenizer(component: dict[str, Any]) -> bool:
  if component['type'] != 'Split':
    return component['type'] in _PRE_TOKENIZERS
  pattern = component['pattern'].get('Regex', '')
  for known in _NEARBY:
    pattern = pattern.replace(known, '')
  return not _FAR.search(pattern)


def _without_prepend(normalizer: dict[str, Any] | None) -> dict[str, Any] | None:
  """Return the normalizer for pieces after a text's first: without Prepend."""
  if normalizer is None or normalizer.get('type') == 'Prepend':
    return None
  if normalizer.get('type') != 'Sequence':
    return normalizer
  inner = [kept for one in normalizer['normalizers'] if (kept := _without_prepend(one)) is not None]
  return {**normalizer, 'normalizers': inner}
