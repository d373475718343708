"""Documents -> rows of windows: each token of a document is scored once, with as much context as the window holds.

A document is its separator, its tokens, and its end token (or the separator again if one token has both roles). A text of n tokens has n + 1
predictions: the first from the separator alone, the last of the document's end. A document that was cut (`eval.max_document_bytes`) does not
end at the cut, so its end is not scored. A document longer than the window is split into strided windows: each one after the first scores only
the tokens that the previous one did not reach, with at least `window - stride` tokens of context.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from kdjax.data.store import TokenStore

ROW_STEP = 8  # rows: a batch of few has a multiple of these


class Rows(NamedTuple):
  """R windows of L tokens; labels are -1 where nothing is to be scored; `doc` is each row's document."""

  tokens_RxL: np.ndarray
  labels_RxL: np.ndarray
  doc_R: np.ndarray


def spans(n: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
  """(start, first scored, end) of each window over n predictions; [first scored, end) cover 0 ... n - 1, each once."""
  start, scored = 0, 0
  while scored < n:
    end = min(start + window, n)
    yield start, scored, end
    scored = end
    start = min(start + stride, max(n - window, 0))  # the last window keeps its full context


def rows(store: TokenStore, window: int, stride: int) -> Rows:
  """All windows of a store's documents, padded to `window`."""
  tokens, labels, docs = [], [], []
  for doc in range(store.n_docs):
    text = store.document(doc)
    for start, scored, end in spans(len(text) - 1, window, stride):
      row, label = np.zeros(window, np.int32), np.full(window, -1, np.int32)
      row[: end - start] = text[start:end]
      label[scored - start : end - start] = text[scored + 1 : end + 1]
      tokens.append(row)
      labels.append(label)
      docs.append(doc)
  return Rows(np.stack(tokens), np.stack(labels), np.asarray(docs, np.int32))


def batches(all_rows: Rows, batch_size: int, multiple: int = 1) -> Iterator[Rows]:
  """Batches of the same number of rows; windows of like length together, so that short ones need less of it. The last is filled with padding.

  A batch has at most `batch_size` rows, and so few that little is padding: a multiple of `multiple`, which divides `batch_size`, and of
  about 8, for few shapes to compile.
  """
  lengths = (all_rows.labels_RxL >= 0).cumsum(1).argmax(1)
  order = np.argsort(lengths, kind='stable')
  even = -(-len(order) // -(-len(order) // batch_size))
  step = multiple * -(-ROW_STEP // multiple)
  size = min(batch_size, -(-even // step) * step)
  for at in range(0, len(order), size):
    picked = order[at : at + size]
    last = int(lengths[picked].max()) + 1
    length = next(n for n in _lengths(all_rows.tokens_RxL.shape[1]) if n >= last)
    yield Rows(
      _fill(all_rows.tokens_RxL[picked, :length], size, 0),
      _fill(all_rows.labels_RxL[picked, :length], size, -1),
      _fill(all_rows.doc_R[picked], size, 0),
    )


def _fill(x: np.ndarray, n: int, value: int) -> np.ndarray:
  return np.concatenate([x, np.full((n - len(x), *x.shape[1:]), value, x.dtype)])


def _lengths(window: int) -> list[int]:
  """The row lengths that are compiled: the window, and for long windows a few shorter ones."""
  return [n for n in (window // 16, window // 4) if n >= 256] + [window]
