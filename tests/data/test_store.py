import concurrent.futures
import json
import os
import pickle
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest

from kdjax.data import store
from kdjax.data.store import BLOCK, TokenStore, write_store
from kdjax.data.tokenizer import Tokenizer
from kdjax.errors import UserError
from kdjax.storage import files
from kdjax.storage.files import StoreDamaged
from tests.data.helpers import REPO, make_docs, make_store

LENGTHS = [1, 5000, 0, 8191, 20_000, 3, 700]
FILES = ['tokens.array_record', 'blocks.npy', 'documents.npy', 'meta.json']


class WideTokenizer(Tokenizer):
  """Bytes with the ids of a large vocabulary."""

  def __init__(self):
    super().__init__()
    self.vocab_size = 100_000


def stream(docs, separator=256):
  return np.concatenate([np.concatenate([[separator], tokens]) for _, _, tokens in docs])


def test_a_store_holds_each_document_behind_its_separator(tmp_path):
  docs = make_docs(LENGTHS)
  opened = make_store(tmp_path / 's', LENGTHS)
  expected = stream(docs)
  assert (opened.n_docs, opened.n_tokens) == (len(docs), len(expected))
  np.testing.assert_array_equal(opened.offsets, np.cumsum([0, *(n + 1 for n in LENGTHS)]))
  np.testing.assert_array_equal(opened.n_bytes, LENGTHS)
  assert [i.decode() for i in opened.doc_ids] == [doc[0] for doc in docs]
  assert opened.read(0, opened.n_tokens).dtype == np.int32
  np.testing.assert_array_equal(opened.read(0, opened.n_tokens), expected)
  assert opened.meta['dtype'] == 'uint16'


def test_any_range_reads_what_the_whole_holds(tmp_path):
  opened = make_store(tmp_path / 's', LENGTHS)
  whole, rng = opened.read(0, opened.n_tokens), random.Random(0)
  ranges = [sorted(rng.choices(range(opened.n_tokens + 1), k=2)) for _ in range(100)]
  ranges += [[0, BLOCK], [BLOCK, 2 * BLOCK], [BLOCK - 1, BLOCK + 1], [opened.n_tokens - 1, opened.n_tokens], [5, 5]]
  for start, stop in ranges:
    np.testing.assert_array_equal(opened.read(start, stop), whole[start:stop])
  for start, stop in [(-1, 3), (3, 2), (0, opened.n_tokens + 1)]:
    with pytest.raises(IndexError):
      opened.read(start, stop)


@pytest.mark.parametrize('n', [BLOCK - 2, BLOCK - 1, BLOCK, 2 * BLOCK - 1])
def test_streams_that_end_at_a_blocks_edge_are_whole(tmp_path, n):
  docs = make_docs([n])
  opened = make_store(tmp_path / 's', [n])
  np.testing.assert_array_equal(opened.read(0, n + 1), stream(docs))


def test_large_vocabularies_are_stored_in_four_bytes(tmp_path):
  tokens = np.arange(70_000, 90_000)
  write_store(tmp_path / 's', [('0' * 16, 1, tokens)], WideTokenizer())
  opened = TokenStore.open(tmp_path / 's')
  assert opened.meta['dtype'] == 'uint32'
  np.testing.assert_array_equal(opened.read(1, 20_001), tokens)


@pytest.mark.parametrize(
  ('tokens', 'words'), [([3, 257], 'not in the vocabulary of 257'), ([-1], 'not in'), ([1, 256], 'separator is among')]
)
def test_ids_outside_the_vocabulary_are_refused_and_nothing_is_left(tmp_path, tokens, words):
  docs = [*make_docs([10]), ('f' * 16, 1, np.array(tokens))]
  with pytest.raises(UserError, match=words):
    write_store(tmp_path / 's', docs, Tokenizer())
  assert os.listdir(tmp_path) == []


def test_an_empty_store_is_refused(tmp_path):
  with pytest.raises(UserError, match='no documents'):
    write_store(tmp_path / 's', [], Tokenizer())
  assert os.listdir(tmp_path) == []


def test_a_writer_that_fails_in_silence_leaves_no_store(tmp_path, monkeypatch):
  class Lossy(store.ArrayRecordWriter):
    def write(self, data):
      super().write(data[:-2] + b'xx')

  monkeypatch.setattr(store, 'ArrayRecordWriter', Lossy)
  with pytest.raises(StoreDamaged, match='block 0'):
    write_store(tmp_path / 's', make_docs(LENGTHS), Tokenizer())
  assert os.listdir(tmp_path) == []


def test_the_fingerprint_is_of_tokens_documents_order_and_tokenizer(tmp_path):
  docs = make_docs([50, 60, 70])
  variants = {
    'same': (docs, Tokenizer()),
    'again': (docs, Tokenizer()),
    'order': (docs[::-1], Tokenizer()),
    'ids': ([(doc[0][::-1], *doc[1:]) for doc in docs], Tokenizer()),
    'tokens': ([*docs[:2], (*docs[2][:2], docs[2][2][::-1])], Tokenizer()),
    'wide': (docs, WideTokenizer()),
  }
  for name, (variant, tokenizer) in variants.items():
    write_store(tmp_path / name, variant, tokenizer, {'note': name})
  prints = {name: TokenStore.open(tmp_path / name).fingerprint for name in variants}
  assert prints.pop('again') == prints['same']
  assert len(set(prints.values())) == len(prints)
  assert TokenStore.open(tmp_path / 'ids').meta['note'] == 'ids'


FORK = """
import os, sys
from kdjax.data.store import TokenStore
opened = TokenStore.open(sys.argv[1])
print(opened.read(0, opened.n_tokens).sum(), flush=True)
if os.fork() == 0:
  print(opened.read(0, opened.n_tokens).sum(), flush=True)
  os._exit(0)
assert os.wait()[1] == 0
"""


def test_a_store_works_in_threads_after_pickling_and_after_forking(tmp_path):
  opened = make_store(tmp_path / 's', LENGTHS)
  whole = opened.read(0, opened.n_tokens)
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    parts = list(pool.map(lambda i: opened.read(i * 100, i * 100 + 100), list(range(300)) * 5))
  np.testing.assert_array_equal(np.concatenate(parts[:300]), whole[:30_000])
  np.testing.assert_array_equal(pickle.loads(pickle.dumps(opened)).read(3, 999), whole[3:999])
  # In a process of its own: forking this one, with JAX in it, is not safe.
  command = [sys.executable, '-c', FORK, str(tmp_path / 's')]
  run = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True, timeout=60)
  assert run.stdout.split() == [str(whole.sum())] * 2


def use(folder):
  """Opens a store and reads it whole; the tokens."""
  opened = TokenStore.open(folder)
  return opened.read(0, opened.n_tokens)


@pytest.mark.parametrize('name', FILES)
@pytest.mark.parametrize('hash_at_open', [True, False])
def test_a_flipped_bit_in_any_file_never_gives_wrong_tokens(tmp_path, monkeypatch, name, hash_at_open):
  """Large token files are not hashed when opened; then a flip in ArrayRecord's padding is only seen by `verify`."""
  make_store(tmp_path / 's', LENGTHS)
  good_tokens = use(tmp_path / 's')
  path, rng = tmp_path / 's' / name, random.Random(name)
  good = path.read_bytes()
  if not hash_at_open:
    monkeypatch.setattr(store, 'HASH_AT_OPEN', 0)
  seen, trials = 0, 120
  for _ in range(trials):
    bit = rng.randrange(len(good) * 8)
    bad = bytearray(good)
    bad[bit // 8] ^= 1 << bit % 8
    path.write_bytes(bad)
    try:
      np.testing.assert_array_equal(use(tmp_path / 's'), good_tokens)
    except StoreDamaged:
      seen += 1
    with pytest.raises(StoreDamaged, match=rf'^{tmp_path}.*; delete its folder and run again to rebuild it$'):
      TokenStore.open(tmp_path / 's').verify()
  if hash_at_open or name != 'tokens.array_record':
    assert seen == trials
  else:
    assert 0 < seen < trials


@pytest.mark.parametrize('name', FILES)
def test_a_removed_or_truncated_file_is_damage_when_opened(tmp_path, name):
  make_store(tmp_path / 's', LENGTHS)
  path = tmp_path / 's' / name
  good = path.read_bytes()
  for size in (0, 1, len(good) // 2, len(good) - 1):
    path.write_bytes(good[:size])
    with pytest.raises(StoreDamaged):
      TokenStore.open(tmp_path / 's')
  path.write_bytes(good + b'\0')
  with pytest.raises(StoreDamaged):
    TokenStore.open(tmp_path / 's')
  path.unlink()
  with pytest.raises(StoreDamaged, match='missing'):
    TokenStore.open(tmp_path / 's')
  path.write_bytes(good)
  TokenStore.open(tmp_path / 's').verify()


def test_a_folder_that_is_not_there_is_damage(tmp_path):
  with pytest.raises(StoreDamaged, match='missing'):
    TokenStore.open(tmp_path / 'nothing')


def rewrite_meta(folder, **changes):
  """Changes what the meta says, with a checksum that fits."""
  files.write_sealed(folder / 'meta.json', {**files.read_sealed(folder / 'meta.json'), **changes})


@pytest.mark.parametrize(
  'changes', [{'dtype': 'uint32'}, {'dtype': 'int16'}, {'n_tokens': 5}, {'n_docs': 1}, {'version': 2}]
)
def test_data_that_differs_from_what_the_meta_says_is_damage(tmp_path, changes):
  make_store(tmp_path / 's', LENGTHS)
  rewrite_meta(tmp_path / 's', **changes)
  with pytest.raises(StoreDamaged):
    use(tmp_path / 's')


def test_a_token_file_of_another_dtype_order_or_store_is_damage(tmp_path):
  docs = [(doc, n, np.minimum(tokens, 255)) for doc, n, tokens in make_docs(LENGTHS)]
  write_store(tmp_path / 's', docs, Tokenizer())
  write_store(tmp_path / 'wide', docs, WideTokenizer())
  write_store(tmp_path / 'other', docs[::-1], Tokenizer())
  for other in ('wide', 'other'):
    shutil.copytree(tmp_path / 's', tmp_path / 'mixed')
    shutil.copy(tmp_path / other / 'tokens.array_record', tmp_path / 'mixed')
    with pytest.raises(StoreDamaged):
      TokenStore.open(tmp_path / 'mixed')
    # As if someone had "mended" the meta: the blocks' own checksums still tell.
    described = files.describe_files(tmp_path / 'mixed', FILES[:3])
    rewrite_meta(tmp_path / 'mixed', files=described)
    with pytest.raises(StoreDamaged, match='block 0 is not what was written'):
      use(tmp_path / 'mixed')
    shutil.rmtree(tmp_path / 'mixed')


def test_a_file_that_goes_away_after_opening_is_damage_when_read(tmp_path):
  opened = make_store(tmp_path / 's', LENGTHS)
  shutil.rmtree(tmp_path / 's')
  with pytest.raises(StoreDamaged, match='missing'):
    opened.read(0, 5)


DISK_FULL = """
import resource, sys
import numpy as np
from kdjax.data.store import write_store
from kdjax.data.tokenizer import Tokenizer
from kdjax.errors import UserError
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
docs = ((f'{i:016x}', 1000, np.full(1000, i % 256)) for i in range(400))
try:
  write_store(sys.argv[2], docs, Tokenizer())
except UserError as error:
  print(error)
  sys.exit(2)
"""


@pytest.mark.parametrize('limit', [500, 65_000, 500_000])
def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path, limit):
  other = make_store(tmp_path / 'other', LENGTHS)
  command = [sys.executable, '-c', DISK_FULL, str(limit), str(tmp_path / 's')]
  run = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
  assert run.returncode == 2, run.stderr
  lines = run.stdout.splitlines()
  assert len(lines) == 1 and f'no space left to write {tmp_path}/s; free some' in lines[0]
  assert os.listdir(tmp_path) == ['other']
  other.verify()


KILLS = """
import json, os, shutil, signal, sys
import numpy as np
from kdjax.storage.files import StoreDamaged
from kdjax.data.store import TokenStore, write_store
from kdjax.data.tokenizer import Tokenizer

parent, found = sys.argv[1], []
folder = parent + '/s'

def build():
  write_store(folder, [(f'{i:016x}', 9000, np.full(9000, i)) for i in range(20)], Tokenizer())

def die_at(n):
  events = 0
  def hook(event, _):
    nonlocal events
    if event in ('open', 'os.rename', 'os.mkdir', 'os.rmdir', 'os.remove', 'fcntl.flock', 'shutil.rmtree'):
      events += 1
      if events == n:
        os.kill(os.getpid(), signal.SIGKILL)
  sys.addaudithook(hook)

for n in range(1, 200):
  if (pid := os.fork()) == 0:
    die_at(n)
    build()
    os._exit(0)
  killed = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 0
  names = sorted(os.listdir(parent))
  whole = None
  if os.path.exists(folder):
    if (pid := os.fork()) == 0:  # reading starts threads, which a fork must not carry
      TokenStore.open(folder).verify()
      os._exit(0)
    whole = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    shutil.rmtree(folder)
  found.append([killed, whole, len(names)])
  if not killed:
    break
print(json.dumps(found))
"""


def test_a_kill_at_any_file_operation_leaves_a_whole_store_or_none(tmp_path):
  run = subprocess.run(
    [sys.executable, '-c', KILLS, str(tmp_path)], cwd=REPO, capture_output=True, text=True, check=False
  )
  assert run.returncode == 0, run.stderr
  found = json.loads(run.stdout)
  killed = [whole for was_killed, whole, _ in found if was_killed]
  assert len(killed) > 10 and found[-1][:2] == [False, True], found
  assert killed.count(None) > 10  # killed before the rename: no store
  assert set(killed) <= {None, True}
  assert found[-1][2] == 1  # the last, undisturbed build has removed what the dead had left


def test_a_large_stream_lies_in_several_files_and_reads_the_same(tmp_path, monkeypatch):
  rng = np.random.default_rng(0)
  docs = [(f'{i:016x}', 10, rng.integers(0, 256, 30_000)) for i in range(5)]
  write_store(tmp_path / 'one', docs, Tokenizer())
  monkeypatch.setattr(store, 'SHARD_BLOCKS', 4)
  write_store(tmp_path / 'many', docs, Tokenizer())
  monkeypatch.undo()
  one, many = TokenStore.open(tmp_path / 'one'), TokenStore.open(tmp_path / 'many')
  names = sorted(path.name for path in (tmp_path / 'many').glob('tokens*'))
  assert names == [f'tokens-{i:05}.array_record' for i in range(5)]
  assert one.fingerprint == many.fingerprint
  np.testing.assert_array_equal(one.read(0, one.n_tokens), many.read(0, many.n_tokens))
  many.verify()
  (tmp_path / 'many/tokens-00003.array_record').unlink()
  with pytest.raises(StoreDamaged, match=r'tokens-00003\.array_record: is missing'):
    TokenStore.open(tmp_path / 'many')
