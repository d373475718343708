"""What a grid will cost, and which runs share a teacher's forward pass. Arithmetic only: nothing is run."""

import dataclasses
from collections.abc import Iterable, Sequence

from kdjax import config as config_lib
from kdjax.config import Config, TrainingConfig
from kdjax.errors import UserError
from kdjax.models import flops
from kdjax.sweeps import cells as cells_lib
from kdjax.sweeps.cells import Cell, Group
from kdjax.sweeps.config import GridConfig, HardwareConfig
from kdjax.sweeps.names import format_count
from kdjax.trainer import experiments

STATE_BYTES = 16  # a parameter's weight, gradient and two moments in float32
CHECKPOINT_BYTES = 12
PAYS = 0.03  # the share of the FLOPs that a cohort must save


@dataclasses.dataclass(frozen=True)
class Job:
  """A unit of work: one teacher, or one cohort of students with their evaluation."""

  id: str
  phase: str  # teachers | pilot | main | validated
  config: Config  # the teacher's, or what the cells share
  cells: tuple[Cell, ...] = ()  # none: a teacher
  teacher: str = ''  # the job that must be done first
  model: str = ''  # a teacher's name


def plan_jobs(grid: GridConfig, phase: str, groups: Iterable[Group], known: Sequence[Job] = ()) -> list[Job]:
  """The jobs of a phase, in the order of their needs; cells and teachers of `known` jobs are not done again."""
  done = {cell.id for job in known for cell in job.cells}
  cells = [cell for cell in cells_lib.cells_of(groups) if cell.id not in done]
  teachers = {job.id for job in known if not job.cells}
  fresh: dict[str, Job] = {}
  cohorts: dict[str, list[Cell]] = {}
  for cell in cells:
    if cell.arm == 'distilled':
      teacher = _teacher_job(cell)
      if teacher.id not in teachers:
        fresh[teacher.id] = teacher
    cohorts.setdefault(config_lib.fingerprint(experiments.cohort_key(cell.config)), []).append(cell)
  students = [
    _cohort_job(phase, part)
    for members in cohorts.values()
    for part in _parts(members, cohort_size(grid, members[0], len(members)))
  ]
  return [*fresh.values(), *students]


def cohort_size(grid: GridConfig, cell: Cell, wanted: int) -> int:
  """How many students may train side by side: as many as fit the memory, where one teacher forward pass for all pays."""
  wanted = min(wanted, grid.cohort)
  if cell.arm != 'distilled' or saved_share(grid, cell, wanted) < PAYS:
    return 1
  size = lambda name: flops.count_params(cells_lib.sized(grid, name)).total
  memory = 0.7 * grid.hardware.gib * 2**30 * grid.hardware.devices  # the rest is for activations and the loss's chunk
  room = (memory - 4 * size(cell.source.teacher)) / (STATE_BYTES * size(cell.student))
  return max(1, min(wanted, int(room)))


def saved_share(grid: GridConfig, cell: Cell, size: int) -> float:
  """The share of the separate runs' FLOPs that a cohort of `size` saves."""
  if cell.arm != 'distilled':
    return 0.0
  student, teacher = (cells_lib.sized(grid, name) for name in (cell.student, cell.source.teacher))
  seq_len = grid.base.data.seq_len
  ratio = flops.forward_flops(teacher, seq_len) / flops.training_flops(student, seq_len)
  return 1 - (size + ratio) / (size * (1 + ratio))


@dataclasses.dataclass(frozen=True)
class Cost:
  """Of one job: FLOPs by what they are spent on, tokens, bytes of checkpoints that stay."""

  student: float
  teacher: float
  saved: float  # the teacher's forward passes that a cohort does not repeat
  tokens: int
  checkpoint_bytes: float

  @property
  def flops(self) -> float:
    return self.student + self.teacher

  def __add__(self, other: 'Cost') -> 'Cost':
    return Cost(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))


NOTHING = Cost(0.0, 0.0, 0.0, 0, 0.0)


def estimate_cost(grid: GridConfig, job: Job) -> Cost:
  """A job's model FLOPs (kdjax/models/flops.py; evaluation not counted), tokens and bytes."""
  data = job.config.data
  spent = lambda section: config_lib.n_steps(section, data) * section.batch_size * data.seq_len
  if not job.cells:
    model = cells_lib.sized(grid, job.model)
    section = experiments.trained_section(job.config.teacher)
    size = flops.count_params(model).total
    tokens = spent(section)
    kept = _n_checkpoints(job.config, section) + len(section.trunk)
    return Cost(0.0, flops.training_flops(model, data.seq_len) * tokens, 0.0, tokens, kept * CHECKPOINT_BYTES * size)
  total = NOTHING
  for k, cell in enumerate(job.cells):
    model, teacher = cells_lib.sized(grid, cell.student), cell.source.teacher
    tokens = spent(cell.config.student)
    forward = flops.forward_flops(cells_lib.sized(grid, teacher), data.seq_len) * tokens if teacher else 0.0
    total += Cost(
      flops.training_flops(model, data.seq_len) * tokens,
      forward if k == 0 else 0.0,
      0.0 if k == 0 else forward,
      tokens,
      _n_checkpoints(cell.config, cell.config.student) * CHECKPOINT_BYTES * flops.count_params(model).total,
    )
  return total


def _n_checkpoints(config: Config, section: TrainingConfig) -> int:
  """Return the most checkpoints that a run keeps: the newest, and one per period."""
  period = config.checkpoint.keep_period
  return config.checkpoint.keep + (config_lib.n_steps(section, config.data) // period if period else 0)


def estimate_seconds(hardware: HardwareConfig, flop: float) -> float:
  """Convert model FLOPs to wall seconds on the plan's hardware."""
  peak = 1e9 * hardware.cpu_gflops if hardware.device.lower() == 'cpu' else flops.peak_flops(hardware.device)
  if peak is None:
    raise UserError(f'hardware.device: unknown device {hardware.device!r}')
  return flop / (peak * hardware.devices * hardware.utilisation)


def _teacher_job(cell: Cell) -> Job:
  section = experiments.trained_section(cell.config.teacher)
  name = f'teacher_{cell.source.teacher}-{format_count(section.tokens)}{"-trunk" * bool(section.trunk)}'
  return Job(f'{name}-{experiments.teacher_key(cell.config)}', 'teachers', cell.config, model=cell.source.teacher)


def _cohort_job(phase: str, members: Sequence[Cell]) -> Job:
  teacher = _teacher_job(members[0]).id if members[0].arm == 'distilled' else ''
  name = members[0].name if len(members) == 1 else f'{members[0].name.rpartition("_a")[0]}_{len(members)}'
  key = config_lib.fingerprint([cell.id for cell in members], 8)
  return Job(f'{name}-{key}', phase, members[0].config, tuple(members), teacher)


def _parts(members: list[Cell], size: int) -> list[list[Cell]]:
  """In parts of at most `size`, as even as they come."""
  n = -(-len(members) // size)
  return [members[i * len(members) // n : (i + 1) * len(members) // n] for i in range(n)]
