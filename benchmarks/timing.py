"""Interleaved timing: every variant once a round, ratios within a round, so that a noisy machine disturbs both sides alike."""

import os
import platform
import time
from collections.abc import Callable

import jax
import numpy as np


def seconds(variants: dict[str, Callable[[], object]], rounds: int) -> dict[str, np.ndarray]:
  """Wall seconds [rounds] of each variant, after one warm-up call each."""
  for run in variants.values():
    jax.block_until_ready(run())
  times: dict[str, list[float]] = {name: [] for name in variants}
  for _ in range(rounds):
    for name, run in variants.items():
      start = time.perf_counter()
      jax.block_until_ready(run())
      times[name].append(time.perf_counter() - start)
  return {name: np.asarray(t) for name, t in times.items()}


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> str:
  """Median of the paired ratios and its distribution-free 95% interval (order statistics of the rounds)."""
  ratios = np.sort(numerator / denominator)
  n = len(ratios)
  low = max(0, int(np.floor(n / 2 - 0.98 * np.sqrt(n))))
  return f'{np.median(ratios):.3f} [{ratios[low]:.3f}, {ratios[n - 1 - low]:.3f}]'


def environment() -> str:
  """Versions and hardware, one line."""
  import flax
  import optax

  model = platform.processor() or platform.machine()
  if os.path.exists('/proc/cpuinfo'):
    with open('/proc/cpuinfo') as f:
      model = next((line.split(':')[1].strip() for line in f if line.startswith('model name')), model)
  device = jax.devices()[0]
  return (
    f'jax {jax.__version__}, flax {flax.__version__}, optax {optax.__version__}, python {platform.python_version()}; '
    f'{len(jax.devices())} x {device.device_kind}; {os.cpu_count()} cores, {model}'
  )
