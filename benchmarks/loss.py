"""Fused loss against the dense one and against the bare matrix products, value and gradient.

    python -m benchmarks.loss [--rounds 7] [--case 32k,128k] [--dtype float32,bfloat16] [--temperature 1,2] [--chunk N]

Prints, for each case, ratios measured side by side in one process: median and 95% interval over the rounds. `products` are the four
matrix products that no implementation can do without: teacher's logits, student's logits, dX, dW. Products over dense is the floor of
fused over dense on the machine at hand.
"""

import argparse
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import timing
from kdjax.config import LossConfig
from kdjax.losses import ModelTargets, fused_loss

CASES = {'32k': (2048, 512, 32768), '128k': (1024, 512, 128256), 'small': (512, 64, 2048)}


class Case(NamedTuple):
  """N tokens, width D of both models, V tokens of vocabulary; `chunk`: tokens a chunk, None: as the budget allows."""

  n: int
  d: int
  v: int
  dtype: Any
  temperature: float
  chunk: int | None


def optax_loss(x, w, xt, wt, labels, weights, alpha, temperature):
  """The textbook: whole logits, optax for the cross-entropy and the KL."""
  student = jnp.dot(x, w, preferred_element_type=jnp.float32)
  teacher = jnp.dot(xt, wt, preferred_element_type=jnp.float32)
  ce = optax.softmax_cross_entropy_with_integer_labels(student, labels)
  log_p, q = jax.nn.log_softmax(student / temperature), jax.nn.softmax(teacher / temperature)
  return jnp.sum(weights * ((1 - alpha) * ce + alpha * temperature**2 * optax.losses.kl_divergence(log_p, q)))


def compare(case: Case, rounds: int) -> dict[str, Any]:
  """Ratios of time, with their intervals, and of temporary memory: the fused loss, the dense one, and their four products."""
  n, d, v, dtype, temperature, chunk = case
  keys = jax.random.split(jax.random.key(0), 6)
  x, xt = (jax.random.normal(k, (1, n, d), dtype) for k in keys[:2])
  w, wt = (jax.random.normal(k, (d, v), dtype) * d**-0.5 for k in keys[2:4])
  labels = jax.random.randint(keys[4], (1, n), 0, v)
  weights = jnp.full((1, n), 1 / n)
  dz = jax.random.normal(keys[5], (n, v), dtype)
  loss = LossConfig(temperature=temperature)

  # All arrays are arguments: the compiler would compute with constants beforehand.
  def fused(x, w, xt, wt, labels, weights):
    return fused_loss(x, w, labels, weights, 0.4, ModelTargets(xt, wt), loss=loss, chunk=chunk)

  def lean(x, w, xt, wt, labels, weights):
    return fused_loss(x, w, labels, weights, 0.4, ModelTargets(xt, wt), loss=loss, chunk=chunk, diagnostics=False)[0]

  def dense(x, w, xt, wt, labels, weights):
    return optax_loss(x[0], w, xt[0], wt, labels[0], weights[0], 0.4, temperature)

  f32 = {'preferred_element_type': jnp.float32}
  arguments = x, w, xt, wt, labels, weights
  compiled = {
    'fused': jax.jit(jax.value_and_grad(fused, (0, 1), has_aux=True)).lower(*arguments).compile(),
    'lean': jax.jit(jax.value_and_grad(lean, (0, 1))).lower(*arguments).compile(),
    'dense': jax.jit(jax.value_and_grad(dense, (0, 1))).lower(*arguments).compile(),
  }
  logits, hidden, head = (
    jax.jit(lambda x, w: jnp.dot(x[0], w, **f32)),
    jax.jit(lambda dz, w: jnp.dot(dz, w.T, **f32)),
    jax.jit(lambda x, dz: jnp.dot(x[0].T, dz, **f32)),
  )
  runs = {name: (lambda f=f: f(*arguments)) for name, f in compiled.items()}
  runs |= {
    'student logits': lambda: logits(x, w),
    'teacher logits': lambda: logits(xt, wt),
    'dX': lambda: hidden(dz, w),
    'dW': lambda: head(x, dz),
  }
  times = timing.seconds(runs, rounds)
  products = times['student logits'] + times['teacher logits'] + times['dX'] + times['dW']
  memory = {name: f.memory_analysis().temp_size_in_bytes for name, f in compiled.items()}
  return {
    'n': n,
    'd': d,
    'v': v,
    'fused / products': timing.interval(times['fused'] / products),
    'lean / products': timing.interval(times['lean'] / products),
    'fused / dense': timing.interval(times['fused'] / times['dense']),
    'products / dense': timing.interval(products / times['dense']),
    'milliseconds': {name: 1e3 * float(np.median(t)) for name, t in (times | {'products': products}).items()},
    'products tflops': 8 * n * d * v / float(np.median(products)) / 1e12,
    'temporary bytes': memory,
  }


def row(name: str, case: Case, rounds: int) -> str:
  found = compare(case, rounds)
  ratios = ('fused / products', 'lean / products', 'fused / dense', 'products / dense')
  shown = ' | '.join(timing.show(found[ratio]) for ratio in ratios)
  fused, dense = (found['temporary bytes'][which] for which in ('fused', 'dense'))
  return (
    f'| {name} N={case.n} D={case.d} V={case.v} | {jnp.dtype(case.dtype).name} | {case.temperature:g} | {shown} '
    f'| {fused / 2**20:.0f} / {dense / 2**20:.0f} MiB = 1/{dense / fused:.1f} |'
  )


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--rounds', type=int, default=7)
  parser.add_argument('--case', default='32k,128k')
  parser.add_argument('--dtype', default='float32,bfloat16')
  parser.add_argument('--temperature', default='1,2')
  parser.add_argument('--chunk', type=int, default=None)
  args = parser.parse_args()
  print(timing.environment())
  print(
    '| case | dtype | T | fused / products | without diagnostics / products | fused / optax dense | products / optax dense | temporary memory, fused / dense |'
  )
  print('|---|---|---|---|---|---|---|---|')
  for case in args.case.split(','):
    for dtype in args.dtype.split(','):
      for temperature in args.temperature.split(','):
        print(row(case, Case(*CASES[case], jnp.dtype(dtype), float(temperature), args.chunk), args.rounds), flush=True)


if __name__ == '__main__':
  main()
