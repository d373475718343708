"""How the figures of compute in a grid's report are drawn: gain per teacher FLOP, the frontier, equal tokens against equal FLOPs."""

import matplotlib.figure
import matplotlib.ticker
import numpy as np
import pandas as pd

from kdjax.analysis.grid import ink, table_rows

SCENARIOS = {'': 'o', 'logits': 's', 'pretraining': '^', 'logits+pretraining': 'D'}  # a ledger scenario's marker


def per_flop(rows: pd.DataFrame) -> matplotlib.figure.Figure:
  own = rows[rows['arm'] == 'distilled']
  labels = list(dict.fromkeys(table_rows.labels_of(own)))
  tall = 0.3 * len(labels) + 1.4
  figure = matplotlib.figure.Figure(figsize=(14, 2 * tall + 10.5), layout='constrained')
  grid = figure.subplots(4, 2, height_ratios=(tall, tall, 4.2, 4.2))
  for lines, counted in zip(((0, 2), (1, 3)), table_rows.COUNTED, strict=True):
    for column, name in enumerate(table_rows.SETS):
      mine = rows[(rows['counted'] == counted) & (rows['set'] == name)]
      if mine.empty:
        for line in lines:
          ink.say(grid[line, column], f'{name}: not scored')
        continue
      _forest_per_flop(grid[lines[0], column], mine[mine['arm'] == 'distilled'], labels, own)
      if column:  # the labels stand once a line
        grid[lines[0], column].tick_params(axis='y', labelleft=False)
      grid[lines[0], column].set_title(
        f'{name}: gain per teacher FLOP,\ncounting {table_rows.COUNTED[counted]}', fontsize=10
      )
      _draw_frontier(grid[lines[1], column], mine)
      grid[lines[1], column].set_title(f'{name}: frontier,\ncounting {table_rows.COUNTED[counted]}', fontsize=10)
  handles = [
    ink.handle(row.teacher, color=row.colour, marker=row.marker, linestyle='none')
    for row in table_rows.by_teacher(rows)
  ]
  handles.append(ink.handle('larger: more teacher tokens', color='none'))
  handles.append(
    ink.handle('LM-only, the same\nstudent on more tokens', color='black', marker='s', markersize=4, linewidth=0.8)
  )
  handles.append(ink.handle('frontier: least bits\nper byte up to there', color='black', linewidth=1.5, alpha=0.35))
  return ink.legend(figure, handles)


def _forest_per_flop(axes, rows: pd.DataFrame, labels: list[str], all_rows: pd.DataFrame) -> None:
  """The numbers are printed too: teachers differ in FLOPs by orders of magnitude, and their gains hardly."""
  unit = 10 ** round(float(np.log10(all_rows['teacher_flops'].median())))
  at = table_rows.labels_of(rows)
  scaled = rows.assign(
    at=at, slot=0, hollow=False, **{f'drawn{end}': rows[f'per_flop{end}'] * unit for end in ('', '_low', '_high')}
  )
  ink.forest(axes, scaled, labels, 1)
  for row in table_rows.each(scaled):
    axes.annotate(
      f'{row.drawn:+.3g}',
      (1.01, labels.index(row.at)),
      xycoords=('axes fraction', 'data'),
      va='center',
      fontsize=8,
      annotation_clip=False,
    )
  axes.set_xlabel(ink.axis('bits_per_byte', f' per {unit:.0e} teacher FLOPs'.replace('e+', 'e')), fontsize=9)


def _draw_frontier(axes, rows: pd.DataFrame) -> None:
  """Gain against all FLOPs: of the student and of what is counted of its teacher."""
  own, matched = rows[rows['arm'] == 'distilled'], rows[rows['arm'] == 'flop_matched']
  start = own['student_flops'].iloc[0]
  plain = pd.DataFrame({'at': [start], 'drawn': [0.0]})
  step = table_rows.frontier(pd.concat([rows[['at', 'drawn']], plain]))
  last = max(rows['at'].max(), start)
  axes.step(
    [*step['at'], last],
    [*step['drawn'], step['drawn'].iloc[-1]],
    where='post',
    color='black',
    linewidth=5,
    alpha=0.18,
    solid_capstyle='butt',
  )
  axes.plot([start, *matched['at']], [0.0, *matched['drawn']], color='black', linewidth=0.8)
  axes.plot([start], [0.0], color='black', marker='s', markersize=4)
  ink.errorbars(axes, matched['at'], matched, color='black', marker='s', markersize=3, capsize=0, linestyle='none')
  budgets = sorted(set(own['teacher_tokens']))
  for (colour, marker, tokens), part in own.groupby(['colour', 'marker', 'teacher_tokens'], sort=False):
    size = 4.5 + 4.5 * (budgets.index(tokens) + 1) / len(budgets)
    ink.errorbars(axes, part['at'], part, color=colour, marker=marker, markersize=size, linestyle='none', zorder=4)
  axes.set_xscale('log')
  axes.xaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
  axes.xaxis.set_major_formatter(lambda value, _: f'{value:.3g}'.replace('e+', 'e'))
  axes.minorticks_off()
  ink.zero(axes, 'y')
  axes.set_xlabel('total FLOPs, of student and teacher (log scale)')
  axes.set_ylabel(ink.axis('bits_per_byte'))


def equal_flops(rows: pd.DataFrame) -> matplotlib.figure.Figure:
  labels, scenarios = list(dict.fromkeys(rows['at'])), [s for s in SCENARIOS if (rows['scenario'] == s).any()]
  rows = rows.assign(
    slot=rows['scenario'].map(scenarios.index), marker=rows['scenario'].map(SCENARIOS), hollow=rows['scenario'] != ''
  )
  figure, panels = ink.forests(2, len(labels), 0.16 * len(scenarios) + 0.1, columns=2, wide=6.5)
  for axes, name in ink.scored(rows, zip(panels, table_rows.SETS, strict=True)):
    mine = rows[rows['set'] == name]
    ink.forest(axes, mine, labels, len(scenarios))
    axes.set(
      title=name,
      xlabel='bits per byte, less that of the LM-only student\nof equal tokens or equal FLOPs (below 0: better)',
    )
  text = lambda s: (
    'LM-only at equal tokens' if not s else f'LM-only at equal FLOPs,\ncounting {s.replace("+", " and ")}'
  )
  handles = [
    ink.handle(text(s), color='#555555', marker=SCENARIOS[s], linestyle='none', mfc='white' if s else None)
    for s in scenarios
  ]
  return ink.legend(figure, handles, 'less the baseline:')
