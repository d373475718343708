"""How the figures of a grid's report are drawn from their rows (kdjax/analysis/grid/table_rows.py); those of compute: flopplots.py."""

import itertools
from typing import Any

import matplotlib
import matplotlib.colors
import matplotlib.figure
import numpy as np
import pandas as pd

from kdjax.analysis.grid import ink, table_rows
from kdjax.sweeps.names import format_count

DASHES = ('-', '--', ':', '-.', (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)), (0, (8, 3)))
ARMS = {'distilled': 'o', 'unigram': '>', 'tuned': 'X', 'flop_matched': 's'}
UNIGRAM: dict[str, Any] = {
  'color': table_rows.COLOURS['unigram'],
  'marker': '>',
  'markersize': 4,
  'linestyle': '-',
  'linewidth': 1,
}
BEST: dict[str, Any] = {'markersize': 8, 'mfc': 'white', 'mec': 'black', 'zorder': 5}  # a validated alpha's marker


def strength(rows: pd.DataFrame) -> matplotlib.figure.Figure:
  figure, panels = ink.panels(rows, height=5.0)
  triples = zip(rows['validated'], rows['alpha'], rows['variant'], strict=True)
  series = list(
    dict.fromkeys((v, None if v else alpha, variant) for v, alpha, variant in triples)
  )  # one line holds all validated alphas
  variants = sorted(set(rows['variant']))
  span, many = np.ptp(np.log10(rows['at'])) or 1.0, rows['at'].nunique()
  apart, faint = min(0.011, 0.6 / (many * len(series))), {'elinewidth': 0.6, 'capsize': 0.0 if many > 12 else 2.0}
  for axes, name in panels:
    for i, (validated, alpha, variant) in enumerate(series):
      mine = rows[(rows['set'] == name) & (rows['validated'] == validated) & (rows['variant'] == variant)]
      mine = (mine if validated else mine[mine['alpha'] == alpha]).sort_values('at')
      style = _alpha_style(alpha, table_rows.pick(DASHES, variants.index(variant)))
      ink.errorbars(axes, mine['at'] * 10 ** (apart * span * (i - (len(series) - 1) / 2)), mine, **(faint | style))
    axes.set_xscale('log')
    axes.set(title=name, ylabel=ink.axis('bits_per_byte'))
    _teacher_ticks(axes, rows)
    ink.zero(axes, 'y')
  handles = [
    ink.handle(_alpha_label(alpha, variant), **_alpha_style(alpha, table_rows.pick(DASHES, variants.index(variant))))
    for _, alpha, variant in series
  ]
  return ink.legend(figure, [*handles, ink.handle('LM-only student', color=table_rows.COLOURS['tuned'])])


def _alpha_style(alpha: float | None, dash) -> dict:
  if alpha is None:
    return {'color': 'black', 'marker': '*', 'markersize': 11, 'mfc': 'white', 'linestyle': 'none', 'zorder': 5}
  return {'color': alpha_colour(alpha), 'marker': 'o', 'markersize': 4, 'linestyle': dash, 'linewidth': 1.2}


def _alpha_label(alpha: float | None, variant: str) -> str:
  return ('validated α, fresh seeds' if alpha is None else f'α {alpha:g}') + f' {variant}'.rstrip()


def alpha_colour(alpha: float) -> str:
  """Of one map over [0, 1], so that an alpha has its colour in every grid; without the map's palest end."""
  return matplotlib.colors.to_hex(matplotlib.colormaps['plasma'](0.9 * alpha))


def _teacher_ticks(axes, rows: pd.DataFrame) -> None:
  """Under a log axis of FLOPs: each teacher's name, moved aside where two would overlap, with a line to its place."""
  known = rows.drop_duplicates(['teacher', 'teacher_tokens']).sort_values('at')
  low, high = np.log10(known['at'].min()), np.log10(known['at'].max())
  margin = 0.06 * (high - low) or 0.5
  low, high = low - margin, high + margin
  axes.set_xlim(10**low, 10**high)
  axes.set_xticks([], [])
  axes.minorticks_off()
  texts = [
    f'{row.teacher} {format_count(row.teacher_tokens)} · {row.at:.1e}'.replace('e+', 'e')
    for row in table_rows.each(known)
  ]
  size = min(8.0, 200 / max(len(texts), 1))
  places = ink.spread((np.log10(known['at'].to_numpy()) - low) / (high - low), size / 210)
  across = axes.get_xaxis_transform()
  for place, text, row in zip(places, texts, table_rows.each(known), strict=True):
    x = 10 ** (low + place * (high - low))
    axes.plot([row.at, x], [0, -0.03], transform=across, color=row.colour, linewidth=0.9, clip_on=False)
    axes.text(
      x, -0.035, text, transform=across, rotation=90, ha='center', va='top', fontsize=size, color=ink.dark(row.colour)
    )
  # A tick label of the longest text keeps the room, and the axis' label its distance; its own ink is invisible.
  axes.set_xticks([10 ** ((low + high) / 2)], [max(texts, key=len)], rotation=90, fontsize=size, alpha=0)
  axes.tick_params(axis='x', length=0)
  axes.set_xlabel('teacher, its training tokens · FLOPs of its training (log scale)', labelpad=16)


def heat(rows: pd.DataFrame) -> matplotlib.figure.Figure:
  """A line of panels for each use of the targets; with many budgets a line for each set too."""
  variants, teachers, budgets = sorted(set(rows['variant'])), table_rows.teachers_of(rows), sorted(set(rows['at']))
  across = 2 if len(budgets) <= 4 else 1
  down = 2 * len(variants) // across
  size = (across * (1.35 * len(budgets) + 2.4), down * (0.75 * len(teachers) + 0.9) + 1.2)
  figure = matplotlib.figure.Figure(figsize=(max(size[0], 9), max(size[1], 4)), layout='constrained')
  panels = figure.subplots(down, across, squeeze=False).flat
  for axes, (variant, name) in zip(panels, itertools.product(variants, table_rows.SETS), strict=True):
    mine = rows[(rows['variant'] == variant) & (rows['set'] == name)]
    if mine.empty:
      ink.say(axes, f'{name}: not scored')
      continue
    image = _heat(axes, mine, teachers, budgets, rows.loc[rows['set'] == name, 'drawn'].abs().max() or 1.0)
    axes.set(title=f'{name} {variant}'.strip(), xlabel='teacher’s training tokens', ylabel='teacher (weakest below)')
    figure.colorbar(image, ax=axes, shrink=0.9).set_label(_broken(ink.axis('bits_per_byte')), fontsize=9)
  return figure


def _heat(axes, rows: pd.DataFrame, teachers: list[str], budgets: list[float], limit: float):
  """Draw the heat map. A cell shows its estimate, interval and alpha, or 'not run'."""
  values = np.full((len(teachers), len(budgets)), np.nan)
  image = axes.imshow(values, cmap='RdBu_r', vmin=-limit, vmax=limit, origin='lower', aspect='auto')
  axes.set_facecolor('#eeeeee')
  for row in table_rows.each(rows):
    y, x = teachers.index(row.teacher), budgets.index(row.at)
    values[y, x] = row.drawn
    alpha = table_rows.label('', row.alpha, row.validated)[2:]
    text = f'{row.drawn:+.4f}\n[{row.drawn_low:+.3f}, {row.drawn_high:+.3f}]\n{alpha}'
    axes.text(x, y, text, ha='center', va='center', fontsize=7.5, color=ink.text_colour(image.to_rgba(row.drawn)))
  for y, x in zip(*np.nonzero(np.isnan(values)), strict=True):
    axes.text(x, y, 'not run', ha='center', va='center', fontsize=7.5, color='#666666')
  image.set_data(values)
  axes.set_xticks(range(len(budgets)), [format_count(tokens) for tokens in budgets])
  axes.set_yticks(range(len(teachers)), teachers)
  return image


def _broken(text: str) -> str:
  return text.replace(', ', ',\n', 1)


def alphas(rows: pd.DataFrame) -> matplotlib.figure.Figure:
  teachers = table_rows.teachers_of(rows)
  mine = rows[rows['teacher'] != '']
  uses = sorted(set(zip(mine['teacher_tokens'], mine['variant'], strict=True)))
  figure = matplotlib.figure.Figure(figsize=(max(3.1 * len(teachers) + 1.8, 8), 7), layout='constrained')
  grid = figure.subplots(2, len(teachers), squeeze=False, sharex=True, sharey='row')
  for name, line in zip(table_rows.SETS, grid, strict=True):
    for teacher, axes in zip(teachers, line, strict=True):
      _curves(axes, rows[rows['set'] == name], teacher, uses)
      axes.set_title(f'{teacher} · {name}', fontsize=10)
      axes.set_xticks(sorted({0.0, *rows['at']}))
      axes.tick_params(axis='x', labelsize=8)
      ink.zero(axes, 'y')
    line[0].set_ylabel(_broken(ink.axis('bits_per_byte')))
    line[0].set_ylim(_limits(rows[rows['set'] == name]))
  for axes in grid[-1]:
    axes.set_xlabel('alpha (0: LM-only)')
  style = lambda i: {
    'linestyle': table_rows.pick(DASHES, i),
    'marker': table_rows.pick(table_rows.MARKERS, i),
    'markersize': 4,
  }
  handles = [
    ink.handle(f'{format_count(use[0])} {use[1]}'.strip(), color='#555555', **style(i)) for i, use in enumerate(uses)
  ]
  best = ink.handle('large, hollow: validated α,\nfresh seeds', color='black', marker='o', linestyle='none', **BEST)
  return ink.legend(figure, [*handles, best, ink.handle('unigram (no teacher)', **UNIGRAM)], 'teacher’s tokens')


def _limits(rows: pd.DataFrame) -> tuple[float, float] | None:
  """Of the teachers' curves; the unigram's may leave them by as much again, lest it flatten them."""
  if not (rows['arm'] != 'unigram').any():
    return None
  low, high = _ends(rows[rows['arm'] != 'unigram'])
  lowest, highest = _ends(rows)
  span = 1.05 * (high - low) or 1.0
  return max(lowest, low - span) - 0.05 * span, min(highest, high + span) + 0.05 * span


def _ends(rows: pd.DataFrame) -> tuple[float, float]:
  """The least and greatest end of an interval, and 0."""
  values = rows[['drawn', 'drawn_low', 'drawn_high']].to_numpy(float)
  known = np.append(values[np.isfinite(values)], 0.0)
  return float(known.min()), float(known.max())


def _curves(axes, rows: pd.DataFrame, teacher: str, uses: list) -> None:
  """A teacher's curves, one a budget, from the baseline at alpha 0; the unigram control's behind them."""
  if not (rows['teacher'] == teacher).any():
    ink.say(axes, 'not scored')
    return
  control = rows[rows['arm'] == 'unigram'].sort_values('at')
  if len(control):
    ink.errorbars(axes, control['at'], control, alpha=0.6, **UNIGRAM)
  for i, (tokens, variant) in enumerate(uses):
    of = (rows['teacher'] == teacher) & (rows['teacher_tokens'] == tokens) & (rows['variant'] == variant)
    mine = rows[of].sort_values('at')
    if mine.empty:
      continue
    curve, best = mine[~mine['validated']], mine[mine['validated']]
    shift, colour = (
      min(0.016, 0.06 / len(uses)) * (i - (len(uses) - 1) / 2),
      ink.shade(mine['colour'].iloc[0], i, len(uses)),
    )
    style = {'color': colour, 'marker': table_rows.pick(table_rows.MARKERS, i), 'linewidth': 1.3}
    if len(curve):  # from the baseline itself, which is 0 at alpha 0
      ink.errorbars(axes, curve['at'] + shift, curve, markersize=4, linestyle=table_rows.pick(DASHES, i), **style)
      start = [0, curve['at'].iloc[0] + shift], [0, curve['drawn'].iloc[0]]
      axes.plot(*start, color=colour, linestyle=table_rows.pick(DASHES, i), linewidth=1.3)
    if len(best):
      ink.errorbars(axes, best['at'] + shift, best, **style, **BEST)


def sets(rows: pd.DataFrame) -> matplotlib.figure.Figure:
  names, labels = table_rows.ordered_sets(rows), list(dict.fromkeys(rows['at']))
  rows = rows.assign(hollow=rows['measure'].isin(table_rows.FITTED.values()))
  rows = rows.assign(
    slot=2 * (rows['arm'] == 'unigram') + rows['hollow'], marker=rows['marker'].where(rows['arm'] != 'tuned', 'X')
  )
  figure, panels = ink.forests(len(names), len(labels), 0.44)
  for axes, name in zip(panels, names, strict=True):
    mine = rows[rows['set'] == name]
    ink.forest(axes, mine, labels, 4)
    measure = next((measure for measure in table_rows.FITTED if (mine['measure'] == measure).any()), 'bits_per_byte')
    axes.set(title=name, xlabel=ink.axis(measure))
  handles = [
    ink.handle(
      'teacher (its colour): T = 1;\ntasks: raw log-likelihood', color='#555555', marker='o', linestyle='none'
    ),
    ink.handle('the same at fitted T;\ntasks: per byte', color='#555555', marker='o', linestyle='none', mfc='white'),
    ink.handle('unigram, T = 1', color=table_rows.COLOURS['unigram'], marker='>', linestyle='none'),
    ink.handle('unigram at fitted T', color=table_rows.COLOURS['unigram'], marker='>', linestyle='none', mfc='white'),
  ]
  if (rows['arm'] == 'tuned').any():
    handles.append(ink.handle('LM-only, tuned', color=table_rows.COLOURS['tuned'], marker='X', linestyle='none'))
  return ink.legend(figure, handles)


def entropy(rows: pd.DataFrame) -> matplotlib.figure.Figure:
  figure, panels = ink.panels(rows, height=5.2)
  rows = rows.assign(
    marker=rows['arm'].map(ARMS),
    colour=rows['colour'].where(rows['arm'] == 'distilled', rows['arm'].map(table_rows.COLOURS)),
  )
  for axes, name in panels:
    mine = rows[rows['set'] == name]
    axes.errorbar(
      mine['at'], mine['drawn'], xerr=ink.whiskers(mine, 'at'), yerr=ink.whiskers(mine, 'drawn'), fmt='none', ecolor=list(mine['colour']), alpha=0.25, linewidth=0.8
    )  # fmt: skip
    for (marker, validated), part in mine.groupby(['marker', 'validated']):
      edge = 'black' if validated and marker in 'o>' else 'none'
      axes.scatter(
        part['at'],
        part['drawn'],
        s=18 + 60 * part['alpha'],
        c=list(part['colour']),
        marker=marker,
        edgecolors=edge,
        linewidths=0.8,
        zorder=3,
      )
    ink.zero(axes, 'y')
    ink.zero(axes, 'x')
    axes.set(title=name, xlabel='entropy, nats per token, less the LM-only student’s\n(right of 0: less sure)')
    axes.set_ylabel('log2 perplexity per byte = ' + ink.axis('bits_per_byte'))
  handles = [
    ink.handle(row.teacher, color=row.colour, marker='o', linestyle='none') for row in table_rows.by_teacher(rows)
  ]
  names = {'unigram': 'unigram (no teacher)', 'tuned': 'LM-only, tuned', 'flop_matched': 'LM-only, FLOP-matched'}
  handles += [
    ink.handle(text, color=table_rows.COLOURS[arm], marker=ARMS[arm], linestyle='none')
    for arm, text in names.items()
    if (rows['arm'] == arm).any()
  ]
  handles.append(ink.handle('black edge: validated α', color='white', mec='black', marker='o', linestyle='none'))
  handles.append(ink.handle('larger: higher α', color='none'))
  return ink.legend(figure, handles)


def difficulty(rows: pd.DataFrame) -> matplotlib.figure.Figure:
  """A line a teacher, in its colour, its budgets apart by shade and dash; the unigram control's a line an alpha."""
  figure, panels = ink.panels(rows, height=4.2)
  own, control = rows[rows['arm'] == 'distilled'], rows[rows['arm'] == 'unigram']
  labels = list(dict.fromkeys(table_rows.labels_of(own)))
  budgets = sorted(set(zip(own['teacher_tokens'], own['variant'], strict=True)))
  styles = {}
  for row in table_rows.each(own):
    i = budgets.index((row.teacher_tokens, row.variant))
    styles[table_rows.label(row.source, row.alpha, row.validated)] = {
      'color': ink.shade(row.colour, i, len(budgets)),
      'marker': row.marker,
      'linestyle': table_rows.pick(DASHES, i),
    }
  for axes, name in panels:
    of = control[control['set'] == name].sort_values('at')
    for _, part in of.groupby(['alpha', 'validated']):
      ink.errorbars(axes, part['at'], part, alpha=0.5, **UNIGRAM)
    mine = own[own['set'] == name].sort_values('at')
    mine = mine.assign(label=table_rows.labels_of(mine))
    for i, label in enumerate(labels):
      part = mine[mine['label'] == label]
      shift = 0.05 * (i - (len(labels) - 1) / 2)
      ink.errorbars(axes, part['at'] + shift, part, markersize=4, linewidth=1.1, **styles[label])
    axes.set_xticks(list(table_rows.DIFFICULTY.values()), ['1: commonest', '2', '3', '4', '5: rarest'])
    axes.set(title=name, xlabel='tokens by frequency in the training text, a fifth of it each')
    axes.set_ylabel('nats per token, less the LM-only student’s\n(below 0: better)')
    ink.zero(axes, 'y')
  handles = [ink.handle(label, markersize=4, linewidth=1.1, **styles[label]) for label in labels]
  if len(control):
    handles.append(ink.handle('unigram (no teacher)', **UNIGRAM))
  return ink.legend(figure, handles)
