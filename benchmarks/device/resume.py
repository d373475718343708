"""A run killed and resumed against one never killed: the same bits? With XLA's deterministic reductions, which `deterministic=True` sets."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import numpy as np

from benchmarks.device.sizes import Size
from kdjax.runs.checkpoint import Checkpoints
from kdjax.runs.metrics import read_metrics

CONFIG = """
import ml_collections
from kdjax.config import scales


def get_config(arg=None):
  config = scales.get_config('weak2strong', arg, alpha=0.4)
  config.eval.ood = ml_collections.ConfigDict()
  return config
"""
RATES = ('tokens_per_second', 'student_tflops', 'teacher_tflops', 'mfu', 'memory_gib')  # what no two runs share


def cases(size: Size) -> dict[str, Callable[[], dict]]:
  return {'kill and resume': lambda: kill_and_resume(size)}


def kill_and_resume(size: Size) -> dict:
  with tempfile.TemporaryDirectory() as folder:
    home = pathlib.Path(folder)
    (home / 'config.py').write_text(CONFIG)
    write_text(home / 'text.jsonl')
    # The teacher is trained once, before both students start.
    whole = train(size, home, 'whole')
    code = whole.wait()
    if code:
      raise RuntimeError(f'the undisturbed run ended with code {code}: {errors(home, "whole")}')
    victim = train(size, home, 'killed')
    student = home / 'killed' / 'students' / 'distilled'
    while victim.poll() is None and steps(student) < n_steps(size) // 2:
      time.sleep(0.02)
    killed_at = steps(student)
    os.killpg(victim.pid, signal.SIGKILL)
    victim.wait()
    code = train(size, home, 'killed').wait()
    if code:
      raise RuntimeError(f'the resumed run ended with code {code}: {errors(home, "killed")}')
    runs = [home / name / 'students' / 'distilled' for name in ('whole', 'killed')]
    metrics = [[{k: v for k, v in m.items() if k not in RATES} for m in read_metrics(run)] for run in runs]
    return {
      'steps': n_steps(size),
      'killed at step': killed_at,
      'same metrics': metrics[0] == metrics[1],
      'same weights': leaves(runs[0]) == leaves(runs[1]),
    }


def write_text(file: pathlib.Path) -> None:
  """A megabyte of made-up words that follow one another more or less often: enough to learn from, built in a second."""
  rng = np.random.default_rng(0)
  words = np.asarray([''.join(rng.choice(list('abcdefghiklmnoprstuw'), rng.integers(2, 8))) for _ in range(500)])
  with file.open('w') as f:
    for _ in range(200):
      ranks = np.minimum(rng.zipf(1.3, 1000), len(words)) - 1
      f.write(json.dumps({'text': ' '.join(words[np.cumsum(ranks) % len(words)])}) + '\n')


def n_steps(size: Size) -> int:
  return 20 if size.tiny else 200


def train(size: Size, home: pathlib.Path, name: str) -> subprocess.Popen:
  """Start `kdjax.train` of a distilled student with frequent checkpoints, in a process group of its own."""
  rows, tokens = (8, 32) if size.tiny else (16, 256)
  fields = {
    'runs': home / 'runs',
    'data.source': home / 'text.jsonl',
    'data.seq_len': tokens,
    'data.tokenizer': 'bytes',
    'data.distinct_tokens': 0,
    'eval.stride': 0,
    'eval.max_bytes': 2000,
    'eval.every': n_steps(size),
    'eval.every_batches': 1,
    'student.arms': 'distilled',
    'checkpoint.every': n_steps(size) // 10,
    'steps_per_call': 1,
    'teacher.tokens': 10 * rows * tokens,
    'student.tokens': n_steps(size) * rows * tokens,
    **{f'{section}.batch_size': rows for section in ('teacher', 'student')},
  }
  scale = 'laptop' if size.tiny else 'colab'
  command = [sys.executable, '-m', 'kdjax.train', f'--config={home / "config.py"}:scale={scale}']
  command += [f'--workdir={home / name}', *(f'--config.{field}={value}' for field, value in fields.items())]
  with open(home / f'{name}.err', 'a') as err:
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=err, start_new_session=True)


def steps(folder: pathlib.Path) -> int:
  """The last step in a run's metrics.jsonl; 0 before there is one."""
  file = folder / 'metrics.jsonl'
  return max((m['step'] for m in read_metrics(folder)), default=0) if file.exists() else 0


def errors(home: pathlib.Path, name: str) -> str:
  return (home / f'{name}.err').read_text()[-300:]


def leaves(folder: pathlib.Path) -> dict:
  """Step, and dtype, shape and checksum of each leaf of a run's newest checkpoint."""
  saves = Checkpoints(folder / 'checkpoints', read_only=True)
  try:
    step = saves.steps()[-1]
    return {'step': step, **saves.meta(step)['leaves']}
  finally:
    saves.close()
