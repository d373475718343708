import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.errors import UserError
from kdjax.models import attention as attention_module
from kdjax.models.attention import IMPLEMENTATIONS, Local, attention, cudnn, splash, xla


def inputs(n_tokens=40, n_heads=4, n_kv_heads=2, head_dim=64, dtype='float32', size=1.0):
  rng = np.random.default_rng(0)
  shapes = [(2, n_tokens, heads, head_dim) for heads in (n_heads, n_kv_heads, n_kv_heads)]
  return [jnp.asarray(size * rng.normal(size=shape), dtype) for shape in shapes]


def segments(n_tokens=40):
  """Two documents with padding between and after them; one document alone."""
  cuts = [n_tokens // 3, n_tokens // 3 + 3, n_tokens - 5]
  first = np.zeros(n_tokens, np.int32)
  first[: cuts[0]], first[cuts[1] : cuts[2]] = 1, 2
  return np.stack([first, np.ones_like(first)])


def formula(q_BxTxHxK, k_BxTxGxK, v_BxTxGxK, segment_ids_BxT=None):
  """Float64, grouped heads written out."""
  q, k, v = (np.asarray(x, np.float64) for x in (q_BxTxHxK, k_BxTxGxK, v_BxTxGxK))
  k, v = (np.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
  scores = np.einsum('bthk,bshk->bhts', q, k) / np.sqrt(q.shape[3])
  seen = np.tril(np.ones(scores.shape[2:], bool))
  if segment_ids_BxT is not None:
    seen = seen & (segment_ids_BxT[:, None, :, None] == segment_ids_BxT[:, None, None, :])
  weights = np.exp(np.where(seen, scores - scores.max(axis=-1, keepdims=True), -np.inf))
  return np.einsum('bhts,bshk->bthk', weights / weights.sum(axis=-1, keepdims=True), v)


@pytest.mark.parametrize('n_kv_heads', [1, 2, 4])
@pytest.mark.parametrize('documents', [False, True])
def test_xla_is_the_formula(n_kv_heads, documents):
  q, k, v = inputs(n_kv_heads=n_kv_heads)
  segment_ids = segments() if documents else None
  got = attention(q, k, v, segment_ids, implementation='xla')
  np.testing.assert_allclose(got, formula(q, k, v, segment_ids), atol=2e-6)


@pytest.mark.parametrize(
  ('head_dim', 'n_tokens', 'n_kv_heads'), [(64, 256, 2), (128, 200, 2), (64, 130, 1), (32, 128, 4)]
)
def test_splash_equals_xla(head_dim, n_tokens, n_kv_heads):
  """The kernel's body, interpreted. 200 and 130 tokens are no multiple of its tile."""
  q, k, v = inputs(n_tokens, 4, n_kv_heads, head_dim)
  segment_ids = segments(n_tokens)
  real = (segment_ids > 0)[..., None, None]
  got = splash(q, k, v, segment_ids, interpret=True)
  assert got.shape == q.shape and np.isfinite(got).all()
  np.testing.assert_allclose(got * real, xla(q, k, v, segment_ids) * real, atol=5e-6)


def test_splash_has_the_gradients_of_xla():
  arrays, segment_ids = inputs(140), segments(140)
  weights = np.random.default_rng(1).normal(size=arrays[0].shape) * (segment_ids > 0)[..., None, None]

  def gradients(body, **options):
    return jax.grad(lambda q, k, v: (body(q, k, v, segment_ids, **options) * weights).sum(), (0, 1, 2))(*arrays)

  for got, expected in zip(gradients(splash, interpret=True), gradients(xla), strict=True):
    np.testing.assert_allclose(got, expected, atol=2e-5)


@pytest.mark.parametrize('here', [True, False])
@pytest.mark.parametrize('window', [1, 40, 128, 150])
def test_splash_in_a_local_layer_equals_xla(window, here):
  """Values and gradients; whether the layer is local is traced, as in a scan over layers."""
  arrays, segment_ids = inputs(256), segments(256)
  weights = np.random.default_rng(1).normal(size=arrays[0].shape) * (segment_ids > 0)[..., None, None]

  @functools.partial(jax.jit, static_argnums=0)
  def values(body, arrays, here):
    local = Local(window, here)
    return jax.value_and_grad(lambda q, k, v: (body(q, k, v, segment_ids, local=local) * weights).sum(), (0, 1, 2))(
      *arrays
    )

  (got, got_gradients), (expected, gradients) = (
    values(body, arrays, jnp.asarray(here)) for body in (functools.partial(splash, interpret=True), xla)
  )
  np.testing.assert_allclose(got, expected, rtol=1e-4)
  for one, other in zip(got_gradients, gradients, strict=True):
    np.testing.assert_allclose(one, other, atol=2e-5)
  everywhere = xla(*arrays, segment_ids)
  assert here != np.allclose(xla(*arrays, segment_ids, local=Local(window, jnp.asarray(here))), everywhere)


def test_splash_without_documents_and_in_bfloat16():
  q, k, v = inputs(128, dtype='bfloat16')
  got = splash(q, k, v, interpret=True)
  assert got.dtype == jnp.bfloat16
  np.testing.assert_allclose(got.astype(jnp.float32), formula(q, k, v), atol=0.03)


ON_A_MESH = """
import jax, numpy as np
from kdjax.config import MeshConfig
from kdjax.errors import UserError
from kdjax.models.attention import splash, xla
from kdjax.runtime.sharding import make_mesh
from tests.models.test_attention import segments

shapes = [(8, 128, heads, 64) for heads in (4, 2, 2)]
q, k, v = (np.random.default_rng(i).normal(size=shape).astype('float32') for i, shape in enumerate(shapes))
segment_ids = np.tile(segments(128), (4, 1))
jax.set_mesh(make_mesh(MeshConfig(2, 2, 2)))
hlo = jax.jit(lambda *a: splash(*a, interpret=True)).lower(q, k, v, segment_ids).compile()
error = np.abs(hlo(q, k, v, segment_ids) - xla(q, k, v, segment_ids))[segment_ids > 0].max()
assert error < 5e-6, error
assert jax.typeof(hlo(q, k, v, segment_ids)).shape == q.shape
spec = hlo.output_shardings.shard_shape(q.shape)
assert spec == (2, 128, 2, 64), spec
try:
  splash(q, k[:, :, :1], v[:, :, :1], segment_ids)
except UserError as e:
  assert 'mesh tensor = 2 does not divide the 1 key/value heads' in str(e), e
else:
  raise AssertionError('one key/value head was split in two')
print('as one device')
"""


def test_splash_on_a_mesh_splits_rows_and_heads():
  """A process of its own: the number of CPU devices is fixed when JAX starts."""
  env = {
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': '--xla_force_host_platform_device_count=8',
    'PYTHONPATH': ':'.join(sys.path),
  }
  done = subprocess.run([sys.executable, '-c', ON_A_MESH], env=env, capture_output=True, text=True, timeout=120)
  assert done.stdout.strip() == 'as one device', done.stderr[-2000:]


@pytest.mark.skipif(jax.default_backend() != 'gpu', reason='cuDNN attention needs an NVIDIA GPU')
@pytest.mark.parametrize('documents', [False, True])
def test_cudnn_equals_the_formula(documents):
  q, k, v = inputs(128, dtype='bfloat16')
  segment_ids = segments(128) if documents else None
  real = 1 if segment_ids is None else (segment_ids > 0)[..., None, None]
  got = cudnn(q, k, v, segment_ids).astype(jnp.float32)
  assert np.isfinite(got).all()
  np.testing.assert_allclose(got * real, formula(q, k, v, segment_ids) * real, atol=0.03)


def test_padding_is_finite_and_gives_finite_gradients():
  q, k, v = inputs()
  nothing = np.zeros((2, 40), np.int32)
  out, gradients = jax.value_and_grad(lambda q: attention(q, k, v, nothing).sum())(q)
  assert np.isfinite(out) and np.isfinite(gradients).all()


def test_softmax_is_float32_in_bfloat16_attention():
  """Over 1,024 equal keys a bfloat16 sum would stop growing at 256."""
  q, k, v = inputs(1024, 1, 1, 8, 'bfloat16', size=0.0)
  out = attention(q, k, v + 1, implementation='xla')
  np.testing.assert_allclose(out.astype(jnp.float32), 1.0, atol=0.01)


@pytest.mark.parametrize('implementation', ['xla', 'cudnn'])
def test_a_written_out_document_mask_stops_at_2048_tokens(implementation, monkeypatch):
  monkeypatch.setattr(jax.nn, 'dot_product_attention', lambda q, *_, **__: q)  # cuDNN's cannot even be traced here

  def trace(n_tokens, documents):
    q = jax.ShapeDtypeStruct((1, n_tokens, 2, 8), jnp.bfloat16)
    ids = jax.ShapeDtypeStruct((1, n_tokens), jnp.int32) if documents else None
    return jax.eval_shape(lambda q, ids: attention(q, q, q, ids, implementation=implementation), q, ids).shape

  assert trace(2048, True) == (1, 2048, 2, 8)
  assert trace(4096, False) == (1, 4096, 2, 8)
  with pytest.raises(UserError, match=r'2049 x 2049 document mask.*set data.mask_documents=False') as caught:
    trace(2049, True)
  assert '\n' not in str(caught.value)


def test_cudnn_refuses_float32():
  with pytest.raises(UserError, match='attention=cudnn computes in bfloat16 or float16, not float32'):
    attention(*inputs(), implementation='cudnn')


def test_an_unknown_implementation_is_refused():
  with pytest.raises(UserError, match="unknown implementation 'flash'; known: auto, xla, cudnn, splash"):
    attention(*inputs(), implementation='flash')


@pytest.mark.parametrize(
  ('backend', 'capability', 'dtype', 'head_dim', 'chosen'),
  [
    ('cpu', '', 'bfloat16', 64, 'xla'),
    ('tpu', '', 'bfloat16', 64, 'splash'),
    ('gpu', '9.0', 'bfloat16', 64, 'cudnn'),
    ('gpu', '9.0', 'float32', 64, 'xla'),
    ('gpu', '9.0', 'bfloat16', 20, 'xla'),
    ('gpu', '7.5', 'bfloat16', 64, 'xla'),
    ('gpu', 'gfx90a', 'bfloat16', 64, 'xla'),
  ],
)
def test_auto_chooses_by_backend(backend, capability, dtype, head_dim, chosen, monkeypatch):
  pretend(monkeypatch, backend, capability)
  assert attention(*inputs(8, head_dim=head_dim, dtype=dtype)) == chosen


def pretend(monkeypatch, backend: str, capability: str = '9.0') -> None:
  """Make `attention` return the name of the body that it would call on such a device."""

  class Device:
    compute_capability = capability

  monkeypatch.setenv('XLA_FLAGS', '')  # a test before may have run a command, which sets flags
  monkeypatch.setattr(jax, 'default_backend', lambda: backend)
  monkeypatch.setattr(jax, 'local_devices', lambda: [Device()])
  for name in IMPLEMENTATIONS[1:]:
    monkeypatch.setattr(attention_module, name, lambda *_, name=name, **__: name)


def test_with_deterministic_operations_attention_is_not_cudnn(monkeypatch):
  """Under them cuDNN's kernel ends the step with an IndexError."""
  pretend(monkeypatch, 'gpu')
  monkeypatch.setenv('XLA_FLAGS', '--xla_gpu_deterministic_ops=true')
  assert attention(*inputs(8, head_dim=64, dtype='bfloat16')) == 'xla'
  q = jax.ShapeDtypeStruct((1, 4096, 2, 64), jnp.bfloat16)
  with pytest.raises(UserError, match=r'4096 x 4096 scores; set --config.deterministic=False'):
    attention(q, q, q)
  with pytest.raises(UserError, match=r'attention=cudnn fails under .*set attention=auto'):
    attention_module.check_backend('cudnn')
  monkeypatch.setenv('XLA_FLAGS', '')
  assert attention(q, q, q) == 'cudnn'
  attention_module.check_backend('cudnn')
