import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from kdjax.config import LossConfig
from kdjax.losses import LogitTargets, ModelTargets, UnigramTargets, fused_loss
from kdjax.losses.fused import _fit_vocabulary, _target_specs
from tests.losses.reference import assert_close, problem

B, T, D, V = 2, 3, 4, 10
TARGETS = {
  'model': ModelTargets(jnp.ones((B, T, D)), jnp.ones((D, V))),
  'unigram': UnigramTargets(jnp.ones(V)),
  'logits': LogitTargets(jnp.ones((B, T, V))),
}


@pytest.mark.parametrize('targets', TARGETS.values(), ids=TARGETS)
def test_its_parts_are_its_leaves_in_order_each_with_a_spec_and_a_vocabulary_axis(targets):
  leaves = jax.tree.leaves(targets)
  parts = jax.tree.leaves((targets.tokenwise, targets.shared))
  assert [x.shape for x in leaves] == [x.shape for x in parts]
  specs = jax.tree.leaves(_target_specs(targets), is_leaf=lambda x: isinstance(x, P))
  axes = jax.tree.leaves(targets.vocab_axis)
  for leaf, spec, axis in zip(leaves, specs, axes, strict=True):
    named = dict(enumerate(spec))
    assert axis == -1 or (leaf.shape[axis] == V and named[axis] == 'tensor')
    assert ('tensor' in spec) == (axis != -1)
    assert (named.get(0) == ('replica', 'fsdp')) == (leaf.shape[:2] == (B, T))


@pytest.mark.parametrize('targets', TARGETS.values(), ids=TARGETS)
def test_a_chunks_logits_are_float32_also_from_bfloat16(targets):
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), targets)
  flat = jax.tree.map(lambda x: x.reshape(B * T, *x.shape[2:]), half.tokenwise)
  logits_CxV = half.chunk_logits(flat, half.shared)
  assert logits_CxV.dtype == jnp.float32
  assert np.broadcast_shapes(logits_CxV.shape, (B * T, V)) == (B * T, V)


@pytest.mark.parametrize('targets', TARGETS.values(), ids=TARGETS)
def test_only_padding_is_cut_off_or_added(targets):
  for width in (8, 10, 13):
    fitted = _fit_vocabulary(targets, 8, width)
    for leaf, before, axis in zip(
      jax.tree.leaves(fitted), jax.tree.leaves(targets), jax.tree.leaves(targets.vocab_axis), strict=True
    ):
      if axis == -1:
        assert leaf is before
      else:
        assert leaf.shape[axis] == width
        np.testing.assert_array_equal(
          jax.lax.slice_in_dim(leaf, 0, 8, axis=axis), jax.lax.slice_in_dim(before, 0, 8, axis=axis)
        )


def test_a_model_as_targets_is_its_logits_as_targets():
  x, w, xt, wt, labels = problem()
  weights = jnp.full(labels.shape, 1 / labels.size)
  f = jax.jit(
    lambda targets: fused_loss(x, w, labels, weights, 0.5, targets, loss=LossConfig(temperature=2.0), chunk=4)
  )
  assert_close(f(ModelTargets(xt, wt)), f(LogitTargets(xt @ wt)))


@pytest.mark.parametrize(
  'kind', [{}, {'temperature': 2.0}, {'teacher_top_p': 0.6, 'rest': 'other'}, {'divergence': 'hard_label'}], ids=str
)
def test_tokens_that_the_training_split_never_had_are_no_harm(kind):
  """Their log frequency is -inf: no mass, as for a frequency too small to count."""
  x, w, _, wt, labels = problem()
  weights = jnp.full(labels.shape, 1 / labels.size)

  @jax.jit
  def f(log_probs_V):
    loss = lambda x, w: fused_loss(
      x, w, labels, weights, 0.5, UnigramTargets(log_probs_V), loss=LossConfig(**kind), chunk=4
    )
    return jax.value_and_grad(loss, (0, 1), has_aux=True)(x, w)

  log_probs_V = jax.nn.log_softmax(wt[0])
  never, hardly = (f(log_probs_V.at[jnp.array([3, 5])].set(value)) for value in (-jnp.inf, -1e4))
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(never))
  assert_close(never, hardly)
