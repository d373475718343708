"""The contrasts that a grid can declare: each is a weighted sum of arms on one or several sets, with its question and its answers.

They are declared in the config before any run, and tested with seeds that no choice was based on. The config names up to four primary tests.
Their verdicts, intervals and minimum detectable effects are all at level 1 - 0.05/m (Bonferroni, m tests over all settings). Every other row
is exploratory: an estimate with its plain 95% interval, and no verdict.
"""

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from kdjax.analysis import crossed
from kdjax.analysis.crossed import Effect
from kdjax.analysis.scores import MEASURES, Scores
from kdjax.sweeps import cells as cells_lib
from kdjax.sweeps import comparisons
from kdjax.sweeps import config as grid_config
from kdjax.sweeps.cells import Cell, Group, Setting, Source
from kdjax.sweeps.config import IN_DOMAIN, OOD_LESS_IN_DOMAIN, OOD_MEAN
from kdjax.sweeps.names import format_count

QUESTIONS = {
  'weak_helps': 'Does a weak teacher help?',
  'size_reverses': 'Does more teacher size saturate or reverse the gain?',
  'budget_reverses': 'Does more teacher budget saturate or reverse the gain?',
  'ood_more': 'Does distillation help out of domain more than in domain?',
  'reversal_at_equal_flops': 'Is the largest teacher worse at equal total FLOPs?',
  'more_than_calibration': 'Is the OOD gain of a weak teacher more than calibration?',
  'beats_tuned': 'Does a weak teacher beat a tuned baseline?',
}
EXPLORATORY, NOT_TESTED = 'exploratory', 'not tested'
FITTED = 'bits_per_byte_fitted'
LM_ONLY = 'LM-only, equal student tokens'
Arm = list[Group]  # groups with the same seeds, averaged
Rows = Iterator[dict[str, Any]]
Terms = list[tuple[float, list[list[Cell]]]]  # coefficient, groups' cells: the contrast is their sum
Answers = dict[str, str]  # verdict -> sentence


def test_all(scores: Scores, ready: list[Group]) -> list[dict[str, Any]]:
  """Return the rows of every declared contrast in every setting."""
  rows = []
  for setting in cells_lib.settings(scores.grid):
    arms = _Arms(scores, [group for group in ready if group.setting == setting], setting)
    for name in scores.grid.contrasts:
      rows += list(CONTRASTS[name](arms))
  return rows


class _Arms:
  """The groups of one setting, as contrasts ask for them."""

  def __init__(self, scores: Scores, groups: list[Group], setting: Setting):
    self.scores, self.setting, self._groups = scores, setting, groups
    self.validated = not scores.grid.pilot.skip
    self._phase = 'validated' if self.validated else 'main'

  def teacher(self, source: Source) -> Arm:
    """Return a teacher's students at its validated alpha, or at the declared one if none was validated."""
    alpha = None if self.validated else self._declared_alpha(source.teacher)
    return self._of('distilled', lambda g: g.source == source and alpha in (None, g.alpha))

  def flop_matched(self, source: Source, scenario: str) -> Arm:
    return self._of('flop_matched', lambda g: g.source == source and g.scenario == scenario)

  def equal_compute(self, source: Source) -> Arm:
    return self._of('equal_compute', lambda g: g.source == source)

  @property
  def unigram(self) -> Arm:
    """The unigram control at its own alpha: the validated one, or without a pilot the smallest at which a teacher is tested."""
    chosen = (self.scores.pilot or {'chosen': {}})['chosen'].get(cells_lib.pilot_key(self.setting, 'unigram'))
    alpha = chosen if self.validated else min(map(self._declared_alpha, self.scores.grid.teacher))
    return self._of('unigram', lambda g: g.alpha == alpha)

  @property
  def tuned(self) -> Arm:
    return self._of('tuned', lambda g: True)

  @functools.cached_property
  def sources(self) -> list[Source]:
    """Teachers used plainly whose students have been scored, weakest first."""
    return [s for s in comparisons.plain_sources(self.scores.grid, self.setting) if self.teacher(s)]

  @property
  def weak(self) -> list[Source]:
    kind = lambda s: cells_lib.relationship(self.setting.student, self.setting.student_tokens, s)
    return [s for s in self.sources if kind(s) == 'weak-to-strong']

  @property
  def curves(self) -> comparisons.Curves | None:
    """The pilot's curves; None if it was skipped."""
    return (self.scores.pilot or {'curves': {}})['curves'] if self.validated else None

  def level(self, contrast: str, where: str, detail: str) -> float | None:
    """Return the interval's level for a primary test; None for an exploratory one."""
    grid = self.scores.grid
    if detail or (contrast, where) not in grid_config.primary_tests(grid):
      return None
    return crossed.corrected_level(grid_config.n_primary(grid))

  def _declared_alpha(self, teacher: str) -> float:
    declared = dict(zip(self.scores.grid.teacher, self.scores.grid.declared_alpha, strict=False))
    return declared.get(teacher, self._middle_alpha)

  @property
  def _middle_alpha(self) -> float:
    """It depends on no outcome."""
    alphas = sorted(filter(None, self.scores.grid.alpha))
    return alphas[(len(alphas) - 1) // 2]

  def _of(self, kind: str, wanted: Callable[[Group], bool]) -> Arm:
    return [group for group in self._groups if group.kind == kind and group.phase == self._phase and wanted(group)]


def _test(
  arms: _Arms,
  contrast: str,
  where: str,
  terms: Terms,
  left: str,
  right: str,
  answers: Answers,
  measure: str = 'bits_per_byte',
  detail: str = '',
) -> dict[str, Any]:
  """Return one row: the terms' sum on in-domain, OOD mean, or OOD mean less in-domain. `detail` names an exploratory part of the pooled row."""
  terms = _keep_common_seeds(terms)
  if not terms[0][1][0]:
    return _untested(arms, contrast, where, 'the arms have no seed in common')
  weights = _weights(arms.scores.sets(terms[0][1][0][0]), where)
  if not weights:
    return _untested(arms, contrast, where, 'no such set was scored')
  level = arms.level(contrast, where, detail)
  effect = _effect(arms.scores, terms, weights, measure, level or 0.95)
  mde = crossed.minimum_detectable_effect(effect, level=level or 0.95)
  fields = ('estimate', 'low', 'high', 'error', 'df', 'p', 'n_seeds', 'n_documents', 'over')
  verdict = EXPLORATORY if level is None else crossed.verdict(effect, lower_is_better=True)
  return _row(arms, contrast, where, detail) | {
    'left': left,
    'right': right,
    **{name: getattr(effect, name) for name in fields},
    'level': level or 0.95,
    'primary': level is not None,
    'p_adjusted': np.nan if level is None else min(1.0, effect.p * crossed.ALPHA / (1 - level)),
    'mde': mde,
    **dict(zip(('mde_low', 'mde_high'), crossed.mde_range(effect, mde), strict=True)),
    'unit': 'bits per byte' + (' at fitted T' if measure == FITTED else ''),
    'cells': ' '.join(dict.fromkeys(cell.id for _, groups in terms for cells in groups for cell in cells)),
    'verdict': verdict,
    'answer': _answer(verdict, answers, effect),
  }


def _keep_common_seeds(terms: Terms) -> Terms:
  """Keep the cells whose seed all terms have, because a contrast is paired by seed."""
  shared = set.intersection(*({cell.seed for cell in cells} for _, groups in terms for cells in groups))
  return [(c, [[cell for cell in cells if cell.seed in shared] for cells in groups]) for c, groups in terms]


def _effect(scores: Scores, terms: Terms, weights: dict[str, float], measure: str, level: float) -> Effect:
  """Estimate the contrast over seeds and documents; with one seed, over documents and each run's last checkpoints."""
  value, parts = MEASURES[measure], []
  for name in weights:
    first = scores.difference(terms[0][1], terms[0][1], name, value)
    total = np.sum([coefficient * scores.mean(cells, name, value) for coefficient, cells in terms], axis=0)
    parts.append(first._replace(numerator_SxD=total))
  effect = crossed.crossed_effect(parts, list(weights.values()), level)
  if effect.n_seeds > 1:
    return effect
  coefficients: Counter[str] = Counter()
  for coefficient, groups in terms:
    for cells in groups:
      coefficients[cells[0].id] += coefficient / len(groups)  # type: ignore[assignment]
  noise = scores.checkpoint_spreads(coefficients, weights, value)
  return crossed.with_checkpoint_noise(effect, *noise, level=level) if noise else effect


def _weights(kinds: dict[str, str], where: str) -> dict[str, float]:
  """Return set -> its weight in the value that `where` names."""
  ood, home = ([s for s, kind in kinds.items() if kind == wanted] for wanted in ('OOD', 'in-domain'))
  weights = {s: 1 / len(ood) for s in ood} if 'OOD' in where else {}
  if 'OOD' in where and not ood:
    return {}
  return weights | (dict.fromkeys(home, -1.0 if weights else 1.0) if IN_DOMAIN in where else {})


def _answer(verdict: str, answers: Answers, effect: Effect) -> str:
  if verdict == EXPLORATORY:
    return 'exploratory: no verdict, because it is not corrected for the number of rows'
  if verdict == crossed.TOO_FEW:
    return f'{verdict} ({effect.n_seeds}); a verdict needs {crossed.MIN_SEEDS} or more'
  return answers[verdict]


def _row(arms: _Arms, contrast: str, where: str, detail: str = '') -> dict[str, Any]:
  setting = arms.setting
  return {
    'contrast': contrast,
    'question': QUESTIONS[contrast],
    'detail': detail,
    'student': setting.student,
    'student_tokens': setting.student_tokens,
    'distinct_tokens': setting.distinct_tokens,
    'validated': arms.validated,
    'set': where,
  }


def _untested(arms: _Arms, contrast: str, where: str, why: str) -> dict[str, Any]:
  numbers = ('estimate', 'low', 'high', 'error', 'df', 'p', 'level', 'p_adjusted', 'mde', 'mde_low', 'mde_high')
  return _row(arms, contrast, where) | dict.fromkeys(numbers, np.nan) | {
    'left': '', 'right': '', 'n_seeds': 0, 'n_documents': 0, 'over': '', 'unit': '', 'cells': '',
    'primary': arms.level(contrast, where, '') is not None, 'verdict': NOT_TESTED, 'answer': f'not tested: {why}',
  }  # fmt: skip


def _cells(arm: Arm) -> list[list[Cell]]:
  return [list(group.cells) for group in arm]


def _less_baseline(arm: Arm) -> Terms:
  return [(1.0, _cells(arm)), (-1.0, [list(group.baseline) for group in arm])]


def _many(arms: _Arms, sources: Sequence[Source]) -> Arm:
  return [group for source in sources for group in arms.teacher(source)]


def _each_and_pooled(sources: list[Source]) -> Iterator[tuple[list[Source], str]]:
  """Yield (teachers, label): all teachers together with no label, then each teacher alone."""
  yield sources, ''
  if len(sources) > 1:
    yield from (([source], source.name) for source in sources)


def _runs(arms: _Arms) -> str:
  """Return the qualifier of statements on teachers: a teacher is one training run, unless each student seed has its own."""
  return '' if arms.scores.grid.teacher_seed == 'paired' else ' (of these teacher runs)'


def _weak_helps(arms: _Arms) -> Rows:
  for where in grid_config.CONTRASTS['weak_helps']:
    if not arms.weak:
      yield _untested(arms, 'weak_helps', where, 'no weak-to-strong teacher has been run')
      continue
    answers = {
      'better': f'yes: {where} the students of weak teachers are better than the LM-only student{_runs(arms)}',
      'worse': f'no: {where} they are worse than the LM-only student{_runs(arms)}',
      'unresolved': f'{where} no difference was resolved',
    }
    for sources, detail in _each_and_pooled(arms.weak):
      terms = _less_baseline(_many(arms, sources))
      yield _test(arms, 'weak_helps', where, terms, _names(sources), LM_ONLY, answers, detail=detail)


def _size_reverses(arms: _Arms) -> Rows:
  sources = comparisons.by_size(arms.sources)
  if len(sources) < 2:
    yield from (
      _untested(arms, 'size_reverses', where, 'fewer than two teacher sizes have been run')
      for where in (IN_DOMAIN, OOD_MEAN)
    )
    return
  pair = comparisons.size_pair(arms.setting, sources, arms.curves)
  yield from _reverses(arms, 'size_reverses', [pair], 'teacher size')


def _budget_reverses(arms: _Arms) -> Rows:
  families = [family for family in comparisons.by_budget(arms.sources) if len(family) > 1]
  if not families:
    yield from (
      _untested(arms, 'budget_reverses', where, 'no teacher has been run at two budgets')
      for where in (IN_DOMAIN, OOD_MEAN)
    )
    return
  pairs = [comparisons.budget_pair(arms.setting, family, arms.curves) for family in families]
  yield from _reverses(arms, 'budget_reverses', pairs, 'teacher budget')


def _reverses(arms: _Arms, contrast: str, pairs: list[tuple[Source, Source] | None], what: str) -> Rows:
  """Compare the most of `what` with a reference that has less, each at its own alpha; all pairs together, then each alone."""
  chosen = 'best of less in the pilot' if arms.validated else 'declared reference'
  known = [pair for pair in pairs if pair]
  for where in (IN_DOMAIN, OOD_MEAN):
    if len(known) < len(pairs):
      yield _untested(arms, contrast, where, 'the reference is chosen by the pilot, which is not finished')
      continue
    answers = {
      'better': f'neither: {where} the most {what} is still better than less{_runs(arms)}',
      'worse': f'it reverses: {where} the most {what} is worse than less{_runs(arms)}',
      'unresolved': f'{where} no difference between the most {what} and less was resolved: neither saturation nor reversal is shown',
    }
    for some, detail in [(known, ''), *(([pair], pair[0].teacher) for pair in known if len(known) > 1)]:
      most, less = ([pair[i] for pair in some] for i in (0, 1))
      terms = [(1.0, _cells(_many(arms, most))), (-1.0, _cells(_many(arms, less)))]
      yield _test(arms, contrast, where, terms, _names(most), f'{_names(less)} ({chosen})', answers, detail=detail)


def _ood_more(arms: _Arms) -> Rows:
  arm = _many(arms, arms.sources)
  if not arm:
    yield _untested(arms, 'ood_more', OOD_LESS_IN_DOMAIN, 'no teacher has been run')
    return
  answers = {
    'better': 'yes: the change against the LM-only student is the better one out of domain',
    'worse': 'no: the change against the LM-only student is the better one in domain',
    'unresolved': 'no difference between the two changes was resolved',
  }
  left = f'change of all {len(arms.sources)} teachers’ students, OOD'
  yield _test(arms, 'ood_more', OOD_LESS_IN_DOMAIN, _less_baseline(arm), left, 'their change in-domain', answers)


def _reversal_at_equal_flops(arms: _Arms) -> Rows:
  contrast = 'reversal_at_equal_flops'
  scenario = ('', *arms.scores.grid.controls.flop_matched)[-1]
  pair = comparisons.size_pair(arms.setting, arms.sources, arms.curves) if arms.validated else None
  for where in grid_config.CONTRASTS[contrast]:
    if not pair or not arms.equal_compute(pair[1]) or not arms.flop_matched(pair[0], scenario):
      yield _untested(arms, contrast, where, 'it needs two teacher sizes, the pilot, and the students at equal FLOPs')
      continue
    most, less = pair
    large, small, alone = arms.teacher(most), arms.equal_compute(less), arms.flop_matched(most, scenario)
    tokens = format_count(small[0].cells[0].config.student.tokens)
    names = most.name, f'{less.name}, its student on {tokens} tokens', 'LM-only'
    answers = {
      'better': f'no: {where} the pair with the largest teacher is better than the pair with {less.name}{_runs(arms)}',
      'worse': f'yes: {where} the pair with the largest teacher is worse than the pair with {less.name}{_runs(arms)}',
      'unresolved': f'{where} no difference between the two pairs was resolved',
    }
    for left, right, name, other, detail in (
      (large, small, *names[:2], ''),
      (large, alone, names[0], names[2], f'{most.name} less LM-only'),
      (small, alone, names[1], names[2], f'{less.name} less LM-only'),
    ):
      terms = [(1.0, _cells(left)), (-1.0, _cells(right))]
      yield _test(
        arms, contrast, where, terms, f'{name} ({scenario})', f'{other}, equal total FLOPs', answers, detail=detail
      )


def _more_than_calibration(arms: _Arms) -> Rows:
  """A yes requires a gain over the LM-only student that exceeds the gain of the unigram control at its own alpha."""
  control = arms.unigram
  if not arms.weak or not control:
    why = 'a weak teacher or the unigram control at its own alpha is missing'
    yield _untested(arms, 'more_than_calibration', OOD_MEAN, why)
    return
  answers = {
    'better': f'yes: at fitted temperature weak teachers gain out of domain, and more than token frequencies do at their own alpha{_runs(arms)}',
    'worse': f'no: at fitted temperature {OOD_MEAN} weak teachers are worse than the LM-only student or the unigram control{_runs(arms)}',
    'unresolved': 'not shown: at fitted temperature no gain was resolved that is above 0 and above that of token frequencies',
  }
  right = f'unigram at alpha {control[0].alpha:g}'
  for sources, detail in _each_and_pooled(arms.weak):
    arm = _many(arms, sources)
    against = {right: [(1.0, _cells(arm)), (-1.0, _cells(control))], LM_ONLY: _less_baseline(arm)}
    rows = [
      _test(arms, 'more_than_calibration', OOD_MEAN, terms, _names(sources), f'{name} (the less favourable of two comparisons)', answers, FITTED, detail)
      for name, terms in against.items()
    ]  # fmt: skip
    yield max(rows, key=lambda row: row['high'])


def _beats_tuned(arms: _Arms) -> Rows:
  arm = _many(arms, arms.weak)
  for where in grid_config.CONTRASTS['beats_tuned']:
    if not arm or not arms.tuned:
      yield _untested(arms, 'beats_tuned', where, 'a weak teacher or the tuned baseline is missing')
      continue
    answers = {
      'better': f'yes: {where} better than an LM-only student tuned with as many draws{_runs(arms)}',
      'worse': f'no: {where} a tuned LM-only student is better{_runs(arms)}',
      'unresolved': f'{where} no difference to a tuned LM-only student was resolved',
    }
    terms = [(1.0, _cells(arm)), (-1.0, _cells(arms.tuned))]
    yield _test(arms, 'beats_tuned', where, terms, _names(arms.weak), f'LM-only, tuned ({arms.tuned[0].draw})', answers)


CONTRASTS: dict[str, Callable[[_Arms], Rows]] = {
  'weak_helps': _weak_helps,
  'size_reverses': _size_reverses,
  'budget_reverses': _budget_reverses,
  'ood_more': _ood_more,
  'reversal_at_equal_flops': _reversal_at_equal_flops,
  'more_than_calibration': _more_than_calibration,
  'beats_tuned': _beats_tuned,
}


def _names(sources: Sequence[Source]) -> str:
  return ', '.join(source.name for source in sources)
