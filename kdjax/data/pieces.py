"""Cut a long text into pieces whose tokens, one after the other, are those of the whole: a tokenizer needs 120 or more bytes a character.

A text is cut only where that is known to change nothing. Around each place it is verified, on the text as it is there, that

- the normalizer and the pre-tokenizer make of both sides together what they make of each, from wherever the pre-tokenizer comes, and
- the pre-tokenizer splits there, so that the model never sees both sides at once; or, where it splits nowhere, the model is a BPE whose
  vocabulary has no entry with those two characters next to one another: no merge can then join the sides, whatever is merged first;
- no added token has those two characters next to one another.

Where a component is of another kind than those that depend on nearby characters alone, or no such place is found, a text is left whole.
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
GROUP = 1 << 20  # characters that are encoded at once, on all cores
Span = tuple[int, int, int]  # which text, its first character, the one after the last
_AROUND = 256  # characters on each side that are looked at
_TRIED = 8  # places of each kind in a stretch of SIZE characters
_STARTS = (1, 2, 3, 4, 6, 9, 14, 21, 33, 50, 76, 115, 175)  # how far before a cut the pre-tokenizer may come from
# The ends of words come first: most pre-tokenizers split there.
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
_SPACES = ' {2,}'  # the one regular expression of normalizers that is known
# What a regular expression may look at beyond its match: the next character, or the digits that follow.
_NEARBY = (r'(?!\S)', r'(?=(\d{3})+(?!\d))', r'(?=(?:\d{3})+(?!\d))')
_FAR = re.compile(r'\(\?<?[=!]|\{\d{3,}|\{\d*,\d{3,}|\\G')


class Encoder:
  """Encodes texts of any length, in memory for a group of pieces and for the ids.

  Args:
    model: takes special tokens in a text for text.
  """

  def __init__(self, model: tokenizers.Tokenizer):
    self._model = model

  def encode(self, texts: Sequence[str], dtype: Any = np.int32) -> list[np.ndarray]:
    """The ids of each text, without any that a post-processor adds."""
    parts: list[list[np.ndarray]] = [[] for _ in texts]
    for model, group in self._groups(texts):
      pieces = [texts[k][first:last] for k, first, last in group]
      for (k, _, _), encoded in zip(group, model.encode_batch_fast(pieces, add_special_tokens=False), strict=True):
        parts[k].append(np.asarray(encoded.ids, dtype))
    return [part[0] if len(part) == 1 else np.concatenate(part) for part in parts]

  def _groups(self, texts: Sequence[str]) -> Iterator[tuple[tokenizers.Tokenizer, list[Span]]]:
    """All pieces in their order, in groups of about GROUP characters that one model encodes."""
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
  """Finds the places where texts of a tokenizer can be cut.

  Args:
    parsed: the JSON of its `tokenizers` file.

  Attributes:
    rest: the file's JSON for all pieces but a text's first, which lack what a normalizer puts before a text.
  """

  def __init__(self, parsed: dict[str, Any]):
    self.rest = {**parsed, 'normalizer': _without_prepend(parsed.get('normalizer'))}
    self.has_rest = self.rest['normalizer'] != parsed.get('normalizer')
    self._parsed = parsed
    self._can_cut = _is_local(parsed, self.has_rest)

  def spans(self, text: str) -> list[tuple[int, int]]:
    """The pieces of a text, (first character, the one after the last); the whole where it is short or cannot be cut."""
    cuts = [0, *(self._cuts(text) if self._can_cut and len(text) >= 2 * SIZE else ()), len(text)]
    return list(itertools.pairwise(cuts))

  def pieces(self, text: str) -> Iterator[str]:
    """The same as texts."""
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
      # Wherever it comes from, it splits here and goes on in the same way.
      return all(self._split(left[-n:] + right) == self._split(left[-n:]) + after for n in _STARTS)
    if not self._pairs or [len(before), len(after), len(both)] != [1, 1, 1] or both[0] != before[0] + after[0]:
      return False
    one, two = before[0][-1], after[0][0]
    return one + two not in self._pairs and one in self._pairs and two in self._pairs

  def _split(self, text: str) -> list[str]:
    """What the model sees of a text, each by itself."""
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
    """Neighbours in added tokens, which are found before or after the text is normalized."""
    contents = [token['content'] for token in self._parsed.get('added_tokens') or []]
    normalizer = self._model.normalizer
    contents += [normalizer.normalize_str(content) for content in contents] if normalizer else []
    return frozenset(pair for content in contents for pair in _neighbours(content))

  @functools.cached_property
  def _pairs(self) -> frozenset[str]:
    """Neighbours in the entries of a BPE's vocabulary, and the entries of one character; nothing for other models."""
    model = self._parsed['model']
    if model.get('type') != 'BPE' or model.get('continuing_subword_prefix') or model.get('end_of_word_suffix'):
      return frozenset()
    singles = (entry for entry in model['vocab'] if len(entry) == 1)
    return frozenset(itertools.chain(singles, *map(_neighbours, model['vocab'])))


def _neighbours(text: str) -> Iterator[str]:
  return (text[k : k + 2] for k in range(len(text) - 1))


def _places(text: str, first: int) -> Iterator[int]:
  """Where a text may be cut, from `first` on: the likeliest places, not too many."""
  for kind in _PLACES:
    found = (match.start() for match in kind.finditer(text, first, min(first + SIZE, len(text) - SIZE)))
    # No mark that combines with what is before it.
    yield from itertools.islice(
      (k for k in found if text[k].isascii() or unicodedata.category(text[k])[0] in 'PZ'), _TRIED
    )


def _is_local(parsed: dict[str, Any], has_prepend: bool) -> bool:
  """Whether every component of a tokenizer makes of a place in the text what it does by the characters nearby."""
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
  """The normalizer of a text that goes on, and does not begin."""
  if normalizer is None or normalizer.get('type') == 'Prepend':
    return None
  if normalizer.get('type') != 'Sequence':
    return normalizer
  inner = [kept for one in normalizer['normalizers'] if (kept := _without_prepend(one)) is not None]
  return {**normalizer, 'normalizers': inner}
