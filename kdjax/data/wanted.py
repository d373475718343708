"""What a corpus is made of, and its name: a digest of the config's fields and of the files behind its sources.

A source that is there is told by the names, sizes and times of its files. Of one that is gone the stores remember what it was: a config then
names the corpus that was made of it, the one that the run used where it is known, else the newest.
"""

import contextlib
import dataclasses
import functools
import logging
import pathlib
from collections.abc import Callable
from typing import Any

from kdjax import paths
from kdjax.config import DataConfig, EvalConfig
from kdjax.data import files, sources
from kdjax.data.files import StoreDamaged
from kdjax.data.plan import Reading
from kdjax.data.store import VERSION as STORE_VERSION
from kdjax.data.tokenizer import Tokenizer
from kdjax.errors import SourceGone, UserError

log = logging.getLogger('kdjax')

VERSION = 2
META = 'corpus.json'
OWN = ('bpe', 'bytes')  # tokenizers that are no file
TOKENIZER = ' tokenizer'  # beside the parts, whose names have no spaces
MAIN = 'in-domain'  # the part that is data.source; the others are out-of-domain sets, by name
# What a corpus is made from. The other fields say how it is read, and one corpus serves all their values.
DATA_FIELDS = ('source', 'text_field', 'separator', 'validation_fraction', 'test_fraction', 'split_seed')
CAPS = ('max_bytes', 'max_document_bytes', 'max_validation_bytes')
EVAL_FIELDS = ('ood', 'ood_text_field', 'ood_validation_fraction', *CAPS)


@dataclasses.dataclass(frozen=True)
class Origin:
  """Where an earlier start of a run found its text.

  Attributes:
    folder: from which the config's relative paths are seen; '': the current one.
    corpus: the name of its token stores; '': unknown.
  """

  folder: str = ''
  corpus: str = ''


@dataclasses.dataclass(frozen=True)
class Wanted:
  """What is asked for.

  Attributes:
    data, evals: the config's sections as they are, which names are made of.
    sources: part -> its source as it is read from here.
    marks: part -> what tells of a change of its files; TOKENIZER -> what tells tokenizers apart before they are made.
    tokenizer_file: where data.tokenizer is, seen from here.
    remembered: the name of the corpus where an older one does not say what it was made of.
  """

  data: DataConfig
  evals: EvalConfig
  sources: dict[str, str]
  marks: dict[str, Any]
  tokenizer_file: str
  remembered: str = ''

  @property
  def data_fields(self) -> dict[str, Any]:
    """The fields that `corpus.json` keeps, to be found by where a source is gone."""
    return _fields(self.data, (*DATA_FIELDS, 'tokenizer', 'vocab_size')) | self._nulls

  @property
  def eval_fields(self) -> dict[str, Any]:
    return _fields(self.evals, EVAL_FIELDS)

  @property
  def key(self) -> str:
    """The name of the corpus."""
    if self.remembered:
      return self.remembered
    fields = _fields(self.data, DATA_FIELDS) | _fields(self.evals, EVAL_FIELDS) | self._nulls
    fields['tokenizer'] = self.marks[TOKENIZER]
    fields['signatures'] = [self.marks[MAIN], {name: self.marks[name] for name in self.evals.ood}]
    fields['versions'] = [VERSION, STORE_VERSION]
    if weighted := [name for name, source in self.evals.ood.items() if sources.is_weighted(source)]:
      fields['weighted'] = weighted  # earlier versions of kdjax left the weights of these out
    if any(map(sources.holds_tokens, (self.data.source, *self.evals.ood.values()))):
      fields['records'] = 'split'  # earlier versions took each record for one document
    return files.digest(files.canonical(fields))

  @property
  def main_key(self) -> str:
    """Tells the splits of data.source apart by what they are made of."""
    fields = _fields(self.data, DATA_FIELDS) | _fields(self.evals, CAPS) | self._nulls
    return files.digest(files.canonical([fields, self.marks[TOKENIZER], self.marks[MAIN], VERSION, STORE_VERSION]))

  def set_key(self, name: str, splits: list[str]) -> str:
    """The same for an out-of-domain set; `splits`: fingerprints of the tokenizer and of the training split, whose documents it lacks."""
    fields = _fields(self.evals, ('ood_text_field', 'ood_validation_fraction', *CAPS)) | self._nulls
    fields |= {'source': self.evals.ood[name], 'seed': self.data.split_seed}
    return files.digest(files.canonical([fields, splits, self.marks[name], VERSION, STORE_VERSION]))

  def reading(self, part: str, tokenizer: Tokenizer | None) -> Reading:
    field = self.data.text_field if part == MAIN else self.evals.ood_text_field
    return Reading(self.sources[part], field, self.data.nulls, tokenizer)

  @property
  def _nulls(self) -> dict[str, str]:
    return {} if self.data.nulls == 'refuse' else {'nulls': self.data.nulls}


def look(data: DataConfig, evals: EvalConfig, home: pathlib.Path, origin: Origin = Origin()) -> Wanted:
  """Look at the files of every source.

  Args:
    home: where corpora are.

  Raises:
    UserError: a source cannot be read, or is gone and no corpus was made of it.
  """
  named = {MAIN: data.source, **evals.ood}
  placed = {part: sources.seen_from(origin.folder, source) for part, source in named.items()}
  file = data.tokenizer if data.tokenizer in OWN else paths.seen_from(origin.folder, data.tokenizer)
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
  if unknown and origin.folder:  # what was there may have come here
    return look(data, evals, home, Origin(corpus=origin.corpus))
  if unknown:
    raise gone[unknown[0]]
  for part in gone:
    log.warning(
      '%s is not there any more; using the tokens that were made of it, in %s', _described(wanted, part), home
    )
  return wanted


def _remember(wanted: Wanted, gone: list[str], home: pathlib.Path, origin: Origin) -> Wanted:
  """What is wanted, with what the corpora in `home` know of sources that are gone."""
  corpora = sorted(known_corpora(home), key=lambda known: known[0].name != origin.corpus)
  known = {part: [mark for _, meta in corpora if (mark := _mark(wanted, part, meta)) is not None] for part in gone}
  wanted = dataclasses.replace(wanted, marks=wanted.marks | {part: marks[0] for part, marks in known.items() if marks})
  if all(known.values()):
    return wanted
  shares = any(map(sources.is_weighted, wanted.evals.ood.values()))  # which corpora of earlier versions do not have
  same = lambda meta: meta['data'] == wanted.data_fields and meta['eval'] == wanted.eval_fields and not shares
  return dataclasses.replace(wanted, remembered=next((folder.name for folder, meta in corpora if same(meta)), ''))


def _mark(wanted: Wanted, part: str, meta: dict) -> Any:
  """What a corpus noted of a part when it was read; None where it was made of something else, or notes nothing."""
  about = meta['parts'].get(part)
  if part == TOKENIZER:
    same = all(meta['data'].get(name) == getattr(wanted.data, name) for name in ('tokenizer', 'separator'))
    return meta.get('tokenizer') if same else None
  fields = CAPS if part == MAIN else (*CAPS, 'ood_text_field', 'ood_validation_fraction')
  same = all(meta['eval'][name] == getattr(wanted.evals, name) for name in fields)
  if part == MAIN:
    same = same and meta['data'] == wanted.data_fields
  else:
    same = same and meta['eval']['ood'].get(part) == wanted.evals.ood[part]
    same = same and meta['data'].get('nulls', 'refuse') == wanted.data.nulls
    same = same and meta['data']['split_seed'] == wanted.data.split_seed
  return about['signature'] if about and same else None


def _described(wanted: Wanted, part: str) -> str:
  if part == MAIN:
    return f'data.source {wanted.data.source!r}'
  if part == TOKENIZER:
    return f'data.tokenizer {wanted.data.tokenizer!r}'
  return f'eval.ood.{part} {wanted.evals.ood[part]!r}'


def known_corpora(home: pathlib.Path) -> list[tuple[pathlib.Path, dict]]:
  """(folder, corpus.json) of the corpora in a folder, the newest first; damaged ones are passed over."""
  found = []
  for folder in home.glob('[!.]*'):
    with contextlib.suppress(StoreDamaged, OSError, KeyError):
      meta = files.read_json(folder / META)
      if meta['version'] == VERSION:
        found.append(((folder / META).stat().st_mtime, folder, {'parts': {}} | meta))
  return [(folder, meta) for _, folder, meta in sorted(found, key=lambda one: (-one[0], one[1]))]


def given_tokenizer(data: DataConfig, file: str) -> Tokenizer:
  """The tokenizer that data.tokenizer names, which is not to be trained."""
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
