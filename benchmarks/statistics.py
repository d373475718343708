"""Measure how often a report's verdicts are wrong, how often they find a true effect, and the regret of the advisor's choices.

    python -m benchmarks.statistics                  write the tables of docs/STATISTICS.md, and their data to docs/results/statistics.json
    python -m benchmarks.statistics --grids=100      the same in a few minutes, printed only

The simulation draws grids with a known truth for the shipped configs/grid.py and analyses them with kdjax.analysis.grid.contrasts and .advisor.
A student's value on a document is the sum of a shift of its seed and arm (half of its variance is common to all sets), a shift of its arm and
document, and a residual.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import math
import multiprocessing
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from kdjax import cli
from kdjax.analysis import crossed
from kdjax.analysis.crossed import Effect, Paired
from kdjax.analysis.grid import advisor, contrasts
from kdjax.config.sizes import NAMED, named
from kdjax.models import flops
from kdjax.sweeps import cells as cells_lib
from kdjax.sweeps import comparisons
from kdjax.sweeps import config as grid_config
from kdjax.sweeps.cells import Cell, Group
from kdjax.sweeps.config import GridConfig

FILE = pathlib.Path(__file__).parents[1] / 'docs' / 'results' / 'statistics.json'
PAGE = FILE.parents[1] / 'STATISTICS.md'
GRIDS = 2000
DOCUMENTS = {'in-domain': 40, 'dialogue': 40, 'reference': 40, 'code': 40}
ALPHA = 0.4  # of every arm; its value does not matter here
UNIGRAM_ALPHA = 0.2
# Standard deviations in bits per byte of: the shift of an arm and seed, the shift of an arm and document, the residual of one document.
REGIMES = {'seeds': (0.02, 0.02, 0.02), 'mixed': (0.01, 0.06, 0.03), 'documents': (0.002, 0.1, 0.02)}
SEEDS = (1, 2, 3, 5, 10)


# Simulated grids.


@dataclasses.dataclass(frozen=True)
class Design:
  """The shipped grid with a given number of fresh seeds: its groups, and the pilot's keys."""

  grid: GridConfig
  groups: tuple[Group, ...]
  keys: tuple[str, ...]
  curves: dict[str, dict[str, float]] | None = None  # the pilot's; None: new ones for each grid

  @property
  def cells(self) -> list[Cell]:
    return cells_lib.cells_of(self.groups)


@functools.cache
def design(n_seeds: int) -> Design:
  grid = cli.load_as(GridConfig, grid_config.problems, 'configs/grid.py', {})
  tested = tuple({contrast: None for contrast, _ in sorted(grid_config.primary_tests(grid))})
  grid = dataclasses.replace(grid, validated_seed=tuple(range(100, 100 + n_seeds)), contrasts=tested)
  (setting,) = cells_lib.settings(grid)
  keys = tuple(cells_lib.pilot_key(setting, source) for source in cells_lib.sources(grid, setting))
  chosen = dict.fromkeys(keys, ALPHA) | {cells_lib.pilot_key(setting, 'unigram'): UNIGRAM_ALPHA}
  return Design(grid, tuple(cells_lib.validated_groups(grid, chosen)), keys)


class SimulatedScores:
  """Simulated results of a grid, with the interface that kdjax.analysis.grid.contrasts uses."""

  def __init__(self, made: Design, regime: str, effects: Callable[[Group, str], float], rng: np.random.Generator):
    self.grid = made.grid
    unigram = cells_lib.pilot_key(made.groups[0].setting, 'unigram')
    drawn = {key: {'0': 2.0, f'{ALPHA:g}': 2.0 + 0.01 * rng.normal()} for key in made.keys}
    self.pilot = {'chosen': {unigram: UNIGRAM_ALPHA}, 'curves': made.curves or drawn}
    self._size = {name: lengths(name) for name in DOCUMENTS}
    self._sums = {}
    for group in made.groups:
      known = group.cells[0].id in self._sums
      self._sums |= {} if known else _draw(group, REGIMES[regime], effects, self._size, rng)

  def sets(self, cell: Cell) -> dict[str, str]:
    return {name: 'in-domain' if name == 'in-domain' else 'OOD' for name in DOCUMENTS}

  def mean(self, cells, name: str, measure) -> np.ndarray:
    return np.mean([[self._sums[cell.id][name] for cell in each] for each in cells], axis=0)

  def difference(self, left, right, name: str, measure) -> Paired:
    return Paired(np.zeros((len(left[0]), DOCUMENTS[name])), self._size[name])

  def checkpoint_spreads(self, coefficients, weights, measure):
    return None  # one checkpoint each


@functools.cache
def lengths(name: str) -> np.ndarray:
  """Draw the bytes [documents] of a set, the same in every grid: log-normal, like web documents."""
  rng = np.random.default_rng(list(DOCUMENTS).index(name))
  return np.round(np.exp(rng.normal(6, 1, DOCUMENTS[name]))) + 1


def _draw(group: Group, spread, effects, sizes: Mapping[str, np.ndarray], rng) -> dict[str, dict[str, np.ndarray]]:
  """Draw the bits of each document, by cell and set."""
  seed_sd, document_sd, residual_sd = spread
  n_seeds = len(group.cells)
  common_S = rng.normal(size=n_seeds)
  out: dict[str, dict[str, np.ndarray]] = {cell.id: {} for cell in group.cells}
  for name, x_D in sizes.items():
    shift_S = seed_sd * math.sqrt(0.5) * (common_S + rng.normal(size=n_seeds))
    rate_SxD = 2.0 + effects(group, name) + shift_S[:, None] + document_sd * rng.normal(size=len(x_D))
    rate_SxD = rate_SxD + residual_sd * rng.normal(size=(n_seeds, len(x_D)))
    for cell, rate_D in zip(group.cells, rate_SxD, strict=True):
      out[cell.id][name] = rate_D * x_D
  return out


def verdicts(n_seeds: int, regime: str, effects: Callable[[Group, str], float], seed: int) -> dict[str, str]:
  """Return the verdict of each primary test on one grid."""
  made = design(n_seeds)
  scores = SimulatedScores(made, regime, effects, np.random.default_rng([n_seeds, list(REGIMES).index(regime), seed]))
  rows = contrasts.test_all(scores, list(made.groups))  # type: ignore[arg-type]
  return {f'{row["contrast"]}:{row["set"]}': row['verdict'] for row in rows if row['primary']}


# Truths.


def no_effect(group: Group, name: str) -> float:
  return 0.0


def control_harms(group: Group, name: str) -> float:
  return 0.1 if group.kind == 'unigram' else 0.0


def all_gain_alike(group: Group, name: str) -> float:
  """Every teacher and the control give the same gain on every set."""
  return -0.1 if group.kind in ('distilled', 'unigram') else 0.0


NULLS: dict[str, tuple[Callable[[Group, str], float], tuple[str, ...]]] = {
  # name -> (truth, the primary tests for which it is a null; (): all)
  'no arm differs': (no_effect, ()),
  'teachers gain nothing, the unigram control harms': (control_harms, ()),
  'all teachers and the control gain the same': (
    all_gain_alike,
    ('size_reverses', 'ood_more', 'more_than_calibration'),
  ),
}


def weak(group: Group) -> bool:
  setting = group.setting
  relationship = functools.partial(cells_lib.relationship, setting.student, setting.student_tokens)
  return group.kind == 'distilled' and relationship(group.source) == 'weak-to-strong'


def true_effect(n_seeds: int, regime: str, coefficients: list[float], weights: Mapping[str, float]) -> Effect:
  """Build the effect of a contrast of arms with these coefficients from true instead of estimated variance components."""
  seed_sd, document_sd, residual_sd = REGIMES[regime]
  arms = float(np.square(coefficients).sum())
  w_K = np.array([weights[name] for name in weights])
  concentration_K = np.array([np.sum(lengths(name) ** 2) / np.sum(lengths(name)) ** 2 for name in weights])
  seeds = arms * seed_sd**2 * 0.5 * (w_K.sum() ** 2 + np.square(w_K).sum())
  residual = arms * residual_sd**2 * float(np.square(w_K) @ concentration_K)
  documents_K = arms * document_sd**2 * np.square(w_K) * concentration_K
  df = documents_K.sum() ** 2 / np.sum(documents_K**2 / (1 / concentration_K - 1))
  parts = (((seeds + residual) / n_seeds, n_seeds - 1.0), (float(documents_K.sum()), float(df)))
  error = math.sqrt(sum(variance for variance, _ in parts))
  return Effect(0.0, 0.0, 0.0, error, math.nan, 1.0, n_seeds, 40, 'seeds and documents', 0.0, 0.0, parts)


@functools.cache
def alternatives(n_seeds: int, regime: str) -> dict[str, tuple[float, Callable[[Group, str], float]]]:
  """Return primary test -> (its minimum detectable effect from the true components, the truth that has this effect)."""
  grid, groups = design(n_seeds).grid, design(n_seeds).groups
  level = crossed.corrected_level(grid_config.n_primary(grid))
  n_weak = sum(map(weak, groups))
  n_teachers = sum(group.kind == 'distilled' for group in groups)
  home = {'in-domain': 1.0}
  ood = {name: 1 / 3 for name in DOCUMENTS if name != 'in-domain'}
  sources = comparisons.plain_sources(grid, groups[0].setting)
  largest = sources[-1]
  mde = lambda coefficients, weights: crossed.minimum_detectable_effect(
    true_effect(n_seeds, regime, coefficients, weights), level=level
  )
  helps = mde([1 / n_weak] * n_weak + [-1.0], home)
  reverses = mde([1.0, -1.0], home)
  more = mde([1 / n_teachers] * n_teachers + [-1.0], ood | {'in-domain': -1.0})
  own = mde([1 / n_weak] * n_weak + [-1.0], ood)
  return {
    'weak_helps:in-domain': (helps, lambda group, name: -helps * weak(group)),
    'size_reverses:in-domain': (reverses, lambda group, name: reverses * (group.kind == 'distilled' and group.source == largest)),
    'ood_more:OOD mean less in-domain': (more, lambda group, name: -more * (group.kind == 'distilled' and name != 'in-domain')),
    # The control harms, so the gain over the LM-only student decides.
    'more_than_calibration:OOD mean': (own, lambda group, name: -own * weak(group) + 1.0 * (group.kind == 'unigram')),
  }  # fmt: skip


# The advisor.


SURFACES: dict[str, Callable[[float, float], float]] = {  # (teacher parameters, alpha) -> gain, bits per byte
  'monotone': lambda n, a: _parabola(0.02 + 0.02 * math.log(n / 1e5) / math.log(30), a, 0.4),
  'quadratic': lambda n, a: _parabola(0.04 - 0.004 * math.log(n / 5e5) ** 2, a, 0.4),
  'saturating': lambda n, a: _parabola(0.04 * (1 - math.exp(-n / 2e5)), a, 0.4),
  'interior': lambda n, a: _parabola(0.1 * math.exp(-(math.log(n / 3e5) ** 2)), a, 0.4),
  'no gain': lambda n, a: 0.0,
  'harm': lambda n, a: -0.03 * a,
}
ARMS = list(itertools.product(('tiny-0.1m', 'tiny-0.3m', 'tiny-1m', 'tiny-3m'), (0.2, 0.4, 0.6)))  # twelve
STUDENT, TOKENS, SEQ_LEN = 'tiny-1m', 2_000_000, 128
NOISE = 0.005  # the standard error of an arm; half of its variance is from the baseline, which all arms share


def _parabola(peak: float, alpha: float, best: float) -> float:
  return peak * alpha / best * (2 - alpha / best)


def size_of(name: str) -> float:
  return float(flops.count_params(NAMED[name]).non_embedding)


def regret(surface: str, seed: int) -> float | None:
  """Compute how much less the advisor's choice gains than the best arm, as a share of the best gain; None if it refuses."""
  gain, rng = SURFACES[surface], np.random.default_rng([list(SURFACES).index(surface), seed])
  common, df = rng.normal(), 4.0
  rows = []
  for teacher, alpha in ARMS:
    noise = NOISE * (common + rng.normal()) / math.sqrt(2)
    rows.append({
      'teacher': teacher, 'teacher_params': size_of(teacher), 'alpha': alpha, 'cells': f'{teacher}-{alpha}',
      'estimate': -gain(size_of(teacher), alpha) - noise, 'error': NOISE * math.sqrt(rng.chisquare(df) / df),
    })  # fmt: skip
  shared = {
    'student': STUDENT, 'student_tokens': TOKENS, 'student_params': size_of(STUDENT), 'teacher_tokens': TOKENS, 'df': df, 'baseline': 1.5,
    'temperature': 1.0, 'top_k': 0.0, 'mixing': 'normalised', 'arm': 'distilled', 'scenario': '', 'distinct_tokens': 0, 'budget': 'annealed',
    'teacher_data': 'iso', 'set': 'in-domain', 'measure': 'bits_per_byte', 'seeds': '46 47 48 49 50', 'over': 'seeds and documents',
  }  # fmt: skip
  fitted = advisor.fit_surface(pd.DataFrame(rows).assign(**shared), draws=200)
  found = advisor.advise(fitted, named(STUDENT, vocab_size=2048), TOKENS, 1e18, SEQ_LEN)
  if found.choice is None:
    return None
  best = max(gain(size_of(teacher), alpha) for teacher, alpha in ARMS)
  return 1 - gain(found.choice.teacher_params, found.choice.alpha) / best if best > 0 else math.inf


# Tables.


def _one_verdict(task) -> dict[str, str]:
  kind, n_seeds, regime, name, seed = task
  effects = NULLS[name][0] if kind == 'null' else alternatives(n_seeds, regime)[name][1]
  return verdicts(n_seeds, regime, effects, seed)


def _one_regret(task) -> float | None:
  return regret(*task)


def false_positives(n_seeds: int, regime: str, name: str, n: int, run) -> dict[str, Any]:
  found = run(_one_verdict, [('null', n_seeds, regime, name, seed) for seed in range(n)])
  tests = [test for test in found[0] if not NULLS[name][1] or test.partition(':')[0] in NULLS[name][1]]
  wrong = {test: float(np.mean([each[test] in ('better', 'worse') for each in found])) for test in tests}
  family = float(np.mean([any(each[test] in ('better', 'worse') for test in tests) for each in found]))
  return {
    'truth': name,
    'seeds': n_seeds,
    'regime': regime,
    'grids': n,
    'highest of a test': max(wrong.values()),
    'family': family,
  }


def measure_power(n_seeds: int, regime: str, test: str, n: int, run) -> dict[str, Any]:
  mde, _ = alternatives(n_seeds, regime)[test]
  right = 'worse' if test.startswith('size_reverses') else 'better'
  found = run(_one_verdict, [('effect', n_seeds, regime, test, seed) for seed in range(n)])
  power = float(np.mean([each[test] == right for each in found]))
  return {'test': test, 'seeds': n_seeds, 'regime': regime, 'grids': n, 'MDE': mde, 'power': power}


def advice(surface: str, n: int, run) -> dict[str, Any]:
  found = run(_one_regret, [(surface, seed) for seed in range(n)])
  answers = [each for each in found if each is not None]
  row = {'surface': surface, 'grids': n, 'refused': 1 - len(answers) / n}
  if surface in ('no gain', 'harm'):
    return row
  median, high = (float(np.quantile(answers, q)) if answers else math.nan for q in (0.5, 0.9))
  return row | {'median regret': median, '90% of regrets below': high}


def measure(n: int, run) -> dict[str, list[dict[str, Any]]]:
  """Measure every table's rows."""
  tables: dict[str, list[dict[str, Any]]] = {'false': [], 'power': [], 'advice': []}
  for truth, regime, n_seeds in itertools.product(NULLS, REGIMES, SEEDS):
    headline = n_seeds in (5, 10) and (truth == 'no arm differs' or regime == 'mixed')
    tables['false'].append(false_positives(n_seeds, regime, truth, n if headline else max(n // 10, 20), run))
    print(tables['false'][-1], flush=True)
  for regime, n_seeds in itertools.product(REGIMES, (5, 10)):
    for test in alternatives(n_seeds, regime):
      tables['power'].append(measure_power(n_seeds, regime, test, n if regime == 'mixed' else max(n // 4, 20), run))
      print(tables['power'][-1], flush=True)
  for surface in SURFACES:
    tables['advice'].append(advice(surface, n, run))
    print(tables['advice'][-1], flush=True)
  return tables


def markdown(tables: Mapping[str, list[dict[str, Any]]]) -> dict[str, str]:
  """Format the tables of docs/STATISTICS.md, by name."""
  return {name: _table(rows) for name, rows in tables.items()}


def write_page(tables: Mapping[str, list[dict[str, Any]]]) -> None:
  """Write the tables into docs/STATISTICS.md, between their marks."""
  text = PAGE.read_text()
  for name, table in markdown(tables).items():
    head, tail = text.split(f'<!-- {name} -->')[0], text.split(f'<!-- /{name} -->')[1]
    text = f'{head}<!-- {name} -->\n{table}\n<!-- /{name} -->{tail}'
  PAGE.write_text(text)


def _table(rows: list[dict[str, Any]]) -> str:
  head = list(rows[0])
  cell = lambda value: '' if value is None else f'{value:.3f}' if isinstance(value, float) else str(value)
  lines = [[cell(row.get(name)) for name in head] for row in rows]
  return '\n'.join('| ' + ' | '.join(line) + ' |' for line in (head, ['---'] * len(head), *lines))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument(
    '--grids', type=int, default=GRIDS, help=f'simulated grids for each headline setting; default: {GRIDS}'
  )
  parser.add_argument('--processes', type=int, default=2)
  args = parser.parse_args()
  with multiprocessing.get_context('spawn').Pool(args.processes) as pool:
    tables = measure(args.grids, lambda one, tasks: pool.map(one, tasks, chunksize=max(1, len(tasks) // 20)))
  for name, text in markdown(tables).items():
    print(f'\n{name}\n{text}')
  if args.grids >= GRIDS:
    FILE.write_text(json.dumps(tables, indent=1) + '\n')
    write_page(tables)


if __name__ == '__main__':
  main()
