"""Describe the fields of a config from their declarations: for the command line, and as Markdown for the documentation."""

import dataclasses
import textwrap
from collections.abc import Sequence
from typing import Any

from kdjax.config import fields
from kdjax.config.fields import ABSENT, Meta
from kdjax.config.reading import type_name
from kdjax.errors import UserError

WIDTH = 110


def help_text(kind: type, prefix: str = '') -> str:
  """The fields whose dotted name begins with `prefix`, by section. Raises UserError if there are none."""
  lines = []
  for section, name in fields.sections(kind):
    shown = [each for each in _leaves(section) if f'{name}{each.name}'.startswith(prefix)]
    if not shown:
      continue
    lines += ['', f'{name.rstrip(".") or kind.__name__}: {_summary(section)}']
    for each in shown:
      lines.append(f'  --config.{name}{each.name}={format_value(each.default)}')
      lines += textwrap.wrap(
        _details(each), WIDTH, initial_indent=' ' * 8, subsequent_indent=' ' * 8, break_on_hyphens=False
      )
  if not lines:
    names = ', '.join(sorted({name.partition('.')[0] for _, name in fields.sections(kind)} - {''}))
    raise UserError(f'--help-config: no field begins with {prefix!r}; sections: {names}')
  return '\n'.join(lines[1:])


def markdown(kind: type, without: Sequence[str] = ()) -> str:
  """The fields as Markdown: a heading and a table for each section, but for those that are left out."""
  sections = [(section, name) for section, name in fields.sections(kind) if name.partition('.')[0] not in without]
  return '\n\n'.join(_markdown_section(section, name, kind) for section, name in sections) + '\n'


def _markdown_section(section: type, name: str, kind: type) -> str:
  rows = [('field', 'default', 'meaning'), ('---', '---', '---')]
  rows += [
    (f'`{name}{each.name}`', f'`{format_value(each.default)}`'.replace('``', ''), _details(each))
    for each in _leaves(section)
  ]
  table = ['| ' + ' | '.join(cell.replace('|', r'\|') for cell in row) + ' |' for row in rows]
  return '\n'.join([f'## `{name.rstrip(".") or kind.__name__}`', '', _summary(section), '', *table])


def format_value(value: Any) -> str:
  """A value as the command line takes it."""
  if isinstance(value, bool):
    return str(value).lower()
  if isinstance(value, tuple):
    return ','.join(map(format_value, value))
  if isinstance(value, float):
    return f'{value:g}'
  if value is dataclasses.MISSING:  # a dict's, by a factory
    return '...'
  return str(value)


def _leaves(section: type) -> list[dataclasses.Field]:
  return [each for each in dataclasses.fields(section) if not dataclasses.is_dataclass(each.default)]


def _summary(section: type) -> str:
  return ' '.join((section.__doc__ or '').strip().partition('\n\n')[0].split())


def _details(each: dataclasses.Field) -> str:
  """What a field is, what it accepts, and whether results depend on it."""
  meta = fields.meta(each)
  return '; '.join(part for part in (meta.help, _accepted(each, meta), *_identity(meta)) if part)


def _accepted(each: dataclasses.Field, meta: Meta) -> str:
  if meta.choices:
    return (
      ('a list of ' if isinstance(each.default, tuple) else '')
      + ', '.join(meta.choices[:-1])
      + f' or {meta.choices[-1]}'
    )
  unit = f' ({meta.unit})' if meta.unit else ''
  return ' '.join(filter(None, [type_name(each.type) + unit, fields.bounds(meta)]))


def _identity(meta: Meta) -> list[str]:
  if not meta.result:
    return ['changes no result']
  if meta.implied is not ABSENT:
    return [f'since {meta.since}; earlier versions: {format_value(meta.implied) or "empty"}']
  return []
