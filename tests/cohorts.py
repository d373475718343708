"""What the tests of the training loop share: the students of an experiment in this process, trained, cut off and compared."""

import contextlib
import json
import pathlib
import shutil

import jax

from kdjax import train
from kdjax.data.corpus import prepare
from kdjax.runs.folder import RunFolder
from kdjax.storage.paths import write_json
from kdjax.trainer import experiments, loop
from tests import commands, small, tiny

ARMS = ('baseline', 'unigram')  # a cohort that needs no teacher


def make_config(folder, **overrides):
  fields = {'student.arms': ARMS, 'checkpoint.every': 3, 'checkpoint.keep': 9, 'eval.every': 5, 'mesh.fsdp': 1}
  return tiny.config(folder, **fields | overrides)


def fit(home, folder: pathlib.Path, **overrides) -> None:
  """Trains the students of an experiment in `folder` on the text of `home`; no teacher, no evaluation."""
  config = make_config(home, **overrides)
  corpus = prepare(config.data, config.eval, config.runs, progress=False)
  on = small.mesh()
  with jax.set_mesh(on):
    experiments.train_students(train.students(config, folder), corpus, None, on, progress=False)


def students(folder):
  return [folder / 'students' / arm for arm in ARMS]


def assert_same_runs(folder, expected):
  for one, other in zip(students(folder), students(expected), strict=True):
    assert commands.leaves(one) == commands.leaves(other)
    assert commands.metrics(one) == commands.metrics(other)
    assert RunFolder(one).is_done()


def interrupted(undisturbed, folder, *steps: int, metrics_to: int | None = None) -> None:
  """A copy of the finished run as a kill would leave it: the checkpoints of each student up to a step, the status still running."""
  shutil.copytree(undisturbed, folder)
  for student, step in zip(students(folder), steps, strict=True):
    for path in (student / 'checkpoints').iterdir():
      if path.name.isdigit() and int(path.name) > step:
        shutil.rmtree(path)
    status = json.loads((student / 'status.json').read_text())
    write_json(student / 'status.json', status | {'state': 'running'})


@contextlib.contextmanager
def at_step(monkeypatch, step: int, action):
  """Runs `action` when the trainer has dispatched this step."""
  tell = loop.Heartbeat.step

  def step_(self, at):
    tell(self, at)
    if at >= step and not step_.done:
      step_.done = True
      action()

  step_.done = False
  with monkeypatch.context() as m:
    m.setattr(loop.Heartbeat, 'step', step_)
    yield
