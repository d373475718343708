"""A corpus: one source's tokenizer, its three splits and the out-of-domain sets, built once and opened ever after.

Documents are split by a hash of their content, so a document's split depends on nothing but its text and the seed, and
the same text is never in two splits. Within a split they are ordered by a second hash: a slice of a store by share of
documents is then a random sample of the split, and one contiguous range of tokens.

    <cache>/<key>/corpus.json  tokenizer/  train/  validation/  test/  ood/<name>/validation/  ood/<name>/test/

The text is streamed, two times (three to train a tokenizer); it is read on one thread while it is tokenised on all cores. What is
tokenised goes to disk in groups (spill.py): a build that is killed goes on with them. What is held in memory is 400 or so bytes for each
document and the text of the test split.
"""

import collections
import dataclasses
import functools
import json
import logging
import lzma
import pathlib
import re
import shutil
from collections.abc import Iterable, Iterator

import numpy as np
import tqdm

from kdjax import paths
from kdjax.config import DataConfig, EvalConfig
from kdjax.data import files
from kdjax.data import splits as splits_lib
from kdjax.data.ahead import ahead
from kdjax.data.files import StoreDamaged
from kdjax.data.sources import documents, mixture, signature
from kdjax.data.spill import Spill
from kdjax.data.store import COUNTED_TOKENS, TokenStore, token_dtype, write_store
from kdjax.data.store import VERSION as STORE_VERSION
from kdjax.data.tokenizer import Tokenizer, train_bpe
from kdjax.errors import UserError

log = logging.getLogger('kdjax')

VERSION = 2
SPLITS = ('train', 'validation', 'test')
_META = 'corpus.json'
_GROUP_BYTES = 1 << 23  # of text that is tokenised at once, on all cores
# What a corpus is made from. The other fields say how it is read, and one corpus serves all their values.
_DATA_FIELDS = ('source', 'text_field', 'separator', 'validation_fraction', 'test_fraction', 'split_seed')
_EVAL_FIELDS = (
  'ood',
  'ood_text_field',
  'ood_validation_fraction',
  'max_bytes',
  'max_document_bytes',
  'max_validation_bytes',
)


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
  def fingerprint(self) -> str:
    """Of the tokenizer and of every store's content; the same on any machine."""
    return self.meta['fingerprint']


def prepare(data: DataConfig, evals: EvalConfig, runs: str, progress: bool = True) -> Corpus:
  """Opens the corpus of a config, and builds it first if it is not there, or is damaged.

  Any number of processes may call this at once: each builds in a place of its own, the first to end wins, the others
  use what it built.

  Args:
    runs: the corpus lives in `data.cache`, or in `<runs>/stores`; where `runs` is in an object store, in ~/.cache/kdjax/stores.
    progress: show a bar while building.

  Raises:
    UserError: the source cannot be read, a split or set is empty, the disk is full.
  """
  local = pathlib.Path('~/.cache/kdjax') if paths.is_remote(runs) else pathlib.Path(runs)
  folder = pathlib.Path(data.cache or local / 'stores').expanduser() / _key(data, evals)
  if folder.exists():
    try:
      return _open(folder)
    except StoreDamaged as error:
      log.warning('rebuilding the token stores in %s: %s', folder, error)
      files.discard(folder)
  spilled = folder.with_name(f'.{folder.name}.spill')
  try:
    with files.building(folder) as temporary:
      _build(temporary, spilled, data, evals, progress)
  except (
    FileExistsError,
    FileNotFoundError,
  ):  # another builder has renamed its own, and then removed what both have spilled
    if not folder.exists():
      raise
    log.info('another process has just built %s', folder)
  except UserError as error:
    if not isinstance(error.__cause__, OSError):  # of no use to a build that is mended; a full disk's goes on with it
      shutil.rmtree(spilled, ignore_errors=True)
    raise
  shutil.rmtree(spilled, ignore_errors=True)
  return _open(folder)


def _key(data: DataConfig, evals: EvalConfig) -> str:
  fields = {name: getattr(data, name) for name in _DATA_FIELDS} | {name: getattr(evals, name) for name in _EVAL_FIELDS}
  fields['tokenizer'] = _tokenizer_key(data)
  fields['signatures'] = [signature(data.source), {name: signature(source) for name, source in evals.ood.items()}]
  fields['versions'] = [VERSION, STORE_VERSION]
  return files.digest(files.canonical(fields))


def _tokenizer_key(data: DataConfig) -> list:
  if data.tokenizer == 'bpe':
    return ['bpe', data.vocab_size]
  return ['bytes'] if data.tokenizer == 'bytes' else [_given_tokenizer(data).fingerprint]


def _open(folder: pathlib.Path) -> Corpus:
  meta = files.read_json(folder / _META)
  if meta.get('version') != VERSION:
    raise StoreDamaged(folder, f'has format version {meta.get("version")}, this is version {VERSION}')
  tokenizer = Tokenizer.load(folder / 'tokenizer')
  stores = {name: TokenStore.open(folder / name) for name in meta['stores']}
  for name, store in stores.items():
    if store.fingerprint != meta['stores'][name]:
      raise StoreDamaged(folder / name, 'is the store of another corpus')
  ood = {name: EvalSet(stores[f'ood/{name}/validation'], stores[f'ood/{name}/test']) for name in meta['ood']}
  return Corpus(folder, meta, tokenizer, stores['train'], stores['validation'], stores['test'], ood)


def _build(folder: pathlib.Path, spilled: pathlib.Path, data: DataConfig, evals: EvalConfig, progress: bool) -> None:
  _check_names(evals.ood)
  given = None if data.tokenizer == 'bpe' else _given_tokenizer(data)
  plan = _plan_splits(data, evals, given, progress)
  tokenizer = given or _train_tokenizer(data, plan)
  tokenizer.save(folder / 'tokenizer')
  counts = {'in-domain': plan.counts}
  test_text = _write_splits(folder, spilled, plan, tokenizer, progress)
  train_ids = frozenset(plan.splits['train'])
  for name, source in evals.ood.items():
    ood_plan = _plan_ood(name, source, evals, data.split_seed, train_ids, tokenizer, progress)
    counts[name] = ood_plan.counts
    _write_splits(folder / 'ood' / name, spilled, ood_plan, tokenizer, progress)
  names = [*SPLITS, *(f'ood/{name}/{split}' for name in evals.ood for split in ('validation', 'test'))]
  stores = {name: TokenStore.open(folder / name).fingerprint for name in names}
  meta = {
    'version': VERSION,
    'ood': list(evals.ood),
    'counts': counts,
    'stores': stores,
    'xz9_bits_per_byte': xz9_bits_per_byte(test_text),
    'fingerprint': files.digest(files.canonical([tokenizer.fingerprint, stores])),
    'data': {name: getattr(data, name) for name in (*_DATA_FIELDS, 'tokenizer', 'vocab_size')},
    'eval': {name: getattr(evals, name) for name in _EVAL_FIELDS},
  }
  files.write_json(folder / _META, json.loads(json.dumps(meta)))


def xz9_bits_per_byte(texts: Iterable[str]) -> float:
  """Bits that `xz -9` needs for each byte of the texts, one after the other."""
  text = ''.join(texts).encode()
  # The dictionary of preset 9 is 64 MiB, for which xz takes 700 MB; one as large as the text finds the same matches.
  size = min(64 << 20, max(4096, len(text)))
  filters = [{'id': lzma.FILTER_LZMA2, 'preset': 9, 'dict_size': size}]
  return 8 * len(lzma.compress(text, format=lzma.FORMAT_XZ, filters=filters)) / len(text)


@dataclasses.dataclass(frozen=True)
class _Plan:
  """Which documents of a source go where: split -> {content hash: bytes}, in the order in which they are stored."""

  source: str
  text_field: str
  splits: dict[str, dict[str, int]]
  counts: dict[str, int]
  max_document_bytes: int = 0  # of the documents that are not for training


def _plan_splits(data: DataConfig, evals: EvalConfig, tokenizer: Tokenizer | None, progress: bool) -> _Plan:
  shares = {'test': data.test_fraction, 'validation': data.validation_fraction}
  parts = mixture(data.source)
  found: dict[str, int] = {}
  counts: collections.Counter[str] = collections.Counter()
  by_part = []
  for name, _ in parts:
    scanned, read = _scan(name, data.text_field, tokenizer, progress)
    fresh = {doc: n for doc, n in scanned.items() if doc not in found}
    counts.update(read, duplicates=len(scanned) - len(fresh))
    found |= fresh
    by_part.append(splits_lib.split(fresh, shares, 'train', data.split_seed))
  splits = {
    split: splits_lib.mixed([part[split] for part in by_part], [weight for _, weight in parts]) for split in by_part[0]
  }
  if len(parts) > 1:
    _tell_mixture([name for name, _ in parts], [part['train'] for part in by_part], splits['train'])
  for split in ('validation', 'test'):
    splits[split] = splits_lib.cap(splits[split], split, evals)
  for split in SPLITS:
    if not splits[split]:
      raise UserError(
        f'the {split} split of data.source {data.source!r} is empty ({len(found)} distinct documents); '
        'give more documents, or change data.validation_fraction, data.test_fraction or data.split_seed'
      )
  counts.update({f'{split}_documents': len(splits[split]) for split in SPLITS})
  return _Plan(data.source, data.text_field, splits, dict(counts), evals.max_document_bytes)


def _plan_ood(
  name: str, source: str, evals: EvalConfig, seed: int, train_ids: frozenset[str], tokenizer: Tokenizer, progress: bool
) -> _Plan:
  try:
    found, counts = _scan(source, evals.ood_text_field, tokenizer, progress)
  except UserError as e:
    raise UserError(f'eval.ood.{name}: {e}') from None
  distinct = {doc: n for doc, n in found.items() if doc not in train_ids}
  splits = splits_lib.split(distinct, {'validation': evals.ood_validation_fraction}, 'test', seed)
  splits = {split: splits_lib.cap(docs, split, evals) for split, docs in splits.items()}
  for split, docs in splits.items():
    if not docs:
      raise UserError(
        f'the {split} split of eval.ood.{name} ({source!r}) is empty '
        f'({len(distinct)} distinct documents that are not in the training split); '
        'give more documents, or change eval.ood_validation_fraction or data.split_seed'
      )
  counts |= {'in_training_split': len(found) - len(distinct), **{f'{s}_documents': len(d) for s, d in splits.items()}}
  return _Plan(source, evals.ood_text_field, splits, counts, evals.max_document_bytes)


def _scan(
  source: str, text_field: str, tokenizer: Tokenizer | None, progress: bool
) -> tuple[dict[str, int], dict[str, int]]:
  """First pass: content hash -> bytes of each distinct document, and the counts of what was dropped."""
  found: dict[str, int] = {}
  read, empty = 0, 0
  with _bar(f'reading {source}', progress) as bar:
    for text in documents(source, text_field, tokenizer):
      n_bytes = len(text.encode())
      bar.update(n_bytes)
      read += 1
      if not text.strip():
        empty += 1
      else:
        found.setdefault(splits_lib.content_hash(text), n_bytes)
  if not found:
    raise UserError(f'data source {source!r} holds no text ({empty} of {read} documents are empty); give another one')
  return found, {'read': read, 'empty': empty, 'duplicates': read - empty - len(found)}


def _tell_mixture(names: list[str], parts: list[dict[str, int]], mixed: dict[str, int]) -> None:
  total = max(1, sum(mixed.values()))
  for name, part in zip(names, parts, strict=True):
    taken, whole = sum(n for doc, n in part.items() if doc in mixed), max(1, sum(part.values()))
    log.info('mixture: %s is %.1f%% of it, %.1f%% of what there is', name, 100 * taken / total, 100 * taken / whole)


def _cut(text: str, max_bytes: int) -> str:
  """The text's first `max_bytes` bytes (0: all), less a character that would be cut in two."""
  return text.encode()[:max_bytes].decode(errors='ignore') if max_bytes else text


@functools.lru_cache
def vocab_size(data: DataConfig) -> int:
  """Count the tokens of a config's tokenizer before any text is read. A bpe has as many as it is asked for. Raises UserError for a bad file."""
  return data.vocab_size if data.tokenizer == 'bpe' else _given_tokenizer(data).vocab_size


def _given_tokenizer(data: DataConfig) -> Tokenizer:
  return Tokenizer() if data.tokenizer == 'bytes' else Tokenizer.from_file(data.tokenizer, data.separator)


def _train_tokenizer(data: DataConfig, plan: _Plan) -> Tokenizer:
  wanted = dict(plan.splits['train'])
  texts = documents(plan.source, plan.text_field)
  return train_bpe(
    (text for text in texts if wanted.pop(splits_lib.content_hash(text), None) is not None), data.vocab_size
  )


def _write_splits(
  folder: pathlib.Path, spilled: pathlib.Path, plan: _Plan, tokenizer: Tokenizer, progress: bool
) -> list[str]:
  """Second pass: tokenises the plan's documents and writes a store for each split. Returns the test texts."""
  wanted = {doc: n for docs in plan.splits.values() for doc, n in docs.items()}
  spill = Spill(spilled, token_dtype(tokenizer.vocab_size))
  texts: dict[str, str] = {}
  train = plan.splits.get('train', {})
  with _bar(f'tokenising {plan.source}', progress, sum(wanted.values())) as bar:
    for group in ahead(_groups(plan, dict(wanted), tokenizer)):
      kept = {doc: t if doc in train else _cut(t, plan.max_document_bytes) for doc, t in group.items()}
      texts |= {doc: text for doc, text in kept.items() if doc in plan.splits['test']}
      names, kept_texts = list(group), list(kept.values())
      if not spill.take(names):
        n_bytes = [len(text.encode()) for text in kept_texts]
        spill.add(
          names,
          tokenizer.encode_batch(kept_texts),
          n_bytes,
          [len(kept[doc]) < len(group[doc]) for doc in names],
        )
      bar.update(sum(wanted[doc] for doc in group))
  if len(spill) < len(wanted):
    raise UserError(f'data source {plan.source!r} changed while it was read; run again when nothing writes to it')
  for split, docs in plan.splits.items():
    stored = ((doc, spill[doc].n_bytes, spill[doc].tokens) for doc in docs)
    facts = {
      'source': plan.source,
      'split': split,
      'counts': plan.counts,
      'cut': [doc for doc in docs if spill[doc].cut],
    }
    write_store(folder / split, stored, tokenizer, facts)
  return [texts[doc] for doc in plan.splits['test']]


def _groups(plan: _Plan, wanted: dict[str, int], tokenizer: Tokenizer) -> Iterator[dict[str, str]]:
  """The texts of the wanted documents, each once, in groups of about 4 MB."""
  group, size = {}, 0
  for text in documents(plan.source, plan.text_field, tokenizer):
    doc = splits_lib.content_hash(text)
    n_bytes = wanted.pop(doc, None)
    if n_bytes is None:
      continue
    group[doc] = text
    size += n_bytes
    if size >= _GROUP_BYTES:
      yield group
      group, size = {}, 0
  if group:
    yield group


def _check_names(ood: dict[str, str]) -> None:
  for name in ood:
    if not re.fullmatch(r'[A-Za-z0-9][A-Za-z0-9_.-]*', name):
      raise UserError(f'eval.ood has a set named {name!r}; use letters, digits, "_", "-" and "." (it names a folder)')


def _bar(title: str, progress: bool, total: int | None = None) -> tqdm.tqdm:
  return tqdm.tqdm(desc=title, total=total, unit='B', unit_scale=True, disable=not progress, leave=False)
