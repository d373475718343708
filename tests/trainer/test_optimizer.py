"""The learning rate against plain formulas; AdamW against optax's own."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kdjax.config import Config, DataConfig, ModelConfig, OptimizerConfig, StudentConfig
from kdjax.models import build
from kdjax.trainer import experiments
from kdjax.trainer.optimizer import adamw, learning_rate

PEAK, TOTAL = 2e-3, 200


def cosine(step: int) -> float:
  """5% warm-up from 0, then half a cosine to 10% of the peak; step s of n is at (s + 1) / n."""
  at, warm = step + 1, 10
  if at <= warm:
    return PEAK * at / warm
  return PEAK * (0.1 + 0.9 * (1 + math.cos(math.pi * (at - warm) / (TOTAL - warm))) / 2)


def wsd(step: int) -> float:
  """5% warm-up, constant, the last 20% a line to 10% of the peak."""
  at, warm, decay = step + 1, 10, 40
  if at <= warm:
    return PEAK * at / warm
  return PEAK * (1 - 0.9 * max(0, at - (TOTAL - decay)) / decay)


@pytest.mark.parametrize(('schedule', 'formula'), [('cosine', cosine), ('wsd', wsd)])
def test_the_learning_rate_is_the_plain_formula_at_every_step(schedule, formula):
  rate = learning_rate(OptimizerConfig(learning_rate=PEAK, schedule=schedule), TOTAL)
  np.testing.assert_allclose([rate(s) for s in range(TOTAL)], [formula(s) for s in range(TOTAL)], rtol=2e-6)


@pytest.mark.parametrize('schedule', ['cosine', 'wsd'])
def test_the_first_step_moves_and_the_last_has_the_final_rate(schedule):
  rate = learning_rate(OptimizerConfig(learning_rate=PEAK, schedule=schedule, final_fraction=0.1), TOTAL)
  assert float(rate(0)) == pytest.approx(PEAK / 10)
  assert float(rate(9)) == pytest.approx(PEAK)
  assert float(rate(TOTAL - 1)) == pytest.approx(0.1 * PEAK)


def test_wsd_is_constant_between_warm_up_and_decay():
  rate = learning_rate(OptimizerConfig(learning_rate=PEAK, schedule='wsd'), TOTAL)
  np.testing.assert_allclose([rate(s) for s in range(9, 160)], PEAK, rtol=1e-6)
  assert float(rate(160)) < PEAK


# Rates relative to the peak, by hand, for warm-up and decay that fill or exceed the run; the final fraction is .1.
EDGES = [
  ('cosine', 1, 0.0, [0.1]),
  ('cosine', 1, 1.0, [0.1]),
  ('cosine', 2, 0.0, [0.55, 0.1]),
  ('cosine', 2, 1.0, [1.0, 0.1]),
  ('cosine', 4, 1.0, [1 / 3, 2 / 3, 1.0, 0.1]),
  ('cosine', 4, 0.5, [0.5, 1.0, 0.55, 0.1]),
  ('wsd', 1, 0.0, [0.1]),
  ('wsd', 1, 1.0, [0.1]),
  ('wsd', 2, 0.0, [0.55, 0.1]),
  ('wsd', 3, 0.5, [0.5, 1.0, 0.1]),  # two steps of warm-up and two of decay
  ('wsd', 4, 0.5, [0.5, 1.0, 0.55, 0.1]),
  ('wsd', 7, 0.5, [0.25, 0.5, 0.75, 1.0, 0.7, 0.4, 0.1]),  # four and four
]


@pytest.mark.parametrize(('schedule', 'total', 'warmup', 'rates'), EDGES)
def test_the_rates_at_the_edges_are_those_worked_out_by_hand(schedule, total, warmup, rates):
  decay = 0.5 if warmup == 0.5 else 1.0 - warmup
  config = OptimizerConfig(
    learning_rate=PEAK, schedule=schedule, warmup_fraction=warmup, decay_fraction=decay, final_fraction=0.1
  )
  rate = learning_rate(config, total)
  np.testing.assert_allclose([rate(s) / PEAK for s in range(total)], rates, rtol=1e-5)


@pytest.mark.parametrize('total', [1, 2, 3, 5, 19, 200])
@pytest.mark.parametrize('warmup', [0.0, 0.05, 0.3, 0.5, 0.8, 1.0])
@pytest.mark.parametrize('final', [0.0, 0.1, 1.0])
def test_the_cosine_is_optaxs_own_a_step_ahead(total, warmup, final):
  config = OptimizerConfig(learning_rate=PEAK, warmup_fraction=warmup, final_fraction=final)
  steps = min(round(warmup * total), total - 1)
  exact = optax.warmup_cosine_decay_schedule(0.0, PEAK, steps, total, final * PEAK)
  rate = learning_rate(config, total)
  np.testing.assert_allclose(
    [rate(s) for s in range(total)], [exact(s + 1) for s in range(total)], rtol=1e-5, atol=1e-10
  )


@pytest.mark.parametrize('schedule', ['cosine', 'wsd'])
@pytest.mark.parametrize('total', [1, 2, 3, 5, 19])
@pytest.mark.parametrize('warmup', [0.0, 0.05, 0.5, 0.8, 1.0])
@pytest.mark.parametrize('decay', [0.0, 0.2, 1.0])
def test_every_run_rises_to_the_peak_at_most_once_and_ends_at_the_final_rate(schedule, total, warmup, decay):
  config = OptimizerConfig(learning_rate=PEAK, schedule=schedule, warmup_fraction=warmup, decay_fraction=decay)
  rates = np.asarray([learning_rate(config, total)(s) for s in range(total)])
  assert (rates > 0).all() and (rates <= PEAK * 1.000001).all()
  assert rates[-1] == pytest.approx(0.1 * PEAK)
  top = rates.argmax()
  assert (np.diff(rates[: top + 1]) >= 0).all() and (np.diff(rates[top:]) <= 0).all()


def test_only_runs_whose_rates_have_changed_get_another_identity():
  data = DataConfig(seq_len=128)
  marked = lambda **fields: bool(
    experiments.schedule_identity(StudentConfig(tokens=7 * 8 * 128, optimizer=OptimizerConfig(**fields)), data)
  )
  assert (
    not marked()
    and not marked(warmup_fraction=0.9)
    and not marked(schedule='wsd', warmup_fraction=0.5, decay_fraction=0.2)
  )
  assert marked(warmup_fraction=1.0) and marked(schedule='wsd', warmup_fraction=0.5, decay_fraction=0.5)
  config = Config(student=StudentConfig(optimizer=OptimizerConfig(warmup_fraction=1.0)))
  assert 'phases' in experiments.experiment_identity(config)['student']['optimizer']
  assert 'phases' not in experiments.experiment_identity(config)['teacher']['optimizer']
  run = experiments.run_identity(config, config.student, config.student.model, 'baseline', '')
  assert run['optimizer']['phases'] == 'fitted'


def test_the_rate_can_be_traced():
  rate = learning_rate(OptimizerConfig(learning_rate=PEAK), TOTAL)
  np.testing.assert_allclose(jax.vmap(rate)(jnp.arange(TOTAL)), [rate(s) for s in range(TOTAL)], rtol=1e-6)


def params_and_gradients(n: int):
  config = ModelConfig(vocab_size=16, d_model=8, n_layers=2, d_ff=8, n_heads=2, n_kv_heads=1, head_dim=4)
  shapes = build(config).abstract()
  rng = np.random.default_rng(0)
  draw = lambda: jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype), shapes)
  return draw(), [draw() for _ in range(n)]


def is_norm(path) -> bool:
  return 'scale' in jax.tree_util.keystr(path)


def test_adamw_is_optaxs_adamw_with_clipping():
  config = OptimizerConfig(learning_rate=PEAK, weight_decay=0.1, clip_norm=1.0)
  params, gradients = params_and_gradients(8)
  rate, ours = learning_rate(config, TOTAL), adamw(config)
  mask = jax.tree_util.tree_map_with_path(lambda path, _: not is_norm(path), params)
  theirs = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.adamw(rate, b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=0.1, mask=mask),
  )
  mine, other = params, params
  state, other_state = ours.init(mine), theirs.init(other)
  for step, gradient in enumerate(gradients):
    updates, state = jax.jit(ours.update)(gradient, state, mine)
    mine = jax.tree.map(lambda p, u, r=rate(step): p - r * u, mine, updates)
    updates, other_state = jax.jit(theirs.update)(gradient, other_state, other)
    other = optax.apply_updates(other, updates)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-8), mine, other)


def test_decay_is_off_the_norms_and_on_every_matrix():
  config = OptimizerConfig(weight_decay=0.5)
  params, gradients = params_and_gradients(1)
  nothing = jax.tree.map(jnp.zeros_like, gradients[0])
  updates, _ = adamw(config).update(nothing, adamw(config).init(params), params)
  norms = 0
  for (path, update), param in zip(
    jax.tree_util.tree_flatten_with_path(updates)[0], jax.tree.leaves(params), strict=True
  ):
    if is_norm(path):
      norms += 1
      assert not np.asarray(update).any(), path
    else:
      np.testing.assert_allclose(update, 0.5 * param, rtol=1e-6)
  assert norms == 3  # two in a block, one at the end


def test_large_gradients_are_clipped_by_their_global_norm():
  config = OptimizerConfig(clip_norm=0.25, weight_decay=0.0, b1=0.0, b2=0.0, eps=1.0)
  params, gradients = params_and_gradients(1)
  updates, _ = adamw(config).update(gradients[0], adamw(config).init(params), params)
  scale = 0.25 / optax.global_norm(gradients[0])
  assert scale < 1
  expected = jax.tree.map(lambda g: scale * g / (jnp.abs(scale * g) + 1.0), gradients[0])
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-8), updates, expected)
