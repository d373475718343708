"""Which runs a grid is made of."""

import dataclasses
import json

import pytest

from kdjax import cli
from kdjax.data.tokenizer import Tokenizer
from kdjax.errors import ConfigError, UserError
from kdjax.models import flops
from kdjax.sweeps import cells, comparisons, runner, studies
from kdjax.sweeps import config as grid_config
from kdjax.sweeps.config import ControlsConfig, GridConfig, PilotConfig, TunedConfig

PLAIN = ControlsConfig(unigram=False, flop_matched=(), tuned=TunedConfig(enabled=False))


def grid(**fields) -> GridConfig:
  return dataclasses.replace(GridConfig(controls=PLAIN), **fields)


def of(groups, kind):
  return [group for group in groups if group.kind == kind]


def test_the_main_phase_is_the_product_of_the_axes_and_one_baseline_a_seed():
  g = grid(teacher_tokens=(1000, 2000), temperature=(1.0, 2.0))
  groups = cells.main_groups(g)
  distilled = of(groups, 'distilled')
  assert len(distilled) == 3 * 2 * 2 * 4  # teachers, budgets, temperatures, alphas above 0
  assert all([cell.seed for cell in group.cells] == [43, 44, 45] for group in groups)
  assert len({cell.id for group in of(groups, 'baseline') for cell in group.cells}) == 3
  assert len(cells.cells_of(groups)) == 3 * (len(distilled) + 1)


def test_an_arm_and_its_baseline_differ_in_their_target_alone():
  for group in of(cells.main_groups(grid(distinct_tokens=(5000,))), 'distilled'):
    for cell, base in zip(group.cells, group.baseline, strict=True):
      same = dataclasses.replace(cell.config.student, alpha=0.0, arms=('baseline',))
      assert same == base.config.student
      assert cell.config.data == base.config.data
      assert cell.config.data.distinct_tokens == 5000


def test_ids_are_stable_and_depend_on_what_the_weights_depend_on():
  first = cells.cells_of(cells.main_groups(grid()))
  assert [cell.id for cell in first] == [cell.id for cell in cells.cells_of(cells.main_groups(grid()))]
  assert len({cell.id for cell in first}) == len(first)
  base = grid().base
  changed = {
    'rate': dataclasses.replace(
      base,
      student=dataclasses.replace(
        base.student, optimizer=dataclasses.replace(base.student.optimizer, learning_rate=1e-2)
      ),
    ),
    'data': dataclasses.replace(base, data=dataclasses.replace(base.data, seq_len=64)),
  }
  for other in changed.values():
    assert {c.id for c in cells.cells_of(cells.main_groups(grid(base=other)))}.isdisjoint(c.id for c in first)
  for same in (
    grid(runs='elsewhere'),
    grid(name='other'),
    grid(base=dataclasses.replace(base, steps_per_call=7, eval=dataclasses.replace(base.eval, window=64))),
    grid(last=1),
  ):
    assert [c.id for c in cells.cells_of(cells.main_groups(same))] == [c.id for c in first]


def test_a_grid_with_a_nucleus_at_another_temperature_is_another_grid_than_before():
  base = grid().base
  nucleus = dataclasses.replace(base, loss=dataclasses.replace(base.loss, teacher_top_p=0.9))
  marked = lambda g: 'nucleus' in runner.grid_identity(g)['base']['loss']
  assert [marked(grid(base=b, temperature=t)) for b in (base, nucleus) for t in ((1.0,), (1.0, 2.0))] == [False] * 3 + [
    True
  ]
  groups = of(cells.main_groups(grid(base=nucleus, temperature=(1.0, 2.0))), 'distilled')
  own = {group.source.temperature: {c.config.loss.temperature for c in group.cells} for group in groups}
  assert own == {1.0: {1.0}, 2.0: {2.0}}


def test_a_teachers_training_is_part_of_its_students_identity():
  base = grid().base
  other = dataclasses.replace(base, teacher=dataclasses.replace(base.teacher, seed=7))
  first, second = (cells.cells_of(cells.main_groups(g)) for g in (grid(), grid(base=other)))
  differs = {a.arm for a, b in zip(first, second, strict=True) if a.id != b.id}
  assert differs == {'distilled'}


@pytest.mark.parametrize(
  ('filters', 'left'),
  [
    ({'exclude': ('teacher=tiny-1m',)}, 2 * 4 * 3),
    ({'exclude': ('teacher=tiny-1m&alpha=0.2|0.4',)}, 3 * 4 * 3 - 2 * 3),
    ({'include': ('alpha=0.2',)}, 3 * 3),
    ({'include': ('alpha=0.2', 'seed=43')}, 3 * 3 + 3 * 3),
    ({'include': ('teacher=tiny-1m',), 'exclude': ('seed=44',)}, 4 * 2),
  ],
)
def test_filters(filters, left):
  groups = of(cells.main_groups(grid(**filters)), 'distilled')
  assert sum(len(group.cells) for group in groups) == left
  for group in groups:
    assert [c.seed for c in group.cells] == [c.seed for c in group.baseline]


def test_filters_on_seeds_leave_the_pilot_and_the_fresh_seeds_alone():
  g = grid(exclude=('seed=43',))
  assert len(of(cells.pilot_groups(g), 'distilled')) == 3 * 10
  chosen = {f'{s.name}/{t.name}': 0.2 for s in cells.settings(g) for t in cells.sources(g, s)}
  assert [c.seed for c in of(cells.validated_groups(g, chosen), 'distilled')[0].cells] == list(g.validated_seed)


def test_a_filter_that_leaves_nothing_is_refused():
  with pytest.raises(UserError, match='leave no distilled cell'):
    cells.check_grid(grid(include=('teacher=tiny-3m',)))


def test_the_pilot_has_each_alpha_and_as_many_draws_for_the_baseline():
  g = grid(controls=ControlsConfig())
  groups = cells.pilot_groups(g)
  assert sorted({group.alpha for group in of(groups, 'distilled')}) == [a / 10 for a in range(1, 11)]
  assert len(of(groups, 'tuned')) == 11
  assert of(groups, 'tuned')[0].cells == of(groups, 'baseline')[0].cells  # the first draw is the base's own values
  assert {cell.seed for cell in cells.cells_of(groups)} == {g.pilot.seed}


def test_tuned_draws_differ_from_the_baseline_in_what_is_tuned():
  g = grid(controls=ControlsConfig(tuned=TunedConfig(stop=(1.0, 0.5), learning_rate=(2.0,), weight_decay=(3.0,))))
  optimizer = g.base.student.optimizer
  for group in of(cells.pilot_groups(g), 'tuned'):
    (cell,) = group.cells
    assert cell.config.student.optimizer.learning_rate == 2 * optimizer.learning_rate
    assert cell.config.student.optimizer.weight_decay == pytest.approx(3 * optimizer.weight_decay)
    assert cell.config.student.tokens in (g.student_tokens[0], g.student_tokens[0] // 2)


def test_validated_cells_are_at_the_chosen_alpha_with_fresh_seeds_and_their_controls():
  g = grid(controls=ControlsConfig(flop_matched=('logits',)))
  (setting,) = cells.settings(g)
  chosen = {f'{setting.name}/{s.name}': 0.1 * k for k, s in enumerate(cells.sources(g, setting), 2)}
  chosen |= {f'{setting.name}/tuned': 'stop0.5-lr1-wd1', f'{setting.name}/unigram': 0.1}
  groups = cells.validated_groups(g, chosen)
  assert [group.alpha for group in of(groups, 'distilled')] == pytest.approx([0.2, 0.3, 0.4])
  assert [group.alpha for group in of(groups, 'unigram')] == [0.1]  # its own alpha, not the teachers'
  assert all([c.seed for c in group.cells] == list(g.validated_seed) for group in groups)
  (tuned,) = of(groups, 'tuned')
  assert tuned.cells[0].config.student.tokens == setting.student_tokens // 2
  for group in of(groups, 'flop_matched'):
    student, teacher = (cells.sized(g, name) for name in (setting.student, group.source.teacher))
    tokens = group.cells[0].config.student.tokens
    ledger = flops.ledger(student, teacher, setting.student_tokens, group.source.teacher_tokens, g.base.data.seq_len)
    spent = flops.training_flops(student, g.base.data.seq_len) * tokens
    assert spent == pytest.approx(ledger.total(count_logits=True, count_pretraining=False), rel=1e-5)


def test_the_pilot_looks_for_the_unigram_controls_own_alpha():
  g = grid(controls=ControlsConfig(flop_matched=()), pilot=PilotConfig(alpha=(0.0, 0.1, 0.5)))
  groups = of(cells.pilot_groups(g), 'unigram')
  assert [group.alpha for group in groups] == [0.1, 0.5]
  assert {group.pilot_key for group in groups} == {'tiny-0.3m-512k/unigram'}
  assert all(group.cells[0].arm == 'unigram' and group.cells[0].seed == g.pilot.seed for group in groups)


@pytest.mark.parametrize('scenario', grid_config.SCENARIOS)
def test_pairs_at_equal_total_flops_cost_the_same(scenario):
  g = grid(controls=ControlsConfig(flop_matched=(scenario,)))
  (setting,) = cells.settings(g)
  sources = comparisons.plain_sources(g, setting)
  curves = {f'{setting.name}/{s.name}': {'0': 2.0, '0.4': 1.9 + 0.01 * k} for k, s in enumerate(sources)}
  chosen = {f'{setting.name}/{s.name}': 0.4 for s in sources}
  pairs = comparisons.reversal_pairs(g, curves)
  assert [(most.teacher, less.teacher) for _, most, less in pairs] == [
    ('tiny-1m', 'tiny-0.1m')
  ]  # the pilot's best of less
  (group,) = of(cells.validated_groups(g, chosen, pairs), 'equal_compute')
  assert group.source.teacher == 'tiny-0.1m' and [c.seed for c in group.cells] == list(g.validated_seed)
  spent = []
  for source, tokens in ((sources[-1], setting.student_tokens), (group.source, group.cells[0].config.student.tokens)):
    student, teacher = (cells.sized(g, name) for name in (setting.student, source.teacher))
    ledger = flops.ledger(student, teacher, tokens, source.teacher_tokens, g.base.data.seq_len)
    spent.append(ledger.total(count_logits='logits' in scenario, count_pretraining='pretraining' in scenario))
  assert spent[0] == pytest.approx(spent[1], rel=1e-5) and tokens > setting.student_tokens
  assert group.cells[0].config.teacher == of(cells.validated_groups(g, chosen), 'distilled')[0].cells[0].config.teacher


def test_without_a_pilot_the_reference_of_a_reversal_is_declared():
  g = grid(student=('tiny-1m',), teacher=('tiny-0.3m', 'tiny-1m', 'tiny-3m', 'tiny-10m'), teacher_tokens=(0, 9000))
  (setting,) = cells.settings(g)
  sources = comparisons.plain_sources(g, setting)
  pair = lambda found: tuple((s.teacher, s.teacher_tokens) for s in found)
  assert pair(comparisons.size_pair(setting, sources, None)) == (('tiny-10m', 512_000), ('tiny-1m', 512_000))
  smaller = [s for s in sources if s.teacher != 'tiny-1m']
  assert pair(comparisons.size_pair(setting, smaller, None)) == (('tiny-10m', 512_000), ('tiny-3m', 512_000))
  for family in comparisons.by_budget(sources):
    assert pair(comparisons.budget_pair(setting, family, None))[1][1] == 9000


def test_paired_teacher_seeds_give_each_student_seed_a_teacher_run_of_its_own():
  g = grid(teacher_seed='paired')
  for group in of(cells.main_groups(g), 'distilled'):
    seeds = [cell.config.teacher.seed for cell in group.cells]
    assert len(set(seeds)) == len(g.seed) and not set(seeds) & {*g.seed, *g.validated_seed, g.base.teacher.seed}
  shared = {c.config.teacher.seed for group in of(cells.main_groups(grid()), 'distilled') for c in group.cells}
  assert shared == {g.base.teacher.seed}


@pytest.mark.parametrize('study', [s for s in studies.STUDIES if s not in ('main', 'mechanism')])
@pytest.mark.parametrize('scale', ['laptop', 'paper'])
def test_what_a_study_without_a_pilot_tests_has_five_seeds(study, scale):
  g = cli.load_as(GridConfig, grid_config.problems, f'configs/grid.py:study={study},scale={scale}', {})
  tested = set(zip(g.teacher, g.declared_alpha, strict=True))
  for group in of(cells.main_groups(g), 'distilled'):
    plain = group.source == dataclasses.replace(group.source, temperature=1.0, top_k=0.0, mixing='normalised')
    if plain and (group.source.teacher, group.alpha) in tested:
      assert len(group.cells) == 5


def test_disjoint_teachers_have_the_half_that_students_have_not():
  groups = of(cells.main_groups(grid(teacher_data=('iso', 'disjoint'))), 'distilled')
  assert {group.cells[0].config.student.slice for group in groups} == {(0.5, 1.0)}
  assert {(g.source.teacher_data, g.cells[0].config.teacher.slice) for g in groups} == {
    ('iso', (0.5, 1.0)),
    ('disjoint', (0.0, 0.5)),
  }


def test_trunk_budgets_are_checkpoints_of_one_run():
  groups = of(cells.main_groups(grid(teacher_tokens=(2048, 4096), budget='trunk')), 'distilled')
  assert {group.cells[0].config.teacher.trunk for group in groups} == {(2048, 4096)}
  assert {group.cells[0].config.teacher.tokens for group in groups} == {2048, 4096}
  assert all('trunk' in group.cells[0].id for group in groups)


@pytest.mark.parametrize(
  ('student', 'tokens', 'teacher', 'teacher_tokens', 'expected'),
  [
    ('tiny-1m', 100, 'tiny-0.1m', 1000, 'weak-to-strong'),
    ('tiny-1m', 100, 'tiny-1m', 100, 'same-level'),
    ('tiny-1m', 100, 'tiny-1m', 50, 'weak-to-strong'),
    ('tiny-1m', 100, 'tiny-1m', 200, 'strong-to-weak'),
    ('tiny-0.3m', 100, 'tiny-1m', 50, 'strong-to-weak'),
  ],
)
def test_relationships(student, tokens, teacher, teacher_tokens, expected):
  assert cells.relationship(student, tokens, cells.Source(teacher, teacher_tokens)) == expected


@pytest.mark.parametrize('study', studies.STUDIES)
@pytest.mark.parametrize('scale', ['laptop', 'colab', 'paper'])
def test_every_study_is_a_valid_grid_at_every_scale(study, scale):
  spec = f'configs/grid.py:study={study},scale={scale}'
  g = cli.load_as(GridConfig, grid_config.problems, spec, {})
  cells.check_grid(g)
  laptop = cli.load_as(GridConfig, grid_config.problems, f'configs/grid.py:study={study}', {})
  if study != 'main':  # twins: the same shape
    shape = lambda g: [
      (len(group.kind), group.alpha, group.source.temperature, group.source.top_k) for group in cells.main_groups(g)
    ]
    assert shape(g) == shape(laptop)


def test_the_papers_grid():
  load = lambda study: cli.load_as(GridConfig, grid_config.problems, f'configs/grid.py:study={study},scale=paper', {})
  budget = load('teacher_budget')
  assert budget.teacher_tokens == tuple(n * 10**9 for n in (5, 10, 30, 50, 80, 100, 300))
  assert len(of(cells.main_groups(budget), 'distilled')) == 4 * 7 * 6
  assert load('horizon').student_tokens == (100 * 10**9, 300 * 10**9)
  assert {g.source.teacher_tokens for g in of(cells.main_groups(load('horizon')), 'distilled')} == {10**11, 3 * 10**11}
  assert load('student_size').student == ('llama3-0.5b', 'llama3-3.8b', 'llama3-8b')
  assert load('top_k').top_k == (0.0, 0.01, 0.05, 0.2, 0.5)
  family = load('second_family')
  assert family.base.student.optimizer.learning_rate == family.base.teacher.optimizer.learning_rate == 5e-4
  assert family.student == ('qwen3-0.3b',)


def test_the_evidence_is_the_main_grid_with_every_control_and_contrast_and_enough_of_each_axis():
  grid = cli.load_as(GridConfig, grid_config.problems, 'configs/evidence.py', {})
  main = cli.load_as(GridConfig, grid_config.problems, 'configs/grid.py', {})
  assert (
    grid.contrasts == main.contrasts and grid.controls.tuned.enabled and grid.controls.unigram and not grid.pilot.skip
  )
  assert len(grid.alpha) > 4 and len(grid.seed) >= 3 and len(grid.validated_seed) >= 5 and len(grid.base.eval.ood) >= 4
  relations = {
    cells.relationship(setting.student, setting.student_tokens, source)
    for setting in cells.settings(grid)
    for source in cells.sources(grid, setting)
  }
  assert relations == {'weak-to-strong', 'strong-to-weak'}


@pytest.mark.parametrize(
  ('overrides', 'message'),
  [
    ({'alpha': '0.2,0.4'}, r'alpha: 0.2, 0.4 lacks 0, the LM-only baseline'),
    ({'pilot.alpha': '0.2,0.4'}, r'pilot.alpha: 0.2, 0.4 lacks 0'),
    ({'alpha': '0'}, r'alpha: nothing but the baseline'),
    ({'alpha': '0,1.5'}, r'alpha: must be in \[0, 1\], got 1.5'),
    ({'teacher': 'tiny-9m'}, r"teacher: unknown model 'tiny-9m'; did you mean"),
    ({'seed': '43,43'}, r'seed: 43, 43 names a value twice'),
    ({'validated_seed': '43'}, r'needs fresh seeds'),
    ({'pilot.seed': '44'}, r'needs fresh seeds'),
    ({'budget': 'half'}, r"budget: unknown value 'half'; known: annealed, trunk"),
    ({'contrasts': 'weak_helps,nonsense'}, r"contrasts: unknown value 'nonsense'"),
    ({'primary': 'nonsense'}, r"primary: unknown contrast 'nonsense'; known: weak_helps"),
    (
      {'primary': 'weak_helps'},
      r"primary: 'weak_helps' names no set .* write weak_helps:in-domain or weak_helps:OOD mean",
    ),
    ({'contrasts': 'weak_helps', 'primary': 'ood_more'}, r'primary: ood_more is not in contrasts'),
    ({'student': 'tiny-0.3m,tiny-1m'}, r'primary: 4 tests for each student setting are 8 in total, but at most 4'),
    ({'declared_alpha': '0.2'}, r'declared_alpha: 1 values for 3 teachers'),
    ({'declared_alpha': '0.2,0.4,0.7'}, r'declared_alpha: 0.7 is not an alpha above 0 of the grid'),
    ({'teacher_seed': 'own'}, r"teacher_seed: unknown value 'own'; known: shared, paired"),
    ({'exclude': 'teacher:tiny-1m'}, r"include/exclude: 'teacher:tiny-1m' is no filter"),
    ({'exclude': 'techer=tiny-1m'}, r'is no filter'),
    ({'temperature': '0'}, r'temperature: must be above 0'),
    ({'pilot.skip': 'true'}, r'controls.tuned: its values are chosen by the pilot'),
    ({'base.student.alpha': '2'}, r'base.student.alpha: must be in \[0, 1\]'),
    ({'base.data.seqlen': '2'}, r'no such field; did you mean base.data.seq_len'),
    ({'student_tokens': '0'}, r'student_tokens: 0 is less than one step of 8 x 128 tokens'),
    ({'student_tokens': '512000,10'}, r'student_tokens: 10 is less than one step'),
    ({'teacher_tokens': '-5'}, r'teacher_tokens: -5 is less than one step'),
    ({'distinct_tokens': '-1'}, r'distinct_tokens: must be at least 0, got -1'),
    ({'top_k': '2.5'}, r'top_k: must be 0 \(all\), a share in \(0, 1\) or a whole number, got 2.5'),
    ({'top_k': '0,-3'}, r'top_k: must be 0 \(all\).* got -3'),
    ({'temperature': '1,-2'}, r'temperature: must be above 0, got -2'),
    ({'mixing': 'normalised,sum'}, r"mixing: unknown value 'sum'; known: normalised, ce_plus_alpha_kd"),
    ({'alpha': '0,-0.1'}, r'alpha: must be in \[0, 1\], got -0.1'),
    ({'pilot.alpha': '0,2'}, r'pilot.alpha: must be in \[0, 1\], got 2'),
    ({'seed': '-1'}, r'seed: must be in \[0, 2\^32\), got -1'),
    ({'validated_seed': '4294967296'}, r'validated_seed: must be in \[0, 2\^32\)'),
    ({'pilot.seed': '-7'}, r'pilot.seed: must be in'),
    ({'base.loss.divergence': 'hard_label', 'temperature': '1,2'}, r'temperature: hard_label has no temperature'),
    ({'base.loss.divergence': 'hard_label', 'top_k': '0,5'}, r'top_k: hard_label has no temperature, top-k or top-p'),
    ({'base.loss.temperature': '0'}, r'base.loss.temperature: must be above 0, got 0'),
    ({'controls.tuned.learning_rate': '1,0'}, r'controls.tuned.learning_rate: factors must be above 0, got 1.0, 0.0'),
    ({'controls.tuned.weight_decay': '-1'}, r'controls.tuned.weight_decay: factors must not be below 0'),
    (
      {'hardware.device': 'H1000'},
      r"hardware.device: unknown device 'H1000'; known: cpu, TPU v4 lite, .*H100, .*hardware.cpu_gflops",
    ),
    ({'hardware.device': 'T4'}, r"hardware.device: unknown device 'T4'; known: cpu"),
    ({'vocab_size': '-1'}, r'vocab_size: must be at least 0'),
    ({'vocab_size': '300'}, r'vocab_size: the tokenizer bpe has 2048 tokens, got 300; leave it at 0'),
  ],
)
def test_mistakes_are_told(overrides, message):
  with pytest.raises(ConfigError, match=message):
    cli.load_as(GridConfig, grid_config.problems, 'configs/grid.py', overrides)


def test_all_mistakes_are_told_at_once():
  with pytest.raises(ConfigError) as e:
    cli.load_as(GridConfig, grid_config.problems, 'configs/grid.py', {'alpha': '0.2', 'teacher': 'x', 'last': '0'})
  assert len(e.value.problems) >= 3


def test_a_mistake_is_reported_once_and_with_the_others():
  overrides = {'top_k': '2.5,-3', 'temperature': '0', 'hardware.device': 'abacus', 'base.loss.z_loss': '-1'}
  with pytest.raises(ConfigError) as e:
    cli.load_as(GridConfig, grid_config.problems, 'configs/grid.py', overrides)
  assert sorted(problem.partition(':')[0] for problem in e.value.problems) == [
    'base.loss.z_loss', 'hardware.device', 'temperature', 'top_k', 'top_k',
  ]  # fmt: skip


def test_a_cell_whose_config_cannot_run_is_refused():
  with pytest.raises(UserError, match=r'cell .*: student.tokens: 512 is less than one step'):
    cells.check_grid(grid(student_tokens=(512,)))


def test_flop_matched_students_get_the_tokens_of_the_tokenizers_own_size(tmp_path):
  """Computed by hand: a byte tokenizer has 257 tokens, padded to 384, not the 2048 of a bpe."""
  matched = {}
  for name in ('bpe', 'bytes', str(tokenizer_file(tmp_path, 300))):
    data = dataclasses.replace(GridConfig().base.data, tokenizer=name)
    g = grid(
      base=dataclasses.replace(GridConfig().base, data=data),
      teacher=('tiny-3m',),
      controls=ControlsConfig(flop_matched=('logits',)),
    )
    (setting,), (source,) = cells.settings(g), cells.sources(g, cells.settings(g)[0])
    (group,) = of(cells.validated_groups(g, {cells.pilot_key(setting, source): 0.4}), 'flop_matched')
    matched[name] = group.cells[0].config.student.tokens
    assert cells.sized(g, 'tiny-3m').vocab_size == cells.vocab_size(g) == {'bpe': 2048, 'bytes': 257}.get(name, 300)
  assert list(matched.values()) == [1_543_420, 1_815_273, 1_815_273]  # 257 and 300 are padded to the same size


def test_a_missing_tokenizer_file_is_reported_unless_its_size_is_given(tmp_path):
  data = dataclasses.replace(GridConfig().base.data, tokenizer=str(tmp_path / 'none.json'))
  g = grid(base=dataclasses.replace(GridConfig().base, data=data))
  with pytest.raises(UserError, match=r'none.json cannot be read .*; to plan before the file exists, set vocab_size'):
    cells.sized(g, 'tiny-3m')
  assert cells.sized(dataclasses.replace(g, vocab_size=49_152), 'tiny-3m').vocab_size == 49_152
  assert cells.sized(g, 'llama3-8b').vocab_size == 128_256  # this model has its own vocabulary


def tokenizer_file(folder, size):
  """Write a `tokenizers` file with `size` tokens: the bytes and made-up words."""
  parsed = json.loads(Tokenizer().to_json())
  parsed['model']['vocab'] |= {f'word{i}': 257 + i for i in range(size - 257)}
  path = folder / 'words.json'
  path.write_text(json.dumps(parsed))
  return path


def test_a_config_of_another_command_is_told():
  with pytest.raises(ConfigError, match='is no config for this command'):
    cli.load_as(GridConfig, grid_config.problems, 'configs/weak2strong.py', {})


def test_a_pilot_with_other_alphas_is_another_pilot():
  g = grid(pilot=PilotConfig(alpha=(0.0, 0.5)))
  assert len(of(cells.pilot_groups(g), 'distilled')) == 3
