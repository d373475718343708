import dataclasses
import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.config import ModelConfig, RopeScaling
from kdjax.config.sizes import NAMED, named
from kdjax.errors import UserError
from kdjax.models import build, flops
from kdjax.models.decoder import rope_angles, rope_frequencies, rotate
from tests.models import reference

SMALL = ModelConfig(vocab_size=100, d_model=32, n_layers=3, d_ff=48, n_heads=4, n_kv_heads=2, head_dim=16, tied=False)
STYLES = {
  'llama': SMALL,
  'llama-tied-scaled': dataclasses.replace(
    SMALL, tied=True, rope_theta=1e4, rope_scaling=RopeScaling(factor=8.0, original_max_len=256)
  ),
  'qwen': dataclasses.replace(SMALL, tied=True, qk_norm=True, rope_theta=1e6, norm_eps=1e-6),
  'qwen-2.5': dataclasses.replace(SMALL, qkv_bias=True),
  'olmo': dataclasses.replace(SMALL, norms='after', qk_norm_whole=True),
  'gemma': dataclasses.replace(
    SMALL,
    n_layers=4,
    tied=True,
    norms='both',
    norm_offset=True,
    qk_norm=True,
    activation='gelu_tanh',
    embed_scale=32**0.5,
    attn_scale=0.2,
    local_window=5,
    global_every=3,
    local_rope_theta=100.0,
    rope_scaling=RopeScaling(factor=4.0, method='linear'),
  ),
}
T = 24
SEGMENTS = np.array([[1] * 7 + [2] * 9 + [0] * 2 + [3] * 4 + [0] * 2, [1] * 24])


def random_params(model, seed=0):
  """Weights far from their start (norm scales too), so that every part of the model matters."""
  leaves, tree = jax.tree.flatten(model.abstract())
  rng = np.random.default_rng(seed)
  size = {1: 0.3, 2: 0.3, 3: 0.25}
  return tree.unflatten(
    [jnp.asarray((len(x.shape) < 3) * 1.0 + size[len(x.shape)] * rng.normal(size=x.shape), x.dtype) for x in leaves]
  )


def random_tokens(seed=1, shape=(2, T)):
  return np.random.default_rng(seed).integers(0, SMALL.vocab_size, shape)


@pytest.fixture(scope='module', params=STYLES)
def style(request):
  """A model, its weights, and its jitted `hidden`."""
  model = build(STYLES[request.param])
  return model, random_params(model), jax.jit(model.hidden)


@pytest.mark.parametrize('segments', [None, SEGMENTS])
def test_agrees_with_the_float64_reference(style, segments):
  model, params, hidden = style
  tokens = random_tokens()
  expected = reference.hidden(params, tokens, model.config, segments)
  got = hidden(params, tokens, segments)
  assert got.shape == (2, T, SMALL.d_model) and got.dtype == jnp.float32
  real = slice(None) if segments is None else segments > 0
  np.testing.assert_allclose(np.asarray(got)[real], expected[real], atol=1e-5)


def test_no_token_sees_a_later_one(style):
  _, params, hidden = style
  tokens = random_tokens()
  before = np.asarray(hidden(params, tokens, None))
  for t in (0, 11, T - 1):
    changed = tokens.copy()
    changed[:, t] = (changed[:, t] + 1) % SMALL.vocab_size
    after = np.asarray(hidden(params, changed, None))
    np.testing.assert_array_equal(after[:, :t], before[:, :t])
    assert (after[:, t:] != before[:, t:]).any(axis=-1).all()


def test_documents_and_padding_are_blind_to_each_other(style):
  _, params, hidden = style
  tokens, segments = random_tokens()[:1], SEGMENTS[:1]
  before = np.asarray(hidden(params, tokens, segments))
  assert np.isfinite(before).all()
  for document in (0, 1, 2, 3):
    own = segments == document
    after = np.asarray(hidden(params, np.where(own, (tokens + 1) % SMALL.vocab_size, tokens), segments))
    np.testing.assert_array_equal(after[~own], before[~own])
    assert (after[own] != before[own]).any(axis=-1).all()


def test_a_document_reads_the_same_wherever_it_stands_in_the_window(style):
  _, params, hidden = style
  tokens = random_tokens()
  inside = np.asarray(hidden(params, tokens, SEGMENTS))[0, 7:16]
  alone = np.asarray(hidden(params, tokens[:1, 7:16], None))[0]
  np.testing.assert_allclose(inside, alone, atol=2e-5)


def test_rotary_scores_depend_on_the_distance_alone():
  config = STYLES['llama-tied-scaled']
  q, k = np.random.default_rng(0).normal(size=(2, config.head_dim))
  angles = rope_angles(jnp.arange(200.0), rope_frequencies(config))
  q_TxK, k_TxK = (np.asarray(rotate(jnp.tile(x, (1, 200, 1, 1)), angles))[0, :, 0] for x in (q, k))
  for distance in (0, 1, 50):
    scores = [q_TxK[t + distance] @ k_TxK[t] for t in (0, 3, 149)]
    np.testing.assert_allclose(scores, scores[0], atol=2e-5)
  assert abs(q_TxK[50] @ k_TxK[0] - q_TxK[0] @ k_TxK[0]) > 1e-2


@pytest.mark.parametrize(
  'scaling',
  [
    RopeScaling(),
    RopeScaling(6.0, method='linear'),
    RopeScaling(8.0, 1.0, 4.0, 8192),
    RopeScaling(32.0, 1.0, 4.0, 8192),
    RopeScaling(4.0, 2.0, 3.0, 256),
  ],
)
def test_rotary_frequencies_follow_their_scaling(scaling):
  config = ModelConfig(head_dim=128, rope_scaling=scaling)
  np.testing.assert_allclose(rope_frequencies(config), reference.frequencies(config), rtol=1e-12)


def test_scaling_slows_long_waves_only():
  plain = rope_frequencies(ModelConfig(head_dim=128))
  scaled = rope_frequencies(ModelConfig(head_dim=128, rope_scaling=RopeScaling(factor=8.0)))
  assert scaled[0] == plain[0] and scaled[-1] == pytest.approx(plain[-1] / 8, rel=1e-12)


def test_qk_norm_takes_the_size_of_queries_and_keys_out():
  tokens = random_tokens()
  for config, same in ((STYLES['qwen'], True), (STYLES['llama'], False)):
    model = build(dataclasses.replace(config, norm_eps=1e-12))
    params = random_params(model)
    louder = jax.tree.map(lambda x: x, params)
    louder['blocks']['attn']['q']['kernel'] = params['blocks']['attn']['q']['kernel'] * 7
    difference = jnp.abs(model.hidden(params, tokens) - model.hidden(louder, tokens)).max()
    assert (difference < 1e-4) == same


def test_the_cached_pass_gives_what_the_whole_gives(style):
  """A prompt at once, then token by token; a row that begins later is as if it stood alone."""
  model, params, hidden = style
  tokens = random_tokens()
  padded = np.concatenate([np.zeros((2, 3), int), tokens], 1)
  cache = model.empty_cache(jnp.array([3, 3]), T + 8)
  extend = jax.jit(model.extend)
  first, cache = extend(params, padded[:, :10], cache)
  rest = []
  for t in range(10, T + 3):
    out, cache = extend(params, padded[:, t : t + 1], cache)
    rest.append(out)
  assert int(cache.length) == T + 3
  got = np.concatenate([first, *rest], 1)[:, 3:]
  np.testing.assert_allclose(got, hidden(params, tokens, None), atol=2e-5)


@pytest.mark.parametrize('name', [*NAMED, *STYLES])
def test_parameter_counts_are_those_of_flops(name):
  config = STYLES.get(name) or named(name, vocab_size=NAMED[name].vocab_size or 1000)
  model, count = build(config), flops.count_params(config)
  params = model.abstract()  # shapes alone: 8B would not fit here
  assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(params))
  sizes = {part: sum(math.prod(x.shape) for x in jax.tree.leaves(tree)) for part, tree in params.items()}
  assert sizes['embed'] == count.embedding
  assert sizes.get('head', 0) == count.head
  assert sizes['blocks'] + sizes['final_norm'] == count.non_embedding
  assert model.n_params == count.total


def test_tree_names_shapes_and_dtypes():
  model = build(dataclasses.replace(SMALL, qk_norm=True))
  leaves = jax.tree_util.tree_leaves_with_path(model.abstract())
  shapes = {'/'.join(key.key for key in path): leaf.shape for path, leaf in leaves}
  assert shapes == {
    'embed/embedding': (128, 32),
    'blocks/attn_norm/scale': (3, 32),
    'blocks/attn/q/kernel': (3, 32, 64),
    'blocks/attn/k/kernel': (3, 32, 32),
    'blocks/attn/v/kernel': (3, 32, 32),
    'blocks/attn/o/kernel': (3, 64, 32),
    'blocks/attn/q_norm/scale': (3, 16),
    'blocks/attn/k_norm/scale': (3, 16),
    'blocks/mlp_norm/scale': (3, 32),
    'blocks/mlp/gate/kernel': (3, 32, 48),
    'blocks/mlp/up/kernel': (3, 32, 48),
    'blocks/mlp/down/kernel': (3, 48, 32),
    'final_norm/scale': (32,),
    'head/kernel': (32, 128),
  }
  assert {leaf.dtype for _, leaf in leaves} == {jnp.dtype('float32')}
  half = build(dataclasses.replace(SMALL, param_dtype='bfloat16'))
  assert {leaf.dtype for leaf in jax.tree.leaves(half.init(jax.random.key(0)))} == {jnp.dtype('bfloat16')}


def test_head_is_the_embedding_when_tied_and_a_weight_of_its_own_when_not():
  tied = build(STYLES['qwen'])
  params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tied.init(jax.random.key(0)))
  np.testing.assert_array_equal(tied.head(params), params['embed']['embedding'].T)
  assert tied.head(params).dtype == jnp.bfloat16
  untied = build(STYLES['llama'])
  params = untied.init(jax.random.key(0))
  assert untied.head(params) is params['head']['kernel']
  assert 'head' not in tied.abstract()


@pytest.mark.parametrize('changes', [{'remat': 'full'}, {'remat': 'dots'}, {'scan_unroll': 3}, {'scan_unroll': 2}])
def test_remat_and_unrolling_change_neither_outputs_nor_gradients(changes):
  tokens, segments = random_tokens(), SEGMENTS
  model, changed = build(STYLES['qwen']), build(dataclasses.replace(STYLES['qwen'], **changes))
  params = random_params(model)
  weights = np.random.default_rng(2).normal(size=(2, T, SMALL.d_model))

  def outputs_and_gradients(model):
    def loss(params):
      hidden = model.hidden(params, tokens, segments)
      return (hidden * weights).mean(), hidden

    return jax.jit(jax.grad(loss, has_aux=True))(params)

  def assert_close(a, b):
    np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())

  expected = outputs_and_gradients(model)
  assert all(jnp.abs(gradient).max() > 0 for gradient in jax.tree.leaves(expected[0]))
  jax.tree.map(assert_close, outputs_and_gradients(changed), expected)


def test_remat_saves_memory():
  model = build(dataclasses.replace(SMALL, n_layers=16))
  tokens = jax.ShapeDtypeStruct((8, 64), jnp.int32)

  def temp_bytes(remat):
    m = build(dataclasses.replace(model.config, remat=remat))
    grad = jax.jit(jax.grad(lambda p, t: m.hidden(p, t).sum()))
    return grad.lower(m.abstract(), tokens).compile().memory_analysis().temp_size_in_bytes

  none, dots, full = map(temp_bytes, ('none', 'dots', 'full'))
  assert full < 0.6 * dots < 0.6 * none


def test_bfloat16_computes_over_float32_weights(style):
  model, params, hidden = style
  tokens = random_tokens()
  exact = hidden(params, tokens, None)
  half = build(dataclasses.replace(model.config, dtype='bfloat16'))
  got = jax.jit(half.hidden)(params, tokens)
  assert got.dtype == jnp.bfloat16
  error = jnp.abs(got.astype(jnp.float32) - exact).mean() / jnp.abs(exact).mean()
  assert 1e-4 < error < 0.05  # rounded, but not wrong
  grads = jax.eval_shape(jax.grad(lambda p: half.hidden(p, tokens).astype(jnp.float32).sum()), params)
  assert {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype('float32')}


def test_bfloat16_weights_are_taken_as_they_are(style):
  _, params, hidden = style
  tokens = random_tokens()
  rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  back = jax.tree.map(lambda x: x.astype(jnp.float32), rounded)
  got = hidden(rounded, tokens, None)
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(got, hidden(back, tokens, None), atol=5e-6)


@pytest.mark.parametrize('name', ['tiny-0.1m', 'tiny-1m', 'tiny-10m', 'untied', 'qwen'])
def test_training_starts_near_the_uniform_loss(name):
  others = {
    'untied': dataclasses.replace(NAMED['tiny-1m'], tied=False),
    'qwen': dataclasses.replace(NAMED['qwen3-0.3b'], n_layers=4),  # the wide tied one
  }
  model = build(dataclasses.replace(others.get(name) or NAMED[name], vocab_size=2048))
  params = jax.jit(model.init)(jax.random.key(0))
  tokens = np.random.default_rng(0).integers(0, 2048, (2, 129))
  logits = model.hidden(params, tokens[:, :-1]) @ model.head(params)
  loss = -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], -1).mean()
  assert abs(loss - math.log(2048)) < 0.3


def test_init_has_the_stated_spread_and_follows_its_key():
  model = build(named('tiny-1m', vocab_size=2048))
  params = jax.jit(model.init)(jax.random.key(0))
  blocks = params['blocks']
  for kernel in (
    *(blocks['attn'][n]['kernel'] for n in 'qkv'),
    blocks['mlp']['gate']['kernel'],
    blocks['mlp']['up']['kernel'],
  ):
    assert jnp.std(kernel) == pytest.approx(0.02, rel=0.02)
  for kernel in (blocks['attn']['o']['kernel'], blocks['mlp']['down']['kernel']):
    assert jnp.std(kernel) == pytest.approx(0.02 / math.sqrt(10), rel=0.02)
  assert jnp.std(params['embed']['embedding']) == pytest.approx(0.02, rel=0.02)
  assert (params['final_norm']['scale'] == 1).all() and (blocks['attn_norm']['scale'] == 1).all()
  kernels = blocks['attn']['q']['kernel']
  assert not np.array_equal(kernels[0], kernels[1])
  again, other = model.init(jax.random.key(0)), model.init(jax.random.key(1))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), again, params)
  assert not np.array_equal(other['embed']['embedding'], params['embed']['embedding'])


def test_equal_configs_are_one_model_to_jit():
  calls = []

  @jax.jit(static_argnums=0)
  def hidden(model, params, tokens):
    calls.append(model)
    return model.hidden(params, tokens)

  params = build(SMALL).init(jax.random.key(0))
  for _ in range(2):
    hidden(build(dataclasses.replace(SMALL)), params, random_tokens())
  assert len(calls) == 1 and build(SMALL) == build(dataclasses.replace(SMALL))


ON_A_MESH = """
import jax, numpy as np
from kdjax.config import MeshConfig
from kdjax.models import build
from kdjax.runtime.sharding import make_mesh, param_shardings
from tests.models.test_decoder import SEGMENTS, SMALL, random_tokens

model = build(SMALL)
tokens, segments = np.tile(random_tokens(), (2, 1)), np.tile(SEGMENTS, (2, 1))
alone = jax.jit(model.init)(jax.random.key(3))
expected = jax.jit(model.hidden)(alone, tokens, segments)
mesh = make_mesh(MeshConfig(2, 2, 2))
jax.set_mesh(mesh)
params = jax.jit(model.init, out_shardings=param_shardings(model.abstract(), mesh))(jax.random.key(3))
assert params['blocks']['mlp']['up']['kernel'].sharding.shard_shape((3, 32, 48)) == (3, 16, 24)
jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), params, alone)
got = jax.jit(model.hidden)(params, tokens, segments)
assert got.sharding.shard_shape(got.shape)[0] == 1, got.sharding
np.testing.assert_allclose(got, expected, atol=1e-5)
print('as one device')
"""


def test_a_mesh_changes_neither_the_start_nor_the_outputs():
  """A process of its own: the number of CPU devices is fixed when JAX starts."""
  env = {
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': '--xla_force_host_platform_device_count=8',
    'PYTHONPATH': ':'.join(sys.path),
  }
  done = subprocess.run([sys.executable, '-c', ON_A_MESH], env=env, capture_output=True, text=True, timeout=120)
  assert done.stdout.strip() == 'as one device', done.stderr[-2000:]


def test_a_window_longer_than_the_model_is_refused():
  model = build(dataclasses.replace(SMALL, max_seq_len=16))
  params = model.abstract()
  jax.eval_shape(model.hidden, params, np.zeros((1, 16), int))
  with pytest.raises(UserError, match='17 tokens exceed max_seq_len = 16'):
    jax.eval_shape(model.hidden, params, np.zeros((1, 17), int))


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'vocab_size': 0}, 'vocab_size = 0 must be at least 1; take it from the tokenizer'),
    ({'n_layers': 0}, 'n_layers = 0 must be at least 1'),
    ({'n_kv_heads': 3}, 'n_kv_heads = 3 does not divide n_heads = 4'),
    ({'head_dim': 15}, 'head_dim = 15 is odd'),
    ({'attention': 'flash'}, "unknown implementation 'flash'; known: auto, xla, cudnn, splash"),
    ({'remat': 'some'}, "unknown remat 'some'; known: none, full, dots"),
    ({'dtype': 'fp32'}, "unknown dtype 'fp32'; known: auto, float32, bfloat16, float16"),
    ({'param_dtype': 'auto'}, "unknown param_dtype 'auto'; known: float32, bfloat16, float16"),
  ],
)
def test_an_impossible_config_is_refused_in_one_line(changes, message):
  with pytest.raises(UserError) as caught:
    build(dataclasses.replace(SMALL, **changes))
  assert message in str(caught.value) and '\n' not in str(caught.value)
