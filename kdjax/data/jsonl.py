"""JSON lines: one object a line. Unambiguous deviations are accepted; anything else is refused with its file and line.

Lines end with LF, CR LF or CR. Blank lines are skipped. The last line needs no line ending. A byte order mark may start any line, as in
concatenated files.
"""

import decimal
import json
from collections.abc import Iterator
from typing import Any

from kdjax.data import compressed
from kdjax.data.compressed import File, Lines
from kdjax.data.text import decode_text
from kdjax.errors import UserError

Record = tuple[str, dict[str, Any]]  # (path:line, for messages; the object)


def read(lines: Lines, path: File) -> Iterator[Record]:
  """Stream the objects of a file.

  Raises:
    UserError: a line is not UTF-8, not a JSON object, or longer than `compressed.LONGEST`.
  """
  position, number = 0, 0
  while line := compressed.read_line(lines, f'{path}:{number + 1}'):
    size = len(line)
    found, ends = _records(decode_text(line, path, position), path, number)
    del line  # a document may fill much of the memory: keep one copy
    position, number = position + size, number + ends
    yield from found


def _records(text: str, path: File, number: int) -> tuple[list[Record], int]:
  """Parse the text between two line feeds: one object, or several separated by carriage returns. Returns (objects, number of lines)."""
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
  """The JSON may be valid, but is nested too deeply for Python's parser."""


def parse_object(text: str, where: str) -> dict[str, Any]:
  """Parse a JSON object. Raises UserError that names `where` if it is not one."""
  try:
    record = loads(text)
  except ValueError as error:
    what = f'{error.msg} at column {error.colno:,}' if isinstance(error, json.JSONDecodeError) else error
    raise UserError(f'{where}: not JSON ({what}); each line must be one JSON object') from None
  if not isinstance(record, dict):
    raise UserError(f'{where}: not a JSON object but a {type(record).__name__}; each line must be one JSON object')
  return record


def is_object(text: bytes) -> bool:
  """Return whether a text is a JSON object, or begins like one that is nested too deeply to be parsed."""
  try:
    return isinstance(loads(text), dict)
  except _TooDeepError:
    return text.lstrip().startswith(b'{')
  except ValueError:
    return False


def loads(text: str | bytes) -> Any:
  """Parse JSON like `json.loads`, but raise only ValueError and accept integers of any length.

  Python converts at most 4,300 digits to an int; longer integers become Decimals.
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
