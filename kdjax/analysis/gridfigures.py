"""The seven figures of a grid's report, as PNG and SVG.

A figure is two functions of one student setting: `select` takes from the table of effects the rows that are drawn and says where each stands
(`drawn` returns just that, so a test can hold a figure against the table, and kdjax/analysis/page.py draws the same rows), `draw` puts them
on paper. Selected rows keep their index in the table and have besides:

    at, at_low, at_high           the place on the axis that is not the gain's: FLOPs, tokens, alpha, a label, a change of entropy
    drawn, drawn_low, drawn_high  the number on the gain's axis, and its interval

A teacher has one colour and one marker in all figures, by size. A gain is always a difference to the LM-only student, below 0 being better
for likelihoods; where a figure shows each teacher at one alpha, it is the validated one, or (told in the label) the middle declared one:
never the best of those drawn.
"""

import dataclasses
import itertools
import logging
import os
import pathlib
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import matplotlib
import matplotlib.colors
import matplotlib.figure
import matplotlib.lines
import matplotlib.ticker
import numpy as np
import pandas as pd
from scipy import optimize

from kdjax.analysis.table import OOD_MEAN
from kdjax.evals.job import IN_DOMAIN
from kdjax.grids.cells import count

log = logging.getLogger('kdjax')

SETS = (IN_DOMAIN, OOD_MEAN)
SETTING = ['student', 'student_tokens', 'distinct_tokens']
COLUMNS = [
  *SETTING, 'teacher', 'teacher_tokens', 'budget', 'teacher_data', 'temperature', 'top_k', 'mixing', 'alpha', 'arm', 'scenario', 'validated',
  'seeds', 'cells', 'set', 'group', 'measure', 'estimate', 'low', 'high', 'error', 'df', 'n_seeds', 'n_documents', 'over', 'p', 'verdict',
  'baseline', 'value', 'student_params', 'teacher_params', 'student_flops', 'logits_flops', 'pretraining_flops',
]  # fmt: skip
WORDS = [
  'student', 'teacher', 'budget', 'teacher_data', 'mixing', 'arm', 'scenario', 'seeds', 'cells', 'set', 'group', 'measure', 'over', 'verdict',
]  # fmt: skip
# Okabe & Ito's and Tol's colours, told apart by the colour-blind; vermilion is the unigram control's, grey the LM-only student's.
TEACHERS = ('#56b4e9', '#0072b2', '#009e73', '#e69f00', '#cc79a7', '#332288', '#999933', '#882255')
MARKERS = ('o', 's', '^', 'D', 'v', 'P', 'X', 'p')
COLOURS = {'unigram': '#d55e00', 'tuned': '#4c4c4c', 'flop_matched': '#8c8c8c'}
DASHES = ('-', '--', ':', '-.', (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)), (0, (8, 3)))
SCENARIOS = {'': 'o', 'logits': 's', 'pretraining': '^', 'logits+pretraining': 'D'}  # a ledger scenario's marker
ARMS = {'distilled': 'o', 'unigram': '>', 'tuned': 'X', 'flop_matched': 's'}
VERDICT_MARKS = {'better': '✓', 'worse': '✗', 'unresolved': '○'}
COUNTED = {'logits': 'the teacher’s forward passes', 'logits+pretraining': 'its forward passes and its training'}
UNIGRAM: dict[str, Any] = {
  'color': COLOURS['unigram'],
  'marker': '>',
  'markersize': 4,
  'linestyle': '-',
  'linewidth': 1,
}
BEST: dict[str, Any] = {'markersize': 8, 'mfc': 'white', 'mec': 'black', 'zorder': 5}  # a validated alpha's marker
FITTED = {'bits_per_byte': 'bits_per_byte_fitted', 'accuracy': 'accuracy_norm'}  # what is drawn hollow beside
UNITS = {
  'bits_per_byte': 'bits per byte',
  'bits_per_byte_fitted': 'bits per byte at fitted T',
  'entropy': 'entropy, nats per token',
  'top1': 'top-1 accuracy',
  'ece': 'ECE',
  'accuracy': 'accuracy, share of items',
  'accuracy_norm': 'accuracy (per byte), share of items',
}
SENSE = {
  'entropy': '',
  'top1': ' (above 0: better)',
  'accuracy': ' (above 0: better)',
  'accuracy_norm': ' (above 0: better)',
}
VALIDATED = 'Each teacher at its validated alpha.'
UNVALIDATED = '* No alpha was validated for this teacher: the middle one of the declared is shown, whatever came of it.'
KEYS = ['setting', 'arm', 'source', 'alpha', 'validated', 'scenario', 'cells', 'set']  # one measure's row of an arm


@dataclasses.dataclass(frozen=True)
class Figure:
  """One of the report's figures."""

  title: str
  how: str  # how to read it
  needs: str  # what a grid must have run for it
  select: Callable[[pd.DataFrame], pd.DataFrame]
  draw: Callable[[pd.DataFrame], matplotlib.figure.Figure]
  contrasts: tuple[str, ...] = ()  # those it bears on, quoted under it
  one_alpha: bool = False  # shows each teacher at the alpha of `chosen`


def write_all(effects: pd.DataFrame, contrasts: pd.DataFrame, folder: pathlib.Path, note: str) -> list[pathlib.Path]:
  """Each figure as .png and .svg; with several student settings one pair of files each, its name in the file's.

  Args:
    effects, contrasts: the tables of kdjax/analysis/effects.py.
    note: printed on every figure, such as 'alpha not validated'.

  Returns: the files. A figure whose rows are absent says on its panel what is missing, and is logged.
  """
  folder.mkdir(parents=True, exist_ok=True)
  table = labelled(effects)
  known = list(table['setting'].unique()) or ['']
  paths = []
  for setting in known:
    rows, mine = table[table['setting'] == setting], of_setting(contrasts, setting)
    for name, spec in FIGURES.items():
      stem = name if len(known) == 1 else f'{name}-{slug(setting)}'
      figure = render(spec, spec.select(rows), mine, note, setting)
      paths += [_save(figure, folder / f'{stem}{suffix}') for suffix in ('.png', '.svg')]
  for line in missing(effects):
    log.warning('figure not drawn: %s', line)
  return paths


def drawn(name: str, effects: pd.DataFrame) -> pd.DataFrame:
  """The numbers that figure `name` draws, of all student settings: rows of `effects`, under their own index, with their places."""
  table = labelled(effects)
  return pd.concat(
    [FIGURES[name].select(table[table['setting'] == s]) for s in table['setting'].unique()]
    or [FIGURES[name].select(table)]
  )


def missing(effects: pd.DataFrame) -> list[str]:
  """What could not be drawn, and what it would need; one line a figure and setting."""
  table = labelled(effects)
  return [
    f'{spec.title}{f" ({setting})" if setting else ""}: {spec.needs}'
    for setting in list(table['setting'].unique()) or ['']
    for spec in FIGURES.values()
    if spec.select(table[table['setting'] == setting]).empty
  ]


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
    _variant(row) for row in _each(table[['budget', 'teacher_data', 'temperature', 'top_k', 'mixing']])
  ]
  parts = zip(table['teacher'], table['teacher_tokens'], table['variant'], strict=True)
  table['source'] = [
    f'{teacher} {count(tokens)} {variant}'.strip() if teacher else '' for teacher, tokens, variant in parts
  ]
  table['strength'] = table.groupby('source')['pretraining_flops'].transform('max') if len(table) else np.nan
  sizes = table[table['teacher'] != ''].groupby('teacher')['teacher_params'].min().sort_values(kind='stable')
  rank = {teacher: i for i, teacher in enumerate(sizes.index)}
  table['colour'] = [
    _pick(TEACHERS, rank.get(teacher)) or COLOURS.get(arm, '')
    for teacher, arm in zip(table['teacher'], table['arm'], strict=True)
  ]
  table['marker'] = [_pick(MARKERS, rank.get(teacher)) or '>' for teacher in table['teacher']]
  return table


def chosen(rows: pd.DataFrame) -> pd.DataFrame:
  """Each teacher at one alpha, against the plain baseline: the validated alpha, else the middle declared one, which no outcome has chosen."""
  plain = _plain(rows)
  kept = [_one_alpha(group) for _, group in plain.groupby('source')]
  return _ordered(pd.concat(kept)) if kept else plain


def alpha_words(spec: Figure, validated: Iterable[bool]) -> list[str]:
  """Which alpha a figure shows that has one a teacher."""
  known = set(map(bool, validated)) if spec.one_alpha else set()
  return [VALIDATED] * (True in known) + [UNVALIDATED] * (False in known)


def label(source: str, alpha: float, validated: bool) -> str:
  return f'{source}, α {alpha:g}{"" if validated else "*"}'


def labels_of(rows: pd.DataFrame) -> list[str]:
  return [label(*each) for each in zip(rows['source'], rows['alpha'], rows['validated'], strict=True)]


def axis(measure: str, per: str = '') -> str:
  """What an axis of differences says: unit, baseline and direction."""
  return (
    f'{UNITS[measure]}{per}, less the LM-only student’s\n{SENSE.get(measure, " (below 0: better)").strip()}'.strip()
  )


def _broken(text: str) -> str:
  return text.replace(', ', ',\n', 1)


def evidence(rows: pd.DataFrame) -> str:
  """How many seeds and documents stand behind the rows, and what their intervals generalise over."""
  parts = []
  for validated, group in rows.groupby('validated', sort=False):
    seeds = _range(group['n_seeds'])
    over = ' or '.join(sorted(set(group['over']) - {''})) or 'nothing'
    alone = '' if 'seeds' in over else ' alone, with no variance between seeds in them'
    plural = '' if seeds == '1' else 's'
    parts.append(
      f'{"validated alpha" if validated else "declared alphas"}: {seeds} {"fresh " * bool(validated)}seed{plural} an arm, 95% intervals over {over}{alone}'
    )
  documents = ', '.join(f'{name} {_range(group["n_documents"])}' for name, group in rows.groupby('set', sort=False))
  text = '; '.join(parts)
  return text[:1].upper() + text[1:] + (f'. Documents or items: {documents}.' if documents else '')


def quoted(contrasts: pd.DataFrame, names: Sequence[str]) -> list[str]:
  """The declared contrasts that a figure bears on, with their verdicts."""
  lines = []
  for row in _each(contrasts) if len(contrasts) else ():
    if row.contrast in names:
      tested = row.verdict != 'not tested'
      number = (
        f'{row.verdict}, {row.estimate:+.3g} [{row.low:+.3g}, {row.high:+.3g}] {row.unit}, Holm p {row.p_holm:.2g}'
        if tested
        else row.answer
      )
      lines.append(f'{row.question} ({row.set}) {number}')
  return lines


def slug(setting: str) -> str:
  return ''.join(c if c.isalnum() or c in '.-' else '-' for c in setting).replace('--', '-')


def render(
  spec: Figure, rows: pd.DataFrame, contrasts: pd.DataFrame, note: str, setting: str
) -> matplotlib.figure.Figure:
  """The figure with its title, note and caption; a small panel that says what is missing where there are no rows."""
  if rows.empty:
    figure = _empty(f'Not drawn: {spec.needs}')
    lines: list[str] = []
  else:
    figure = spec.draw(rows)
    lines = [spec.how, *alpha_words(spec, rows['validated']), evidence(rows), *quoted(contrasts, spec.contrasts)]
  width = figure.get_figwidth()
  wrap = lambda text, size, room=0.0: '\n'.join(textwrap.wrap(text, int((width - room) * 125 / size)))
  heading = f'{spec.title}{f" · student {setting}" if setting else ""}'
  room = 2.7 if figure.legends else 0.3
  title = [wrap(heading, 11, room), *([wrap(f'Note: {note}', 11, room)] if note else [])]
  figure.suptitle('\n'.join(title), fontsize=11, x=0.01, ha='left')
  figure.supxlabel('\n'.join(wrap(line, 8) for line in lines), fontsize=8, x=0.01, ha='left', color='#333333')
  return figure


# (a) gain against the teacher's strength


def _select_strength(rows: pd.DataFrame) -> pd.DataFrame:
  return _placed(_two_sets(_plain(rows)), 'strength').sort_values(
    ['validated', 'alpha', 'variant', 'at'], kind='stable'
  )


def _draw_strength(rows: pd.DataFrame) -> matplotlib.figure.Figure:
  figure, panels = _panels(rows, height=5.0)
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
      style = _alpha_style(alpha, _pick(DASHES, variants.index(variant)))
      _errorbars(axes, mine['at'] * 10 ** (apart * span * (i - (len(series) - 1) / 2)), mine, **(faint | style))
    axes.set_xscale('log')
    axes.set(title=name, ylabel=axis('bits_per_byte'))
    _teacher_ticks(axes, rows)
    _zero(axes, 'y')
  handles = [
    _handle(_alpha_label(alpha, variant), **_alpha_style(alpha, _pick(DASHES, variants.index(variant))))
    for _, alpha, variant in series
  ]
  return _legend(figure, [*handles, _handle('LM-only student', color=COLOURS['tuned'])])


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
  texts = [f'{row.teacher} {count(row.teacher_tokens)} · {row.at:.1e}'.replace('e+', 'e') for row in _each(known)]
  size = min(8.0, 200 / max(len(texts), 1))
  places = spread((np.log10(known['at'].to_numpy()) - low) / (high - low), size / 210)
  across = axes.get_xaxis_transform()
  for place, text, row in zip(places, texts, _each(known), strict=True):
    x = 10 ** (low + place * (high - low))
    axes.plot([row.at, x], [0, -0.03], transform=across, color=row.colour, linewidth=0.9, clip_on=False)
    axes.text(
      x, -0.035, text, transform=across, rotation=90, ha='center', va='top', fontsize=size, color=_dark(row.colour)
    )
  # A tick label of the longest text keeps the room, and the axis' label its distance; its own ink is invisible.
  axes.set_xticks([10 ** ((low + high) / 2)], [max(texts, key=len)], rotation=90, fontsize=size, alpha=0)
  axes.tick_params(axis='x', length=0)
  axes.set_xlabel('teacher, its training tokens · FLOPs of its training (log scale)', labelpad=16)


def spread(places: Sequence[float], gap: float) -> np.ndarray:
  """Sorted places in [0, 1] moved, as little as least squares can, until neighbours are `gap` apart; kept in [0, 1] where they fit."""
  steps = gap * np.arange(len(places))
  if not len(steps):
    return steps
  return np.clip(optimize.isotonic_regression(np.asarray(places, float) - steps).x, 0, max(0.0, 1 - steps[-1])) + steps


# (b) teacher size x budget at the validated alpha


def _select_heat(rows: pd.DataFrame) -> pd.DataFrame:
  return _placed(_two_sets(chosen(rows)), 'teacher_tokens')


def _draw_heat(rows: pd.DataFrame) -> matplotlib.figure.Figure:
  """A line of panels for each use of the targets; with many budgets a line for each set too."""
  variants, teachers, budgets = sorted(set(rows['variant'])), _teachers(rows), sorted(set(rows['at']))
  across = 2 if len(budgets) <= 4 else 1
  down = 2 * len(variants) // across
  size = (across * (1.35 * len(budgets) + 2.4), down * (0.75 * len(teachers) + 0.9) + 1.2)
  figure = matplotlib.figure.Figure(figsize=(max(size[0], 9), max(size[1], 4)), layout='constrained')
  panels = figure.subplots(down, across, squeeze=False).flat
  for axes, (variant, name) in zip(panels, itertools.product(variants, SETS), strict=True):
    mine = rows[(rows['variant'] == variant) & (rows['set'] == name)]
    if mine.empty:
      _say(axes, f'{name}: not scored')
      continue
    image = _heat(axes, mine, teachers, budgets, rows.loc[rows['set'] == name, 'drawn'].abs().max() or 1.0)
    axes.set(title=f'{name} {variant}'.strip(), xlabel='teacher’s training tokens', ylabel='teacher (weakest below)')
    figure.colorbar(image, ax=axes, shrink=0.9).set_label(_broken(axis('bits_per_byte')), fontsize=9)
  return figure


def _heat(axes, rows: pd.DataFrame, teachers: list[str], budgets: list[float], limit: float):
  """A cell says its estimate, interval, verdict and alpha; one that was not run says that."""
  values = np.full((len(teachers), len(budgets)), np.nan)
  image = axes.imshow(values, cmap='RdBu_r', vmin=-limit, vmax=limit, origin='lower', aspect='auto')
  axes.set_facecolor('#eeeeee')
  for row in _each(rows):
    y, x = teachers.index(row.teacher), budgets.index(row.at)
    values[y, x] = row.drawn
    text = f'{row.drawn:+.4f} {VERDICT_MARKS.get(row.verdict, "")}\n[{row.drawn_low:+.3f}, {row.drawn_high:+.3f}]\n{row.verdict}, {label("", row.alpha, row.validated)[2:]}'
    axes.text(x, y, text, ha='center', va='center', fontsize=7.5, color=_on(image.to_rgba(row.drawn)))
  for y, x in zip(*np.nonzero(np.isnan(values)), strict=True):
    axes.text(x, y, 'not run', ha='center', va='center', fontsize=7.5, color='#666666')
  image.set_data(values)
  axes.set_xticks(range(len(budgets)), [count(tokens) for tokens in budgets])
  axes.set_yticks(range(len(teachers)), teachers)
  return image


# (c) alpha curves


def _select_alpha(rows: pd.DataFrame) -> pd.DataFrame:
  distilled = _plain(rows)
  unigram = rows[(rows['arm'] == 'unigram') & ~rows['validated']] if len(distilled) else rows[:0]
  return _placed(_two_sets(pd.concat([_ordered(distilled), unigram])), 'alpha')


def _draw_alpha(rows: pd.DataFrame) -> matplotlib.figure.Figure:
  teachers = _teachers(rows)
  mine = rows[rows['teacher'] != '']
  uses = sorted(set(zip(mine['teacher_tokens'], mine['variant'], strict=True)))
  figure = matplotlib.figure.Figure(figsize=(max(3.1 * len(teachers) + 1.8, 8), 7), layout='constrained')
  grid = figure.subplots(2, len(teachers), squeeze=False, sharex=True, sharey='row')
  for name, line in zip(SETS, grid, strict=True):
    for teacher, axes in zip(teachers, line, strict=True):
      _curves(axes, rows[rows['set'] == name], teacher, uses)
      axes.set_title(f'{teacher} · {name}', fontsize=10)
      axes.set_xticks(sorted({0.0, *rows['at']}))
      axes.tick_params(axis='x', labelsize=8)
      _zero(axes, 'y')
    line[0].set_ylabel(_broken(axis('bits_per_byte')))
    line[0].set_ylim(_limits(rows[rows['set'] == name]))
  for axes in grid[-1]:
    axes.set_xlabel('alpha (0: LM-only)')
  style = lambda i: {'linestyle': _pick(DASHES, i), 'marker': _pick(MARKERS, i), 'markersize': 4}
  handles = [_handle(f'{count(use[0])} {use[1]}'.strip(), color='#555555', **style(i)) for i, use in enumerate(uses)]
  best = _handle('large, hollow: validated α,\nfresh seeds', color='black', marker='o', linestyle='none', **BEST)
  return _legend(figure, [*handles, best, _handle('unigram (no teacher)', **UNIGRAM)], 'teacher’s tokens')


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
    _say(axes, 'not scored')
    return
  control = rows[rows['arm'] == 'unigram'].sort_values('at')
  if len(control):
    _errorbars(axes, control['at'], control, alpha=0.6, **UNIGRAM)
  for i, (tokens, variant) in enumerate(uses):
    of = (rows['teacher'] == teacher) & (rows['teacher_tokens'] == tokens) & (rows['variant'] == variant)
    mine = rows[of].sort_values('at')
    if mine.empty:
      continue
    curve, best = mine[~mine['validated']], mine[mine['validated']]
    shift, colour = (
      min(0.016, 0.06 / len(uses)) * (i - (len(uses) - 1) / 2),
      _shade(mine['colour'].iloc[0], i, len(uses)),
    )
    style = {'color': colour, 'marker': _pick(MARKERS, i), 'linewidth': 1.3}
    if len(curve):  # from the baseline itself, which is 0 at alpha 0
      _errorbars(axes, curve['at'] + shift, curve, markersize=4, linestyle=_pick(DASHES, i), **style)
      start = [0, curve['at'].iloc[0] + shift], [0, curve['drawn'].iloc[0]]
      axes.plot(*start, color=colour, linestyle=_pick(DASHES, i), linewidth=1.3)
    if len(best):
      _errorbars(axes, best['at'] + shift, best, **style, **BEST)


# (d) in-domain, OOD and downstream gains


def _select_sets(rows: pd.DataFrame) -> pd.DataFrame:
  """Each teacher's own rows under its label, with the unigram control of the same alpha beside; the tuned baseline under its own."""
  measures = rows[rows['measure'].isin([*FITTED, *FITTED.values()])]
  own = chosen(measures)
  own = own.assign(at=labels_of(own))
  parts = [own]
  unigram = measures[measures['arm'] == 'unigram']
  for row in _each(own.drop_duplicates('at')):
    same = (unigram['alpha'] == row.alpha) & (unigram['validated'] == row.validated)
    parts.append(unigram[same].assign(at=row.at))
  if len(own):
    parts.append(measures[measures['arm'] == 'tuned'].assign(at='LM-only, tuned'))
  out = pd.concat(parts)
  order = {name: i for i, name in enumerate(ordered_sets(out))}
  return _placed(out).sort_values('set', key=lambda names: names.map(order), kind='stable')


def _draw_sets(rows: pd.DataFrame) -> matplotlib.figure.Figure:
  names, labels = ordered_sets(rows), list(dict.fromkeys(rows['at']))
  rows = rows.assign(hollow=rows['measure'].isin(FITTED.values()))
  rows = rows.assign(
    slot=2 * (rows['arm'] == 'unigram') + rows['hollow'], marker=rows['marker'].where(rows['arm'] != 'tuned', 'X')
  )
  figure, panels = _forests(len(names), len(labels), 0.44)
  for axes, name in zip(panels, names, strict=True):
    mine = rows[rows['set'] == name]
    _forest(axes, mine, labels, 4)
    measure = next((measure for measure in FITTED if (mine['measure'] == measure).any()), 'bits_per_byte')
    axes.set(title=name, xlabel=axis(measure))
  handles = [
    _handle('teacher (its colour): T = 1;\ntasks: raw log-likelihood', color='#555555', marker='o', linestyle='none'),
    _handle('the same at fitted T;\ntasks: per byte', color='#555555', marker='o', linestyle='none', mfc='white'),
    _handle('unigram at the same α, T = 1', color=COLOURS['unigram'], marker='>', linestyle='none'),
    _handle('unigram at fitted T', color=COLOURS['unigram'], marker='>', linestyle='none', mfc='white'),
  ]
  if (rows['arm'] == 'tuned').any():
    handles.append(_handle('LM-only, tuned', color=COLOURS['tuned'], marker='X', linestyle='none'))
  return _legend(figure, handles)


def ordered_sets(rows: pd.DataFrame) -> list[str]:
  """In-domain, the OOD sets, their mean, the tasks."""
  order = {'in-domain': 0, 'OOD': 1, 'OOD mean': 2, 'downstream': 3}
  known = rows[['set', 'group']].drop_duplicates()
  return [name for _, name in sorted((order.get(group, 4), name) for name, group in known.itertuples(index=False))]


# (e) entropy change against perplexity change


def _select_entropy(rows: pd.DataFrame) -> pd.DataFrame:
  arms = rows[(rows['scenario'] == '') | (rows['arm'] == 'flop_matched')]
  bits = _placed(_two_sets(arms))
  entropy = arms[arms['measure'] == 'entropy'].set_index(KEYS)[['estimate', 'low', 'high']]
  places = entropy.rename(columns={'estimate': 'at', 'low': 'at_low', 'high': 'at_high'})
  return bits.drop(columns=list(places)).join(places, on=KEYS, how='inner', validate='one_to_one')


def _draw_entropy(rows: pd.DataFrame) -> matplotlib.figure.Figure:
  figure, panels = _panels(rows, height=5.2)
  rows = rows.assign(
    marker=rows['arm'].map(ARMS), colour=rows['colour'].where(rows['arm'] == 'distilled', rows['arm'].map(COLOURS))
  )
  for axes, name in panels:
    mine = rows[rows['set'] == name]
    axes.errorbar(
      mine['at'], mine['drawn'], xerr=_arms(mine, 'at'), yerr=_arms(mine, 'drawn'), fmt='none', ecolor=list(mine['colour']), alpha=0.25, linewidth=0.8
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
    _zero(axes, 'y')
    _zero(axes, 'x')
    axes.set(title=name, xlabel='entropy, nats per token, less the LM-only student’s\n(right of 0: less sure)')
    axes.set_ylabel('log2 perplexity per byte = ' + axis('bits_per_byte'))
  handles = [_handle(row.teacher, color=row.colour, marker='o', linestyle='none') for row in _by_teacher(rows)]
  names = {'unigram': 'unigram (no teacher)', 'tuned': 'LM-only, tuned', 'flop_matched': 'LM-only, FLOP-matched'}
  handles += [
    _handle(text, color=COLOURS[arm], marker=ARMS[arm], linestyle='none')
    for arm, text in names.items()
    if (rows['arm'] == arm).any()
  ]
  handles.append(_handle('black edge: validated α', color='white', mec='black', marker='o', linestyle='none'))
  handles.append(_handle('larger: higher α', color='none'))
  return _legend(figure, handles)


# (f) gain per teacher FLOP, and the frontier


def _select_flops(rows: pd.DataFrame) -> pd.DataFrame:
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


def _draw_flops(rows: pd.DataFrame) -> matplotlib.figure.Figure:
  own = rows[rows['arm'] == 'distilled']
  labels = list(dict.fromkeys(labels_of(own)))
  tall = 0.3 * len(labels) + 1.4
  figure = matplotlib.figure.Figure(figsize=(14, 2 * tall + 10.5), layout='constrained')
  grid = figure.subplots(4, 2, height_ratios=(tall, tall, 4.2, 4.2))
  for lines, counted in zip(((0, 2), (1, 3)), COUNTED, strict=True):
    for column, name in enumerate(SETS):
      mine = rows[(rows['counted'] == counted) & (rows['set'] == name)]
      if mine.empty:
        for line in lines:
          _say(grid[line, column], f'{name}: not scored')
        continue
      _per_flop(grid[lines[0], column], mine[mine['arm'] == 'distilled'], labels, own)
      if column:  # the labels stand once a line
        grid[lines[0], column].tick_params(axis='y', labelleft=False)
      grid[lines[0], column].set_title(f'{name}: gain per teacher FLOP,\ncounting {COUNTED[counted]}', fontsize=10)
      _frontier(grid[lines[1], column], mine)
      grid[lines[1], column].set_title(f'{name}: frontier,\ncounting {COUNTED[counted]}', fontsize=10)
  handles = [_handle(row.teacher, color=row.colour, marker=row.marker, linestyle='none') for row in _by_teacher(rows)]
  handles.append(_handle('larger: more teacher tokens', color='none'))
  handles.append(
    _handle('LM-only, the same\nstudent on more tokens', color='black', marker='s', markersize=4, linewidth=0.8)
  )
  handles.append(_handle('frontier: least bits\nper byte up to there', color='black', linewidth=1.5, alpha=0.35))
  return _legend(figure, handles)


def _per_flop(axes, rows: pd.DataFrame, labels: list[str], all_rows: pd.DataFrame) -> None:
  """The numbers are printed too: teachers differ in FLOPs by orders of magnitude, and their gains hardly."""
  unit = 10 ** round(float(np.log10(all_rows['teacher_flops'].median())))
  at = labels_of(rows)
  scaled = rows.assign(
    at=at, slot=0, hollow=False, **{f'drawn{end}': rows[f'per_flop{end}'] * unit for end in ('', '_low', '_high')}
  )
  _forest(axes, scaled, labels, 1)
  for row in _each(scaled):
    axes.annotate(
      f'{row.drawn:+.3g}',
      (1.01, labels.index(row.at)),
      xycoords=('axes fraction', 'data'),
      va='center',
      fontsize=8,
      annotation_clip=False,
    )
  axes.set_xlabel(axis('bits_per_byte', f' per {unit:.0e} teacher FLOPs'.replace('e+', 'e')), fontsize=9)


def _frontier(axes, rows: pd.DataFrame) -> None:
  """Gain against all FLOPs: of the student and of what is counted of its teacher."""
  own, matched = rows[rows['arm'] == 'distilled'], rows[rows['arm'] == 'flop_matched']
  start = own['student_flops'].iloc[0]
  plain = pd.DataFrame({'at': [start], 'drawn': [0.0]})
  step = frontier(pd.concat([rows[['at', 'drawn']], plain]))
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
  _errorbars(axes, matched['at'], matched, color='black', marker='s', markersize=3, capsize=0, linestyle='none')
  budgets = sorted(set(own['teacher_tokens']))
  for (colour, marker, tokens), part in own.groupby(['colour', 'marker', 'teacher_tokens'], sort=False):
    size = 4.5 + 4.5 * (budgets.index(tokens) + 1) / len(budgets)
    _errorbars(axes, part['at'], part, color=colour, marker=marker, markersize=size, linestyle='none', zorder=4)
  axes.set_xscale('log')
  axes.xaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
  axes.xaxis.set_major_formatter(lambda value, _: f'{value:.3g}'.replace('e+', 'e'))
  axes.minorticks_off()
  _zero(axes, 'y')
  axes.set_xlabel('total FLOPs, of student and teacher (log scale)')
  axes.set_ylabel(axis('bits_per_byte'))


def frontier(points: pd.DataFrame) -> pd.DataFrame:
  """The points (at, drawn) that no cheaper, or equally cheap, point is below."""
  ordered = points.sort_values(['at', 'drawn'], kind='stable')
  best = ordered['drawn'].cummin().shift(fill_value=np.inf)
  return ordered[ordered['drawn'] < best]


# (g) equal tokens against equal FLOPs


def _select_equal(rows: pd.DataFrame) -> pd.DataFrame:
  """Nothing where no student was compared at equal FLOPs: the equal-token half alone is figure (d)."""
  matched = rows[(rows['arm'] == 'distilled') & (rows['scenario'] != '')]
  both = pd.concat([chosen(rows), _ordered(matched)] if len(matched) else [rows[:0]])
  return _placed(_two_sets(both.assign(at=labels_of(both))))


def _draw_equal(rows: pd.DataFrame) -> matplotlib.figure.Figure:
  labels, scenarios = list(dict.fromkeys(rows['at'])), [s for s in SCENARIOS if (rows['scenario'] == s).any()]
  rows = rows.assign(
    slot=rows['scenario'].map(scenarios.index), marker=rows['scenario'].map(SCENARIOS), hollow=rows['scenario'] != ''
  )
  figure, panels = _forests(2, len(labels), 0.16 * len(scenarios) + 0.1, columns=2, wide=6.5)
  for axes, name in _scored(rows, zip(panels, SETS, strict=True)):
    mine = rows[rows['set'] == name]
    _forest(axes, mine, labels, len(scenarios))
    axes.set(
      title=name,
      xlabel='bits per byte, less that of the LM-only student\nof equal tokens or equal FLOPs (below 0: better)',
    )
  text = lambda s: (
    'LM-only at equal tokens' if not s else f'LM-only at equal FLOPs,\ncounting {s.replace("+", " and ")}'
  )
  handles = [
    _handle(text(s), color='#555555', marker=SCENARIOS[s], linestyle='none', mfc='white' if s else None)
    for s in scenarios
  ]
  return _legend(figure, handles, 'less the baseline:')


FIGURES = {
  'gain_vs_teacher': Figure(
    'Gain against the teacher’s strength',
    'One line an alpha; the line at 0 is the LM-only student of the same tokens and seeds. Markers of one teacher stand a little apart to be seen.',
    'no distilled arm has been scored in-domain or on an OOD set',
    _select_strength,
    _draw_strength,
    ('weak_helps', 'size_reverses'),
  ),
  'size_by_budget': Figure(
    'Teacher size by teacher budget',
    '✓ better, ✗ worse, ○ unresolved: the interval holds 0. Blue is better than the LM-only student.',
    'no distilled arm has been scored in-domain or on an OOD set',
    _select_heat,
    _draw_heat,
    ('size_reverses', 'budget_reverses'),
    True,
  ),
  'alpha_curves': Figure(
    'Alpha curves of each teacher',
    'Lines: the declared alphas. Large hollow markers: the alpha that the pilot chose on the validation split, trained again with fresh seeds. The unigram control is cut off where it is far from all teachers.',
    'no distilled arm has been scored in-domain or on an OOD set',
    _select_alpha,
    _draw_alpha,
  ),
  'gains_by_set': Figure(
    'In-domain, OOD and downstream gains',
    'Hollow: at each model’s fitted evaluation temperature, which takes out over-confidence; a gain that the unigram control has too needs no teacher.',
    'no distilled arm has been scored',
    _select_sets,
    _draw_sets,
    ('ood_more', 'more_than_calibration', 'beats_tuned'),
    True,
  ),
  'entropy_vs_perplexity': Figure(
    'Change of entropy against change of perplexity',
    'One point an arm. Below 0: better likelihood than the LM-only student; right of 0: a less certain model.',
    'no arm has both its likelihood and its entropy scored in-domain or on an OOD set',
    _select_entropy,
    _draw_entropy,
  ),
  'gain_per_flop': Figure(
    'Gain per teacher FLOP, and the frontier of gain against total FLOPs',
    'The frontier is of the estimates: it holds no uncertainty, and the best of several is a little too good.',
    'no distilled arm has been scored in-domain or on an OOD set',
    _select_flops,
    _draw_flops,
    ('reversal_at_equal_flops',),
    True,
  ),
  'equal_flops': Figure(
    'Equal tokens against equal FLOPs',
    'The same students, less LM-only students of equal tokens, and of equal total FLOPs: those got, as tokens, the FLOPs of the teacher’s forward passes (logits), of its training (pretraining), or both.',
    'no students were compared at equal FLOPs: the grid needs controls.flop_matched, a pilot, and both finished',
    _select_equal,
    _draw_equal,
    ('reversal_at_equal_flops',),
    True,
  ),
}


# Rows


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


def _teachers(rows: pd.DataFrame) -> list[str]:
  return [row.teacher for row in _by_teacher(rows)]


def _each(rows: pd.DataFrame) -> Iterator[Any]:
  return rows.itertuples()


def _by_teacher(rows: pd.DataFrame) -> list:
  distilled = rows[rows['arm'] == 'distilled'].sort_values('teacher_params', kind='stable')
  return list(_each(distilled.drop_duplicates('teacher')))


def of_setting(contrasts: pd.DataFrame, setting: str) -> pd.DataFrame:
  if contrasts.empty:
    return contrasts
  return contrasts[[setting_name(*row) == setting for row in contrasts[SETTING].itertuples(index=False)]]


def setting_name(student: str, tokens: float, distinct: float) -> str:
  return f'{student}, {count(tokens)} tokens' + (
    f' of {count(distinct)} distinct' if distinct and distinct == distinct else ''
  )


def _variant(row) -> str:
  """How a teacher's targets are used, where that is not plainly: iso-data, annealed, T = 1, all logits, normalised."""
  parts = [row.budget] * (row.budget == 'trunk') + [row.teacher_data] * (row.teacher_data == 'disjoint')
  parts += [f'T{row.temperature:g}'] * (row.temperature == row.temperature and row.temperature != 1)
  parts += [f'k{row.top_k:g}'] * (row.top_k == row.top_k and row.top_k != 0)
  return ' '.join(parts + [row.mixing] * (row.mixing not in ('', 'normalised')))


def _pick(values: Sequence, i: int | None):
  return None if i is None else values[i % len(values)]


def _range(values: Iterable[float]) -> str:
  known = sorted({int(value) for value in values})
  return '' if not known else str(known[0]) if known[0] == known[-1] else f'{known[0]}-{known[-1]}'


# Ink


def _panels(rows: pd.DataFrame, height: float):
  """The figure, and the (axes, set) of a panel for each set that was scored; the other's panel says that it was not."""
  figure = matplotlib.figure.Figure(figsize=(6 * len(SETS) + 1.8, height + 1.4), layout='constrained')
  panels = list(zip(figure.subplots(1, len(SETS)), SETS, strict=True))
  return figure, _scored(rows, panels)


def _scored(rows: pd.DataFrame, panels: Iterable[tuple[Any, str]]) -> list[tuple[Any, str]]:
  kept = []
  for axes, name in panels:
    if (rows['set'] == name).any():
      kept.append((axes, name))
    else:
      _say(axes, f'{name}: not scored')
  return kept


def _forests(n: int, n_labels: int, row: float, columns: int = 3, wide: float = 4.4):
  lines = -(-n // columns)
  figure = matplotlib.figure.Figure(
    figsize=(wide * min(n, columns) + 2.4, lines * (row * n_labels + 1.1) + 1.6), layout='constrained'
  )
  grid = figure.subplots(lines, min(n, columns), squeeze=False, sharey=True)
  for axes in grid.flat[n:]:
    axes.set_visible(False)
  return figure, grid.flat[:n]


def _forest(axes, rows: pd.DataFrame, labels: list[str], n_slots: int) -> None:
  """Rows at their labels' heights; within a row the slots one below the other."""
  rows = rows.assign(height=rows['at'].map(labels.index) + (rows['slot'] - (n_slots - 1) / 2) * 0.7 / n_slots)
  for (colour, marker, hollow), part in rows.groupby(['colour', 'marker', 'hollow'], sort=False):
    face = 'white' if hollow else colour
    _errorbars(axes, part['height'], part, sideways=True, color=colour, marker=marker, markersize=5, mfc=face)
  axes.set_yticks(range(len(labels)), labels, fontsize=8.5)
  axes.set_ylim(len(labels) - 0.4, -0.6)
  for place in range(1, len(labels)):
    axes.axhline(place - 0.5, color='#dddddd', linewidth=0.6, zorder=0)
  axes.locator_params(axis='x', nbins=6)
  _zero(axes, 'x')


def _errorbars(axes, at, rows: pd.DataFrame, sideways: bool = False, **style: Any) -> None:
  """Points with their intervals; a whisker that has no end is not drawn."""
  style = {'capsize': 2, 'elinewidth': 0.9, 'linestyle': 'none'} | style
  if sideways:
    axes.errorbar(rows['drawn'], at, xerr=_arms(rows, 'drawn'), **style)
  else:
    axes.errorbar(at, rows['drawn'], yerr=_arms(rows, 'drawn'), **style)


def _arms(rows: pd.DataFrame, name: str) -> np.ndarray:
  lengths = np.stack([rows[name] - rows[f'{name}_low'], rows[f'{name}_high'] - rows[name]]).astype(float)
  return np.where(np.isfinite(lengths), lengths, np.nan)


def _handle(text: str, **style) -> matplotlib.lines.Line2D:
  return matplotlib.lines.Line2D([], [], label=text, **style)


def _legend(figure: matplotlib.figure.Figure, handles: list, title: str | None = None) -> matplotlib.figure.Figure:
  legend = figure.legend(handles=handles, loc='outside right upper', frameon=False, fontsize=9, title=title)
  legend.set_alignment('left')
  return figure


def _zero(axes, which: str) -> None:
  line = axes.axhline if which == 'y' else axes.axvline
  line(0, color=COLOURS['tuned'], linewidth=1, zorder=1)
  axes.grid(alpha=0.25, axis=which)


def _shade(colour: str, i: int, n: int) -> tuple[float, float, float]:
  """A teacher's colour, paler for the smaller of its n budgets."""
  white = 0.45 * (n - 1 - i) / max(n - 1, 1)
  return tuple(white + (1 - white) * x for x in matplotlib.colors.to_rgb(colour))  # type: ignore[return-value]


def _dark(colour: str) -> tuple[float, float, float]:
  """For small text: pale colours are hard to read on white."""
  return tuple(0.65 * x for x in matplotlib.colors.to_rgb(colour))  # type: ignore[return-value]


def _on(colour) -> str:
  """The text colour that is read best on a background (WCAG's relative luminance)."""
  linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in colour[:3]]
  return 'black' if float(np.dot(linear, (0.2126, 0.7152, 0.0722))) > 0.18 else 'white'


def _say(axes, text: str) -> None:
  axes.tick_params(bottom=False, left=False, labelbottom=False, labelleft=False)
  axes.text(
    0.5, 0.5, '\n'.join(textwrap.wrap(text, 44)), ha='center', va='center', transform=axes.transAxes, color='#555555'
  )


def _empty(text: str) -> matplotlib.figure.Figure:
  figure = matplotlib.figure.Figure(figsize=(7, 2.2), layout='constrained')
  axes = figure.subplots()
  axes.set_axis_off()
  axes.text(0.5, 0.5, '\n'.join(textwrap.wrap(text, 80)), ha='center', va='center', color='#333333')
  return figure


def _save(figure: matplotlib.figure.Figure, path: pathlib.Path) -> pathlib.Path:
  """The same bytes for the same numbers: no date, no random ids."""
  temporary = path.with_suffix(f'.tmp{path.suffix}')
  with matplotlib.rc_context({'svg.hashsalt': 'kdjax'}):
    figure.savefig(temporary, dpi=130, metadata={'Date': None} if path.suffix == '.svg' else {'Software': None})
  os.replace(temporary, path)
  return path
