"""docs/LOSS_ON_TPU.md: the fused loss by the TPU compiler's cost model, beside what a hand-written kernel could gain. Needs `pip install -e '.[tpu]'`.

    python -m benchmarks.loss_tpu

One chunk of tokens, value and gradient, compiled for one chip of each generation. Seconds are the compiler's estimates and the chips'
documented peaks; nothing is run.
"""

import dataclasses
import itertools
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from benchmarks import timing
from kdjax import cli
from kdjax.config import LossConfig
from kdjax.losses import ModelTargets, fused_loss
from kdjax.models import flops
from kdjax.programs import topology
from kdjax.runtime import backend

PAGE = pathlib.Path(__file__).parents[1] / 'docs' / 'LOSS_ON_TPU.md'
SLICES = ('v5e:2x2', 'v5p:2x2x1', 'v6e:2x2')
# Of the student's and the teacher's hidden states: 1.7B from 0.5B, 1.7B from 8B, 8B from 0.5B.
WIDTHS = ((2048, 1024), (2048, 4096), (4096, 1024))
TOKENS, VOCAB = 2048, 128_256


class Estimate(NamedTuple):
  products: float  # seconds of the four matrix products at the chip's peak
  traffic: float  # seconds of the bytes that the compiled program reads and writes
  compiler: float  # the compiler's own estimate, operation by operation
  kernel: float  # seconds of the products of a kernel that keeps no logits: it forms them twice


def main() -> None:
  jax.config.update('jax_platforms', 'cpu')
  rows, estimates = [], {}
  for name, (width, teachers) in itertools.product(SLICES, WIDTHS):
    slice_ = topology.parse_slice(name)
    e = estimates[name, width, teachers] = estimate(slice_, width, teachers)
    ms = ' | '.join(f'{1e3 * x:.1f}' for x in (e.products, e.traffic, e.compiler, e.kernel))
    rows.append(
      f'| {slice_.chip.name} | {width} | {teachers} | {ms} | {e.compiler / e.products:.2f} | {e.compiler / e.kernel:.2f} |'
    )
    print(rows[-1], flush=True)
  share, best = share_of_step(), estimates['v6e:2x2', *WIDTHS[0]]
  step = best.products / share - best.products + best.compiler
  PAGE.write_text(
    TEXT.format(
      tokens=f'{TOKENS:,}',
      vocab=f'{VOCAB:,}',
      environment=timing.environment(),
      rows='\n'.join(rows),
      share=share,
      gain=(best.compiler - best.kernel) / step,
    )
  )


def share_of_step() -> float:
  """The loss's part of the FLOPs of a step of the paper's 1.7B from 0.5B, what remat computes again included."""
  config = cli.load_config('configs/weak2strong.py:scale=paper')
  student, teacher = (
    dataclasses.replace(section.model, vocab_size=VOCAB) for section in (config.student, config.teacher)
  )
  length, head = config.data.seq_len, 2 * VOCAB * student.d_model
  again = flops.forward_flops(student, length) - head
  step = flops.training_flops(student, length) + again + flops.forward_flops(teacher, length)
  return (3 * head + 2 * VOCAB * teacher.d_model) / step


def estimate(slice_: topology.Slice, width: int, teachers: int) -> Estimate:
  device = topology.slice_devices(slice_)[0]
  on = SingleDeviceSharding(device)
  shape = lambda *sizes, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(sizes, dtype, sharding=on)

  def loss(hidden, head, teacher_hidden, teacher_head, labels, weights):
    targets = ModelTargets(teacher_hidden, teacher_head)
    one_chunk = LossConfig(chunk_tokens=TOKENS)  # the cost model counts the body of a loop once
    return fused_loss(hidden, head, labels, weights, 0.4, targets, loss=one_chunk, vocab_size=VOCAB)

  with backend.compiling_for('tpu'):
    gradient = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    compiled = gradient.lower(
      shape(1, TOKENS, width), shape(width, VOCAB), shape(1, TOKENS, teachers), shape(teachers, VOCAB),
      shape(1, TOKENS, dtype=jnp.int32), shape(1, TOKENS, dtype=jnp.float32),
    ).compile()  # fmt: skip
  cost = compiled.cost_analysis()
  peak = flops.peak_flops(device.device_kind)
  assert peak is not None and cost['optimal_seconds'] > 0, cost
  both, gradients = width + teachers, 2 * width
  product = 2 * TOKENS * VOCAB / peak
  return Estimate(
    products=product * (both + gradients),
    traffic=cost['bytes accessed'] / slice_.chip.hbm_bandwidth,
    compiler=cost['optimal_seconds'],
    kernel=product * (2 * both + gradients),
  )


TEXT = """# The loss on TPU, by the compiler's cost model

The loss is a scan in plain JAX (`kdjax/losses/fused.py`); there is no Pallas kernel beside it. These are the figures behind that, for one chunk of
{tokens} tokens and {vocab} words in bfloat16, value and gradient. Estimates of the TPU compiler and documented peaks, not measurements: no
TPU was at hand. Made by `python -m benchmarks.loss_tpu`: {environment}.

* **products**: the four matrix products (both models' logits, the gradients of the student's hidden states and head) at the chip's peak. No
  implementation can do with less.
* **traffic**: the bytes that the compiled program reads and writes in HBM, logits above all, at the documented bandwidth.
* **compiler**: its own estimate, the slower of the two operation by operation.
* **kernel**: the least that a kernel needs which keeps logits in on-chip memory. A row's normaliser is known only after all of its logits, so it
  must form them twice: six products in place of four, each at its peak, and no traffic at all.

| chip | student's width | teacher's width | products, ms | traffic, ms | compiler, ms | kernel, ms | compiler / products | most that a kernel could gain |
|---|---|---|---|---|---|---|---|---|
{rows}

Where the last column is below 1 a kernel loses whatever its quality. It is furthest above on v6e with a small teacher. There the loss is {share:.0%} of the
FLOPs of the step (1.7B from 0.5B at 8,192 tokens, remat full), and all of that gain would be {gain:.1%} of a step whose other products run at the
chip's peak, if the kernel's did too. The scan stays, until a TPU is at hand to time both.
"""


if __name__ == '__main__':
  main()
