import os
import random

import pytest

from kdjax.data import files
from kdjax.data.files import StoreDamaged
from kdjax.errors import UserError


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
  (tmp_path / '.a.building-0123').mkdir()
  with files.building(tmp_path / 'a') as living:
    assert not (tmp_path / '.a.building-0123').exists()
    files.remove_leftovers(tmp_path)
    assert living.exists()


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
  files.write_json(path, value)
  assert files.read_json(path) == value
  good = path.read_bytes()
  for bit in range(len(good) * 8):
    bad = bytearray(good)
    bad[bit // 8] ^= 1 << bit % 8
    path.write_bytes(bad)
    with pytest.raises(StoreDamaged):
      files.read_json(path)


@pytest.mark.parametrize('data', [b'', b'{', b'[]', b'{}', b'\xff', b'{"checksum": "0"}'])
def test_anything_else_in_place_of_a_json_file_is_damage(tmp_path, data):
  (tmp_path / 'meta.json').write_bytes(data)
  with pytest.raises(StoreDamaged, match='delete its folder'):
    files.read_json(tmp_path / 'meta.json')


def test_check_files_sees_size_content_and_absence(tmp_path):
  path = tmp_path / 'x'
  path.write_bytes(random.Random(0).randbytes(1000))
  seen = files.describe(tmp_path, ['x'])
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
