"""A column of a Parquet file as text."""

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from kdjax.data.compressed import File
from kdjax.data.records import FIELDS, NullText, fields_of, text_of
from kdjax.errors import UserError

_ROWS = 256  # read at once
_TEXT = (
  pa.types.is_string,
  pa.types.is_large_string,
  pa.types.is_string_view,
  pa.types.is_binary,
  pa.types.is_large_binary,
  pa.types.is_binary_view,
  pa.types.is_fixed_size_binary,
  pa.types.is_null,
)


def texts(path: File, text_field: str) -> Iterator[str | NullText]:
  """Stream the texts of a column: strings of any kind, or bytes that are UTF-8; NullText for a null.

  Raises:
    UserError: no such column, one of another type, bytes that are not UTF-8, a damaged file.
  """
  try:
    with path.open('rb') as raw, pyarrow.parquet.ParquetFile(raw) as file:
      index = _column(file.schema_arrow, text_field, path)
      number = 0
      for batch in file.iter_batches(columns=[text_field], batch_size=_ROWS):
        for value in _values(batch.column(index)):
          number += 1
          yield text_of(value, f'column {text_field!r}', f'{path}, row {number}')
  except (pa.ArrowException, OSError) as error:
    if getattr(error, 'errno', None):  # of the disk, not of what is on it
      raise
    raise UserError(f'{path}: the Parquet file is damaged ({str(error).splitlines()[0]}); fetch it again') from error


def _column(schema: pa.Schema, name: str, path: File) -> int:
  """The column's place among those that are read by its name. Raises UserError where it is not there or holds no text."""
  if name not in schema.names:
    raise UserError(f'{path}: no column {name!r}; {fields_of(schema.names)}')
  if schema.names.count(name) > 1:
    raise UserError(f'{path}: it has several columns named {name!r}; give them different names')
  column = schema.field(schema.get_field_index(name)).type
  kind = column.value_type if pa.types.is_dictionary(column) else column
  kind = kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind
  if not any(is_text(kind) for is_text in _TEXT):
    raise UserError(f'{path}: column {name!r} holds {column}, not strings; set {FIELDS} to another one')
  # Arrow takes 'a.b' for the field b of a column a as well: both come, in the schema's order.
  read = [n for n in schema.names if n == name or name.startswith(f'{n}.')]
  return read.index(name)


def _values(column: pa.Array) -> Iterator[Any]:
  """The values in Python; a string that is not UTF-8 as its bytes."""
  try:
    yield from column.to_pylist()
  except UnicodeDecodeError:
    for value in column:
      yield _bytes(value)


def _bytes(value: pa.Scalar) -> bytes | None:
  """A string's bytes."""
  value = value.value if isinstance(value, pa.DictionaryScalar) else value
  return value.as_buffer().to_pybytes() if value.is_valid else None
