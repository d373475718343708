"""docs/SCALING.md: the paper's cells compiled for real TPU slices, and weak scaling from 8 to 2,048 chips. Needs `pip install -e '.[tpu]'`, no TPU.

    python -m benchmarks.scaling [--only cells|weak] [--table]

Each program is compiled by `python -m kdjax.aot` in a process of its own, a minute or two each on two cores; its figures are kept in
docs/scaling/, and what is there is not compiled again. `--table` compiles nothing.
"""

import argparse
import json
import pathlib
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import jax

from benchmarks import timing
from kdjax.programs import hlo

DOCS = pathlib.Path(__file__).parents[1] / 'docs'
KEPT = DOCS / 'scaling'
CONFIG = 'configs/weak2strong.py:scale=paper'
SLICES = ('v4-128', 'v6e-64', 'v5p-64')
PAIRS = (('1.7b', '0.5b'), ('1.7b', '1.7b'), ('1.7b', '3.8b'), ('1.7b', '8b'), ('8b', '0.5b'))  # student, teacher
MICROBATCHES = (1, 2, 4)  # the fewest that fit
WEAK = (8, 16, 32, 64, 128, 256)  # chips of one v6e slice; then several slices of 256
WEAK_SLICES = (2, 4, 8)
ROWS_A_CHIP = 4
GIB = 2**30


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--only', choices=('cells', 'weak'))
  parser.add_argument('--table', action='store_true', help='write the page from what has been compiled')
  args = parser.parse_args()
  jax.config.update('jax_platforms', 'cpu')  # where versions are asked for; what compiles are processes of their own
  KEPT.mkdir(parents=True, exist_ok=True)
  if not args.table:
    for name, arguments in [*(cells() if args.only != 'weak' else []), *(weak() if args.only != 'cells' else [])]:
      compile_one(name, arguments)
  (DOCS / 'SCALING.md').write_text(page())


def cells() -> Iterator[tuple[str, list[str]]]:
  for student, teacher in PAIRS:
    for slice_ in SLICES:
      models = {'student': f'llama3-{student}', 'teacher': f'llama3-{teacher}'}
      yield f'{student}-from-{teacher}-{slice_}', [f'--topology={slice_}', *_models(models)]


def weak() -> Iterator[tuple[str, list[str]]]:
  for chips in WEAK:
    yield f'weak-{chips:04d}', [f'--topology=v6e-{chips}', f'--config.student.batch_size={ROWS_A_CHIP * chips}']
  for slices in WEAK_SLICES:
    chips = 256 * slices
    mesh = [f'--num-slices={slices}', f'--config.mesh.replica={slices}']
    rows = ROWS_A_CHIP * chips
    batches = [f'--config.{section}.batch_size={rows}' for section in ('student', 'teacher')]
    yield f'weak-{chips:04d}', ['--topology=v6e-256', *mesh, *batches]


def compile_one(name: str, arguments: list[str]) -> None:
  file = KEPT / f'{name}.json'
  if file.exists():
    return
  for microbatches in MICROBATCHES:
    command = [sys.executable, '-m', 'kdjax.aot', f'--config={CONFIG}', '--config.student.arms=distilled', *arguments]
    command += [f'--config.student.microbatches={microbatches}', f'--json={file.with_suffix(".tmp")}']
    done = subprocess.run(command, capture_output=True, text=True)
    reported = file.with_suffix('.tmp').exists()
    if not reported and 'do not fit' not in done.stderr:
      sys.exit(f'{" ".join(command)}\n{done.stderr}')
    print(f'{name}, {microbatches} microbatches: {"fits" if done.returncode == 0 else "does not fit"}', flush=True)
    if done.returncode == 0:
      break
  if file.with_suffix('.tmp').exists():
    known = json.loads(file.with_suffix('.tmp').read_text()) | {'environment': timing.environment()}
    known['collectives'] = _summed(known['collectives'])
    file.write_text(json.dumps(known, indent=1) + '\n')
    file.with_suffix('.tmp').unlink()


def page() -> str:
  found = {file.stem: json.loads(file.read_text()) for file in sorted(KEPT.glob('*.json'))}
  first = next(iter(found.values()), {'environment': ''})
  return PAGE.format(
    environment=first['environment'],
    cells='\n'.join(_cell_rows(found)),
    weak='\n'.join(_weak_rows(found)),
    rows=ROWS_A_CHIP,
  )


def _cell_rows(found: dict[str, Any]) -> Iterator[str]:
  for name, _ in cells():
    if name in found:
      r = found[name]
      student, teacher, slice_ = name.split('-from-')[0], name.split('-from-')[1].rsplit('-', 2)[0], r['accelerator']
      yield (
        f'| {student} | {teacher} | {slice_} | {r["chips"]} | {r["microbatches"]} | {r["bytes"] / GIB:.1f} of {r["limit"] / GIB:.1f} '
        f'| {r["memory"]["student weights"] / GIB + r["memory"]["optimizer"] / GIB:.2f} | {r["memory"]["teacher weights"] / GIB:.2f} '
        f'| {r["memory"]["temporaries"] / GIB:.1f} | {r["loss_bytes"] / GIB:.1f} | {sum(r["network"].values()) / GIB:.1f} '
        f'| {r["best_seconds"]:.2f} to {r["worst_seconds"]:.2f} | {r["mfu_best"]:.0%} to {r["mfu_worst"]:.0%} |'
      )


def _weak_rows(found: dict[str, Any]) -> Iterator[str]:
  for name, _ in weak():
    if name in found:
      r = found[name]
      across = sum(n for axes, n in r['network'].items() if axes == hlo.SLICES)
      mesh = ' x '.join(str(n) for n in r['mesh'].values())
      yield (
        f'| {r["chips"]:,} | {mesh} | {r["tokens"]:,} | {r["bytes"] / GIB:.2f} | {(sum(r["network"].values()) - across) / GIB:.2f} | {across / GIB:.2f} '
        f'| {r["best_seconds"]:.2f} to {r["worst_seconds"]:.2f} | {r["compile_seconds"]:.0f} |'
      )


def _models(models: dict[str, str]) -> list[str]:
  """Overrides that make the config's two models these."""
  from kdjax.config.sizes import named

  fields = ('d_model', 'n_layers', 'd_ff', 'n_heads', 'n_kv_heads', 'head_dim')
  return [
    f'--config.{section}.model.{field}={getattr(named(name), field)}'
    for section, name in models.items()
    for field in fields
  ]


def _summed(collectives: list[dict[str, Any]]) -> list[dict[str, Any]]:
  """Bytes and times of all collectives of one kind, part and set of axes."""
  groups: dict[tuple, dict[str, Any]] = {}
  for one in collectives:
    key = (one['part'], one['kind'], ' x '.join(one['axes']), one['loop'] > 0)
    group = groups.setdefault(
      key, dict(zip(('part', 'kind', 'axes', 'in_loop'), key, strict=True)) | {'times': 0, 'bytes': 0}
    )
    group['times'] += one['times']
    group['bytes'] += round(one['bytes'] * one['times'])
  return list(groups.values())


PAGE = """# Scaling, compiled

Nothing on this page was run on a TPU. Each line is the whole distillation step (student forward and backward, teacher forward, fused loss,
AdamW), compiled by the TPU compiler for a slice that was not there: `python -m benchmarks.scaling` makes this page, and
`python -m kdjax.aot` each line of it. {environment}.

Memory is the compiler's account of one chip. "Sent" is what one chip sends in a step, from the compiled program's collectives, loops counted as
often as they run. Seconds are a roofline: FLOPs (with what remat recomputes), HBM and network, each at the chip's documented peak; the first figure is
the slowest of them (all overlapped), the second their sum (nothing overlapped). A measurement would lie above the first.

## The paper's cells

8,192 tokens, batch 256 (2.1M tokens a step), float32 weights and moments, bfloat16 compute, remat full, splash attention, fsdp over the whole slice. The
300B-token run of the 1.7B student is the same program as its 50B-token run: only the number of steps differs.

| student | teacher | slice | chips | microbatches | GiB a chip | student and optimizer | teacher | temporaries | the loss alone | sent, GiB | s a step | MFU |
|---|---|---|---|---|---|---|---|---|---|---|---|---|
{cells}

## Weak scaling

The 1.7B student with the 0.5B teacher on v6e, {rows} rows of 8,192 tokens a chip; mesh is replica x fsdp x tensor. From 512 chips on several slices of 256, with
a replica of the weights on each: what crosses them is the gradients, once a step, as one chip hands them to its host.
What a chip sends within its slice differs by a third from size to size: by the size of a shard the compiler chooses between gathers, rings of permutes and
all-reduces, which send twice as much. Memory is flat from 64 chips on; with fewer, each holds more of the weights and the optimizer.

| chips | mesh | tokens a step | GiB a chip | sent within a slice, GiB | between slices, GiB | s a step | compiled in, s |
|---|---|---|---|---|---|---|---|
{weak}
"""


if __name__ == '__main__':
  main()
