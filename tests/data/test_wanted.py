"""Corpora that share parts, or whose text is gone, moved or touched: nothing is tokenised twice, and nothing stale is used."""

import dataclasses
import itertools
import json
import os
import pathlib
import shutil

import numpy as np
import pytest

from kdjax.config import DataConfig, EvalConfig
from kdjax.data import build, plan
from kdjax.data.corpus import prepare
from kdjax.data.tokenizer import Tokenizer
from kdjax.data.wanted import Origin, known_corpora
from kdjax.errors import SourceGone, UserError
from kdjax.storage import files
from tests.data.helpers import write_jsonl
from tests.data.test_corpus import all_stores, shares, stored_texts, texts

SETS = {'maths': 'texts/maths.jsonl', 'talk': 'texts/talk.jsonl'}
DATA = DataConfig(source='texts/main.jsonl', vocab_size=300)


@pytest.fixture
def home(tmp_path, monkeypatch) -> pathlib.Path:
  """The current folder, with texts in it."""
  (tmp_path / 'texts').mkdir()
  for seed, name in enumerate(('main', 'maths', 'talk', 'more')):
    write_jsonl(tmp_path / 'texts' / f'{name}.jsonl', texts(200 if seed == 0 else 50, seed))
  monkeypatch.chdir(tmp_path)
  return tmp_path


@pytest.fixture
def work(monkeypatch) -> dict[str, list[str]]:
  """Records the names of files that are read and tokenised from now on."""
  done: dict[str, list[str]] = {'read': [], 'encoded': []}
  read, write = plan.documents, build._write_splits

  def reading(source, *how):
    done['read'].append(pathlib.Path(source).stem)
    return read(source, *how)

  def writing(folder, spilled, planned, *how):
    done['encoded'].append(pathlib.Path(planned.reading.source).stem)
    return write(folder, spilled, planned, *how)

  monkeypatch.setattr(plan, 'documents', reading)
  monkeypatch.setattr(build, '_write_splits', writing)
  return done


def made(data=DATA, sets=None, origin=Origin(), runs='runs', **evals):
  return prepare(data, EvalConfig(ood=SETS if sets is None else sets, **evals), runs, False, origin)


def test_one_more_set_is_the_only_one_that_is_read(home, work):
  first = made()
  work['read'].clear(), work['encoded'].clear()
  second = made(sets=SETS | {'more': 'texts/more.jsonl'})
  assert set(work['read']) == {'more'} and work['encoded'] == ['more']
  assert second.folder != first.folder and list(second.ood) == [*SETS, 'more']
  afresh = made(sets=SETS | {'more': 'texts/more.jsonl'}, runs='elsewhere')
  assert afresh.fingerprint == second.fingerprint and afresh.xz9_bits_per_byte == second.xz9_bits_per_byte
  assert afresh.meta['counts'] == second.meta['counts']
  work['read'].clear()
  assert list(made(sets={'numbers': SETS['maths']}).ood) == ['numbers'] and work['read'] == []


def test_of_touched_or_changed_files_only_what_is_in_them_counts(home, work):
  first = made()
  work['encoded'].clear(), work['read'].clear()
  os.utime('texts/talk.jsonl', ns=(1, 1))
  assert made().fingerprint == first.fingerprint
  assert set(work['read']) == {'talk'} and work['encoded'] == []
  work['read'].clear()
  os.utime('texts/main.jsonl', ns=(1, 1))
  again = made()
  assert again.fingerprint == first.fingerprint and again.folder != first.folder
  assert set(work['read']) == {'main'} and work['encoded'] == []
  write_jsonl(home / 'texts' / 'talk.jsonl', texts(60, 9))
  changed = made()
  assert work['encoded'] == ['talk']
  assert changed.train.fingerprint == first.train.fingerprint
  assert changed.ood['maths'].test.fingerprint == first.ood['maths'].test.fingerprint
  assert changed.ood['talk'].test.fingerprint != first.ood['talk'].test.fingerprint
  work['encoded'].clear()
  write_jsonl(home / 'texts' / 'main.jsonl', texts(210, 0))
  other = made()
  assert work['encoded'][0] == 'main' and other.train.fingerprint != first.train.fingerprint


def test_a_touched_set_that_now_overlaps_with_training_is_not_taken_from_before(home):
  """A set excludes documents of the training split, so it depends on that split."""
  made()
  write_jsonl(home / 'texts' / 'main.jsonl', [*texts(200, 0), *texts(50, 1)[:20]])
  after, afresh = made(), made(runs='elsewhere')
  assert after.fingerprint == afresh.fingerprint
  assert after.meta['counts']['maths']['in_training_split'] > 5


@pytest.mark.parametrize(
  'change',
  [{'max_bytes': 2000}, {'ood_validation_fraction': 0.5}, {'max_document_bytes': 50}, {'max_validation_bytes': 900}],
)
def test_a_part_is_not_taken_where_a_field_that_shapes_it_differs(home, change):
  made()
  assert made(**change).fingerprint == made(**change, runs='elsewhere').fingerprint


@pytest.mark.parametrize('tokenizer', ['bpe', 'bytes', 'file'])
def test_a_corpus_whose_text_is_gone_is_opened(home, tokenizer, caplog):
  if tokenizer == 'file':
    made().tokenizer.save(home / 'mine')
  data = dataclasses.replace(DATA, tokenizer='mine' if tokenizer == 'file' else tokenizer)
  first = made(data)
  os.rename('texts', 'moved')
  if tokenizer == 'file':
    os.rename('mine', 'not mine')
  with caplog.at_level('WARNING'):
    assert made(data).folder == first.folder
  said = [message for message in caplog.messages if 'is gone; using the tokens' in message]
  assert len(said) == 3 + (tokenizer == 'file') and any("data.source 'texts/main.jsonl'" in m for m in said)
  with pytest.raises(SourceGone, match='matches no file'):
    made(dataclasses.replace(data, split_seed=1))
  with pytest.raises(SourceGone, match=r'eval.ood.maths: .* matches no file'):
    made(data, sets={'maths': 'texts/other.jsonl'})


def test_a_part_that_is_gone_is_found_in_several_corpora(home, work):
  made()
  made(sets={'more': 'texts/more.jsonl'})
  shutil.rmtree('texts')
  write_jsonl(home / 'new.jsonl', texts(50, 7))
  work['read'].clear()
  built = made(sets=SETS | {'more': 'texts/more.jsonl', 'new': 'new.jsonl'})
  assert set(work['read']) == {'new'} and list(built.ood) == [*SETS, 'more', 'new']


def test_of_several_texts_that_were_there_the_one_of_the_run_is_taken(home):
  first = made()
  write_jsonl(home / 'texts' / 'main.jsonl', texts(180, 5))
  second = made()
  os.utime(second.folder / 'corpus.json', (2e9, 2e9))
  shutil.rmtree('texts')
  assert made().folder == second.folder
  assert made(origin=Origin(corpus=first.folder.name)).folder == first.folder
  assert made(origin=Origin(corpus='unknown')).folder == second.folder


def test_text_that_is_there_and_has_changed_is_never_the_old_one(home):
  first = made()
  write_jsonl(home / 'texts' / 'main.jsonl', texts(180, 5))
  origin = Origin(corpus=first.folder.name)
  assert made(origin=origin).train.fingerprint != first.train.fingerprint


def test_relative_paths_are_seen_from_the_folder_of_the_first_start(home, tmp_path_factory, monkeypatch):
  runs, elsewhere = str(home / 'runs'), tmp_path_factory.mktemp('elsewhere')
  data = dataclasses.replace(DATA, tokenizer='mine', source='texts/main.jsonl@.8, texts/mor*.jsonl@.2', cache='cache')
  made().tokenizer.save(home / 'mine')
  first = made(data, runs=runs)
  (elsewhere / 'texts').mkdir()
  write_jsonl(elsewhere / 'texts' / 'main.jsonl', texts(30, 8))  # another text with the same relative path
  monkeypatch.chdir(elsewhere)
  origin = Origin(str(home), first.folder.name)
  assert made(data, runs=runs, origin=origin).folder == home / first.folder
  write_jsonl(home / 'texts' / 'talk.jsonl', texts(60, 9))
  assert made(data, runs=runs, origin=origin).ood['talk'].test.fingerprint != first.ood['talk'].test.fingerprint
  shutil.rmtree(home / 'texts')
  shutil.rmtree(home / 'mine')
  assert made(data, runs=runs, origin=origin).train.fingerprint == first.train.fingerprint
  monkeypatch.chdir(home)
  shutil.copytree(elsewhere / 'texts', home / 'new' / 'texts')
  monkeypatch.chdir(home / 'new')
  plain = made(DATA, sets={}, origin=Origin('/no/such/folder'))  # a run copied here with its text
  assert plain.train.n_docs < 30


def test_a_corpus_of_an_earlier_version_is_opened_without_its_text(home):
  first = made()
  meta = files.read_sealed(first.folder / 'corpus.json')
  files.write_sealed(first.folder / 'corpus.json', {k: v for k, v in meta.items() if k not in ('parts', 'tokenizer')})
  assert made().folder == first.folder
  shutil.rmtree('texts')
  assert made().folder == first.folder
  with pytest.raises(SourceGone):
    made(sets={'maths': SETS['maths']})


def damage(path: pathlib.Path) -> None:
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 4
  path.write_bytes(data)


def test_a_damaged_part_is_made_again_and_never_taken(home, caplog):
  first = made()
  fingerprint = first.fingerprint
  damage(first.folder / 'train' / 'tokens.array_record')
  damage(first.folder / 'ood' / 'talk' / 'test' / 'documents.npy')
  second = made(sets=SETS | {'more': 'texts/more.jsonl'})
  assert sum('cannot reuse the tokens of another corpus' in message for message in caplog.messages) >= 2
  for store in all_stores(second):
    store.verify()
  assert made().fingerprint == fingerprint  # only the damaged corpus is rebuilt, not the files it shares with others
  for name, store in zip(itertools.count(), all_stores(made()), strict=False):
    assert store.verify() is None, name


def test_a_damaged_corpus_without_its_text_is_an_error_of_one_line(home):
  first = made()
  damage(first.folder / 'train' / 'tokens.array_record')
  shutil.rmtree('texts')
  with pytest.raises(UserError, match='matches no file') as caught:
    made()
  assert '\n' not in str(caught.value)


def test_shared_files_are_on_the_disk_once(home):
  first, second = made(), made(sets={})
  one, other = (corpus.folder / 'train' / 'tokens.array_record' for corpus in (first, second))
  assert one.samefile(other)
  shutil.rmtree(first.folder)
  second.train.verify()
  assert [folder.name for folder, _ in known_corpora(home / 'runs' / 'stores')] == [second.folder.name]


def test_a_disk_without_hard_links_gets_copies(home, monkeypatch):
  first = made()
  monkeypatch.setattr(os, 'link', lambda *_: (_ for _ in ()).throw(OSError(95, 'Operation not supported')))
  second = made(sets={})
  assert second.train.fingerprint == first.train.fingerprint
  assert not (first.folder / 'train' / 'blocks.npy').samefile(second.folder / 'train' / 'blocks.npy')


# ---- records without text, and weights of out-of-domain sets


def test_records_without_text_are_left_out_and_counted_once(home, caplog):
  lines = [json.dumps({'text': text}) for text in texts(100, 0)]
  lines[7:7] = ['{"text": null}', '{"id": 3}']
  for name in ('main', 'maths'):
    (home / 'texts' / f'{name}.jsonl').write_text(
      '\n'.join(lines if name == 'main' else [*(json.dumps({'text': text}) for text in texts(50, 1)), '{"text": null}'])
    )
  for source, sets in ((DATA.source, {}), ('texts/more.jsonl', {'maths': SETS['maths']})):
    with pytest.raises(UserError, match=r'(main.jsonl:8|maths.jsonl:51): field .text. is null; set data.nulls=skip'):
      made(dataclasses.replace(DATA, source=source), sets)
  data = dataclasses.replace(DATA, nulls='skip')
  built = made(data, {'maths': SETS['maths']})
  assert built.meta['counts']['in-domain']['nulls'] == 2 and built.meta['counts']['maths']['nulls'] == 1
  assert built.meta['counts']['in-domain']['read'] == 100
  said = [message for message in caplog.messages if 'left out' in message]
  assert said == [
    f'{name}: left out {n} without text (data.nulls=skip)'
    for name, n in (('texts/main.jsonl', '2 records'), ('texts/maths.jsonl', '1 record'))
  ]
  whole = [text for split in (built.train, built.validation, built.test) for text in stored_texts(built, split)]
  assert sorted(whole) == sorted(texts(100, 0))
  (home / 'texts' / 'main.jsonl').write_text('{"text": null}\n')
  with pytest.raises(UserError, match=r'holds no text \(0 of 0 documents are empty, 1 record without text'):
    made(data, {})


def mixed(home, weights, **evals):
  for name, size in (('apple', 300), ('bean', 60)):
    write_jsonl(home / f'{name}.jsonl', [f'{name} {i} '.ljust(size, name[0]) for i in range(150)])
  source = ', '.join(f'{name}.jsonl@{weight}' for name, weight in weights.items())
  return made(dataclasses.replace(DATA, tokenizer='bytes'), {'both': source}, **evals).ood['both']


def test_weights_of_a_set_are_its_shares_of_bytes(home):
  stores = {}
  for weights in ({'apple': 0.9, 'bean': 0.1}, {'apple': 0.5, 'bean': 0.5}, {'apple': 0.2, 'bean': 0.8}):
    found = mixed(home, weights, max_bytes=8000)
    for store in (found.validation, found.test):
      assert abs(shares(store, ['apple', 'bean'])[0, -1] - weights['apple']) < 0.08
      assert 0 < store.n_bytes.sum() <= 8000
    stores[weights['apple']] = found.test.fingerprint
  assert len(set(stores.values())) == 3
  # Equivalent weights give the same set.
  assert mixed(home, {'apple': 9, 'bean': 1}, max_bytes=8000).test.fingerprint == stores[0.9]


def test_a_set_without_weights_is_all_of_its_parts(home):
  one = mixed(home, {'apple': 1, 'bean': 1}, max_bytes=0)
  both = made(dataclasses.replace(DATA, tokenizer='bytes'), {'both': 'apple.jsonl, bean.jsonl'}, max_bytes=0).ood[
    'both'
  ]
  assert both.test.n_docs + both.validation.n_docs == 300 > one.test.n_docs + one.validation.n_docs
  assert np.isin(one.test.doc_ids, both.test.doc_ids).all()


def test_the_given_tokenizer_is_read_once_it_is_there_again(home):
  made().tokenizer.save(home / 'mine')
  data = dataclasses.replace(DATA, tokenizer='mine')
  first = made(data)
  Tokenizer().save(home / 'other')
  shutil.rmtree('mine')
  made(dataclasses.replace(DATA, vocab_size=280)).tokenizer.save(home / 'mine')
  assert made(data).fingerprint != first.fingerprint
