"""What should be known of a corpus before a model learns from it: near-duplicates in the training split, and test text that is in it.

Both by tokens. Near-duplicates: documents of which MinHash (64 hashes of 5-token shingles) says that they share at least 80% of their
shingles (Jaccard); candidates are those that agree in one of 16 bands of 4. Overlap: stretches of 13 tokens of a test document that stand
in a training document too, as GPT-3's authors looked for them.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from kdjax.data.store import TokenStore

SHINGLE, HASHES, BANDS, SIMILAR = 5, 64, 16, 0.8
STRETCH = 13
_CHUNK = 1 << 20  # tokens that are looked at together
_MOST = 1 << 16  # shingles of a document that are hashed: of a longer one its beginning
_ODD = np.uint64(0x9E3779B97F4A7C15)


@dataclasses.dataclass(frozen=True)
class Overlap:
  """Of one set's documents with the training split."""

  documents: int
  too_short: int  # for a stretch
  touched: int  # documents with a stretch that is in the training split
  mostly: int  # with half of their stretches or more
  share: float  # of all stretches


def duplicates(store: TokenStore, progress: Callable[[int], Any] = lambda n: None) -> dict[str, Any]:
  """How many documents have a near-duplicate in the store, in how many clusters, and how many would be left with one of each."""
  rng = np.random.default_rng(0)
  factors = rng.integers(1, 1 << 63, HASHES, np.uint64) * np.uint64(2) + np.uint64(1)
  signatures = np.zeros((store.n_docs, HASHES), np.uint32)
  long_enough = np.zeros(store.n_docs, bool)
  for doc, tokens in _documents(store, SHINGLE):
    progress(len(tokens) + 1)
    hashed = np.unique(_rolling(tokens[: _MOST + SHINGLE - 1], SHINGLE))
    if len(hashed) and not long_enough[doc]:  # only the first piece of a long document counts
      long_enough[doc] = True
      signatures[doc] = [(_mixed(hashed * factor) >> np.uint64(32)).min() for factor in factors]
  parent = np.arange(store.n_docs)
  for band in np.split(signatures, BANDS, axis=1):
    keys = _mixed((band.astype(np.uint64) * factors[: band.shape[1]]).sum(axis=1))
    keys[~long_enough] = np.flatnonzero(~long_enough)  # alike in nothing
    order = np.argsort(keys, kind='stable')
    for one, other in itertools.pairwise(order.tolist()):
      if keys[one] == keys[other] and long_enough[one] and (signatures[one] == signatures[other]).mean() >= SIMILAR:
        _join(parent, one, other)
  roots = np.array([_root(parent, doc) for doc in range(store.n_docs)])
  sizes = np.bincount(roots, minlength=store.n_docs)
  clusters = sizes[sizes > 1]
  return {
    'documents': store.n_docs,
    'in_clusters': int(clusters.sum()),
    'clusters': len(clusters),
    'largest': int(clusters.max(initial=0)),
    'left_without': int(store.n_docs - (clusters - 1).sum()),
  }


def overlaps(
  train: TokenStore, sets: dict[str, TokenStore], progress: Callable[[int], Any] = lambda n: None
) -> dict[str, Overlap]:
  """name -> how much of the set's text is in the training split."""
  wanted = _distinct(list(sets.values()))
  seen = np.zeros(len(wanted), bool)
  for start in range(0, train.n_tokens, _CHUNK):
    stop = min(start + _CHUNK + STRETCH - 1, train.n_tokens)
    # A stretch with a separator in it is of two documents; no set's stretch has one.
    hashed = np.sort(_rolling(train.read(start, stop), STRETCH))  # sorted look-ups are many times faster
    at = np.searchsorted(wanted, hashed)
    hit = at < len(wanted)
    hit[hit] = wanted[at[hit]] == hashed[hit]
    seen[at[hit]] = True
    progress(min(_CHUNK, train.n_tokens - start))
  return {name: _overlap(store, wanted, seen) for name, store in sets.items()}


def _distinct(stores: list[TokenStore]) -> np.ndarray:
  """Return the sorted, distinct hashes of all stretches. Memory: little more than the hashes before duplicates are removed."""
  lengths = [np.maximum(np.diff(store.offsets) - STRETCH, 0) for store in stores]
  hashed = np.empty(int(sum(n.sum() for n in lengths)), np.uint64)
  end = 0
  for store in stores:
    for _, tokens in _documents(store, STRETCH):
      found = _rolling(tokens, STRETCH)
      hashed[end : end + len(found)] = found
      end += len(found)
  hashed = hashed[:end]  # the array also has room for end tokens, which start no stretch
  hashed.sort()
  end, last = 0, None
  for first in range(0, len(hashed), _CHUNK):
    found = np.unique(hashed[first : first + _CHUNK])
    found = found[1:] if last is not None and found[0] == last else found
    hashed[end : end + len(found)] = found
    end, last = end + len(found), found[-1] if len(found) else last
  return hashed[:end]


def _overlap(store: TokenStore, wanted: np.ndarray, seen: np.ndarray) -> Overlap:
  totals, hits = np.zeros(store.n_docs, np.int64), np.zeros(store.n_docs, np.int64)
  for doc, tokens in _documents(store, STRETCH):
    found = seen[np.searchsorted(wanted, np.sort(_rolling(tokens, STRETCH)))]
    totals[doc] += len(found)
    hits[doc] += found.sum()
  long_enough = totals > 0
  return Overlap(
    documents=store.n_docs,
    too_short=int((~long_enough).sum()),
    touched=int((hits > 0).sum()),
    mostly=int((2 * hits >= totals)[long_enough].sum()),
    share=float(hits.sum() / totals.sum()) if totals.any() else 0.0,
  )


def _documents(store: TokenStore, n: int) -> Iterator[tuple[int, np.ndarray]]:
  """Yield (index, tokens of the text) of each document; long documents come in pieces that overlap by n - 1 tokens."""
  first = 0
  while first < store.n_docs:
    last = max(first + 1, int(np.searchsorted(store.offsets, store.offsets[first] + _CHUNK, 'right')) - 1)
    start, stop = int(store.offsets[first]), int(store.offsets[last])
    if last == first + 1:
      stop -= int(store.end_id is not None and store.read(stop - 1, stop)[0] == store.end_id)
      for at in range(start + 1, max(start + 2, stop - n + 1), _CHUNK):
        yield first, store.read(at, min(at + _CHUNK + n - 1, stop))
    else:
      tokens = store.read(start, stop)
      for doc in range(first, last):
        a, b = store.offsets[doc : doc + 2] - start
        yield doc, store.text_of(tokens[a:b])
    first = last


def _rolling(tokens: np.ndarray, n: int) -> np.ndarray:
  """A 64-bit hash of each n tokens in a row, uint64[len - n + 1]."""
  count = len(tokens) - n + 1
  if count <= 0:
    return np.zeros(0, np.uint64)
  ids, hashed = tokens.astype(np.uint64) + np.uint64(1), np.zeros(count, np.uint64)
  for k in range(n):
    hashed = hashed * _ODD + ids[k : k + count]
  return _mixed(hashed)


def _mixed(x: np.ndarray) -> np.ndarray:
  """Spreads what differs in few bits over all (MurmurHash3's finaliser)."""
  x = (x ^ (x >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
  x = (x ^ (x >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
  return x ^ (x >> np.uint64(33))


def _root(parent: np.ndarray, doc: int) -> int:
  while parent[doc] != doc:
    parent[doc] = parent[parent[doc]]
    doc = int(parent[doc])
  return doc


def _join(parent: np.ndarray, one: int, other: int) -> None:
  parent[_root(parent, one)] = _root(parent, other)
