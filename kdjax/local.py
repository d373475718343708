"""Local checkpoints: between those that a run's folder keeps, each process writes what its own devices hold to its own host's disk or memory.

A save is as fast as that disk, so it may come often; what a lost host, slice or process costs is then few steps. Which of them can be gone on
from: one of which each part of the state is on some host, sound. Data parallel replicas hold the same parts, so that a host which lost its
disk gets its part from the devices of another replica; with a single replica every host must have its own still. Where that fails (another
mesh, another number of processes, a host moved to another place, damage), the run goes on from its folder's newest checkpoint.

Each process writes a safetensors file of its own; the whole is verified as other checkpoints are. (Orbax's own emergency checkpoints are marked
as not to be used, and its asynchronous saves are the work of all processes together: managers of single processes wait for one another's signals.)
"""

import concurrent.futures
import contextlib
import functools
import json
import logging
import os
import pathlib
import shutil
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from kdjax import distributed, paths
from kdjax.checkpoint import checksums
from kdjax.config import fingerprint
from kdjax.errors import UserError
from kdjax.step import TrainState

log = logging.getLogger('kdjax')

# Of one process a save may be whole and of another not, and no process is ever more than one save ahead: the one before is whole on all.
KEEP = 2
States = tuple[TrainState, ...]


class LocalCheckpoints:
  """A cohort's.

  Args:
    folder: on this host; each process has a folder of its own in it.
    abstract: the states, as ShapeDtypeStructs with shardings.
    identity: of the run; the checkpoints of another one are passed over.
  """

  def __init__(self, folder: str | os.PathLike, abstract: States, identity: Any):
    self.folder = pathlib.Path(folder).absolute() / str(jax.process_index())
    self._abstract = abstract
    self._identity = fingerprint([identity, jax.process_count(), _layout(abstract)])
    self._writer = concurrent.futures.ThreadPoolExecutor(1, 'local-checkpoint')
    self._writing: concurrent.futures.Future | None = None
    try:
      self.folder.mkdir(parents=True, exist_ok=True)
      for cut_off in self.folder.glob('.*'):
        cut_off.unlink()
      for other in self.folder.parent.iterdir():  # of a start with more processes
        if other.name.isdigit() and int(other.name) >= jax.process_count():
          shutil.rmtree(other, ignore_errors=True)
    except OSError as e:
      raise UserError(
        f'checkpoint.local: {self.folder} cannot be written ({e.strerror or e}); name a folder of each host, as /dev/shm/kdjax'
      ) from None

  def save(self, step: int, states: States) -> None:
    """Starts a save; the arrays may be donated once this returns. By all processes. A disk that is full does not end the run."""
    self.wait()
    # On all devices together: no process comes by here before all have finished the save before.
    sums = checksums(states)
    about = {'identity': self._identity, 'checksums': json.dumps(sums)}
    self._writing = self._writer.submit(self._write, step, _parts(states), about)

  def _write(self, step: int, parts: dict[str, np.ndarray], about: dict[str, str]) -> None:
    with paths.replacing(self._file(step)) as file:
      safetensors.numpy.save_file({name: part.view(_bits(part.dtype)) for name, part in parts.items()}, file, about)
    for old in self.steps()[:-KEEP]:
      self._file(old).unlink()

  def wait(self) -> None:
    """Until the save under way is written."""
    writing, self._writing = self._writing, None
    try:
      if writing:
        writing.result()
    except (OSError, safetensors.SafetensorError) as e:
      log.warning('a local checkpoint could not be written in %s (%s)', self.folder, e)

  def restore(self, after: int) -> tuple[States, int] | None:
    """The newest that can be gone on from and is of a step above `after`, verified; its step. None where there is none. By all processes."""
    mine = [step for step in self.steps() if step > after]
    for step in sorted(_of_all(mine), reverse=True):
      parts, sums = self._read(step) if step in mine else (None, {})
      has = multihost_utils.process_allgather(np.asarray(parts is not None)).reshape(-1)
      if not _is_whole(self._abstract, has):
        log.warning(
          'passing over local checkpoint %d: a part of it is on no host here, or it is of another mesh or config', step
        )
        continue
      states = _assembled(self._abstract, parts or {}, has)
      found = checksums(states)
      if not distributed.on_any_process(parts is not None and found != sums):
        return states, step
      log.warning('passing over local checkpoint %d: its checksums are not those that were written', step)
    return None

  def forget(self, after: int) -> None:
    """Deletes this process's checkpoints of steps above `after`: the run goes on from there, and will come by again."""
    for step in self.steps():
      if step > after:
        self._file(step).unlink()

  def clear(self) -> None:
    """Deletes this process's folder: the run is done."""
    self.wait()
    shutil.rmtree(self.folder, ignore_errors=True)
    with contextlib.suppress(OSError):  # another process's may still be there
      self.folder.parent.rmdir()

  def close(self) -> None:
    self.wait()
    self._writer.shutdown()

  def steps(self) -> list[int]:
    """Of this process's checkpoints, oldest first."""
    return sorted(int(path.stem) for path in self.folder.glob('[0-9]*.safetensors'))

  def _file(self, step: int) -> pathlib.Path:
    return self.folder / f'{step}.safetensors'

  def _read(self, step: int) -> tuple[dict[str, np.ndarray] | None, dict[str, int]]:
    """(this process's parts, the checksums of the whole); (None, {}) where they cannot be read or are of another run."""
    try:
      with safetensors.safe_open(self._file(step), framework='np') as file:
        about = file.metadata() or {}
        if about.get('identity') != self._identity:
          return None, {}
        dtypes = [leaf.dtype for leaf in jax.tree.leaves(self._abstract)]
        parts = {name: file.get_tensor(name).view(dtypes[_leaf_of(name)]) for name in file.keys()}  # noqa: SIM118
        return parts, json.loads(about['checksums'])
    except (OSError, ValueError, safetensors.SafetensorError) as e:
      log.warning('local checkpoint %s cannot be read (%s)', self._file(step), e)
      return None, {}


def _part(leaf: int, index: tuple[slice, ...]) -> str:
  """The name of the part of a leaf that begins there."""
  return '_'.join(map(str, [leaf, *(cut.start or 0 for cut in index)]))


def _leaf_of(part: str) -> int:
  return int(part.partition('_')[0])


def _places(i: int, leaf: Any) -> dict[jax.Device, str]:
  """The part of the i-th leaf that each device holds, here and elsewhere."""
  return {device: _part(i, index) for device, index in leaf.sharding.devices_indices_map(leaf.shape).items()}


def _bits(dtype: Any) -> np.dtype:
  """The unsigned integers as wide as that."""
  return np.dtype(f'u{np.dtype(dtype).itemsize}')


def _layout(abstract: States) -> list:
  """What this process has parts of, and which."""
  me = jax.process_index()
  return [
    [
      str(leaf.dtype),
      leaf.shape,
      sorted({part for device, part in _places(i, leaf).items() if device.process_index == me}),
    ]
    for i, leaf in enumerate(jax.tree.leaves(abstract))
  ]


def _parts(states: States) -> dict[str, np.ndarray]:
  """Copies on the host of all that this process's devices hold, each part once."""
  parts = {}
  for i, leaf in enumerate(jax.tree.leaves(states)):
    for shard in leaf.addressable_shards:
      name = _part(i, shard.index)
      if name not in parts:
        # The view of an array on the CPU would change with it once it is donated.
        parts[name] = np.array(shard.data) if shard.device.platform == 'cpu' else np.asarray(shard.data)
  return parts


def _of_all(steps: Iterable[int]) -> set[int]:
  """The steps that any process has."""
  padded = ([*steps] + [-1] * 8)[:8]
  return {int(step) for step in multihost_utils.process_allgather(np.asarray(padded)).reshape(-1) if step >= 0}


def _is_whole(abstract: States, has: np.ndarray) -> bool:
  """Whether the processes that have their parts have all of them."""
  for i, leaf in enumerate(jax.tree.leaves(abstract)):
    places = _places(i, leaf)
    if {part for device, part in places.items() if has[device.process_index]} != set(places.values()):
      return False
  return True


def _assembled(abstract: States, parts: dict[str, np.ndarray], has: np.ndarray) -> States:
  leaves, tree = jax.tree.flatten(abstract)
  return jax.tree.unflatten(tree, [_array(i, leaf, parts, has) for i, leaf in enumerate(leaves)])


def _array(i: int, leaf: Any, parts: dict[str, np.ndarray], has: np.ndarray) -> jax.Array:
  """The i-th leaf of the parts that all processes have; where some have none, of those on devices that hold the same."""
  if has.all():
    return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: parts[_part(i, index or ())])
  mesh, places = leaf.sharding.mesh, _places(i, leaf)
  devices, block = list(mesh.devices.flat), leaf.sharding.shard_shape(leaf.shape)
  givers: dict[str, jax.Device] = {}
  for device in devices:
    if has[device.process_index]:
      givers.setdefault(places[device], device)

  def given(index: tuple[slice, ...] | None) -> np.ndarray:
    device = devices[index[0].start or 0] if index else devices[0]
    part = places[device]
    return (parts[part] if parts and givers[part] == device else np.zeros(block, leaf.dtype))[None]

  by_device = NamedSharding(mesh, P(mesh.axis_names))
  stack = jax.make_array_from_callback((len(devices), *block), by_device, given)
  # One after the other, as in checkpoint.checksums.
  taken = jax.jit(functools.partial(_sum_of_given, sharding=leaf.sharding), out_shardings=leaf.sharding)(stack)
  return jax.block_until_ready(taken)


def _sum_of_given(stack_NxB: jax.Array, sharding: NamedSharding) -> jax.Array:
  """[devices, ...] of which one of each group that shares a part is its bits and the others are nought: the array, on every device of it."""
  taken = {axis for entry in sharding.spec for axis in (entry if isinstance(entry, tuple) else (entry,))}
  shared = tuple(axis for axis in sharding.mesh.axis_names if axis not in taken)
  bits = _bits(stack_NxB.dtype)

  def block(x_1xB: jax.Array) -> jax.Array:  # in integers: -0.0 + 0.0 is another number than -0.0
    x = jax.lax.bitcast_convert_type(x_1xB[0], bits).astype(jnp.uint32)
    return jax.lax.bitcast_convert_type(jax.lax.psum(x, shared).astype(bits), stack_NxB.dtype)

  by_device = P(sharding.mesh.axis_names)
  return jax.shard_map(block, mesh=sharding.mesh, in_specs=by_device, out_specs=sharding.spec, check_vma=False)(
    stack_NxB
  )
