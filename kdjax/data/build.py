"""The second pass over the text: tokenise it and write the stores. Parts that a neighbouring corpus already holds are linked, not rebuilt.

Tokens are written to disk in groups (spill.py), so a killed build resumes from the last group. Memory holds the text of one group and of the
test split.
"""

import contextlib
import json
import logging
import lzma
import pathlib
import re
from collections.abc import Iterable, Iterator
from typing import Any

from kdjax.config import DataConfig
from kdjax.data import fidelity
from kdjax.data import splits as splits_lib
from kdjax.data.ahead import ahead
from kdjax.data.plan import SPLITS, Plan, bar, plan_ood, plan_splits
from kdjax.data.spill import Spill
from kdjax.data.store import TokenStore, link_store, token_dtype, write_store
from kdjax.data.tokenizer import Tokenizer, train_bpe
from kdjax.data.wanted import MAIN, META, TOKENIZER, VERSION, Wanted, given_tokenizer, known_corpora
from kdjax.errors import UserError
from kdjax.storage import files
from kdjax.storage.files import StoreDamaged

log = logging.getLogger('kdjax')

GROUP_BYTES = 1 << 23  # of text tokenised between two writes
OOD_SPLITS = ('validation', 'test')


class Builder:
  """Builds one corpus. Each part (the splits of data.source, every out-of-domain set) is linked from another corpus or built.

  Args:
    folder: the new corpus's folder; it exists and is empty.
    spilled: where a killed build leaves its tokens.
    wanted: what to build.
    home: the folder of all corpora.
  """

  def __init__(self, folder: pathlib.Path, spilled: pathlib.Path, wanted: Wanted, home: pathlib.Path, progress: bool):
    self._folder, self._spilled, self._wanted, self._progress = folder, spilled, wanted, progress
    self._known = known_corpora(home)
    self._meta: dict[str, Any] = {'ood': list(wanted.evals.ood), 'counts': {}, 'parts': {}}
    self._fidelity: dict[str, dict[str, float]] = {}  # part -> shares of its text that tokenising loses

  def build(self) -> None:
    """Write everything. Raises UserError if a source cannot be read, or a split or set is empty."""
    wanted = self._wanted
    _check_names(wanted.evals.ood)
    if not self._take_known(MAIN, wanted.main_key):
      self._build_splits()
    tokenizer = Tokenizer.load(self._folder / 'tokenizer')
    train = TokenStore.open(self._folder / 'train')
    for name in wanted.evals.ood:
      key = wanted.set_key(name, [tokenizer.fingerprint, train.fingerprint])
      if not self._take_known(name, key):
        self._build_set(name, key, tokenizer, train)
    folders = [*SPLITS, *(f'ood/{name}/{split}' for name in wanted.evals.ood for split in OOD_SPLITS)]
    stores = {name: TokenStore.open(self._folder / name).fingerprint for name in folders}
    self._meta |= {
      'version': VERSION,
      'stores': stores,
      'fingerprint': files.digest(files.canonical_json([tokenizer.fingerprint, stores])),
      'tokenizer': wanted.marks[TOKENIZER],
      'data': wanted.data_fields,
      'eval': wanted.eval_fields,
      **({} if tokenizer.keeps_text else {'fidelity': self._fidelity}),
    }
    files.write_sealed(self._folder / META, json.loads(json.dumps(self._meta)))

  def _build_splits(self) -> None:
    wanted = self._wanted
    data, evals = wanted.data, wanted.evals
    given = None if data.tokenizer == 'bpe' else given_tokenizer(data, wanted.tokenizer_file)
    plan = plan_splits(data, evals, wanted.reading(MAIN, given), self._progress)
    digest = plan.digest(wanted.marks[TOKENIZER])
    if self._take_same(MAIN, wanted.main_key, digest, plan):
      return
    tokenizer = given or _train_tokenizer(data, plan)
    tokenizer.save(self._folder / 'tokenizer')
    texts, self._fidelity[MAIN] = _write_splits(self._folder, self._spilled, plan, tokenizer, self._progress)
    self._meta['xz9_bits_per_byte'] = xz9_bits_per_byte(texts)
    self._record(MAIN, wanted.main_key, digest, plan.counts)

  def _build_set(self, name: str, key: str, tokenizer: Tokenizer, train: TokenStore) -> None:
    wanted = self._wanted
    train_ids = frozenset(doc.decode() for doc in train.doc_ids.tolist())
    reading = wanted.reading(name, tokenizer)
    plan = plan_ood(name, wanted.evals, wanted.data.split_seed, train_ids, reading, self._progress)
    digest = plan.digest([tokenizer.fingerprint])
    if not self._take_same(name, key, digest, plan):
      target = self._folder / 'ood' / name
      _, self._fidelity[name] = _write_splits(target, self._spilled, plan, tokenizer, self._progress)
      self._record(name, key, digest, plan.counts)

  def _record(self, part: str, key: str, digest: str, counts: dict[str, int]) -> None:
    self._meta['counts'][part] = counts
    self._meta['parts'][part] = {'key': key, 'plan': digest, 'signature': self._wanted.marks[part]}

  def _take_known(self, part: str, key: str) -> bool:
    """Link a part that was built from the same files, without reading them."""
    for other, meta in self._known:
      for name, about in meta['parts'].items():
        if about['key'] == key and self._try_link(part, other, name, meta, {}):
          self._record(part, key, about['plan'], meta['counts'][name])
          return True
    return False

  def _take_same(self, part: str, key: str, digest: str, plan: Plan) -> bool:
    """Link a part that holds exactly the plan's documents: files that were merely touched or copied are not tokenised again."""
    for other, meta in self._known:
      for name, about in meta['parts'].items():
        if about['plan'] == digest and self._try_link(part, other, name, meta, _facts(plan)):
          self._record(part, key, digest, plan.counts)
          return True
    return False

  def _try_link(self, part: str, other: pathlib.Path, name: str, meta: dict, facts: dict[str, Any]) -> bool:
    """Link another corpus's part; return False if that part is damaged."""
    where = lambda folder, part: folder if part == MAIN else folder / 'ood' / part
    source, target = where(other, name), where(self._folder, part)
    try:
      for split in SPLITS if part == MAIN else OOD_SPLITS:
        link_store(source / split, target / split, facts)
      if part == MAIN:
        Tokenizer.load(source / 'tokenizer').save(self._folder / 'tokenizer')
        self._meta['xz9_bits_per_byte'] = meta['xz9_bits_per_byte']
    except (StoreDamaged, FileNotFoundError) as error:
      log.warning('%s: cannot reuse the tokens of another corpus: %s', part, error)
      for split in SPLITS:
        with contextlib.suppress(FileNotFoundError):
          files.discard(target / split)
      return False
    if name in meta.get('fidelity', {}):
      self._fidelity[part] = meta['fidelity'][name]
    log.info('%s: reusing the tokens of %s', part, other)
    return True


def xz9_bits_per_byte(texts: Iterable[str]) -> float:
  """Compress the concatenated texts as `xz -9` does; return bits per byte of text."""
  text = ''.join(texts).encode()
  # Preset 9 has a dictionary of 64 MiB, which takes xz 700 MB of memory. One as large as the text finds the same matches.
  size = min(64 << 20, max(4096, len(text)))
  filters = [{'id': lzma.FILTER_LZMA2, 'preset': 9, 'dict_size': size}]
  return 8 * len(lzma.compress(text, format=lzma.FORMAT_XZ, filters=filters)) / len(text)


def _check_names(ood: dict[str, str]) -> None:
  for name in ood:
    if not re.fullmatch(r'[A-Za-z0-9][A-Za-z0-9_.-]*', name):
      raise UserError(
        f'eval.ood has a set named {name!r}; use letters, digits, "_", "-" and "." (the name becomes a folder)'
      )


def _train_tokenizer(data: DataConfig, plan: Plan) -> Tokenizer:
  wanted = dict(plan.splits['train'])
  texts = plan.reading.texts()
  return train_bpe(
    (text for text in texts if wanted.pop(splits_lib.content_hash(text), None) is not None), data.vocab_size
  )


def _write_splits(
  folder: pathlib.Path, spilled: pathlib.Path, plan: Plan, tokenizer: Tokenizer, progress: bool
) -> tuple[list[str], dict[str, float]]:
  """Tokenise the plan's documents and write a store for each split. Returns the test texts and the shares of text lost."""
  wanted = {doc: n for docs in plan.splits.values() for doc, n in docs.items()}
  dtype = token_dtype(tokenizer.vocab_size)
  spill = Spill(spilled, dtype)
  texts: dict[str, str] = {}
  train = plan.splits.get('train', {})
  measure = fidelity.Fidelity(tokenizer, plan.reading.source)
  with bar(f'tokenising {plan.reading.source}', progress, sum(wanted.values())) as shown:
    for group in ahead(_groups(plan, dict(wanted))):
      kept = {doc: t if doc in train else _cut(t, plan.max_document_bytes) for doc, t in group.items()}
      texts |= {doc: text for doc, text in kept.items() if doc in plan.splits['test']}
      names, kept_texts = list(group), list(kept.values())
      if not spill.take(names):
        n_bytes = [len(text.encode()) for text in kept_texts]
        spill.add(
          names,
          tokenizer.encode_batch(kept_texts, dtype=dtype),
          n_bytes,
          [len(kept[doc]) < len(group[doc]) for doc in names],
        )
      measure.add(kept_texts, [spill[name].tokens for name in names])
      shown.update(sum(wanted[doc] for doc in group))
  if len(spill) < len(wanted):
    raise UserError(
      f'data source {plan.reading.source!r} changed while it was read; run again when nothing writes to it'
    )
  shares = measure.shares()
  for split, docs in plan.splits.items():
    stored = ((doc, spill[doc].n_bytes, spill[doc].tokens) for doc in docs)
    facts = {**_facts(plan), 'split': split, 'cut': [doc for doc in docs if spill[doc].cut]}
    write_store(folder / split, stored, tokenizer, facts)
  return [texts[doc] for doc in plan.splits['test']], shares


def _facts(plan: Plan) -> dict[str, Any]:
  """Return the source and document counts that a store records."""
  return {'source': plan.reading.source, 'counts': plan.counts}


def _cut(text: str, max_bytes: int) -> str:
  """Return the whole characters within the first `max_bytes` bytes (0: all), but at least the first character."""
  return (text.encode()[:max_bytes].decode(errors='ignore') or text[:1]) if max_bytes else text


def _groups(plan: Plan, wanted: dict[str, int]) -> Iterator[dict[str, str]]:
  """Yield the texts of the wanted documents, each once, in groups of at least GROUP_BYTES (the last one may be smaller)."""
  group, size = {}, 0
  for text in plan.reading.texts():
    doc = splits_lib.content_hash(text)
    n_bytes = wanted.pop(doc, None)
    if n_bytes is None:
      continue
    group[doc] = text
    size += n_bytes
    if size >= GROUP_BYTES:
      yield group
      group, size = {}, 0
  if group:
    yield group
