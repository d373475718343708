"""Checkpoints that are verified: Orbax's atomic, asynchronous saves, with a checksum, shape and dtype for each leaf.

Orbax survives a kill in mid-save but reads a flipped bit or another dtype in silence. Here each checkpoint carries, in its metadata, its step
and an integer checksum of every leaf's bits and their positions, computed on the devices that hold it. A restore computes the checksums again,
walks back to the newest step that verifies, and logs which steps it passed over and why.

A checkpoint has the items `params`, `optimizer` (moments and counts), `counters` (step, alpha, skipped updates) and `meta`; one of weights
that come from elsewhere `params` and `meta` alone.
"""

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import preservation_policy as preservation

from kdjax.errors import ProcessLost, StoreUnavailable, TrainingError, UserError
from kdjax.runs.checksums import VERSION, checksums, fingerprint, named_leaves
from kdjax.runs.state import TrainState
from kdjax.runtime import distributed
from kdjax.storage import paths

log = logging.getLogger('kdjax')

FORMAT = VERSION  # of the metadata: the version of the checksums in them; older ones are still read
# What Orbax, TensorStore and the JSON parser raise on damaged files, besides a bare Exception; see tests/runs/test_checkpoint.py.
DAMAGE = (ValueError, KeyError, OSError, RuntimeError, TypeError, AttributeError, AssertionError)
NOT_WRITTEN = (OSError, ValueError, RuntimeError)  # TensorStore tells of a full disk by a ValueError


class CheckpointDamaged(UserError):
  """No checkpoint of a folder verifies."""


class Restored(NamedTuple):
  """A verified checkpoint."""

  state: TrainState
  step: int


class Checkpoints:
  """One run's checkpoints.

  Args:
    folder: where the steps' folders live.
    keep: how many of the newest stay.
    keep_period: multiples of this many steps stay for good; 0: none.
    keep_minutes: and those that are so many minutes younger than the last that stayed for it; 0: none.
    keep_steps: these stay for good too.
    read_only: an eval job's view; never writes or cleans up.
  """

  def __init__(
    self,
    folder: str | os.PathLike,
    keep: int = 2,
    keep_period: int = 0,
    keep_minutes: float = 0,
    keep_steps: Sequence[int] = (),
    read_only: bool = False,
  ):
    policies = [preservation.LatestN(keep), preservation.CustomSteps(keep_steps)]
    policies += [preservation.EveryNSteps(keep_period)] if keep_period else []
    policies += [preservation.EveryNSeconds(60 * keep_minutes)] if keep_minutes else []
    self.folder = paths.absolute(folder)
    self._manager = ocp.CheckpointManager(
      self.folder,
      options=ocp.CheckpointManagerOptions(
        preservation_policy=None if read_only else preservation.AnyPreservationPolicy(policies),
        read_only=read_only,
        create=not read_only,
        cleanup_tmp_directories=not read_only,
        # The managers of a cohort save at the same time: without names of their own their barriers are taken for one another.
        multiprocessing_options=ocp.options.MultiprocessingOptions(barrier_sync_key_prefix=self.folder.parent.name),
      ),
    )

  def steps(self) -> list[int]:
    return steps_in(self.folder)

  def save(self, step: int, state: TrainState, fingerprints: dict[str, str]) -> None:
    """Start a save; the device arrays may be donated once this returns. Overwrites a damaged checkpoint of the same step."""
    self._save(step, _items(state), fingerprints)

  def save_params(self, step: int, params, fingerprints: dict[str, str]) -> None:
    """The same for weights that come from elsewhere: there is no optimizer to go on with."""
    self._save(step, {'params': params}, fingerprints)

  def _save(self, step: int, items: dict[str, Any], fingerprints: dict[str, str]) -> None:
    meta = {
      'format': FORMAT,
      'step': step,
      'fingerprints': fingerprints,
      'leaves': {k: _describe(v) for k, v in items.items()},
    }
    self.wait()  # for the save before: Orbax would raise its error in the middle of this one
    if step in self.steps():
      self._manager.delete(step)
    args = {name: ocp.args.StandardSave(item) for name, item in items.items()}
    try:
      self._manager.save(step, args=ocp.args.Composite(**args, meta=ocp.args.JsonSave(_sealed(meta))), force=True)
    except NOT_WRITTEN as e:
      raise _not_written(self.folder, e) from None

  def set_aside_after(self, step: int) -> None:
    """Rename later checkpoints, to <step>.damaged: a run resumes from `step`, and what did not verify must not pass for one of the
    newest to keep. Nothing is deleted: it may be the disk's fault, and for a moment."""
    self.wait()
    later = [other for other in self.steps() if other > step]
    if not later:
      return
    distributed.first_process_first(lambda: self._set_aside(later))
    self._manager.reload()

  def _set_aside(self, steps: list[int]) -> None:
    for step in steps if jax.process_index() == 0 else ():
      kept = self.folder / f'{step}.damaged'
      if kept.exists():
        kept.rmtree()  # of this step there is a newer one
      (self.folder / str(step)).rename(kept)
      log.warning('checkpoint %d is set aside as %s; delete it where it is of no use', step, kept)

  def wait(self) -> None:
    """Until the save under way is on disk."""
    try:
      self._manager.wait_until_finished()
      self._manager.check_for_errors()
    except NOT_WRITTEN as e:
      raise _not_written(self.folder, e) from None

  def close(self) -> None:
    try:
      self._manager.close()
    except NOT_WRITTEN as e:
      raise _not_written(self.folder, e) from None

  def verified(
    self, abstract: TrainState, fingerprints: dict[str, str], among: Iterable[int] | None = None
  ) -> Restored | None:
    """The newest checkpoint (of the steps `among`) that verifies, on the abstract state's shardings; None where there is none at all.

    Raises:
      CheckpointDamaged: there are checkpoints, but none verifies.
      UserError: a checkpoint is sound but of another run (its fingerprints differ).
    """
    steps = sorted(self.steps() if among is None else set(among) & set(self.steps()))
    for step in reversed(steps):
      try:
        return Restored(self.restore(step, abstract, fingerprints), step)
      except CheckpointDamaged as e:
        log.warning('passing over checkpoint %d of %s: %s', step, self.folder, e)
    if steps:
      raise CheckpointDamaged(
        f'{self.folder}: none of its checkpoints can be resumed; delete the folder to train the run from the start'
      )
    return None

  def restore(self, step: int, abstract: TrainState, fingerprints: dict[str, str] | None = None) -> TrainState:
    """The whole state at a step, verified."""
    wanted = _items(abstract)
    found = self._read(step, wanted)
    meta = found.pop('meta')
    if (own := int(found['counters']['step'])) != step:
      raise CheckpointDamaged(f'its state is of step {own}')
    for name, value in (fingerprints or {}).items():
      if meta['fingerprints'].get(name) != value:
        raise UserError(
          f'{self.folder}: checkpoint {step} was written with another {name} ({meta["fingerprints"].get(name)}, here {value}); '
          'use another --workdir'
        )
    return TrainState(params=found['params'], opt_state=found['optimizer'], **found['counters'])

  def restore_params(self, step: int, abstract_params) -> Any:
    """The weights alone, verified: what the eval job and a teacher need."""
    try:
      return self._read(step, {'params': abstract_params})['params']
    except CheckpointDamaged as e:
      raise CheckpointDamaged(
        f'{self.folder}: checkpoint {step} is damaged: {e}; delete it or name another step'
      ) from None

  def fingerprint(self, step: int) -> str:
    """Return `params_fingerprint` of a step's weights as they were saved, from the metadata alone."""
    try:
      meta = self.meta(step)
    except CheckpointDamaged as e:
      raise CheckpointDamaged(
        f'{self.folder}: checkpoint {step} is damaged: {e}; delete it or name another step'
      ) from None
    return fingerprint({name: checksum for name, (_, _, checksum) in meta['leaves']['params'].items()}, meta['format'])

  def meta(self, step: int) -> dict[str, Any]:
    """Return the metadata of a step.

    Raises:
      CheckpointDamaged: the metadata changed after it was written, or belongs to another step.
      UserError: a newer version of kdjax wrote the checkpoint.
    """
    args = ocp.args.Composite(meta=ocp.args.JsonRestore())
    meta = _unsealed(_read(self.folder, lambda: self._restore(step, args)['meta'], 'its metadata cannot be read'))
    if meta['format'] > FORMAT:
      raise UserError(f'{self.folder}: a newer kdjax wrote checkpoint {step} (format {meta["format"]}); update kdjax')
    if meta['step'] != step:
      raise CheckpointDamaged(f'it is a copy of checkpoint {meta["step"]} under another name')
    return meta

  def _restore(self, step: int, args: ocp.args.Composite):
    """Orbax's restore, on each process for itself: one that finds its share damaged must not leave the others in a barrier."""
    if jax.process_count() == 1:
      return self._manager.restore(step, args=args)
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me})
    options = ocp.CheckpointManagerOptions(read_only=True, create=False, multiprocessing_options=alone)
    with ocp.CheckpointManager(self.folder, options=options) as reader:
      return reader.restore(step, args=args)

  def _read(self, step: int, wanted: dict[str, Any]) -> dict[str, Any]:
    """The items, verified against the metadata."""
    meta = self.meta(step)
    for name, item in wanted.items():
      _check_shapes(meta['leaves'].get(name), item, f'{self.folder}, checkpoint {step}, {name}')
    args = {name: ocp.args.StandardRestore(item) for name, item in wanted.items()}
    restored = _read(self.folder, lambda: self._restore(step, ocp.args.Composite(**args)), 'it cannot be read')
    items = {name: restored[name] for name in wanted}
    if meta['format'] < FORMAT:
      log.info(
        "%s: checkpoint %d has checksums of format %d, which miss some damage that today's detect; a new save has today's",
        self.folder,
        step,
        meta['format'],
      )
    for name, item in items.items():
      for leaf, checksum in checksums(item, meta['format']).items():
        if checksum != meta['leaves'][name][leaf][2]:
          raise CheckpointDamaged(f'the checksum of {name}/{leaf} differs from the one that was saved')
    return items | {'meta': meta}


@contextlib.contextmanager
def read_checkpoints(folder: str | os.PathLike) -> Iterator[Checkpoints]:
  """The checkpoints of a folder, to be read only: nothing is written, deleted or set aside."""
  saves = Checkpoints(folder, read_only=True)
  try:
    yield saves
  finally:
    saves.close()


def steps_in(folder: str | os.PathLike) -> list[int]:
  """Steps on disk, oldest first, the same on all processes; [] where there is no folder yet.

  From the folder's names: Orbax's own listing fails while another thread deletes an old step. In an object store, where nothing is renamed,
  a step's folder is there while it is being written: Orbax's mark tells that it is whole.
  """
  path, found = epath.Path(folder), []
  with contextlib.suppress(FileNotFoundError):  # an object store's folder is gone with its last file
    found = [step for step in path.iterdir() if step.name.isdigit()]
  if paths.is_remote(path):
    found = [step for step in found if ocp.utils.is_checkpoint_finalized(step)]
  return distributed.of_first_process(sorted(int(step.name) for step in found))


def _items(state: TrainState) -> dict[str, Any]:
  counters = {
    'step': state.step,
    'alpha': state.alpha,
    'skipped': state.skipped,
    'skipped_in_row': state.skipped_in_row,
  }
  return {'params': state.params, 'optimizer': state.opt_state, 'counters': counters}


def _describe(item) -> dict[str, list]:
  """leaf -> [dtype, shape, checksum]."""
  sums = checksums(item)
  return {name: [str(leaf.dtype), list(leaf.shape), sums[name]] for name, leaf in named_leaves(item).items()}


def _check_shapes(described: dict[str, list] | None, wanted, where: str) -> None:
  """Raise UserError if a sound checkpoint is of another architecture or dtype."""
  described = described or {}
  leaves = named_leaves(wanted)
  for name in sorted(leaves.keys() | described.keys()):
    if name not in described or name not in leaves:
      side = 'it lacks' if name in leaves else 'it has'
      raise UserError(
        f'{where}: it is of another architecture: {side} {name}; use another --workdir, or the config that wrote it'
      )
    dtype, shape, _ = described[name]
    if (dtype, tuple(shape)) != (str(leaves[name].dtype), tuple(leaves[name].shape)):
      raise UserError(
        f'{where}: {name} is {dtype}{tuple(shape)}, the config says {leaves[name].dtype}{tuple(leaves[name].shape)}; '
        'use another --workdir, or the config that wrote it'
      )


def _sealed(meta: dict[str, Any]) -> dict[str, Any]:
  return {'digest': _digest(meta), **meta}


def _unsealed(meta: Any) -> dict[str, Any]:
  if not isinstance(meta, dict) or meta.pop('digest', None) != _digest(meta):
    raise CheckpointDamaged('its metadata is not what was written')
  return meta


def _digest(meta: dict[str, Any]) -> str:
  return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()[:16]


def _read(folder: epath.Path, work: Callable[[], Any], what: str) -> Any:
  """Return what `work` reads from a folder. Raises CheckpointDamaged, on every process, where one of them cannot read its share."""
  result, error = None, None
  try:
    result = work()
  except Exception as e:
    if paths.is_outage(folder, e):  # what cannot be read now may be sound
      raise StoreUnavailable(
        f'{folder}: a checkpoint cannot be read, as the store does not answer ({paths.describe_error(e)})'
      ) from None
    if type(e) is not Exception and not isinstance(e, DAMAGE):
      raise
    error = e
  if distributed.on_any_process(error is not None):
    raise CheckpointDamaged(f'{what} ({paths.describe_error(error) if error else "on another process"})') from None
  return result


def _not_written(folder: epath.Path, error: Exception) -> Exception:
  if distributed.is_lost(error):
    return ProcessLost(paths.describe_error(error))
  if paths.is_outage(folder, error):
    return StoreUnavailable(
      f'{folder}: a checkpoint could not be saved, as the store does not answer ({paths.describe_error(error)})'
    )
  fix = "correct this machine's permissions on the bucket" if paths.is_remote(folder) else 'free some disk space'
  return TrainingError(
    f'{folder}: a checkpoint could not be written ({paths.describe_error(error)}); {fix} and run the same command again: '
    'it resumes from the last good checkpoint'
  )
