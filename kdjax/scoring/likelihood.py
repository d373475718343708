"""Continuations: the log-likelihood that a model gives to the end of a text, for many texts at once.

Where a text does not fit into the window its beginning is left out. A continuation that is longer than the window by itself is scored in
strided windows, each token once, as a document is (windows.py).
"""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from kdjax.losses import token_losses
from kdjax.runs.metrics import Progress
from kdjax.runtime import sharding
from kdjax.scoring import windows
from kdjax.scoring.text import Scored, place

SHORTEST = 16  # tokens of the shortest row that is compiled


def score_requests(
  model: Scored,
  requests: Sequence[tuple[np.ndarray, int]],
  window: int,
  batch_size: int,
  mesh: Mesh,
  progress: Progress | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """(log-likelihood in nats, tokens, whether each was the model's first) of each of Q continuations: [Q] arrays.

  Args:
    requests: (tokens [n + 1] of the whole text, first): tokens[first + 1:] are the continuation.
    window: the most tokens that the model sees at once.
    batch_size: rows of `window` tokens on all devices together; of shorter rows there are more.
  """
  rows = [row for i, request in enumerate(requests) for row in _rows(i, *request, window)]
  logprob_Q, tokens_Q, missed_Q = (np.zeros(len(requests)) for _ in range(3))
  for batch in _batches(rows, window, batch_size, sharding.n_row_shards(mesh)):
    values = jax.device_get(_token_values(model.model, model.params, place(batch, mesh)))
    real = batch.labels_RxL >= 0
    request = np.broadcast_to(batch.doc_R[:, None], real.shape)[real]
    np.add.at(logprob_Q, request, -values['ce'][real].astype(np.float64))
    np.add.at(tokens_Q, request, 1)
    np.add.at(missed_Q, request, 1 - values['correct'][real])
    if progress:
      progress.update(int(real.sum()))
  return logprob_Q, tokens_Q.astype(int), missed_Q == 0


class _Row(NamedTuple):
  """A window of L tokens, not padded; labels are -1 where nothing is to be scored."""

  request: int
  tokens_L: np.ndarray
  labels_L: np.ndarray


def _rows(request: int, tokens: np.ndarray, first: int, window: int) -> Iterator[_Row]:
  n, half = len(tokens) - 1, window // 2
  skipped = max(0, n - window if n - first <= window else first - half)
  for start, scored, end in windows.spans(n - skipped, window, max(1, half)):
    at = slice(skipped + start, skipped + end)
    labels = tokens[1:][at].copy()
    labels[: max(first - at.start, scored - start)] = -1
    yield _Row(request, tokens[:-1][at], labels)


def _batches(rows: Sequence[_Row], window: int, batch_size: int, multiple: int) -> Iterator[windows.Rows]:
  """Rows of like length together, padded to one of a few lengths and filled up to one number of rows for each: few shapes to compile."""
  lengths = [SHORTEST << k for k in range(window.bit_length()) if SHORTEST << k < window] + [window]
  bucket = np.searchsorted(lengths, [len(row.tokens_L) for row in rows])
  for i, length in enumerate(lengths):
    held = [rows[j] for j in np.flatnonzero(bucket == i).tolist()]
    if not held:
      continue
    size = min(batch_size * window // length, 1 << (len(held) - 1).bit_length())  # a small set does not fill a batch
    size = -(-size // multiple) * multiple
    for at in range(0, len(held), size):
      yield _padded(held[at : at + size], size, length)


def _padded(rows: Sequence[_Row], size: int, length: int) -> windows.Rows:
  out = windows.Rows(
    np.zeros((size, length), np.int32), np.full((size, length), -1, np.int32), np.zeros(size, np.int32)
  )
  for i, row in enumerate(rows):
    out.tokens_RxL[i, : len(row.tokens_L)] = row.tokens_L
    out.labels_RxL[i, : len(row.labels_L)] = row.labels_L
    out.doc_R[i] = row.request
  return out


@functools.partial(jax.jit, static_argnums=0)
def _token_values(model, params, batch):
  """Per-token arrays [R, L], the same on every process."""
  tokens_RxL, labels_RxL = batch['tokens'][0], batch['labels'][0]
  values = token_losses(
    model.hidden(params, tokens_RxL), model.head(params), labels_RxL, vocab_size=model.config.vocab_size
  )
  values = {name: values[name] for name in ('ce', 'correct')}
  if sharding.mesh_in_use() is not None:
    values = jax.lax.with_sharding_constraint(values, P())
  return values
