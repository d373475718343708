"""Interleaved timing: every variant once a round, ratios within a round, so that a noisy machine disturbs both sides alike."""

import os
import platform
import time
from collections.abc import Callable
from importlib import metadata

import jax
import numpy as np
import scipy.stats


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


def interval(values: np.ndarray) -> tuple[float, float, float]:
  """Median and its distribution-free interval of at least 95% (order statistics; from 6 values on)."""
  ordered = np.sort(values)
  low = max(0, int(scipy.stats.binom.ppf(0.025, len(ordered), 0.5)) - 1)
  return float(np.median(ordered)), float(ordered[low]), float(ordered[-1 - low])


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> str:
  """Median of the paired ratios and its interval."""
  return show(interval(numerator / denominator))


def show(found: tuple[float, float, float]) -> str:
  """A median and its interval as text."""
  return '{:.3f} [{:.3f}, {:.3f}]'.format(*found)


def environment() -> str:
  """Versions and hardware, one line."""
  model = platform.processor() or platform.machine()
  if os.path.exists('/proc/cpuinfo'):
    with open('/proc/cpuinfo') as f:
      model = next((line.split(':')[1].strip() for line in f if line.startswith('model name')), model)
  device = jax.devices()[0]
  versions = ', '.join(f'{name} {metadata.version(name)}' for name in ('jax', 'flax', 'optax', 'grain', 'array_record'))
  return (
    f'{versions}, python {platform.python_version()}; '
    f'{len(jax.devices())} x {device.device_kind}; {os.cpu_count()} cores, {model}'
  )
