"""The gain of distillation as a surface over (teacher parameters, teacher tokens, student parameters, student tokens, alpha).

A gain is bits per byte saved against the LM-only student of the same tokens and seeds: above 0 is better. At alpha = 0 an arm is its own
baseline, so every surface is 0 there by construction. Two kinds:

- ridge: alpha p + alpha^2 q, with p and q quadratic in the standardised logs; the penalty is the one with the least
  leave-one-teacher-out error. Axes that do not vary in the data have no terms.
- law: Busbridge et al. 2025, "Distillation Scaling Laws", Eq. 8, for alpha = 1, from losses; between it and the baseline a parabola:
  L_S(alpha) = L_LM + alpha (law - L_LM) - k alpha (1 - alpha). Tried where the data suffice (`_law_lacks`), used where it predicts
  left-out teachers better than the ridge does.

Each teacher in turn is left out and predicted from the others: where that is no better than predicting no gain, or the mean gain, the
surface knows nothing of teachers.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import optimize, stats

from kdjax.errors import UserError
from kdjax.sweeps.names import format_count

AXES = ('teacher_params', 'teacher_tokens', 'student_params', 'student_tokens', 'alpha')
N_T, D_T, N_S, D_S, ALPHA = range(5)
WORDS = ('teacher size', 'teacher budget', 'student size', 'number of student tokens', 'alpha')
PLAIN = {'temperature': 1.0, 'top_k': 0.0, 'mixing': 'normalised'}  # other values are other losses
REGIMES = ('distinct_tokens', 'teacher_data', 'budget')  # surfaces of their own: the most frequent value is taken
LEVEL = 0.95  # of all intervals
SAME = 0.02  # logs closer than this are one size: recorded and named counts may differ by rounding
SHARED = 0.5  # of a difference's variance: the baseline's half, common to all arms that are compared with the same runs
PRIOR_DF = 4  # an error from 3 seeds is itself uncertain: it is drawn towards the common one as if that had 4 df
PENALTIES = 10.0 ** np.arange(2, -4.1, -0.5)  # the largest first: it is taken where no teacher can be left out
LAW_VALUES, LAW_ROWS = 3, 40  # distinct values on each of the four axes; four effects for each of the ten constants
SUPERVISED_BOX = ((-3, 2), (-6, 2), (0, 2), (-6, 2), (0, 2), (0.1, 2))
DISTILLED_BOX = ((-1, 8), (-3, 8), (-0.7, 1.5), (-4, 1), (-6, 4), (0, 2), (-6, 4), (0, 2), (0.1, 2), (-1, 1))

Predictor = Callable[[np.ndarray], np.ndarray]  # [n, 5] points -> [n] gains
Estimator = Callable[['Cells'], Predictor]


class Cells(NamedTuple):
  """What a surface is fitted on: one row an effect."""

  x: np.ndarray  # [n, 5]: the AXES, all but alpha as natural logs
  gain: np.ndarray  # bits per byte
  weight: np.ndarray  # 1 / error^2, the errors drawn towards the common one
  teacher: np.ndarray  # integers: which teacher (a name at a budget)
  runs: np.ndarray  # integers: rows of one number were compared with the same LM-only runs
  baseline: np.ndarray  # the LM-only student's bits per byte
  teacher_loss: np.ndarray  # bits per byte; nan where not known

  def rows(self, keep: np.ndarray) -> 'Cells':
    return Cells(*(column[keep] for column in self))


@dataclasses.dataclass(frozen=True)
class Surface:
  """A fitted gain surface and its prediction errors."""

  frame: pd.DataFrame  # the effects it was fitted on
  lm_only: pd.DataFrame  # the effects of LM-only students on more tokens, on the same set
  cells: Cells
  kind: str  # 'ridge' | 'law'
  predictor: Predictor
  draws: tuple[Predictor, ...]  # the same surface, refitted on redrawn effects
  left_out: dict[str, float]  # leave-one-teacher-out error (RMSE, bits per byte), its own and those it must beat
  misfit: float  # standard deviation of what teachers have of their own: bits per byte, at the mean alpha
  fixed: dict[int, float]  # axis -> its one value
  notes: list[str]
  set_name: str

  @property
  def n_teachers(self) -> int:
    return len(np.unique(self.cells.teacher))


class Prediction(NamedTuple):
  """At n points."""

  gain: np.ndarray  # [n] bits per byte
  low: np.ndarray
  high: np.ndarray
  draws: np.ndarray  # [draws, n]
  covered: np.ndarray  # [n]: whether the point is among the data


def fit_surface(
  effects: pd.DataFrame,
  set_name: str = 'in-domain',
  *,
  teacher_losses: Mapping[tuple[str, int], float] | None = None,
  draws: int = 400,
) -> Surface:
  """The gain surface over the distilled arms' effects.

  Args:
    effects: the grid's table of effects (arm - baseline, below 0 is better), one row a comparison.
    set_name: 'in-domain', 'OOD mean', or one set's name.
    teacher_losses: (teacher, teacher_tokens) -> the teacher's own bits per byte on the set; without them there is no law.
    draws: refits behind the intervals. Each redraws the effects from their errors and reweights the teachers (a Bayesian bootstrap
      over teachers: with three or four of them, drawing with replacement would lose a whole end of the axis).

  Raises UserError if there are no such effects.
  """
  frame, notes = _select(effects, set_name)
  cells, rng = _cells(frame, teacher_losses or {}), np.random.default_rng(0)
  basis = _basis(cells.x)
  penalty = _penalty(cells, basis)
  fits: dict[str, tuple[Estimator, Estimator]] = {}  # how to fit it afresh, and how on redrawn effects
  fits['ridge'] = lambda c: _ridge(c, basis, _penalty(c, basis)), lambda c: _ridge(c, basis, penalty)
  if missing := _law_lacks(cells):
    notes.append(f'a regularised surface, no scaling law, for want of: {missing}')
  else:
    start = _law(cells, rng)
    fits['law'] = (lambda c: _law(c, rng, start),) * 2
  predicted = {kind: _left_out(cells, afresh) for kind, (afresh, _) in fits.items()}
  errors = {kind: _rms(cells, values) for kind, values in predicted.items()}
  if len(errors) > 1:
    notes.append('left-out teachers: ' + ', '.join(f'{kind} {error:.4f} bits/byte' for kind, error in errors.items()))
  kind = min(errors, key=errors.__getitem__)
  refit = fits[kind][1]
  predictor = refit(cells)
  return Surface(
    frame=frame,
    lm_only=_lm_only(effects, set_name, frame),
    cells=cells,
    kind=kind,
    predictor=predictor,
    draws=tuple(refit(redrawn) for redrawn in _redrawn(cells, draws, rng)),
    left_out={'surface': errors[kind]} | _references(cells, basis),
    misfit=_misfit(cells, cells.gain - predictor(cells.x), cells.gain - predicted[kind]),
    fixed={i: float(frame[axis].iloc[0]) for i, axis in enumerate(AXES) if _distinct(cells.x[:, i]) == 1},
    notes=notes,
    set_name=set_name,
  )


def predict(surface: Surface, points) -> Prediction:
  """The gains at points [n, 5], in the units of AXES. What each teacher has of its own is drawn with the surface."""
  x = _logs(points)
  estimate, draws = surface.predictor(x), np.stack([draw(x) for draw in surface.draws])
  teachers, which = np.unique(x[:, :N_S].round(6), axis=0, return_inverse=True)
  own = np.random.default_rng(0).normal(size=(len(draws), len(teachers)))[:, which.ravel()]
  draws += surface.misfit * own * x[:, ALPHA] / surface.cells.x[:, ALPHA].mean()
  half = stats.norm.ppf((1 + LEVEL) / 2) * draws.std(axis=0)
  return Prediction(estimate, estimate - half, estimate + half, draws, _covered(surface, x))


def refusal(surface: Surface, axis: int, value: float) -> str:
  """Why the surface has nothing to say at this value of a size or a number of tokens; '' where it has."""
  one = surface.fixed.get(axis, value)
  if abs(np.log(value / one)) < SAME:
    return ''
  return f'the grid has one {WORDS[axis]} ({format_count(one)}): nothing is known of others'


def _select(effects: pd.DataFrame, set_name: str) -> tuple[pd.DataFrame, list[str]]:
  """The effects of one recipe on one set, and what was left out."""
  wanted = {'arm': 'distilled', 'measure': 'bits_per_byte', 'scenario': ''}  # a scenario: baselines of equal FLOPs
  distilled = effects[(effects[list(wanted)] == pd.Series(wanted)).all(axis=1)]
  frame, notes = distilled[distilled['set'] == set_name], []
  if frame.empty:
    sets = ', '.join(sorted(distilled['set'].unique())) or 'none: no distilled cell has finished'
    raise UserError(f'advisor: no effects of distilled students on {set_name!r}; there are {sets}')
  for column in (*PLAIN, *REGIMES):
    value = PLAIN.get(column, frame[column].mode().iloc[0])
    kept = frame[frame[column] == value]
    if kept.empty:
      raise UserError(f'advisor: no effects with {column} = {value!r}; there are {sorted(frame[column].unique())}')
    if len(kept) < len(frame):
      notes.append(f'{len(frame) - len(kept)} of {len(frame)} effects left out: {column} is not {value!r}')
    frame = kept
  usable = np.isfinite(frame['estimate']) & np.isfinite(frame['error']) & (frame['error'] > 0)
  if not usable.any():
    raise UserError('advisor: no effect has a standard error; run more seeds or score more documents')
  if not usable.all():
    notes.append(f'{(~usable).sum()} of {len(frame)} effects left out: they have no standard error')
  frame = frame[usable].reset_index(drop=True)
  if not frame['over'].str.contains('seeds').all():
    notes.append('errors of single-seed cells hold nothing of the variance between seeds: intervals are too narrow')
  return frame, notes


def _lm_only(effects: pd.DataFrame, set_name: str, frame: pd.DataFrame) -> pd.DataFrame:
  """Return the FLOP-matched students of the same data regime that have a standard error."""
  rows = effects[
    (effects['arm'] == 'flop_matched') & (effects['measure'] == 'bits_per_byte') & (effects['set'] == set_name)
  ]
  rows = rows[rows['distinct_tokens'] == frame['distinct_tokens'].iloc[0]]
  return rows[np.isfinite(rows['estimate']) & np.isfinite(rows['error'])]


def _cells(frame: pd.DataFrame, losses: Mapping[tuple[str, int], float]) -> Cells:
  keys = zip(frame['teacher'], frame['teacher_tokens'].astype(int), strict=True)
  df = frame['df'].fillna(1).clip(1, 1e6).to_numpy(float)
  variance = frame['error'].to_numpy(float) ** 2
  variance = (df * variance + PRIOR_DF * np.average(variance, weights=df)) / (df + PRIOR_DF)
  return Cells(
    x=_logs(frame[list(AXES)]),
    gain=-frame['estimate'].to_numpy(float),
    weight=1 / variance,
    teacher=frame.groupby(['teacher', 'teacher_tokens']).ngroup().to_numpy(),
    runs=frame.groupby(['student', 'student_tokens', 'seeds']).ngroup().to_numpy(),
    baseline=frame['baseline'].to_numpy(float),
    teacher_loss=np.asarray([losses.get(key, np.nan) for key in keys], float),
  )


def _logs(points) -> np.ndarray:
  points = np.asarray(points, float)
  return np.column_stack([np.log(points[:, :ALPHA]), points[:, ALPHA]])


def _distinct(values: np.ndarray) -> int:
  return 1 + int(np.sum(np.diff(np.sort(values)) > SAME))


def _covered(surface: Surface, x: np.ndarray) -> np.ndarray:
  """Return whether points are among the data: sizes and tokens in the hull of those seen together, alpha in the range seen."""
  seen, alphas = np.unique(surface.cells.x[:, :ALPHA].round(6), axis=0), surface.cells.x[:, ALPHA]
  hull = np.vstack([seen.T, np.full(len(seen), 100.0)])  # the last row: weights that sum to one, nearly exactly
  places, back = np.unique(x[:, :ALPHA].round(6), axis=0, return_inverse=True)
  inside = np.array([optimize.nnls(hull, np.append(place, 100.0))[1] < SAME for place in places])
  return inside[back.ravel()] & (x[:, ALPHA] > alphas.min() - 1e-6) & (x[:, ALPHA] < alphas.max() + 1e-6)


def _redrawn(cells: Cells, n: int, rng: np.random.Generator) -> Iterator[Cells]:
  """Effects redrawn from their errors, of which the baseline's part is common to its arms; teachers reweighted."""
  teachers = cells.teacher.max() + 1
  for _ in range(n):
    common, own = rng.normal(size=cells.runs.max() + 1)[cells.runs], rng.normal(size=len(cells.gain))
    noise = (np.sqrt(SHARED) * common + np.sqrt(1 - SHARED) * own) / np.sqrt(cells.weight)
    weight = cells.weight * teachers * rng.dirichlet(np.ones(teachers))[cells.teacher]
    yield cells._replace(gain=cells.gain + noise, weight=weight)


def _left_out(cells: Cells, estimator: Estimator) -> np.ndarray:
  """Every row's gain, predicted from the other teachers' rows; nan where there is no other teacher."""
  out = np.full(len(cells.gain), np.nan)
  teachers = np.unique(cells.teacher)
  for teacher in teachers if len(teachers) > 1 else ():
    held = cells.teacher == teacher
    out[held] = estimator(cells.rows(~held))(cells.x[held])
  return out


def _rms(cells: Cells, predicted: np.ndarray) -> float:
  return float(np.sqrt(np.average((predicted - cells.gain) ** 2, weights=cells.weight)))


def _misfit(cells: Cells, inside: np.ndarray, left_out: np.ndarray) -> float:
  """The standard deviation of teachers about the surface, beyond what the effects' errors explain.

  Of a linear fit, the product of a residual and the same one left out has the variance of one observation as its mean, whatever the
  leverage. Here an observation is a teacher's mean.
  """
  excess = []
  for teacher in np.unique(cells.teacher):
    own = cells.teacher == teacher
    noise = (1 - SHARED) * np.mean(1 / cells.weight[own]) / own.sum()
    excess.append(inside[own].mean() * left_out[own].mean() - noise)
  return float(np.sqrt(np.fmax(0.0, np.mean(excess))))  # 0 where nothing could be left out


# The ridge.


class Basis(NamedTuple):
  """Terms alpha^i * product of powers of standardised logs; those without a log are not penalised."""

  centre: np.ndarray  # [5]
  scale: np.ndarray  # [5]
  powers: np.ndarray  # [terms, 5]

  def __call__(self, x: np.ndarray) -> np.ndarray:
    z = (x - self.centre) / self.scale
    return np.stack([z**0, z, z**2])[self.powers, :, np.arange(5)].prod(axis=1).T

  @property
  def penalised(self) -> np.ndarray:
    return self.powers[:, :ALPHA].sum(axis=1) > 0


def _basis(x: np.ndarray) -> Basis:
  """The terms that the data can tell apart: none of an axis that does not vary, no square of one with two values."""
  values = [_distinct(column) for column in x.T]
  values[ALPHA] += 1  # the gain is known at alpha = 0 too
  products = itertools.product(*(range(min(n, 3)) for n in values))
  powers = [p for p in products if p[ALPHA] and sum(p[:ALPHA]) <= 2]
  centre, scale = x.mean(axis=0), x.std(axis=0)
  centre[ALPHA], scale[ALPHA] = 0, 1
  return Basis(centre, np.where(scale > SAME / 2, scale, 1.0), np.array(powers))


def _ridge(cells: Cells, basis: Basis, penalty: float) -> Predictor:
  linear = _linear(cells._replace(x=basis(cells.x)), penalty * basis.penalised)
  return lambda x: linear(basis(x))


def _linear(cells: Cells, penalties: np.ndarray) -> Predictor:
  weighted = cells.x.T * (cells.weight / cells.weight.sum())
  gram = weighted @ cells.x + np.diag(penalties + 1e-10)  # never quite singular
  beta = np.linalg.solve(gram, weighted @ cells.gain)
  return lambda x: x @ beta


def _penalty(cells: Cells, basis: Basis) -> float:
  """The penalty that predicts left-out teachers best."""
  terms = cells._replace(x=basis(cells.x))
  error = lambda penalty: _rms(cells, _left_out(terms, lambda c: _linear(c, penalty * basis.penalised)))
  return min(PENALTIES, key=error)


def _references(cells: Cells, basis: Basis) -> dict[str, float]:
  """Leave-one-teacher-out errors of what knows no teachers."""
  mean, alpha = np.zeros((1, 5), int), basis.powers[~basis.penalised]
  error = lambda powers: _rms(cells, _left_out(cells, lambda c: _ridge(c, basis._replace(powers=powers), 0.0)))
  return {'no gain': _rms(cells, np.zeros(len(cells.gain))), 'the mean gain': error(mean), 'alpha alone': error(alpha)}


# The law.


def _law_lacks(cells: Cells) -> str:
  """What the data lack for the law; '' where they suffice."""
  counts = {WORDS[axis]: _distinct(cells.x[:, axis]) for axis in range(ALPHA)}
  lacks = [f'{word}, {n} of {LAW_VALUES} distinct values' for word, n in counts.items() if n < LAW_VALUES]
  lacks += [f'{len(cells.gain)} of {LAW_ROWS} effects'] * (len(cells.gain) < LAW_ROWS)
  lacks += ["the teachers' own losses are not all known"] * (not np.isfinite(cells.teacher_loss).all())
  return '; '.join(lacks)


@dataclasses.dataclass(frozen=True)
class Law:
  """Both laws' constants, with what was measured, which goes before what a law says."""

  units: np.ndarray  # [2]: log N and log D at which A and B are stated
  measured: np.ndarray  # [m, 3]: log N, log D, loss
  supervised: np.ndarray  # [6]: log E, log A, a, log B, b, g
  distilled: np.ndarray  # [10]: c0, log c1, log d1, log f1, log A', a', log B', b', g', k

  def __call__(self, x: np.ndarray) -> np.ndarray:
    students = x[:, N_S:ALPHA]
    return _law_gain(self.distilled, students - self.units, x[:, ALPHA], self.loss(x[:, :N_S]), self.loss(students))

  def loss(self, sizes: np.ndarray) -> np.ndarray:
    """Bits per byte of LM-only models [n, 2] of (log N, log D)."""
    near = np.abs(sizes[:, None, :] - self.measured[None, :, :2]).max(axis=2) < SAME
    known = near @ self.measured[:, 2] / np.maximum(near.sum(axis=1), 1)
    return np.where(near.any(axis=1), known, _supervised(self.supervised, sizes - self.units))


def _power(theta: np.ndarray, sizes: np.ndarray) -> np.ndarray:
  """(A / N^a + B / D^b)^g."""
  log_a, a, log_b, b, g = theta
  return np.exp(g * np.logaddexp(log_a - a * sizes[:, 0], log_b - b * sizes[:, 1]))


def _supervised(theta: np.ndarray, sizes: np.ndarray) -> np.ndarray:
  return np.exp(theta[0]) + _power(theta[1:], sizes)


def _law_gain(theta, students: np.ndarray, alpha: np.ndarray, teacher: np.ndarray, student: np.ndarray) -> np.ndarray:
  """L_LM - L_S(alpha); teacher, student: the losses L_T and L_LM."""
  c0, k = theta[0], theta[9]
  c1, d1, f1 = np.exp(theta[1:4])
  gap = np.exp(-c1 * f1 * np.logaddexp(0.0, np.log(teacher / student / d1) / f1))
  law = teacher + teacher**-c0 * gap * _power(theta[4:9], students)
  return alpha * (student - law) + k * alpha * (1 - alpha)


def _law(cells: Cells, rng: np.random.Generator, start: Law | None = None) -> Law:
  """Both laws, from several starts, or from where a fit to all data ended."""
  teachers = np.column_stack([cells.x[:, :N_S], cells.teacher_loss])
  students = np.column_stack([cells.x[:, N_S:ALPHA], cells.baseline])
  measured = np.unique(np.vstack([teachers, students]).round(9), axis=0)
  units = start.units if start else measured[:, :2].mean(axis=0)
  known = students[:, :2] - units, cells.x[:, ALPHA], cells.teacher_loss, cells.baseline
  off = lambda theta: (_supervised(theta, measured[:, :2] - units) / measured[:, 2] - 1) / 0.01
  miss = lambda theta: np.sqrt(cells.weight) * (_law_gain(theta, *known) - cells.gain)
  supervised = _least(off, SUPERVISED_BOX, rng, start.supervised if start else None)
  return Law(units, measured, supervised, _least(miss, DISTILLED_BOX, rng, start.distilled if start else None))


def _least(residual, box, rng: np.random.Generator, start: np.ndarray | None) -> np.ndarray:
  """By Huber's loss."""
  low, high = np.transpose(box)
  starts = rng.uniform(low, high, size=(12, len(low))) if start is None else [start]
  options = {'bounds': (low, high), 'loss': 'huber', 'f_scale': 1.345, 'max_nfev': 200 if start is None else 20}
  return min((optimize.least_squares(residual, p, **options) for p in starts), key=lambda found: found.cost).x
