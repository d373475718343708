"""Faults that damage files: flipped bits, truncation, copied and missing folders, files emptied by a crash."""

import pathlib
import random
import shutil
from typing import Any

import numpy as np
import orbax.checkpoint as ocp

from benchmarks.faults.case import ARMS, Case, fault


def damage_file(path: pathlib.Path, rng: random.Random) -> str:
  data = bytearray(path.read_bytes())
  how = rng.choice(['bit', 'two bits', 'sign bits', 'blocks swapped', 'truncated', 'emptied', 'removed', 'zeros'])
  if not data and how != 'removed':
    how = 'removed'
  if how in ('bit', 'two bits', 'sign bits'):
    bit = 7 if how == 'sign bits' else rng.randrange(8)
    for _ in range(1 if how == 'bit' else 2):
      data[rng.randrange(len(data))] ^= 1 << bit
  elif how == 'blocks swapped' and len(data) >= 16:
    size = max(1, len(data) // 8)
    i, j = rng.sample(range(len(data) // size), 2)
    a, b = (slice(k * size, (k + 1) * size) for k in (i, j))
    data[a], data[b] = data[b], data[a]
  elif how == 'truncated':
    del data[rng.randrange(len(data)) :]
  elif how == 'emptied':
    data.clear()
  elif how == 'zeros':
    start = rng.randrange(len(data))
    data[start : start + 64] = bytes(len(data[start : start + 64]))
  path.unlink()
  if how != 'removed':
    path.write_bytes(bytes(data))
  return how


@fault(2)
def store_damaged(case: Case) -> str:
  case.half()
  shutil.copytree(case.base.home / 'stores', case.folder / 'stores')
  case.config = case.base.write_config(case.folder, case.folder / 'stores')
  for _ in range(case.rng.randint(1, 2)):
    path = case.rng.choice(sorted(p for p in (case.folder / 'stores').rglob('*') if p.is_file()))
    case.detail += f'{path.relative_to(case.folder / "stores")}: {damage_file(path, case.rng)}; '
  return case.finish()


@fault(3)
def checkpoint_damaged(case: Case) -> str:
  case.half()
  for _ in range(case.rng.randint(1, 3)):
    path = case.rng.choice(sorted(p for p in case.run.glob('students/*/checkpoints/*/**/*') if p.is_file()))
    case.detail += f'{path.relative_to(case.run)}: {damage_file(path, case.rng)}; '
  return case.finish(may_stop=True)


@fault(3)
def weights_damaged(case: Case) -> str:
  """Sound files with other numbers: what a faulty memory writes."""
  case.half()
  student = case.run / 'students' / case.rng.choice(ARMS)
  newest = max((p for p in (student / 'checkpoints').iterdir() if p.name.isdigit()), key=lambda p: int(p.name))
  reader = ocp.StandardCheckpointer()
  item = case.rng.choice(['params', 'optimizer'])
  tree = reader.restore(newest / item)
  leaves = ocp.tree.to_flat_dict(tree)
  name = case.rng.choice(sorted(key for key, leaf in leaves.items() if np.size(leaf) > 8))
  x = np.array(leaves[name])
  how = case.rng.choice(['negated', 'two signs', 'rows swapped', 'permuted', 'zeroed block', 'rounded'])
  generator = np.random.default_rng(case.rng.randrange(2**32))
  before, flat = x.tobytes(), x.reshape(-1)
  if how == 'negated':
    x = -x
  elif how == 'two signs':
    at = generator.choice(flat.size, 2, replace=False)
    flat[at] = -flat[at]
  elif how == 'rows swapped':
    i, j = generator.choice(len(x), 2, replace=False) if len(x) > 1 else (0, 0)
    x[[i, j]] = x[[j, i]]
  elif how == 'permuted':
    flat[:] = generator.permutation(flat)
  elif how == 'zeroed block':
    flat[: flat.size // 4] = 0
  else:
    x = np.asarray(np.asarray(x, np.float16), x.dtype)
  case.detail = f'{student.name}/{newest.name}/{item}/{"/".join(map(str, name))}: {how}'
  if x.tobytes() == before:
    case.detail += ' (no change)'
  shutil.rmtree(newest / item)
  leaves[name] = x
  with ocp.StandardCheckpointer() as writer:
    writer.save(newest / item, _nested(leaves))
  return case.finish(may_stop=True)


def _nested(leaves: dict[tuple[str, ...], Any]) -> dict[str, Any]:
  tree: dict[str, Any] = {}
  for path, leaf in leaves.items():
    node = tree
    for key in path[:-1]:
      node = node.setdefault(key, {})
    node[path[-1]] = leaf
  return tree


@fault(2)
def checkpoint_copied(case: Case) -> str:
  """A step's folder under another step's name."""
  case.half()
  folder = case.run / 'students' / case.rng.choice(ARMS) / 'checkpoints'
  source = case.rng.choice(sorted(p for p in folder.iterdir() if p.name.isdigit()))
  target = folder / str(
    case.rng.choice([step for step in (1, 3, 5, 7, 9, 11, 12) if not (folder / str(step)).exists()])
  )
  shutil.copytree(source, target)
  case.detail = f'{source.name} as {target.name}'
  return case.finish(may_stop=True)


@fault(1)
def result_damaged(case: Case) -> str:
  shutil.copytree(case.base.whole, case.run)
  path = case.rng.choice(sorted(case.run.glob('students/*/results/*.parquet')))
  case.detail = f'{path.name}: {damage_file(path, case.rng)}'
  return case.finish(may_stop=True, module='kdjax.evaluate')


@fault(2)
def emptied_by_a_crash(case: Case) -> str:
  """Small files without their content, as a crash of the host leaves renames that were not flushed."""
  case.half()
  small = [
    p for p in case.run.rglob('*') if p.is_file() and 'checkpoints' not in p.parts and p.suffix in ('.json', '.jsonl')
  ]
  for path in case.rng.sample(sorted(small), case.rng.randint(1, 3)):
    path.write_bytes(b'')
    case.detail += f'{path.relative_to(case.run)} '
    if path.name == 'metrics.jsonl':
      case.lost.add(path.parent.name)
  return case.finish(may_stop=True)


# Disks, stores, clocks, rivals.
