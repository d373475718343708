"""The figures of a grid's report, as PNG and SVG.

A figure is a selection of rows (kdjax/analysis/grid/table_rows.py; `drawn` returns just these, so that a test can hold a figure against the table, and
kdjax/analysis/grid/page.py draws the same) and the function that puts them on paper (kdjax/analysis/grid/plots.py, flopplots.py). A teacher has one
colour and one marker in all of them, by size.
"""

import dataclasses
import logging
import textwrap
from collections.abc import Callable, Iterable, Sequence

import matplotlib.figure
import pandas as pd

from kdjax.analysis.grid import flopplots, ink, plots, table_rows
from kdjax.analysis.grid.contrasts import NOT_TESTED
from kdjax.storage import paths

log = logging.getLogger('kdjax')

VALIDATED = 'Each teacher at its validated alpha.'
UNVALIDATED = '* No alpha was validated for this teacher: the middle one of the declared is shown, whatever came of it.'


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


def write_all(effects: pd.DataFrame, contrasts: pd.DataFrame, folder: paths.Path, note: str) -> list[paths.Path]:
  """Each figure as .png and .svg; with several student settings one pair of files each, its name in the file's.

  Args:
    effects, contrasts: the tables of kdjax/analysis/grid/effects.py.
    note: printed on every figure, such as 'alpha not validated'.

  Returns: the files. A figure whose rows are absent says on its panel what is missing, and is logged.
  """
  folder.mkdir(parents=True, exist_ok=True)
  table = table_rows.labelled(effects)
  known = list(table['setting'].unique()) or ['']
  paths = []
  for setting in known:
    rows, mine = table[table['setting'] == setting], table_rows.of_setting(contrasts, setting)
    for name, spec in FIGURES.items():
      stem = name if len(known) == 1 else f'{name}-{slug(setting)}'
      figure = render(spec, spec.select(rows), mine, note, setting)
      paths += [ink.save(figure, folder / f'{stem}{suffix}') for suffix in ('.png', '.svg')]
  for line in list_missing(effects):
    log.warning('figure not drawn: %s', line)
  return paths


def select_rows(name: str, effects: pd.DataFrame) -> pd.DataFrame:
  """The numbers that figure `name` draws, of all student settings: rows of `effects`, under their own index, with their places."""
  table = table_rows.labelled(effects)
  return pd.concat(
    [FIGURES[name].select(table[table['setting'] == s]) for s in table['setting'].unique()]
    or [FIGURES[name].select(table)]
  )


def list_missing(effects: pd.DataFrame) -> list[str]:
  """What could not be drawn, and what it would need; one line a figure and setting."""
  table = table_rows.labelled(effects)
  return [
    f'{spec.title}{f" ({setting})" if setting else ""}: {spec.needs}'
    for setting in list(table['setting'].unique()) or ['']
    for spec in FIGURES.values()
    if spec.select(table[table['setting'] == setting]).empty
  ]


def alpha_words(spec: Figure, validated: Iterable[bool]) -> list[str]:
  """Which alpha a figure shows that has one a teacher."""
  known = set(map(bool, validated)) if spec.one_alpha else set()
  return [VALIDATED] * (True in known) + [UNVALIDATED] * (False in known)


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


def quote_contrasts(contrasts: pd.DataFrame, names: Sequence[str]) -> list[str]:
  """Return the declared contrasts that a figure relates to, with their verdicts."""
  lines = []
  for row in table_rows.each(contrasts) if len(contrasts) else ():
    if row.contrast in names and not row.detail:
      number = f'{row.verdict}, {row.estimate:+.3g} [{row.low:+.3g}, {row.high:+.3g}] at {row.level:.4g}, {row.unit}'
      lines.append(f'{row.question} ({row.set}) {row.answer if row.verdict == NOT_TESTED else number}')
  return lines


def slug(setting: str) -> str:
  return ''.join(c if c.isalnum() or c in '.-' else '-' for c in setting).replace('--', '-')


def render(
  spec: Figure, rows: pd.DataFrame, contrasts: pd.DataFrame, note: str, setting: str
) -> matplotlib.figure.Figure:
  """The figure with its title, note and caption; a small panel that says what is missing where there are no rows."""
  if rows.empty:
    figure = ink.empty(f'Not drawn: {spec.needs}')
    lines: list[str] = []
  else:
    figure = spec.draw(rows)
    lines = [
      spec.how,
      *alpha_words(spec, rows['validated']),
      evidence(rows),
      *quote_contrasts(contrasts, spec.contrasts),
    ]
  width = figure.get_figwidth()
  wrap = lambda text, size, room=0.0: '\n'.join(textwrap.wrap(text, int((width - room) * 125 / size)))
  heading = f'{spec.title}{f" · student {setting}" if setting else ""}'
  room = 2.7 if figure.legends else 0.3
  title = [wrap(heading, 11, room), *([wrap(f'Note: {note}', 11, room)] if note else [])]
  figure.suptitle('\n'.join(title), fontsize=11, x=0.01, ha='left')
  figure.supxlabel('\n'.join(wrap(line, 8) for line in lines), fontsize=8, x=0.01, ha='left', color='#333333')
  return figure


FIGURES = {
  'gain_vs_teacher': Figure(
    'Gain against the teacher’s strength',
    'One line an alpha; the line at 0 is the LM-only student of the same tokens and seeds. Markers of one teacher stand a little apart to be seen.',
    'no distilled arm has been scored in-domain or on an OOD set',
    table_rows.strength,
    plots.strength,
    ('weak_helps', 'size_reverses'),
  ),
  'size_by_budget': Figure(
    'Teacher size by teacher budget',
    'Each cell: the difference, its 95% interval, alpha. Blue is better than the LM-only student.',
    'no distilled arm has been scored in-domain or on an OOD set',
    table_rows.heat,
    plots.heat,
    ('size_reverses', 'budget_reverses'),
    True,
  ),
  'alpha_curves': Figure(
    'Alpha curves of each teacher',
    'Lines: the declared alphas. Large hollow markers: the alpha that the pilot chose on the validation split, trained again with fresh seeds. The unigram control is cut off where it is far from all teachers.',
    'no distilled arm has been scored in-domain or on an OOD set',
    table_rows.alphas,
    plots.alphas,
  ),
  'gains_by_set': Figure(
    'In-domain, OOD and downstream gains',
    'Hollow: at each model’s fitted evaluation temperature, which takes out over-confidence; a gain that the unigram control has too needs no teacher.',
    'no distilled arm has been scored',
    table_rows.sets,
    plots.sets,
    ('ood_more', 'more_than_calibration', 'beats_tuned'),
    True,
  ),
  'entropy_vs_perplexity': Figure(
    'Change of entropy against change of perplexity',
    'One point an arm. Below 0: better likelihood than the LM-only student; right of 0: a less certain model.',
    'no arm has both its likelihood and its entropy scored in-domain or on an OOD set',
    table_rows.entropy,
    plots.entropy,
  ),
  'gain_per_flop': Figure(
    'Gain per teacher FLOP, and the frontier of gain against total FLOPs',
    'The frontier is of the estimates: it holds no uncertainty, and the best of several is a little too good.',
    'no distilled arm has been scored in-domain or on an OOD set',
    table_rows.per_flop,
    flopplots.per_flop,
    ('reversal_at_equal_flops',),
    True,
  ),
  'equal_flops': Figure(
    'Equal tokens against equal FLOPs',
    'The same students, less LM-only students of equal tokens, and of equal total FLOPs: those got, as tokens, the FLOPs of the teacher’s forward passes (logits), of its training (pretraining), or both.',
    'no students were compared at equal FLOPs: the grid needs controls.flop_matched, a pilot, and both finished',
    table_rows.equal_flops,
    flopplots.equal_flops,
    ('reversal_at_equal_flops',),
    True,
  ),
  'gain_by_difficulty': Figure(
    'Gain by the difficulty of tokens',
    'Difficulty is a token’s frequency in the training text, the same for all models. A gain on common tokens alone, or one that the unigram control has too, is no knowledge of the text.',
    'no distilled arm has been scored by difficulty in-domain or on an OOD set',
    table_rows.difficulty,
    plots.difficulty,
    one_alpha=True,
  ),
}


def _range(values: Iterable[float]) -> str:
  known = sorted({int(value) for value in values})
  return '' if not known else str(known[0]) if known[0] == known[-1] else f'{known[0]}-{known[-1]}'
