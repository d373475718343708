"""Who else is told of a run's metrics, besides its metrics.jsonl: TensorBoard, a CSV file, Weights & Biases. Nothing leaves the machine unless
`trackers` names wandb.
"""

import contextlib
import csv
import importlib
import inspect
import io
import os
import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import jax
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from kdjax.errors import UserError
from kdjax.storage import paths


class Tracker(Protocol):
  """Raises OSError where the disk is full."""

  def write(self, step: int, values: dict[str, float]) -> None: ...

  def flush(self) -> None: ...

  def close(self) -> None: ...


class TensorBoard:
  """Events in <folder>/tensorboard."""

  def __init__(self, folder: pathlib.Path, step: int, about: dict[str, Any]):
    # Not SummaryWriter: the thread that writes for it dies of a full disk, and then its queue blocks this one for ever.
    (folder / 'tensorboard').mkdir(parents=True, exist_ok=True)
    self._board = EventsWriter(str(folder / 'tensorboard' / 'events'), f'.{os.getpid()}')
    if step:  # TensorBoard then leaves out what a killed run wrote of later steps
      self._board.write_event(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))

  def write(self, step: int, values: dict[str, float]) -> None:
    scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
    self._board.write_event(Event(wall_time=time.time(), step=step, summary=Summary(value=scalars)))

  def flush(self) -> None:
    self._board.flush()

  def close(self) -> None:
    with contextlib.suppress(OSError):  # what must be on disk was flushed before
      self._board.close()


class Csv:
  """<folder>/metrics.csv: a row a step. A name that comes later is a new column, empty before."""

  FILE = 'metrics.csv'

  def __init__(self, folder: pathlib.Path, step: int, about: dict[str, Any]):
    self._path, self._columns = folder / self.FILE, ['step']
    rows = [row for row in self._read() if int(row['step']) <= step] if self._path.exists() else []
    self._anew(rows)

  def write(self, step: int, values: dict[str, float]) -> None:
    row = {'step': step, **values}
    if new := [name for name in row if name not in self._columns]:
      self._file.close()
      rows = self._read()
      self._columns += new
      self._anew([*rows, row])
    else:
      self._file.write(self._text([row]))

  def flush(self) -> None:
    self._file.flush()

  def close(self) -> None:
    with contextlib.suppress(OSError):
      self._file.close()

  def _read(self) -> list[dict[str, Any]]:
    with self._path.open(newline='', encoding='utf-8') as f:
      reader = csv.DictReader(f)
      self._columns = list(reader.fieldnames or self._columns)
      return [row for row in reader if _whole(row)]

  def _anew(self, rows: Sequence[dict[str, Any]]) -> None:
    """The whole file, old or new: a kill leaves one of them."""
    with paths.replacing(self._path) as temporary:
      temporary.write_text(','.join(self._columns) + '\n' + self._text(rows), encoding='utf-8')
    self._file = self._path.open('a', newline='', encoding='utf-8')

  def _text(self, rows: Sequence[dict[str, Any]]) -> str:
    out = io.StringIO()
    csv.DictWriter(out, self._columns, restval='', lineterminator='\n').writerows(rows)
    return out.getvalue()


class Wandb:
  """A Weights & Biases run with the folder's id, so a restart continues it. WANDB_PROJECT, WANDB_MODE and similar variables apply."""

  def __init__(self, folder: pathlib.Path, step: int, about: dict[str, Any]):
    wandb = importlib.import_module('wandb')
    known = about.get('config', {})
    with _wandb_errors(wandb):
      self._run = wandb.init(
        project=os.environ.get('WANDB_PROJECT', 'kdjax'),
        id=about['id'],
        name=about['name'],
        group=about['group'],
        config=known,
        dir=str(folder),
        resume='allow',
        reinit='create_new',  # the students of a cohort are concurrent runs
      )
    self._run.define_metric('*', step_metric='step')  # a step that is done again after a restart may be told again

  def write(self, step: int, values: dict[str, float]) -> None:
    self._run.log({'step': step, **values})

  def flush(self) -> None:
    pass  # it sends in its own time

  def close(self) -> None:
    self._run.finish()


WITHOUT_KEY = ('offline', 'dryrun', 'disabled')  # modes that need no API key
KEY = 'run `wandb login`, set WANDB_API_KEY, or set WANDB_MODE=offline, which keeps the records on this machine'
KINDS: dict[str, type] = {'tensorboard': TensorBoard, 'csv': Csv, 'wandb': Wandb}


def check_trackers(names: Sequence[str]) -> None:
  """Raise UserError if a tracker cannot work, before anything is built or trained. Only process 0 has trackers and needs a key."""
  if 'wandb' in names:
    try:
      wandb = importlib.import_module('wandb')
    except ImportError:
      raise UserError("trackers: the package wandb is not installed; run: pip install 'kdjax[wandb]'") from None
    if jax.process_index() == 0:
      _check_login(wandb)


def _check_login(wandb: Any) -> None:
  """Let wandb find its key (environment, netrc, settings) and verify it with the server. No prompt: nobody answers one in a job."""
  with _wandb_errors(wandb):
    if wandb.setup().settings.mode in WITHOUT_KEY:
      return
    silent = {'prompt': False} if 'prompt' in inspect.signature(wandb.login).parameters else {}
    if wandb.login(verify=True, **silent):
      return
  raise UserError(f'trackers: wandb has no API key; {KEY}')


@contextlib.contextmanager
def _wandb_errors(wandb: Any) -> Iterator[None]:
  try:
    yield
  except (wandb.Error, ValueError) as e:  # wandb's settings use pydantic, whose error is a ValueError
    raise UserError(f'trackers: wandb cannot be used ({" ".join(str(e).split())[:200]}); {KEY}') from None


def _whole(row: dict[str, Any]) -> bool:
  """A last row cut by a kill is not."""
  return None not in row.values() and str(row['step']).isdigit()
