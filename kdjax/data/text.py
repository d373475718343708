"""Bytes that ought to be text."""

import os

from kdjax.errors import UserError

_MARKS = (b'\xff\xfe', b'\xfe\xff', b'\x00\x00\xfe\xff')  # of UTF-16 and UTF-32


def decode_text(data: bytes, path: str | os.PathLike, position: int = 0) -> str:
  """Decode UTF-8.

  Args:
    position: offset of the data's first byte in the file.
  """
  if not position and _is_utf16(data[:64]):
    raise UserError(f'{path}: not UTF-8 but UTF-16 or UTF-32; convert the file to UTF-8')
  try:
    return data.decode('utf-8' if position else 'utf-8-sig')  # some editors mark the start of a file
  except UnicodeDecodeError as error:
    where = f'byte {position + error.start:,} (0x{data[error.start]:02x})'
    raise UserError(f'{path}: not UTF-8 at {where}; convert the file to UTF-8') from None


def without_surrogates(text: str, where: str) -> str:
  """Return the text. Raises UserError for half a surrogate pair, which JSON can spell ("\\ud800") but UTF-8 cannot encode."""
  try:
    if not text.isascii():
      text.encode('utf-8')
  except UnicodeEncodeError as error:
    raise UserError(
      f'{where}: character {error.start:,} of the text is half a surrogate pair; correct that line'
    ) from None
  return text


def _is_utf16(head: bytes) -> bool:
  """Detect UTF-16 and UTF-32 by their byte order mark, or by the zeros of Western text: every second byte, or three of four."""
  zeros = head[::2].count(0), head[1::2].count(0)
  return head.startswith(_MARKS) or (len(head) >= 8 and abs(zeros[0] - zeros[1]) > len(head) // 5)
