"""The pilot's outcome: which alpha each teacher and control was given, with the curves that it was chosen from.

It is written once, before the main cells start, and its hash says whether it was changed since.
"""

import hashlib
import json
import math
import time
from typing import Any

from kdjax.errors import UserError
from kdjax.storage import paths
from kdjax.storage.paths import read_json
from kdjax.sweeps import cells as cells_lib
from kdjax.sweeps.config import GridConfig
from kdjax.sweeps.names import Setting, Source, pilot_key

FILE = 'pilot.json'
CONTROLS = ('unigram', 'tuned')  # the controls that the pilot chooses something for


def choose_values(curves: dict[str, dict[str, float]]) -> dict[str, Any]:
  """Choose from each curve the value with the fewest bits per byte on the validation split.

  For a teacher only alphas above 0 count: the fresh seeds decide whether it beats the baseline. The value of a diverged run is not finite
  and is never chosen; `not_finite` lists such values, and the curves omit them.

  Raises UserError if a curve has no finite value to choose.
  """
  chosen: dict[str, Any] = {}
  kept, not_finite, hopeless = {}, {}, []
  for key, curve in curves.items():
    kept[key] = {name: value for name, value in curve.items() if math.isfinite(value)}
    if left_out := [name for name in curve if name not in kept[key]]:
      not_finite[key] = left_out
    tuned = key.endswith('/tuned')
    candidates = [name for name in curve if tuned or float(name) > 0]
    finite = [name for name in candidates if name in kept[key]]
    if finite:
      best = min(finite, key=lambda name: curve[name])
      chosen[key] = best if tuned else float(best)
    elif candidates:
      hopeless.append(key)
  if hopeless:
    raise UserError(
      f'pilot: no run of {", ".join(hopeless)} has a finite likelihood on the validation split, all diverged; lower the learning rate'
    )
  content = {'chosen': chosen, 'curves': kept, 'criterion': 'bits per byte of the in-domain validation split'}
  content |= {'not_finite': not_finite} if not_finite else {}
  return content | {'time': time.time(), 'hash': _digest(content)}


def read_outcome(folder: paths.Path, grid: GridConfig) -> dict[str, Any] | None:
  """Read the pilot's outcome. Raises UserError if it differs from what was recorded before the main cells started."""
  pilot = read_json(folder / FILE)
  if pilot is None:
    return None
  content = {key: value for key, value in pilot.items() if key not in ('time', 'hash')}
  if _digest(content) != pilot['hash']:
    raise UserError(
      f'{folder / FILE} has been changed since it was written; restore it, or delete the grid and run it again'
    )
  return pilot | {name: _upgrade_keys(grid, pilot[name]) for name in ('chosen', 'curves')}


def learners(grid: GridConfig, setting: Setting, *controls: str) -> list[Source | str]:
  return [*cells_lib.sources(grid, setting), *controls]


def _upgrade_keys(grid: GridConfig, table: dict[str, Any]) -> dict[str, Any]:
  """Convert a pilot's table to exact keys. Older pilots wrote short ones; an entry whose short key is ambiguous is dropped."""
  short: dict[str, list[str]] = {}
  for setting in cells_lib.settings(grid):
    for learner in learners(grid, setting, *CONTROLS):
      name = f'{setting.name}/{learner if isinstance(learner, str) else learner.name}'
      short.setdefault(name, []).append(pilot_key(setting, learner))
  older = {keys[0]: table[name] for name, keys in short.items() if name in table and len(keys) == 1}
  return {**older, **table}


def _digest(content: dict[str, Any]) -> str:
  return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
