import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.config import AlphaSchedule
from kdjax.losses import alpha_at, alpha_state

STEPS = 1000


def alphas(start, steps, schedule, lr_fraction=1.0):
  state = alpha_state(start, schedule, STEPS)
  return [float(alpha_at(state, jnp.int32(step), lr_fraction)) for step in steps]


def test_a_constant_alpha_is_the_configs_at_every_step_exactly():
  for alpha in (0.0, 0.4, 1.0):
    assert set(alphas(alpha, (0, 1, 500, 999, 5000), AlphaSchedule(), lr_fraction=0.3)) == {float(np.float32(alpha))}


@pytest.mark.parametrize(
  ('kind', 'halfway', 'quarter'), [('linear', 0.5, 0.75), ('cosine', 0.5, (1 + np.cos(np.pi / 4)) / 2)]
)
def test_alpha_moves_from_start_to_final_between_begin_and_end(kind, halfway, quarter):
  schedule = AlphaSchedule(kind, final=0.2, begin=0.1, end=0.5)
  expected = 0.2 + 0.6 * np.array([1, 1, quarter, halfway, 0, 0])
  np.testing.assert_allclose(alphas(0.8, (0, 100, 200, 300, 500, 1000), schedule), expected, atol=1e-6)


def test_alpha_may_rise():
  np.testing.assert_allclose(alphas(0.0, (0, 500, 1000), AlphaSchedule('linear', final=1.0)), [0, 0.5, 1], atol=1e-6)


def test_a_begin_that_is_the_end_is_a_jump():
  schedule = AlphaSchedule('linear', final=0.0, begin=0.5, end=0.5)
  np.testing.assert_allclose(alphas(0.8, (0, 499, 501, 1000), schedule), [0.8, 0.8, 0, 0], atol=1e-6)


def test_an_alpha_tied_to_the_learning_rate_has_its_shape():
  for final in (0.0, 0.1):
    schedule = AlphaSchedule('lr', final=final, begin=0.2, end=0.3)
    for fraction in (0.0, 0.05, 0.5, 1.0):
      np.testing.assert_allclose(
        alphas(0.6, (0, 250, 1000), schedule, fraction), final + (0.6 - final) * fraction, atol=1e-6
      )


def test_no_schedule_step_or_alpha_compiles_anew():
  f = jax.jit(alpha_at)
  for kind in ('constant', 'linear', 'cosine', 'lr'):
    for alpha in (0.0, 0.3):
      state = alpha_state(alpha, AlphaSchedule(kind, final=0.5 * alpha, end=0.7), STEPS)
      for step in (0, 3):
        value = f(state, jnp.int32(step), jnp.float32(0.5))
        assert value.shape == () and value.dtype == jnp.float32
  assert f._cache_size() == 1
