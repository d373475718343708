"""Tokens a second and MFU of the whole step at the paper's shapes: the student alone, with its teacher in the step, and two students of one teacher."""

import dataclasses
import gc
import time
from collections.abc import Callable

import jax

from benchmarks.device.sizes import Size
from benchmarks.step import Stepper
from kdjax.config import MeshConfig
from kdjax.config.sizes import named
from kdjax.models import Model, build, flops
from kdjax.runtime.sharding import make_mesh

CASES = {  # name -> (alphas of the students, rematerialisation of the student)
  'student alone': ([0.0], 'full'),
  'distilled': ([0.4], 'full'),
  'student alone, remat dots': ([0.0], 'dots'),
  'two students': ([0.2, 0.6], 'full'),
}


def cases(size: Size) -> dict[str, Callable[[], dict]]:
  return {name: lambda c=case: fitting(size, *c) for name, case in CASES.items()}


def fitting(size: Size, alphas: list[float], remat: str) -> dict:
  """The measurement at the most rows that fit: where the memory is too small, at half as many."""
  rows = size.window[0]
  while True:
    gc.collect()  # what the case before held
    try:
      return measure(size, alphas, remat, rows)
    except jax.errors.JaxRuntimeError as e:
      if 'RESOURCE_EXHAUSTED' not in str(e) or rows == 1:
        raise
    rows //= 2


def measure(size: Size, alphas: list[float], remat: str, rows: int) -> dict:
  student_name, teacher_name, _ = size.models
  student, teacher = model(size, student_name, remat), model(size, teacher_name, remat)
  distils, n_tokens = any(alphas), size.window[1]
  mesh = make_mesh(MeshConfig())
  with jax.set_mesh(mesh):
    run = Stepper(student, teacher if distils else None, alphas, mesh, rows, n_tokens, mask_documents=False)
    start = time.perf_counter()
    run.step = run.step.lower(run.states, run.teacher, run.batch, 1).compile()
    compiled = time.perf_counter() - start
    memory = run.step.memory_analysis()
    calls = max(2, size.calls // 2)
    for n in (1, calls):  # a warm-up, then timed
      start = time.perf_counter()
      for _ in range(n):
        metrics = run()
      jax.block_until_ready(metrics)
      seconds = (time.perf_counter() - start) / n
  tokens = rows * n_tokens
  spent = len(alphas) * flops.training_flops(student.config, n_tokens)
  spent += distils * flops.forward_flops(teacher.config, n_tokens)
  peak = flops.peak_flops(jax.devices()[0].device_kind)
  return {
    'student': student.n_params,
    'teacher': teacher.n_params if distils else 0,
    'layers': student.config.n_layers,
    'rows': rows,
    'tokens': n_tokens,
    'milliseconds': 1e3 * seconds,
    'tokens a second': tokens / seconds,
    'tflops': tokens * spent / seconds / 1e12,
    'mfu': tokens * spent / seconds / peak / jax.device_count() if peak else None,
    'argument bytes': memory.argument_size_in_bytes,
    'temporary bytes': memory.temp_size_in_bytes,
    'compile seconds': compiled,
    'loss': float(metrics[0]['loss'][-1]),
  }


def model(size: Size, name: str, remat: str) -> Model:
  config = named(name, remat=remat, vocab_size=256) if size.tiny else named(name, remat=remat)
  return build(dataclasses.replace(config, n_layers=size.models[2] or config.n_layers, scan_unroll=1))
