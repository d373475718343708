"""Records that hold a document's text: which of their fields it is, and those that hold none."""

from typing import Any

from kdjax.data.text import decoded, without_surrogates
from kdjax.errors import UserError

FIELDS = 'data.text_field (or eval.ood_text_field)'
_NAMED = 20  # fields that a message lists


class NullText(UserError):
  """A record without text: null, or without the field. Yielded in the text's place; whoever reads raises it or leaves the record out."""

  def __init__(self, what: str):
    super().__init__(f'{what}; set data.nulls=skip to leave such records out')


class MissingField(NullText):
  """A record without the field that is to hold the text: null as well, where other records of the same source have it."""


def field_of(record: dict[str, Any], text_field: str, where: str) -> str | NullText:
  """Return a record's text, or NullText. Raises UserError where the field holds something else."""
  if text_field not in record:
    return MissingField(f'{where}: no field {text_field!r}; {fields_of(record)}')
  return text_of(record[text_field], f'field {text_field!r}', where)


def text_of(value: Any, field: str, where: str) -> str | NullText:
  """Return the text of a field's or column's value, or NullText. Raises UserError where it is none."""
  if value is None:
    return NullText(f'{where}: {field} is null')
  if isinstance(value, bytes):
    return decoded(value, where)
  if not isinstance(value, str):
    raise UserError(f'{where}: {field} holds a {type(value).__name__}, not a string; set {FIELDS} to another one')
  return without_surrogates(value, where)


def fields_of(names) -> str:
  """'it has ['a', 'b']; set ... to one of them': for messages."""
  found = sorted(names)
  listed = str(found) if len(found) <= _NAMED else f'{str(found[:_NAMED])[:-1]}, ... {len(found)} in all]'
  return f'it has {listed}; set {FIELDS} to one of them'
