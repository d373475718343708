"""The first pass over a source's text: decide which documents go into which split, and in which order.

Memory: about 400 bytes a document.
"""

import collections
import dataclasses
import logging
from collections.abc import Callable, Iterator
from typing import Any

import tqdm

from kdjax.config import DataConfig, EvalConfig
from kdjax.data import splits as splits_lib
from kdjax.data.records import NullText
from kdjax.data.sources import documents, mixture
from kdjax.data.tokenizer import Tokenizer
from kdjax.errors import UserError
from kdjax.runtime import progress as progress_lib
from kdjax.storage import files

log = logging.getLogger('kdjax')

SPLITS = ('train', 'validation', 'test')


@dataclasses.dataclass(frozen=True)
class Reading:
  """A source of text and how to read its documents."""

  source: str
  text_field: str = 'text'
  nulls: str = 'refuse'  # records without text: refuse | skip
  tokenizer: Tokenizer | None = None  # decodes sources of token ids

  def texts(self, source: str = '', left_out: Callable[[NullText], Any] = lambda _: None) -> Iterator[str]:
    """Stream the texts of the source, or of one part of it. With nulls='skip', call `left_out` for each record without text."""
    on_null = left_out if self.nulls == 'skip' else None
    return documents(source or self.source, self.text_field, self.tokenizer, on_null)


@dataclasses.dataclass(frozen=True)
class Plan:
  """The splits of a source: split -> {content hash: bytes}, in the order in which documents are stored."""

  reading: Reading
  splits: dict[str, dict[str, int]]
  counts: dict[str, int]
  max_document_bytes: int = 0  # validation and test documents are cut to this; 0: no limit

  def digest(self, tokenizer: list) -> str:
    """Hash what is stored: the documents' content and order, and the tokenizer's key."""
    splits = {split: list(docs) for split, docs in self.splits.items()}
    return files.digest(files.canonical_json([splits, self.max_document_bytes, tokenizer]))


def plan_splits(data: DataConfig, evals: EvalConfig, reading: Reading, progress: bool) -> Plan:
  """Split the documents of data.source. Raises UserError if a split is empty."""
  shares = {'test': data.test_fraction, 'validation': data.validation_fraction}
  parts, counts = _scan_parts(reading, progress)
  splits = _split(reading.source, parts, shares, 'train', data.split_seed)
  for split in ('validation', 'test'):
    splits[split] = splits_lib.cap(splits[split], split, evals)
  for split in SPLITS:
    if not splits[split]:
      raise UserError(
        f'the {split} split of data.source {reading.source!r} is empty ({_n_documents(parts)} distinct documents); '
        'give more documents, or change data.validation_fraction, data.test_fraction or data.split_seed'
      )
  counts |= {f'{split}_documents': len(splits[split]) for split in SPLITS}
  return Plan(reading, splits, counts, evals.max_document_bytes)


def plan_ood(
  name: str, evals: EvalConfig, seed: int, train_ids: frozenset[str], reading: Reading, progress: bool
) -> Plan:
  """Split the documents of an out-of-domain set, except those in the training split. Raises UserError if a split is empty."""
  try:
    parts, counts = _scan_parts(reading, progress)
  except UserError as e:
    raise type(e)(f'eval.ood.{name}: {e}') from None
  distinct = [{doc: n for doc, n in part.items() if doc not in train_ids} for part in parts]
  shares = {'validation': evals.ood_validation_fraction}
  splits = _split(reading.source, distinct, shares, 'test', seed)
  splits = {split: splits_lib.cap(docs, split, evals) for split, docs in splits.items()}
  for split, docs in splits.items():
    if not docs:
      raise UserError(
        f'the {split} split of eval.ood.{name} ({reading.source!r}) is empty '
        f'({_n_documents(distinct)} distinct documents outside the training split); '
        'give more documents, or change eval.ood_validation_fraction or data.split_seed'
      )
  counts |= {'in_training_split': _n_documents(parts) - _n_documents(distinct)}
  counts |= {f'{split}_documents': len(docs) for split, docs in splits.items()}
  return Plan(reading, splits, counts, evals.max_document_bytes)


def _n_documents(parts: list[dict[str, int]]) -> int:
  return sum(map(len, parts))


def _split(
  source: str, parts: list[dict[str, int]], shares: dict[str, float], rest: str, seed: int
) -> dict[str, dict[str, int]]:
  """Split each part of a source, and mix the parts' splits by their weights."""
  names, weights = zip(*mixture(source), strict=True)
  by_part = [splits_lib.split_documents(part, shares, rest, seed) for part in parts]
  splits = {split: splits_lib.mix([part[split] for part in by_part], list(weights)) for split in by_part[0]}
  if len(parts) > 1:
    _report_mixture(names, [part[rest] for part in by_part], splits[rest])
  return splits


def _scan_parts(reading: Reading, progress: bool) -> tuple[list[dict[str, int]], dict[str, int]]:
  """Scan all parts. Returns (for each part: content hash -> bytes, without documents of earlier parts; counts of documents read and dropped)."""
  parts: list[dict[str, int]] = []
  counts: collections.Counter[str] = collections.Counter()
  for name, _ in mixture(reading.source):
    scanned, read = _scan(reading, name, progress)
    fresh = {doc: n for doc, n in scanned.items() if not any(doc in part for part in parts)}
    counts.update(read, duplicates=len(scanned) - len(fresh))
    parts.append(fresh)
  return parts, dict(counts)


def _scan(reading: Reading, source: str, progress: bool) -> tuple[dict[str, int], dict[str, int]]:
  """Scan one part. Returns (content hash -> bytes of each distinct document; counts of documents read and dropped)."""
  found: dict[str, int] = {}
  counts = collections.Counter(read=0, empty=0)
  with bar(f'reading {source}', progress) as shown:
    for text in reading.texts(source, lambda _: counts.update(nulls=1)):
      doc, n_bytes = splits_lib.identify(text)
      shown.update(n_bytes)
      counts['read'] += 1
      if not text or text.isspace():
        counts['empty'] += 1
      else:
        found.setdefault(doc, n_bytes)
      del text  # a document may fill much of the memory: keep one copy
  nulls = counts['nulls']
  left_out = f'{nulls:,} record{"s" * (nulls > 1)} without text' if nulls else ''
  if left_out:
    log.warning('%s: left out %s (data.nulls=skip)', source, left_out)
  if not found:
    empty = f'{counts["empty"]} of {counts["read"]} documents are empty'
    what = ', '.join(filter(None, (empty, left_out)))
    raise UserError(f'data source {source!r} holds no text ({what}); use another source')
  return found, dict(counts) | {'duplicates': counts['read'] - counts['empty'] - len(found)}


def _report_mixture(names: tuple[str, ...], parts: list[dict[str, int]], mixed: dict[str, int]) -> None:
  total = max(1, sum(mixed.values()))
  for name, part in zip(names, parts, strict=True):
    taken, whole = sum(n for doc, n in part.items() if doc in mixed), max(1, sum(part.values()))
    log.info('mixture: %.1f%% is from %s (%.1f%% of its text is used)', 100 * taken / total, name, 100 * taken / whole)


def bar(title: str, progress: bool, total: int | None = None) -> tqdm.tqdm:
  """Show a progress bar that counts bytes."""
  return progress_lib.bar(title, total, unit='B', unit_scale=True, enabled=progress, leave=False)
