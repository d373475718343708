"""Scores a model on a token store: sums per document, in float64 on the host, from per-token float32 on the devices."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kdjax.data.batches import local_rows, to_global
from kdjax.data.store import TokenStore
from kdjax.losses import ModelTargets, token_losses
from kdjax.models import Model
from kdjax.runs.metrics import Progress
from kdjax.runtime import sharding
from kdjax.scoring import windows

BINS = 15  # of confidence, for the expected calibration error
DIFFICULTIES = 5
TEMPERATURES = tuple(float(t) for t in np.geomspace(0.6, 3.0, 14))
SUMS = {
  'ce': 'nll',
  'student_entropy': 'entropy',
  'correct': 'correct',
  'kd': 'kl_to_teacher',
  'agreement': 'agreement',
}


class Scored(NamedTuple):
  """A model and its weights; the same for the teacher it is compared with."""

  model: Model
  params: Any


def score_documents(
  student: Scored,
  teacher: Scored | None,
  store: TokenStore,
  temperatures,
  window: int,
  stride: int,
  batch_size: int,
  mesh: Mesh,
  progress: Progress | None = None,
  difficulty_V: np.ndarray | None = None,
) -> pd.DataFrame:
  """One row a document: bytes, tokens and sums over its tokens in nats.

  Columns: doc, bytes, tokens, nll, entropy, correct (top-1), with a teacher kl_to_teacher = KL(teacher || student) and agreement, nll_at
  (a list, at each of `temperatures`; absent without temperatures), bin_count, bin_confidence, bin_correct (lists over BINS bins of
  confidence), and if `difficulty_V` gives each token's bin (see `difficulties`) difficulty_tokens, difficulty_nll (lists over the bins).
  """
  temperatures = jnp.asarray(temperatures, jnp.float32)
  n = store.n_docs
  sums: dict[str, np.ndarray] = {}
  multiple = sharding.n_row_shards(mesh)
  batch_size = -(-batch_size // multiple) * multiple
  for batch in windows.batches(windows.rows(store, window, stride), batch_size, multiple):
    placed = place(batch, mesh)
    models = (student.model, teacher.model if teacher else None)
    values = _token_values(models, student.params, teacher.params if teacher else None, placed, temperatures)
    _add(sums, jax.device_get(values), batch, n, difficulty_V)
    if progress:
      progress.update(int((batch.labels_RxL >= 0).sum()))
  lists = {name: list(value) for name, value in sums.items() if value.ndim == 2}
  flat = {name: value for name, value in sums.items() if value.ndim == 1}
  return pd.DataFrame({'doc': store.doc_ids, 'bytes': np.asarray(store.n_bytes), **flat, **lists})


def difficulties(counts_V: np.ndarray) -> np.ndarray:
  """Each token's bin of difficulty: 0 has the commonest tokens, which make up a fifth of the text, the last the rarest and the unseen.

  By frequency in the training text and not by any model's loss: the same for all models, and a bin of what one of them finds hard would
  show every other one a gain.

  Args:
    counts_V: how often each token stands in the training text.
  """
  order = np.argsort(-counts_V, kind='stable')
  middle_V = np.cumsum(counts_V[order]) - counts_V[order] / 2
  bin_V = np.empty(len(counts_V), np.int64)
  bin_V[order] = np.minimum(DIFFICULTIES * middle_V / counts_V.sum(), DIFFICULTIES - 1)
  return bin_V


def fit_temperature(table: pd.DataFrame, temperatures) -> float:
  """The evaluation temperature with the least NLL: the minimum of a parabola in log T through the best grid point and its neighbours.

  Where the least is at an end of the grid it is that end: the table marks it.
  """
  nll = np.stack(table['nll_at'].to_list()).sum(0)
  best = int(np.argmin(nll))
  if best in (0, len(nll) - 1):
    return float(temperatures[best])
  x = np.log(np.asarray(temperatures)[best - 1 : best + 2])
  a, b, _ = np.polyfit(x, nll[best - 1 : best + 2], 2)
  return float(np.exp(-b / (2 * a)))


def place(batch: windows.Rows, mesh: Mesh) -> dict[str, jax.Array]:
  """A batch's `tokens` and `labels` as global arrays [1, R, L], their rows over the devices; the mesh's data axes divide R."""
  n_rows = len(batch.doc_R)
  mine = local_rows(NamedSharding(mesh, P(sharding.BATCH_AXES)), n_rows)
  local = {'tokens': batch.tokens_RxL[mine][None], 'labels': batch.labels_RxL[mine][None]}
  return to_global(local, mine, NamedSharding(mesh, P(None, sharding.BATCH_AXES)), n_rows)


@functools.partial(jax.jit, static_argnums=0)
def _token_values(models, params, teacher_params, batch, temperatures_K):
  """Per-token arrays [R, L], the same on every process."""
  student, teacher = models
  tokens_RxL, labels_RxL = batch['tokens'][0], batch['labels'][0]
  targets = None
  if teacher is not None:
    targets = ModelTargets(teacher.hidden(teacher_params, tokens_RxL), teacher.head(teacher_params))
  values = token_losses(
    student.hidden(params, tokens_RxL),
    student.head(params),
    labels_RxL,
    temperatures_K,
    targets,
    vocab_size=student.config.vocab_size,
  )
  if sharding.mesh_in_use() is not None:
    values = jax.lax.with_sharding_constraint(values, P())
  return values


def _add(
  sums: dict[str, np.ndarray],
  values: dict[str, np.ndarray],
  batch: windows.Rows,
  n_docs: int,
  difficulty_V: np.ndarray | None,
) -> None:
  """Add a batch's scored tokens to its documents' sums."""
  real = batch.labels_RxL >= 0
  doc = np.broadcast_to(batch.doc_R[:, None], real.shape)[real]

  def add(name, value):
    total = sums.setdefault(name, np.zeros((n_docs, *value.shape[1:])))
    np.add.at(total, doc, value)

  add('tokens', np.ones(len(doc)))
  for source, name in SUMS.items():
    if source in values:
      add(name, values[source][real].astype(np.float64))
  if 'nll_at' in values:
    add('nll_at', values['nll_at'][real].astype(np.float64))
  confidence = values['confidence'][real].astype(np.float64)
  bin_ = np.minimum((confidence * BINS).astype(int), BINS - 1)
  in_bin = np.eye(BINS)[bin_]
  add('bin_count', in_bin)
  add('bin_confidence', in_bin * confidence[:, None])
  add('bin_correct', in_bin * values['correct'][real][:, None])
  if difficulty_V is not None:
    in_bin = np.eye(DIFFICULTIES)[difficulty_V[batch.labels_RxL[real]]]
    add('difficulty_tokens', in_bin)
    add('difficulty_nll', in_bin * values['ce'][real][:, None].astype(np.float64))


def expected_calibration_error(table: pd.DataFrame) -> float:
  """Mean |accuracy - confidence| over the bins, weighted by their tokens."""
  count, confidence, correct = (
    np.stack(table[f'bin_{c}'].to_list()).sum(0) for c in ('count', 'confidence', 'correct')
  )
  return float(np.abs(correct - confidence).sum() / count.sum())
