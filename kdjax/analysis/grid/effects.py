"""A grid's comparisons as two tables: every arm against its baseline on every set, and the contrasts that the config declared.

Everything is paired: an arm and its baseline share seed, initial weights, batches and documents. Intervals are of crossed random effects,
seeds x documents (kdjax/analysis/crossed.py); with a single seed they say so. The table of arms has hundreds of rows. Even without any effect,
at least one of its 95% intervals excludes 0 in most grids. So it has no verdicts; only primary contrasts do.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from kdjax.analysis import crossed
from kdjax.analysis.crossed import Effect, Paired
from kdjax.analysis.grid import contrasts
from kdjax.analysis.scores import MEASURES, TUNED, Measure, Scores
from kdjax.errors import UserError
from kdjax.models import flops
from kdjax.scoring import results
from kdjax.storage import paths
from kdjax.storage.paths import read_json
from kdjax.sweeps import cells as cells_lib
from kdjax.sweeps import runner
from kdjax.sweeps.cells import Cell, Group
from kdjax.sweeps.config import OOD_MEAN, GridConfig


@dataclasses.dataclass(frozen=True)
class Tables:
  """What the report is made of."""

  effects: pd.DataFrame
  contrasts: pd.DataFrame
  teachers: pd.DataFrame
  warnings: list[str]


def build_tables(grid: GridConfig, folder: paths.Path) -> Tables:
  """Raise UserError if runs must not be compared, or nothing has been scored."""
  scores = Scores(grid, folder)
  groups = [group for phase, found in runner.phases(grid, folder) if phase != 'pilot' for group in found]
  ready = [group for group in groups if scores.has([group])]
  if not any(group.kind != 'baseline' for group in ready):
    raise UserError(f'{folder}: no arm and baseline of one seed have been scored yet; run the grid first')
  rows: list[dict[str, Any]] = []
  for group in ready:
    if group.kind != 'baseline':
      rows += _rows(scores, group, list(group.baseline), group.scenario)
  for group in ready:  # the same students against baselines of equal FLOPs
    for other in ready if group.kind == 'distilled' and group.phase == 'validated' else ():
      if other.kind == 'flop_matched' and (other.setting, other.source) == (group.setting, group.source):
        rows += _rows(scores, group, list(other.cells), other.scenario)
  found = contrasts.test_all(scores, ready)
  warnings = _warnings(scores, groups, ready)
  return Tables(pd.DataFrame(rows), pd.DataFrame(found), _teachers(scores), warnings)


def _rows(scores: Scores, group: Group, baseline: list[Cell], scenario: str) -> list[dict[str, Any]]:
  """One row a set and measure."""
  for mine, theirs in zip(group.cells, baseline, strict=True):
    scores.check_comparable(mine, theirs, TUNED if scenario or group.kind == 'tuned' else set())
  identity = _identity(scores, group, scenario)
  sets = scores.sets(group.cells[0])
  rows = []
  for name, measure in MEASURES.items():
    wanted = {
      s: kind
      for s, kind in sets.items()
      if (kind == 'downstream') == measure.task and scores.measured(group.cells[0], s, measure)
    }
    parts = {s: scores.difference([group.cells], [baseline], s, measure) for s in wanted}
    averaged = {set_name: {set_name: 1.0} for set_name in wanted}
    if (ood := [s for s, kind in wanted.items() if kind == 'OOD']) and not measure.task:
      averaged[OOD_MEAN] = dict.fromkeys(ood, 1 / len(ood))
    for set_name, weights in averaged.items():
      effect = _effect(scores, group, baseline, weights, parts, measure)
      mean = lambda cells, measure=measure, weights=weights: sum(
        weight * scores.value([cells], s, measure) for s, weight in weights.items()
      )
      place = {'set': set_name, 'group': wanted.get(set_name, OOD_MEAN), 'measure': name}
      rows.append(identity | _described(effect) | place | {'value': mean(group.cells), 'baseline': mean(baseline)})
  for set_name, kind in sets.items():
    if kind != 'downstream':
      ece = [[scores.meta(cell.id, set_name)['ece'] for cell in cells] for cells in (group.cells, baseline)]
      place = {'set': set_name, 'group': kind, 'measure': 'ece', 'value': np.mean(ece[0]), 'baseline': np.mean(ece[1])}
      rows.append(identity | _described(_over_seeds(np.subtract(ece[0], ece[1]))) | place)
  return rows


def _identity(scores: Scores, group: Group, scenario: str) -> dict[str, Any]:
  grid, setting, source = scores.grid, group.setting, group.source
  seq_len = grid.base.data.seq_len
  student = cells_lib.sized(grid, setting.student)
  own = group.cells[0].config.student.tokens
  costs: dict[str, Any] = {
    'student_flops': flops.training_flops(student, seq_len) * own,
    'logits_flops': 0.0,
    'pretraining_flops': 0.0,
  }
  teacher_params = np.nan
  if source.teacher:
    teacher = cells_lib.sized(grid, source.teacher)
    teacher_params = flops.count_params(teacher).non_embedding
    if group.kind in ('distilled', 'equal_compute'):
      ledger = flops.ledger(student, teacher, own, source.teacher_tokens, seq_len)
      costs |= {'logits_flops': ledger.logits, 'pretraining_flops': ledger.pretraining}
  return {
    'student': setting.student,
    'student_tokens': setting.student_tokens,
    'distinct_tokens': setting.distinct_tokens,
    **dataclasses.asdict(source),
    'alpha': group.alpha,
    'arm': group.kind,
    'scenario': scenario,
    'draw': group.draw,
    'validated': group.phase == 'validated',
    'seeds': ' '.join(str(cell.seed) for cell in group.cells),
    'cells': ' '.join(cell.id for cell in group.cells),
    'student_params': flops.count_params(student).non_embedding,
    'teacher_params': teacher_params,
    **costs,
  }


def _described(effect: Effect) -> dict[str, Any]:
  fields = ('estimate', 'low', 'high', 'error', 'df', 'p', 'n_seeds', 'n_documents', 'over')
  return {name: getattr(effect, name) for name in fields}


def _effect(
  scores: Scores,
  group: Group,
  baseline: list[Cell],
  weights: Mapping[str, float],
  parts: Mapping[str, Paired],
  measure: Measure,
) -> Effect:
  """Subtract the baseline from the group; with one seed, the spread of both runs' last checkpoints is part of the error."""
  effect = crossed.crossed_effect([parts[name] for name in weights], list(weights.values()))
  if effect.n_seeds > 1 or measure.task:
    return effect
  noise = scores.checkpoint_spreads({group.cells[0].id: 1.0, baseline[0].id: -1.0}, weights, measure)
  return crossed.with_checkpoint_noise(effect, *noise) if noise else effect


def _over_seeds(differences: np.ndarray) -> Effect:
  """A t interval over seeds, for what is no sum over documents (ECE)."""
  n, estimate = len(differences), float(np.mean(differences))
  nan = float('nan')
  if n < 2:
    return Effect(estimate, -np.inf, np.inf, np.inf, nan, nan, n, 0, 'seeds', nan, nan)
  error = float(np.std(differences, ddof=1) / np.sqrt(n))
  half = stats.t.ppf(0.975, n - 1) * error
  p = 1.0 if error == 0 else float(2 * stats.t.sf(abs(estimate) / error, n - 1))
  return Effect(estimate, estimate - half, estimate + half, error, n - 1, p, n, 0, 'seeds', n * error**2, nan)


def _teachers(scores: Scores) -> pd.DataFrame:
  """Each teacher's own likelihood: what PGR and a law on losses need."""
  rows = []
  for job in runner.list_jobs(scores.grid, scores.folder):
    rows_of = job.config.teacher.batch_size * job.config.data.seq_len
    for step, sets in scores.steps(job.id).items() if not job.cells else ():
      for name, table in sets.items():
        if 'nll' in table:
          bits = results.bits_per_byte(table)
          rows.append(
            {
              'teacher': job.model,
              'tokens': step * rows_of,
              'step': step,
              'set': name,
              'bits_per_byte': bits,
              'job': job.id,
            }
          )
  return pd.DataFrame(rows)


def _warnings(scores: Scores, groups: list[Group], ready: list[Group]) -> list[str]:
  grid = scores.grid
  out = []
  if grid.pilot.skip:
    out.append('alpha not validated: the grid skips the pilot; contrasts are tested at declared alphas')
  if not grid.primary:
    out.append('no primary contrast was declared: every row is exploratory, and there are no verdicts')
  if grid.teacher_seed == 'shared':
    out.append(
      'each teacher is one training run: statements on teacher size and budget hold for these runs only; '
      'teacher_seed=paired trains one for each student seed'
    )
  missing = len(groups) - len(ready)
  if missing:
    out.append(f'{missing} of {len(groups)} arms are not finished: they are left out, and contrasts on them say so')
  fewest = min(len(group.cells) for group in ready)
  if fewest < crossed.MIN_SEEDS:
    out.append(f'arms with {fewest} seed{"s" * (fewest > 1)}: no verdict is given with fewer than {crossed.MIN_SEEDS}')
  if fewest == 1:
    out.append(
      'arms with one seed: their intervals hold the noise of their last checkpoints, not the variance between seeds'
    )
  for name, counts in (read_json(scores.folder / runner.CORPUS) or {'counts': {}})['counts'].items():
    if shared := counts.get('in_training_split', 0):
      out.append(f'set {name}: {shared} of its {counts["read"]} documents are training text too; they are not scored')
  commits = scores.commits()
  if len(commits) > 1:
    out.append(f'results of mixed code versions: {", ".join(sorted(commits))}')
  if any(commit.endswith('+') for commit in commits):
    out.append('some runs were made with uncommitted changes of the code')
  return out
