"""ConfigDicts and command lines -> the dataclasses, with every mistake and the nearest right name."""

import dataclasses
import difflib
import logging
import sys
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import ml_collections
import numpy as np

from kdjax.config import checks, fields
from kdjax.config.schema import Config, ModelConfig, as_dict
from kdjax.errors import ConfigError

log = logging.getLogger('kdjax')

T = typing.TypeVar('T')
LARGEST = sys.float_info.max


def default(config: Any = Config()) -> ml_collections.ConfigDict:
  """Every field with its default: where a config file starts."""
  return ml_collections.ConfigDict(as_dict(config), convert_dict=True)


def set_model(section: ml_collections.ConfigDict, model: ModelConfig) -> None:
  """Put a named model into a config's `teacher` or `student` section."""
  section.model = ml_collections.ConfigDict(as_dict(model))


def parse_arg(arg: str | None, **known: tuple[str, ...]) -> dict[str, str]:
  """`scale=paper` after a config file's colon -> {'scale': 'paper'}; a missing key gets its first known value."""
  values = {key: choices[0] for key, choices in known.items()}
  for part in filter(None, (arg or '').split(',')):
    key, _, value = part.partition('=')
    if key not in known:
      raise ConfigError([f"unknown argument '{key}' after the config file's colon{_nearest(key, known)}"])
    if value not in known[key]:
      raise ConfigError([f"unknown {key} '{value}'; known: {', '.join(known[key])}"])
    values[key] = value
  return values


def override(config: ml_collections.ConfigDict, overrides: Mapping[str, str], kind: type = Config) -> list[str]:
  """Apply `{'student.alpha': '0.4'}` in place; return the problems instead of raising at the first."""
  problems = []
  known, former = dict(leaves(kind, '')), fields.former_names(kind)
  for key, text in overrides.items():
    if key in former:
      log.warning('note: --config.%s is called --config.%s now', key, former[key])
      key = former[key]
    annotation = known.get(key)
    parent, _, leaf = key.rpartition('.')
    if annotation is None and str(known.get(parent)).startswith('dict'):
      annotation = str  # a mapping's values are free: --config.eval.ood.NAME=SOURCE
    if annotation is None:
      problems.append(f'--config.{key}: no such field{_nearest(key, known)}')
      continue
    try:
      value = _parse(text, annotation)
    except ValueError as e:
      problems.append(f'--config.{key}: expected {_expected(annotation, e)}, got {_shorten(text)}')
      continue
    node = config
    for name in parent.split('.') if parent else ():
      if not isinstance(
        node.get(name), ml_collections.ConfigDict
      ):  # the config file left the section out, or spoilt it
        with node.unlocked(), node.ignore_type():
          node[name] = ml_collections.ConfigDict()
      node = node[name]
    with node.unlocked(), node.ignore_type():
      node[leaf] = value
  return problems


def resolve(config: ml_collections.ConfigDict) -> Config:
  """The ConfigDict as frozen dataclasses, checked. Raises ConfigError with every problem found."""
  return resolve_as(Config, checks.problems, config)


def resolve_as(kind: type[T], check: Callable[[T], Iterable[str]], config: ml_collections.ConfigDict) -> T:
  """The same for any config dataclass and what checks it."""
  problems: list[str] = []
  built = _build(kind, config.to_dict(), '', problems)
  wrong = [
    problem.partition(':')[0] for problem in problems
  ]  # these have their default in `built`, so they say nothing more
  problems += [problem for problem in check(built) if not any(key in problem for key in wrong)]
  if problems:
    raise ConfigError(problems)
  return built


def leaves(cls: type, prefix: str) -> Iterator[tuple[str, Any]]:
  """(dotted name, annotation) of each leaf field."""
  hints = typing.get_type_hints(cls)
  for field in dataclasses.fields(cls):
    annotation = hints[field.name]
    if dataclasses.is_dataclass(annotation):
      yield from leaves(typing.cast(type, annotation), f'{prefix}{field.name}.')
    else:
      yield prefix + field.name, annotation


def _build(cls: type, values: Mapping[str, Any], prefix: str, problems: list[str]) -> Any:
  """The dataclass of a section; a field that is wrong adds a problem and keeps its default."""
  hints = typing.get_type_hints(cls)
  values = _with_names_of_today(cls, values, prefix, problems)
  known = {field.name for field in dataclasses.fields(cls)}
  problems += [f'{prefix}{key}: no such field{_nearest(key, known)}' for key in values if key not in known]
  built = {}
  for name in known & values.keys():
    annotation, value = hints[name], values[name]
    if dataclasses.is_dataclass(annotation):
      if isinstance(value, Mapping):
        built[name] = _build(typing.cast(type, annotation), value, f'{prefix}{name}.', problems)
      else:
        problems.append(f'{prefix}{name}: expected a section with fields, got {_shorten(value)}')
      continue
    try:
      built[name] = _convert(value, annotation)
    except ValueError as e:
      problems.append(f'{prefix}{name}: expected {_expected(annotation, e)}, got {_shorten(value)}')
  try:
    return cls(**built)
  except ConfigError as e:  # a section that checks itself
    problems += [f'{prefix}{problem.removeprefix(f"{cls.__name__}.")}' for problem in e.problems]
    return cls()


def _with_names_of_today(cls: type, values: Mapping[str, Any], prefix: str, problems: list[str]) -> dict[str, Any]:
  """Move a section's values from former names to the names of today. Two different values for one field are a problem."""
  renamed = dict(values)
  for each in dataclasses.fields(cls):
    former = fields.meta(each).formerly
    if former in renamed:
      value = renamed.pop(former)
      if renamed.get(each.name, each.default) not in (each.default, value):
        problems.append(f'{prefix}{former}: is called {each.name} now, which has another value; leave {former} out')
      else:
        renamed[each.name] = value
  return renamed


def _convert(value: Any, annotation: Any) -> Any:
  """Convert a value from a config file to the field's type. Raises ValueError if it has another type."""
  if isinstance(value, np.generic):
    value = value.item()
  origin = typing.get_origin(annotation)
  if origin is tuple:
    arguments = typing.get_args(annotation)
    if not isinstance(value, tuple | list):
      raise ValueError
    kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
    if len(kinds) != len(value):
      raise ValueError
    return tuple(_convert(v, kind) for v, kind in zip(value, kinds, strict=True))
  if origin is dict:
    if not isinstance(value, Mapping) or not all(isinstance(v, str) for v in (*value, *value.values())):
      raise ValueError
    return dict(value)
  if annotation is float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= LARGEST:
      raise ValueError
    return float(value)
  if annotation is int and isinstance(value, float) and value.is_integer():
    value = int(value)  # 1e9 tokens
  if annotation is int and isinstance(value, int) and abs(value) >= 2**63:
    raise _TooLarge
  if isinstance(value, annotation) and not (annotation is int and isinstance(value, bool)):
    return value
  raise ValueError


def _parse(text: str, annotation: Any) -> Any:
  """A command line's text as the field's type."""
  if annotation is str:
    return text
  if annotation is bool:
    return (
      {'true': True, 'false': False, '1': True, '0': False}[text.lower()]
      if text.lower() in ('true', 'false', '1', '0')
      else _bad()
    )
  if annotation is int:
    return _convert(float(text) if any(c in text.lower() for c in '.e') else int(text), int)
  if annotation is float:
    return _convert(float(text), float)
  kinds = typing.get_args(annotation)
  items = [item.strip().strip('\'"') for item in text.strip().strip('()[]').split(',') if item.strip()]
  return _convert(tuple(_parse(item, kinds[0]) for item in items), annotation)


def _shorten(value: Any) -> str:
  """Format a value for a message; a long one is cut."""
  try:
    text = repr(value)
  except ValueError:  # more digits than Python prints
    return f'a number of {value.bit_length()} bits'
  return text if len(text) <= 200 else f'{text[:197]}...'


def _bad() -> typing.NoReturn:
  raise ValueError


class _TooLarge(ValueError):
  """A whole number that does not fit 64 bits."""


def _expected(annotation: Any, error: ValueError) -> str:
  return 'whole numbers below 2^63' if isinstance(error, _TooLarge) else type_name(annotation)


def type_name(annotation: Any) -> str:
  known: dict[Any, str] = {
    int: 'a whole number',
    float: 'a number',
    str: 'text',
    bool: 'true or false',
    tuple[float, float]: 'two numbers',
    tuple[str, ...]: 'a list of names',
    tuple[int, ...]: 'a list of whole numbers',
    tuple[float, ...]: 'a list of numbers',
    dict[str, str]: 'entries (.NAME=TEXT)',
  }
  return known[annotation]


def _nearest(key: str, known: typing.Iterable[str]) -> str:
  near = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
  return f'; did you mean {near[0]}?' if near else ''
