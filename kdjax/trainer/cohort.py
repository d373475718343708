"""What is trained side by side: students that share architecture, data and teacher, each with its own folder, targets and alpha."""

import dataclasses
from collections.abc import Callable
from typing import Any

from kdjax.config import Config, TrainingConfig, fingerprint, n_steps
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
  """Everything that training needs.

  Attributes:
    title: in logs and the progress bar.
    section: the config's section, teacher or student, that the members are trained by.
    keep_steps: steps whose checkpoints are never deleted.
    fingerprints: of the data, the tokenizer and the teacher's weights.
    initial: returns the weights to begin with; None: fresh ones.
    facts: for run.json and the table.
  """

  title: str
  config: Config
  section: TrainingConfig
  members: tuple[Member, ...]
  recipe: Recipe
  teacher: Teacher
  stream: BatchStream
  validation: Windows
  keep_steps: tuple[int, ...]
  fingerprints: dict[str, str]
  tokenizer: Tokenizer
  facts: dict[str, Any]
  initial: Callable[[], Any] | None = None
  progress: bool = True
  profile: Window | None = None

  @property
  def total_steps(self) -> int:
    return n_steps(self.section, self.config.data)

  @property
  def checkpoint_every(self) -> int:
    return self.config.checkpoint.every or max(1, self.total_steps // 10)

  @property
  def eval_every(self) -> int:
    return self.config.eval.every or max(1, self.total_steps // 10)

  def saves_at(self, step: int) -> bool:
    """Return whether a checkpoint is due at a step. `keep_period` need not be a multiple of `checkpoint_every`."""
    every = (self.checkpoint_every, self.config.checkpoint.keep_period)
    return step in self.keep_steps or any(n and step % n == 0 for n in every)
