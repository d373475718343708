"""Tokens a second of the data pipeline against what the laptop's distillation step eats, at sequence lengths 512 and 8192.

    python -m benchmarks.data [--rounds 9]

The pipeline reads about 16k tokens a step. The step is that of the laptop's student with its weak teacher at 1024 tokens; it is slower at
longer sequences, so the ratio at 8192 is a lower bound. Both are measured in turns in one process: median and 95% interval over the rounds.
"""

import argparse
import pathlib
import tempfile

import jax
import numpy as np

from benchmarks import timing
from benchmarks.step import ROWS, TOKENS, Stepper, models
from kdjax.config import MeshConfig
from kdjax.data.batches import BatchStream, Windows
from kdjax.data.store import TokenStore, write_store
from kdjax.data.tokenizer import Tokenizer
from kdjax.models import build
from kdjax.runtime.sharding import make_mesh

TOKENS_PER_STEP = 16_384


def make_store(folder: pathlib.Path, n_tokens: int) -> TokenStore:
  """Documents of random bytes, 100 to 3000 tokens each."""
  rng = np.random.default_rng(0)
  lengths = rng.integers(100, 3000, n_tokens // 1550)
  docs = ((f'{i:016x}', int(n), rng.integers(0, 256, n)) for i, n in enumerate(lengths))
  write_store(folder, docs, Tokenizer())
  return TokenStore.open(folder)


class Reader:
  """Reads `steps` batches ahead of nobody; each call the next ones."""

  def __init__(self, store: TokenStore, seq_len: int, steps: int, threads: int, prefetch: int):
    self.stream = BatchStream(Windows(store, seq_len), TOKENS_PER_STEP // seq_len, seed=0)
    self._steps, self._threads, self._prefetch, self._next = steps, threads, prefetch, 0

  def __call__(self):
    calls = [(step, 1) for step in range(self._next, self._next + self._steps)]
    self._next += self._steps
    for _ in self.stream.iterate(calls, 1, np.arange(self.stream.batch_size), self._threads, self._prefetch):
      pass


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--tokens', type=int, default=4_000_000, help='in the store')
  parser.add_argument('--steps', type=int, default=100, help='batches of one round')
  parser.add_argument('--rounds', type=int, default=9)
  parser.add_argument('--threads', type=int, default=2)
  parser.add_argument('--prefetch', type=int, default=4)
  args = parser.parse_args()
  print(timing.environment())
  mesh = make_mesh(MeshConfig())
  with tempfile.TemporaryDirectory() as folder, jax.set_mesh(mesh):
    store = make_store(pathlib.Path(folder) / 'store', args.tokens)
    student, teacher = (build(config) for config in models(2048)['smaller'])
    readers = {seq_len: Reader(store, seq_len, args.steps, args.threads, args.prefetch) for seq_len in (512, 8192)}
    times = timing.seconds(
      {'step': Stepper(student, teacher, [0.4], mesh), **{str(n): r for n, r in readers.items()}}, args.rounds
    )
  eaten = ROWS * TOKENS / times['step']
  print('step: {:,.0f} tokens/s [{:,.0f}, {:,.0f}]'.format(*timing.interval(eaten)))
  for seq_len in readers:
    read = args.steps * TOKENS_PER_STEP / times[str(seq_len)]
    print(f'T={seq_len}: {np.median(read) / 1e6:.2f}M tokens/s; {timing.ratio(read, eaten)} times what the step eats')


if __name__ == '__main__':
  main()
