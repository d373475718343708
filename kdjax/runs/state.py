"""The state of a student in training: what a checkpoint holds."""

from typing import Any, NamedTuple

import jax
import optax

from kdjax.losses import AlphaState

Params = Any


class TrainState(NamedTuple):
  """All that a student's next step depends on, besides the data. Scalars are on device, so that nothing waits for them."""

  params: Params
  opt_state: optax.OptState
  step: jax.Array  # int32: batches seen
  alpha: AlphaState
  skipped: jax.Array  # int32: updates left out because the loss or a gradient was not finite
  skipped_in_row: jax.Array
