"""What a grid compares, and its names: short ones for people, and exact ones for keys, which are unique."""

import dataclasses
import decimal
from collections.abc import Callable

UNITS = (('T', 10**12), ('B', 10**9), ('M', 10**6), ('k', 10**3))


def format_count(n: float) -> str:
  """Format a count with four digits: 50_000_000_000 -> '50B', 1_543_420 -> '1.543M'."""
  for unit, size in UNITS:
    if n >= size:
      return f'{n / size:.4g}{unit}'
  return f'{n:g}'


def format_exact_count(n: float) -> str:
  """Format a whole count exactly: like `format_count` if that is exact, else with more digits: 1_543_420 -> '1.54342M'."""
  for unit, size in UNITS:
    if n >= size and n == int(n):
      digits = (decimal.Decimal(int(n)) / size).normalize()
      return f'{digits:f}{unit}'
  return format_exact(n)


def format_exact(x: float) -> str:
  """Format a number so that it reads back as the same one: like '%g' if six digits are enough."""
  short = f'{x:g}'
  return short if float(short) == x else repr(float(x))


@dataclasses.dataclass(frozen=True)
class Setting:
  """One student's experiment without teacher, alpha and seed: everything compared within it shares this."""

  student: str
  student_tokens: int
  distinct_tokens: int
  split: bool = False  # the student gets one half of the documents, so that a teacher can get the other

  @property
  def name(self) -> str:
    """For people; two settings can share it."""
    return self._join(format_count)

  @property
  def key(self) -> str:
    """For tables; no two settings share it."""
    return self._join(format_exact_count)

  def _join(self, count: Callable[[float], str]) -> str:
    parts = [f'{self.student}-{count(self.student_tokens)}']
    parts += [f'of{count(self.distinct_tokens)}'] if self.distinct_tokens else []
    return '-'.join(parts + ['half'] * self.split)


@dataclasses.dataclass(frozen=True)
class Source:
  """What a student learns from besides the text: a teacher and how its targets are used. An empty teacher means token frequencies."""

  teacher: str = ''
  teacher_tokens: int = 0
  budget: str = ''
  teacher_data: str = ''
  temperature: float = 1.0
  top_k: float = 0.0
  mixing: str = 'normalised'

  @property
  def name(self) -> str:
    """For people; two sources can share it."""
    return self._join(format_count, lambda x: f'{x:g}')

  @property
  def key(self) -> str:
    """For tables; no two sources share it."""
    return self._join(format_exact_count, format_exact)

  def _join(self, count: Callable[[float], str], number: Callable[[float], str]) -> str:
    parts = [f'{self.teacher}-{count(self.teacher_tokens)}'] if self.teacher else ['unigram']
    parts += [self.budget] * (self.budget == 'trunk') + [self.teacher_data] * (self.teacher_data == 'disjoint')
    parts += [f'T{number(self.temperature)}'] * (self.temperature != 1) + [f'k{number(self.top_k)}'] * (self.top_k != 0)
    return '-'.join(parts + [self.mixing.replace('_', '-')] * (self.mixing != 'normalised'))


def pilot_key(setting: Setting, learner: Source | str) -> str:
  """Name what the pilot chooses one alpha (or one draw) for: a teacher's student, or a control."""
  return f'{setting.key}/{learner if isinstance(learner, str) else learner.key}'
