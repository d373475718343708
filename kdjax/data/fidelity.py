"""How much of a text its tokens keep.

Bits per byte say how short a text can be written only where the text can be read back from the tokens. A tokenizer may lose text (unknown
tokens, characters that it drops) or rewrite it (lower case, white space, accents). Byte-level ones do neither; of any other this is measured
while a corpus is built: the share of unknown tokens on all of it, the characters that do not come back on a sample.
"""

import collections
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kdjax.data.tokenizer import Tokenizer
from kdjax.errors import UserError

TOO_MUCH = 0.05  # of the tokens unknown, or of the characters lost: a corpus is refused
AT_ONCE = 0.5  # the same after the first group of documents
HARMLESS = 0.001  # up to this share bits per byte are of the text
_SAMPLE, _PIECES = 1 << 14, 4  # characters of a document, documents of a group


class Fidelity:
  """The measure of one source. Adds up over groups of documents."""

  def __init__(self, tokenizer: Tokenizer, name: str):
    self._tokenizer, self._name = tokenizer, name
    self._counts: collections.Counter[str] = collections.Counter()

  def add(self, texts: Sequence[str], tokens: Sequence[np.ndarray]) -> None:
    """Measure a group of documents. Raises UserError where most of it is lost."""
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
    """`unknown` of the tokens; `lost` of the characters, and `changed`: those and others that the tokens do not give back as they were."""
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
        f'data.tokenizer loses the text of {self._name}: {unknown:.1%} of the tokens are unknown ones, and {lost:.1%} of the characters '
        'cannot be read back; set data.tokenizer to bpe or bytes, or to a tokenizer made for this text'
      )


def worst(shares: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
  """The greatest share of each kind over the sets of a corpus; {} where its tokens give every text back."""
  found = (
    {kind: max(of_set[kind] for of_set in shares.values()) for kind in ('unknown', 'lost', 'changed')} if shares else {}
  )
  return found if max(found.values(), default=0) > HARMLESS else {}


def describe(shares: Mapping[str, Any]) -> str:
  """One line on what a tokenizer does to its texts, from the shares of `worst`."""
  return (
    f'the tokenizer does not give the text back ({shares["unknown"]:.2%} of the tokens unknown, {shares["lost"]:.2%} of the characters '
    f'lost, {shares["changed"]:.2%} lost or rewritten): bits per byte would not be those of the text'
  )


def _missing(text: str, again: str) -> int:
  """How many characters of a text are not in the other, whatever their order."""
  return (collections.Counter(text) - collections.Counter(again)).total()


def _folded(text: str) -> str:
  """A text less what normalisation changes: case, accents, compatibility forms, white space."""
  plain = unicodedata.normalize('NFKD', text).casefold()
  return ''.join(c for c in plain if not c.isspace() and not unicodedata.combining(c) and c.isprintable())
