"""The fused loss on eight virtual devices: the values of one device, sharded gradients, nothing large and one collective in the loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from kdjax.config import LossConfig, MeshConfig
from kdjax.losses import LogitTargets, ModelTargets, Student, UnigramTargets, fused_loss, fused_losses, token_losses
from kdjax.programs import hlo
from kdjax.runtime import sharding
from tests.losses import reference
from tests.losses.reference import assert_close, assert_same_bits

MESHES = ((1, 8, 1), (2, 4, 1), (1, 2, 4), (2, 2, 2), (1, 1, 8))
B, T, D, WIDTH, VOCAB = 8, 5, 16, 128, 70  # over four shards the last has padding only, over eight the last three
KINDS = (
  {'temperature': 2.0, 'z_loss': 0.01},
  {'teacher_top_k': 0.2, 'rest': 'other'},
  {'teacher_top_p': 0.7, 'temperature': 2.0},
  {'teacher_top_k': 9, 'teacher_top_p': 0.8, 'rest': 'other', 'temperature': 0.5},
  {'divergence': 'hard_label'},
)
name = 'x'.join


def mesh_of(shape):
  return sharding.make_mesh(MeshConfig(*shape))


def place(mesh, x, w, xt, wt, labels):
  """As in training: rows over (replica, fsdp), heads by the parameters' rules."""
  head = lambda w: sharding.param_shardings({'head': {'kernel': w}}, mesh)['head']['kernel']
  rows = NamedSharding(mesh, jax.P(sharding.BATCH_AXES))
  x, xt, labels = (jax.device_put(a, rows) for a in (x, xt, labels))
  return x, jax.device_put(w, head(w)), xt, jax.device_put(wt, head(wt)), labels


def problem(b=B, t=T, d=D, dt=24, v=WIDTH, vocab_size=VOCAB, **kwargs):
  *arrays, labels = reference.problem(b, t, d, dt, v, **kwargs)
  return *arrays, labels % vocab_size


def token_weights():
  weights = (np.random.default_rng(0).random((B, T)) < 0.7).astype(np.float32)
  weights[3] = 0
  return jnp.asarray(weights / weights.sum())


def losses_of(kinds, alpha=0.4, vocab_size=VOCAB, chunk=3):
  """Jitted [((loss, sums), (d hidden, d head))] for each kind of loss, and where all are asked for also for other targets and none."""

  @jax.jit
  def f(x, w, xt, wt, labels, weights):
    targets = [ModelTargets(xt, wt), UnigramTargets(wt[0]), LogitTargets(xt @ wt)]
    pairs = [(kind, targets[0]) for kind in kinds]
    if kinds is KINDS:
      pairs += [(kinds[2], targets[1]), (kinds[4], targets[2]), (kinds[0], None)]
    return [
      jax.value_and_grad(
        lambda x, w, kind=kind, target=target: fused_loss(
          x, w, labels, weights, alpha, target, loss=LossConfig(**kind), vocab_size=vocab_size, chunk=chunk
        ),
        (0, 1),
        has_aux=True,
      )(x, w)
      for kind, target in pairs
    ]

  return f


@pytest.fixture(scope='module')
def on_one_device():
  arrays = problem()
  return arrays, jax.device_get(losses_of(KINDS)(*arrays, token_weights()))


@pytest.mark.parametrize('shape', MESHES, ids=lambda s: name(map(str, s)))
def test_it_equals_the_loss_on_one_device_and_gradients_are_sharded_as_parameters(shape, on_one_device):
  arrays, expected = on_one_device
  mesh = mesh_of(shape)
  kinds = KINDS
  if shape != (1, 2, 4):
    kinds, expected = (KINDS[0], KINDS[3]), (expected[0], expected[3])
  with jax.set_mesh(mesh):
    x, w, xt, wt, labels = place(mesh, *arrays)
    results = losses_of(kinds)(x, w, xt, wt, labels, jax.device_put(token_weights(), labels.sharding))
  for got, want in zip(results, expected, strict=True):
    assert_close(got, want)
    dx, dw = got[1]
    assert dx.sharding.is_equivalent_to(x.sharding, dx.ndim)
    assert dw.sharding.is_equivalent_to(w.sharding, dw.ndim)
    assert dw.addressable_shards[0].data.size == dw.size // (shape[1] * shape[2])
    assert not np.asarray(dw)[:, VOCAB:].any()


@pytest.mark.parametrize('shape', [(1, 2, 4), (1, 1, 8)], ids=str)
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_equal_models_have_a_kl_and_a_gradient_of_exactly_zero_over_a_sharded_vocabulary(shape, dtype):
  mesh = mesh_of(shape)
  losses = [LossConfig(temperature=t) for t in (0.5, 1.0, 1.7, 3.0)] + [
    LossConfig(teacher_top_k=5, rest='other', temperature=2.0)
  ]

  @jax.jit
  def f(x, w, xt, wt, labels, weights):
    value = lambda loss: (
      lambda x, w: fused_loss(x, w, labels, weights, 1.0, ModelTargets(xt, wt), loss=loss, vocab_size=VOCAB, chunk=3)[0]
    )
    return [jax.value_and_grad(value(loss), (0, 1))(x, w) for loss in losses]

  with jax.set_mesh(mesh):
    for seed in range(6):
      x, w, _, _, labels = problem(dtype=dtype, seed=seed)
      w = w * (0.05 + 0.2 * seed)
      results = f(*place(mesh, x, w, x.copy(), w.copy(), labels), token_weights())
      for leaf in jax.tree.leaves(jax.device_get(results)):
        assert not np.asarray(leaf).any()


def test_a_student_far_from_the_teacher_is_right_also_where_a_shard_has_none_of_its_mass():
  """The student's mass is in one shard and the teacher's in another: each shard's own scale underflows for one of them."""
  x, w, xt, wt, labels = problem(dt=D)
  x, xt = jnp.ones_like(x), jnp.ones_like(xt)
  w, wt = w.at[:, 3].add(30.0), wt.at[:, WIDTH - 3].add(30.0)
  weights = token_weights()
  loss = LossConfig(temperature=1.0)
  f = jax.jit(
    jax.value_and_grad(
      lambda x, w, xt, wt: fused_loss(x, w, labels, weights, 1.0, ModelTargets(xt, wt), loss=loss, chunk=3)[0], (0, 1)
    )
  )
  alone = jax.device_get(f(x, w, xt, wt))
  mesh = mesh_of((1, 2, 4))
  with jax.set_mesh(mesh):
    x, w, xt, wt, labels = place(mesh, x, w, xt, wt, labels)
    assert_close(f(x, w, xt, wt), alone)
  assert abs(alone[1][1][:, WIDTH - 3]).max() > 0.5  # the teacher's token is pulled up with all its mass


def test_a_cohort_and_token_losses_on_a_mesh_are_those_of_one_device():
  x, w, xt, wt, labels = problem()
  weights = token_weights()
  loss = LossConfig(temperature=2.0, teacher_top_p=0.8, rest='other')

  @jax.jit
  def f(x, w, xt, wt, labels):
    targets = [ModelTargets(xt, wt), UnigramTargets(wt[0])]
    students = [Student(x, w, 0.3, 0), Student(2 * x, w, 0.0), Student(x, -w, 0.5, 1)]
    cohort = fused_losses(students, labels, weights, targets, loss=loss, vocab_size=VOCAB, chunk=3)
    return cohort, token_losses(x, w, labels, (0.5, 1.0), targets[0], loss=loss, vocab_size=VOCAB, chunk=3)

  expected = jax.device_get(f(x, w, xt, wt, labels))
  mesh = mesh_of((2, 2, 2))
  with jax.set_mesh(mesh):
    assert_close(f(*place(mesh, x, w, xt, wt, labels)), expected, 2e-6)


def test_padding_columns_of_a_sharded_vocabulary_change_nothing():
  x, w, xt, wt, labels = problem()
  mesh = mesh_of((1, 2, 4))
  f = losses_of(KINDS[:2])
  results = []
  with jax.set_mesh(mesh):
    for scale in (0.0, 1e3):
      fill = lambda w, scale=scale: w.at[:, VOCAB:].multiply(scale)
      results.append(jax.device_get(f(*place(mesh, x, fill(w), xt, fill(wt), labels), token_weights())))
  assert_same_bits(*(r[:2] for r in results))


# What the compiler makes of it.


def compiled(b=8, t=64, d=16, v=256, chunk=32, mesh=None, loss=None):
  loss = loss or LossConfig(temperature=2.0)

  def f(x, w, xt, wt, labels, weights, alpha):
    return fused_loss(x, w, labels, weights, alpha, ModelTargets(xt, wt), loss=loss, chunk=chunk)

  arrays = problem(b, t, d, d, v, v)
  if mesh is None:
    return jax.jit(jax.value_and_grad(f, (0, 1), has_aux=True)).lower(*arrays, jnp.ones((b, t)), 0.4).compile()
  with jax.set_mesh(mesh):
    arrays = place(mesh, *arrays)
    weights = jax.device_put(jnp.ones((b, t)), arrays[-1].sharding)
    return jax.jit(jax.value_and_grad(f, (0, 1), has_aux=True)).lower(*arrays, weights, 0.4).compile()


def largest_array(executable):
  """Bytes of the largest array that any instruction gives, arguments apart."""
  return hlo.Program(executable.as_text()).largest_array()[0]


def test_whole_logits_exist_nowhere_in_the_compiled_loss():
  n, v = 8 * 64, 256
  for loss in (LossConfig(temperature=2.0), LossConfig(teacher_top_k=5, teacher_top_p=0.9, rest='other')):
    assert largest_array(compiled(loss=loss)) < 4 * n * v // 4
  dense = jax.jit(jax.grad(lambda x, w: jnp.sum(jax.nn.log_softmax(x @ w)[..., 0])))
  x, w, *_ = problem(8, 64, 16, v=v)
  assert largest_array(dense.lower(x, w).compile()) >= 4 * n * v  # the measure sees them where they are


@pytest.mark.parametrize(('shape', 'collectives'), [((2, 2, 2), 1), ((1, 1, 8), 1), ((2, 4, 1), 0)], ids=str)
def test_on_a_mesh_the_loop_holds_one_small_collective_and_no_whole_array(shape, collectives):
  executable = compiled(mesh=mesh_of(shape))
  replica, fsdp, tensor = shape
  assert largest_array(executable) < 4 * 8 * 64 * 256 // (replica * fsdp * tensor)
  sizes = dict(zip(('replica', 'fsdp', 'tensor'), shape, strict=True))
  found = [one for one in hlo.Program(executable.as_text()).collectives(sizes) if one.loop]
  assert len(found) == collectives, found
  for one in found:
    assert (one.kind, one.axes) == ('all-gather', ('tensor',))
    assert one.bytes <= 4 * tensor * 16 * 32  # a handful of numbers a token of the chunk


def test_temporary_memory_grows_with_the_hidden_states_only():
  d, temporary = 16, {}
  for t in (64, 512):
    temporary[t] = compiled(t=t, d=d).memory_analysis().temp_size_in_bytes
  tokens = 8 * (512 - 64)
  assert temporary[512] - temporary[64] <= 4 * tokens * (3 * d + 4)
