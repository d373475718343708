"""What is trained side by side: students that share architecture, data and teacher, each with its own folder, targets and alpha."""

import dataclasses
from collections.abc import Callable
from typing import Any

from kdjax.config import fingerprint
from kdjax.data.batches import BatchStream, Windows
from kdjax.data.tokenizer import Tokenizer
from kdjax.losses import AlphaState
from kdjax.runs.folder import RunFolder
from kdjax.runtime.profiling import Window
from kdjax.trainer.step import Recipe, Teacher


@dataclasses.dataclass(frozen=True)
class Member:
  """One student of a cohort: its folder, what defines it, its alpha, its name for people, and what else run.json should keep."""

  folder: RunFolder
  config: dict[str, Any]
  alpha: AlphaState
  label: str  # in the progress bar
  notes: dict[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def about(self) -> dict[str, Any]:
    """The run, to those who show it elsewhere."""
    group = self.folder.path.parent.parent.name
    known = fingerprint([self.config, str(self.folder.path)])
    return {'id': known, 'name': f'{group}/{self.folder.name}', 'group': group, 'config': self.config}


@dataclasses.dataclass(frozen=True)
class Cohort:
  """Everything that `fit` needs."""

  title: str
  members: tuple[Member, ...]
  recipe: Recipe
  teacher: Teacher
  seed: int
  stream: BatchStream
  validation: Windows
  total_steps: int
  checkpoint_every: int
  eval_every: int
  eval_batches: int
  keep: int
  keep_period: int
  keep_minutes: float
  keep_steps: tuple[int, ...]  # and these checkpoints for good
  local: str  # where each host keeps checkpoints of its own; '': none
  local_every: int
  max_skipped: int
  heartbeat_timeout: float
  fingerprints: dict[str, str]
  tokenizer: Tokenizer
  initial: Callable[[], Any] | None = None  # the weights to begin with; None: fresh ones
  facts: dict[str, Any] = dataclasses.field(default_factory=dict)  # for run.json and the table
  threads: int = 2
  prefetch: int = 4
  progress: bool = True
  trackers: tuple[str, ...] = ('tensorboard',)
  profile: Window | None = None

  def saves_at(self, step: int) -> bool:
    """Return whether a checkpoint is due at a step. `keep_period` need not be a multiple of `checkpoint_every`."""
    return step in self.keep_steps or any(n and step % n == 0 for n in (self.checkpoint_every, self.keep_period))
