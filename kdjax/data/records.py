"""Extract a document's text from a record's field, and represent records without text."""

from typing import Any

from kdjax.data.text import decode_text, without_surrogates
from kdjax.errors import UserError

FIELDS = 'data.text_field (or eval.ood_text_field)'
_NAMED = 20  # most fields that a message lists


class NullText(UserError):
  """A record without text: the field is null or missing. Yielded in place of the text; the consumer raises it or skips the record."""

  def __init__(self, what: str):
    super().__init__(f'{what}; set data.nulls=skip to skip such records')


class MissingField(NullText):
  """A record without the text field. It counts as null if other records of the same source have the field."""


def field_of(record: dict[str, Any], text_field: str, where: str) -> str | NullText:
  """Return a record's text, or a NullText. Raises UserError if the field holds something else."""
  if text_field not in record:
    return MissingField(f'{where}: no field {text_field!r}; {fields_of(record)}')
  return text_of(record[text_field], f'field {text_field!r}', where)


def text_of(value: Any, field: str, where: str) -> str | NullText:
  """Return the text of a field's or column's value, or a NullText. Raises UserError if the value is neither text nor null."""
  if value is None:
    return NullText(f'{where}: {field} is null')
  if isinstance(value, bytes):
    return decode_text(value, where)
  if not isinstance(value, str):
    raise UserError(f'{where}: {field} holds a {type(value).__name__}, not a string; set {FIELDS} to another field')
  return without_surrogates(value, where)


def fields_of(names) -> str:
  """List field names for a message: "it has ['a', 'b']; set ... to one of them"."""
  found = sorted(names)
  listed = str(found) if len(found) <= _NAMED else f'{str(found[:_NAMED])[:-1]}, ... {len(found)} in all]'
  return f'it has {listed}; set {FIELDS} to one of them'
