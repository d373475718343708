"""Determine what a corpus is built from, and its name: a digest of the config's fields and of the sources' files.

A source is identified by the names, sizes and modification times of its files. If a source is gone, the corpora built from it still record its
identity. A config then selects such a corpus: the one that the run used, if known, else the newest.
"""

import contextlib
import dataclasses
import functools
import logging
import pathlib
from collections.abc import Callable
from typing import Any

from kdjax.config import DataConfig, EvalConfig, fields
from kdjax.data import sources
from kdjax.data.plan import Reading
from kdjax.data.store import VERSION as STORE_VERSION
from kdjax.data.tokenizer import Tokenizer
from kdjax.errors import SourceGone, UserError
from kdjax.storage import files, paths
from kdjax.storage.files import StoreDamaged

log = logging.getLogger('kdjax')

VERSION = 2
META = 'corpus.json'
OWN = ('bpe', 'bytes')  # tokenizers that are not files
TOKENIZER = ' tokenizer'  # a key next to the names of parts, which have no spaces
MAIN = 'in-domain'  # the part of data.source; the other parts are out-of-domain sets, by name
# The fields that determine a corpus. The other fields say how it is read; one corpus serves all their values.
DOCUMENTS = fields.names(DataConfig, lambda declared: declared.corpus == 'documents')
TOKENIZER_FIELDS = fields.names(DataConfig, lambda declared: declared.corpus == 'tokenizer')
CAPS = fields.names(EvalConfig, lambda declared: declared.corpus == 'caps')
SETS = fields.names(EvalConfig, lambda declared: declared.corpus == 'sets')
ONE_SET = tuple(name for name in SETS if name != 'ood')  # of these, what one of the sets depends on


@dataclasses.dataclass(frozen=True)
class Origin:
  """Where an earlier start of a run found its text.

  Attributes:
    folder: the folder that the config's relative paths refer to; '': the current one.
    corpus: the name of its corpus; '': unknown.
  """

  folder: str = ''
  corpus: str = ''


@dataclasses.dataclass(frozen=True)
class Wanted:
  """The corpus that a config asks for.

  Attributes:
    data, evals: the config's sections, unchanged; names are derived from them.
    sources: part -> its source, with resolved paths.
    marks: part -> the signature of its files; TOKENIZER -> a key that identifies the tokenizer before it is built.
    tokenizer_file: the resolved path of data.tokenizer.
    remembered: the name of an older corpus that does not record the signatures of its sources; '': none.
  """

  data: DataConfig
  evals: EvalConfig
  sources: dict[str, str]
  marks: dict[str, Any]
  tokenizer_file: str
  remembered: str = ''

  @property
  def data_fields(self) -> dict[str, Any]:
    """The fields recorded in `corpus.json`, which identify the corpus when a source is gone."""
    return _fields(self.data, (*DOCUMENTS, *TOKENIZER_FIELDS)) | self._nulls

  @property
  def eval_fields(self) -> dict[str, Any]:
    return _fields(self.evals, (*SETS, *CAPS))

  @property
  def key(self) -> str:
    """The name of the corpus."""
    if self.remembered:
      return self.remembered
    chosen = _fields(self.data, DOCUMENTS) | _fields(self.evals, (*SETS, *CAPS)) | self._nulls
    chosen['tokenizer'] = self.marks[TOKENIZER]
    chosen['signatures'] = [self.marks[MAIN], {name: self.marks[name] for name in self.evals.ood}]
    chosen['versions'] = [VERSION, STORE_VERSION]
    if weighted := [name for name, source in self.evals.ood.items() if sources.is_weighted(source)]:
      chosen['weighted'] = weighted  # earlier versions of kdjax ignored these weights
    if any(map(sources.holds_tokens, (self.data.source, *self.evals.ood.values()))):
      chosen['records'] = 'split'  # earlier versions read each record as one document
    return files.digest(files.canonical_json(chosen))

  @property
  def main_key(self) -> str:
    """Hash everything that the splits of data.source depend on."""
    chosen = _fields(self.data, DOCUMENTS) | _fields(self.evals, CAPS) | self._nulls
    return files.digest(files.canonical_json([chosen, self.marks[TOKENIZER], self.marks[MAIN], VERSION, STORE_VERSION]))

  def set_key(self, name: str, splits: list[str]) -> str:
    """Hash everything that an out-of-domain set depends on. `splits`: fingerprints of the tokenizer and of the excluded training split."""
    chosen = _fields(self.evals, (*ONE_SET, *CAPS)) | self._nulls
    chosen |= {'source': self.evals.ood[name], 'seed': self.data.split_seed}
    return files.digest(files.canonical_json([chosen, splits, self.marks[name], VERSION, STORE_VERSION]))

  def reading(self, part: str, tokenizer: Tokenizer | None) -> Reading:
    field = self.data.text_field if part == MAIN else self.evals.ood_text_field
    return Reading(self.sources[part], field, self.data.nulls, tokenizer)

  @property
  def _nulls(self) -> dict[str, str]:
    return {} if self.data.nulls == 'refuse' else {'nulls': self.data.nulls}


def inspect_sources(data: DataConfig, evals: EvalConfig, home: pathlib.Path, origin: Origin = Origin()) -> Wanted:
  """Read the signatures of all sources, and determine the wanted corpus.

  Args:
    home: the folder of all corpora.

  Raises:
    UserError: a source cannot be read, or is gone and no corpus was built from it.
  """
  named = {MAIN: data.source, **evals.ood}
  placed = {part: sources.seen_from(origin.folder, source) for part, source in named.items()}
  file = data.tokenizer if data.tokenizer in OWN else paths.resolve_from(origin.folder, data.tokenizer)
  looks: dict[str, Callable[[], Any]] = {
    part: functools.partial(_signature, part, source) for part, source in placed.items()
  }
  looks[TOKENIZER] = functools.partial(_tokenizer_key, data, file)
  found: dict[str, Any] = {}
  gone: dict[str, UserError] = {}
  for part, read in looks.items():
    try:
      found[part] = read()
    except SourceGone as error:
      gone[part] = error
  wanted = Wanted(data, evals, placed, found, file)
  if gone:
    wanted = _remember(wanted, list(gone), home, origin)
  unknown = [] if wanted.remembered else [part for part in gone if part not in wanted.marks]
  if unknown and origin.folder:  # the run may have been moved here with its text
    return inspect_sources(data, evals, home, Origin(corpus=origin.corpus))
  if unknown:
    raise gone[unknown[0]]
  for part in gone:
    log.warning('%s is gone; using the tokens that were built from it, in %s', _describe(wanted, part), home)
  return wanted


def _remember(wanted: Wanted, gone: list[str], home: pathlib.Path, origin: Origin) -> Wanted:
  """Fill in the signatures of missing sources from the corpora in `home`."""
  corpora = sorted(known_corpora(home), key=lambda known: known[0].name != origin.corpus)
  known = {part: [mark for _, meta in corpora if (mark := _mark(wanted, part, meta)) is not None] for part in gone}
  wanted = dataclasses.replace(wanted, marks=wanted.marks | {part: marks[0] for part, marks in known.items() if marks})
  if all(known.values()):
    return wanted
  shares = any(map(sources.is_weighted, wanted.evals.ood.values()))  # corpora of earlier versions ignored them
  same = lambda meta: meta['data'] == wanted.data_fields and meta['eval'] == wanted.eval_fields and not shares
  return dataclasses.replace(wanted, remembered=next((folder.name for folder, meta in corpora if same(meta)), ''))


def _mark(wanted: Wanted, part: str, meta: dict) -> Any:
  """Return the signature that a corpus recorded for a part; None if it was built from something else or recorded none."""
  about = meta['parts'].get(part)
  if part == TOKENIZER:
    same = all(meta['data'].get(name) == getattr(wanted.data, name) for name in ('tokenizer', 'separator'))
    return meta.get('tokenizer') if same else None
  chosen = CAPS if part == MAIN else (*CAPS, *ONE_SET)
  same = all(meta['eval'][name] == getattr(wanted.evals, name) for name in chosen)
  if part == MAIN:
    same = same and meta['data'] == wanted.data_fields
  else:
    same = same and meta['eval']['ood'].get(part) == wanted.evals.ood[part]
    same = same and meta['data'].get('nulls', 'refuse') == wanted.data.nulls
    same = same and meta['data']['split_seed'] == wanted.data.split_seed
  return about['signature'] if about and same else None


def _describe(wanted: Wanted, part: str) -> str:
  if part == MAIN:
    return f'data.source {wanted.data.source!r}'
  if part == TOKENIZER:
    return f'data.tokenizer {wanted.data.tokenizer!r}'
  return f'eval.ood.{part} {wanted.evals.ood[part]!r}'


def known_corpora(home: pathlib.Path) -> list[tuple[pathlib.Path, dict]]:
  """Return (folder, corpus.json) of the corpora in a folder, the newest first; skip damaged ones."""
  found = []
  for folder in home.glob('[!.]*'):
    with contextlib.suppress(StoreDamaged, OSError, KeyError):
      meta = files.read_sealed(folder / META)
      if meta['version'] == VERSION:
        found.append(((folder / META).stat().st_mtime, folder, {'parts': {}} | meta))
  return [(folder, meta) for _, folder, meta in sorted(found, key=lambda one: (-one[0], one[1]))]


def given_tokenizer(data: DataConfig, file: str) -> Tokenizer:
  """Load the tokenizer that data.tokenizer names (anything but bpe)."""
  return Tokenizer() if data.tokenizer == 'bytes' else Tokenizer.from_file(file, data.separator)


def _signature(part: str, source: str) -> str:
  try:
    return sources.signature(source)
  except UserError as error:
    if part == MAIN:
      raise
    kind = SourceGone if isinstance(error, SourceGone) else UserError
    raise kind(f'eval.ood.{part}: {error}') from None


def _tokenizer_key(data: DataConfig, file: str) -> list:
  if data.tokenizer in OWN:
    return [data.tokenizer, data.vocab_size] if data.tokenizer == 'bpe' else [data.tokenizer]
  try:
    return given_tokenizer(data, file).key()
  except UserError as error:
    if isinstance(error.__cause__, FileNotFoundError):
      raise SourceGone(str(error)) from error
    raise


def _fields(section: Any, names: tuple[str, ...]) -> dict[str, Any]:
  return {name: getattr(section, name) for name in names}
