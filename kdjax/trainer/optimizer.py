"""AdamW and its learning rate. The rate is applied by the step, from the state's own step: a skipped update moves no schedule."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from kdjax.config import OptimizerConfig
from kdjax.runtime.sharding import path_name


def learning_rate(config: OptimizerConfig, total_steps: int) -> Callable[[jax.Array], jax.Array]:
  """Return step -> learning rate: linear warm-up from 0, then cosine, or WSD (constant, then linear decay), to `final_fraction` of the peak.

  Step s of n uses the rate at (s + 1) / n, so the first step is not 0 and the last step has the final rate. The last step is never part of
  the warm-up. If warm-up and decay, in whole steps, together exceed the run, the decay starts when the warm-up ends. A run of one step uses
  the final rate.
  """
  peak, final = config.learning_rate, config.learning_rate * config.final_fraction
  warmup, decay = _phases(config, total_steps)
  warmup = min(warmup, total_steps - 1)
  up = optax.linear_schedule(0.0, peak, max(1, warmup))
  if config.schedule == 'cosine':
    rest = optax.cosine_decay_schedule(peak, total_steps - warmup, config.final_fraction)
    schedule = optax.join_schedules([up, rest], [warmup])
  else:
    decay = min(decay, total_steps - warmup)
    down = optax.linear_schedule(peak, final, decay)
    schedule = optax.join_schedules([up, optax.constant_schedule(peak), down], [warmup, total_steps - decay])
  return lambda step: jnp.asarray(schedule(step + 1), jnp.float32)


def phases_overrun(config: OptimizerConfig, total_steps: int) -> bool:
  """Return whether the warm-up, in whole steps, fills the run, or warm-up and decay together exceed it."""
  warmup, decay = _phases(config, total_steps)
  return warmup >= total_steps or (config.schedule == 'wsd' and warmup + decay > total_steps)


def _phases(config: OptimizerConfig, total_steps: int) -> tuple[int, int]:
  """Return the steps of the warm-up and of the decay, from their fractions."""
  return round(config.warmup_fraction * total_steps), max(1, round(config.decay_fraction * total_steps))


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
