"""The tokens of a corpus on disk while it is being built, so that a build that is killed goes on and none needs the memory for all of them.

<group>.npy   the tokens of a group of documents, one after the other
<group>.json  their lengths and bytes, which are cut, a checksum of the tokens: written last
"""

import errno
import os
import pathlib
import secrets
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from kdjax.storage import files
from kdjax.storage.files import StoreDamaged


class Document(NamedTuple):
  tokens: np.ndarray  # without separator
  n_bytes: int  # of its text in UTF-8
  cut: bool  # whether the text was longer


class Spill:
  """Groups of documents, each written once and whole; `folder` may hold what an earlier build has left."""

  def __init__(self, folder: pathlib.Path, dtype: np.dtype):
    self._folder, self._dtype = folder, dtype
    self._where: dict[str, tuple[str, int, int]] = {}  # document -> group, first token, number in it
    self._groups: dict[str, tuple[np.ndarray, dict]] = {}
    folder.mkdir(parents=True, exist_ok=True)

  def __contains__(self, doc: str) -> bool:
    return doc in self._where

  def __len__(self) -> int:
    return len(self._where)

  def take(self, docs: Sequence[str]) -> bool:
    """Take up the group of these documents, if it is there and whole."""
    name = self._name(docs)
    try:
      about = files.read_sealed(self._folder / f'{name}.json')
      # An empty array cannot be memory-mapped: the documents of a group may have no tokens.
      tokens = np.load(self._folder / f'{name}.npy', mmap_mode='r' if any(about['lengths']) else None)
    except (StoreDamaged, OSError, ValueError):
      return False
    if tokens.dtype != self._dtype or zlib.crc32(tokens.data) != about['crc']:
      return False
    self._groups[name] = tokens, about
    first = 0
    for number, (doc, length) in enumerate(zip(docs, about['lengths'], strict=True)):
      self._where[doc] = name, first, number
      first += length
    return True

  def add(self, docs: Sequence[str], tokens: Sequence[np.ndarray], n_bytes: Sequence[int], cut: Sequence[bool]) -> None:
    """Write a group."""
    name = self._name(docs)
    joined = np.concatenate(tokens, dtype=self._dtype, casting='unsafe') if len(tokens) != 1 else tokens[0]
    joined = joined.astype(self._dtype, copy=False)
    about = {
      'crc': zlib.crc32(joined.data),
      'lengths': [len(t) for t in tokens],
      'n_bytes': list(n_bytes),
      'cut': list(cut),
    }
    for suffix, write in (
      ('npy', lambda path: files.save_array(path, joined)),
      ('json', lambda path: files.write_sealed(path, about)),
    ):
      temporary = self._folder / f'.{secrets.token_hex(4)}.{suffix}'
      try:
        write(temporary)
        os.replace(temporary, self._folder / f'{name}.{suffix}')
      finally:
        temporary.unlink(missing_ok=True)
    if not self.take(docs):  # another build of the same corpus has ended and cleaned up
      raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self._folder / name))

  def __getitem__(self, doc: str) -> Document:
    name, first, number = self._where[doc]
    tokens, about = self._groups[name]
    return Document(tokens[first : first + about['lengths'][number]], about['n_bytes'][number], about['cut'][number])

  @staticmethod
  def _name(docs: Sequence[str]) -> str:
    return files.digest('\n'.join(docs).encode())
