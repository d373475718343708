"""docs/DEVICE.md from the results: what failed first, then errors, times, memory, and published figures of peers."""

import pathlib
from collections.abc import Iterator

from benchmarks.device.results import PARTS, read

PAGE = pathlib.Path(__file__).parents[2] / 'docs' / 'DEVICE.md'
GIB = 2**30
# Largest acceptable value of a number in the correctness part. bfloat16 has 8 bits of precision: a relative error of 2^-8 = .004 a value.
BARS = {
  'loss bfloat16': .01, 'loss float32': .002, 'attention': .01, 'decoder': .05, 'equal models': 0.0, 'one compile': 1, 'alpha 0': 1e-6,
}  # fmt: skip


def write(results: pathlib.Path) -> str:
  """Write the page; return its text."""
  rows = read(results)
  by_part = {part: [row for row in rows if row['part'] == part] for part in PARTS}
  text = TEXT.format(
    environment=next(
      (environment(row) for row in rows if 'environment' in row), 'It has not run on an accelerator yet.'
    ),
    failures='\n'.join(f'- {line}' for line in failures(by_part)) or '- none',
    correctness='\n'.join(correctness_rows(by_part['correctness'])),
    loss='\n'.join(loss_rows(by_part['loss'], by_part['liger'])),
    throughput='\n'.join(throughput_rows(by_part['throughput'])),
    main_job='\n'.join(main_job_lines(by_part['main_job'])) or 'Not run.',
  )
  PAGE.write_text(text)
  return text


def environment(row: dict) -> str:
  """Versions and hardware, and how the results came about if it was not one plain run."""
  return f'{row["environment"]}.' + (f' {row["note"]}' if 'note' in row else '')


def failures(by_part: dict[str, list[dict]]) -> Iterator[str]:
  """One line for each part that is missing, each case that raised, each number beyond its bar and each property that does not hold."""
  for part, rows in by_part.items():
    if not rows:
      yield f'`{part}`: not run'
    for row in rows:
      name = f'`{part}`, {row["case"]}'
      if 'error' in row:
        yield f'{name}: {row["error"]}' + (f' ({row["note"]})' if 'note' in row else '')
      if row.get('missing'):
        yield f'{name}: {", ".join(row["missing"])}'
      for key, value in row.items():
        if value is False:
          yield f'{name}: not {key}'
      bar = next((bar for start, bar in BARS.items() if row['case'].startswith(start)), None)
      if part == 'correctness' and bar is not None:
        for key, value in numbers(row):
          if value > bar:
            yield f'{name}: {key} is {value:.2g}, above {bar:g}'


def numbers(row: dict, prefix: str = '') -> Iterator[tuple[str, float]]:
  """The measured numbers of a row, nested ones by 'outer inner'."""
  for key, value in row.items():
    if isinstance(value, dict):
      yield from numbers(value, f'{prefix}{key} ')
    elif isinstance(value, int | float) and not isinstance(value, bool) and key != 'seconds':
      yield prefix + key, value


def correctness_rows(rows: list[dict]) -> Iterator[str]:
  for row in rows:
    if row['case'] in ('environment', 'process') or 'error' in row:
      continue
    shown = [f'{key} {value:.2g}' for key, value in numbers(row)]
    shown += [key for key, value in row.items() if value is True]
    yield f'| {row["case"]} | {", ".join(shown)} |'


def loss_rows(rows: list[dict], peers: list[dict]) -> Iterator[str]:
  for row in rows:
    if 'error' not in row:
      over = '{:.2f} [{:.2f}, {:.2f}]'
      yield (
        f'| kdjax, {row["case"]} | {row["milliseconds"]["fused"]:.1f} | {over.format(*row["fused / products"])} '
        f'| {over.format(*row["fused / dense"])} | {row["temporary bytes"]["fused"] / GIB:.1f} |'
      )
  if dense := next((row for row in rows if 'error' not in row), None):
    ratio = dense['milliseconds']['dense'] / dense['milliseconds']['products']
    yield f'| optax on whole logits, T=1 | {dense["milliseconds"]["dense"]:.1f} | {ratio:.2f} | 1 | {dense["temporary bytes"]["dense"] / GIB:.1f} |'
  names = {
    'cross entropy': 'Liger fused linear cross-entropy (no teacher)',
    'jsd beta=0': 'Liger fused linear JSD, beta = 0: forward KL (no cross-entropy)',
    'dense torch': 'PyTorch on whole logits, eager: cross-entropy and KL',
  }
  for row in peers:
    if row['case'] in names and 'error' not in row:
      yield f'| {names[row["case"]]} | {row["milliseconds"]:.1f} | | | {row["temporary bytes"] / GIB:.1f} |'


def throughput_rows(rows: list[dict]) -> Iterator[str]:
  for row in rows:
    if 'error' in row:
      continue
    teacher = f'{row["teacher"] / 1e9:.2f}B' if row['teacher'] else 'none'
    mfu = f'{row["mfu"]:.1%}' if row['mfu'] else 'unknown'
    yield (
      f'| {row["case"]} | {row["student"] / 1e9:.2f}B | {teacher} | {row["layers"]} | {row["rows"]} x {row["tokens"]:,} '
      f'| {row["milliseconds"]:,.0f} | {row["tokens a second"]:,.0f} | {row["tflops"]:.0f} | {mfu} '
      f'| {row["argument bytes"] / GIB:.1f} + {row["temporary bytes"] / GIB:.1f} |'
    )


def main_job_lines(rows: list[dict]) -> Iterator[str]:
  for row in rows:
    if 'error' not in row:
      yield f'`{row["command"]}` took {row["wall seconds"]:.0f} s, data and evaluation included. It printed:\n\n```\n{row["table"].strip()}\n```'


TEXT = """# On an accelerator

Measured by `python -m benchmarks.device` (results: `docs/results/device.jsonl`). {environment}

## Failed, or not measured

{failures}

## Correctness

Relative errors (norm of the difference over the norm) against float64 on the host; for `decoder` against float32. float32 products run as
TF32 on NVIDIA GPUs, which is JAX's default; for float32 accuracy set `JAX_DEFAULT_MATMUL_PRECISION=highest`.

| case | measured |
|---|---|
{correctness}

## The fused loss

Loss and gradients of one student from a teacher of the same width; 8,192 tokens, width 2,048, vocabulary 128,256, bfloat16. `products` are the four
matrix products that no implementation can avoid. Liger and PyTorch ran in a process of their own on the same device.

| implementation | ms | over the products | over optax on whole logits | temporary memory, GiB |
|---|---|---|---|---|
{loss}

## The whole step

AdamW with float32 parameters, bfloat16 computation, windows of 8,192 tokens without document masks, random tokens. FLOPs are the model's
(kdjax/models/flops.py): nothing is counted for rematerialisation. `alone` is the LM-only step, `distilled` has the teacher's forward pass in the step,
`two students` share it. Memory: arguments + temporaries, by the compiler.

| step | student | teacher | layers | batch | ms | tokens/s | TFLOP/s | MFU | memory, GiB |
|---|---|---|---|---|---|---|---|---|---|
{throughput}

Published figures of others, on other models and hardware, for orientation only:

| system | model | hardware | figure |
|---|---|---|---|
| MaxText | Llama 3.1 8B | v6e-256 | 45.5% MFU |
| torchtitan | Llama 3 8B, bf16 | H100 | 33 to 39% MFU |
| Megatron-Bridge | 8B, FP8 | H100 | 744 TFLOP/s per GPU |
| Liger, cross-entropy backward alone | | H200 | 695 to 768 TFLOP/s |

## The main job

{main_job}
"""
