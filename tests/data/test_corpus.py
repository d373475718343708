import dataclasses
import itertools
import lzma
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from kdjax.config import DataConfig, EvalConfig
from kdjax.data import build, corpus, plan, splits
from kdjax.data.ahead import ahead
from kdjax.data.build import xz9_bits_per_byte
from kdjax.data.corpus import prepare
from kdjax.data.sources import documents
from kdjax.data.store import TokenStore
from kdjax.errors import UserError
from kdjax.storage import files
from tests.data.helpers import REPO, write_jsonl

WORDS = ('the', 'of', 'and', 'to', 'in', 'that', 'is', 'was', 'he', 'for', 'it', 'with', 'as', 'his', 'on', 'be', 'at')


def texts(n, seed):
  rng = random.Random(seed)
  return [' '.join(rng.choices(WORDS, k=rng.randrange(5, 200))) + f' {seed}.{i}' for i in range(n)]


@pytest.fixture
def made(tmp_path):
  """A source with duplicates and empty documents, and two out-of-domain sets, one of which overlaps with it."""
  main, maths, talk = texts(300, 0), texts(60, 1), texts(40, 2)
  source = write_jsonl(tmp_path / 'main.jsonl', [*main, '', *main[:20], ' \n', main[5]])
  ood = {
    'maths': write_jsonl(tmp_path / 'maths.jsonl', [*main[:50], *maths]),
    'talk': write_jsonl(tmp_path / 'talk.jsonl', [*talk, talk[0]]),
  }
  data = DataConfig(source=source, vocab_size=300)
  return data, EvalConfig(ood=ood, max_bytes=0), str(tmp_path / 'runs'), main


def stored_texts(built, store: TokenStore) -> list[str]:
  pieces = [store.read(a + 1, b) for a, b in zip(store.offsets[:-1], store.offsets[1:], strict=True)]
  return [built.tokenizer.decode(piece) for piece in pieces]


def all_stores(built):
  yield from (built.train, built.validation, built.test)
  for sets in built.ood.values():
    yield from (sets.validation, sets.test)


def prepared(made, **changes):
  data, evals, runs, _ = made
  fields = {f.name for f in dataclasses.fields(data)}
  data = dataclasses.replace(data, **{k: v for k, v in changes.items() if k in fields})
  evals = dataclasses.replace(evals, **{k: v for k, v in changes.items() if k not in fields})
  return prepare(data, evals, runs, progress=False)


def test_splits_hold_each_distinct_document_once_with_its_bytes(made):
  built, main = prepared(made), made[3]
  splits = [stored_texts(built, s) for s in (built.train, built.validation, built.test)]
  assert sorted(itertools.chain(*splits)) == sorted(main)
  for store, held in zip((built.train, built.validation, built.test), splits, strict=True):
    np.testing.assert_array_equal(store.n_bytes, [len(t.encode()) for t in held])
  assert 200 < len(splits[0]) < 280 and 10 < len(splits[1]) < 60 and 10 < len(splits[2]) < 60
  assert built.meta['counts']['in-domain'] == {
    'read': 323,
    'empty': 2,
    'duplicates': 21,
    **{f'{name}_documents': len(held) for name, held in zip(plan.SPLITS, splits, strict=True)},
  }


def test_out_of_domain_sets_share_nothing_with_training_nor_between_their_splits(made):
  built = prepared(made)
  train = set(stored_texts(built, built.train))
  overlap = len(train & set(made[3][:50]))
  assert overlap > 0 and built.meta['counts']['maths']['in_training_split'] == overlap
  assert built.meta['counts']['talk']['duplicates'] == 1
  for name, n in (('maths', 110 - overlap), ('talk', 40)):
    validation, test = (stored_texts(built, s) for s in (built.ood[name].validation, built.ood[name].test))
    assert len(set(validation) | set(test)) == len(validation) + len(test) == n
    assert not train & set(validation + test)
    assert 0 < len(validation) < len(test)


def test_building_again_gives_the_same_corpus_whatever_the_order_of_the_source(made, tmp_path):
  data, evals, runs, main = made
  built = prepare(data, evals, runs, progress=False)
  again = prepare(data, evals, str(tmp_path / 'elsewhere'), progress=False)
  assert again.fingerprint == built.fingerprint
  reversed_source = write_jsonl(tmp_path / 'reversed.jsonl', main[::-1])
  shuffled = prepare(dataclasses.replace(data, source=reversed_source), evals, runs, progress=False)
  assert [s.fingerprint for s in all_stores(shuffled)] == [s.fingerprint for s in all_stores(built)]


def test_a_document_keeps_its_split_when_others_come_and_go(made, tmp_path):
  data, evals, runs, main = made
  built = prepare(data, evals, runs, progress=False)
  half = dataclasses.replace(data, source=write_jsonl(tmp_path / 'half.jsonl', main[::2]))
  smaller = prepare(half, evals, runs, progress=False)
  for split in plan.SPLITS:
    ids = [store.doc_ids for store in (getattr(built, split), getattr(smaller, split))]
    np.testing.assert_array_equal(ids[0][np.isin(ids[0], ids[1])], ids[1])


def test_documents_are_stored_in_another_order_than_they_come(made):
  built = prepared(made)
  positions = [made[3].index(t) for t in stored_texts(built, built.train)]
  assert abs(np.corrcoef(positions, np.arange(len(positions)))[0, 1]) < 0.2


def test_what_only_concerns_reading_shares_the_corpus_and_the_rest_does_not(made, tmp_path):
  built = prepared(made)
  for change in ({'seq_len': 7}, {'mask_documents': False}, {'prefetch': 9}, {'threads': 1}, {'distinct_tokens': 5}):
    assert prepared(made, **change, window=64).folder == built.folder
  folders = {built.folder}
  changes = [
    {'split_seed': 1},
    {'vocab_size': 290},
    {'tokenizer': 'bytes'},
    {'test_fraction': 0.2},
    {'max_bytes': 1000},
    {'ood_validation_fraction': 0.5},
    {'ood': {}},
  ]
  for change in changes:
    folders.add(prepared(made, **change).folder)
  os.utime(made[0].source, ns=(1, 1))
  folders.add(prepared(made).folder)
  assert len(folders) == len(changes) + 2
  assert prepared(made, cache=str(tmp_path / 'cache')).folder.parent == tmp_path / 'cache'


def test_the_corpus_is_built_once(made, monkeypatch):
  built = prepared(made)
  monkeypatch.setattr(corpus, '_build', lambda *_: pytest.fail('built again'))
  assert prepared(made).fingerprint == built.fingerprint


def test_the_split_seed_changes_the_splits(made):
  ids = [set(prepared(made, split_seed=seed).test.doc_ids) for seed in (0, 1)]
  assert ids[0] and ids[1] and ids[0] != ids[1]


def test_evaluation_stores_are_cut_to_whole_documents_and_training_is_not(made):
  whole, cut = prepared(made), prepared(made, max_bytes=3000)
  assert cut.train.n_docs == whole.train.n_docs
  for a, b in zip(list(all_stores(whole))[1:], list(all_stores(cut))[1:], strict=True):
    np.testing.assert_array_equal(a.doc_ids[: b.n_docs], b.doc_ids)
    assert b.n_bytes.sum() <= 3000 < a.n_bytes[: b.n_docs + 1].sum()
  assert all(store.n_docs == 1 for store in list(all_stores(prepared(made, max_bytes=1)))[1:])


@pytest.mark.parametrize('split', plan.SPLITS)
def test_the_tokenizer_is_trained_on_the_training_split_only(made, tmp_path, split):
  data, evals, runs, main = made
  mark = '\u4e16' * 4000  # so frequent that a tokenizer that sees it merges its bytes
  for i in range(1000):
    marked = write_jsonl(tmp_path / 'marked.jsonl', [*main, f'{i} {mark}'])
    planned = plan.plan_splits(data, evals, plan.Reading(marked), False)
    if splits.content_hash(f'{i} {mark}') in planned.splits[split]:
      break
  built = prepare(dataclasses.replace(data, source=marked), evals, runs, progress=False)
  assert any(mark in t for t in stored_texts(built, getattr(built, split)))
  merged = len(built.tokenizer.encode_batch([mark])[0]) < 3 * 4000
  assert merged == (split == 'train')


def test_xz_is_what_the_lzma_module_gives_for_the_test_texts(made):
  built = prepared(made)
  joined = ''.join(stored_texts(built, built.test)).encode()
  assert built.xz9_bits_per_byte == pytest.approx(8 * len(lzma.compress(joined, preset=9)) / len(joined), rel=1e-3)
  assert xz9_bits_per_byte(['a' * 10_000]) < 0.2


def test_every_tokenizer_kind_gives_back_the_text(made):
  built = prepared(made)
  path = built.folder / 'tokenizer' / 'tokenizer.json'
  for kind in ('bytes', str(path)):
    other = prepared(made, tokenizer=kind)
    assert sorted(stored_texts(other, other.train)) == sorted(stored_texts(built, built.train))


def test_an_empty_source_split_or_set_is_named_with_what_to_change(made, tmp_path):
  data, _, runs, _ = made
  cases = [
    ({'source': write_jsonl(tmp_path / 'empty.jsonl', ['', ' '])}, {}, r'empty.jsonl.* holds no text'),
    ({'test_fraction': 0.0}, {}, r'the test split of data.source .* is empty \(300 .*change .*data.test_fraction'),
    ({'validation_fraction': 0.0}, {}, r'the validation split of data.source .* is empty'),
    ({'validation_fraction': 0.5, 'test_fraction': 0.5}, {}, r'the train split of data.source .* is empty'),
    ({}, {'ood_validation_fraction': 0.0}, r'the validation split of eval.ood.maths .* is empty .*eval.ood_validation'),
    ({}, {'ood_validation_fraction': 1.0}, r'the test split of eval.ood.maths .* is empty'),
    ({}, {'ood': {'a/b': data.source}}, r"a set named 'a/b'; use letters"),
    ({}, {'ood': {'a': str(tmp_path / 'no.txt')}}, r'no.txt.* matches no file'),
    ({}, {'ood_text_field': 'body'}, r"maths.jsonl:1: no field 'body'.*eval.ood_text_field"),
  ]
  for data_changes, eval_changes, words in cases:
    with pytest.raises(UserError, match=words) as caught:
      prepared(made, **data_changes, **eval_changes)
    assert '\n' not in str(caught.value)
  assert not pathlib.Path(runs, 'stores').exists() or os.listdir(pathlib.Path(runs, 'stores')) == []


def test_a_source_that_changes_between_the_passes_is_refused(made, monkeypatch):
  calls = []

  def shrinking(source, *how):
    calls.append(source)
    found = list(documents(source, *how))
    return found if len(calls) == 1 else found[:10]

  monkeypatch.setattr(plan, 'documents', shrinking)
  with pytest.raises(UserError, match='changed while it was read'):
    prepared(made, tokenizer='bytes')


@pytest.mark.parametrize(
  'name', ['corpus.json', 'tokenizer/tokenizer.json', 'train/tokens.array_record', 'ood/talk/test/documents.npy']
)
@pytest.mark.parametrize('damage', ['flip', 'truncate', 'remove'])
def test_a_damaged_corpus_is_rebuilt_with_one_line_that_says_why(made, caplog, name, damage):
  built = prepared(made)
  path = built.folder / name
  data = bytearray(path.read_bytes())
  if damage == 'remove':
    path.unlink()
  elif damage == 'truncate':
    path.write_bytes(data[:-9])
  else:
    data[len(data) // 3] ^= 16
    path.write_bytes(data)
  with caplog.at_level('WARNING'):
    assert prepared(made).fingerprint == built.fingerprint
  assert [name in r.getMessage() for r in caplog.records if 'rebuilding' in r.getMessage()] == [True]
  assert os.listdir(built.folder.parent) == [built.folder.name]


def test_a_store_of_another_corpus_in_its_place_is_damage(made):
  built, other = prepared(made), prepared(made, split_seed=1)
  shutil.rmtree(built.folder / 'test')
  shutil.copytree(other.folder / 'test', built.folder / 'test')
  with pytest.raises(files.StoreDamaged, match='another corpus'):
    corpus._open(built.folder)


BUILD = """
import sys, time
from kdjax.config import DataConfig, EvalConfig
from kdjax.data.corpus import prepare
from kdjax.errors import UserError
if len(sys.argv) > 3:
  import resource
  resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
data = DataConfig(source=sys.argv[1], tokenizer='bytes')
print('ready', flush=True)
try:
  built = prepare(data, EvalConfig(ood={'again': sys.argv[1] + 'x.txt'}, ood_validation_fraction=0.5), sys.argv[2])
except UserError as error:
  print(error)
  sys.exit(2)
print(built.fingerprint, flush=True)
"""


def start_build(source, runs, *limit):
  command = [sys.executable, '-c', BUILD, source, str(runs), *limit]
  process = subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
  assert process.stdout.readline() == 'ready\n'
  return process, time.monotonic()


def finish(process) -> str:
  output = process.communicate(timeout=60)[0].strip()
  assert process.returncode == 0, output
  return output


@pytest.fixture
def large(tmp_path):
  """A source that takes a while, with its glob's sibling `...x.txt` files as an out-of-domain set."""
  write_jsonl(tmp_path / 'a.jsonl', [t * 20 for t in texts(2000, 0)])
  for i in range(20):
    (tmp_path / f'{i}a.jsonlx.txt').write_text(f'{i} ' * 500)
  return f'{tmp_path}/*a.jsonl'


def test_a_build_killed_at_any_time_leaves_nothing_that_opens_and_the_next_is_undisturbed(large, tmp_path):
  process, begin = start_build(large, tmp_path / 'calm')
  fingerprint = finish(process)
  seconds, runs, rng, killed = time.monotonic() - begin, tmp_path / 'runs', random.Random(0), 0
  for i in range(7):
    process, _ = start_build(large, runs)
    time.sleep((i + rng.random()) / 7 * seconds)
    process.send_signal(signal.SIGKILL)
    killed += process.wait() == -signal.SIGKILL
    process.stdout.close()
    for folder in (runs / 'stores').glob('[!.]*'):  # hidden ones are never looked at
      assert corpus._open(folder).fingerprint == fingerprint
      shutil.rmtree(folder)
  assert killed >= 3  # the later ones go on with what the earlier ones have tokenised
  assert finish(start_build(large, runs)[0]) == fingerprint
  assert len(os.listdir(runs / 'stores')) == 1


def test_builders_at_the_same_time_all_get_the_one_corpus(large, tmp_path):
  builders = [start_build(large, tmp_path / 'runs')[0] for _ in range(3)]
  assert len({finish(process) for process in builders}) == 1
  assert len(os.listdir(tmp_path / 'runs' / 'stores')) == 1


def test_a_full_disk_ends_a_build_in_one_line_and_loses_nothing_else(large, tmp_path):
  other = prepare(DataConfig(source=large, tokenizer='bytes', split_seed=9), EvalConfig(ood={}), str(tmp_path), False)
  process, _ = start_build(large, tmp_path, '300000')
  output = process.communicate(timeout=60)[0].splitlines()
  assert process.returncode == 2 and len(output) == 1 and 'no space left' in output[0]
  assert [name for name in os.listdir(tmp_path / 'stores') if not name.endswith('.spill')] == [other.folder.name]
  other.train.verify()


def test_real_articles_make_a_corpus(real_data, tmp_path):
  data = DataConfig(
    source=str(real_data / 'wiki' / 'valid.jsonl.xz'), tokenizer=str(real_data / 'tokenizers' / 'gpt-neox-20b.json')
  )
  evals = EvalConfig(ood={'maths': str(real_data / 'ood' / 'maths_gsm8k.jsonl.xz')}, max_bytes=20_000)
  built = prepare(data, evals, str(tmp_path), progress=False)
  assert built.train.meta['dtype'] == 'uint16' and built.train.n_tokens > 200_000
  assert 3.5 < built.train.n_bytes.sum() / built.train.n_tokens < 5.5  # bytes a token of English
  assert 1.5 < built.xz9_bits_per_byte < 4
  assert all((s.read(0, s.n_tokens) == built.tokenizer.separator_id).sum() == s.n_docs for s in all_stores(built))


def mixed_config(tmp_path, **sizes):
  """Config of a mixture of made-up parts: NAME=(weight, documents, bytes each)."""
  parts = []
  for name, (weight, n, size) in sizes.items():
    texts = [f'{name} {i} '.ljust(size, name[0]) for i in range(n)]
    parts.append(f'{write_jsonl(tmp_path / f"{name}.jsonl", texts)}@{weight}')
  return DataConfig(source=', '.join(parts), tokenizer='bytes', validation_fraction=0.2, test_fraction=0.2)


def shares(store, names) -> np.ndarray:
  texts = [
    bytes(store.read(int(a) + 1, int(b)).astype(np.uint8)).decode() for a, b in itertools.pairwise(store.offsets)
  ]
  sizes = np.array([[len(text) * text.startswith(name) for text in texts] for name in names], float)
  return sizes.cumsum(axis=1) / sizes.sum(axis=0).cumsum()


def test_a_mixture_has_its_shares_in_any_stretch_and_ends_with_the_part_that_runs_out(tmp_path, caplog):
  caplog.set_level('INFO', logger='kdjax')
  data = mixed_config(tmp_path, apple=(0.7, 200, 300), bean=(0.3, 2000, 50))
  built = prepare(data, EvalConfig(ood={}), str(tmp_path / 'runs'), progress=False)
  for store in (built.train, built.validation, built.test):
    found = shares(store, ['apple', 'bean'])
    assert np.abs(found[0, 10:] - 0.7).max() < 300 / store.n_bytes[:10].sum() + 0.02
  assert any(': 70.' in m and 'apple.jsonl (100.0% of its text is used)' in m for m in caplog.messages) or any(
    ': 30.' in m and 'bean.jsonl (100.0% of its text is used)' in m for m in caplog.messages
  )
  again = prepare(data, EvalConfig(ood={}), str(tmp_path / 'elsewhere'), progress=False)
  assert again.fingerprint == built.fingerprint
  other = dataclasses.replace(data, source=data.source.replace('@0.7', '@0.5').replace('@0.3', '@0.5'))
  assert prepare(other, EvalConfig(ood={}), str(tmp_path / 'runs'), progress=False).fingerprint != built.fingerprint


def test_a_document_of_two_parts_is_in_the_first(tmp_path):
  texts = [f'document {i}' for i in range(60)]
  source = f'{write_jsonl(tmp_path / "a.jsonl", texts[:40])}@1, {write_jsonl(tmp_path / "b.jsonl", texts[20:])}@1'
  data = DataConfig(source=source, tokenizer='bytes', validation_fraction=0.2, test_fraction=0.2)
  built = prepare(data, EvalConfig(ood={}), str(tmp_path / 'runs'), progress=False)
  assert built.meta['counts']['in-domain']['duplicates'] == 20
  ids = np.concatenate([built.train.doc_ids, built.validation.doc_ids, built.test.doc_ids])
  assert len(set(ids)) == len(ids)


def test_a_build_that_was_cut_off_tokenises_only_what_is_missing(tmp_path, monkeypatch):
  monkeypatch.setattr(build, 'GROUP_BYTES', 2000)
  texts = [f'document {i} ' * 20 for i in range(100)]
  data = DataConfig(
    source=write_jsonl(tmp_path / 'a.jsonl', texts), tokenizer='bytes', validation_fraction=0.2, test_fraction=0.2
  )
  make = lambda runs: prepare(data, EvalConfig(ood={}), str(runs), progress=False)
  calm = make(tmp_path / 'calm').fingerprint
  encoded, original = [], build.Tokenizer.encode_batch

  def encode(self, texts, **options):
    encoded.append(len(texts))
    if len(encoded) == 7:
      raise KeyboardInterrupt
    return original(self, texts, **options)

  monkeypatch.setattr(build.Tokenizer, 'encode_batch', encode)
  with pytest.raises(KeyboardInterrupt):
    make(tmp_path / 'runs')
  done = sum(encoded[:6])
  (spilled,) = (tmp_path / 'runs/stores').glob('.*.spill')
  damaged = sorted(spilled.glob('*.npy'))[0]
  damaged.write_bytes(damaged.read_bytes()[:-1] + b'?')  # is made again
  assert make(tmp_path / 'runs').fingerprint == calm
  assert 100 - done < sum(encoded[7:]) < 100 - done + 2 * encoded[0]
  assert not spilled.exists()


def test_an_error_of_the_reading_thread_comes_where_the_text_was_to_come():
  def items():
    yield 1
    raise UserError('cannot be read on')

  got = []
  with pytest.raises(UserError, match='cannot be read on'):
    got.extend(ahead(items()))
  assert list(ahead(range(1000))) == list(range(1000))
  endless = ahead(itertools.count())
  assert next(endless) == 0
  endless.close()  # its thread ends too
  assert not [t for t in threading.enumerate() if t.name.endswith('(read)')]
