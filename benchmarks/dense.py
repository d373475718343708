"""Compare the dense loss with optax on the same full logits, without truncation: value, and value with gradient.

    python -m benchmarks.dense [--rounds 15] [--vocab 2048,32768] [--temperature 1,2]

Prints ratios measured side by side in one process: median and 95% interval over the rounds. `with sums` also returns the entropies and
the top-1 agreement, which optax's side does not compute.
"""

import argparse

import jax
import jax.numpy as jnp
import optax

from benchmarks import timing
from kdjax.config import LossConfig
from kdjax.losses import dense_loss

B, T = 2, 128


def optax_loss(student_BxTxV, labels_BxT, weights_BxT, alpha, teacher_BxTxV, temperature):
  """Compute the textbook loss: optax for the cross-entropy and for the KL."""
  ce_BxT = optax.softmax_cross_entropy_with_integer_labels(student_BxTxV, labels_BxT)
  log_p, log_q = (jax.nn.log_softmax(x / temperature) for x in (student_BxTxV, teacher_BxTxV))
  kl_BxT = optax.losses.kl_divergence_with_log_targets(log_p, log_q)
  return jnp.sum(weights_BxT * ((1 - alpha) * ce_BxT + alpha * temperature**2 * kl_BxT))


def measure(vocab_size: int, temperature: float, rounds: int) -> str:
  keys = jax.random.split(jax.random.key(0), 3)
  student, teacher = (2 * jax.random.normal(key, (B, T, vocab_size)) for key in keys[:2])
  labels = jax.random.randint(keys[2], (B, T), 0, vocab_size)
  weights, loss = jnp.full((B, T), 1 / (B * T)), LossConfig(temperature=temperature)
  textbook = lambda s, t: optax_loss(s, labels, weights, 0.4, t, temperature)
  with_sums = lambda s, t: dense_loss(s, labels, weights, 0.4, t, loss=loss)
  variants = {
    'optax': jax.jit(textbook),
    'dense': jax.jit(lambda s, t: with_sums(s, t)[0]),
    'optax gradient': jax.jit(jax.value_and_grad(textbook)),
    'dense gradient': jax.jit(jax.value_and_grad(lambda s, t: with_sums(s, t)[0])),
    'dense gradient with sums': jax.jit(jax.value_and_grad(with_sums, has_aux=True)),
  }
  times = timing.seconds({name: (lambda f=f: f(student, teacher)) for name, f in variants.items()}, rounds)
  ratios = [
    timing.ratio(times['dense'], times['optax']),
    timing.ratio(times['dense gradient'], times['optax gradient']),
    timing.ratio(times['dense gradient with sums'], times['optax gradient']),
  ]
  return f'| {vocab_size} | {temperature:g} | {" | ".join(ratios)} |'


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--rounds', type=int, default=15)
  parser.add_argument('--vocab', default='2048,32768')
  parser.add_argument('--temperature', default='1,2')
  args = parser.parse_args()
  print(timing.environment())
  print('| V | T | value, dense / optax | value and gradient, dense / optax | the same with sums |')
  print('|---|---|---|---|---|')
  for vocab_size in args.vocab.split(','):
    for temperature in args.temperature.split(','):
      print(measure(int(vocab_size), float(temperature), args.rounds), flush=True)


if __name__ == '__main__':
  main()
