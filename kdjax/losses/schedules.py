"""Schedules of alpha as a few scalars in the train state, evaluated inside the step: a new alpha compiles nothing anew."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kdjax.config import AlphaSchedule

KINDS = ('constant', 'linear', 'cosine', 'lr')


class AlphaState(NamedTuple):
  """alpha moves from `start` to `final` while the step goes from `begin` to `end`. All are float32 scalars."""

  start: jax.Array
  final: jax.Array
  begin: jax.Array
  end: jax.Array
  kind: jax.Array  # index into KINDS


def alpha_state(alpha: float, schedule: AlphaSchedule, total_steps: int) -> AlphaState:
  """The scalars for one student's config; `schedule.begin` and `.end` are fractions of the run."""
  values = (alpha, schedule.final, schedule.begin * total_steps, schedule.end * total_steps, KINDS.index(schedule.kind))
  return AlphaState(*(jnp.asarray(v, jnp.float32) for v in values))


def alpha_at(state: AlphaState, step, lr_fraction) -> jax.Array:
  """alpha at a step.

  Args:
    state: from `alpha_state`.
    step: the optimizer's step, from 0.
    lr_fraction: the learning rate as a fraction of its peak; 'lr' follows it: final + (start - final) * lr_fraction (Peng et al. 2025's
      "WSD-alpha with WSD-LR" is this with final = 0 and a WSD schedule).
  """
  done = jnp.clip((step - state.begin) / jnp.maximum(state.end - state.begin, 1e-9), 0.0, 1.0)
  left = jnp.stack(
    [jnp.ones_like(done), 1 - done, (1 + jnp.cos(math.pi * done)) / 2, jnp.asarray(lr_fraction, jnp.float32)]
  )
  return state.final + (state.start - state.final) * left[state.kind.astype(jnp.int32)]
