"""Which runs a grid is made of: a pure function of its config and, for the validated cells, of the pilot's outcome.

A cell is one student's training run. Its id is a readable name and a hash of everything that its weights depend on, so the same run in two
roles, or in two grids, is one cell. A group is a row of the report: cells that differ in their seed alone, with the baseline they are
compared with.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from kdjax.config import Config, LossConfig, ModelConfig, checks
from kdjax.config.sizes import named
from kdjax.data import corpus
from kdjax.errors import UserError
from kdjax.models import flops
from kdjax.sweeps.config import AXES, GridConfig, matches
from kdjax.sweeps.names import Setting, Source, format_count, format_exact, pilot_key
from kdjax.trainer import experiments


@dataclasses.dataclass(frozen=True)
class Cell:
  """One training run of a student."""

  config: Config
  arm: str  # baseline | distilled | unigram
  name: str
  student: str
  source: Source = Source()

  @functools.cached_property
  def id(self) -> str:
    return f'{self.name}-{experiments.student_key(self.config, self.arm)}'

  @property
  def seed(self) -> int:
    return self.config.student.seed

  @property
  def alpha(self) -> float:
    return self.config.student.alpha


@dataclasses.dataclass(frozen=True)
class Group:
  """Cells that differ in their seed alone. `baseline` are the LM-only cells of the same seeds."""

  kind: str  # distilled | unigram | tuned | flop_matched | equal_compute | baseline
  phase: str  # pilot | main | validated
  setting: Setting
  source: Source
  alpha: float
  cells: tuple[Cell, ...]
  baseline: tuple[Cell, ...] = ()
  scenario: str = ''  # of a flop_matched or equal_compute group: which of the teacher's FLOPs count
  draw: str = ''  # of a pilot's tuned one: its values

  @property
  def pilot_key(self) -> str:
    """What the pilot chooses one alpha (or one draw) for."""
    return pilot_key(self.setting, self.source if self.kind == 'distilled' else self.kind)


def sources(grid: GridConfig, setting: Setting) -> list[Source]:
  """The teachers of a setting and the uses of their targets."""
  return [
    Source(teacher, tokens or setting.student_tokens, grid.budget, data, temperature, top_k, mixing)
    for teacher, tokens, data, temperature, top_k, mixing in itertools.product(
      grid.teacher, grid.teacher_tokens, grid.teacher_data, grid.temperature, grid.top_k, grid.mixing
    )
  ]


def settings(grid: GridConfig) -> list[Setting]:
  split = 'disjoint' in grid.teacher_data
  axes = itertools.product(grid.student, grid.student_tokens, grid.distinct_tokens)
  return [Setting(*values, split=split) for values in axes]


def pilot_groups(grid: GridConfig) -> list[Group]:
  """The pilot: each teacher's alphas, and the draws of the tuned baseline, with the pilot's seed."""
  if grid.pilot.skip:
    return []
  out = []
  for setting in settings(grid):
    base = (_baseline(grid, setting, grid.pilot.seed),)
    out.append(Group('baseline', 'pilot', setting, Source(), 0.0, base))
    for source in sources(grid, setting):
      for alpha in grid.pilot.alpha:
        if alpha and _wanted(grid, setting, source, alpha):
          cells = (_distilled(grid, setting, source, alpha, grid.pilot.seed),)
          out.append(Group('distilled', 'pilot', setting, source, alpha, cells, base))
    if grid.controls.unigram:
      for alpha in filter(None, grid.pilot.alpha):
        cells = (_unigram(grid, setting, alpha, grid.pilot.seed),)
        out.append(Group('unigram', 'pilot', setting, Source(), alpha, cells, base))
    for draw in _draws(grid):
      cells = (_tuned(grid, setting, draw, grid.pilot.seed),)
      out.append(Group('tuned', 'pilot', setting, Source(), 0.0, cells, base, draw=_draw_name(draw)))
  return out


def main_groups(grid: GridConfig) -> list[Group]:
  """The declared product over alpha and seed, the baselines, and the unigram control at each alpha."""
  return [
    group
    for setting in settings(grid)
    for group in _product(grid, setting, 'main', grid.seed, lambda source: grid.alpha)
  ]


def validated_groups(
  grid: GridConfig, chosen: Mapping[str, Any], pairs: Sequence[tuple[Setting, Source, Source]] = ()
) -> list[Group]:
  """Return each teacher and each control at the alpha that the pilot chose for it, with fresh seeds.

  Args:
    chosen: pilot key -> alpha, and for the tuned baseline -> the name of its draw.
    pairs: (setting, costlier teacher, cheaper teacher) to compare at equal total FLOPs.
  """
  if grid.pilot.skip:
    return []
  out: list[Group] = []
  seeds = grid.validated_seed
  for setting in settings(grid):
    key = lambda learner, setting=setting: pilot_key(setting, learner)
    alphas = lambda source, key=key: [float(chosen[key(source)])] if key(source) in chosen else []
    unigram = chosen.get(key('unigram'))
    out += _product(grid, setting, 'validated', seeds, alphas, [] if unigram is None else [float(unigram)])
    baselines = tuple(_baseline(grid, setting, seed) for seed in seeds)
    tuned = _find_draw(grid, chosen.get(key('tuned')))
    if tuned:
      cells = tuple(_tuned(grid, setting, tuned, seed) for seed in seeds)
      out.append(Group('tuned', 'validated', setting, Source(), 0.0, cells, baselines, draw=_draw_name(tuned)))
    for source in sources(grid, setting):
      plain = dataclasses.replace(source, temperature=1.0, top_k=0.0, mixing='normalised')
      if source == plain and any(group.source == source for group in out):
        out += [_flop_matched(grid, setting, source, scenario, baselines) for scenario in grid.controls.flop_matched]
    for _, costly, cheap in (pair for pair in pairs if pair[0] == setting):
      out += [_equal_compute(grid, setting, costly, cheap, alpha, baselines) for alpha in alphas(cheap)]
  return out


def cells_of(groups: Iterable[Group]) -> list[Cell]:
  """Every cell once, baselines included, in order."""
  return list({cell.id: cell for group in groups for cell in (*group.baseline, *group.cells)}.values())


def check_grid(grid: GridConfig) -> None:
  """Check that a grid has distilled cells and that every cell's config can run. Raises UserError."""
  groups = main_groups(grid)
  if not any(group.kind == 'distilled' for group in groups):
    raise UserError('include/exclude: the filters leave no distilled cell; loosen them')
  for cell in cells_of([*groups, *pilot_groups(grid)]):
    for problem in checks.problems(cell.config):
      raise UserError(f'cell {cell.name}: {problem}')


def axes_of(setting: Setting, source: Source, alpha: float, seed: int | None) -> dict[str, Any]:
  values = {**dataclasses.asdict(setting), **dataclasses.asdict(source), 'alpha': alpha, 'seed': seed}
  return {name: values[name] for name in AXES}


def relationship(student: str, student_tokens: int, source: Source) -> str:
  """strong-to-weak, same-level or weak-to-strong: by size, then by tokens."""
  size = lambda name: flops.count_params(named(name, vocab_size=1)).non_embedding
  mine, theirs = (size(student), student_tokens), (size(source.teacher), source.teacher_tokens)
  return 'same-level' if mine == theirs else 'weak-to-strong' if theirs < mine else 'strong-to-weak'


def _product(
  grid: GridConfig, setting: Setting, phase: str, seeds, alphas, unigram: Sequence[float] | None = None
) -> Iterator[Group]:
  """Yield the baselines, each teacher at its alphas, and the unigram control at its own alphas, or (None) at every alpha of a teacher."""
  baselines = {seed: _baseline(grid, setting, seed) for seed in seeds}
  yield Group('baseline', phase, setting, Source(), 0.0, tuple(baselines.values()))
  used: dict[float, set[int]] = {}
  for source in sources(grid, setting):
    for alpha in alphas(source):
      wanted = lambda seed, source=source, alpha=alpha: _wanted(
        grid, setting, source, alpha, seed if phase == 'main' else None
      )
      kept = [seed for seed in seeds if alpha and wanted(seed)]
      if kept:
        used.setdefault(alpha, set()).update(kept)
        cells = tuple(_distilled(grid, setting, source, alpha, seed) for seed in kept)
        yield Group('distilled', phase, setting, source, alpha, cells, tuple(baselines[seed] for seed in kept))
  if unigram is not None:
    used = {alpha: set(seeds) for alpha in unigram}
  if grid.controls.unigram:
    for alpha, kept_seeds in sorted(used.items()):
      ordered = [seed for seed in seeds if seed in kept_seeds]
      cells = tuple(_unigram(grid, setting, alpha, seed) for seed in ordered)
      yield Group('unigram', phase, setting, Source(), alpha, cells, tuple(baselines[seed] for seed in ordered))


def _wanted(grid: GridConfig, setting: Setting, source: Source, alpha: float, seed: int | None = None) -> bool:
  """Return whether the filters leave a cell; without a seed (pilot and validated cells have seeds of their own) they say nothing of seeds."""
  axes = axes_of(setting, source, alpha, seed)
  included = not grid.include or any(matches(text, axes, unknown=True) for text in grid.include)
  return included and not any(matches(text, axes, unknown=False) for text in grid.exclude)


def _config(
  grid: GridConfig, setting: Setting, arm: str, alpha: float, seed: int, tokens: int = 0, **optimizer
) -> Config:
  base = grid.base
  student = dataclasses.replace(
    base.student,
    model=_model(base.student.model, setting.student),
    alpha=alpha,
    arms=(arm,),
    seed=seed,
    tokens=tokens or setting.student_tokens,
    slice=(0.5, 1.0) if setting.split else base.student.slice,
    optimizer=dataclasses.replace(base.student.optimizer, **optimizer),
  )
  data = dataclasses.replace(base.data, distinct_tokens=setting.distinct_tokens)
  loss = LossConfig(z_loss=base.loss.z_loss) if arm == 'baseline' else base.loss
  places: dict[str, Any] = {'name': grid.name, 'scale': grid.scale, 'runs': grid.runs}
  checkpoint = dataclasses.replace(base.checkpoint, keep=max(base.checkpoint.keep, grid.last))
  return dataclasses.replace(base, **places, student=student, data=data, loss=loss, checkpoint=checkpoint)


def _baseline(grid: GridConfig, setting: Setting, seed: int) -> Cell:
  return Cell(_config(grid, setting, 'baseline', 0.0, seed), 'baseline', f'{setting.name}_lm_s{seed}', setting.student)


def _unigram(grid: GridConfig, setting: Setting, alpha: float, seed: int) -> Cell:
  config = _config(grid, setting, 'unigram', alpha, seed)
  return Cell(config, 'unigram', f'{setting.name}_unigram_a{alpha:g}_s{seed}', setting.student)


def _distilled(grid: GridConfig, setting: Setting, source: Source, alpha: float, seed: int, tokens: int = 0) -> Cell:
  config = _config(grid, setting, 'distilled', alpha, seed, tokens)
  teacher = dataclasses.replace(
    config.teacher,
    seed=_teacher_seed(grid, seed),
    model=_model(config.teacher.model, source.teacher),
    tokens=source.teacher_tokens,
    trunk=_trunk(grid, setting) if source.budget == 'trunk' else (),
    slice=((0.0, 0.5) if source.teacher_data == 'disjoint' else (0.5, 1.0)) if setting.split else config.teacher.slice,
  )
  loss = dataclasses.replace(
    config.loss, temperature=source.temperature, teacher_top_k=source.top_k, mixing=source.mixing
  )
  config = dataclasses.replace(config, teacher=teacher, loss=loss)
  longer = f'-on-{format_count(tokens)}' if tokens else ''
  name = f'{setting.name}{longer}_{source.name}_a{alpha:g}_s{seed}'
  return Cell(config, 'distilled', name, setting.student, source)


def _teacher_seed(grid: GridConfig, seed: int) -> int:
  """Return the teacher's seed for students of `seed`. It never equals a student's, or a teacher of the same size would be identical."""
  shared = grid.base.teacher.seed
  return shared + 10_007 * (seed + 1) if grid.teacher_seed == 'paired' else shared


def _tuned(grid: GridConfig, setting: Setting, draw: tuple[float, float, float], seed: int) -> Cell:
  if draw == (1.0, 1.0, 1.0):
    return _baseline(grid, setting, seed)
  stop, rate, decay = draw
  optimizer = grid.base.student.optimizer
  values = {'learning_rate': rate * optimizer.learning_rate, 'weight_decay': decay * optimizer.weight_decay}
  config = _config(grid, setting, 'baseline', 0.0, seed, round(stop * setting.student_tokens), **values)
  return Cell(config, 'baseline', f'{setting.name}_lm-{_draw_name(draw)}_s{seed}', setting.student)


def _flop_matched(
  grid: GridConfig, setting: Setting, source: Source, scenario: str, baselines: tuple[Cell, ...]
) -> Group:
  """LM-only students on as many tokens as the teacher's FLOPs would have bought; Busbridge et al.'s ledger says which FLOPs."""
  config = grid.base
  tokens = flops.matched_tokens(
    sized(grid, setting.student),
    sized(grid, source.teacher),
    setting.student_tokens,
    source.teacher_tokens,
    config.data.seq_len,
    count_logits='logits' in scenario,
    count_pretraining='pretraining' in scenario,
  )
  cells = tuple(
    Cell(
      _config(grid, setting, 'baseline', 0.0, base.seed, round(tokens)),
      'baseline',
      f'{setting.name}_lm-{format_count(tokens)}_s{base.seed}',
      setting.student,
    )
    for base in baselines
  )
  return Group('flop_matched', 'validated', setting, source, 0.0, cells, baselines, scenario=scenario)


def _equal_compute(
  grid: GridConfig, setting: Setting, costly: Source, cheap: Source, alpha: float, baselines: tuple[Cell, ...]
) -> Group:
  """Train students of the cheaper teacher on as many tokens as make the total cost of both pairs equal."""
  scenario, seq_len = grid.controls.flop_matched[-1], grid.base.data.seq_len
  counted = {'count_logits': 'logits' in scenario, 'count_pretraining': 'pretraining' in scenario}
  student, large, small = (sized(grid, name) for name in (setting.student, costly.teacher, cheap.teacher))
  total = flops.distillation_flops(student, large, setting.student_tokens, costly.teacher_tokens, seq_len, **counted)
  tokens = round(flops.pair_tokens(student, small, cheap.teacher_tokens, total, seq_len, **counted))
  cells = tuple(_distilled(grid, setting, cheap, alpha, base.seed, tokens) for base in baselines)
  return Group('equal_compute', 'validated', setting, cheap, alpha, cells, baselines, scenario=scenario)


def sized(grid: GridConfig, name: str) -> ModelConfig:
  """Build a named model's config with the grid's vocabulary; no corpus is needed."""
  model = named(name)
  return model if model.vocab_size else dataclasses.replace(model, vocab_size=vocab_size(grid))


def vocab_size(grid: GridConfig) -> int:
  """Count the tokens of the grid's tokenizer. Raises UserError if its file cannot be read."""
  try:
    return grid.vocab_size or corpus.vocab_size(grid.base.data)
  except UserError as e:
    raise UserError(f'{e}; to plan before the file exists, set vocab_size to its number of tokens') from None


def _model(base: ModelConfig, name: str) -> ModelConfig:
  """The named model, run as the base config says."""
  fields = ('max_seq_len', 'dtype', 'param_dtype', 'attention', 'remat')
  return dataclasses.replace(named(name), **{field: getattr(base, field) for field in fields})


def _trunk(grid: GridConfig, setting: Setting) -> tuple[int, ...]:
  return tuple(sorted({tokens or setting.student_tokens for tokens in grid.teacher_tokens}))


def _draws(grid: GridConfig) -> list[tuple[float, float, float]]:
  """(stop, learning rate, weight decay) of each draw; the base's own values, where they are among them, come first."""
  tuned = grid.controls.tuned
  if not tuned.enabled:
    return []
  product = list(itertools.product(tuned.stop, tuned.learning_rate, tuned.weight_decay))
  order = np.random.default_rng(grid.pilot.seed).permutation(len(product))
  shuffled = sorted((product[i] for i in order), key=lambda draw: not all(math.isclose(x, 1.0) for x in draw))
  return shuffled[: tuned.draws or len(grid.pilot.alpha)]


def _draw_name(draw: tuple[float, float, float]) -> str:
  return 'stop{}-lr{}-wd{}'.format(*map(format_exact, draw))


def _find_draw(grid: GridConfig, name: str | None) -> tuple[float, float, float] | None:
  """Find the draw that the pilot chose. Older pilots wrote six digits of each number."""
  draws = _draws(grid)
  older = {'stop{:g}-lr{:g}-wd{:g}'.format(*draw): draw for draw in reversed(draws)}
  return (older | {_draw_name(draw): draw for draw in draws}).get(name or '')
