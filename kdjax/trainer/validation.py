"""Validation in a run: the mean cross-entropy over the first windows of the validation split."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kdjax.data.batches import Windows, local_rows, to_global
from kdjax.losses import fused_loss
from kdjax.runtime import sharding
from kdjax.trainer.cohort import Cohort


def make_validation(cohort: Cohort, mesh: Mesh) -> Callable[[Any], jax.Array]:
  """Return params -> mean CE in nats. It returns when the device has the result."""
  recipe, batch_size = cohort.recipe, cohort.stream.batch_size
  rows = local_rows(NamedSharding(mesh, P(sharding.BATCH_AXES)), batch_size)
  n = min(cohort.config.eval.every_batches, -(-len(cohort.validation) // batch_size))
  local = {
    name: np.stack([np.stack([_window(cohort.validation, b * batch_size + r)[name] for r in rows]) for b in range(n)])
    for name in ('tokens', 'labels', 'segment_ids')
  }
  batches = to_global(local, rows, NamedSharding(mesh, P(None, sharding.BATCH_AXES)), batch_size)

  def mean_ce(params, batches):
    def body(total, batch):
      hidden = recipe.student.hidden(params, batch['tokens'], batch['segment_ids'] if recipe.mask_documents else None)
      weights = (batch['labels'] >= 0).astype(jnp.float32)
      vocab_size = recipe.student.config.vocab_size
      _, sums = fused_loss(
        hidden,
        recipe.student.head(params),
        batch['labels'],
        weights,
        loss=recipe.loss,
        vocab_size=vocab_size,
        diagnostics=False,
      )
      return (total[0] + sums['ce'], total[1] + weights.sum()), None  # not the loss, which may hold a z-loss

    (ce, count), _ = jax.lax.scan(body, (jnp.zeros(()), jnp.zeros(())), batches)
    return ce / count

  jitted = jax.jit(mean_ce)
  # Waited for: one model after the other, as in checksums.checksums.
  return lambda params: jax.block_until_ready(jitted(params, batches))


def _window(windows: Windows, i: int) -> dict[str, np.ndarray]:
  """A window, or one of padding beyond the last."""
  if i < len(windows):
    return windows.window(i)
  empty = np.zeros(windows.seq_len, np.int32)
  return {'tokens': empty, 'labels': empty - 1, 'segment_ids': empty}
