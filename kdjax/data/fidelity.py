"""Measure how much of a text survives tokenisation.

Bits per byte are valid only if the text can be decoded from its tokens. A tokenizer may lose text (unknown tokens, dropped characters) or
rewrite it (lower case, white space, accents). Byte-level tokenizers do neither. For any other tokenizer, building a corpus measures the share
of unknown tokens on all text, and the share of lost characters on a sample.
"""

import collections
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kdjax.data.tokenizer import Tokenizer
from kdjax.errors import UserError

TOO_MUCH = 0.05  # share of unknown tokens or lost characters above which a corpus is refused
AT_ONCE = 0.5  # the same limit, checked after every group of documents
HARMLESS = 0.001  # up to this share, bits per byte are reported
_SAMPLE, _PIECES = 1 << 14, 4  # sampled characters of a document, sampled documents of a group


class Fidelity:
  """Accumulates the losses of one source over groups of documents."""

  def __init__(self, tokenizer: Tokenizer, name: str):
    self._tokenizer, self._name = tokenizer, name
    self._counts: collections.Counter[str] = collections.Counter()

  def add(self, texts: Sequence[str], tokens: Sequence[np.ndarray]) -> None:
    """Measure a group of documents. Raises UserError if more than half of the text so far is lost."""
    if self._tokenizer.keeps_text:
      return
    counts = self._counts
    counts['tokens'] += sum(map(len, tokens))
    if self._tokenizer.unknown_id is not None:
      counts['unknown'] += sum(int((ids == self._tokenizer.unknown_id).sum()) for ids in tokens)
    samples = [text[:_SAMPLE] for text in texts[:: max(1, len(texts) // _PIECES)]]
    for text, ids in zip(samples, self._tokenizer.encode_batch(samples), strict=True):
      again = self._tokenizer.decode_text(ids.tolist())
      counts['characters'] += len(text)
      counts['changed'] += _missing(text, again)
      counts['lost'] += _missing(_folded(text), _folded(again))
    self._check(AT_ONCE)

  def shares(self) -> dict[str, float]:
    """Return the shares of `unknown` tokens, `lost` characters, `changed` (lost or rewritten) characters. Raises UserError above TOO_MUCH."""
    self._check(TOO_MUCH)
    counts = self._counts
    of = lambda part, whole: counts[part] / max(1, counts[whole])
    return {
      'unknown': of('unknown', 'tokens'),
      'lost': of('lost', 'characters'),
      'changed': of('changed', 'characters'),
    }

  def _check(self, most: float) -> None:
    unknown = self._counts['unknown'] / max(1, self._counts['tokens'])
    lost = self._counts['lost'] / max(1, self._counts['characters'])
    if max(unknown, lost) > most:
      raise UserError(
        f'data.tokenizer loses the text of {self._name}: {unknown:.1%} of the tokens are unknown, and {lost:.1%} of the characters '
        'cannot be decoded; set data.tokenizer to bpe or bytes, or to a tokenizer made for this text'
      )


def worst(shares: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
  """Return the largest share of each kind over the sets of a corpus; {} if none exceeds HARMLESS."""
  found = (
    {kind: max(of_set[kind] for of_set in shares.values()) for kind in ('unknown', 'lost', 'changed')} if shares else {}
  )
  return found if max(found.values(), default=0) > HARMLESS else {}


def describe(shares: Mapping[str, Any]) -> str:
  """Describe in one line what a tokenizer does to its texts, from the shares of `worst`."""
  return (
    f'the tokenizer does not preserve the text ({shares["unknown"]:.2%} of the tokens unknown, {shares["lost"]:.2%} of the characters '
    f'lost, {shares["changed"]:.2%} lost or rewritten): bits per byte would be wrong'
  )


def _missing(text: str, again: str) -> int:
  """Count the characters of a text that are missing from the other, in any order."""
  return (collections.Counter(text) - collections.Counter(again)).total()


def _folded(text: str) -> str:
  """Remove from a text what normalisation changes: case, accents, compatibility forms, white space."""
  plain = unicodedata.normalize('NFKD', text).casefold()
  return ''.join(c for c in plain if not c.isspace() and not unicodedata.combining(c) and c.isprintable())
