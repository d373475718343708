"""The grid's fields: the axes of a declared product over one base config, how alpha is validated, the controls, the contrasts.

Everything that an axis does not vary stands in `base`, an ordinary config: `--config.base.student.optimizer.learning_rate=1e-3`.
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator
from typing import Any

from kdjax.config import checks, fields
from kdjax.config.fields import field
from kdjax.config.schema import Config
from kdjax.config.sizes import NAMED, nearest
from kdjax.errors import ConfigError
from kdjax.models import flops

BUDGETS = ('annealed', 'trunk')
TEACHER_DATA = ('iso', 'disjoint')
TEACHER_SEEDS = ('shared', 'paired')
SCENARIOS = ('logits', 'pretraining', 'logits+pretraining')
IN_DOMAIN, OOD_MEAN = 'in-domain', 'OOD mean'
OOD_LESS_IN_DOMAIN = f'{OOD_MEAN} less {IN_DOMAIN}'
CONTRASTS = {  # contrast -> the sets that it is tested on
  'weak_helps': (IN_DOMAIN, OOD_MEAN),
  'size_reverses': (IN_DOMAIN, OOD_MEAN),
  'budget_reverses': (IN_DOMAIN, OOD_MEAN),
  'ood_more': (OOD_LESS_IN_DOMAIN,),
  'reversal_at_equal_flops': (IN_DOMAIN, OOD_MEAN),
  'more_than_calibration': (OOD_MEAN,),
  'beats_tuned': (IN_DOMAIN, OOD_MEAN),
}
PRIMARY = ('weak_helps:in-domain', 'size_reverses:in-domain', 'ood_more', 'more_than_calibration')
MAX_PRIMARY = 4  # each test is at level 0.05 / m, so every further test costs the others power
AXES = (
  'student',
  'student_tokens',
  'distinct_tokens',
  'teacher',
  'teacher_tokens',
  'budget',
  'teacher_data',
  'temperature',
  'top_k',
  'mixing',
  'alpha',
  'seed',
)


# Grid field -> the field of `base` that its values replace.
FIELDS_OF_BASE = {
  'student_tokens': 'student.tokens',
  'distinct_tokens': 'data.distinct_tokens',
  'teacher_tokens': 'teacher.tokens',
  'temperature': 'loss.temperature',
  'top_k': 'loss.teacher_top_k',
  'mixing': 'loss.mixing',
  'alpha': 'student.alpha',
  'pilot.alpha': 'student.alpha',
  'seed': 'student.seed',
  'validated_seed': 'student.seed',
  'pilot.seed': 'student.seed',
}
DEFAULTS = (('teacher_tokens', 0),)  # values that mean a default


@dataclasses.dataclass(frozen=True)
class PilotConfig:
  """How each teacher's alpha is chosen: by the validation split, before the main cells, with a seed that no main cell has."""

  alpha: tuple[float, ...] = field((0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0), 'candidates')
  seed: int = field(1000, "the pilot's own")
  skip: bool = field(False, 'every table then says "alpha not validated"')


@dataclasses.dataclass(frozen=True)
class TunedConfig:
  """The tuned baseline: LM-only students; stopping point, rate and decay are chosen on the validation split."""

  enabled: bool = field(True)
  stop: tuple[float, ...] = field((1.0, 0.75, 0.5), "shares of the student's tokens, each annealed")
  learning_rate: tuple[float, ...] = field((1.0, 0.5, 2.0), "times the base's")
  weight_decay: tuple[float, ...] = field((1.0, 5.0), "times the base's")
  draws: int = field(0, "of the product, the base's own values first; 0: as many as the pilot has alphas")


@dataclasses.dataclass(frozen=True)
class ControlsConfig:
  """Students that are compared with the distilled ones, besides the LM-only baseline."""

  unigram: bool = field(True, 'a teacher that only knows token frequencies, at each alpha that a teacher has')
  flop_matched: tuple[str, ...] = field(
    SCENARIOS, "LM-only students with the tokens that the teacher's FLOPs would have bought", choices=SCENARIOS
  )
  tuned: TunedConfig = TunedConfig()


@dataclasses.dataclass(frozen=True)
class HardwareConfig:
  """What a plan's times and cohorts are computed for."""

  device: str = field('cpu', 'or a device that kdjax/models/flops.py knows (v5p, H100, L4, ...)', result=False)
  devices: int = field(1, result=False)
  gib: float = field(16.0, 'memory of one device', unit='GiB', result=False)
  utilisation: float = field(0.4, 'model FLOPs over peak FLOPs', result=False)
  cpu_gflops: float = field(60.0, 'peak, if the device is cpu', unit='GFLOP/s', result=False)


@dataclasses.dataclass(frozen=True)
class GridConfig:
  """A product over the axes; the LM-only baseline of each student setting and seed belongs to it (alpha 0)."""

  name: str = field('grid', 'of the folder in `runs`')
  scale: str = field('laptop', 'of the base')
  study: str = field('main', 'which of the declared studies (kdjax/sweeps/studies.py)')
  runs: str = field('runs', 'where the grid, its teachers and token stores are', result=False)
  base: Config = Config()
  student: tuple[str, ...] = field(('tiny-0.3m',), 'named models')
  student_tokens: tuple[int, ...] = field((512_000,), unit='tokens')
  distinct_tokens: tuple[int, ...] = field((0,), '0: all of the training split', unit='tokens')
  teacher: tuple[str, ...] = field(('tiny-0.1m', 'tiny-0.3m', 'tiny-1m'), 'named models')
  teacher_tokens: tuple[int, ...] = field((0,), "0: the student's", unit='tokens')
  budget: str = field('annealed', 'each budget is a run of its own, or a checkpoint of one trunk', choices=BUDGETS)
  teacher_data: tuple[str, ...] = field(
    ('iso',),
    'iso: the documents of the students; disjoint: students learn from one half of them, teachers from the other',
    choices=TEACHER_DATA,
  )
  temperature: tuple[float, ...] = field((1.0,))
  top_k: tuple[float, ...] = field((0.0,), '0: all tokens')
  mixing: tuple[str, ...] = field(('normalised',))
  alpha: tuple[float, ...] = field((0.0, 0.2, 0.4, 0.6, 0.8), 'declared values; 0 is the baseline')
  seed: tuple[int, ...] = field((43, 44, 45))
  validated_seed: tuple[int, ...] = field((46, 47, 48, 49, 50), 'fresh ones, for the alpha that the pilot chose')
  include: tuple[str, ...] = field((), "'teacher=tiny-1m&alpha=0.2|0.4': cells that match one of these; (): all")
  exclude: tuple[str, ...] = field((), 'cells that match one of these are left out')
  pilot: PilotConfig = PilotConfig()
  controls: ControlsConfig = ControlsConfig()
  contrasts: tuple[str, ...] = field(tuple(CONTRASTS), 'the declared comparisons', choices=tuple(CONTRASTS))
  primary: tuple[str, ...] = field(
    PRIMARY,
    'CONTRAST:SET, at most four over all settings: these get verdicts; the others are exploratory',
    implied=PRIMARY,
    since='0.2',
  )
  declared_alpha: tuple[float, ...] = field(
    (),
    'without a pilot: the alpha at which each teacher is tested, one value each; (): the middle one',
    implied=(),
    since='0.2',
  )
  teacher_seed: str = field(
    'shared',
    'shared: a teacher is one run; paired: each student seed has its own teacher run',
    choices=TEACHER_SEEDS,
    implied='shared',
    since='0.2',
  )
  last: int = field(
    3, 'checkpoints scored where an arm has one seed: the noise of a single run', at_least=1, result=False
  )
  cohort: int = field(8, 'students that train side by side, at most', at_least=1, result=False)
  hardware: HardwareConfig = HardwareConfig()
  vocab_size: int = field(
    0, 'of a tokenizer file; 0: read from it. Set it to plan before the file exists', at_least=0, result=False
  )


def problems(grid: GridConfig) -> Iterator[str]:
  """What is wrong with a grid whose fields and types are right."""
  yield from (f'base.{problem}' for problem in checks.problems(grid.base))
  yield from fields.problems(dataclasses.replace(grid, base=Config()))
  yield from checks.folder_problems('name', grid.name)
  for key, path in (('teacher.run', grid.base.teacher.run), ('student.init', grid.base.student.init)):
    if path:
      yield f'base.{key}: a grid trains its teachers and students from the start; leave it empty'
  for name in ('student', 'teacher'):
    for model in getattr(grid, name):
      yield from _unknown_model(name, model)
  for name in ('alpha', 'pilot.alpha'):
    values = grid.alpha if name == 'alpha' else grid.pilot.alpha
    if 0.0 not in values and not (name == 'pilot.alpha' and grid.pilot.skip):
      yield f'{name}: {_list(values)} lacks 0, the LM-only baseline that every gain is measured against; add it'
    if len(values) < 2:
      yield f'{name}: nothing but the baseline; add an alpha above 0'
  for name, values in (
    *((axis, getattr(grid, axis)) for axis in AXES if axis != 'budget'),
    ('pilot.alpha', grid.pilot.alpha),
    ('validated_seed', grid.validated_seed),
  ):
    if len(set(values)) != len(values):
      yield f'{name}: {_list(values)} names a value twice'
    if not values and name != 'validated_seed':
      yield f'{name}: needs at least one value'
  yield from _axis_problems(grid)
  seeds = [*grid.seed, *grid.validated_seed, *([] if grid.pilot.skip else [grid.pilot.seed])]
  if len(set(seeds)) != len(seeds):
    yield f'seed, validated_seed, pilot.seed: a validated alpha needs fresh seeds, and the pilot one of its own; got {_list(seeds)}'
  if not grid.pilot.skip and not grid.validated_seed:
    yield 'validated_seed: the alpha that the pilot chooses needs at least one seed; or set pilot.skip=true'
  yield from _primary_problems(grid)
  yield from _declared_alpha_problems(grid)
  tuned = grid.controls.tuned
  if tuned.enabled and (grid.pilot.skip or not (tuned.stop and tuned.learning_rate and tuned.weight_decay)):
    yield 'controls.tuned: its values are chosen by the pilot; give each at least one, or set controls.tuned.enabled=false'
  for name, wanted, wrong in (
    ('stop', 'shares of the tokens must be in (0, 1]', lambda share: not 0 < share <= 1),
    ('learning_rate', 'factors must be above 0', lambda factor: factor <= 0),
    ('weight_decay', 'factors must not be below 0', lambda factor: factor < 0),
  ):
    if any(map(wrong, values := getattr(tuned, name))):
      yield f'controls.tuned.{name}: {wanted}, got {_list(values)}'
  for text in (*grid.include, *grid.exclude):
    yield from _filter_problems(text)
  yield from _hardware_problems(grid.hardware)
  yield from _vocab_size_problems(grid)


def _vocab_size_problems(grid: GridConfig) -> Iterator[str]:
  tokenizer = grid.base.data.tokenizer
  size = {'bpe': grid.base.data.vocab_size, 'bytes': 257}.get(tokenizer, grid.vocab_size)
  if grid.vocab_size > 0 and grid.vocab_size != size:
    yield f'vocab_size: the tokenizer {tokenizer} has {size} tokens, got {grid.vocab_size}; leave it at 0'


def _hardware_problems(hardware: HardwareConfig) -> Iterator[str]:
  if min(hardware.devices, hardware.gib, hardware.utilisation, hardware.cpu_gflops) <= 0:
    yield 'hardware: devices, gib, utilisation and cpu_gflops must be above 0'
  if hardware.device.lower() != 'cpu' and flops.peak_flops(hardware.device) is None:
    names = ', '.join(name for name, _ in flops.PEAKS)
    yield (
      f'hardware.device: unknown device {hardware.device!r}; known: cpu, {names}; '
      'for any other device set hardware.device=cpu and hardware.cpu_gflops to its peak'
    )


def _axis_problems(grid: GridConfig) -> Iterator[str]:
  """Run an ordinary config's checks on each value that replaces a field of `base`, and report problems under the grid's field."""
  already = set(checks.problems(grid.base))
  for name, replaced in FIELDS_OF_BASE.items():
    values = functools.reduce(getattr, name.split('.'), grid)
    wanted = [value for value in (values if isinstance(values, tuple) else (values,)) if (name, value) not in DEFAULTS]
    found = [
      problem for value in wanted for problem in _problems_with(grid.base, replaced, value) if problem not in already
    ]
    yield from (f'{name}: {problem.partition(": ")[2]}' for problem in dict.fromkeys(found))


def _problems_with(base: Config, name: str, value: Any) -> Iterable[str]:
  section, _, leaf = name.partition('.')
  try:
    changed = dataclasses.replace(getattr(base, section), **{leaf: value})
  except ConfigError as e:  # a section that checks itself
    return e.problems
  return checks.problems(dataclasses.replace(base, **{section: changed}))


def matches(text: str, axes: dict[str, object], unknown: bool) -> bool:
  """Return whether a cell's axes fit a filter: conditions joined by '&', the values of one by '|'; numbers are compared as numbers.

  `unknown` is what a condition on an axis of value None counts as.
  """
  return all(
    any(_same(axes[name.strip()], value.strip(), unknown) for value in values.split('|'))
    for name, _, values in (condition.partition('=') for condition in text.split('&'))
  )


def _same(value: object, text: str, unknown: bool) -> bool:
  if value is None:
    return unknown
  if isinstance(value, str):
    return value == text
  try:
    return float(text) == value
  except ValueError:
    return False


def _filter_problems(text: str) -> Iterator[str]:
  for condition in text.split('&'):
    name, equals, _ = condition.partition('=')
    if not equals or name.strip() not in AXES:
      yield f"include/exclude: {text!r} is no filter; write 'axis=value' with '&' between, axes: {', '.join(AXES)}"
      return


def primary_tests(grid: GridConfig) -> set[tuple[str, str]]:
  """Return the (contrast, set) of each primary test."""
  return set(map(_one_primary, grid.primary))


def n_primary(grid: GridConfig) -> int:
  """Count the primary tests over all student settings: the family that they are corrected for."""
  return len(primary_tests(grid)) * len(grid.student) * len(grid.student_tokens) * len(grid.distinct_tokens)


def _only_set(contrast: str) -> str:
  sets = CONTRASTS.get(contrast, ())
  return sets[0] if len(sets) == 1 else ''


def _primary_problems(grid: GridConfig) -> Iterator[str]:
  for name, (contrast, where) in zip(grid.primary, map(_one_primary, grid.primary), strict=True):
    if contrast not in CONTRASTS:
      yield f'primary: unknown contrast {contrast!r}; known: {", ".join(CONTRASTS)}'
    elif where not in CONTRASTS[contrast]:
      known = ' or '.join(f'{contrast}:{each}' for each in CONTRASTS[contrast])
      yield f'primary: {name!r} names no set on which {contrast} is tested; write {known}'
    elif contrast not in grid.contrasts:
      yield f'primary: {contrast} is not in contrasts ({_list(grid.contrasts)}); add it there or remove it here'
  if n_primary(grid) > MAX_PRIMARY:
    yield (
      f'primary: {len(grid.primary)} tests for each student setting are {n_primary(grid)} in total, but at most '
      f'{MAX_PRIMARY} can be primary; remove some (they become exploratory)'
    )


def _one_primary(name: str) -> tuple[str, str]:
  contrast, _, where = name.partition(':')
  return contrast, where or _only_set(contrast)


def _declared_alpha_problems(grid: GridConfig) -> Iterator[str]:
  values = grid.declared_alpha
  if values and len(values) != len(grid.teacher):
    yield f'declared_alpha: {len(values)} values for {len(grid.teacher)} teachers; give one for each teacher, or none'
  for alpha in values:
    if alpha not in grid.alpha or not alpha:
      yield f'declared_alpha: {alpha:g} is not an alpha above 0 of the grid ({_list(grid.alpha)})'


def _unknown_model(axis: str, model: str) -> Iterator[str]:
  if model not in NAMED:
    yield f"{axis}: unknown model '{model}'; {nearest(model, NAMED)}"


def _list(values) -> str:
  return ', '.join(str(v) for v in values)
