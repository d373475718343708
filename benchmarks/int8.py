"""docs/INT8.md: what a teacher with its matrices in int8 costs in loss: of the teacher itself, and of the students that learn from it.

    python -m benchmarks.int8 [--seeds 2] [--configs weak2strong strong2weak]

The laptop's models: each teacher is trained once, its student once for each dtype of the teacher and each seed, on the same batches.
Minutes on two cores; what is done is not done again.
"""

import argparse
import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from kdjax import cli, train
from kdjax.analysis import table
from kdjax.config import Config
from kdjax.data.batches import Windows
from kdjax.data.corpus import prepare
from kdjax.losses import ModelTargets, fused_loss
from kdjax.programs import compiling, topology
from kdjax.programs.compiling import GIB
from kdjax.runtime import sharding
from kdjax.scoring import job as jobs
from kdjax.teachers import frozen
from kdjax.trainer import experiments

PAGE = pathlib.Path(__file__).parents[1] / 'docs' / 'INT8.md'
DTYPES = ('float32', 'bfloat16', 'int8')
FIELDS = {'student.arms': 'distilled'}
SLICE = 'v6e-16'


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--seeds', type=int, default=2)
  parser.add_argument('--configs', nargs='+', default=['weak2strong', 'strong2weak'])
  args = parser.parse_args()
  of_teachers, of_students = [], []
  for name in args.configs:
    changed = [
      cli.load_config(f'configs/{name}.py', FIELDS | {'student.seed': str(43 + seed)}) for seed in range(args.seeds)
    ]
    of_students += student_rows(name, changed)
    of_teachers += teacher_rows(name, changed[0])
  PAGE.write_text(
    TEXT.format(
      environment=timing.environment(),
      seeds=args.seeds,
      teachers='\n'.join(of_teachers),
      students='\n'.join(of_students),
      slice=SLICE,
      compiled='\n'.join(slice_rows()),
    )
  )
  print(PAGE.read_text())


def slice_rows() -> list[str]:
  """The whole step of a 1.7B student of an 8B teacher, compiled for a slice that is not here."""
  rows = []
  slice_ = topology.parse_slice(SLICE)
  paper = cli.load_config('configs/strong2weak.py:scale=paper', FIELDS | {'student.batch_size': '64'})
  for dtype in DTYPES[1:]:
    r = compiling.compile_step(with_dtype(paper, dtype), slice_)
    gathered = sum(c.total for c in r.collectives if compiling.part(c) == 'teacher')
    rows.append(
      f'| {dtype} | {r.memory["teacher weights"] / GIB:.2f} | {r.bytes / GIB:.1f} of {r.limit / GIB:.1f} | {gathered / GIB:.1f} '
      f'| {sum(r.network().values()) / GIB:.1f} |'
    )
  return rows


def with_dtype(config: Config, dtype: str) -> Config:
  return dataclasses.replace(config, teacher=dataclasses.replace(config.teacher, dtype=dtype))


def student_rows(name: str, configs: list[Config]) -> list[str]:
  """Bits per byte of the students in domain, and their differences from those of the float32 teacher, paired by seed."""
  found: dict[str, dict[str, list[float]]] = {}
  for dtype in DTYPES:
    for config in configs:
      cells = table.load_cells(jobs.find_job(train.run(with_dtype(config, dtype))))['distilled']
      for set_name, cell in cells.items():
        found.setdefault(set_name, {}).setdefault(dtype, []).append(cell.bits())
  rows = []
  for set_name, values in found.items():
    base = np.asarray(values['float32'])
    shown = [f'{np.mean(base):.4f}']
    for dtype in DTYPES[1:]:
      shown.append(' '.join(f'{x:+.5f}' for x in np.asarray(values[dtype]) - base))
    rows.append(f'| {name} | {set_name} | {" | ".join(shown)} | {np.ptp(base):.4f} |')
  return rows


def teacher_rows(name: str, config: Config) -> list[str]:
  """The teacher's own CE on the validation split, and its KL from the float32 one, nats a token."""
  mesh = sharding.make_mesh(config.mesh)
  rows = []
  with jax.set_mesh(mesh):
    corpus = prepare(config.data, config.eval, config.runs)
    folder = experiments.teacher_folder(config, corpus)
    assert folder is not None
    windows = Windows(corpus.validation, config.data.seq_len, (0.0, 1.0), 0, config.data.mask_documents)
    picked = [windows.window(i) for i in range(min(256, len(windows)))]
    tokens, labels, segments = (np.stack([w[key] for w in picked]) for key in ('tokens', 'labels', 'segment_ids'))
    model, exact, _, _ = frozen.load_teacher(folder, 'float32', mesh, like=config.teacher.model)
    targets = ModelTargets(model.hidden(exact, tokens, segments), model.head(exact))
    weights = (labels >= 0) / np.float32((labels >= 0).sum())
    size = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree['blocks']))
    for dtype in DTYPES:
      params = frozen.to_dtype(exact, dtype)
      hidden, head = model.hidden(params, tokens, segments), model.head(params)
      _, sums = jax.jit(
        lambda h, w: fused_loss(h, w, labels, weights, 0.5, targets, vocab_size=model.config.vocab_size)
      )(hidden, head.astype(jnp.float32))
      rows.append(
        f'| {name} | {model.n_params / 1e6:.2g}M | {dtype} | {size(params) / size(exact):.2f} | {float(sums["ce"]):.4f} '
        f'| {float(sums["kd"]):.2e} | {float(sums["agreement"]):.2%} |'
      )
  return rows


TEXT = """# A teacher in int8

`--config.teacher.dtype=int8` rounds the matrices of the teacher's blocks to int8 with a scale for each output (`kdjax/models/quantized.py`);
embedding, head and norms stay as they are. On a mesh the int8 is what is gathered. Made by `python -m benchmarks.int8`: {environment}.

## The teacher itself

On windows of the validation split; KL from the float32 teacher and CE in nats a token, agreement of the two most likely tokens.

| config | teacher | dtype | bytes of its blocks | CE | KL | agreement |
|---|---|---|---|---|---|---|
{teachers}

## Its students

Bits per byte of the distilled student in domain and out; differences of each seed ({seeds}) from the same student of the float32 teacher, on the same
batches from the same weights; and, to compare, how far the seeds lie apart.

| config | set | float32 | bfloat16, difference | int8, difference | range of the seeds |
|---|---|---|---|---|---|
{students}

## On a slice

A 1.7B student of an 8B teacher, 64 windows of 8,192 tokens, compiled for {slice} (nothing was run): what one chip holds of the teacher and in all, and
what it sends in a step for the teacher and in all, in GiB.

| teacher | its weights | in all | sent for the teacher | sent in all |
|---|---|---|---|---|
{compiled}
"""


if __name__ == '__main__':
  main()
