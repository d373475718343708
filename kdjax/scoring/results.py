"""The results: one immutable Parquet file for each (run, step, set, evaluation). The folder is the table; evaluating again replaces."""

import hashlib
import io
import json
import math
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from kdjax.errors import UserError
from kdjax.storage import paths


def result_path(folder: paths.Path, step: int, set_name: str, evaluation: str) -> paths.Path:
  return folder / f'{set_name}-step{step}-{evaluation}.parquet'


def write_result(file: paths.Path, table: pd.DataFrame, meta: dict[str, Any]) -> None:
  """A reader sees all of it or nothing. With a digest of what it says."""
  arrow = pa.Table.from_pandas(table, preserve_index=False)
  arrow = arrow.replace_schema_metadata({'kdjax': json.dumps({'meta': meta, 'digest': _digest(table, meta)})})
  try:
    with paths.replacing(file) as temporary:
      pq.write_table(arrow, temporary)
  except OSError as e:
    raise UserError(
      f'{file}: results could not be written ({e}); free some disk space and run the eval job again'
    ) from None


def bits_per_byte(table: pd.DataFrame, column: str = 'nll') -> float:
  """Of all documents of a table together; `column` holds nats."""
  return float(table[column].sum() / table['bytes'].sum() / math.log(2))


def read_result(file: paths.Path) -> tuple[pd.DataFrame, dict[str, Any]]:
  """(per-document table, metadata). Raises UserError if the file is damaged."""
  try:
    arrow = pq.read_table(io.BytesIO(paths.read_bytes(file)))
    table, known = arrow.to_pandas(), json.loads(arrow.schema.metadata[b'kdjax'])
    if known['digest'] != _digest(table, known['meta']):
      raise ValueError('its content is not what was written')
    return table, known['meta']
  except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as e:
    raise UserError(f'{file} is damaged ({str(e).splitlines()[0]}); delete it and run the eval job again') from None


def _digest(table: pd.DataFrame, meta: dict[str, Any]) -> str:
  """Of the values: Parquet itself reads a flipped bit in silence."""
  found = hashlib.sha256(json.dumps(meta, sort_keys=True).encode())
  for name in table.columns:
    values = np.asarray(table[name].to_list())
    found.update(f'{name} {values.dtype} {values.shape}'.encode() + values.tobytes())
  return found.hexdigest()[:16]
