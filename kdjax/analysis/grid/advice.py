"""Format the advisor's answer as text, and parse the user's options."""

import dataclasses
import decimal

from kdjax.analysis.grid.advisor import Advice, Option
from kdjax.analysis.grid.surface import LEVEL, WORDS, Surface
from kdjax.analysis.table import align
from kdjax.config import ModelConfig
from kdjax.config.sizes import NAMED, named
from kdjax.errors import UserError
from kdjax.models import flops
from kdjax.sweeps.names import format_count

SHOWN = 10
UNITS = {'K': 10**3, 'M': 10**6, 'B': 10**9, 'T': 10**12}


def format_advice(advice: Advice) -> str:
  """Format the advice for the terminal."""
  a = advice
  asked = (
    f'Student of {format_count(a.student_params)} parameters (outside the embedding) on {format_count(a.student_tokens)} tokens; budget '
    f"{format_flops(a.budget_flops)} for the student's own training ({format_flops(a.student_flops)}), the teacher's logits and its training."
  )
  parts = [asked, '', *(_answer(a, a.choice, a.best) if a.choice and a.best else _no_answer(a))]
  if a.options:
    parts += ['', _table(a)]
  if a.runs:
    parts += ['', 'Runs that would help most:', *(f'- {run}' for run in a.runs)]
  return '\n'.join([*parts, '', *_fit_quality(a.surface), *(f'Note: {note}.' for note in a.surface.notes)])


def _answer(a: Advice, choice: Option, best: Option) -> list[str]:
  what = f'No teacher: train the LM-only student on {format_count(choice.student_tokens)} tokens.'
  if choice.teacher:
    what = (
      f'Use {choice.teacher} ({format_count(choice.teacher_params)} parameters) trained on {format_count(choice.teacher_tokens)} tokens, '
      f'alpha {choice.alpha:g}.'
    )
  against = f'against the LM-only student on {format_count(a.student_tokens)} tokens; below 0: better'
  measured = (
    'Predicted by the surface'
    if not choice.measured
    else f'Measured{", shrunk towards the surface" * bool(choice.teacher)}'
  )
  lines = [what, f'{measured}: {choice.interval}, {a.surface.set_name}, {against}.', *_cost(a, choice)]
  if choice is not best:
    lines.append(
      f'The best estimate is {best}: {best.interval}. The choice is expected to gain {best.gain - choice.gain:.4f} less, which is within the '
      f'declared margin of {a.margin:.0%} of that gain, and costs {1 - choice.cost() / best.cost():.0%} less.'
    )
  return lines


def _cost(a: Advice, choice: Option) -> list[str]:
  if not choice.teacher:
    return [f'Cost: {format_flops(choice.cost())}.']
  cost = f'Total cost: {format_flops(choice.cost(True))} if the teacher exists, {format_flops(choice.cost())} if it must be trained.'
  tokens = format_count(a.student_tokens * choice.cost() / a.student_flops)
  if a.lm_only_gain is None:
    return [f'{cost} An LM-only student of the same cost would train on {tokens} tokens; its gain was not measured.']
  return [f'{cost} The LM-only student of the same cost, on {tokens} tokens: {-a.lm_only_gain:+.4f} bits per byte.']


def _no_answer(a: Advice) -> list[str]:
  lines = ['The data do not support an answer:', *(f'- {reason}' for reason in a.reasons)]
  if a.best:
    lines.append(f'The best estimate is {a.best}: {a.best.interval}.')
  return lines


def _table(a: Advice) -> str:
  named_above = [o for o in (a.choice, a.best) if o is not None]
  shown = a.options[:SHOWN] + [o for o in dict.fromkeys(named_above) if o not in a.options[:SHOWN]]
  rows = [['option', 'difference', f'{LEVEL:.0%} interval', 'teacher exists', 'must be trained', '']]
  for o in shown:
    marks = ['choice'] * (o is a.choice) + ['measured'] * o.measured
    marks += ['OUTSIDE THE DATA: not recommended'] * o.extrapolated
    interval = f'[{o.low:+.4f}, {o.high:+.4f}]'
    rows.append([str(o), f'{o.difference:+.4f}', interval, f'{o.cost(True):.2e}', f'{o.cost():.2e}', ', '.join(marks)])
  return (
    f'{align(rows)}\ndifference: bits per byte minus the LM-only student on the same tokens, below 0: better. Costs: total FLOP, with the\n'
    f"student's. {len(shown)} of the {len(a.options)} options within the budget are shown; {a.over_budget} cost too much."
  )


def _fit_quality(s: Surface) -> list[str]:
  """Report what the surface was fitted on and how well it predicts."""
  words = lambda column: sorted(set(s.frame[column].str.split().explode()))
  kind = {'ridge': 'ridge surface', 'law': 'scaling law after Busbridge et al. (2025)'}[s.kind]
  fixed = ', '.join(f'{WORDS[axis]} {format_count(value)}' for axis, value in s.fixed.items())
  others = ', '.join(f'{words} {error:.4f}' for words, error in s.left_out.items() if words != 'surface')
  return [
    f'Fitted: a {kind} on {len(s.frame)} effects ({len(words("cells"))} cells, seeds {" ".join(words("seeds"))}) of '
    f'{s.n_teachers} teacher{"s" * (s.n_teachers > 1)}, bits per byte, {s.set_name}.',
    f'Leave-one-teacher-out error (RMSE, bits per byte): {s.left_out["surface"]:.4f}; of predicting {others}.'
    if s.n_teachers > 1
    else 'Leave-one-teacher-out error: not defined, there is only one teacher.',
    *([f'Not varied, so other values are unknown: {fixed}.'] if fixed else []),
  ]


def format_flops(number: float) -> str:
  return f'{number:.2e} FLOP'


def parse_count(text: str, what: str) -> int:
  """Parse '50B', '1.7b', '300M', '2e9' or '1_000' as an integer above 0. Raises UserError, which names `what`."""
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
  """Find a model by name ('tiny-1m') or by size ('1.7B': the size in its name, or its non-embedding parameters within 10%).

  Args:
    vocab_size: the grid's, for a model without a vocabulary size of its own.

  Raises UserError for an unknown name, and for a size that fits no known model or several.
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
