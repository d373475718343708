"""Command line options: a parser that reports a mistake in one line, and value types."""

import argparse
import math
from collections.abc import Callable
from typing import NoReturn

from kdjax.errors import UserError
from kdjax.storage import paths


class Parser(argparse.ArgumentParser):
  """Raises a UserError of one line, without the usage, for a mistake on the command line. An option without a type is `text`."""

  def __init__(self, *args, **kwargs):
    super().__init__(*args, **kwargs)
    self.register('type', None, text)

  def error(self, message: str) -> NoReturn:
    raise UserError(f'{message}; {self.prog} --help shows the options')


def whole_number(least: int = 0, below: int = 2**63) -> Callable[[str], int]:
  """Return an option type for whole numbers in [least, below)."""

  def read(text: str) -> int:
    try:
      value = int(text)
    except ValueError:
      raise argparse.ArgumentTypeError(f'must be a whole number, got {_shown(text)}') from None
    if value < least:
      raise argparse.ArgumentTypeError(f'must be at least {least}, got {_shown(text)}')
    if value >= below:
      raise argparse.ArgumentTypeError(f'must be below {below:,}, got {_shown(text)}')
    return value

  return read


def number(holds: Callable[[float], bool], words: str) -> Callable[[str], float]:
  """Return an option type for finite numbers that satisfy `holds`; `words` describes them in the error message."""

  def read(text: str) -> float:
    try:
      value = float(text)
    except ValueError:
      raise argparse.ArgumentTypeError(f'must be {words}, got {_shown(text)}') from None
    if not (math.isfinite(value) and holds(value)):
      raise argparse.ArgumentTypeError(f'must be {words}, got {_shown(text)}')
    return value

  return read


positive = whole_number(1)
count = whole_number(0)
machines = whole_number(1, 100_001)  # also processes, slices
runners = whole_number(0, 100_001)
seed = whole_number(0, 2**32)
axis = whole_number(-1)  # devices along a mesh axis; sharding.make_mesh checks it
share = number(lambda value: 0 < value <= 1, 'in (0, 1]')


def text(value: str) -> str:
  """Option type for text. A shell may pass bytes that are not UTF-8: Python decodes them to surrogates, which no JSON file or model takes."""
  try:
    value.encode()
  except UnicodeEncodeError:
    raise argparse.ArgumentTypeError(f'must be UTF-8 text, got {_shown(value)}') from None
  return value


def path(value: str) -> str:
  """Option type for a file or folder, with a leading `~` expanded."""
  return paths.expand(text(value))


def _shown(text: str) -> str:
  """Make a user's input short and printable."""
  return ascii(text if len(text) <= 60 else f'{text[:57]}...') if not text.isprintable() or len(text) > 60 else text
