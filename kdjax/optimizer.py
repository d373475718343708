"""AdamW and its learning rate. The rate is applied by the step, from the state's own step: a skipped update moves no schedule."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from kdjax.config import OptimizerConfig
from kdjax.sharding import path_name


def learning_rate(config: OptimizerConfig, total_steps: int) -> Callable[[jax.Array], jax.Array]:
  """step -> learning rate: linear warm-up from 0, then cosine, or WSD (constant, then a linear decay), to `final_fraction` of the peak.

  Step s of n uses the rate at (s + 1) / n, so that the first step moves and the last reaches the final rate.
  """
  peak, final = config.learning_rate, config.learning_rate * config.final_fraction
  warmup = round(config.warmup_fraction * total_steps)
  up = optax.linear_schedule(0.0, peak, max(1, warmup))
  if config.schedule == 'cosine':
    rest = optax.cosine_decay_schedule(peak, max(1, total_steps - warmup), config.final_fraction)
    schedule = optax.join_schedules([up, rest], [warmup])
  else:
    decay = max(1, round(config.decay_fraction * total_steps))
    stable = total_steps - decay
    schedule = optax.join_schedules(
      [up, optax.constant_schedule(peak), optax.linear_schedule(peak, final, decay)], [warmup, stable]
    )
  return lambda step: jnp.asarray(schedule(step + 1), jnp.float32)


def adamw(config: OptimizerConfig) -> optax.GradientTransformation:
  """Clipped gradients -> Adam's direction plus decoupled decay (off norms and biases), before the learning rate."""

  def decays(params):
    return jax.tree_util.tree_map_with_path(
      lambda path, _: path_name(path).rpartition('/')[2] not in ('scale', 'bias'), params
    )

  return optax.chain(
    optax.clip_by_global_norm(config.clip_norm),
    optax.scale_by_adam(config.b1, config.b2, config.eps),
    optax.add_decayed_weights(config.weight_decay, mask=decays),
  )
