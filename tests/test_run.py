import json
import os
import subprocess
import sys
import threading
import time

import pytest

from kdjax import run as run_lib
from kdjax.errors import TrainingError, UserError
from kdjax.paths import read_json, write_json
from kdjax.run import Heartbeat, RunFolder
from tests import runs

CLAIM = """
import sys, time
from kdjax.errors import UserError
from kdjax.run import Heartbeat, RunFolder
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
    env={**os.environ, 'PYTHONPATH': str(runs.REPO)},
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
    runs.kill(owner)
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
    runs.wait_for(lambda: sum(p.poll() is not None for p in several) == 3, timeout=60)
    assert all(p.stderr.read().startswith('refused: ') for p in several if p.poll() is not None)
    (alive,) = [p for p in several if p.poll() is None]
    assert alive.stdout.readline() == 'claimed\n'
  finally:
    for process in several:
      runs.kill(process)


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
  folder.claim(30)


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
  RunFolder(folder.path).claim(60)


@pytest.mark.parametrize('heartbeat', [None, -100.0])
def test_a_silent_owner_on_another_host_is_gone(folder, heartbeat):
  elsewhere(folder, heartbeat)
  began = time.monotonic()
  folder.claim(60)
  assert time.monotonic() - began < 1


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
    runs.wait_for(lambda: folder.status()['step'] == 3, timeout=5)
    first = folder.status()
    assert (first['state'], first['total_steps']) == ('running', 10)
    runs.wait_for(lambda: folder.status()['heartbeat'] > first['heartbeat'], timeout=5)
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


@pytest.mark.parametrize('damage', [b'', b'{"config": {', b'\xff\xfe', b'[1]', b'3'])
@pytest.mark.parametrize('name', ['run.json', 'status.json'])
def test_damaged_json_is_refused_with_one_line(folder, name, damage):
  folder.record({'a': 1}, {})
  (folder.path / name).write_bytes(damage)
  with pytest.raises(UserError, match=f'{name} is damaged') as e:
    folder.identity() if name == 'run.json' else folder.status()
  assert '\n' not in str(e.value)


def test_another_config_is_refused_by_the_names_of_its_fields(folder):
  folder.record({'model': {'d_model': 8, 'tied': True}, 'seed': 1}, {})
  folder.check_config({'model': {'d_model': 8, 'tied': True}, 'seed': 1})
  with pytest.raises(UserError, match=r'model\.d_model is 8 there, 16 here; seed is 1 there, None here; use another'):
    folder.check_config({'model': {'d_model': 16, 'tied': True}})


def test_another_fingerprint_is_refused_by_name_and_a_new_one_is_kept(folder):
  folder.record({}, {'data': 'a'})
  folder.record({}, {'data': 'a', 'init': 'i'})
  assert folder.identity()['fingerprints'] == {'data': 'a', 'init': 'i'}
  with pytest.raises(UserError, match=r'the data is not the one the run began with \(a, now b\)'):
    folder.record({}, {'data': 'b'})
  with pytest.raises(UserError, match='the init is not'):
    folder.record({}, {'data': 'a', 'init': 'j'})


def test_every_start_is_recorded_with_its_command_versions_and_commit(folder):
  for _ in range(2):
    folder.record({}, {}, {'facts': {'tokens': 3}})
  identity = folder.identity()
  assert identity['facts'] == {'tokens': 3}
  assert len(identity['commands']) == 2
  command = identity['commands'][1]
  assert command['argv'] == sys.argv
  assert {'python', 'jax', 'flax', 'optax', 'orbax-checkpoint', 'grain'} <= command['versions'].keys()
  assert command['git'] == run_lib.git_commit()


def test_the_commit_is_the_checkouts_and_shows_that_files_were_changed(tmp_path, monkeypatch):
  git = lambda *args: subprocess.run(('git', *args), cwd=tmp_path, check=True, capture_output=True, text=True).stdout
  package = tmp_path / 'kdjax'
  package.mkdir()
  (package / 'run.py').write_text('1\n')
  monkeypatch.setattr(run_lib, '__file__', str(package / 'run.py'))
  assert run_lib.git_commit() == ''
  git('init', '-q')
  git('add', '.')
  git('-c', 'user.name=a', '-c', 'user.email=a@b', 'commit', '-qm', 'x')
  head = git('rev-parse', 'HEAD').strip()
  assert run_lib.git_commit() == head
  (package / 'run.py').write_text('2\n')
  assert run_lib.git_commit() == head + '+'


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
    runs.wait_for(lambda: folder.status()['heartbeat'] > before)
    heart.finish('done')
  assert folder.is_done()
