"""A run's folder: who it is, who owns it, how it stands.

run.json       config, command, commit, versions, fingerprints: written once, compared on every later start
owner-N.json   the token of the process that may write here: the one of the greatest N; each claim creates the next; and the folder's birthmark
status.json    state, step, heartbeat; renewed every few seconds by a thread, so that a long compile still beats
tokenizer.json what its tokens mean, for whoever comes later; absent where they are bytes
checkpoints/   see kdjax/runs/checkpoint.py
metrics.jsonl  one line a step
results/       the eval job's Parquet files
"""

import contextlib
import json
import logging
import os
import secrets
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from kdjax import machine
from kdjax.data.tokenizer import Tokenizer
from kdjax.errors import OwnedError, ProcessLost, StoreUnavailable, TrainingError, UserError
from kdjax.runtime import distributed
from kdjax.runtime.preemption import Preempted
from kdjax.storage import paths

log = logging.getLogger('kdjax')

STATES = ('running', 'done', 'failed', 'preempted')
BEAT = 2.0  # seconds


class RunFolder:
  """One run's folder. Only process 0 of a multi-process job writes to it."""

  def __init__(self, path: str | os.PathLike):
    self.path = paths.runs_path(path)
    self.checkpoints = self.path / 'checkpoints'
    self.metrics = self.path / 'metrics.jsonl'
    self.results = self.path / 'results'
    self._tokenizer = self.path / 'tokenizer.json'
    self._token: str | None = None
    self._claim: paths.Path
    self._status_reported = False
    self.birthmark = 0  # drawn at the first claim (on process 0): a folder that was deleted and made again has another

  @property
  def writes(self) -> bool:
    return jax.process_index() == 0

  @property
  def name(self) -> str:
    return self.path.name

  def read_record(self) -> dict[str, Any] | None:
    """Read run.json; None for a new folder. Raises UserError if it is damaged."""
    try:
      return paths.read_json(self.path / 'run.json')
    except UserError as e:
      raise UserError(
        f'{str(e).partition(";")[0]}; restore it, or delete it and status.json, and run the same command again: run.json is written anew, and '
        'the checkpoints are compared with the config by the fingerprints that they carry'
      ) from None

  def status(self) -> dict[str, Any] | None:
    """Read status.json; None where there is none, or a crash of the host has emptied it, which is logged once."""
    try:
      return paths.read_json(self.path / 'status.json')
    except UserError as e:
      if not self._status_reported:
        log.warning(
          '%s: ignored, as the run may have stopped anywhere; its next start writes it anew', str(e).partition(';')[0]
        )
      self._status_reported = True
      return None

  def fingerprint(self, name: str) -> str:
    """Return a fingerprint that run.json records, e.g. 'tokenizer'; '' where it has none."""
    return (self.read_record() or {}).get('fingerprints', {}).get(name, '')

  def is_done(self) -> bool:
    return (self.status() or {}).get('state') == 'done'

  def check_config(self, config: dict[str, Any]) -> None:
    """Raise UserError, naming the fields, if the folder was written by another config."""
    known = self.read_record()
    if known is not None:
      self.compare(known['config'], config)

  def compare(self, known: dict[str, Any], config: dict[str, Any]) -> None:
    """Raise UserError, naming the fields, if this folder's config is not `config`."""
    different = list(_differences(known, json.loads(json.dumps(config)), ''))
    if different:
      raise UserError(
        f'{self.path} was written by another config: {"; ".join(different[:5])}; use another --workdir or delete the folder'
      )

  def record(self, config: dict[str, Any], fingerprints: dict[str, Any], notes: dict[str, Any] | None = None) -> None:
    """Write run.json; on a later start, refuse fingerprints that differ and note the new command.

    Args:
      config: what defines the run; compared.
      fingerprints: of the data, the tokenizer, the teacher's weights, the initial weights; compared where they are known.
      notes: kept beside them, not compared.
    """
    self.check_config(config)
    known = self.read_record()
    if known is None:
      known = {'config': config, 'fingerprints': fingerprints, **(notes or {}), 'commands': []}
    self.check_fingerprints(fingerprints)
    known['fingerprints'] = fingerprints | known['fingerprints']
    if self.writes:
      _report_other_versions(self.path, known['commands'])
      known['commands'].append(
        {'argv': sys.argv, 'time': time.time(), 'versions': machine.versions(), 'git': machine.git_commit()}
      )
      paths.write_json(self.path / 'run.json', known)

  def keep_tokenizer(self, tokenizer: Tokenizer) -> dict[str, Any]:
    """Save the tokenizer in the folder; return its metadata for run.json: kind and token roles."""
    if self.writes and not tokenizer.is_bytes:
      paths.write_text(self._tokenizer, tokenizer.to_json())
    return tokenizer.note()

  def tokenizer(self) -> Tokenizer:
    """The tokenizer with which the model learned. Raises UserError if the folder keeps none, or another one."""
    known = self.read_record() or {}
    note = known.get('tokenizer')
    if note is None:
      raise UserError(
        f'{self.path} keeps no tokenizer: it was begun by an older kdjax; train it again, or copy its tokenizer.json'
      )
    found = Tokenizer() if note['kind'] == 'bytes' else Tokenizer.from_file(self._tokenizer)
    if found.fingerprint != known['fingerprints']['tokenizer']:
      raise UserError(f'{self._tokenizer} is not the tokenizer with which this run learned; restore it')
    return found

  def check_fingerprints(self, fingerprints: dict[str, Any]) -> None:
    """Raise UserError, naming it, if one of these is known and is not the one that the run began with."""
    known = (self.read_record() or {'fingerprints': {}})['fingerprints']
    for name, value in fingerprints.items():
      if known.get(name, value) != value:
        raise UserError(
          f'{self.path}: the {name} is not the one the run began with ({known[name]}, now {value}); '
          'restore the old data and versions, or use another --workdir'
        )

  def claim(self, timeout: float) -> None:
    """Make this process the folder's owner.

    An owner is alive if its heartbeat changes, or if its process is visible from here and running. Raises OwnedError if the owner is alive;
    for an owner on another host or in another container, waits up to `timeout` seconds for its heartbeat to stop. If several processes claim
    at once, one creates the file and the others fail: exclusive creation is atomic even without file locks.
    """
    self._token = uuid.uuid4().hex
    if not self.writes:
      return
    self.path.mkdir(parents=True, exist_ok=True)
    number, owner = self._owner()
    if number and owner.get('released') is None and not self._is_gone(owner, timeout):
      raise OwnedError(
        f'{self.path}: another trainer owns it (process {owner.get("pid")} on {owner.get("host")}); wait for it, or stop it and start again'
      )
    self._claim = self.path / f'owner-{number + 1}.json'
    self.birthmark = owner.get('birthmark') or 1 + secrets.randbelow(2**31 - 1)
    try:
      paths.create(self._claim, json.dumps(self._ownership() | {'time': time.time()}, indent=1))
      if (
        not self.owns()
      ):  # this process was slow, and another one has claimed the folder, or even released it, meanwhile
        self._claim.unlink(missing_ok=True)
        raise FileExistsError
    except FileExistsError:
      raise OwnedError(
        f'{self.path}: another trainer claimed it at the same moment; this one leaves it alone'
      ) from None
    (self.path / f'owner-{number}.json').unlink(missing_ok=True)

  def owns(self) -> bool:
    return self._owner()[1].get('token') == self._token

  def check_owner(self) -> None:
    """Raise TrainingError if another process has taken the folder over. Called before each checkpoint."""
    if self.writes and not self.owns():
      raise TrainingError(f'{self.path}: another trainer has taken this folder over; this one stops without writing')

  def release(self) -> None:
    with contextlib.suppress(OSError):  # a full disk, a store that is away: the next trainer finds this process gone
      if self.writes and self.owns():
        paths.write_json(self._claim, self._ownership() | {'released': time.time()})

  def _ownership(self) -> dict[str, Any]:
    return {'token': self._token, 'birthmark': self.birthmark, **_this_process()}

  def _owner(self) -> tuple[int, dict[str, Any]]:
    """The number and the content of the newest claim; (0, {}) where there is none, {} for one that was cut by a kill."""
    numbers = [path.stem.removeprefix('owner-') for path in self.path.glob('owner-*.json')]
    number = max((int(n) for n in numbers if n.isdigit()), default=0)
    for _ in range(
      50
    ):  # a rival may stand between creating its claim and writing it; a second later it was killed there
      with contextlib.suppress(UserError):
        return number, paths.read_json(self.path / f'owner-{number}.json') or {}
      time.sleep(0.02)
    return number, {}

  def _is_gone(self, owner: dict[str, Any], timeout: float) -> bool:
    here = _this_process()
    if not owner:  # killed in the middle of its claim
      return True
    if all(owner.get(name) == here[name] for name in ('host', 'boot', 'pids')):
      return machine.start_time(owner['pid']) != owner.get('started')
    print(
      f'{self.path}: owned by a process on {owner.get("host")}; waiting up to {timeout:.0f} s to see whether it is alive',
      flush=True,
    )
    pulse = Pulse()
    while pulse.silence(self.heartbeat()) < timeout:
      time.sleep(min(BEAT, timeout))
      if pulse.changes:
        return False
    return True

  def heartbeat(self) -> float | None:
    """Read the last heartbeat, by its writer's clock; None before the first."""
    return (self.status() or {}).get('heartbeat')


def claim_all(folders: Sequence[RunFolder], timeout: float) -> None:
  """Make this process the owner of all of them, or of none. Raises OwnedError if one has a live owner."""
  for k, folder in enumerate(folders):
    try:
      folder.claim(timeout)
    except OwnedError:
      for claimed in folders[:k]:
        claimed.release()
      raise


class Pulse:
  """Measures for how long heartbeats have not changed, by this host's clock alone: clocks of two hosts may be minutes apart."""

  def __init__(self) -> None:
    self.changes = 0
    self._last: Any = None
    self._since: float | None = None

  def silence(self, heartbeats: Any) -> float:
    """Return the seconds since these heartbeats were first seen."""
    if self._since is None or heartbeats != self._last:
      self.changes += self._since is not None
      self._last, self._since = heartbeats, time.monotonic()
    return time.monotonic() - self._since


class Heartbeat:
  """Keeps the status files of a cohort's folders fresh from a thread of its own."""

  def __init__(self, folders: list[RunFolder], total_steps: int):
    self._folders, self._status = folders, {'state': 'running', 'step': 0, 'total_steps': total_steps}
    self._lock, self._stop = threading.Lock(), threading.Event()
    self._thread = threading.Thread(target=self._beat, daemon=True)

  def step(self, step: int) -> None:
    self._status['step'] = step

  @contextlib.contextmanager
  def beating(self) -> Iterator['Heartbeat']:
    """Beats until the block ends; the last status says how: done is set by `finish`, else failed."""
    self._write()
    self._thread.start()
    try:
      yield self
    finally:
      self._stop.set()
      self._thread.join()
      if self._status['state'] == 'running':
        self._fail(sys.exc_info()[1])
      self._write()
      for folder in self._folders:
        folder.release()

  def finish(self, state: str) -> None:
    self._status['state'] = state

  def _fail(self, error: BaseException | None) -> None:
    if isinstance(error, (Preempted, StoreUnavailable, ProcessLost)) or (
      isinstance(error, Exception) and distributed.is_lost(error)
    ):
      self._status['state'] = 'preempted'  # the launcher restarts it
    else:
      text = (str(error or '').splitlines() or [''])[0]
      self._status |= {'state': 'failed', 'error': text or type(error).__name__}

  def _beat(self) -> None:
    while not self._stop.wait(BEAT):
      self._write()

  def _write(self) -> None:
    with self._lock:
      for folder in self._folders:
        with contextlib.suppress(OSError):  # a disk that is full, a store that is away: saving a checkpoint reports it
          if folder.writes and folder.owns():
            status = {**self._status, 'heartbeat': time.time()}
            paths.write_json(folder.path / 'status.json', status, durable=self._status['state'] != 'running')


def _report_other_versions(path: paths.Path, commands: Sequence[dict[str, Any]]) -> None:
  """Log which packages differ from those of the last start: the results may differ in their last bits."""
  before, now = (commands[-1].get('versions', {}) if commands else {}), machine.versions()
  changed = [f'{name} {before[name]} is now {now[name]}' for name in now if before.get(name, now[name]) != now[name]]
  if changed:
    log.warning(
      '%s: resumed with other versions (%s): its results may differ in their last bits', path, ', '.join(changed)
    )


def _differences(old: Any, new: Any, prefix: str) -> Iterator[str]:
  if isinstance(old, dict) and isinstance(new, dict):
    for key in sorted(old.keys() | new.keys()):
      yield from _differences(old.get(key), new.get(key), f'{prefix}.{key}' if prefix else key)
  elif old != new:
    yield f'{prefix} is {old!r} there, {new!r} here'


def _this_process() -> dict[str, Any]:
  """Return what identifies this process, and from where it is visible."""
  where = {'host': socket.gethostname(), 'boot': machine.boot_id(), 'pids': machine.pid_namespace()}
  return where | {'pid': os.getpid(), 'started': machine.start_time(os.getpid())}
