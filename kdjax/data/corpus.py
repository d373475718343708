"""A corpus: one source's tokenizer, its three splits and the out-of-domain sets, built once and opened ever after.

Documents are split by a hash of their content, so a document's split depends on nothing but its text and the seed, and
the same text is never in two splits. Within a split they are ordered by a second hash: a slice of a store by share of
documents is then a random sample of the split, and one contiguous range of tokens.

    <cache>/<key>/corpus.json  tokenizer/  train/  validation/  test/  ood/<name>/validation/  ood/<name>/test/

The text is streamed twice (three times to train a tokenizer). One thread reads while all cores tokenise (plan.py, build.py).
A corpus can still be opened after its text is gone. If a new corpus differs from another in one part, only that part is built (wanted.py).
"""

import dataclasses
import functools
import logging
import os
import pathlib
import shutil

import numpy as np

from kdjax.config import DataConfig, EvalConfig
from kdjax.data import fidelity
from kdjax.data.build import Builder
from kdjax.data.store import COUNTED_TOKENS, TokenStore
from kdjax.data.tokenizer import Tokenizer
from kdjax.data.wanted import META, VERSION, Origin, Wanted, given_tokenizer, inspect_sources
from kdjax.errors import UserError
from kdjax.storage import files, paths
from kdjax.storage.files import StoreDamaged

log = logging.getLogger('kdjax')


@dataclasses.dataclass(frozen=True)
class EvalSet:
  """An out-of-domain set: `validation` is where its temperature is fitted, `test` is what is reported."""

  validation: TokenStore
  test: TokenStore


@dataclasses.dataclass(frozen=True)
class Corpus:
  """What `prepare` built. `meta` keeps the counts of documents read, dropped and kept, by source."""

  folder: pathlib.Path
  meta: dict
  tokenizer: Tokenizer
  train: TokenStore
  validation: TokenStore
  test: TokenStore
  ood: dict[str, EvalSet]

  @property
  def xz9_bits_per_byte(self) -> float:
    """What `xz -9` makes of the test split: the yardstick that any language model should beat."""
    return self.meta['xz9_bits_per_byte']

  @functools.cached_property
  def token_counts(self) -> np.ndarray:
    """How often each token of the vocabulary stands in the training split, as far as COUNTED_TOKENS of it say; counted once."""
    return self.train.counts(self.tokenizer.vocab_size, 0, min(self.train.n_tokens, COUNTED_TOKENS))

  @property
  def losses(self) -> dict[str, float]:
    """Return the shares of text that the tokenizer loses (`fidelity.worst`); {}: none is lost, so bits per byte are valid."""
    return fidelity.worst(self.meta.get('fidelity', {}))

  @property
  def tasks(self) -> pathlib.Path:
    """The folder that keeps the items of downstream tasks, in case their files disappear."""
    return self.folder.parent / 'tasks'

  @property
  def fingerprint(self) -> str:
    """Of the tokenizer and of every store's content; the same on any machine."""
    return self.meta['fingerprint']


def prepare(data: DataConfig, evals: EvalConfig, runs: str, progress: bool = True, origin: Origin = Origin()) -> Corpus:
  """Open the corpus of a config. Build it first if it is missing or damaged.

  Any number of processes may call this at once: each builds in its own folder, the first to finish wins, and the others
  use its corpus.

  Args:
    runs: the corpus is kept in `data.cache`, or in `<runs>/stores`; if `runs` is in an object store, in ~/.cache/kdjax/stores.
    progress: show a progress bar while building.
    origin: where an earlier start of the run found its text.

  Raises:
    UserError: a source cannot be read, a split or set is empty, or the disk is full.
  """
  local = '~/.cache/kdjax' if paths.is_remote(runs) else runs
  cache = paths.resolve_from(origin.folder, data.cache) if data.cache else ''
  home = pathlib.Path(cache or paths.expand(os.path.join(local, 'stores')))
  wanted = inspect_sources(data, evals, home, origin)
  folder = home / wanted.key
  if folder.exists():
    try:
      return _open(folder)
    except StoreDamaged as error:
      log.warning('rebuilding the token stores in %s: %s', folder, error)
      files.discard(folder)
  _build(folder, wanted, progress)
  return _open(folder)


def _build(folder: pathlib.Path, wanted: Wanted, progress: bool) -> None:
  spilled = folder.with_name(f'.{folder.name}.spill')
  try:
    with files.building(folder) as temporary:
      Builder(temporary, spilled, wanted, folder.parent, progress).build()
  except (
    FileExistsError,
    FileNotFoundError,
  ):  # another builder has renamed its own, and then removed what both have spilled
    if not folder.exists():
      raise
    log.info('another process has just built %s', folder)
  except UserError as error:
    if not isinstance(
      error.__cause__, OSError
    ):  # a corrected config cannot use the spilled groups; a build that ran out of disk space resumes from them
      shutil.rmtree(spilled, ignore_errors=True)
    raise
  shutil.rmtree(spilled, ignore_errors=True)


def _open(folder: pathlib.Path) -> Corpus:
  meta = files.read_sealed(folder / META)
  if meta.get('version') != VERSION:
    raise StoreDamaged(folder, f'has format version {meta.get("version")}, this is version {VERSION}')
  tokenizer = Tokenizer.load(folder / 'tokenizer')
  stores = {name: TokenStore.open(folder / name) for name in meta['stores']}
  for name, store in stores.items():
    if store.fingerprint != meta['stores'][name]:
      raise StoreDamaged(folder / name, 'is the store of another corpus')
  ood = {name: EvalSet(stores[f'ood/{name}/validation'], stores[f'ood/{name}/test']) for name in meta['ood']}
  return Corpus(folder, meta, tokenizer, stores['train'], stores['validation'], stores['test'], ood)


@functools.lru_cache
def vocab_size(data: DataConfig) -> int:
  """Return the vocabulary size of a config's tokenizer before any text is read; for bpe, the requested size. Raises UserError for a bad file."""
  return data.vocab_size if data.tokenizer == 'bpe' else given_tokenizer(data, data.tokenizer).vocab_size
