"""Is it right in bfloat16 on this device? Errors against float64 on the host, and exact properties that a test holds on CPU."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from benchmarks.device.sizes import Size
from benchmarks.step import Stepper
from kdjax.config import LossConfig, MeshConfig, ModelConfig
from kdjax.config.sizes import named
from kdjax.losses import ModelTargets, dense_loss, fused_loss
from kdjax.models import build
from kdjax.models.attention import attention
from kdjax.models.quantized import quantize
from kdjax.runtime import backend
from kdjax.runtime.sharding import make_mesh
from kdjax.teachers.frozen import to_dtype

ALPHA = 0.4
BODIES = {'cpu': ('xla',), 'gpu': ('xla', 'cudnn'), 'tpu': ('xla', 'splash')}


def cases(size: Size) -> dict[str, Callable[[], dict]]:
  found: dict[str, Callable[[], dict]] = {
    'environment': lambda: {'environment': timing.environment(), 'memory_gib': size.memory_gib}
  }
  for dtype in ('bfloat16', 'float32'):
    for temperature in (1.0, 2.0):
      found[f'loss {dtype} T={temperature:g}'] = lambda d=dtype, t=temperature: loss_error(size, d, t)
  for body in BODIES[backend.name()]:
    for documents in (False, True):
      name = f'attention {body}{" with documents" if documents else ""}'
      found[name] = lambda b=body, d=documents: attention_error(size, b, d)
  return found | {
    'decoder': lambda: decoder_error(size),
    'equal models': lambda: equal_models(size),
    'one compile': lambda: one_compile(size),
    'alpha 0': lambda: alpha_zero(size),
    'not finite': lambda: not_finite(size),
  }


def loss_error(size: Size, dtype: str, temperature: float) -> dict:
  """Relative errors of the loss and its gradients, fused and dense, against float64."""
  n, d, v = size.checked
  keys = jax.random.split(jax.random.key(0), 5)
  x, xt = (jax.random.normal(k, (1, n, d), dtype) for k in keys[:2])
  w, wt = (jax.random.normal(k, (d, v), dtype) * (3 * d**-0.5) for k in keys[2:4])
  labels = jax.random.randint(keys[4], (1, n), 0, v)
  weights = jnp.full((1, n), 1 / n)
  loss = LossConfig(temperature=temperature, chunk_tokens=n // 4)

  # All arrays are arguments: the compiler would compute with constants beforehand.
  def fused(x, w, xt, wt, labels, weights):
    return fused_loss(x, w, labels, weights, ALPHA, ModelTargets(xt, wt), loss=loss)[0]

  def dense(x, w, xt, wt, labels, weights):
    product = lambda a, b: jnp.dot(a, b, preferred_element_type=jnp.float32)
    return dense_loss(product(x, w), labels, weights, ALPHA, product(xt, wt), loss=loss)[0]

  exact = reference(*(np.asarray(a, np.float64) for a in (x[0], w, xt[0], wt)), np.asarray(labels[0]), temperature)
  result = {}
  for name, f in (('fused', fused), ('dense', dense)):
    value, (dx, dw) = jax.jit(jax.value_and_grad(f, (0, 1)))(x, w, xt, wt, labels, weights)
    result[name] = {
      'loss': float(abs(float(value) - exact[0]) / exact[0]),
      'dX': relative_error(dx[0], exact[1]),
      'dW': relative_error(dw, exact[2]),
    }
  return result


def reference(x, w, xt, wt, labels, temperature: float):
  """The mixed loss and its gradients with respect to x and w, in float64."""
  n = len(x)
  s, t = x @ w, xt @ wt
  log_p, p = log_softmax(s)
  log_pt, pt = log_softmax(s / temperature)
  log_q, q = log_softmax(t / temperature)
  rows = np.arange(n)
  ce = -log_p[rows, labels].mean()
  kl = (q * (log_q - log_pt)).sum(-1).mean()
  p[rows, labels] -= 1
  dz = ((1 - ALPHA) * p + ALPHA * temperature * (pt - q)) / n
  return (1 - ALPHA) * ce + ALPHA * temperature**2 * kl, dz @ w.T, x.T @ dz


def log_softmax(z):
  z = z - z.max(-1, keepdims=True)
  log_p = z - np.log(np.exp(z).sum(-1, keepdims=True))
  return log_p, np.exp(log_p)


def relative_error(got, exact) -> float:
  """|got - exact| / |exact| over the whole array; NaN counts as 1."""
  error = np.linalg.norm(np.asarray(got, np.float64) - exact) / np.linalg.norm(exact)
  return float(error) if np.isfinite(error) else 1.0


def attention_error(size: Size, body: str, documents: bool) -> dict:
  """Relative errors of one attention body and its gradients against float64; padding and other documents masked."""
  b, t, h, g, k = size.attention
  rng = np.random.default_rng(0)
  draw = lambda heads: jnp.asarray(rng.normal(size=(b, t, heads, k)), jnp.bfloat16)
  q, key, value = draw(h), draw(g), draw(g)
  segments = np.ones((b, t), np.int32)
  if documents:
    segments += np.arange(t) >= rng.integers(1, t, (b, 1))
    segments[:, -t // 8 :] = 0
  real = (segments > 0)[..., None, None]
  cotangent = np.where(real, rng.normal(size=(b, t, h, k)), 0)

  def weighted(q, key, value):
    out = attention(q, key, value, jnp.asarray(segments) if documents else None, implementation=body)
    return jnp.sum(out.astype(jnp.float32) * cotangent), out

  gradients, out = jax.jit(jax.grad(weighted, (0, 1, 2), has_aux=True))(q, key, value)
  exact = attention_reference(*(np.asarray(x, np.float64) for x in (q, key, value)), segments, cotangent)
  got = [np.where(real, np.asarray(out, np.float64), 0), *gradients]
  return {
    name: relative_error(g, e * real if name == 'out' else e)
    for name, g, e in zip(('out', 'dQ', 'dK', 'dV'), got, exact, strict=True)
  }


def attention_reference(q, k, v, segments, cotangent):
  """Causal softmax attention inside documents, and its gradients; float64, [B, T, H, K]."""
  groups = q.shape[2] // k.shape[2]
  scale = q.shape[3] ** -0.5
  q, k, v, cotangent = (x.swapaxes(1, 2) for x in (q, k, v, cotangent))  # [B, H, T, K]
  k, v = (np.repeat(x, groups, axis=1) for x in (k, v))
  seen = np.tril(np.ones((q.shape[2],) * 2, bool)) & (segments[:, None, :, None] == segments[:, None, None, :])
  p = log_softmax(np.where(seen, q @ k.mT * scale, -np.inf))[1]
  dp = cotangent @ v.mT
  ds = p * (dp - (dp * p).sum(-1, keepdims=True)) * scale
  summed = lambda x: x.reshape(x.shape[0], -1, groups, *x.shape[2:]).sum(2)
  out = p @ v, ds @ k, summed(ds.mT @ q), summed(p.mT @ cotangent)
  return tuple(x.swapaxes(1, 2) for x in out)


def decoder_error(size: Size) -> dict:
  """Relative error of hidden states on this device against float32 on the host: as they are, and with int8 matrices."""
  config = checked_model(size)
  rows, tokens = (2, 32) if size.tiny else (2, 512)
  ids = np.random.default_rng(0).integers(0, config.vocab_size, (rows, tokens)).astype(np.int32)
  with jax.default_device(jax.devices('cpu')[0]):
    wide = build(dataclasses.replace(config, dtype='float32', attention='xla'))
    params = wide.init(jax.random.key(0))
    small = quantize(params, jnp.float32)
    forward = jax.jit(lambda p: wide.hidden(p, ids, None))
    exact = {'float32': forward(params), 'int8': forward(small)}
  host = lambda tree: jax.tree.map(np.asarray, tree)
  narrow = build(config)
  hidden = jax.jit(lambda p: narrow.hidden(p, ids, None))
  got, got_small = hidden(to_dtype(host(params), 'auto')), hidden(quantize(host(params), 'bfloat16'))
  exact = {name: np.asarray(x, np.float64) for name, x in exact.items()}
  return {
    'as they are': relative_error(got, exact['float32']),
    'int8 against int8 in float32': relative_error(got_small, exact['int8']),
    'int8 against float32': relative_error(got_small, exact['float32']),
  }


def checked_model(size: Size, name: str = 'tiny-30m') -> ModelConfig:
  if size.tiny:
    return named('tiny-0.1m', vocab_size=256)
  return named(name, vocab_size=32_000, scan_unroll=1)  # a loop compiles faster


def equal_models(size: Size) -> dict:
  """KL and its gradient where student and teacher are the same: exactly 0."""
  n, d, v = size.checked
  x = jax.random.normal(jax.random.key(0), (1, n, d), 'bfloat16')
  w = jax.random.normal(jax.random.key(1), (d, v), 'bfloat16') * d**-0.5
  labels, weights = jnp.zeros((1, n), jnp.int32), jnp.full((1, n), 1 / n)
  f = lambda x, w, xt, wt: fused_loss(x, w, labels, weights, 1.0, ModelTargets(xt, wt))[0]
  value, gradients = jax.jit(jax.value_and_grad(f, (0, 1)))(x, w, x, w)
  return {'kl': float(value), 'gradient': max(float(jnp.abs(g).max()) for g in gradients)}


def steppers(size: Size, alphas: list[float], teacher: bool = True) -> Stepper:
  student, source = build(checked_model(size, 'tiny-10m')), build(checked_model(size, 'tiny-1m'))
  return Stepper(student, source if teacher else None, alphas, make_mesh(MeshConfig()))


def one_compile(size: Size) -> dict:
  """Programs compiled for three calls of a cohort's step."""
  run = steppers(size, [0.2, 0.6])
  for _ in range(3):
    run()
  return {'programs': run.step._cache_size()}


def alpha_zero(size: Size) -> dict:
  """The greatest difference of parameters, relative to the leaf's greatest value, after five steps: alpha = 0 against no teacher."""
  distilled, alone = steppers(size, [0.0001]), steppers(size, [0.0], teacher=False)
  distilled.states = tuple(s._replace(alpha=jax.tree.map(jnp.zeros_like, s.alpha)) for s in distilled.states)
  for _ in range(5):
    distilled(), alone()
  pairs = zip(jax.tree.leaves(distilled.states[0].params), jax.tree.leaves(alone.states[0].params), strict=True)
  return {'difference': max(float(jnp.abs(a - b).max() / jnp.abs(b).max()) for a, b in pairs)}


def not_finite(size: Size) -> dict:
  """A teacher of NaN: the update is left out, and no weight of the student changes."""
  run = steppers(size, [0.4])
  before = jax.device_get(run.states[0].params)
  run.teacher = run.teacher._replace(params=jax.tree.map(lambda x: x * jnp.nan, run.teacher.params))
  metrics = run()[0]
  same = jax.tree.map(lambda a, b: bool((a == b).all()), before, jax.device_get(run.states[0].params))
  counted: dict[str, Any] = {'skipped': float(metrics['skipped'][0]), 'unchanged': all(jax.tree.leaves(same))}
  return counted
