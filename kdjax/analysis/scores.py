"""A grid's results in memory: per-document sums of every scored cell, and differences between groups of cells as [seeds, documents] arrays."""

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from kdjax.analysis import crossed
from kdjax.analysis.crossed import Paired
from kdjax.analysis.table import LN2, differing
from kdjax.errors import UserError
from kdjax.runs.folder import RunFolder
from kdjax.scoring import job as jobs
from kdjax.scoring import results
from kdjax.scoring.text import DIFFICULTIES
from kdjax.storage import paths
from kdjax.sweeps import pilots, runner
from kdjax.sweeps.cells import Cell, Group
from kdjax.sweeps.config import GridConfig

# What may differ between the runs of one comparison: what it is about. All else in run.json must be equal.
COMPARED = {'arm', 'target', 'alpha', 'alpha_schedule', 'loss'}
TUNED = {'tokens', 'optimizer'}  # and what a tuned or FLOP-matched baseline has of its own


@dataclasses.dataclass(frozen=True)
class Measure:
  """A mean over tokens, bytes or items: the sum of `column` over the sum of `per`, in `unit`."""

  column: str
  per: str  # bytes | tokens | items
  scale: float = 1.0
  lower_is_better: bool | None = True  # None: neither
  task: bool = False
  bin: int | None = None  # of columns that hold a list

  def sums(self, table: pd.DataFrame) -> np.ndarray:
    """[documents], scaled."""
    return self.scale * self._values(table, self.column)

  def sizes(self, table: pd.DataFrame) -> np.ndarray:
    """[documents]: what it is a mean over."""
    return np.ones(len(table)) if self.per == 'items' else self._values(table, self.per)

  def _values(self, table: pd.DataFrame, column: str) -> np.ndarray:
    values = table[column]
    return values.to_numpy(float) if self.bin is None else np.stack(values.to_list())[:, self.bin]


MEASURES = {
  'bits_per_byte': Measure('nll', 'bytes', 1 / LN2),
  'bits_per_byte_fitted': Measure('nll_fitted', 'bytes', 1 / LN2),
  'entropy': Measure('entropy', 'tokens', 1.0, None),
  'top1': Measure('correct', 'tokens', 1.0, False),
  'accuracy': Measure('correct', 'items', 1.0, False, True),
  'accuracy_norm': Measure('correct_norm', 'items', 1.0, False, True),
  **{
    f'difficulty_{i + 1}': Measure('difficulty_nll', 'difficulty_tokens', bin=i) for i in range(DIFFICULTIES)
  },  # nats per token
}


class Scores:
  """The result files of a grid, read once each."""

  def __init__(self, grid: GridConfig, folder: paths.Path):
    self.grid, self.folder = grid, folder
    self._files = runner.read_scores(grid, folder)

  @functools.cached_property
  def pilot(self) -> dict[str, Any] | None:
    """The pilot's choices and curves; None before it has finished."""
    return pilots.read_outcome(self.folder, self.grid)

  def has(self, groups: Iterable[Group]) -> bool:
    """Return whether every cell of the groups, and of their baselines, has been scored."""
    return all(cell.id in self._files for group in groups for cell in (*group.cells, *group.baseline))

  def sets(self, cell: Cell) -> dict[str, str]:
    """set -> its group: in-domain, OOD or downstream."""
    names = runner.newest_step(self._files[cell.id])
    return {name: self._kind(name) for name in names if name != jobs.VALIDATION}

  def documents(self, run: str, name: str, back: int = 0) -> pd.DataFrame:
    """Per-document sums of a cell or a teacher on a set, at its newest checkpoint or the `back`-th before."""
    return self._read(run, name, back)[0]

  def meta(self, run: str, name: str) -> dict[str, Any]:
    return self._read(run, name, 0)[1]

  def checkpoints(self, run: str) -> int:
    return len(self._files[run])

  def steps(self, run: str) -> dict[int, dict[str, pd.DataFrame]]:
    """step -> set -> per-document sums of a run, teachers' jobs included; {} where it has not been scored."""
    return {
      int(step): {name: results.read_result(paths.resolve(self.folder, file))[0] for name, file in sets.items()}
      for step, sets in self._files.get(run, {}).items()
    }

  def mean(self, cells: Sequence[Sequence[Cell]], name: str, measure: Measure) -> np.ndarray:
    """[seeds, documents]: the measure's sums, averaged over groups of cells with the same seeds."""
    return np.mean([[self._column(cell, name, measure) for cell in each] for each in cells], axis=0)

  def size(self, cell: Cell, name: str, measure: Measure) -> np.ndarray:
    """[documents]: what the measure is a mean over."""
    return measure.sizes(self.documents(cell.id, name))

  def measured(self, cell: Cell, name: str, measure: Measure) -> bool:
    """Return whether the set has anything to measure: an older evaluation lacks some columns, a small set some bins."""
    table = self.documents(cell.id, name)
    return measure.column in table and measure.sizes(table).sum() > 0

  def difference(
    self, left: Sequence[Sequence[Cell]], right: Sequence[Sequence[Cell]], name: str, measure: Measure
  ) -> Paired:
    """left - right on one set; each side is a list of groups' cells, averaged. Paired by seed and document.

    Raises UserError if the two were scored on other documents, or must not be compared.
    """
    first, other = left[0][0], right[0][0]
    mine, theirs = self.documents(first.id, name), self.documents(other.id, name)
    if not np.array_equal(mine['doc'].to_numpy(), theirs['doc'].to_numpy()):
      raise UserError(f'set {name}: {first.id} and {other.id} were scored on other documents; run the grid again')
    numerator = self.mean(left, name, measure) - self.mean(right, name, measure)
    return Paired(numerator, self.size(first, name, measure))

  def value(self, cells: Sequence[Sequence[Cell]], name: str, measure: Measure) -> float:
    return float(self.mean(cells, name, measure).sum() / self.size(cells[0][0], name, measure).sum() / len(cells[0]))

  def checkpoint_spreads(
    self, coefficients: Mapping[str, float], weights: Mapping[str, float], measure: Measure
  ) -> tuple[list[float], int] | None:
    """Measure the checkpoint noise of each run's weighted value, times its coefficient; return (noise of each run, number of checkpoints).

    Args:
      coefficients: run -> its coefficient in an estimate.
      weights: set -> its weight.
    Returns None if a run has fewer than two scored checkpoints.
    """
    n = min(self.checkpoints(run) for run in coefficients)
    if n < 2:
      return None
    value = lambda run, back: sum(w * self._ratio(run, name, measure, back) for name, w in weights.items())
    noise = lambda run: crossed.checkpoint_noise([value(run, back) for back in range(n)])
    return [abs(coefficient) * noise(run) for run, coefficient in coefficients.items()], n

  def check_comparable(self, left: Cell, right: Cell, free: set[str]) -> None:
    """Raise UserError, naming the field, if two runs differ in more than what their comparison is about.

    Shown, not said: tokens, optimiser, schedule, batch order, initial weights, from what each run recorded.
    """
    known = [self._identity(cell.id) for cell in (left, right)]
    fingerprints = [each['fingerprints'] for each in known]
    if name := differing(*fingerprints):
      values = [each.get(name) for each in fingerprints]
      raise UserError(
        f'{left.id} and {right.id} must not be compared: their {name} fingerprints differ ({values[0]}, {values[1]})'
      )
    fields = known[0]['config'].keys() | known[1]['config'].keys()
    for name in sorted(fields - COMPARED - free):
      values = [each['config'].get(name) for each in known]
      if values[0] != values[1]:
        raise UserError(
          f'{left.id} and {right.id} must not be compared: {name} is {values[0]!r} there, {values[1]!r} here'
        )

  def commits(self) -> set[str]:
    """The code versions that the cells were trained with."""
    ids = [path.name for path in (self.folder / 'cells').iterdir()] if (self.folder / 'cells').is_dir() else []
    return {self._identity(run)['git'] for run in ids if run in self._files}

  def _ratio(self, run: str, name: str, measure: Measure, back: int) -> float:
    table = self.documents(run, name, back)
    return float(measure.sums(table).sum() / measure.sizes(table).sum())

  def _column(self, cell: Cell, name: str, measure: Measure) -> np.ndarray:
    return measure.sums(self.documents(cell.id, name))

  def _kind(self, name: str) -> str:
    if name == jobs.IN_DOMAIN:
      return 'in-domain'
    return 'downstream' if name in self.grid.base.eval.tasks else 'OOD'

  @functools.cache  # noqa: B019 - a report makes one of these
  def _read(self, run: str, name: str, back: int) -> tuple[pd.DataFrame, dict[str, Any]]:
    steps = sorted(self._files[run], key=int)
    return results.read_result(paths.resolve(self.folder, self._files[run][steps[-1 - back]][name]))

  @functools.cache  # noqa: B019
  def _identity(self, run: str) -> dict[str, Any]:
    return RunFolder(self.folder / 'cells' / run).read_record() or {}
