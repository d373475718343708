"""Fused loss against the dense one and against the bare matrix products, value and gradient.

    python -m benchmarks.loss [--rounds 7] [--case 32k,128k] [--dtype float32,bfloat16] [--temperature 1,2] [--chunk N]

Prints, for each case, ratios measured side by side in one process: median and 95% interval over the rounds. `products` are the four
matrix products that no implementation can do without: teacher's logits, student's logits, dX, dW. Products over dense is the floor of
fused over dense on the machine at hand.
"""

import argparse

import jax
import jax.numpy as jnp
import optax

from benchmarks import timing
from kdjax.config import LossConfig
from kdjax.losses import ModelTargets, fused_loss

CASES = {'32k': (2048, 512, 32768), '128k': (1024, 512, 128256), 'small': (512, 64, 2048)}


def optax_loss(x, w, xt, wt, labels, weights, alpha, temperature):
  """The textbook: whole logits, optax for the cross-entropy and the KL."""
  student = jnp.dot(x, w, preferred_element_type=jnp.float32)
  teacher = jnp.dot(xt, wt, preferred_element_type=jnp.float32)
  ce = optax.softmax_cross_entropy_with_integer_labels(student, labels)
  log_p, q = jax.nn.log_softmax(student / temperature), jax.nn.softmax(teacher / temperature)
  return jnp.sum(weights * ((1 - alpha) * ce + alpha * temperature**2 * optax.losses.kl_divergence(log_p, q)))


def measure(case: str, dtype, temperature: float, rounds: int, chunk: int | None) -> str:
  n, d, v = CASES[case]
  keys = jax.random.split(jax.random.key(0), 6)
  x, xt = (jax.random.normal(k, (1, n, d), dtype) for k in keys[:2])
  w, wt = (jax.random.normal(k, (d, v), dtype) * d**-0.5 for k in keys[2:4])
  labels = jax.random.randint(keys[4], (1, n), 0, v)
  weights = jnp.full((1, n), 1 / n)
  dz = jax.random.normal(keys[5], (n, v), dtype)
  loss = LossConfig(temperature=temperature)

  def fused(x, w):
    return fused_loss(x, w, labels, weights, 0.4, ModelTargets(xt, wt), loss=loss, chunk=chunk)

  def lean(x, w):
    return fused_loss(x, w, labels, weights, 0.4, ModelTargets(xt, wt), loss=loss, chunk=chunk, diagnostics=False)[0]

  def dense(x, w):
    return optax_loss(x[0], w, xt[0], wt, labels[0], weights[0], 0.4, temperature)

  f32 = {'preferred_element_type': jnp.float32}
  compiled = {
    'fused': jax.jit(jax.value_and_grad(fused, (0, 1), has_aux=True)).lower(x, w).compile(),
    'lean': jax.jit(jax.value_and_grad(lean, (0, 1))).lower(x, w).compile(),
    'dense': jax.jit(jax.value_and_grad(dense, (0, 1))).lower(x, w).compile(),
  }
  logits, hidden, head = (
    jax.jit(lambda x, w: jnp.dot(x[0], w, **f32)),
    jax.jit(lambda dz, w: jnp.dot(dz, w.T, **f32)),
    jax.jit(lambda x, dz: jnp.dot(x[0].T, dz, **f32)),
  )
  runs = {name: (lambda f=f: f(x, w)) for name, f in compiled.items()}
  runs |= {
    'student logits': lambda: logits(x, w),
    'teacher logits': lambda: logits(xt, wt),
    'dX': lambda: hidden(dz, w),
    'dW': lambda: head(x, dz),
  }
  times = timing.seconds(runs, rounds)
  products = times['student logits'] + times['teacher logits'] + times['dX'] + times['dW']
  memory = {name: f.memory_analysis().temp_size_in_bytes for name, f in compiled.items()}
  return (
    f'| {case} N={n} D={d} V={v} | {jnp.dtype(dtype).name} | {temperature:g} | {timing.ratio(times["fused"], products)} '
    f'| {timing.ratio(times["lean"], products)} | {timing.ratio(times["fused"], times["dense"])} '
    f'| {timing.ratio(products, times["dense"])} '
    f'| {memory["fused"] / 2**20:.0f} / {memory["dense"] / 2**20:.0f} MiB = 1/{memory["dense"] / memory["fused"]:.1f} |'
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
        print(measure(case, jnp.dtype(dtype), float(temperature), args.rounds, args.chunk), flush=True)


if __name__ == '__main__':
  main()
