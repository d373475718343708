import os
import random
import subprocess
import sys
import time

import pytest

from kdjax import machine
from kdjax.errors import UserError
from kdjax.storage import files
from kdjax.storage.files import StoreDamaged
from tests import commands


def test_a_folder_appears_only_when_its_block_has_ended(tmp_path):
  with files.building(tmp_path / 'a') as temporary:
    (temporary / 'x').write_text('1')
    assert not (tmp_path / 'a').exists()
  assert (tmp_path / 'a' / 'x').read_text() == '1'
  assert os.listdir(tmp_path) == ['a']


def test_everything_is_on_disk_before_the_rename_and_the_rename_itself_after(tmp_path, monkeypatch):
  done, fsync, rename = [], os.fsync, os.rename

  def recording_fsync(descriptor):
    done.append(os.path.basename(os.readlink(f'/proc/self/fd/{descriptor}')).split('.building-')[0])
    fsync(descriptor)

  def recording_rename(source, target):
    done.append('rename')
    rename(source, target)

  monkeypatch.setattr(os, 'fsync', recording_fsync)
  monkeypatch.setattr(os, 'rename', recording_rename)
  with files.building(tmp_path / 'a') as temporary:
    (temporary / 'in').mkdir()
    (temporary / 'in' / 'x').write_text('1')
  assert done == ['.a', 'in', 'x', 'rename', tmp_path.name]


def test_a_failing_block_leaves_nothing(tmp_path):
  def fail():
    with files.building(tmp_path / 'a') as temporary:
      (temporary / 'x').write_text('1')
      raise ZeroDivisionError

  with pytest.raises(ZeroDivisionError):
    fail()
  assert os.listdir(tmp_path) == []


def test_an_existing_folder_is_left_alone(tmp_path):
  (tmp_path / 'a').mkdir()
  (tmp_path / 'a' / 'x').write_text('old')
  with pytest.raises(FileExistsError), files.building(tmp_path / 'a'):
    raise AssertionError('the block must not run')
  assert (tmp_path / 'a' / 'x').read_text() == 'old'


def test_the_first_of_two_builders_wins_and_the_other_leaves_nothing(tmp_path):
  def race():
    with files.building(tmp_path / 'a') as slow:
      with files.building(tmp_path / 'a') as fast:
        (fast / 'x').write_text('fast')
      (slow / 'x').write_text('slow')

  with pytest.raises(FileExistsError):
    race()
  assert (tmp_path / 'a' / 'x').read_text() == 'fast'
  assert os.listdir(tmp_path) == ['a']


def test_leftovers_of_the_dead_are_removed_and_the_living_are_not(tmp_path):
  dead = tmp_path / f'.a.building-{machine.name()}-0123'
  dead.mkdir()
  with files.building(tmp_path / 'a') as living:
    assert not dead.exists()
    files.remove_leftovers(tmp_path)
    assert living.exists()


def test_another_machines_folder_is_removed_after_a_day_without_a_sign_of_life(tmp_path, monkeypatch):
  """Its lock does not reach this machine."""
  living, dead = tmp_path / '.a.building-elsewhere-0123abcd-1', tmp_path / '.a.building-elsewhere-0123abcd-2'
  for folder, age in ((living, files.ABANDONED - 60), (dead, files.ABANDONED + 60)):
    folder.mkdir()
    os.utime(folder, (time.time() - age,) * 2)
  files.remove_leftovers(tmp_path)
  assert living.exists() and not dead.exists()


def test_a_builder_shows_that_it_lives(tmp_path, monkeypatch):
  monkeypatch.setattr(files, 'SIGN_OF_LIFE', 0.01)
  with files.building(tmp_path / 'a') as temporary:
    os.utime(temporary, (0, 0))
    commands.wait_for(lambda: temporary.stat().st_mtime > 0)


BUILD = """
import sys, time
from kdjax import machine
from kdjax.config import Config, DataConfig, EvalConfig
from kdjax.data import corpus
from kdjax.storage import files
machine.name = lambda: sys.argv[2]
files._lock = lambda descriptor: True
while time.time() < float(sys.argv[3]):
  pass
data = DataConfig(source=sys.argv[4], tokenizer='bytes')
print(corpus.prepare(data, EvalConfig(), sys.argv[1], progress=False).fingerprint)
"""


def test_builders_on_a_shared_disk_where_locks_do_not_reach_all_end_with_the_same_corpus(tmp_path):
  text = tmp_path / 'text.jsonl'
  text.write_text(''.join(f'{{"text": "document {i} of many, all of them different"}}\n' for i in range(3000)))
  at = str(time.time() + 15)
  command = lambda name: [sys.executable, '-c', BUILD, str(tmp_path / 'runs'), name, at, str(text)]
  builders = [
    subprocess.Popen(
      command(f'host{i}-0000000{i}'), env=commands.environment(), cwd=commands.REPO, stdout=subprocess.PIPE, text=True
    )
    for i in range(3)
  ]
  found = [(builder.communicate(timeout=120)[0], builder.returncode) for builder in builders]
  assert {code for _, code in found} == {0} and len({out for out, _ in found}) == 1
  assert [path.name for path in (tmp_path / 'runs' / 'stores').iterdir() if path.name.startswith('.')] == []


def test_a_place_that_cannot_be_written_is_one_clear_line(tmp_path):
  (tmp_path / 'file').write_text('')
  with (
    pytest.raises(UserError, match=r'cannot write to .*file.*set data.cache') as caught,
    files.building(tmp_path / 'file' / 'a'),
  ):
    raise AssertionError('the block must not run')
  assert '\n' not in str(caught.value)


def test_every_flipped_bit_of_a_json_file_is_seen(tmp_path):
  path = tmp_path / 'meta.json'
  value = {'a': [1, 2.5, 'ü\n'], 'b': {'c': None}}
  files.write_sealed(path, value)
  assert files.read_sealed(path) == value
  good = path.read_bytes()
  for bit in range(len(good) * 8):
    bad = bytearray(good)
    bad[bit // 8] ^= 1 << bit % 8
    path.write_bytes(bad)
    with pytest.raises(StoreDamaged):
      files.read_sealed(path)


@pytest.mark.parametrize('data', [b'', b'{', b'[]', b'{}', b'\xff', b'{"checksum": "0"}'])
def test_anything_else_in_place_of_a_json_file_is_damage(tmp_path, data):
  (tmp_path / 'meta.json').write_bytes(data)
  with pytest.raises(StoreDamaged, match='delete its folder'):
    files.read_sealed(tmp_path / 'meta.json')


def test_check_files_sees_size_content_and_absence(tmp_path):
  path = tmp_path / 'x'
  path.write_bytes(random.Random(0).randbytes(1000))
  seen = files.describe_files(tmp_path, ['x'])
  files.check_files(tmp_path, seen)
  data = bytearray(path.read_bytes())
  data[500] ^= 4
  path.write_bytes(data)
  files.check_files(tmp_path, seen, hash_up_to=999)
  with pytest.raises(StoreDamaged, match='checksum'):
    files.check_files(tmp_path, seen, hash_up_to=1000)
  path.write_bytes(data[:-1])
  with pytest.raises(StoreDamaged, match='999 bytes where 1,000'):
    files.check_files(tmp_path, seen, hash_up_to=0)
  path.unlink()
  with pytest.raises(StoreDamaged, match='missing'):
    files.check_files(tmp_path, seen)
