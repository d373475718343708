"""Compile a config's whole step for a TPU slice that is not here: size, traffic, speed.

    python -m kdjax.aot --config=configs/weak2strong.py:scale=paper --topology=v6e-64 --config.mesh.tensor=4
    python -m kdjax.aot --config=... --topology=v5p-64 --search                        the best of some meshes, remats and microbatches
    python -m kdjax.aot --config=... --topology=v5litepod-256 --num-slices=8 --config.mesh.replica=8

Nothing runs and no device is needed: the real compiler, which `pip install -e '.[tpu]'` installs, works on any machine.
Exit code 0: the step fits; 1: it does not.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from kdjax import cli
from kdjax.config import Config, MeshConfig
from kdjax.errors import UserError
from kdjax.programs import compiling
from kdjax.programs.compiling import GIB, Report
from kdjax.programs.topology import Slice, parse_slice
from kdjax.runtime import options
from kdjax.teachers import by_name

TENSORS = (1, 2, 4, 8)
REMATS = ('none', 'dots', 'full')  # the least recomputation first
MICROBATCHES = (1, 2, 4, 8)


def main(argv: Sequence[str] | None = None) -> None:
  with cli.user_errors():
    parser = cli.Parser(
      prog='python -m kdjax.aot', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--topology', required=True, help='v4-128, v5litepod-256, v5p-64, v6e-64, or a shape: v6e:8x8')
    parser.add_argument(
      '--num-slices',
      type=cli.machines,
      default=1,
      help='number of slices of that kind, joined by the data centre network',
    )
    parser.add_argument('--vocab-size', type=cli.count, default=0, help='for models that take it from their tokenizer')
    parser.add_argument(
      '--search', action='store_true', help='try meshes, remats and microbatches; about a minute each'
    )
    parser.add_argument('--json', type=options.path, metavar='FILE', help='also write the figures to this file')
    config, args = cli.parse(parser, sys.argv[1:] if argv is None else argv, cli.load_config)
    config = by_name.adopt_models(config)
    slice_ = parse_slice(args.topology, args.num_slices)
    jax.config.update('jax_platforms', 'cpu')  # a device that is here is not needed
    report = (
      _best(config, slice_, args.vocab_size) if args.search else compiling.compile_step(config, slice_, args.vocab_size)
    )
    print(describe(report))
    if args.json:
      pathlib.Path(args.json).write_text(json.dumps(figures(report), indent=1), encoding='utf-8')
    if not report.fits:
      sys.exit(1)


def describe(report: Report) -> str:
  """The report for people."""
  r, chip = report, report.slice.chip
  mesh = ' x '.join(f'{axis} {n}' for axis, n in r.mesh.items())
  settings = ', '.join(f'{name} {value}' for name, value in r.settings.items())
  models = ', '.join(f'{name} {_short(n)}' for name, n in r.parameters.items())
  free = (r.limit - r.bytes) / GIB
  lines = [
    f'{r.slice.accelerator} ({r.slice.name}), {r.slice.n_chips} chips: {mesh}; {settings}',
    f'{r.students} x student: {models}; {r.tokens:,} tokens a step; compiled in {r.compile_seconds:.0f} s',
    '',
    f'{"fits" if r.fits else "DOES NOT FIT"}: {r.bytes / GIB:.2f} of {chip.hbm_gib:g} GiB a chip, {abs(free):.2f} GiB {"free" if r.fits else "too much"}',
    *(f'  {name:<18} {size / GIB:7.2f} GiB' for name, size in r.memory.items()),
    f'  the loss by itself needs {r.loss_bytes / GIB:.2f} GiB of temporaries; the largest array of the program is {r.largest[1]}, {r.largest[0] / GIB:.2f} GiB',
    '',
    'FLOPs a step (all chips)',
    *(f'  {name:<18} {value / 1e12:10.1f} T' for name, value in r.flops.items()),
    '',
    'collectives a step (bytes that one chip sends)',
    *_collectives(r),
    '',
    'roofline, no measurement: each resource alone at its documented peak',
    *(f'  {name:<28} {1e3 * value:9.1f} ms' for name, value in r.seconds().items()),
    *(
      f'  network ({axes}): no documented speed, not counted'
      for axes in r.network()
      if f'network ({axes})' not in r.seconds()
    ),
    f'  a step takes at best {1e3 * r.best_seconds:.1f} ms (MFU {r.mfu(r.best_seconds):.0%}), all overlapped; {1e3 * r.worst_seconds:.1f} ms ({r.mfu(r.worst_seconds):.0%}), nothing overlapped',
  ]
  return '\n'.join(lines)


def figures(report: Report) -> dict[str, Any]:
  """The report for programs; bytes are of one chip."""
  r = report
  return {
    'slice': r.slice.name, 'accelerator': r.slice.accelerator, 'chips': r.slice.n_chips, 'mesh': r.mesh,
    **r.settings, 'parameters': r.parameters, 'students': r.students, 'tokens': r.tokens, 'fits': r.fits,
    'bytes': r.bytes, 'limit': r.limit, 'memory': r.memory, 'loss_bytes': r.loss_bytes, 'flops': r.flops,
    'network': r.network(), 'seconds': r.seconds(), 'best_seconds': r.best_seconds, 'worst_seconds': r.worst_seconds,
    'mfu_best': r.mfu(r.best_seconds), 'mfu_worst': r.mfu(r.worst_seconds), 'largest': r.largest[1],
    'collectives': [c._asdict() | {'part': compiling.part(c)} for c in r.collectives], 'compile_seconds': r.compile_seconds,
  }  # fmt: skip


def _collectives(report: Report) -> Iterator[str]:
  """One line for all collectives of one kind, part of the step and set of axes."""
  groups: dict[tuple[str, str, str], list] = {}
  for one in report.collectives:
    groups.setdefault((compiling.part(one), one.kind, ' x '.join(one.axes)), []).append(one)
  for (part, kind, axes), found in sorted(groups.items()):
    times, total = sum(one.times for one in found), sum(one.total for one in found)
    yield f'  {part:<8} {kind:<18} over {axes:<16} {times:>6} times {total / GIB:9.3f} GiB'
  if not groups:
    yield '  none'


def _best(config: Config, slice_: Slice, vocab_size: int) -> Report:
  """The fastest of what fits, by the time of a step in which nothing overlaps.

  For each tensor axis and number of microbatches the least remat that fits; more microbatches only where remat could not be spared.
  """
  fitting = []
  for tensor in TENSORS:
    for microbatches in MICROBATCHES:
      report = None
      for remat in REMATS:
        report = _tried(_changed(config, slice_, tensor, microbatches, remat), slice_, vocab_size)
        if report is not None:
          fitting.append(report)
          break
      if report is not None and report.settings['remat'] == REMATS[0]:
        break
  if not fitting:
    raise UserError(f'nothing that was tried fits {slice_.name}; take a larger slice, or a smaller batch')
  print()
  return min(fitting, key=lambda report: report.worst_seconds)


def _changed(config: Config, slice_: Slice, tensor: int, microbatches: int, remat: str) -> Config:
  student = dataclasses.replace(config.student, microbatches=microbatches)
  student = dataclasses.replace(student, model=dataclasses.replace(student.model, remat=remat))
  return dataclasses.replace(config, student=student, mesh=MeshConfig(slice_.slices, -1, tensor))


def _tried(config: Config, slice_: Slice, vocab_size: int) -> Report | None:
  """The report of a setting that fits; what became of it is printed."""
  name = f'tensor {config.mesh.tensor}, microbatches {config.student.microbatches}, remat {config.student.model.remat}'
  try:
    report = compiling.compile_step(config, slice_, vocab_size)
  except UserError as e:
    print(f'{name}: {e}', flush=True)
    return None
  size = f'{report.bytes / GIB:.1f} of {report.slice.chip.hbm_gib:g} GiB'
  times = f'{1e3 * report.best_seconds:.0f} to {1e3 * report.worst_seconds:.0f} ms'
  print(f'{name}: {"fits" if report.fits else "too large"}, {size}, {times}', flush=True)
  return report if report.fits else None


def _short(n: float) -> str:
  return f'{n / 1e9:.2f}B' if n >= 1e9 else f'{n / 1e6:.1f}M'


if __name__ == '__main__':
  main()
