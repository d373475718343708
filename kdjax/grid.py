"""Plan a grid of distillation runs, compute what is missing, show its status.

    python -m kdjax.grid plan --config=configs/grid.py                   every run and its cost; runs nothing
    python -m kdjax.grid run --config=configs/grid.py                    compute what is missing; can be killed and rerun at any point
    python -m kdjax.grid run --config=configs/grid.py --shard=2/8        one of eight array jobs
    python -m kdjax.grid run --config=configs/grid.py --cell=ID          one cell and what it needs
    python -m kdjax.grid run --config=configs/grid.py --executor=ray     runners on every node of a Ray cluster; or slurm: an array of jobs;
                                                                         or print: the command, to paste on N machines
    python -m kdjax.grid status --config=configs/grid.py                 done, running, failed, missing; what is left

Then: python -m kdjax.report --grid=FOLDER
"""

import argparse
import dataclasses
import re
import shlex
import sys
from collections import Counter
from collections.abc import Sequence

import jax

from kdjax import cli
from kdjax.analysis.table import align
from kdjax.data import fidelity
from kdjax.data.corpus import prepare
from kdjax.errors import TrainingError, UserError
from kdjax.runs import trackers
from kdjax.runs.folder import RunFolder
from kdjax.runtime import backend, distributed, environment, sharding
from kdjax.scoring import choices
from kdjax.storage import paths
from kdjax.storage.paths import read_json
from kdjax.sweeps import cells as cells_lib
from kdjax.sweeps import comparisons, executors, pilots, plan, runner
from kdjax.sweeps import config as grid_config
from kdjax.sweeps.config import GridConfig
from kdjax.sweeps.names import format_count
from kdjax.sweeps.plan import Job


def main(argv: Sequence[str] | None = None) -> None:
  with distributed.leaving_at_once(), cli.user_errors(resumable=True):
    parser = cli.Parser(
      prog='python -m kdjax.grid', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('command', choices=('plan', 'run', 'status'))
    parser.add_argument('--workdir', help="the grid's folder; default: <runs>/<name>-<hash>")
    parser.add_argument('--cell', help='run: one cell by its id, or the part of it that no other has')
    parser.add_argument('--shard', help='run: i/n, the i-th of n runners')
    group = parser.add_argument_group('run: on many machines, which see the same folder')
    group.add_argument('--executor', choices=executors.EXECUTORS, default='local')
    group.add_argument(
      '--runners', type=cli.runners, default=0, help='how many; ray: as many as there is room for; slurm, print: 1'
    )
    group.add_argument('--resources', default='', help='ray: what a runner takes of a node, as in CPU=2,GPU=1')
    group.add_argument('--address', default='', help="ray: the cluster's; default: RAY_ADDRESS, or one of this machine")
    group.add_argument('--sbatch', default='', help="slurm: options of sbatch, as in '--partition=gpu --gres=gpu:1'")
    distributed.add_arguments(parser)
    load = lambda spec, overrides: cli.load_as(GridConfig, grid_config.problems, spec, overrides)
    argv = sys.argv[1:] if argv is None else argv
    grid, args = cli.parse(parser, argv, load, GridConfig)
    cells_lib.check_grid(grid)
    folder = runner.grid_folder(grid, paths.runs_path(args.workdir) if args.workdir else None)
    if args.command == 'plan':
      print(plan_text(grid, folder))
    elif args.command == 'status':
      print(status_text(grid, folder))
    elif args.executor != 'local':
      elsewhere(grid, folder, args, argv)
    else:
      if grid.base.deterministic:
        environment.set_deterministic()
      paths.check_writable(args.workdir or grid.runs)
      distributed.initialize(args, grid.base.heartbeat_timeout)
      run(grid, folder, args.cell, args.shard)


def run(
  grid: GridConfig, folder: paths.Path, cell: str | None = None, shard: str | None = None, progress: bool = True
) -> None:
  """Run the missing jobs. Raises TrainingError at the end if jobs failed."""
  backend.devices()
  trackers.check_trackers(grid.base.trackers)
  runner.claim_grid(folder, grid)
  # Hundreds of runs of a few shapes: each shape is compiled once.
  jax.config.update('jax_compilation_cache_dir', str(paths.absolute(grid.runs) / 'compiled'))
  mesh = sharding.make_mesh(grid.base.mesh)
  base = grid.base
  with jax.set_mesh(mesh):
    origin = runner.read_origin(folder)
    corpus = distributed.first_process_first(lambda: prepare(base.data, base.eval, grid.runs, progress, origin))
    if corpus.losses:
      raise UserError(
        f'{fidelity.describe(corpus.losses)}, and a grid reports bits per byte; set data.tokenizer to another one'
      )
    # Fail on an unreadable task now, not after the training.
    choices.read_tasks(base.eval.tasks, base.eval.max_items, kept=corpus.tasks)
  if grid.vocab_size and base.data.tokenizer != 'bpe' and grid.vocab_size != corpus.tokenizer.vocab_size:
    raise UserError(
      f'vocab_size: {grid.vocab_size}, but {base.data.tokenizer} has {corpus.tokenizer.vocab_size} tokens; leave it at 0'
    )
  runner.record_corpus(folder, corpus)
  work = runner.Runner(grid, folder, corpus, mesh, progress)
  failed = work.run(_wanted(grid, folder, cell, shard))
  if failed:
    raise TrainingError(*runner.failed_lines(folder, failed))
  print(status_text(grid, folder))


def elsewhere(grid: GridConfig, folder: paths.Path, args: argparse.Namespace, argv: Sequence[str]) -> None:
  """Start runners on other machines. Raises UserError for what cannot be started, TrainingError where runners failed."""
  if args.cell or args.shard:
    raise UserError(
      f'--executor={args.executor}: its runners share out all that is missing; leave --cell and --shard out'
    )
  executors.check_executor(args.executor, folder)
  asked = executors.parse_resources(args.resources)
  spec, overrides, _ = cli.split_args(argv)
  arguments = [f'--config={spec}', *(f'--config.{name}={value}' for name, value in overrides.items())]
  work = executors.Work(
    grid.name, folder, (*arguments, f'--workdir={paths.absolute(folder)}'), lambda: status_text(grid, folder)
  )
  if args.executor == 'print':
    print(executors.format_commands(work, args.runners))
    return
  paths.check_writable(folder)
  runner.claim_grid(folder, grid)
  if args.executor == 'slurm':
    print(executors.submit_to_slurm(work, args.runners, shlex.split(args.sbatch)))
    return
  executors.run_on_ray(work, args.runners, asked, args.address)
  print(status_text(grid, folder))


def _wanted(grid: GridConfig, folder: paths.Path, cell: str | None, shard: str | None) -> runner.Wanted:
  if cell and shard:
    raise UserError('--cell names one cell, --shard a part of all: give one of the two')
  if shard:
    runner.shard([], shard)  # its form, before any work
    return lambda jobs: runner.shard(jobs, shard)
  if cell:
    ids = [c.id for job in runner.list_jobs(grid, folder) for c in job.cells]
    found = [i for i in ids if cell in i]
    if cell not in ids and len(found) != 1:
      near = ', '.join((found or ids)[:5])
      raise UserError(f'--cell={cell}: {len(found)} cells of this grid have that in their id; name one, such as {near}')
    one = cell if cell in ids else found[0]
    return lambda jobs: {job.id for job in jobs if any(c.id == one for c in job.cells)}
  return runner.everything


def plan_text(grid: GridConfig, folder: paths.Path) -> str:
  """Every job as a table: relationship, tokens, FLOPs, time, bytes, what is shared; then the sums."""
  jobs = runner.list_jobs(grid, folder)
  if not any(job.phase == 'validated' for job in jobs) and not grid.pilot.skip:
    jobs += _after_pilot(grid, jobs)
  rows = [['job', 'phase', 'runs', 'relationship', 'tokens', 'FLOPs', 'of it teacher', 'time', 'checkpoints', 'shared']]
  total = plan.NOTHING
  for job in jobs:
    cost = plan.estimate_cost(grid, job)
    total += cost
    rows.append([job.id, job.phase, str(max(1, len(job.cells))), _relationship(job), *_costs(grid, cost)])
    rows[-1].append(f'-{cost.saved:.2g} FLOPs' if cost.saved else '')
  hardware = grid.hardware
  machine = f'{hardware.devices} x {hardware.device} at {hardware.utilisation:.0%} of its peak'
  runs = sum(len(job.cells) for job in jobs)
  teachers = sum(not job.cells for job in jobs)
  lines = [
    f'{grid.name} (study={grid.study}, scale={grid.scale}): {folder}',
    '',
    align(rows),
    '',
    f'{teachers} teachers, {runs} students in {len(jobs) - teachers} cohorts; each is scored when it is trained (not in the times).',
    f'{total.flops:.3g} FLOPs, {_duration(plan.estimate_seconds(hardware, total.flops))} on {machine}; {_bytes(total.checkpoint_bytes)} of checkpoints.',
    f"Cohorts share their teacher's forward passes: {total.saved:.3g} FLOPs ({total.saved / (total.flops + total.saved):.0%}) saved.",
  ]
  if grid.pilot.skip:
    lines.append('The pilot is skipped: every table will say "alpha not validated".')
  elif not (folder / pilots.FILE).exists():
    lines.append(
      'The pilot chooses the alphas shown as a?, and the cheaper teacher of the comparison at equal total FLOPs.'
    )
  return '\n'.join(lines)


def _after_pilot(grid: GridConfig, known: list[Job]) -> list[Job]:
  """The validated cells before their alpha is known: at any one alpha they cost the same."""
  chosen = {
    group.pilot_key: group.draw or group.alpha
    for group in cells_lib.pilot_groups(grid)
    if group.kind in ('distilled', 'unigram', 'tuned')
  }
  groups = cells_lib.validated_groups(grid, chosen, comparisons.reversal_pairs(grid, None))
  jobs = plan.plan_jobs(grid, 'validated', groups, known)
  return [dataclasses.replace(job, id=re.sub(r'_a[\d.e-]+_', '_a?_', job.id.rpartition('-')[0])) for job in jobs]


def status_text(grid: GridConfig, folder: paths.Path) -> str:
  """How many jobs stand how, which run and which failed, and the time that the rest will take at the pace so far."""
  timeout = grid.base.heartbeat_timeout
  jobs = runner.list_jobs(grid, folder)
  states = list(zip(jobs, runner.job_states(folder, jobs, timeout), strict=True))
  counts = Counter(state for _, state in states)
  lines = [f'{grid.name}: {folder}', ', '.join(f'{counts[name]} {name}' for name in runner.STATES)]
  for job, state in states:
    status = RunFolder(folder / 'jobs' / job.id).status() or {}
    if state == 'running':
      lines.append(f'running: {job.id}{_step(folder, job)}')
    if state == 'failed':
      lines.append(
        f'failed: {job.id}: {status.get("error")} (run again to try again; {folder / "jobs" / job.id / "error.txt"})'
      )
  done = [read_json(folder / 'jobs' / job.id / 'job.json') or {} for job, state in states if state == 'done']
  spent, flop = (sum(record.get(name, 0.0) for record in done) for name in ('seconds', 'flops'))
  left = sum(plan.estimate_cost(grid, job).flops for job, state in states if state != 'done')
  if not grid.pilot.skip and not (folder / pilots.FILE).exists():
    left += sum(plan.estimate_cost(grid, job).flops for job in _after_pilot(grid, [job for job, _ in states]))
  if spent and left:
    lines.append(
      f'left: about {_duration(left * spent / flop)} for one runner, at the pace of the {len(done)} jobs so far'
    )
  elif not left:
    lines.append(f'all done; python -m kdjax.report --grid={folder}')
  return '\n'.join(lines)


def _step(folder: paths.Path, job: Job) -> str:
  if not job.cells:
    return ''
  status = runner.cell_folder(folder, job.cells[0]).status() or {}
  return f' (step {status["step"]} of {status["total_steps"]})' if status else ''


def _relationship(job: Job) -> str:
  if not job.cells or job.cells[0].arm != 'distilled':
    return ''
  cell = job.cells[0]
  return cells_lib.relationship(cell.student, cell.config.student.tokens, cell.source)


def _costs(grid: GridConfig, cost: plan.Cost) -> list[str]:
  time_ = _duration(plan.estimate_seconds(grid.hardware, cost.flops))
  return [
    format_count(cost.tokens),
    f'{cost.flops:.3g}',
    f'{cost.teacher / cost.flops:.0%}',
    time_,
    _bytes(cost.checkpoint_bytes),
  ]


def _duration(seconds: float) -> str:
  for unit, size in (('days', 86400), ('h', 3600), ('min', 60)):
    if seconds >= 1.5 * size:
      return f'{seconds / size:.3g} {unit}'
  return f'{seconds:.0f} s'


def _bytes(n: float) -> str:
  for unit, size in (('TB', 1e12), ('GB', 1e9), ('MB', 1e6)):
    if n >= size:
      return f'{n / size:.3g} {unit}'
  return f'{n / 1e3:.3g} kB'


if __name__ == '__main__':
  distributed.watch()
  main()
