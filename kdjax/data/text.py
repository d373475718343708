"""Bytes that ought to be text."""

import os

from kdjax.errors import UserError


def decoded(data: bytes, path: str | os.PathLike, position: int = 0) -> str:
  """UTF-8 text; `position`: of the data's first byte in the file."""
  try:
    return data.decode('utf-8' if position else 'utf-8-sig')  # some editors mark the start of a file
  except UnicodeDecodeError as error:
    where = f'byte {position + error.start:,} (0x{data[error.start]:02x})'
    raise UserError(f'{path}: not UTF-8 at {where}; convert the file to UTF-8') from error


def without_surrogates(text: str, where: str) -> str:
  """JSON can spell half a character ("\\ud800"), which no UTF-8 text can hold."""
  try:
    text.encode('utf-8')
  except UnicodeEncodeError as error:
    raise UserError(
      f'{where}: character {error.start:,} of the text is half a surrogate pair; mend that line'
    ) from error
  return text
