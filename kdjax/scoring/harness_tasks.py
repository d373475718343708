"""Find the harness's tasks by name, pattern, group, tag or file, as its own command line does."""

import argparse
import contextlib
import dataclasses
import difflib
import math
import os
from collections.abc import Iterable, Sequence
from typing import Any

from kdjax.errors import UserError
from kdjax.storage import paths

with contextlib.suppress(ImportError):  # reported by kdjax.harness
  from lm_eval.tasks import TaskManager


@dataclasses.dataclass(frozen=True)
class Selection:
  """The tasks to evaluate: `specs` are the names and files that the manager loads."""

  manager: 'TaskManager'
  specs: list[str]


def parse_names(texts: Iterable[str]) -> list[str]:
  """Split names at commas, except commas within the name of a file or folder, and drop repeats."""
  exists = lambda name: bool(name) and os.path.exists(paths.expand(name))
  matches = lambda name: name.endswith('.yaml') and bool(paths.match(paths.expand(name)))
  return list(dict.fromkeys(name for text in texts for name in paths.split_list(text, exists, matches)))


def parse_limit(text: str) -> float:
  """Parse a limit as the harness does: below 1 it is a share of the items, else their number, rounded down."""
  try:
    value = float(text)
  except ValueError:
    raise argparse.ArgumentTypeError(f'must be a number, got {text}') from None
  if not math.isfinite(value) or value <= 0:
    raise argparse.ArgumentTypeError(
      f'must be at least 1, got {value:g}; or, for a share of the items, between 0 and 1'
    )
  return value if value < 1 else int(value)


def find_tasks(
  names: Sequence[str], include_path: str | None = None, defaults: bool = True, unsafe: bool = False
) -> Selection:
  """Find and load tasks, so that mistakes are reported before a model is loaded.

  Args:
    names: names or patterns of tasks, groups and tags; YAML files, or folders of them.
    include_path: a folder of further tasks.
    defaults: whether the harness's own tasks are known.
    unsafe: whether tasks may run code that a model writes.

  Raises:
    UserError: a task is unknown, cannot be loaded, has no items, needs images, or needs permission to run code.
  """
  if include_path and not os.path.isdir(include_path):
    raise UserError(f'--include-path {include_path}: no such folder')
  if not names:
    raise UserError('--tasks is empty; name at least one task')
  manager = TaskManager(include_path=include_path, include_defaults=defaults)
  matches = {name: _match(name, manager) for name in names}
  if unknown := [name for name, found in matches.items() if not found]:
    raise UserError(f'unknown tasks: {_nearest(unknown, manager)}; {_known(manager, include_path, defaults)}')
  specs = dict.fromkeys(spec for found in matches.values() for spec in found)
  loaded = {spec: _load(spec, manager) for spec in specs}
  for found in loaded.values():
    _check_tasks(found['tasks'], unsafe)
  return Selection(manager, _drop_repeats(loaded))


def _match(name: str, manager: 'TaskManager') -> list[str]:
  if found := manager.match_tasks([name]):
    return found
  path = paths.expand(name)
  if os.path.isdir(path):
    return paths.match(os.path.join(path, '*.yaml'))
  return paths.match(path) if name.endswith('.yaml') else []


def _nearest(unknown: Sequence[str], manager: 'TaskManager') -> str:
  near = {name: difflib.get_close_matches(name, manager.all_tasks, n=3) for name in unknown}
  return ', '.join(f'{name} (did you mean {" or ".join(found)}?)' if found else name for name, found in near.items())


def _known(manager: 'TaskManager', include_path: str | None, defaults: bool) -> str:
  if include_path and not defaults:
    return f'the readable YAML files in {include_path} define {", ".join(manager.all_tasks) or "none"}'
  return 'list the known ones with lm-eval ls tasks, or add a folder of your own with --include-path'


def _load(spec: str, manager: 'TaskManager') -> dict[str, Any]:
  try:
    return manager.load([spec])
  except Exception as e:  # a task's code, its file or the library that fetches its data can raise anything
    what = (str(e).splitlines() or [''])[0][:300]
    raise UserError(
      f'the task {spec} cannot be loaded ({type(e).__name__}: {what}); correct its file or its data'
    ) from e


def _check_tasks(tasks: dict[str, Any], unsafe: bool) -> None:
  for name, task in tasks.items():
    if getattr(task, 'UNSAFE_CODE', False) and not unsafe:
      raise UserError(
        f'the task {name} runs code that the model writes; allow it with --confirm-run-unsafe-code, in a sandbox'
      )
    if getattr(task, 'MULTIMODAL', False):
      raise UserError(f'the task {name} needs images or sound, which these models do not read; leave it out')
    if not len(task.eval_docs):
      raise UserError(f'the task {name} has no items; correct its file or its data')


def _drop_repeats(loaded: dict[str, dict[str, Any]]) -> list[str]:
  """Drop what another group or tag contains already. Raises UserError if two groups share only some of their tasks."""
  leaves = {spec: set(found['tasks']) for spec, found in loaded.items()}
  kept: list[str] = []
  for spec in sorted(loaded, key=lambda spec: (-len(leaves[spec]), not loaded[spec]['groups'])):
    if any(leaves[spec] <= leaves[other] for other in kept):
      continue
    for other in kept:
      if (shared := leaves[spec] & leaves[other]) and (loaded[spec]['groups'] or loaded[other]['groups']):
        raise UserError(f'--tasks: {other} and {spec} share {", ".join(sorted(shared)[:5])}; name one of the two')
    kept.append(spec)
  return [spec for spec in loaded if spec in kept]
