"""JSON lines: one object a line, read leniently where the meaning is plain and refused by file and line where it is not.

Lines end with LF, CR LF or CR; blank ones are passed over; the last one needs no end. A byte order mark may start any line, as in files that
were joined.
"""

import decimal
import json
from collections.abc import Iterator
from typing import Any

from kdjax.data.compressed import File, Lines
from kdjax.data.text import decoded
from kdjax.errors import UserError

Record = tuple[str, dict[str, Any]]  # its place for messages (path:line), the object


def read(lines: Lines, path: File) -> Iterator[Record]:
  """Stream the objects of a file.

  Raises:
    UserError: a line is not UTF-8, or no JSON object.
  """
  position, number = 0, 0
  for line in lines:
    size = len(line)
    found, ends = _records(decoded(line, path, position), path, number)
    del line  # a document may be a good part of the memory there is: it is held once
    position, number = position + size, number + ends
    yield from found


def _records(text: str, path: File, number: int) -> tuple[list[Record], int]:
  """(objects, lines) of what stands between two line feeds: one object, or several with carriage returns between them."""
  where = f'{path}:{number + 1}'
  text = text.removeprefix('\ufeff')
  if not text.strip():
    return [], 1
  try:
    return [(where, parse_object(text, where))], 1
  except UserError:
    lines = text.removesuffix('\n').removesuffix('\r').split('\r')
    if len(lines) == 1:
      raise
  at = lambda k: f'{path}:{number + 1 + k}'
  return [(at(k), parse_object(line, at(k))) for k, line in enumerate(lines) if line.strip()], len(lines)


class _TooDeepError(ValueError):
  """JSON that may be right, and that Python's parser cannot follow."""


def parse_object(text: str, where: str) -> dict[str, Any]:
  """Parse a JSON object. Raises UserError with its place where it is none."""
  try:
    record = loads(text)
  except ValueError as error:
    what = f'{error.msg} at column {error.colno:,}' if isinstance(error, json.JSONDecodeError) else error
    raise UserError(f'{where}: not JSON ({what}); each line must be one JSON object') from None
  if not isinstance(record, dict):
    raise UserError(f'{where}: not a JSON object but a {type(record).__name__}; each line must be one JSON object')
  return record


def is_object(text: bytes) -> bool:
  """Whether a text is a JSON object, or begins as one that is nested too deeply to be read."""
  try:
    return isinstance(loads(text), dict)
  except _TooDeepError:
    return text.lstrip().startswith(b'{')
  except ValueError:
    return False


def loads(text: str | bytes) -> Any:
  """Parse JSON as `json.loads` does, but raise nothing except ValueError, and read integers of any length.

  Python turns no more than 4,300 digits into an int; longer ones become a Decimal.
  """
  try:
    try:
      return json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError):
      raise
    except ValueError:
      return json.loads(text, parse_int=decimal.Decimal)
  except RecursionError:
    raise _TooDeepError('nested too deeply') from None
