"""Format a grid's results as Markdown: the contrasts, then every arm at its validated alpha (or at each declared one)."""

import pandas as pd

from kdjax.analysis.grid import table_rows
from kdjax.analysis.grid.contrasts import NOT_TESTED

LEGEND = """Differences are to the LM-only student with the same tokens, seeds and batches. Below 0 in bits per byte is better, above 0 in accuracy is
better. Primary contrasts: verdict, interval and MDE are all at level 1 - 0.05/m, for m primary tests in the grid. Everything else is exploratory,
with uncorrected 95% intervals. MDE: the true difference that a grid of this size resolves 4 times in 5, with its own 95% interval.
Fitted T: each model at its own best evaluation temperature. Unigram: the training text's token frequencies are the teacher.
FLOP-matched: an LM-only student that spent that teacher's FLOPs on more tokens."""


def markdown(effects: pd.DataFrame, contrasts: pd.DataFrame, warnings: list[str]) -> str:
  """The tables of kdjax/analysis/grid/effects.py as text that can be committed."""
  parts = [f'**{warning}**' for warning in warnings]
  parts += [
    '## Primary contrasts',
    _contrasts(contrasts, True),
    '## Exploratory contrasts',
    _contrasts(contrasts, False),
  ]
  table = table_rows.labelled(effects)
  for setting in table['setting'].unique():
    rows = table[table['setting'] == setting]
    kept = rows[rows['validated']] if rows['validated'].any() else rows
    parts += [f'## Arms of the student {setting}', _arms(kept)]
  return '\n\n'.join([*parts, LEGEND]) + '\n'


def _contrasts(contrasts: pd.DataFrame, primary: bool) -> str:
  rows = contrasts[contrasts['primary'] == primary] if len(contrasts) else contrasts
  if rows.empty:
    return 'None were declared.'
  head = ['question', 'on', *(['verdict'] * primary), 'estimate', 'interval', 'MDE', 'left', 'right']
  lines = []
  for row in table_rows.each(rows):
    tested = row.verdict != NOT_TESTED
    numbers = (
      [f'{row.estimate:+.4f}', f'[{row.low:+.4f}, {row.high:+.4f}] at {row.level:.4g}', mde(row)]
      if tested
      else ['', '', '']
    )
    question = f'{row.question}{f" ({row.detail})" * bool(row.detail)}'
    said = [row.verdict if tested else row.answer]
    lines.append([question, row.set, *(said * primary), *numbers, row.left if tested else row.answer, row.right])
  return _table(head, lines)


def mde(row) -> str:
  """Format a contrast's minimum detectable effect with its interval."""
  return f'{row.mde:.4f} [{row.mde_low:.4f}, {row.mde_high:.4f}]'


def _arms(rows: pd.DataFrame) -> str:
  """One line an arm; the columns are the sets, at T = 1 and at fitted T, and the tasks by raw and by per-byte likelihood."""
  measures = [*table_rows.FITTED, *table_rows.FITTED.values()]
  shown = rows[rows['measure'].isin(measures) & ((rows['scenario'] == '') | (rows['arm'] == 'flop_matched'))]
  columns = [
    (name, measure)
    for name in table_rows.ordered_sets(shown)
    for measure in measures
    if ((shown['set'] == name) & (shown['measure'] == measure)).any()
  ]
  hollow = {
    measure: ' (per byte)' if measure == 'accuracy_norm' else ' (fitted T)' for measure in table_rows.FITTED.values()
  }
  head = ['arm', 'alpha', 'seeds', *(f'{name}{hollow.get(measure, "")}' for name, measure in columns)]
  lines = []
  for _, mine in shown.groupby(['arm', 'source', 'alpha', 'cells'], sort=False):
    known = {(row.set, row.measure): row for row in table_rows.each(mine)}
    first = next(table_rows.each(mine))
    values = [known.get(column) for column in columns]
    numbers = [f'{row.estimate:+.3f} [{row.low:+.3f}, {row.high:+.3f}]' if row else '' for row in values]
    name = {'distilled': first.source, 'flop_matched': f'FLOP-matched to {first.source}'}.get(first.arm, first.arm)
    lines.append([name, f'{first.alpha:g}', str(first.n_seeds), *numbers])
  return _table(head, lines)


def _table(head: list[str], lines: list[list[str]]) -> str:
  return '\n'.join(f'| {" | ".join(line)} |' for line in (head, ['---'] * len(head), *lines))
