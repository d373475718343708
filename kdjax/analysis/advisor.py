"""Which teacher, trained how long, at which alpha: what the finished cells of a grid say, within a budget of FLOPs.

`fit` puts a surface over the gains (kdjax/analysis/surface.py); `advise` asks it about the teachers that could be had, and picks the cheapest
that cannot be told from the best. Where the surface is no better than knowing nothing of teachers, or the best may be no gain at all, the
advice is that there is none.
"""

import dataclasses
import decimal
from collections.abc import Iterator

import numpy as np

from kdjax import flops
from kdjax.analysis.surface import ALPHA, D_S, D_T, LEVEL, N_S, N_T, WORDS, Surface, fit, predict, refusal
from kdjax.analysis.table import align
from kdjax.config import ModelConfig
from kdjax.errors import UserError
from kdjax.grids.cells import count
from kdjax.models.named import NAMED, named

__all__ = ['Advice', 'Option', 'advise', 'family', 'fit', 'format', 'parse_count', 'parse_student']

MIN_TEACHERS = 3
ALPHAS = [i / 20 for i in range(1, 21)]  # those within the grid's range are tried, beside the grid's own
SHOWN = 8
UNITS = {'K': 10**3, 'M': 10**6, 'B': 10**9, 'T': 10**12}


@dataclasses.dataclass(frozen=True)
class Option:
  """A teacher at a budget, at the alpha that suits it best, with its cost."""

  teacher: str
  teacher_params: int  # outside the embedding
  teacher_tokens: int
  alpha: float
  alphas: tuple[float, float]  # from which to which alpha the gain cannot be told from the one at `alpha`
  gain: float  # bits per byte
  low: float
  high: float
  ledger: flops.Ledger
  in_grid: bool
  extrapolated: bool
  draws: np.ndarray = dataclasses.field(repr=False, compare=False)  # of the gain

  def __str__(self) -> str:
    return f'{self.teacher} at {count(self.teacher_tokens)} tokens, alpha {self.alpha:g}'

  @property
  def interval(self) -> str:
    return f'{self.gain:+.4f} bits per byte [{self.low:+.4f}, {self.high:+.4f}]'

  def cost(self, teacher_exists: bool = False) -> float:
    """FLOPs of the student's training, the teacher's logits and, unless it exists, the teacher's training."""
    return self.ledger.total(count_logits=True, count_pretraining=not teacher_exists)


@dataclasses.dataclass(frozen=True)
class Advice:
  """What to do, or why the data do not say. All gains are against the LM-only student on the same tokens."""

  surface: Surface
  student_params: int
  student_tokens: int
  student_flops: float
  budget_flops: float
  reasons: list[str]  # why there is no answer; empty where there is one
  choice: Option | None  # the cheapest that cannot be told from the best; None where there is no answer
  best: Option | None  # by predicted gain, among the options that are covered and within the budget
  options: list[Option]  # within the budget, best first, extrapolated ones included
  over_budget: int  # options that cost too much
  runs: list[str]  # which would help most

  @property
  def supported(self) -> bool:
    return not self.reasons


def advise(surface: Surface, student: ModelConfig, student_tokens: int, budget_flops: float, seq_len: int) -> Advice:
  """The teacher, budget and alpha to use.

  Args:
    student: with its vocabulary, which its teachers share.
    budget_flops: for the student's own training, the teacher's logits and the teacher's training.
    seq_len: the window, for the attention's FLOPs.

  Raises UserError for a student without a vocabulary.
  """
  if student.vocab_size < 1:
    raise UserError("advisor: the student's vocab_size is 0; give the tokenizer's")
  params = flops.count_params(student).non_embedding
  student_flops = flops.training_flops(student, seq_len) * student_tokens
  refusals = [why for why in (refusal(surface, N_S, params), refusal(surface, D_S, student_tokens)) if why]
  options = [] if refusals else _options(surface, student, student_tokens, seq_len)
  within = [option for option in options if option.cost() <= budget_flops]
  usable = [option for option in within if not option.extrapolated]
  reasons = refusals or [*_too_dear(options, within, student_flops, budget_flops), *_doubts(surface, options, within)]
  best = usable[0] if usable else None
  equals = [o for o in usable if o is best or (o.low > 0 and not _surely_above(usable[0].draws - o.draws))]
  return Advice(
    surface=surface,
    student_params=params,
    student_tokens=student_tokens,
    student_flops=student_flops,
    budget_flops=budget_flops,
    reasons=reasons,
    choice=None if reasons else min(equals, key=Option.cost),
    best=best,
    options=within,
    over_budget=len(options) - len(within),
    runs=_runs(surface, within, equals),
  )


def _options(surface: Surface, student: ModelConfig, student_tokens: int, seq_len: int) -> list[Option]:
  """One for each teacher and budget that could be had, best first."""
  places, alphas = list(_places(surface, student)), _alphas(surface)
  sizes = [flops.count_params(config).non_embedding for _, config, _ in places]
  student_size = flops.count_params(student).non_embedding
  points = [
    (size, place[2], student_size, student_tokens, alpha)
    for size, place in zip(sizes, places, strict=True)
    for alpha in alphas
  ]
  found = predict(surface, points)
  seen = set(zip(surface.frame['teacher'], surface.frame['teacher_tokens'].astype(int), strict=True))
  options = []
  for i, (name, config, tokens) in enumerate(places):
    rows = slice(i * len(alphas), (i + 1) * len(alphas))
    j = rows.start + int(found.gain[rows].argmax())
    as_good = alphas[~_surely_above(found.draws[:, [j]] - found.draws[:, rows])]
    options.append(
      Option(
        teacher=name,
        teacher_params=sizes[i],
        teacher_tokens=tokens,
        alpha=float(points[j][ALPHA]),
        alphas=(float(as_good[0]), float(as_good[-1])),
        gain=float(found.gain[j]),
        low=float(found.low[j]),
        high=float(found.high[j]),
        ledger=flops.ledger(student, config, student_tokens, tokens, seq_len),
        in_grid=(name, tokens) in seen,
        extrapolated=not found.covered[j],
        draws=found.draws[:, j],
      )
    )
  return sorted(options, key=lambda option: -option.gain)


def _places(surface: Surface, student: ModelConfig) -> Iterator[tuple[str, ModelConfig, int]]:
  """The known models of the families of the grid's teachers, at the grid's budgets, half-way between them and a factor of two beyond."""
  families = {family(name) for name in surface.frame['teacher']}
  seen = np.unique(surface.frame['teacher_tokens'].to_numpy(float))
  more = [] if D_T in surface.fixed else [np.sqrt(seen[1:] * seen[:-1]), seen[:1] / 2, seen[-1:] * 2]
  for name, config in NAMED.items():
    size = flops.count_params(config).non_embedding
    if family(name) in families and not refusal(surface, N_T, size):
      for tokens in np.concatenate([seen, *more]):
        same = dataclasses.replace(config, vocab_size=student.vocab_size, pad_vocab_to=student.pad_vocab_to)
        yield name, same, round(tokens)


def _alphas(surface: Surface) -> np.ndarray:
  seen = surface.cells.x[:, ALPHA]
  return np.union1d([a for a in ALPHAS if seen.min() < a < seen.max()], seen)


def _too_dear(options: list[Option], within: list[Option], student_flops: float, budget: float) -> list[str]:
  if within:
    return []
  if student_flops > budget:
    return [f"the student's own training costs {_flop(student_flops)}, more than the budget of {_flop(budget)}"]
  cost = min(option.cost() for option in options)
  return [f'no teacher fits: the cheapest comes to {_flop(cost)} with the student, the budget is {_flop(budget)}']


def _doubts(surface: Surface, options: list[Option], within: list[Option]) -> list[str]:
  """Why the data do not support an answer; empty where they do."""
  errors, n = surface.left_out, surface.n_teachers
  if n < MIN_TEACHERS:
    return [f'the grid has {_teachers(n)} (a size at a budget); it takes {MIN_TEACHERS} to say anything of another']
  reasons = [
    f'left-out teachers are predicted with an error of {errors["surface"]:.4f} bits per byte, no better than by predicting '
    f'{words} ({errors[words]:.4f})'
    for words in ('no gain', 'the mean gain')
    if errors['surface'] >= errors[words]
  ]
  usable = [option for option in within if not option.extrapolated]
  if not usable:
    return reasons + ['every candidate within the budget lies outside what the grid covers'] * bool(within)
  best = usable[0]
  if not _surely_helps(usable):
    reasons.append(
      f'the best prediction, {best}: {best.interval}, may be no gain at all: it is the best of {len(usable)}'
    )
  others = [option for option in options if not option.extrapolated and option is not best]
  if others and not any(_surely_above(best.draws - option.draws) for option in others):
    reasons.append(f'the best, {best}, cannot be told from any of the {len(others)} other teachers')
  return reasons


def _surely_above(draws: np.ndarray) -> np.ndarray:
  """Whether [draws, ...] are above 0, as far as their intervals tell."""
  return np.quantile(draws, (1 - LEVEL) / 2, axis=0) > 0


def _surely_helps(ranked: list[Option]) -> bool:
  """Whether the first's gain is above 0 in a band that holds for all at once, as the best of many must be asked."""
  draws, gains = np.stack([option.draws for option in ranked]), np.array([option.gain for option in ranked])
  errors = np.maximum(draws.std(axis=1), 1e-12)
  highest = ((draws - gains[:, None]) / errors[:, None]).max(axis=0)
  return bool(gains[0] > np.quantile(highest, (1 + LEVEL) / 2) * errors[0])


def _runs(surface: Surface, within: list[Option], equals: list[Option]) -> list[str]:
  """The runs that would tell most, the most pressing first."""
  lines = []
  if surface.n_teachers < MIN_TEACHERS:
    lines.append('more teachers, weaker and stronger than the student')
  for axis in (N_T, D_T, ALPHA):
    if axis in surface.fixed:
      lines.append(f'a second and a third {WORDS[axis]}: all cells have {count(surface.fixed[axis])}')
  beyond = [option for option in within if option.extrapolated and not (equals and option.gain <= equals[0].gain)]
  lines += [f'{o}: outside what the grid covers, and predicted to be better than all inside' for o in beyond[:1]]
  fresh = [option for option in equals if not option.in_grid]
  return lines + [f'{option}: may be as good as the best, and is not in the grid' for option in fresh[:1]]


def format(advice: Advice) -> str:
  """For the terminal."""
  a = advice
  asked = (
    f'Student of {count(a.student_params)} parameters (outside the embedding) on {count(a.student_tokens)} tokens; budget '
    f"{_flop(a.budget_flops)}, which must hold the student's own training ({_flop(a.student_flops)}), the teacher's logits and its training."
  )
  parts = [asked, '', *(_answer(a, a.choice, a.best) if a.choice and a.best else _no_answer(a))]
  if a.options:
    parts += ['', _table(a)]
  if a.runs:
    parts += ['', 'Runs that would tell most:', *(f'- {run}' for run in a.runs)]
  return '\n'.join([*parts, '', *_worth(a.surface), *(f'Note: {note}.' for note in a.surface.notes)])


def _answer(a: Advice, choice: Option, best: Option) -> list[str]:
  low, high = choice.alphas
  equal_tokens = a.student_tokens * choice.cost() / a.student_flops
  lines = [
    f'Use {choice.teacher} ({count(choice.teacher_params)} parameters) trained on {count(choice.teacher_tokens)} tokens, alpha '
    f'{choice.alpha:g}' + (f' ({low:g} to {high:g} cannot be told from it).' if low < high else '.'),
    f'Predicted gain: {choice.interval}, {a.surface.set_name}, against the LM-only student on the same tokens.',
    f'Cost in all: {_flop(choice.cost(True))} if the teacher exists, {_flop(choice.cost())} if it must be trained. '
    f'The LM-only student would spend as much on {count(equal_tokens)} tokens.',
  ]
  if choice is not best:
    lines.append(
      f'The highest prediction is {best}: {best.interval}. The two cannot be told apart, and the choice costs '
      f'{1 - choice.cost() / best.cost():.0%} less: it is the cheapest within the noise.'
    )
  if a.surface.left_out['surface'] >= a.surface.left_out['alpha alone']:
    lines.append(
      'Caution: left-out teachers are predicted no better than by alpha alone: the data hardly tell teachers apart.'
    )
  return lines


def _no_answer(a: Advice) -> list[str]:
  gain = np.average(a.surface.cells.gain, weights=a.surface.cells.weight)
  mean = f'The mean gain of all distilled arms, {a.surface.set_name}: {gain:+.4f} bits per byte.'
  return ['The data do not support an answer:', *(f'- {reason}' for reason in a.reasons), mean]


def _table(a: Advice) -> str:
  shown = a.options[:SHOWN] + [
    o for o in {id(o): o for o in (a.choice, a.best) if o}.values() if o not in a.options[:SHOWN]
  ]
  rows = [['teacher', 'tokens', 'alpha', 'gain', f'{LEVEL:.0%} interval', 'teacher exists', 'must be trained', '']]
  for o in shown:
    marks = ['choice'] * (o is a.choice) + ['in the grid'] * o.in_grid
    marks += ['OUTSIDE THE DATA: not recommended'] * o.extrapolated
    numbers = [
      f'{o.alpha:g}',
      f'{o.gain:+.4f}',
      f'[{o.low:+.4f}, {o.high:+.4f}]',
      f'{o.cost(True):.2e}',
      f'{o.cost():.2e}',
    ]
    rows.append([o.teacher, count(o.teacher_tokens), *numbers, ', '.join(marks)])
  return (
    f'{align(rows)}\ngain: bits per byte saved, above 0 is better, at the alpha that suits the teacher best; costs: FLOP in all, the student '
    f'included. {len(shown)} of {len(a.options)} teachers and budgets that fit the budget are shown; {a.over_budget} cost too much.'
  )


def _worth(s: Surface) -> list[str]:
  """What the surface was fitted on and how well it predicts."""
  words = lambda column: sorted(set(s.frame[column].str.split().explode()))
  kind = {'ridge': 'ridge surface', 'law': 'scaling law after Busbridge et al. (2025)'}[s.kind]
  fixed = ', '.join(f'{WORDS[axis]} {count(value)}' for axis, value in s.fixed.items())
  others = ', '.join(f'{words} {error:.4f}' for words, error in s.left_out.items() if words != 'surface')
  return [
    f'Fitted: a {kind} on {len(s.frame)} effects ({len(words("cells"))} cells, seeds {" ".join(words("seeds"))}) of '
    f'{_teachers(s.n_teachers)}, bits per byte, {s.set_name}.',
    f'Leave-one-teacher-out error (RMSE, bits per byte): {s.left_out["surface"]:.4f}; of predicting {others}.'
    if s.n_teachers > 1
    else 'Leave-one-teacher-out error: there is one teacher.',
    *([f'Not varied, so nothing is known of other values: {fixed}.'] if fixed else []),
  ]


def _teachers(n: int) -> str:
  return f'{n} teacher{"s" * (n > 1)}'


def _flop(number: float) -> str:
  return f'{number:.2e} FLOP'


def parse_count(text: str, what: str) -> int:
  """'50B', '1.7b', '300M', '2e9', '1_000' -> an integer above 0. Raises UserError, which names `what`."""
  clean = text.strip().replace('_', '').upper()
  unit = clean[-1:] if clean[-1:] in UNITS else ''
  try:
    number = decimal.Decimal(clean.removesuffix(unit)) * UNITS.get(unit, 1)
    whole = 1 <= number < 10**30 and number == int(number)
  except decimal.DecimalException:
    whole = False
  if not whole:
    raise UserError(f"{what}: '{text}' is not a whole number from 1 to 1e30; write 50B, 300M or 2.5e9")
  return int(number)


def parse_student(text: str, vocab_size: int) -> ModelConfig:
  """'tiny-1m' or a size, '1.7B': that of a name, or a count outside the embedding within a tenth.

  Args:
    vocab_size: of a model that has none of its own, as in the grid.

  Raises UserError for an unknown name, and for a size that no known model has, or more than one.
  """
  name = text if text in NAMED or not text[:1].isdigit() else _of_size(text)
  model = named(name)
  return model if model.vocab_size else dataclasses.replace(model, vocab_size=vocab_size)


def _of_size(text: str) -> str:
  size = parse_count(text, '--student')
  labelled = [name for name in NAMED if parse_count(name.rpartition('-')[2], name) == size]
  near = labelled or [n for n, c in NAMED.items() if abs(flops.count_params(c).non_embedding / size - 1) < 0.1]
  if len(near) != 1:
    problem = f'more than one known model has {text}' if near else f'no known model has {text} parameters'
    raise UserError(f'--student: {problem}; name one of {", ".join(near or NAMED)}')
  return near[0]


def family(name: str) -> str:
  """'tiny-1m' -> 'tiny'."""
  return name.rpartition('-')[0] or name
