"""What a config field means, declared with the field: its help, its unit, what it accepts, and whether results depend on it.

Identities, checks, `--help-config` and the documentation are generated from these declarations; no other list names a field.
"""

import dataclasses
import numbers
from collections.abc import Callable, Iterator, Mapping
from typing import Any

KEY = 'kdjax'
ABSENT = object()


@dataclasses.dataclass(frozen=True)
class Meta:
  """The declaration of a field.

  Attributes:
    help: one line.
    unit: of a number, e.g. 'tokens'.
    choices: the texts that it accepts; (): any.
    above, at_least, below, at_most: bounds of a number.
    result: whether results depend on it. A field that changes only speed, memory or places is not part of an identity.
    implied: the value that earlier versions used before the field existed. At this value it is not part of an identity, so earlier runs
      keep theirs.
    since: the version that added such a field.
    formerly: an earlier name, which configs may still use and identities keep.
    precision: it is the number format of a model's weights or computation, which a folder of weights does not decide.
    corpus: what a corpus depends on it for: 'documents', 'tokenizer', 'caps' or 'sets'; '': nothing.
  """

  help: str = ''
  unit: str = ''
  choices: tuple[str, ...] = ()
  above: float | None = None
  at_least: float | None = None
  below: float | None = None
  at_most: float | None = None
  result: bool = True
  implied: Any = ABSENT
  since: str = ''
  formerly: str = ''
  precision: bool = False
  corpus: str = ''


def field(default: Any, help: str = '', **declared: Any) -> Any:
  """A dataclass field with its declaration; see Meta. A dict is copied for each instance."""
  metadata = {KEY: Meta(help, **declared)}
  if isinstance(default, dict):
    return dataclasses.field(default_factory=default.copy, metadata=metadata)
  return dataclasses.field(default=default, metadata=metadata)


def meta(of: dataclasses.Field) -> Meta:
  """The declaration of a field; an empty one if it was declared without `field`."""
  return of.metadata.get(KEY, Meta())


def recorded_name(of: dataclasses.Field) -> str:
  """The name of a field in identities: the one that it had at first."""
  return meta(of).formerly or of.name


def sections(kind: type, prefix: str = '') -> Iterator[tuple[type, str]]:
  """(section, prefix of its fields' dotted names) of a config and of all sections in it."""
  yield kind, prefix
  for each in dataclasses.fields(kind):
    if dataclasses.is_dataclass(each.default):
      yield from sections(type(each.default), f'{prefix}{each.name}.')


def names(section: Any, holds: Callable[[Meta], bool]) -> tuple[str, ...]:
  """Names of the fields of a config section (a class or an instance) whose declaration satisfies `holds`."""
  return tuple(each.name for each in dataclasses.fields(section) if holds(meta(each)))


def choices(section: Any, name: str) -> tuple[str, ...]:
  """The texts that a field accepts."""
  return next(meta(each).choices for each in dataclasses.fields(section) if each.name == name)


def identity(section: Any) -> dict[str, Any]:
  """What results depend on in a config section: its fields, recursively, without those that change no result or are at their implied value."""
  kept = {}
  for each in dataclasses.fields(section):
    value, declared = getattr(section, each.name), meta(each)
    if dataclasses.is_dataclass(value):
      value = identity(value)
      if not value:  # a section without such fields
        continue
    if declared.result and (declared.implied is ABSENT or value != declared.implied):
      kept[recorded_name(each)] = value
  return kept


def former_names(kind: type) -> dict[str, str]:
  """Map each former dotted name of a config's fields to the name of today."""
  return {
    prefix + meta(each).formerly: prefix + each.name
    for section, prefix in sections(kind)
    for each in dataclasses.fields(section)
    if meta(each).formerly
  }


def without_implied(known: Mapping[str, Any], section: Any) -> dict[str, Any]:
  """A recorded identity of a section of this class as `identity` would give it: some versions recorded fields at their implied value."""
  kept = dict(known)
  for each in dataclasses.fields(section):
    name, declared, inner = recorded_name(each), meta(each), each.default
    if name not in kept:
      continue
    if not declared.result or (declared.implied is not ABSENT and _plain(declared.implied) == _plain(kept[name])):
      del kept[name]
    elif dataclasses.is_dataclass(inner) and isinstance(kept[name], Mapping):
      kept[name] = without_implied(kept[name], inner)
  return kept


def problems(section: Any, prefix: str = '') -> Iterator[str]:
  """Yield 'field: problem' for each value of a section, recursively, that is not among its choices or out of its bounds."""
  for each in dataclasses.fields(section):
    value, declared, key = getattr(section, each.name), meta(each), prefix + each.name
    if dataclasses.is_dataclass(value):
      yield from problems(value, f'{key}.')
      continue
    for one in value if isinstance(value, tuple) else (value,):
      if declared.choices and (not isinstance(one, str) or one not in declared.choices):
        yield f'{key}: unknown value {one!r}; known: {", ".join(declared.choices)}'
      elif isinstance(one, numbers.Real) and not in_bounds(declared, one):
        yield f'{key}: must be {bounds(declared)}, got {one if isinstance(one, int) else f"{float(one):g}"}'


def in_bounds(declared: Meta, value: Any) -> bool:
  return (
    (declared.above is None or value > declared.above)
    and (declared.at_least is None or value >= declared.at_least)
    and (declared.below is None or value < declared.below)
    and (declared.at_most is None or value <= declared.at_most)
  )


def bounds(declared: Meta) -> str:
  """The bounds of a number in words: 'above 0', 'in [0, 1)'; '' if it has none."""
  low = declared.above if declared.at_least is None else declared.at_least
  high = declared.below if declared.at_most is None else declared.at_most
  if low is None and high is None:
    return ''
  if high is None:
    return f'above {low:g}' if declared.at_least is None else f'at least {low:g}'
  if low is None:
    return f'below {_power(high)}' if declared.at_most is None else f'at most {_power(high)}'
  opening, closing = '(' if declared.at_least is None else '[', ')' if declared.at_most is None else ']'
  return f'in {opening}{low:g}, {_power(high)}{closing}'


def _power(number: float) -> str:
  exponent = int(number).bit_length() - 1
  return f'2^{exponent}' if number > 1e6 and number == 2**exponent else f'{number:g}'


def _plain(value: Any) -> Any:
  """As JSON has it: a tuple is a list."""
  return list(value) if isinstance(value, tuple) else value
