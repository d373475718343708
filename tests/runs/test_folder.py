import json
import os
import subprocess
import sys
import threading
import time

import pytest

from kdjax import machine
from kdjax.errors import OwnedError, TrainingError, UserError
from kdjax.runs import folder as run_lib
from kdjax.runs.folder import Heartbeat, RunFolder
from kdjax.storage.paths import read_json, write_json
from tests import commands

CLAIM = """
import sys, time
from kdjax.errors import UserError
from kdjax.runs.folder import Heartbeat, RunFolder
folder = RunFolder(sys.argv[1])
while time.time() < float(sys.argv[2]):
  pass
try:
  folder.claim(60)
except UserError as e:
  sys.exit(f'refused: {e}')
with Heartbeat([folder], 10).beating() as heart:
  print('claimed', flush=True)
  sys.stdin.read()
  heart.finish('done')
"""


def trainer(folder, at: float = 0.0) -> subprocess.Popen:
  """A real process that claims the folder and holds it until its stdin closes."""
  return subprocess.Popen(
    [sys.executable, '-c', CLAIM, str(folder), str(at)],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    env={**os.environ, 'PYTHONPATH': str(commands.REPO)},
  )


@pytest.fixture
def folder(tmp_path) -> RunFolder:
  return RunFolder(tmp_path / 'run')


def owner_file(folder):
  (path,) = folder.path.glob('owner-*.json')
  return path


def elsewhere(folder, heartbeat: float | None, **owner) -> None:
  """A claim by a process on another host, and its last heartbeat, in seconds from now."""
  folder.path.mkdir(exist_ok=True)
  claim = {'token': 'x', 'host': 'elsewhere', 'boot': 'b', 'pid': 7, 'started': '1', 'time': 0.0} | owner
  write_json(folder.path / 'owner-3.json', claim)
  if heartbeat is not None:
    write_json(folder.path / 'status.json', {'state': 'running', 'step': 3, 'heartbeat': time.time() + heartbeat})


def test_a_live_trainer_keeps_its_folder_and_a_dead_one_loses_it_at_once(folder):
  owner = trainer(folder.path)
  try:
    assert owner.stdout.readline() == 'claimed\n'
    with pytest.raises(UserError, match=f'another trainer owns it .process {owner.pid} on'):
      folder.claim(60)
    assert folder.status()['state'] == 'running'
  finally:
    commands.kill(owner)
  began = time.monotonic()
  folder.claim(60)
  assert time.monotonic() - began < 1
  folder.check_owner()


def test_a_trainer_that_is_done_gives_its_folder_back(folder):
  owner = trainer(folder.path)
  assert owner.stdout.readline() == 'claimed\n'
  owner.communicate('')
  assert owner.returncode == 0
  assert folder.is_done()
  folder.claim(60)


def test_of_trainers_that_start_at_the_same_moment_exactly_one_trains(folder):
  at = time.time() + 5
  several = [trainer(folder.path, at) for _ in range(4)]
  try:
    commands.wait_for(lambda: sum(p.poll() is not None for p in several) == 3, timeout=60)
    assert all(p.stderr.read().startswith('refused: ') for p in several if p.poll() is not None)
    (alive,) = [p for p in several if p.poll() is None]
    assert alive.stdout.readline() == 'claimed\n'
  finally:
    for process in several:
      commands.kill(process)


def test_of_threads_that_take_over_a_dead_folder_exactly_one_gets_it(folder):
  for round_ in range(20):
    for path in folder.path.glob('owner-*'):
      path.unlink()
    elsewhere(folder, None)
    rivals, won = [RunFolder(folder.path) for _ in range(8)], []
    barrier = threading.Barrier(len(rivals))

    def claim(rival, won=won, barrier=barrier):
      barrier.wait()
      try:
        rival.claim(0.1)
        won.append(rival)
      except (UserError, TrainingError):
        pass

    threads = [threading.Thread(target=claim, args=(rival,)) for rival in rivals]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
    assert len([rival for rival in won if rival.owns()]) == 1, round_
    assert len(won) == 1, round_


@pytest.mark.parametrize('known', [{'pids': 'pid:[1]'}, {'pids': ''}, {}], ids=['another', 'none', 'older'])
def test_a_process_that_cannot_be_seen_from_here_lives_by_its_heartbeat(folder, known):
  """Same host name, same boot, another PID namespace: the PID means nothing here."""
  here = run_lib._this_process() | {'started': 'another'}  # here, this PID is another process
  del here['pids']
  elsewhere(folder, 1000.0, **here | known)
  beats = threading.Timer(0.2, elsewhere, (folder, 2000.0), here | known)
  beats.start()
  with pytest.raises(UserError, match='another trainer owns it'):
    folder.claim(30)
  beats.join()
  elsewhere(folder, -31.0, **here | known)
  folder.claim(0.2)


def test_a_reused_process_id_is_not_the_old_owner(folder):
  folder.claim(60)
  owner = read_json(owner_file(folder))
  assert owner['pid'] == os.getpid()
  with pytest.raises(UserError, match='another trainer owns it'):
    RunFolder(folder.path).claim(60)
  write_json(owner_file(folder), {**owner, 'started': str(int(owner['started']) - 1)})
  RunFolder(folder.path).claim(60)


def test_the_same_process_id_after_a_restart_of_the_host_is_judged_by_its_heartbeat(folder):
  folder.claim(60)
  write_json(owner_file(folder), {**read_json(owner_file(folder)), 'boot': 'before', 'time': 0.0})
  RunFolder(folder.path).claim(0.2)


@pytest.mark.parametrize('skew', [-86400.0, -90.0, 0.0, 90.0])
def test_the_clock_of_another_host_does_not_matter(folder, monkeypatch, skew):
  """A live owner whose clock is off keeps its folder; a silent one loses it after the timeout, however late its clock was."""
  monkeypatch.setattr(run_lib, 'BEAT', 0.05)
  elsewhere(folder, skew)
  beats = threading.Timer(0.3, elsewhere, (folder, skew + 2))
  beats.start()
  with pytest.raises(UserError, match='process 7 on elsewhere'):
    folder.claim(30)
  beats.join()
  began = time.monotonic()
  folder.claim(0.5)
  assert time.monotonic() - began > 0.4


def test_an_owner_that_has_claimed_but_not_yet_beaten_is_waited_for(folder, monkeypatch):
  monkeypatch.setattr(run_lib, 'BEAT', 0.05)
  elsewhere(folder, None, time=time.time())
  began = time.monotonic()
  folder.claim(0.5)
  assert time.monotonic() - began > 0.4


def test_an_owner_on_another_host_whose_heart_stops_is_taken_over_after_the_timeout(folder, monkeypatch, capsys):
  monkeypatch.setattr(run_lib, 'BEAT', 0.05)
  elsewhere(folder, 0.0)
  began = time.monotonic()
  folder.claim(0.5)
  assert 0.4 < time.monotonic() - began < 5
  assert 'owned by a process on elsewhere; waiting up to' in capsys.readouterr().out


def test_an_owner_on_another_host_whose_heart_beats_is_left_alone(folder, monkeypatch):
  monkeypatch.setattr(run_lib, 'BEAT', 0.05)
  elsewhere(folder, 0.0)
  threading.Timer(0.2, lambda: elsewhere(folder, 1.0)).start()
  with pytest.raises(UserError, match='process 7 on elsewhere'):
    folder.claim(10)
  assert read_json(owner_file(folder))['token'] == 'x'


def test_a_claim_cut_by_a_kill_blocks_nobody(folder):
  folder.path.mkdir()
  (folder.path / 'owner-4.json').write_text('{"tok')
  folder.claim(60)
  assert owner_file(folder).name == 'owner-5.json'


def test_an_owner_that_was_replaced_stops_and_writes_no_status(folder):
  folder.claim(60)
  with Heartbeat([folder], 10).beating():
    elsewhere(folder, 0.0)
    before = (folder.path / 'status.json').read_bytes()
    with pytest.raises(TrainingError, match='taken this folder over'):
      folder.check_owner()
  assert (folder.path / 'status.json').read_bytes() == before
  folder.release()
  assert 'released' not in read_json(folder.path / 'owner-3.json')


def test_the_status_tells_how_a_run_stands(folder, monkeypatch):
  monkeypatch.setattr(run_lib, 'BEAT', 0.02)
  folder.claim(60)
  heart = Heartbeat([folder], 10)
  with heart.beating():
    heart.step(3)
    commands.wait_for(lambda: folder.status()['step'] == 3, timeout=5)
    first = folder.status()
    assert (first['state'], first['total_steps']) == ('running', 10)
    commands.wait_for(lambda: folder.status()['heartbeat'] > first['heartbeat'], timeout=5)
    heart.finish('preempted')
  assert folder.status()['state'] == 'preempted'
  assert not folder.is_done()
  folder.claim(60)
  with Heartbeat([folder], 10).beating() as heart:
    heart.finish('done')
  assert folder.is_done()


@pytest.mark.parametrize(
  ('error', 'text'), [(TrainingError('no\nmore'), r'no\nmore'), (KeyboardInterrupt(), 'KeyboardInterrupt'), (OSError(), 'OSError')]
)  # fmt: skip
def test_a_run_that_fails_says_why_in_its_status(folder, error, text):
  folder.claim(60)
  with pytest.raises(type(error)), Heartbeat([folder], 10).beating():
    raise error
  assert (folder.status()['state'], folder.status()['error']) == ('failed', text)
  folder.claim(60)


DAMAGE = [b'', b'{"config": {', b'\xff\xfe', b'[1]', b'3']


@pytest.mark.parametrize('damage', DAMAGE)
def test_a_damaged_identity_is_refused_with_one_line(folder, damage):
  folder.record({'a': 1}, {})
  (folder.path / 'run.json').write_bytes(damage)
  with pytest.raises(UserError, match=r'run\.json is damaged .*delete it and status\.json') as e:
    folder.read_record()
  assert '\n' not in str(e.value)


@pytest.mark.parametrize('damage', DAMAGE)
def test_a_damaged_status_is_none_and_is_reported_once(folder, damage, caplog):
  folder.record({'a': 1}, {})
  (folder.path / 'status.json').write_bytes(damage)
  assert folder.status() is None and not folder.is_done()
  (warning,) = [record.getMessage() for record in caplog.records]
  assert 'status.json is damaged' in warning
  folder.claim(60)


def test_the_slower_of_two_claims_removes_its_own_file_and_stands_aside(folder, monkeypatch):
  """Between its look at the folder and its claim another runner claims it, ends, and a third one claims it."""
  folder.claim(60)
  folder.release()
  slow, create = RunFolder(folder.path), run_lib.paths.create

  def late(path, text):
    monkeypatch.setattr(run_lib.paths, 'create', create)
    quick = RunFolder(folder.path)
    quick.claim(60)
    quick.release()
    RunFolder(folder.path).claim(60)
    create(path, text)

  monkeypatch.setattr(run_lib.paths, 'create', late)
  with pytest.raises(OwnedError, match='at the same moment'):
    slow.claim(60)
  assert [path.name for path in folder.path.glob('owner-*.json')] == ['owner-3.json']


def test_another_config_is_refused_by_the_names_of_its_fields(folder):
  folder.record({'model': {'d_model': 8, 'tied': True}, 'seed': 1}, {})
  folder.check_config({'model': {'d_model': 8, 'tied': True}, 'seed': 1})
  with pytest.raises(UserError, match=r'model\.d_model is 8 there, 16 here; seed is 1 there, None here; use another'):
    folder.check_config({'model': {'d_model': 16, 'tied': True}})


def test_another_fingerprint_is_refused_by_name_and_a_new_one_is_kept(folder):
  folder.record({}, {'data': 'a'})
  folder.record({}, {'data': 'a', 'init': 'i'})
  assert folder.read_record()['fingerprints'] == {'data': 'a', 'init': 'i'}
  with pytest.raises(UserError, match=r'the data is not the one the run began with \(a, now b\)'):
    folder.record({}, {'data': 'b'})
  with pytest.raises(UserError, match='the init is not'):
    folder.record({}, {'data': 'a', 'init': 'j'})


def test_every_start_is_recorded_with_its_command_versions_and_commit(folder):
  for _ in range(2):
    folder.record({}, {}, {'facts': {'tokens': 3}})
  identity = folder.read_record()
  assert identity['facts'] == {'tokens': 3}
  assert len(identity['commands']) == 2
  command = identity['commands'][1]
  assert command['argv'] == sys.argv
  assert {'python', 'jax', 'flax', 'optax', 'orbax-checkpoint', 'grain'} <= command['versions'].keys()
  assert command['git'] == machine.git_commit()


def test_the_commit_is_the_checkouts_and_shows_that_files_were_changed(tmp_path, monkeypatch):
  git = lambda *args: subprocess.run(('git', *args), cwd=tmp_path, check=True, capture_output=True, text=True).stdout
  package = tmp_path / 'kdjax'
  package.mkdir()
  (package / 'run.py').write_text('1\n')
  monkeypatch.setattr(machine, '__file__', str(package / 'machine.py'))
  assert machine.git_commit() == ''
  git('init', '-q')
  git('add', '.')
  git('-c', 'user.name=a', '-c', 'user.email=a@b', 'commit', '-qm', 'x')
  head = git('rev-parse', 'HEAD').strip()
  assert machine.git_commit() == head
  (package / 'run.py').write_text('2\n')
  assert machine.git_commit() == head + '+'


def test_what_a_crash_of_the_host_must_not_empty_is_flushed_before_and_after_it_is_renamed(folder, monkeypatch):
  flushed, replaced = [], []
  flush, replace = run_lib.paths.flush, os.replace

  def record(path):
    flushed.append((os.path.basename(path), len(replaced)))
    flush(path)

  monkeypatch.setattr(run_lib.paths, 'flush', record)
  monkeypatch.setattr(os, 'replace', lambda a, b: (replaced.append(b), replace(a, b)))
  folder.claim(60)
  assert [name for name, _ in flushed] == ['owner-1.json', 'run']
  flushed.clear()
  folder.record({}, {})
  (before, zero), after = flushed
  assert before.endswith('run.json') and zero == 0 and after == ('run', 1)
  flushed.clear()
  with Heartbeat([folder], 10).beating() as heart:
    heart._write()
    assert not flushed  # every two seconds: a lost heartbeat costs nothing
    heart.finish('done')
  assert flushed[0][0].endswith('status.json') and flushed[1][0] == 'run'


def test_json_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
  path = tmp_path / 'deep' / 'a.json'
  write_json(path, {'a': 1})
  monkeypatch.setattr(os, 'replace', lambda *_: (_ for _ in ()).throw(OSError(28, 'full')))
  with pytest.raises(OSError, match='full'):
    write_json(path, {'a': 2})
  assert json.loads(path.read_text()) == {'a': 1}
  assert [p.name for p in path.parent.iterdir()] == ['a.json']


def test_a_disk_that_fails_for_a_moment_does_not_stop_the_heart(folder, monkeypatch):
  monkeypatch.setattr(run_lib, 'BEAT', 0.02)
  folder.claim(1)
  owns, failures = RunFolder.owns, iter([OSError(116, 'Stale file handle')] * 3)

  def flaky(self):
    error = next(failures, None)
    if error:
      raise error
    return owns(self)

  with Heartbeat([folder], 10).beating() as heart:
    monkeypatch.setattr(RunFolder, 'owns', flaky)
    before = folder.status()['heartbeat']
    commands.wait_for(lambda: folder.status()['heartbeat'] > before)
    heart.finish('done')
  assert folder.is_done()


def test_a_resume_with_other_versions_is_reported(folder, monkeypatch, caplog):
  folder.record({}, {})
  folder.record({}, {})
  assert not caplog.records
  now = machine.versions()
  monkeypatch.setattr(machine, 'versions', lambda: now | {'jax': '9.9'})
  folder.record({}, {})
  (warning,) = [record.getMessage() for record in caplog.records]
  assert f'resumed with other versions (jax {now["jax"]} is now 9.9)' in warning
