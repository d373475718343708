"""The contrasts that a grid can declare: each a weighted sum of arms on one or several sets, with its question and its answers.

They are declared in the config before any run, tested with the seeds that chose nothing, and corrected together (Holm).
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from kdjax import flops
from kdjax.analysis import crossed
from kdjax.analysis.scores import MEASURES, OOD_MEAN, Scores
from kdjax.grids import cells as cells_lib
from kdjax.grids import runner
from kdjax.grids.cells import Cell, Group, Setting, Source

QUESTIONS = {
  'weak_helps': 'Does a weak teacher help?',
  'size_reverses': 'Does more teacher size saturate or reverse the gain?',
  'budget_reverses': 'Does more teacher budget saturate or reverse the gain?',
  'ood_more': 'Does distillation help out of domain more than in domain?',
  'reversal_at_equal_flops': 'Does the reversal stand at equal total FLOPs?',
  'more_than_calibration': 'Is the OOD gain of a weak teacher more than calibration?',
  'beats_tuned': 'Does a weak teacher beat a tuned baseline?',
}
Arm = list[Group]  # groups with the same seeds, averaged


def test_all(scores: Scores, ready: list[Group]) -> list[dict[str, Any]]:
  """The declared contrasts of every setting; Holm's correction is over all of them."""
  rows = []
  for setting in cells_lib.settings(scores.grid):
    arms = _Arms(scores, [group for group in ready if group.setting == setting], setting)
    for name in scores.grid.contrasts:
      rows += [row for row in CONTRASTS[name](arms) if row]
  adjusted = crossed.holm([row['p'] for row in rows])
  for row, p in zip(rows, adjusted, strict=True):
    effect = row.pop('effect')
    row['p_holm'] = p
    row['verdict'] = crossed.verdict(effect, row.pop('lower_is_better'), p) if effect else 'not tested'
    row['answer'] = row['answers'][row['verdict']] if effect else row['answer']
    del row['answers']
  return rows


class _Arms:
  """The groups of one setting, as contrasts ask for them."""

  def __init__(self, scores: Scores, groups: list[Group], setting: Setting):
    self.scores, self.setting, self._groups = scores, setting, groups
    self.validated = not scores.grid.pilot.skip
    self._phase = 'validated' if self.validated else 'main'

  def teacher(self, source: Source) -> Arm:
    """A teacher's students: at its validated alpha, or averaged over the declared alphas where none was validated."""
    return self._of('distilled', lambda group: group.source == source)

  def flop_matched(self, source: Source, scenario: str) -> Arm:
    return self._of('flop_matched', lambda group: group.source == source and group.scenario == scenario)

  def unigram(self, alpha: float) -> Arm:
    return self._of('unigram', lambda group: group.alpha == alpha)

  @property
  def tuned(self) -> Arm:
    return self._of('tuned', lambda group: True)

  @functools.cached_property
  def sources(self) -> list[Source]:
    """Teachers used plainly (T = 1, all logits, normalised), weakest first: by size, then by budget."""
    plain = [
      s
      for s in cells_lib.sources(self.scores.grid, self.setting)
      if s == dataclasses.replace(s, temperature=1.0, top_k=0.0, mixing='normalised', teacher_data='iso')
      and self.teacher(s)
    ]
    return sorted(plain, key=lambda s: (self.size(s), s.teacher_tokens))

  @property
  def weak(self) -> list[Source]:
    kind = lambda s: cells_lib.relationship(self.setting.student, self.setting.student_tokens, s)
    return [s for s in self.sources if kind(s) == 'weak-to-strong']

  def size(self, source: Source) -> int:
    return flops.count_params(cells_lib.sized(self.scores.grid, source.teacher)).non_embedding

  def baselines(self, arm: Arm) -> list[list[Cell]]:
    return [list(group.baseline) for group in arm]

  def best(self, sources: Sequence[Source]) -> Source | None:
    """The teacher whose student did best on the validation split in the pilot: chosen before, and apart from, what is tested."""
    pilot = runner.read_pilot(self.scores.folder)
    curve = lambda s: (pilot or {'curves': {}})['curves'].get(f'{self.setting.name}/{s.name}', {})
    known = {s: min(v for a, v in curve(s).items() if float(a) > 0) for s in sources if len(curve(s)) > 1}
    return min(known, key=lambda s: known[s]) if known else None

  def _of(self, kind: str, wanted: Callable[[Group], bool]) -> Arm:
    return [group for group in self._groups if group.kind == kind and group.phase == self._phase and wanted(group)]


Rows = Iterator[dict[str, Any]]
Terms = list[tuple[float, list[list[Cell]]]]  # coefficient, groups' cells: the contrast is their sum


def _test(
  arms: _Arms,
  contrast: str,
  where: str,
  terms: Terms,
  left: str,
  right: str,
  answers: dict[str, str],
  measure: str = 'bits_per_byte',
) -> dict[str, Any]:
  """A row: the terms' sum on in-domain, OOD mean, or OOD mean less in-domain, with its interval and answer."""
  scores, kinds = arms.scores, arms.scores.sets(terms[0][1][0][0])
  ood, home = ([s for s, kind in kinds.items() if kind == wanted] for wanted in ('OOD', 'in-domain'))
  weights = {s: 1 / len(ood) for s in ood} if 'OOD' in where else {}
  weights |= dict.fromkeys(home, -1.0 if weights else 1.0) if 'in-domain' in where else {}
  if not weights:
    return _untested(arms, contrast, where, 'no such set was scored')
  value = MEASURES[measure]
  parts = []
  for name in weights:
    first = scores.difference(terms[0][1], terms[0][1], name, value)
    total = np.sum([coefficient * scores.mean(cells, name, value) for coefficient, cells in terms], axis=0)
    parts.append(first._replace(numerator_SxD=total))
  effect = crossed.crossed_effect(parts, list(weights.values()))
  fields = ('estimate', 'low', 'high', 'error', 'df', 'p', 'n_seeds', 'n_documents', 'over')
  return _row(arms, contrast, where) | {
    'left': left,
    'right': right,
    **{name: getattr(effect, name) for name in fields},
    'mde': crossed.minimum_detectable_effect(effect),
    'unit': 'bits per byte' + (' at fitted T' if measure.endswith('fitted') else ''),
    'cells': ' '.join(dict.fromkeys(cell.id for _, groups in terms for cells in groups for cell in cells)),
    'effect': effect,
    'lower_is_better': True,
    'answers': answers,
  }


def _row(arms: _Arms, contrast: str, where: str) -> dict[str, Any]:
  setting = arms.setting
  return {
    'contrast': contrast,
    'question': QUESTIONS[contrast],
    'student': setting.student,
    'student_tokens': setting.student_tokens,
    'distinct_tokens': setting.distinct_tokens,
    'validated': arms.validated,
    'set': where,
  }


def _untested(arms: _Arms, contrast: str, where: str, why: str) -> dict[str, Any]:
  empty = dict.fromkeys(('estimate', 'low', 'high', 'error', 'df', 'p', 'mde'), np.nan)
  return _row(arms, contrast, where) | empty | {
    'left': '', 'right': '', 'n_seeds': 0, 'n_documents': 0, 'over': '', 'unit': '', 'cells': '', 'effect': None,
    'lower_is_better': True, 'answers': {}, 'answer': f'not tested: {why}',
  }  # fmt: skip


def _cells(arm: Arm) -> list[list[Cell]]:
  return [list(group.cells) for group in arm]


def _many(arms: _Arms, sources: list[Source]) -> Arm:
  return [group for source in sources for group in arms.teacher(source)]


def _weak_helps(arms: _Arms) -> Rows:
  arm = _many(arms, arms.weak)
  for where in ('in-domain', OOD_MEAN):
    if not arm:
      yield _untested(arms, 'weak_helps', where, 'no weak-to-strong teacher has been run')
      continue
    terms = [(1.0, _cells(arm)), (-1.0, arms.baselines(arm))]
    answers = {
      'better': f'yes: {where} the students of weak teachers are better than the LM-only student',
      'worse': f'no: {where} they are worse than the LM-only student',
      'unresolved': f'{where} no difference was resolved',
    }
    yield _test(arms, 'weak_helps', where, terms, _names(arms.weak), 'LM-only, equal student tokens', answers)


def _reverses(arms: _Arms, contrast: str, sources: list[Source], what: str) -> Rows:
  """The most of `what` against the best of less, each at its own alpha."""
  if len(sources) < 2:
    return
  most, best = sources[-1], arms.best(sources[:-1])
  for where in ('in-domain', OOD_MEAN):
    if best is None:
      yield _untested(
        arms, contrast, where, 'the best of the weaker teachers is chosen by the pilot, which was skipped'
      )
      continue
    terms = [(1.0, _cells(arms.teacher(most))), (-1.0, _cells(arms.teacher(best)))]
    answers = {
      'better': f'neither: {where} the most {what} is still better than the best of less',
      'worse': f'it reverses: {where} the most {what} is worse than the best of less',
      'unresolved': f'{where} no difference was resolved between the most {what} and the best of less: consistent with saturation',
    }
    yield _test(arms, contrast, where, terms, most.name, f'{best.name} (best of less in the pilot)', answers)


def _size_reverses(arms: _Arms) -> Rows:
  most = max((s.teacher_tokens for s in arms.sources), default=0)
  sources = [s for s in arms.sources if s.teacher_tokens == most]
  yield from _reverses(arms, 'size_reverses', sources, 'teacher size')


def _budget_reverses(arms: _Arms) -> Rows:
  for teacher in dict.fromkeys(s.teacher for s in arms.sources):
    sources = sorted((s for s in arms.sources if s.teacher == teacher), key=lambda s: s.teacher_tokens)
    yield from _reverses(arms, 'budget_reverses', sources, 'teacher budget')


def _ood_more(arms: _Arms) -> Rows:
  arm = _many(arms, arms.sources)
  where = f'{OOD_MEAN} less in-domain'
  if not arm:
    yield _untested(arms, 'ood_more', where, 'no teacher has been run')
    return
  terms = [(1.0, _cells(arm)), (-1.0, arms.baselines(arm))]
  answers = {
    'better': 'yes: the change against the LM-only student is the better one out of domain',
    'worse': 'no: the change against the LM-only student is the better one in domain',
    'unresolved': 'no difference between the two changes was resolved',
  }
  yield _test(
    arms, 'ood_more', where, terms, f'gain over all {len(arms.sources)} teachers, OOD', 'their gain in-domain', answers
  )


def _reversal_at_equal_flops(arms: _Arms) -> Rows:
  most_tokens = max((s.teacher_tokens for s in arms.sources), default=0)
  sources = [s for s in arms.sources if s.teacher_tokens == most_tokens]
  if len(sources) < 2:
    return
  most, best = sources[-1], arms.best(sources[:-1])
  scenario = arms.scores.grid.controls.flop_matched[-1:] or ('',)
  for where in ('in-domain', OOD_MEAN):
    matched = [arms.flop_matched(s, scenario[0]) for s in (most, best)] if best else []
    if not best or not all(matched):
      yield _untested(arms, 'reversal_at_equal_flops', where, 'the FLOP-matched baselines or the pilot are missing')
      continue
    terms = [
      (1.0, _cells(arms.teacher(most))),
      (-1.0, _cells(matched[0])),
      (-1.0, _cells(arms.teacher(best))),
      (1.0, _cells(matched[1])),
    ]
    answers = {
      'better': f'no: {where} the strongest teacher gains more over its FLOP-matched baseline than the best weaker one over its own',
      'worse': f'yes: {where} the strongest teacher gains less over its FLOP-matched baseline than the best weaker one over its own',
      'unresolved': f'{where} no difference between the two gains was resolved',
    }
    left = f'{most.name} less LM-only at equal FLOPs ({scenario[0]})'
    yield _test(arms, 'reversal_at_equal_flops', where, terms, left, f'{best.name}, likewise', answers)


def _more_than_calibration(arms: _Arms) -> Rows:
  arm = [group for group in _many(arms, arms.weak) if arms.unigram(group.alpha)]
  if not arm:
    yield _untested(arms, 'more_than_calibration', OOD_MEAN, 'a weak teacher or the unigram control is missing')
    return
  control = [cells for group in arm for cells in _cells(arms.unigram(group.alpha))]
  answers = {
    'better': 'yes: at fitted temperature weak teachers gain more out of domain than token frequencies at the same alpha',
    'worse': 'no: at fitted temperature token frequencies at the same alpha gain more out of domain',
    'unresolved': 'not shown: at fitted temperature weak teachers gain no more than token frequencies at the same alpha, as far as was resolved',
  }
  terms = [(1.0, _cells(arm)), (-1.0, control)]
  yield _test(
    arms,
    'more_than_calibration',
    OOD_MEAN,
    terms,
    _names(arms.weak),
    'unigram at the same alpha',
    answers,
    'bits_per_byte_fitted',
  )


def _beats_tuned(arms: _Arms) -> Rows:
  arm = _many(arms, arms.weak)
  for where in ('in-domain', OOD_MEAN):
    if not arm or not arms.tuned:
      yield _untested(arms, 'beats_tuned', where, 'a weak teacher or the tuned baseline is missing')
      continue
    answers = {
      'better': f'yes: {where} better than an LM-only student with as many draws to tune',
      'worse': f'no: {where} a tuned LM-only student is better',
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


def _names(sources: list[Source]) -> str:
  return ', '.join(source.name for source in sources)
