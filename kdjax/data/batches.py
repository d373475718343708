"""Batches as a pure function of (seed, step): no iterator state, so a run resumes by going on at its step.

A store's range of tokens is cut into windows of T tokens. The windows are visited in a seeded permutation, a new one
each epoch (Grain's `MapDataset`); row r of step s is sample `s * B + r`. Nothing else enters: not the number of
processes, nor of threads, nor restarts.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence

import grain
import jax
import numpy as np

from kdjax.data.store import TokenStore
from kdjax.errors import UserError
from kdjax.storage.files import canonical_json, digest

# Of the order that the fingerprint hashes: Grain's shuffle takes 20 ms / n for each index of a range of n.
_FINGERPRINT_SAMPLES, _FINGERPRINT_EPOCHS = 10_000, 4
_PADDING = {'tokens': 0, 'labels': -1, 'segment_ids': 0}


@dataclasses.dataclass(frozen=True)
class Windows:
  """A store's range of tokens as windows of `seq_len`. Each token is in exactly one window; each token of a text is predicted once.

  Args:
    slice: which part of the documents, as fractions [begin, end); slices that do not overlap share no document.
    distinct_tokens: use no more than this many tokens of the slice, from its start; 0: all.
    mask_documents: give each document a segment of its own.
  """

  store: TokenStore
  seq_len: int
  slice: tuple[float, float] = (0.0, 1.0)
  distinct_tokens: int = 0
  mask_documents: bool = True

  def __post_init__(self):
    begin, end = self.slice
    if not 0 <= begin < end <= 1:
      raise UserError(f'slice {self.slice} is not within [0, 1] with begin < end; give two fractions, as in (0.0, 0.5)')
    if self.seq_len < 1 or self.distinct_tokens < 0:
      raise UserError(f'seq_len={self.seq_len} must be at least 1, distinct_tokens={self.distinct_tokens} at least 0')
    if self.n_tokens < 2:
      documents = f'{self.store.folder} ({self.store.n_docs} documents)'
      raise UserError(f'slice {self.slice} of {documents} holds no window; make it wider')

  @functools.cached_property
  def range(self) -> tuple[int, int]:
    """The first token and the one after the last."""
    first, last = (round(fraction * self.store.n_docs) for fraction in self.slice)
    start, stop = (int(self.store.offsets[i]) for i in (first, last))
    return start, min(stop, start + self.distinct_tokens) if self.distinct_tokens else stop

  @property
  def n_tokens(self) -> int:
    return self.range[1] - self.range[0]

  def __len__(self) -> int:
    return math.ceil(self.n_tokens / self.seq_len)

  def window(self, i: int) -> dict[str, np.ndarray]:
    """Return window `i`: int32[T] `tokens`, `labels` (the next token, -1: none), `segment_ids` (from 1; 0: padding).

    If documents have their own end token, a begin token is never a label; evaluation does not predict it either.
    """
    if not 0 <= i < len(self):
      raise IndexError(f'window {i} of {len(self)}')
    start = self.range[0] + i * self.seq_len
    stop = min(start + self.seq_len, self.range[1])
    stream = self.store.read(start, min(stop + 1, self.range[1]))
    labels = stream[1:]
    if self.store.end_id is not None:
      labels = np.where(labels == self.store.separator_id, -1, labels)
    window = {
      'tokens': stream[: stop - start],
      'labels': labels,
      'segment_ids': self._segments(start, stop),
    }
    return {name: _pad(value, self.seq_len, _PADDING[name]) for name, value in window.items()}

  def _segments(self, start: int, stop: int) -> np.ndarray:
    segments = np.ones(stop - start, np.int32)
    if self.mask_documents:
      first, last = np.searchsorted(self.store.offsets, (start, stop - 1), side='right')
      starts = self.store.offsets[first:last]  # of the documents that begin after the window does
      np.add.at(segments, starts - start, 1)
      segments = 1 + np.cumsum(segments - 1, dtype=np.int32)
    return segments


@dataclasses.dataclass(frozen=True)
class BatchStream:
  """The endless stream of batches of `batch_size` windows in seeded order."""

  windows: Windows
  batch_size: int
  seed: int

  @functools.cached_property
  def _order(self) -> grain.MapDataset:
    return grain.MapDataset.range(len(self.windows)).seed(self.seed).shuffle().repeat(None).batch(self.batch_size)

  @property
  def steps_per_epoch(self) -> float:
    return len(self.windows) / self.batch_size

  def indices(self, step: int) -> np.ndarray:
    """int64[B]: the windows of a step."""
    return np.asarray(self._order[step], np.int64)

  def rows(self, step: int, rows: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
    """int32[len(rows), T] arrays: those rows of the step's batch."""
    read = [self.windows.window(int(i)) for i in self.indices(step)[np.asarray(rows, np.int64)]]
    return {name: np.stack([window[name] for window in read]) for name in _PADDING}

  @functools.cached_property
  def fingerprint(self) -> str:
    """Of the content and order of all batches. The order itself is hashed, so another library's shuffle shows."""
    n = min(_FINGERPRINT_SAMPLES, _FINGERPRINT_EPOCHS * len(self.windows))
    order = np.concatenate([self.indices(step) for step in range(math.ceil(n / self.batch_size))])[:n]
    windows = self.windows
    settings = [
      windows.store.fingerprint,
      windows.store.separator_id,
      list(windows.range),
      windows.seq_len,
      windows.mask_documents,
      self.batch_size,
    ]
    return digest(canonical_json(settings) + order.astype('<i8').tobytes())

  def iterate(
    self, calls: Sequence[tuple[int, int]], size: int, rows: Sequence[int] | np.ndarray, threads: int, prefetch: int
  ) -> Iterator[dict[str, np.ndarray]]:
    """Read ahead: for each call (first step, n steps) int32[size, len(rows), T] arrays; what follows the n is padding.

    Args:
      calls: (first step, number of steps n <= size) of each item.
      size: steps in an item.
      rows: rows of the batch to read.
      threads, prefetch: how many threads read, and how many items ahead. They change nothing but the speed.

    Raises:
      StoreDamaged: when the item is reached.
    """
    rows = np.asarray(rows, np.int64)
    threads = max(threads, 1)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(prefetch, threads))
    read = functools.partial(self._call, size=size, rows=rows)
    return iter(grain.MapDataset.source(list(calls)).map(read).to_iter_dataset(options))

  def _call(self, call: tuple[int, int], size: int, rows: np.ndarray) -> dict[str, np.ndarray]:
    first, n = call
    if not 0 < n <= size:
      raise ValueError(f'call of {n} steps, at most {size} fit')
    steps = [self.rows(step, rows) for step in range(first, first + n)]
    return {name: _pad(np.stack([step[name] for step in steps]), size, _PADDING[name]) for name in _PADDING}


def local_rows(sharding: jax.sharding.Sharding, batch_size: int) -> np.ndarray:
  """int64 indices, ascending: the rows of a global [B, T] batch that this process's devices hold, each once."""
  # Any length that each axis divides will do: only the rows are asked for.
  shape = (batch_size, sharding.num_devices)
  slices = {index[0].indices(batch_size) for index in sharding.addressable_devices_indices_map(shape).values() if index}
  return np.unique(np.concatenate([np.arange(*s) for s in slices]))


def to_global(
  local: dict[str, np.ndarray], rows: np.ndarray, sharding: jax.sharding.Sharding, batch_size: int
) -> dict[str, jax.Array]:
  """[S, len(rows), T] arrays of this process -> global arrays [S, B, T].

  Args:
    local: what `BatchStream.iterate` gave for `rows`.
    rows: what `local_rows` gave: ascending row indices.
    sharding: of the [S, B, T] arrays.
  """

  def place(value: np.ndarray) -> jax.Array:
    def read(index: tuple[slice, ...] | None) -> np.ndarray:
      assert index is not None
      wanted = np.arange(*index[1].indices(batch_size))
      at = np.searchsorted(rows, wanted)
      if not np.array_equal(rows[np.minimum(at, len(rows) - 1)], wanted):
        raise ValueError(f'rows {wanted} are wanted here, {rows} were read')
      return value[index[0]][:, at][..., index[2]]

    return jax.make_array_from_callback((value.shape[0], batch_size, value.shape[2]), sharding, read)

  return {name: place(value) for name, value in local.items()}


def _pad(value: np.ndarray, size: int, fill: int) -> np.ndarray:
  """Fills the first axis up to `size`."""
  missing = size - len(value)
  if not missing:
    return value
  return np.concatenate([value, np.full((missing, *value.shape[1:]), fill, value.dtype)])
