"""Result files: all of one or nothing, replaced and never duplicated, never read when damaged."""

import contextlib
import pathlib
import resource
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from kdjax.errors import UserError
from kdjax.scoring import results

META = {'set': 'in-domain', 'step': 5, 'temperature': 1.25}


def table(n: int = 50, seed: int = 0) -> pd.DataFrame:
  rng = np.random.default_rng(seed)
  columns = {'bytes': rng.integers(1, 99, n), 'nll': rng.normal(size=n), 'bin_count': list(rng.normal(size=(n, 3)))}
  return pd.DataFrame({'doc': [f'{i:016x}'.encode() for i in range(n)]} | columns)


@pytest.fixture
def file(tmp_path) -> pathlib.Path:
  path = results.result_path(tmp_path / 'results', 5, 'in-domain', 'abc')
  results.write_result(path, table(), META)
  return path


def test_what_is_written_is_read(file):
  found, meta = results.read_result(file)
  assert meta == META
  expected = table()
  assert list(found.columns) == list(expected.columns)
  for column in ('doc', 'bytes', 'nll'):
    assert list(found[column]) == list(expected[column])
  np.testing.assert_array_equal(np.stack(found['bin_count']), np.stack(expected['bin_count']))


def test_the_name_says_set_step_and_evaluation(file):
  assert file.name == 'in-domain-step5-abc.parquet'
  names = {
    results.result_path(file.parent, step, name, e) for step in (5, 50) for name in ('a', 'b') for e in ('x', 'y')
  }
  assert len(names) == 8


def test_writing_again_replaces_and_leaves_nothing_else(file):
  results.write_result(file, table(seed=1), META | {'temperature': 2.0})
  assert [p.name for p in file.parent.iterdir()] == [file.name]
  found, meta = results.read_result(file)
  assert meta['temperature'] == 2.0
  assert list(found['nll']) == list(table(seed=1)['nll'])


@pytest.mark.parametrize('damage', ['empty', 'truncated', 'text', 'tail'])
def test_a_damaged_file_is_refused_in_one_line_that_says_what_to_do(file, damage):
  data = file.read_bytes()
  flipped = lambda at: data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]
  file.write_bytes(
    {'empty': b'', 'truncated': data[: len(data) // 2], 'text': b'hello', 'tail': flipped(len(data) - 6)}[damage]
  )  # fmt: skip
  with pytest.raises(UserError, match='is damaged') as e:
    results.read_result(file)
  assert str(file) in str(e.value) and 'delete it' in str(e.value)
  assert '\n' not in str(e.value)


def test_a_flipped_bit_anywhere_is_never_read_in_silence(file):
  data = file.read_bytes()
  expected, meta = results.read_result(file)
  rng = np.random.default_rng(0)
  for bit in rng.integers(0, 8 * len(data), 300):
    spoilt = bytearray(data)
    spoilt[bit // 8] ^= 1 << bit % 8
    file.write_bytes(spoilt)
    with contextlib.suppress(UserError):
      found, found_meta = results.read_result(file)
      pd.testing.assert_frame_equal(found, expected)
      assert found_meta == meta


def test_a_parquet_file_of_something_else_is_refused(tmp_path):
  table().drop(columns='bin_count').to_parquet(tmp_path / 'x.parquet')
  with pytest.raises(UserError, match='is damaged'):
    results.read_result(tmp_path / 'x.parquet')


def test_a_missing_file_is_refused_in_one_line(tmp_path):
  with pytest.raises(UserError) as e:
    results.read_result(tmp_path / 'none.parquet')
  assert '\n' not in str(e.value)


def test_a_full_disk_is_one_line_and_leaves_the_old_file(file):
  before = file.read_bytes()
  script = f"""
import pathlib, resource, signal
from kdjax import cli
from tests.scoring.test_results import META, table
from kdjax.scoring import results
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
with cli.user_errors():
  results.write_result(pathlib.Path({str(file)!r}), table(5000), META)
"""
  repo = pathlib.Path(__file__).parents[2]
  done = subprocess.run([sys.executable, '-c', script], cwd=repo, capture_output=True, text=True, check=False)
  assert done.returncode == 2
  lines = [line for line in done.stderr.splitlines() if line]
  assert len(lines) == 1, done.stderr
  assert 'could not be written' in lines[0] and 'free some disk space' in lines[0]
  assert file.read_bytes() == before
  assert [p.name for p in file.parent.iterdir()] == [file.name]


def test_the_limit_of_the_test_above_is_this_processs_own():
  assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
