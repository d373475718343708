"""Read a column of a Parquet file as text."""

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
  """Stream the texts of a column: strings of any type, or UTF-8 bytes. A null becomes a NullText.

  Raises:
    UserError: the column is missing or has another type, its bytes are not UTF-8, or the file is damaged.
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
    if getattr(error, 'errno', None):  # the disk failed; the file may be intact
      raise
    raise UserError(f'{path}: the Parquet file is damaged ({str(error).splitlines()[0]}); fetch it again') from error


def _column(schema: pa.Schema, name: str, path: File) -> int:
  """Find the column's index among the columns that Arrow reads for its name. Raises UserError if it is missing or holds no text."""
  if name not in schema.names:
    raise UserError(f'{path}: no column {name!r}; {fields_of(schema.names)}')
  if schema.names.count(name) > 1:
    raise UserError(f'{path}: several columns are named {name!r}; give them different names')
  column = schema.field(schema.get_field_index(name)).type
  kind = column.value_type if pa.types.is_dictionary(column) else column
  kind = kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind
  if not any(is_text(kind) for is_text in _TEXT):
    raise UserError(f'{path}: column {name!r} holds {column}, not strings; set {FIELDS} to another column')
  # Arrow also reads 'a.b' as field b of column a, and returns both in the schema's order.
  read = [n for n in schema.names if n == name or name.startswith(f'{n}.')]
  return read.index(name)


def _values(column: pa.Array) -> Iterator[Any]:
  """Yield the values as Python objects; a string that is not UTF-8 is returned as bytes."""
  try:
    yield from column.to_pylist()
  except UnicodeDecodeError:
    for value in column:
      yield _bytes(value)


def _bytes(value: pa.Scalar) -> bytes | None:
  """Return a string's bytes; None for a null."""
  value = value.value if isinstance(value, pa.DictionaryScalar) else value
  return value.as_buffer().to_pybytes() if value.is_valid else None
