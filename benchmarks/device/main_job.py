"""The main job at `scale=colab`: how long it takes, and the table it prints."""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

from benchmarks.device.sizes import Size


def cases(size: Size) -> dict[str, Callable[[], dict]]:
  return {'colab': lambda: main_job(size)}


def main_job(size: Size) -> dict:
  scale = ['--config=configs/weak2strong.py:scale=colab']
  if size.tiny:
    scale = ['--config=configs/weak2strong.py', '--config.data.tokenizer=bytes', '--config.eval.max_bytes=2000']
    scale += [f'--config.{section}.tokens=20000' for section in ('teacher', 'student')]
  with tempfile.TemporaryDirectory() as folder:
    command = [sys.executable, '-m', 'kdjax.train', *scale, f'--config.runs={folder}/runs']
    start = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.monotonic() - start
    if done.returncode:
      raise RuntimeError(f'ended with code {done.returncode}: {done.stderr[-300:]}')
    return {'command': ' '.join(['python -m kdjax.train', *scale]), 'wall seconds': seconds, 'table': done.stdout}
