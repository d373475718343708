"""Tokens a second of the data pipeline, at sequence lengths 512 and 8192 with about 16k tokens a step.

python -m benchmarks.data
python -m benchmarks.data --step-tokens-per-second=250000   # what the training step consumes: prints the headroom too
"""

import argparse
import importlib.metadata
import os
import pathlib
import platform
import tempfile
import time

import numpy as np
import scipy.stats

from kdjax.data.batches import BatchStream, Windows
from kdjax.data.store import TokenStore, write_store
from kdjax.data.tokenizer import Tokenizer

TOKENS_PER_STEP = 16_384


def make_store(folder: pathlib.Path, n_tokens: int) -> TokenStore:
  """Documents of random bytes, 100 to 3000 tokens each."""
  rng = np.random.default_rng(0)
  lengths = rng.integers(100, 3000, n_tokens // 1550)
  docs = ((f'{i:016x}', int(n), rng.integers(0, 256, n)) for i, n in enumerate(lengths))
  write_store(folder, docs, Tokenizer())
  return TokenStore.open(folder)


def tokens_per_second(stream: BatchStream, steps: int, threads: int, prefetch: int, first: int) -> float:
  rows = np.arange(stream.batch_size)
  calls = [(step, 1) for step in range(first, first + steps)]
  start = time.perf_counter()
  read = sum(item['tokens'].size for item in stream.iterate(calls, 1, rows, threads, prefetch))
  return read / (time.perf_counter() - start)


def interval(values: list[float]) -> tuple[float, float, float]:
  """Median and its distribution-free interval of at least 95%, between two order statistics."""
  ordered = np.sort(values)
  low = int(scipy.stats.binom.ppf(0.025, len(ordered), 0.5)) - 1
  return float(np.median(ordered)), float(ordered[low]), float(ordered[-1 - low])


def environment() -> str:
  versions = ', '.join(
    f'{name} {importlib.metadata.version(name)}' for name in ('grain', 'array_record', 'numpy', 'jax')
  )
  model = platform.processor() or platform.machine()
  if os.path.exists('/proc/cpuinfo'):
    lines = pathlib.Path('/proc/cpuinfo').read_text().splitlines()
    model = next((line.split(':')[1].strip() for line in lines if line.startswith('model name')), model)
  return f'{versions}, python {platform.python_version()}; {os.cpu_count()} cores, {model}'


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--step-tokens-per-second', type=float, help='what one process of the training step consumes')
  parser.add_argument('--tokens', type=int, default=4_000_000, help='in the store')
  parser.add_argument('--steps', type=int, default=100, help='of one repeat')
  parser.add_argument('--repeats', type=int, default=9)
  parser.add_argument('--threads', type=int, default=2)
  parser.add_argument('--prefetch', type=int, default=4)
  options = parser.parse_args()
  if options.repeats < 7:
    parser.error('--repeats must be at least 7')
  print(environment())
  with tempfile.TemporaryDirectory() as folder:
    store = make_store(pathlib.Path(folder) / 'store', options.tokens)
    for seq_len in (512, 8192):
      stream = BatchStream(Windows(store, seq_len), TOKENS_PER_STEP // seq_len, seed=0)
      # The first is a warm-up; no repeat reads the steps of another.
      speeds = [
        tokens_per_second(stream, options.steps, options.threads, options.prefetch, repeat * options.steps)
        for repeat in range(options.repeats + 1)
      ][1:]
      middle, low, high = interval(speeds)
      line = f'T={seq_len} B={stream.batch_size}: {middle / 1e6:.2f}M tokens/s [{low / 1e6:.2f}, {high / 1e6:.2f}]'
      if options.step_tokens_per_second:
        line += f', {middle / options.step_tokens_per_second:.1f}x of the step'
      print(f'{line} ({options.repeats} repeats of {options.steps} steps)')


if __name__ == '__main__':
  main()
