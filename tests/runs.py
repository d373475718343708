"""What the tests of steps, checkpoints and whole runs share: small models and states, and real processes that train."""

import functools
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time
import types
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import pytest

from kdjax import sharding
from kdjax.checkpoint import Checkpoints
from kdjax.config import AlphaSchedule, LossConfig, MeshConfig, ModelConfig, OptimizerConfig
from kdjax.losses import alpha_state
from kdjax.metrics import read_metrics
from kdjax.models import build
from kdjax.optimizer import adamw, learning_rate
from kdjax.step import Recipe, Teacher, TrainState, make_step, state_shardings

REPO = pathlib.Path(__file__).parents[1]
ROWS, SEQ, VOCAB = 8, 16, 37
OPTIMIZER = OptimizerConfig(learning_rate=1e-2)
TOTAL = 40  # steps of the schedules
UNSTABLE = {
  'tokens_per_second',
  'student_tflops',
  'teacher_tflops',
  'mfu',
  'memory_gib',
}  # metrics that no two runs share


def mesh(replica=1, fsdp=1, tensor=1):
  return sharding.make_mesh(MeshConfig(replica, fsdp, tensor), jax.devices()[: replica * fsdp * tensor])


@functools.cache
def model(d_model=16, n_layers=2, vocab_size=VOCAB, **fields):
  sizes = {'vocab_size': vocab_size, 'pad_vocab_to': 8, 'd_model': d_model, 'n_layers': n_layers, 'd_ff': 2 * d_model}
  heads = {'n_heads': 4, 'n_kv_heads': 2, 'head_dim': 8, 'max_seq_len': 64}
  return build(ModelConfig(**sizes, **heads, **fields))


LEARNING_RATE, ADAMW = learning_rate(OPTIMIZER, TOTAL), adamw(OPTIMIZER)


def recipe(targets=('none',), student=None, teacher=None, **fields) -> Recipe:
  common = {'optimizer': ADAMW, 'learning_rate': LEARNING_RATE, 'peak_learning_rate': OPTIMIZER.learning_rate}
  return Recipe(
    student=student or model(),
    teacher=(teacher or model(8)) if 'teacher' in targets else teacher,
    targets=targets,
    **common | {'loss': LossConfig(chunk_tokens=32)} | fields,
  )


def alpha(value=0.0, **schedule):
  return alpha_state(value, AlphaSchedule(**schedule), TOTAL)


def batches(first: int, n: int, size: int | None = None, vocab=VOCAB, rows=ROWS) -> dict[str, np.ndarray]:
  """[size, B, T] arrays, a function of the step: two documents a row, some labels missing, more of them in some rows."""
  out: dict[str, list] = {'tokens': [], 'labels': [], 'segment_ids': []}
  for step in range(first, first + n):
    rng = np.random.default_rng(step)
    # A rule to learn: the next token follows from this one, mostly.
    start = rng.integers(0, vocab, (rows, 1))
    stream = (start + 3 * np.arange(SEQ + 1) + (rng.random((rows, SEQ + 1)) < 0.1)) % vocab
    labels = stream[:, 1:].copy()
    labels[rng.random((rows, SEQ)) < np.linspace(0, 0.9, rows)[:, None]] = -1
    out['tokens'].append(stream[:, :-1])
    out['labels'].append(labels)
    out['segment_ids'].append(1 + (np.arange(SEQ) >= rng.integers(1, SEQ, (rows, 1))))
  size = size or n
  fill = lambda x: np.concatenate([x, np.full((size - n, *x.shape[1:]), -1 if x is out['labels'] else 0)])
  return {name: fill(np.stack(value)).astype(np.int32) for name, value in out.items()}


@functools.cache
def weights(model, seed):
  return jax.device_get(jax.jit(model.init)(jax.random.key(seed)))


def state(recipe: Recipe, alpha_=None, seed=1) -> TrainState:
  """A fresh state on the host."""
  params, zero = weights(recipe.student, seed), np.zeros((), np.int32)
  moments = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), jax.eval_shape(recipe.optimizer.init, params))
  return TrainState(params, moments, zero, alpha() if alpha_ is None else alpha_, zero, zero)


@functools.cache
def compiled_step(recipe: Recipe, on):
  """(step, shardings of a student's state), shared by the tests: compiling is what takes them time."""
  placed = state_shardings(recipe, state(recipe), on)
  return make_step(recipe, [placed] * len(recipe.targets)), placed


class Run:
  """A compiled step with its states, on a mesh."""

  def __init__(self, recipe: Recipe, alphas=(0.0,), teacher: Teacher = Teacher(), on=None):
    self.recipe, self.mesh, self.teacher = recipe, on or mesh(), teacher
    self.step, self.shardings = compiled_step(recipe, self.mesh)
    fresh = [state(recipe, each if isinstance(each, tuple) else alpha(each)) for each in alphas]
    self.states = tuple(jax.device_put(each, self.shardings) for each in fresh)

  def place(self, arrays):
    rows = jax.NamedSharding(self.mesh, jax.P(None, sharding.BATCH_AXES))
    return {name: jax.device_put(value, rows) for name, value in arrays.items()}

  def call(self, first: int, n: int, teacher: Teacher | None = None):
    """Advances by n steps; the metrics of each student, [n] arrays."""
    with jax.set_mesh(self.mesh):
      placed = self.place(batches(first, n, self.recipe.size))
      self.states, metrics = self.step(self.states, self.teacher if teacher is None else teacher, placed, n)
    return [{name: np.asarray(value)[:n] for name, value in m.items()} for m in metrics]

  def go(self, *calls: int, first: int = 0):
    """Several calls of so many steps each; metrics [total] of each student."""
    parts = []
    for n in calls:
      parts.append(self.call(first, n))
      first += n
    return [{k: np.concatenate([p[i][k] for p in parts]) for k in parts[0][i]} for i in range(len(self.states))]


def teacher_params(recipe: Recipe, on=None, seed=9) -> Teacher:
  params = weights(recipe.teacher, seed)
  return Teacher(jax.device_put(params, sharding.param_shardings(params, on or mesh(), recipe.teacher_layout)))


def host(tree):
  """Copies on the host: donated arrays are gone after a call."""
  return jax.tree.map(lambda x: np.array(x), tree)


def assert_identical(a, b):
  """Bit for bit; NaN is NaN."""
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
    x, y = np.asarray(x), np.asarray(y)
    assert (x.dtype, x.shape) == (y.dtype, y.shape), path
    assert x.tobytes() == y.tobytes(), f'{path}: differs by up to {np.abs(x.astype(float) - y.astype(float)).max()}'


def assert_close(a, b, relative):
  """Leaf by leaf, relative to the leaf's greatest value."""
  for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    assert np.abs(x - y).max() <= relative * max(np.abs(y).max(), 1e-30), path


# Real processes.


def environment(devices: int = 1) -> dict[str, str]:
  """Of a process on the CPU with so many virtual devices. KDJAX_TEST_CACHE names a folder for compiled programs; without it each process compiles."""
  cache = os.environ.get('KDJAX_TEST_CACHE')
  flags = re.sub(r'--xla_force_host_platform_device_count=\d+', '', os.environ.get('XLA_FLAGS', ''))
  return {
    **os.environ,
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': f'{flags} --xla_force_host_platform_device_count={devices}'.strip(),
    'PYTHONPATH': str(REPO),
    'JAX_ENABLE_COMPILATION_CACHE': str(bool(cache)).lower(),
    'JAX_COMPILATION_CACHE_DIR': cache or '',
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1',
    'PYTHONUNBUFFERED': '1',
  }


def start(
  config: pathlib.Path,
  workdir: pathlib.Path,
  *arguments: str,
  devices: int = 1,
  module='kdjax.train',
  variables: Mapping[str, str] = types.MappingProxyType({}),
  **options: Any,
) -> subprocess.Popen:
  """Start `python -m kdjax.train`; stdout and stderr go to files beside the workdir.

  Args:
    variables: of the environment, besides the usual ones.
    options: of subprocess.Popen.
  """
  command = [sys.executable, '-m', module, f'--workdir={workdir}', *arguments]
  if module in ('kdjax.train', 'kdjax.grid'):
    command.insert(3, f'--config={config}')
  workdir.parent.mkdir(parents=True, exist_ok=True)
  name = f'{workdir.name}-{len(list(workdir.parent.glob(f"{workdir.name}-*.err")))}'
  with open(workdir.parent / f'{name}.out', 'w') as out, open(workdir.parent / f'{name}.err', 'w') as err:
    process = subprocess.Popen(
      command, stdout=out, stderr=err, env={**environment(devices), **variables}, cwd=workdir.parent, **options
    )
  process.log = workdir.parent / name  # type: ignore[attr-defined]
  return process


def output(process) -> tuple[str, str]:
  return process.log.with_name(process.log.name + '.out').read_text(), errors(process)


def errors(process) -> str:
  """stderr without the progress bars."""
  text = process.log.with_name(process.log.name + '.err').read_text()
  lines = [line.rpartition('\r')[2] for line in text.splitlines()]
  return '\n'.join(line for line in lines if line.strip() and '%|' not in line and 'B/s]' not in line)


def finish(*processes, timeout: float = 180) -> list[int]:
  """Exit codes; whoever is left after the timeout is killed and the test fails."""
  until = time.monotonic() + timeout
  try:
    return [p.wait(max(0.1, until - time.monotonic())) for p in processes]
  except subprocess.TimeoutExpired:
    raise AssertionError(f'hangs after {timeout} s:\n' + '\n'.join(errors(p)[-2000:] for p in processes)) from None
  finally:
    for process in processes:
      kill(process)


def kill(process) -> None:
  if process.poll() is None:
    process.send_signal(signal.SIGKILL)
    process.wait()


def wait_for(condition, process=None, timeout: float = 120, every: float = 0.02) -> None:
  """Until the condition holds; fails at once where the process has ended, or after the timeout."""
  until = time.monotonic() + timeout
  while not condition():
    if process is not None and process.poll() is not None:
      if condition():
        return
      raise AssertionError(f'ended with {process.returncode} while it was waited for:\n{errors(process)[-3000:]}')
    if time.monotonic() > until:
      raise AssertionError(f'not seen within {timeout} s:\n{errors(process)[-3000:] if process else ""}')
    time.sleep(every)


def small_disk(folder: pathlib.Path, size: str) -> Iterator[pathlib.Path]:
  """A tmpfs, for fixtures to yield from; the test is skipped where none can be mounted."""
  folder.mkdir()
  command = ['mount', '-t', 'tmpfs', '-o', f'size={size}', 'none', str(folder)]
  mounted = subprocess.run(command, capture_output=True, text=True, check=False)
  if mounted.returncode:
    pytest.skip(f'no tmpfs can be mounted here: {mounted.stderr.strip()}')
  yield folder
  wait_for(lambda: subprocess.run(['umount', str(folder)], check=False, capture_output=True).returncode == 0, every=0.2)


def free_port() -> int:
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    return s.getsockname()[1]


def metrics(folder: pathlib.Path) -> list[dict[str, float]]:
  """metrics.jsonl without rates and memory."""
  return [{k: v for k, v in record.items() if k not in UNSTABLE} for record in read_metrics(folder)]


def leaves(folder: pathlib.Path, step: int | None = None) -> dict[str, Any]:
  """dtype, shape and checksum of each leaf of a run's newest checkpoint: equal means bit-identical."""
  saves = Checkpoints(folder / 'checkpoints', read_only=True)
  try:
    step = step or saves.steps()[-1]
    return {'step': step, **saves.meta(step)['leaves']}
  finally:
    saves.close()
