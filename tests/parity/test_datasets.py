"""`hf:` sources through the real `datasets` package, on local files."""

import json
import os
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kdjax.data.sources import documents, signature
from kdjax.errors import UserError

if os.environ.get('KDJAX_REQUIRE_PARITY') == '1':
  import datasets
else:
  datasets = pytest.importorskip('datasets', reason='the datasets package is not installed (the [hf] extra)')

TEXTS = [f'document {i} ü' for i in range(2500)]


@pytest.fixture
def folder(tmp_path):
  (tmp_path / 'train.jsonl').write_text(''.join(json.dumps({'text': t, 'n': i}) + '\n' for i, t in enumerate(TEXTS)))
  (tmp_path / 'test.jsonl').write_text(json.dumps({'text': 'held out', 'n': 0}) + '\n')
  return tmp_path


def test_json_and_parquet_folders_are_streamed_in_order(folder, tmp_path_factory):
  assert list(documents(f'hf:{folder}')) == list(documents(f'hf:{folder}:train')) == TEXTS
  assert list(documents(f'hf:{folder}:test')) == ['held out']
  other = tmp_path_factory.mktemp('parquet')
  pq.write_table(pa.table({'body': TEXTS[:100]}), other / 'part-0.parquet')
  pq.write_table(pa.table({'body': TEXTS[100:200]}), other / 'part-1.parquet')
  assert list(documents(f'hf:{other}', 'body')) == TEXTS[:200]


def test_the_signature_follows_the_files(folder):
  before = signature(f'hf:{folder}:train')
  assert signature(f'hf:{folder}:train') == before != signature(f'hf:{folder}:test')
  with (folder / 'train.jsonl').open('a') as f:
    f.write(json.dumps({'text': 'one more', 'n': 1}) + '\n')
  assert signature(f'hf:{folder}:train') != before


@pytest.mark.parametrize(
  ('name', 'field', 'said'),
  [
    ('hf:{f}:dev', 'text', r'dev'),
    ('hf:{f}', 'body', r"no column 'body'; it has \['n', 'text'\]; set data\.text_field"),
    ('hf:{f}', 'n', r"example 0: field 'n' holds a int, not a string"),
    ('hf:{f}/none', 'text', r'hf:.*/none: '),
    ('hf:', 'text', r'hf: names no dataset; give hf:NAME'),
  ],
)
def test_what_is_not_there_is_one_line(name, field, said, folder, monkeypatch):
  monkeypatch.setenv('HF_ENDPOINT', 'http://127.0.0.1:9')
  with pytest.raises(UserError, match=said) as e:
    list(documents(name.format(f=folder), field))
  assert '\n' not in str(e.value)


def test_what_save_to_disk_wrote_is_told_how_to_be_written(tmp_path):
  datasets.Dataset.from_dict({'text': TEXTS}).save_to_disk(tmp_path / 'saved')
  with pytest.raises(UserError, match='was written by save_to_disk; write it as Parquet'):
    list(documents(f'hf:{tmp_path / "saved"}'))


def test_a_hub_that_cannot_be_reached_is_said_at_once(monkeypatch):
  monkeypatch.setenv('HF_ENDPOINT', 'http://127.0.0.1:9')
  for proxy in ('HTTPS_PROXY', 'https_proxy'):
    monkeypatch.delenv(proxy, raising=False)
  begin = time.monotonic()
  with pytest.raises(UserError, match='hf:somebody/something: '):
    list(documents('hf:somebody/something'))
  assert (
    time.monotonic() - begin < 60
  )  # the library's own retries alone take half a minute; a slow machine is not the matter here
