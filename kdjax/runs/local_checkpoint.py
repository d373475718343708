"""Local checkpoints: between those in the run's folder, each process writes what its own devices hold to its host's disk or memory.

A save is as fast as that disk, so saves can be frequent, and a lost host, slice or process costs few steps. A local checkpoint is usable if every
shard survives on some host. A process reads what its host has, whichever process wrote it: a launcher may place restarted processes on other
hosts, and the devices then exchange shards. Data parallel replicas hold the same shards, so a host that lost its disk gets its shards from another
replica; with a single replica, every host must still have its own. If that fails (another mesh, another number of processes, damage), the run
resumes from the newest checkpoint in its folder.

Each process writes its own safetensors file; the whole is verified like other checkpoints. (Orbax's own emergency checkpoints are marked as not
to be used, and its asynchronous saves need all processes: managers of single processes wait for one another's signals.)
"""

import concurrent.futures
import contextlib
import errno
import functools
import json
import logging
import os
import pathlib
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from kdjax import machine
from kdjax.config import fingerprint
from kdjax.errors import UserError
from kdjax.runs.checkpoint import FORMAT
from kdjax.runs.checksums import checksums
from kdjax.runs.state import TrainState
from kdjax.runtime import distributed
from kdjax.storage import paths

log = logging.getLogger('kdjax')

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)  # a disk that is the host's fault, and not the config's
DAMAGE = (OSError, ValueError, LookupError, TypeError, safetensors.SafetensorError)
States = tuple[TrainState, ...]


class LocalCheckpoints:
  """The local checkpoints of a cohort. All processes create it and call its methods.

  Args:
    folder: on this host; each process has a folder of its own in it.
    abstract: the states, as ShapeDtypeStructs with shardings.
    identity: of the run; the checkpoints of another one are passed over.
  """

  def __init__(self, folder: str | os.PathLike, abstract: States, identity: Any):
    self._home = pathlib.Path(paths.expand(folder)).absolute()
    self.folder = self._home / str(jax.process_index())
    self._abstract = abstract
    self._identity = fingerprint([identity, jax.process_count(), _layout(abstract), FORMAT])
    self._writer = concurrent.futures.ThreadPoolExecutor(1, 'local-checkpoint')
    self._writing: concurrent.futures.Future | None = None
    self._last: int | None = None  # the step of the newest save
    host = int(fingerprint([machine.boot_id() or socket.gethostname(), str(self._home)], 8), 16)
    self._here = np.flatnonzero(_of_each(np.uint32(host)) == np.uint32(host)).tolist()
    try:
      for cut_off in self._home.glob('*/.*'):
        if self._cleans(cut_off.parent.name):
          cut_off.unlink()
      self.folder.mkdir(parents=True, exist_ok=True)
      tempfile.TemporaryFile(dir=self.folder).close()
    except OSError as e:
      message = f'checkpoint.local: {self.folder} cannot be written ({e.strerror or e}); name a folder of each host, as /dev/shm/kdjax'
      if e.errno not in NO_ROOM:
        raise UserError(message) from None
      log.warning(message)

  def save(self, step: int, states: States) -> None:
    """Start a save; the arrays may be donated once this returns. A full disk does not end the run."""
    # Of one process a save may be whole and of another not: what was there before goes once it is whole on all.
    failed = distributed.on_any_process(not self.wait())
    if self._last is not None:
      last = self._last
      self._delete(lambda other: other == last if failed else other < last)
    about = {'identity': self._identity, 'checksums': json.dumps(checksums(states))}
    self._writing = self._writer.submit(self._write, step, _parts(states), about)
    self._last = step

  def _write(self, step: int, parts: dict[str, np.ndarray], about: dict[str, str]) -> None:
    with paths.replacing(self._file(jax.process_index(), step)) as file:
      safetensors.numpy.save_file({name: part.view(_bits(part.dtype)) for name, part in parts.items()}, file, about)

  def wait(self) -> bool:
    """Wait until the current save is written; return whether it succeeded."""
    writing, self._writing = self._writing, None
    try:
      if writing:
        writing.result()
      return True
    except Exception as e:  # whatever it is: the run has the checkpoints of its folder
      log.warning('a local checkpoint could not be written in %s (%s)', self.folder, e)
      return False

  def restore(self, after: int, upto: int) -> tuple[States, int] | None:
    """Return the newest checkpoint that can be resumed, verified, and its step, above `after` and at most `upto`; None if there is none."""
    held = {(process, step) for process, step in self._held() if after < step <= upto}
    for step in sorted(_of_all({step for _, step in held}), reverse=True):
      states = self._restored(step, {process for process, of in held if of == step})
      if states is not None:
        return states, step
    return None

  def _restored(self, step: int, written_by: set[int]) -> States | None:
    """Read and verify the states of a step from the files on this host and on the others."""
    has = [process in written_by and self._fits(process, step) for process in range(jax.process_count())]
    gives = _gives(_of_each(np.asarray(has)))
    giver = gives[jax.process_index()]
    parts, sums = self._read(giver, step) if giver is not None else ({}, {})
    gives = [of if read else None for of, read in zip(gives, _of_each(np.asarray(bool(parts))), strict=True)]
    if not _is_whole(self._abstract, gives):
      log.warning(
        'passing over local checkpoint %d: a part of it is on no host here, or it is of another mesh or config', step
      )
      return None
    marks = _of_each(np.uint32(int(fingerprint(sums, 8), 16)))
    if len({int(mark) for mark, of in zip(marks, gives, strict=True) if of is not None}) > 1:
      log.warning('passing over local checkpoint %d: its parts are not of one start of the run', step)
      return None
    states = _assembled(self._abstract, parts, gives)
    found = checksums(states)
    if distributed.on_any_process(bool(parts) and found != sums):
      log.warning('passing over local checkpoint %d: its checksums differ from those that were saved', step)
      return None
    if (own := {int(state.step) for state in states}) != {step}:
      log.warning('passing over local checkpoint %d: its state is of step %s', step, ', '.join(map(str, sorted(own))))
      return None
    return states

  def forget_all_but(self, step: int) -> None:
    """Delete this host's checkpoints of other steps: the run resumes from there. The earlier ones are no longer needed, and it will reach the later ones again."""
    self._delete(lambda other: other != step)

  def clear(self) -> None:
    """Delete them all: the run is done."""
    self.wait()
    for folder in self._home.glob('*'):
      if self._cleans(folder.name):
        shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):  # another process's may still be there
      self._home.rmdir()

  def close(self) -> None:
    self.wait()
    self._writer.shutdown()

  def steps(self) -> list[int]:
    """Of this process's checkpoints, oldest first."""
    return [step for process, step in self._held() if process == jax.process_index()]

  def _held(self) -> list[tuple[int, int]]:
    """(process, step) of all that are on this host."""
    files = [path for path in self._home.glob('*/*.safetensors') if path.stem.isdigit() and path.parent.name.isdigit()]
    return sorted((int(path.parent.name), int(path.stem)) for path in files)

  def _cleans(self, folder: str) -> bool:
    """Return whether that process's files here are this one's to delete: its own, and as the first on this host those of processes now elsewhere."""
    me, process = jax.process_index(), int(folder) if folder.isdigit() else -1
    return process == me or (process >= 0 and process not in self._here and me == self._here[0])

  def _delete(self, which: Callable[[int], bool]) -> None:
    for process, step in self._held():
      if which(step) and self._cleans(str(process)):
        with contextlib.suppress(OSError):  # a disk that is read-only now
          self._file(process, step).unlink(missing_ok=True)

  def _file(self, process: int, step: int) -> pathlib.Path:
    return self._home / str(process) / f'{step}.safetensors'

  def _fits(self, process: int, step: int) -> bool:
    """Return whether a file is of this run."""
    try:
      with safetensors.safe_open(self._file(process, step), framework='np') as file:
        return (file.metadata() or {}).get('identity') == self._identity
    except DAMAGE as e:
      log.warning('local checkpoint %s cannot be read (%s)', self._file(process, step), e)
      return False

  def _read(self, process: int, step: int) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """(the parts that the process held, the checksums of the whole); nothing where they cannot be read or are not what they must be."""
    leaves, parts = jax.tree.leaves(self._abstract), {}
    try:
      with safetensors.safe_open(self._file(process, step), framework='np') as file:
        sums = json.loads(file.metadata()['checksums'])
        for i, leaf in enumerate(leaves):
          for name in {name for device, name in _places(i, leaf).items() if device.process_index == process}:
            parts[name] = file.get_tensor(name).view(leaf.dtype)
            if parts[name].shape != leaf.sharding.shard_shape(leaf.shape):
              raise ValueError(f'{name} is of another shape')
      return parts, sums
    except DAMAGE as e:
      log.warning('local checkpoint %s cannot be read (%s)', self._file(process, step), e)
      return {}, {}


def _part(leaf: int, index: tuple[slice, ...]) -> str:
  """The name of the part of a leaf that begins there."""
  return '_'.join(map(str, [leaf, *(cut.start or 0 for cut in index)]))


def _places(i: int, leaf: Any) -> dict[jax.Device, str]:
  """The part of the i-th leaf that each device holds, here and elsewhere."""
  return {device: _part(i, index) for device, index in leaf.sharding.devices_indices_map(leaf.shape).items()}


def _bits(dtype: Any) -> np.dtype:
  """The unsigned integers as wide as that."""
  return np.dtype(f'u{np.dtype(dtype).itemsize}')


def _layout(abstract: States) -> list:
  """Which part each device has, and whose it is."""
  described = []
  for i, leaf in enumerate(jax.tree.leaves(abstract)):
    places = _places(i, leaf)
    held = [(device.process_index, places[device]) for device in leaf.sharding.mesh.devices.flat]
    described.append([str(leaf.dtype), leaf.shape, held])
  return described


def _parts(states: States) -> dict[str, np.ndarray]:
  """Return copies on the host of all that this process's devices hold, each part once."""
  parts = {}
  for i, leaf in enumerate(jax.tree.leaves(states)):
    for shard in leaf.addressable_shards:
      name = _part(i, shard.index)
      if name not in parts:
        # The view of an array on the CPU would change with it once it is donated. The file's order is C.
        copy = np.array if shard.device.platform == 'cpu' else np.asarray
        parts[name] = copy(shard.data, order='C')
  return parts


def _of_each(value: np.ndarray | np.generic) -> np.ndarray:
  """Every process's value, [processes, ...]."""
  return np.asarray(multihost_utils.process_allgather(value)).reshape(jax.process_count(), *np.shape(value))


def _of_all(steps: Iterable[int]) -> set[int]:
  """The steps that any process has: of each its newest, which are all but where a disk holds what was never cleaned up."""
  padded = ([-1] * 8 + sorted(steps))[-8:]
  return {int(step) for step in _of_each(np.asarray(padded)).reshape(-1) if step >= 0}


def _gives(has_PxP: np.ndarray) -> list[int | None]:
  """For each process the one whose parts it is to give, itself or one whose parts nobody else gives; None: it has none.

  Args:
    has_PxP: whether the first process's host has what the second one wrote.
  """
  gives: list[int | None] = [p if has_PxP[p, p] else None for p in range(len(has_PxP))]
  for p, has in enumerate(has_PxP):
    if gives[p] is None:
      gives[p] = next((int(q) for q in np.flatnonzero(has) if q not in gives), None)
  return gives


def _is_whole(abstract: States, gives: list[int | None]) -> bool:
  """Return whether all parts are given."""
  for i, leaf in enumerate(jax.tree.leaves(abstract)):
    places = _places(i, leaf)
    if {part for device, part in places.items() if device.process_index in gives} != set(places.values()):
      return False
  return True


def _assembled(abstract: States, parts: dict[str, np.ndarray], gives: list[int | None]) -> States:
  leaves, tree = jax.tree.flatten(abstract)
  return jax.tree.unflatten(tree, [_array(i, leaf, parts, gives) for i, leaf in enumerate(leaves)])


def _array(i: int, leaf: Any, parts: dict[str, np.ndarray], gives: list[int | None]) -> jax.Array:
  """The i-th leaf of the parts that each process gives.

  Args:
    parts: of the process whose parts this one gives.
    gives: as of `_gives`.
  """
  if gives == list(range(len(gives))):
    return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: parts[_part(i, index or ())])
  mesh, places, block = leaf.sharding.mesh, _places(i, leaf), leaf.sharding.shard_shape(leaf.shape)
  devices = list(mesh.devices.flat)
  moves = _moves(devices, gives)
  given_by: dict[str, int] = {}  # of a part that several give the first is taken
  for place, to in sorted(moves.items()):
    given_by.setdefault(places[devices[to]], place)

  def given(index: tuple[slice, ...] | None) -> np.ndarray:
    place = (index[0].start or 0) if index else 0
    part = places[devices[moves[place]]] if place in moves else ''
    return (parts[part] if given_by.get(part) == place else np.zeros(block, leaf.dtype))[None]

  stack = jax.make_array_from_callback((len(devices), *block), NamedSharding(mesh, P(mesh.axis_names)), given)
  moved = tuple(moves.items()) if any(place != to for place, to in moves.items()) else ()
  # One after the other, as in checksums.checksums.
  taken = jax.jit(functools.partial(_sum_of_given, sharding=leaf.sharding, moves=moved), out_shardings=leaf.sharding)
  return jax.block_until_ready(taken(stack))


def _moves(devices: list[jax.Device], gives: list[int | None]) -> dict[int, int]:
  """From the place in the mesh of each device of a process that gives to that of the device whose part it has: the n-th of a process has
  what was the n-th's of the other."""
  of_process: dict[int, list[int]] = {}
  for place, device in enumerate(devices):
    of_process.setdefault(device.process_index, []).append(place)
  pairs = [(of_process[p], of_process[q]) for p, q in enumerate(gives) if q is not None]
  return {place: to for ours, theirs in pairs for place, to in zip(ours, theirs, strict=True)}


def _sum_of_given(stack_NxB: jax.Array, sharding: NamedSharding, moves: Sequence[tuple[int, int]] = ()) -> jax.Array:
  """[devices, ...] of which one of each group that shares a part is its bits and the others are nought: the array, on every device of it.

  Args:
    moves: (from, to): first each block goes to that place among the devices; of () they stay.
  """
  taken = {axis for entry in sharding.spec for axis in (entry if isinstance(entry, tuple) else (entry,))}
  shared = tuple(axis for axis in sharding.mesh.axis_names if axis not in taken)
  bits = _bits(stack_NxB.dtype)

  def block(x_1xB: jax.Array) -> jax.Array:  # in integers: -0.0 + 0.0 is another number than -0.0
    x = jax.lax.bitcast_convert_type(x_1xB[0], bits).astype(jnp.uint32)
    if moves:
      x = jax.lax.ppermute(x, sharding.mesh.axis_names, moves)
    return jax.lax.bitcast_convert_type(jax.lax.psum(x, shared).astype(bits), stack_NxB.dtype)

  by_device = P(sharding.mesh.axis_names)
  return jax.shard_map(block, mesh=sharding.mesh, in_specs=by_device, out_specs=sharding.spec, check_vma=False)(
    stack_NxB
  )
