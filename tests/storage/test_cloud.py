"""Outages of an object store: short ones are waited for, long ones end a run with work left, and nothing is lost."""

import logging
import subprocess
import sys
import time

import pytest

from kdjax import cli
from kdjax.errors import FAILED, TEMPORARY, StoreUnavailable
from kdjax.runs.folder import Heartbeat, RunFolder
from kdjax.storage import paths
from tests import bucket, commands, tiny
from tests.runs import test_checkpoint

pytest.importorskip('gcp_storage_emulator', reason='the emulator of an object store is in the [dev] extra')
cloud = pytest.importorskip('kdjax.storage.cloud', reason='the client of gs:// is in the [gcs] extra')


@pytest.fixture(scope='module')
def port():
  with bucket.serving() as port, pytest.MonkeyPatch.context() as patch:
    for name, value in bucket.environment(port).items():
      patch.setenv(name, value)
    yield port


@pytest.fixture
def folder(port, tmp_path):
  yield paths.Path(f'gs://{bucket.BUCKET}/{tmp_path.name}')
  bucket.begin_outage(port, 0)


@pytest.fixture
def impatient(monkeypatch):
  monkeypatch.setattr(cloud, 'PATIENCE', 1.0)
  monkeypatch.setattr(cloud.CloudStorage, '_unavailable', False)


@pytest.mark.parametrize('status', [500, 502, 503, 504, 429, 408, 401])
def test_a_short_outage_is_waited_for_and_logged(port, folder, caplog, status):
  caplog.set_level(logging.INFO)
  paths.write_text(folder / 'a', 'before')
  bucket.begin_outage(port, 2, status)
  paths.write_text(folder / 'a', 'after')
  assert paths.read_bytes(folder / 'a') == b'after'
  commands.wait_for(lambda: 'the store answers again' in caplog.text)
  assert caplog.text.count('the store does not answer') == 1 and str(status) in caplog.text + ' 502'


def test_a_long_outage_is_an_error_of_its_own_and_the_next_request_does_not_wait_again(port, folder, impatient):
  bucket.begin_outage(port, 60)
  with pytest.raises(StoreUnavailable, match='the store does not answer'):
    paths.write_text(folder / 'a', 'text')
  began = time.monotonic()
  for work in (lambda: paths.read_bytes(folder / 'a'), (folder / 'a').exists, lambda: list(folder.iterdir())):
    with pytest.raises(StoreUnavailable):
      work()
  assert time.monotonic() - began < cloud.PATIENCE
  bucket.begin_outage(port, 0)
  paths.write_text(folder / 'a', 'text')
  assert not cloud.CloudStorage._unavailable


@pytest.mark.parametrize('status', [400, 403, 405])
def test_an_error_that_does_not_pass_is_an_oserror_at_once(port, folder, status):
  bucket.begin_outage(port, 60, status)
  began = time.monotonic()
  with pytest.raises((OSError, ValueError)) as e:
    paths.write_text(folder / 'a', 'text')
  assert not isinstance(e.value, StoreUnavailable) and time.monotonic() - began < 5


def test_the_heart_beats_again_after_an_outage(port, folder, impatient):
  run = RunFolder(folder / 'run')
  run.claim(60)
  with Heartbeat([run], 10).beating() as heart:
    before = run.heartbeat()
    bucket.begin_outage(port, 4)
    time.sleep(5)
    commands.wait_for(lambda: run.heartbeat() != before)
    assert heart._thread.is_alive()
    bucket.begin_outage(port, 60)  # also at the end: another trainer sees that this process is gone
  bucket.begin_outage(port, 0)
  assert run.status()['state'] == 'running'


def test_a_mirror_copies_later_what_an_outage_held_up(port, folder, impatient):
  mirror = paths.Mirror(folder)
  with mirror.appending('a.txt') as file:
    file.write('one')
  bucket.begin_outage(port, 60)
  mirror.push()
  bucket.begin_outage(port, 0)
  mirror.push()
  assert paths.read_bytes(folder / 'a.txt') == b'one'


def test_checkpoints_that_cannot_be_read_now_are_not_taken_for_damaged(port, folder, impatient):
  states = test_checkpoint.save(folder / 'checkpoints', 2, 4)
  bucket.begin_outage(port, 60)
  with pytest.raises(StoreUnavailable):
    test_checkpoint.read(folder / 'checkpoints', states[4])
  bucket.begin_outage(port, 0)
  assert test_checkpoint.read(folder / 'checkpoints', states[4]).step == 4


def test_a_command_that_the_store_refuses_ends_with_one_line(port, folder, capsys):
  bucket.begin_outage(port, 60, 403)
  with pytest.raises(SystemExit) as e, cli.user_errors():
    paths.write_text(folder / 'a', 'text')
  (line,) = capsys.readouterr().err.splitlines()
  assert e.value.code == FAILED and 'Forbidden' in line and "this machine's permissions" in line


def test_a_command_that_an_outage_ends_has_work_left(capsys):
  with pytest.raises(SystemExit) as e, cli.user_errors():
    raise StoreUnavailable('the store does not answer (HttpError: 503)')
  assert e.value.code == TEMPORARY
  assert 'once it does, the same command resumes from the last checkpoint' in capsys.readouterr().err


TRAIN = """
from kdjax import train
from kdjax.storage import cloud
cloud.PATIENCE = {patience}
train.main()
"""


@pytest.mark.slow
@pytest.mark.parametrize(('patience', 'code'), [(120, 0), (4, TEMPORARY)])
def test_a_run_survives_an_outage_bit_for_bit(port, folder, tmp_path, patience, code):
  """A short one by waiting, a long one by being started again."""
  fields = {'student.tokens': 60 * 8 * 16, 'checkpoint.every': 10, 'data.cache': str(tmp_path / 'stores')}

  def start(home):
    config = tiny.write_config(tmp_path, **fields, runs=str(home))
    command = [sys.executable, '-c', TRAIN.format(patience=patience), f'--config={config}', f'--workdir={home}/mine']
    environment = commands.environment() | bucket.environment(port)
    return subprocess.Popen(command, env=environment, cwd=commands.REPO, stderr=subprocess.PIPE, text=True)

  def end(process):
    _, err = process.communicate(timeout=300)
    assert 'Traceback' not in err, err
    return process.returncode

  disk = RunFolder(paths.Path(tmp_path) / 'disk' / 'mine' / 'students' / 'distilled')
  assert end(start(tmp_path / 'disk')) == 0
  process = start(folder)
  run = RunFolder(folder / 'mine' / 'students' / 'distilled')
  commands.wait_for(lambda: ((run.status() or {}).get('step') or 0) >= 15, process)
  bucket.begin_outage(port, 20)
  assert end(process) == code
  bucket.begin_outage(port, 0)
  if code:
    assert end(start(folder)) == 0
  assert run.is_done()
  assert commands.metrics(run.path) == commands.metrics(disk.path)
