"""Choose a teacher, its training tokens and alpha within a FLOP budget, from the finished cells of a grid.

There are three kinds of options: measured arms, teachers between them that a surface predicts (kdjax/analysis/grid/surface.py), and LM-only students
that spent a teacher's FLOPs on more tokens.

The estimate of a measured arm is shrunk towards the surface. How far depends on the surface's error on left-out teachers. No prediction exceeds
the best measured arm. The best option has the least expected regret. The choice is the cheapest option whose expected gain is within a declared
margin of the best. There is no answer if the best gain may be 0 in a simultaneous interval over all options.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from kdjax.analysis.grid.surface import (
  ALPHA,
  D_S,
  D_T,
  LEVEL,
  N_S,
  N_T,
  PRIOR_DF,
  SAME,
  SHARED,
  WORDS,
  Surface,
  fit_surface,
  predict,
  refusal,
)
from kdjax.config import ModelConfig
from kdjax.config.sizes import NAMED
from kdjax.errors import UserError
from kdjax.models import flops
from kdjax.sweeps.names import format_count

__all__ = ['MARGIN', 'Advice', 'Option', 'advise', 'family', 'fit_surface']

MARGIN = 0.05  # the expected loss that a cheaper choice may have, as a share of the best option's gain
MIN_TEACHERS = 3  # with fewer, no surface predicts the teachers between the measured ones
ALPHAS = [i / 20 for i in range(1, 21)]  # tried for unmeasured teachers, within the grid's range


@dataclasses.dataclass(frozen=True)
class Option:
  """A teacher with its training tokens and an alpha, or (without a teacher) more tokens for the LM-only student."""

  gain: float  # expected, bits per byte saved against the LM-only student on the same tokens
  ledger: flops.Ledger
  student_tokens: int
  draws: np.ndarray = dataclasses.field(repr=False, compare=False)  # of the gain, joint with the other options' draws
  teacher: str = ''
  teacher_params: int = 0  # outside the embedding
  teacher_tokens: int = 0
  alpha: float = 0.0
  measured: bool = True
  extrapolated: bool = False

  def __str__(self) -> str:
    if not self.teacher:
      return f'LM-only on {format_count(self.student_tokens)} tokens'
    return f'{self.teacher} at {format_count(self.teacher_tokens)} tokens, alpha {self.alpha:g}'

  @property
  def difference(self) -> float:
    """The option minus the LM-only student, as in every table: below 0 is better."""
    return -self.gain

  @property
  def low(self) -> float:
    return -float(np.quantile(self.draws, (1 + LEVEL) / 2))

  @property
  def high(self) -> float:
    return -float(np.quantile(self.draws, (1 - LEVEL) / 2))

  @property
  def interval(self) -> str:
    return f'{self.difference:+.4f} bits per byte [{self.low:+.4f}, {self.high:+.4f}]'

  def cost(self, teacher_exists: bool = False) -> float:
    """FLOPs of the student's training, the teacher's logits and, unless it exists, the teacher's training."""
    return self.ledger.total(count_logits=True, count_pretraining=not teacher_exists)


@dataclasses.dataclass(frozen=True)
class Advice:
  """The chosen option, or the reasons why the data do not support one."""

  surface: Surface
  student_params: int
  student_tokens: int
  student_flops: float
  budget_flops: float
  margin: float
  reasons: list[str]  # why there is no answer; empty where there is one
  choice: Option | None  # the cheapest option within the margin of the best; None if there is no answer
  best: Option | None  # least expected regret, among the covered options within the budget
  lm_only_gain: float | None  # of the LM-only student of the choice's cost; None if it was not measured
  options: list[Option]  # within the budget, best first, extrapolated ones included
  over_budget: int  # options that cost too much
  runs: list[str]  # the runs that would help most

  @property
  def supported(self) -> bool:
    return not self.reasons


def advise(
  surface: Surface,
  student: ModelConfig,
  student_tokens: int,
  budget_flops: float,
  seq_len: int,
  margin: float = MARGIN,
) -> Advice:
  """Choose a teacher, its training tokens and alpha, or more tokens instead of a teacher.

  Args:
    student: its config, with the vocabulary that its teachers share.
    budget_flops: for the student's own training, the teacher's logits and the teacher's training.
    seq_len: the window, for the attention's FLOPs.
    margin: the expected loss that a cheaper choice may have, as a share of the best option's gain.

  Raises UserError for a student without a vocabulary, and for a margin outside [0, 1).
  """
  if student.vocab_size < 1:
    raise UserError("advisor: the student's vocab_size is 0; give the tokenizer's")
  if not 0 <= margin < 1:
    raise UserError(f'advisor: margin must be a share of the best gain, in [0, 1), got {margin:g}')
  params = flops.count_params(student).non_embedding
  student_flops = flops.training_flops(student, seq_len) * student_tokens
  refusals = [why for why in (refusal(surface, N_S, params), refusal(surface, D_S, student_tokens)) if why]
  options = [] if refusals else _options(surface, student, student_tokens, seq_len)
  within = [option for option in options if option.cost() <= budget_flops]
  usable = [option for option in within if not option.extrapolated]
  best = usable[0] if usable else None
  reasons = refusals or [*_too_dear(options, within, student_flops, budget_flops), *_doubts(usable, within)]
  near = [option for option in usable if best and option.gain >= (1 - margin) * best.gain]
  choice = min(near, key=Option.cost) if near and not reasons else None
  return Advice(
    surface=surface,
    student_params=params,
    student_tokens=student_tokens,
    student_flops=student_flops,
    budget_flops=budget_flops,
    margin=margin,
    reasons=reasons,
    choice=choice,
    best=best,
    lm_only_gain=_lm_only_gain(options, choice.cost(), student_flops) if choice else None,
    options=within,
    over_budget=len(options) - len(within),
    runs=_runs(surface, options, within, near),
  )


def _options(surface: Surface, student: ModelConfig, student_tokens: int, seq_len: int) -> list[Option]:
  """List all options, the greatest expected gain first."""
  rng = np.random.default_rng(0)
  measured = _measured_options(surface, student, student_tokens, seq_len, rng)
  bound = max((option.gain for option in measured), default=np.inf)
  found = measured + _predicted_options(surface, student, student_tokens, seq_len, bound)
  return sorted(found, key=lambda option: -option.gain)


def _measured_options(surface: Surface, student: ModelConfig, student_tokens: int, seq_len: int, rng) -> list[Option]:
  """List this student's measured arms, and its LM-only students on more tokens."""
  common = rng.normal(size=(len(surface.draws), 1))  # the baseline's noise, which all options share
  wide = _heavy_tails(surface, rng)
  arms = _arms(surface, student, student_tokens)
  out = []
  if len(arms):
    own, error = _shrink(surface, arms)
    noise = np.sqrt(SHARED) * arms['error'].to_numpy() * common + error * rng.normal(size=(len(common), len(arms)))
    draws = own + wide * noise
    for row, gain, drawn in zip(arms.itertuples(), own, draws.T, strict=True):
      teacher = _with_vocabulary(NAMED[row.teacher], student) if row.teacher in NAMED else None
      if teacher is not None:
        ledger = flops.ledger(student, teacher, student_tokens, row.teacher_tokens, seq_len)
        size = flops.count_params(teacher).non_embedding
        out.append(
          Option(
            float(gain), ledger, student_tokens, drawn, row.teacher, size, int(row.teacher_tokens), float(row.alpha)
          )
        )
  for row in _lm_only(surface, student, student_tokens).itertuples():
    tokens = round(row.student_flops / flops.training_flops(student, seq_len))
    noise = row.error * (np.sqrt(SHARED) * common + np.sqrt(1 - SHARED) * rng.normal(size=common.shape))
    ledger = flops.Ledger(row.student_flops, 0.0, 0.0)
    out.append(Option(-row.estimate, ledger, tokens, -row.estimate + (wide * noise)[:, 0]))
  return out


def _arms(surface: Surface, student: ModelConfig, student_tokens: int):
  """Return the surface's rows for this student, one per teacher, budget and alpha; repeats are averaged by precision."""
  frame, size = surface.frame, flops.count_params(student).non_embedding
  same = np.abs(np.log(frame['student_params'] / size)) < SAME
  mine = frame[same & (np.abs(np.log(frame['student_tokens'] / student_tokens)) < SAME)]
  mine = mine.assign(weight=surface.cells.weight[mine.index], estimate=mine['estimate'])
  mine = mine.assign(weighted=mine['weight'] * mine['estimate'])
  keys = ['teacher', 'teacher_tokens', 'teacher_params', 'student_params', 'student_tokens', 'alpha']
  arms = mine.groupby(keys, as_index=False)[['weight', 'weighted']].sum()
  return arms.assign(gain=-arms['weighted'] / arms['weight'], error=arms['weight'] ** -0.5)


def _shrink(surface: Surface, arms) -> tuple[np.ndarray, np.ndarray]:
  """Shrink each arm's measurement towards the surface; return (expected gains, standard errors without the shared part)."""
  measured, own = arms['gain'].to_numpy(), (1 - SHARED) * arms['error'].to_numpy() ** 2
  if surface.n_teachers < MIN_TEACHERS:
    return measured, np.sqrt(own)
  points = arms[['teacher_params', 'teacher_tokens', 'student_params', 'student_tokens', 'alpha']].to_numpy(float)
  found = predict(surface, points)
  doubt = found.draws.var(axis=0) + surface.left_out['surface'] ** 2
  trust = doubt / (doubt + own)
  return found.gain + trust * (measured - found.gain), np.sqrt(trust * own)


def _heavy_tails(surface: Surface, rng) -> np.ndarray:
  """Return factors [draws, 1] that make normal draws t distributed, because the standard errors are estimates."""
  df = PRIOR_DF + float(surface.frame['df'].fillna(1).clip(1, 1e6).median())
  return np.sqrt(df / rng.chisquare(df, size=(len(surface.draws), 1)))


def _lm_only(surface: Surface, student: ModelConfig, student_tokens: int):
  """Return the rows of FLOP-matched LM-only students, each run once."""
  frame, size = surface.lm_only, flops.count_params(student).non_embedding
  same = np.abs(np.log(frame['student_params'] / size)) < SAME
  return frame[same & (np.abs(np.log(frame['student_tokens'] / student_tokens)) < SAME)].drop_duplicates('cells')


def _lm_only_gain(options: list[Option], cost: float, student_flops: float) -> float | None:
  """Interpolate the gain of an LM-only student of this cost, linearly in the logarithm of its FLOPs."""
  known = sorted((option.cost(), option.gain) for option in options if not option.teacher)
  if not known or cost > known[-1][0] * (1 + SAME):
    return None
  costs, gains = zip((student_flops, 0.0), *known, strict=True)
  return float(np.interp(np.log(cost), np.log(costs), gains))


def _predicted_options(
  surface: Surface, student: ModelConfig, student_tokens: int, seq_len: int, bound: float
) -> list[Option]:
  """List unmeasured teachers, each at its best alpha; none if the surface predicts left-out teachers no better than a constant does."""
  errors = surface.left_out
  if surface.n_teachers < MIN_TEACHERS or errors['surface'] >= min(errors['no gain'], errors['the mean gain']):
    return []
  seen = set(zip(surface.frame['teacher'], surface.frame['teacher_tokens'].astype(int), strict=True))
  places, alphas = [p for p in _places(surface, student) if (p[0], p[2]) not in seen], _alphas(surface)
  student_size = flops.count_params(student).non_embedding
  out = []
  for name, config, tokens in places:
    size = flops.count_params(config).non_embedding
    found = predict(surface, [(size, tokens, student_size, student_tokens, alpha) for alpha in alphas])
    j = int(found.gain.argmax())
    gain = float(found.gain[j]) if not found.covered[j] else min(float(found.gain[j]), bound)
    ledger = flops.ledger(student, config, student_tokens, tokens, seq_len)
    draws = found.draws[:, j] + gain - found.gain[j]
    extrapolated = not found.covered[j]
    out.append(Option(gain, ledger, student_tokens, draws, name, size, tokens, float(alphas[j]), False, extrapolated))
  return out


def _places(surface: Surface, student: ModelConfig) -> Iterator[tuple[str, ModelConfig, int]]:
  """The known models of the families of the grid's teachers, at the grid's budgets, half-way between them and a factor of two beyond."""
  families = {family(name) for name in surface.frame['teacher']}
  seen = np.unique(surface.frame['teacher_tokens'].to_numpy(float))
  more = [] if D_T in surface.fixed else [np.sqrt(seen[1:] * seen[:-1]), seen[:1] / 2, seen[-1:] * 2]
  for name, config in NAMED.items():
    size = flops.count_params(config).non_embedding
    if family(name) in families and not refusal(surface, N_T, size):
      for tokens in np.concatenate([seen, *more]):
        yield name, _with_vocabulary(config, student), round(tokens)


def _with_vocabulary(model: ModelConfig, student: ModelConfig) -> ModelConfig:
  return dataclasses.replace(model, vocab_size=student.vocab_size, pad_vocab_to=student.pad_vocab_to)


def _alphas(surface: Surface) -> np.ndarray:
  seen = surface.cells.x[:, ALPHA]
  return np.union1d([a for a in ALPHAS if seen.min() < a < seen.max()], seen)


def _too_dear(options: list[Option], within: list[Option], student_flops: float, budget: float) -> list[str]:
  if within:
    return []
  if student_flops > budget:
    return [f"the student's own training costs {student_flops:.2e} FLOP, more than the budget of {budget:.2e} FLOP"]
  cost = min(option.cost() for option in options)
  return [f'no option fits: the cheapest costs {cost:.2e} FLOP with the student, the budget is {budget:.2e} FLOP']


def _doubts(usable: list[Option], within: list[Option]) -> list[str]:
  """List the reasons why the data do not support an answer."""
  if not usable:
    return ['every option within the budget is outside the range that the grid covers'] * bool(within)
  best = usable[0]
  if best.gain <= 0:
    return [f'no option helps: the best of {len(usable)} is {best}: {best.interval}']
  if not _surely_helps(usable):
    return [f'the best of {len(usable)}, {best}: {best.interval}, may be no gain at all']
  return []


def _surely_helps(ranked: list[Option]) -> bool:
  """Return whether the first's gain is above 0 in a band that holds for all at once, as the best of many must be asked."""
  draws, gains = np.stack([option.draws for option in ranked]), np.array([option.gain for option in ranked])
  errors = np.maximum(draws.std(axis=1), 1e-12)
  highest = ((draws - gains[:, None]) / errors[:, None]).max(axis=0)
  return bool(gains[0] > np.quantile(highest, (1 + LEVEL) / 2) * errors[0])


def _runs(surface: Surface, options: list[Option], within: list[Option], near: list[Option]) -> list[str]:
  """List the runs that would help most, the most useful first."""
  lines = []
  if surface.n_teachers < MIN_TEACHERS:
    lines.append('more teachers, weaker and stronger than the student')
  if options and all(option.teacher for option in options):
    lines.append(
      'LM-only students at equal FLOPs (controls.flop_matched), to see whether more text is better than a teacher'
    )
  for axis in (N_T, D_T, ALPHA):
    if axis in surface.fixed:
      lines.append(f'a second and a third {WORDS[axis]}: all cells have {format_count(surface.fixed[axis])}')
  beyond = [o for o in within if o.extrapolated and not (near and o.gain <= near[0].gain)]
  lines += [
    f'{o}: outside the range that the grid covers, and predicted to be better than every option inside it'
    for o in beyond[:1]
  ]
  fresh = [o for o in near if not o.measured]
  return lines + [f'{o}: not measured, and may be as good as the best' for o in fresh[:1]]


def family(name: str) -> str:
  """'tiny-1m' -> 'tiny'."""
  return name.rpartition('-')[0] or name
