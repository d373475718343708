"""What each figure of a grid's report draws: rows of the table of effects, and where each stands.

A selection takes one student setting of a `labelled` table and returns the rows that its figure draws, under their index in the table, with

    at, at_low, at_high           the place on the axis that is not the gain's: FLOPs, tokens, alpha, a label, a change of entropy
    drawn, drawn_low, drawn_high  the number on the gain's axis, and its interval

A gain is always a difference to the LM-only student, below 0 being better for likelihoods; where a figure shows each teacher at one alpha, it
is the validated one, or (told in the label) the middle declared one: never the best of those drawn.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd

from kdjax.scoring.job import IN_DOMAIN
from kdjax.scoring.text import DIFFICULTIES
from kdjax.sweeps.config import OOD_MEAN
from kdjax.sweeps.names import format_exact, format_exact_count

SETS = (IN_DOMAIN, OOD_MEAN)
SETTING = ['student', 'student_tokens', 'distinct_tokens']
COLUMNS = [
  *SETTING, 'teacher', 'teacher_tokens', 'budget', 'teacher_data', 'temperature', 'top_k', 'mixing', 'alpha', 'arm', 'scenario', 'validated',
  'seeds', 'cells', 'set', 'group', 'measure', 'estimate', 'low', 'high', 'error', 'df', 'n_seeds', 'n_documents', 'over', 'p',
  'baseline', 'value', 'student_params', 'teacher_params', 'student_flops', 'logits_flops', 'pretraining_flops',
]  # fmt: skip
WORDS = [
  'student', 'teacher', 'budget', 'teacher_data', 'mixing', 'arm', 'scenario', 'seeds', 'cells', 'set', 'group', 'measure', 'over',
]  # fmt: skip
# Okabe & Ito's and Tol's colours, told apart by the colour-blind; vermilion is the unigram control's, grey the LM-only student's.
TEACHERS = ('#56b4e9', '#0072b2', '#009e73', '#e69f00', '#cc79a7', '#332288', '#999933', '#882255')
MARKERS = ('o', 's', '^', 'D', 'v', 'P', 'X', 'p')
COLOURS = {'unigram': '#d55e00', 'tuned': '#4c4c4c', 'flop_matched': '#8c8c8c'}
FITTED = {'bits_per_byte': 'bits_per_byte_fitted', 'accuracy': 'accuracy_norm'}  # what is drawn hollow beside
COUNTED = {'logits': 'the teacher’s forward passes', 'logits+pretraining': 'its forward passes and its training'}
DIFFICULTY = {f'difficulty_{i + 1}': i + 1 for i in range(DIFFICULTIES)}
_FIFTHS = ('commonest fifth', 'second fifth', 'third fifth', 'fourth fifth', 'rarest fifth')
UNITS = {
  'bits_per_byte': 'bits per byte',
  'bits_per_byte_fitted': 'bits per byte at fitted T',
  'entropy': 'entropy, nats per token',
  'top1': 'top-1 accuracy',
  'ece': 'ECE',
  'accuracy': 'accuracy, share of items',
  'accuracy_norm': 'accuracy (per byte), share of items',
  **{name: f'nats per token, {fifth}' for name, fifth in zip(DIFFICULTY, _FIFTHS, strict=True)},
}
SENSE = {
  'entropy': '',
  'top1': ' (above 0: better)',
  'accuracy': ' (above 0: better)',
  'accuracy_norm': ' (above 0: better)',
}
KEYS = ['setting', 'arm', 'source', 'alpha', 'validated', 'scenario', 'cells', 'set']  # one measure's row of an arm


def labelled(effects: pd.DataFrame) -> pd.DataFrame:
  """The table with what figures call things by.

  `setting` (student, tokens), `variant` (how a teacher's targets are used, '' being plainly), `source` (teacher, tokens, variant),
  `strength` (the FLOPs of the teacher's own training), `colour` and `marker` (the teacher's, by size).
  """
  table = effects.reindex(columns=list(dict.fromkeys([*COLUMNS, *effects.columns])))
  table[WORDS] = table[WORDS].astype(object).where(table[WORDS].notna(), '')
  table['validated'] = table['validated'].eq(True)
  table['setting'] = [setting_name(*row) for row in table[SETTING].itertuples(index=False)]
  table['variant'] = [
    _variant(row) for row in each(table[['budget', 'teacher_data', 'temperature', 'top_k', 'mixing']])
  ]
  parts = zip(table['teacher'], table['teacher_tokens'], table['variant'], strict=True)
  table['source'] = [
    f'{teacher} {format_exact_count(tokens)} {variant}'.strip() if teacher else '' for teacher, tokens, variant in parts
  ]
  table['strength'] = table.groupby('source')['pretraining_flops'].transform('max') if len(table) else np.nan
  sizes = table[table['teacher'] != ''].groupby('teacher')['teacher_params'].min().sort_values(kind='stable')
  rank = {teacher: i for i, teacher in enumerate(sizes.index)}
  table['colour'] = [
    pick(TEACHERS, rank.get(teacher)) or COLOURS.get(arm, '')
    for teacher, arm in zip(table['teacher'], table['arm'], strict=True)
  ]
  table['marker'] = [pick(MARKERS, rank.get(teacher)) or '>' for teacher in table['teacher']]
  return table


def chosen(rows: pd.DataFrame) -> pd.DataFrame:
  """Each teacher at one alpha, against the plain baseline: the validated alpha, else the middle declared one, which no outcome has chosen."""
  plain = _plain(rows)
  kept = [_one_alpha(group) for _, group in plain.groupby('source')]
  return _ordered(pd.concat(kept)) if kept else plain


def label(source: str, alpha: float, validated: bool) -> str:
  return f'{source}, α {format_exact(alpha)}{"" if validated else "*"}'


def labels_of(rows: pd.DataFrame) -> list[str]:
  return [label(*each) for each in zip(rows['source'], rows['alpha'], rows['validated'], strict=True)]


def ordered_sets(rows: pd.DataFrame) -> list[str]:
  """In-domain, the OOD sets, their mean, the tasks."""
  order = {'in-domain': 0, 'OOD': 1, 'OOD mean': 2, 'downstream': 3}
  known = rows[['set', 'group']].drop_duplicates()
  return [name for _, name in sorted((order.get(group, 4), name) for name, group in known.itertuples(index=False))]


def of_setting(contrasts: pd.DataFrame, setting: str) -> pd.DataFrame:
  if contrasts.empty:
    return contrasts
  return contrasts[[setting_name(*row) == setting for row in contrasts[SETTING].itertuples(index=False)]]


def setting_name(student: str, tokens: float, distinct: float) -> str:
  return f'{student}, {format_exact_count(tokens)} tokens' + (
    f' of {format_exact_count(distinct)} distinct' if distinct and distinct == distinct else ''
  )


def strength(rows: pd.DataFrame) -> pd.DataFrame:
  return _placed(_two_sets(_plain(rows)), 'strength').sort_values(
    ['validated', 'alpha', 'variant', 'at'], kind='stable'
  )


def heat(rows: pd.DataFrame) -> pd.DataFrame:
  return _placed(_two_sets(chosen(rows)), 'teacher_tokens')


def alphas(rows: pd.DataFrame) -> pd.DataFrame:
  distilled = _plain(rows)
  unigram = rows[(rows['arm'] == 'unigram') & ~rows['validated']] if len(distilled) else rows[:0]
  return _placed(_two_sets(pd.concat([_ordered(distilled), unigram])), 'alpha')


def sets(rows: pd.DataFrame) -> pd.DataFrame:
  """Place each teacher's rows and the unigram control under the teacher's label, and the tuned baseline under its own."""
  measures = rows[rows['measure'].isin([*FITTED, *FITTED.values()])]
  own = chosen(measures)
  own = own.assign(at=labels_of(own))
  parts = [own]
  unigram = measures[measures['arm'] == 'unigram']
  for row in each(own.drop_duplicates('at')):
    parts.append(_control(unigram, row.alpha, row.validated).assign(at=row.at))
  if len(own):
    parts.append(measures[measures['arm'] == 'tuned'].assign(at='LM-only, tuned'))
  out = pd.concat(parts)
  order = {name: i for i, name in enumerate(ordered_sets(out))}
  return _placed(out).sort_values('set', key=lambda names: names.map(order), kind='stable')


def entropy(rows: pd.DataFrame) -> pd.DataFrame:
  arms = rows[(rows['scenario'] == '') | (rows['arm'] == 'flop_matched')]
  bits = _placed(_two_sets(arms))
  entropy = arms[arms['measure'] == 'entropy'].set_index(KEYS)[['estimate', 'low', 'high']]
  places = entropy.rename(columns={'estimate': 'at', 'low': 'at_low', 'high': 'at_high'})
  return bits.drop(columns=list(places)).join(places, on=KEYS, how='inner', validate='one_to_one')


def per_flop(rows: pd.DataFrame) -> pd.DataFrame:
  """Each teacher twice: with its forward passes counted, and with its own training too. `per_flop`: the gain over those FLOPs."""
  own = _two_sets(chosen(rows))
  if own.empty:
    return _placed(own).assign(
      counted='', teacher_flops=np.nan, per_flop=np.nan, per_flop_low=np.nan, per_flop_high=np.nan
    )
  matched = _two_sets(rows[rows['arm'] == 'flop_matched']).sort_values('student_flops')
  parts = []
  for counted in COUNTED:
    teacher = own['logits_flops'] + (own['pretraining_flops'] if 'pretraining' in counted else 0.0)
    parts.append(own.assign(counted=counted, teacher_flops=teacher, at=own['student_flops'] + teacher))
    parts.append(matched.assign(counted=counted, teacher_flops=np.nan, at=matched['student_flops']))
  out = _placed(pd.concat(parts))
  return out.assign(**{f'per_flop{end}': out[f'drawn{end}'] / out['teacher_flops'] for end in ('', '_low', '_high')})


def frontier(points: pd.DataFrame) -> pd.DataFrame:
  """The points (at, drawn) that no cheaper, or equally cheap, point is below."""
  ordered = points.sort_values(['at', 'drawn'], kind='stable')
  best = ordered['drawn'].cummin().shift(fill_value=np.inf)
  return ordered[ordered['drawn'] < best]


def equal_flops(rows: pd.DataFrame) -> pd.DataFrame:
  """Nothing where no student was compared at equal FLOPs: the equal-token half alone is figure (d)."""
  matched = rows[(rows['arm'] == 'distilled') & (rows['scenario'] != '')]
  both = pd.concat([chosen(rows), _ordered(matched)] if len(matched) else [rows[:0]])
  return _placed(_two_sets(both.assign(at=labels_of(both))))


def difficulty(rows: pd.DataFrame) -> pd.DataFrame:
  """Return each teacher's rows over the bins of difficulty, and the unigram control's."""
  measured = rows[rows['measure'].isin(DIFFICULTY) & rows['set'].isin(SETS)]
  own = chosen(measured)
  uses = set(zip(own['alpha'], own['validated'], strict=True))
  unigram = measured[measured['arm'] == 'unigram']
  beside = pd.concat([unigram[:0], *(_control(unigram, *use) for use in sorted(uses))])
  both = pd.concat([own, beside[~beside.index.duplicated()]])
  return _placed(both.assign(at=both['measure'].map(DIFFICULTY)))


def _control(unigram: pd.DataFrame, alpha: float, validated: bool) -> pd.DataFrame:
  """Return the unigram control to show beside a teacher: at the teacher's alpha, else (if validated) at its own validated alpha."""
  alike = unigram[unigram['validated'] == validated]
  same = alike[alike['alpha'] == alpha]
  return alike if validated and same.empty else same


def _plain(rows: pd.DataFrame) -> pd.DataFrame:
  """Distilled arms against the baseline of equal tokens."""
  return rows[(rows['arm'] == 'distilled') & (rows['scenario'] == '')]


def _two_sets(rows: pd.DataFrame) -> pd.DataFrame:
  return rows[(rows['measure'] == 'bits_per_byte') & rows['set'].isin(SETS)]


def _one_alpha(group: pd.DataFrame) -> pd.DataFrame:
  if group['validated'].any():
    return group[group['validated']]
  alphas = sorted(set(group['alpha']))
  return group[group['alpha'] == alphas[(len(alphas) - 1) // 2]]


def _placed(rows: pd.DataFrame, at: str = 'at') -> pd.DataFrame:
  places = rows.get(at, np.nan)
  return rows.assign(
    at=places, at_low=np.nan, at_high=np.nan, drawn=rows['estimate'], drawn_low=rows['low'], drawn_high=rows['high']
  )


def _ordered(rows: pd.DataFrame) -> pd.DataFrame:
  return rows.sort_values(['teacher_params', 'teacher_tokens', 'variant'], kind='stable')


def teachers_of(rows: pd.DataFrame) -> list[str]:
  return [row.teacher for row in by_teacher(rows)]


def by_teacher(rows: pd.DataFrame) -> list:
  distilled = rows[rows['arm'] == 'distilled'].sort_values('teacher_params', kind='stable')
  return list(each(distilled.drop_duplicates('teacher')))


def each(rows: pd.DataFrame) -> Iterator[Any]:
  return rows.itertuples()


def _variant(row) -> str:
  """Describe how a teacher's targets differ from the plain use: iso-data, annealed, T = 1, all logits, normalised."""
  parts = [row.budget] * (row.budget == 'trunk') + [row.teacher_data] * (row.teacher_data == 'disjoint')
  parts += [f'T{format_exact(row.temperature)}'] * (row.temperature == row.temperature and row.temperature != 1)
  parts += [f'k{format_exact(row.top_k)}'] * (row.top_k == row.top_k and row.top_k != 0)
  return ' '.join(parts + [row.mixing] * (row.mixing not in ('', 'normalised')))


def pick(values: Sequence, i: int | None):
  return None if i is None else values[i % len(values)]
