"""The report as one HTML file that needs no network: contrasts first, then the figures and every effect, both behind the same filters.

The table of effects is embedded once, as columns; plain JavaScript (page.js) draws from it, by the same rules as kdjax/analysis/grid/table_rows.py (each
figure's element says how many rows it drew and their sum, which a test holds against `gridfigures.drawn`). The filters' state is the URL's
hash, so a view can be sent as a link: report.html#teacher=tiny-0.1m&set=code.
"""

import html
import json
import math
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd
from plotly import offline

from kdjax.analysis.grid import figures, flopplots, plots, table_rows
from kdjax.analysis.grid.contrasts import NOT_TESTED
from kdjax.storage import paths
from kdjax.sweeps.names import format_exact_count

DIGITS = 9  # significant, of the embedded numbers
CONFIGURED = ('alpha', 'temperature', 'top_k')  # values may differ in any digit
DERIVED = [
  'setting',
  'variant',
  'source',
  'strength',
  'colour',
  'marker',
  'budget_name',
]  # columns that are not the table's own
SYMBOLS = {
  'o': 'circle',
  's': 'square',
  '^': 'triangle-up',
  'D': 'diamond',
  'v': 'triangle-down',
  'P': 'cross',
  'X': 'x',
  'p': 'pentagon',
  '>': 'triangle-right',
}
DASHES = ('solid', 'dash', 'dot', 'dashdot', 'longdash', 'longdashdot')
ARMS = {
  'distilled': 'a student that learned from a teacher (or, where the scenario is not empty, that student less an LM-only one of equal FLOPs)',
  'unigram': 'control: the teacher is no model but the training tokens’ frequencies',
  'tuned': 'control: an LM-only student whose stopping point, learning rate and weight decay were chosen on the validation split with as many draws',
  'flop_matched': 'control: an LM-only student that spent the teacher’s FLOPs named by the scenario on more tokens',
  'equal_compute': 'a student of a cheaper teacher on more tokens: the pair has the same total cost as the pair with the largest teacher',
}
LEGEND = {
  'LM-only': 'the baseline: the same student trained on the text alone (alpha 0), with the same seeds, batches and tokens; every difference is less this, unless a scenario says otherwise',
  'alpha (α)': 'the weight of distillation in the loss: (1 - α) · LM + α · KD',
  'validated': 'α was chosen by the pilot on a validation split that is no test set, then trained again with fresh seeds; the other rows are of the declared α, all of them',
  'teacher budget': 'tokens that the teacher was trained on; annealed: a run of its own with its learning rate decayed; trunk: a checkpoint of a longer run',
  'T': 'evaluation temperature; fitted T: each model’s own best, fitted on documents that are not scored, which takes out over- and under-confidence',
  'OOD': 'out of domain; OOD mean: the plain mean over the OOD sets',
  'bits per byte': 'log2 perplexity per byte of text; below 0 in a difference: better',
  'ECE': 'expected calibration error, 15 bins',
  'entropy': 'of the model’s predictions, nats per token; neither better nor worse',
  'top1': 'share of tokens whose likeliest prediction was right',
  'difficulty_1 ... difficulty_5': 'nats per token of the commonest fifth of the training text’s tokens, ..., of the rarest',
  'accuracy': 'of a downstream task’s items, by raw log-likelihood; accuracy_norm: by log-likelihood per byte',
  'verdict': 'only primary contrasts have one. better or worse: the interval excludes 0; unresolved: it contains 0, or fewer than three seeds were run; exploratory: not corrected, so no verdict; not tested: a run is missing',
  'level': 'of a contrast’s interval: 1 - 0.05/m for a primary contrast, with m primary tests in the grid; 0.95 for an exploratory one',
  'interval': '95% unless a level is given; over seeds and documents: holds for other seeds and other documents of the set; over documents: only for these seeds',
  'MDE': 'minimum detectable effect: the true difference that a grid of this size resolves 4 times in 5, at the row’s level; its own 95% interval in brackets',
  'p': 'two-sided, for one row, uncorrected',
  'scenario': 'which of the teacher’s FLOPs the LM-only student spent on more tokens: logits (its forward passes over the student’s tokens), pretraining (its own training), or both',
  'iso, disjoint': 'the teacher was trained on the student’s documents, or on others',
  'k, mixing': 'k0.05: the teacher’s likeliest 5% of the vocabulary only; a mixing other than normalised: CE + α KD, or (1 - α) CE + KD',
  'seeds, cells': 'the seeds averaged over, and the runs’ ids: folders under cells/ of the grid',
  'baseline, value': 'what the LM-only student and the arm had themselves; estimate is value less baseline, paired by seed and document',
  'n_seeds, n_documents': 'how many stand behind the estimate; a task’s documents are its items',
  'student_params, teacher_params': 'parameters outside the embedding',
  'student_flops, logits_flops, pretraining_flops': 'of one seed: the student’s whole training; the teacher’s forward passes over the student’s tokens; the teacher’s own training',
  'draw': 'of a tuned arm: its stopping point, learning rate and weight decay, as multiples of the baseline’s',
  'df, error': 'degrees of freedom and standard error behind the interval',
  **{f'arm: {name}': text for name, text in ARMS.items()},
}  # fmt: skip


def write_page(
  effects: pd.DataFrame,
  contrasts: pd.DataFrame,
  figures_note: Mapping[str, str] | str,
  facts: Mapping[str, Any],
  path: paths.Path,
) -> None:
  """The page.

  Args:
    effects, contrasts: the tables of kdjax/analysis/grid/effects.py.
    figures_note: printed under every figure; or one text a figure, by its name in gridfigures.FIGURES.
    facts: of the grid: name, scale, data, commit, versions, run counts, ...; `warnings`, a list, is shown above all else.
  """
  title = f'{facts.get("name", "grid")}: what distillation gained'
  body = [
    f'<header><h1>{_text(title)}</h1>{_nav()}</header>',
    _warnings(facts.get('warnings') or ()),
    _facts(facts),
    f'<section id="contrasts"><h2>Declared contrasts</h2>{contrast_table(contrasts)}</section>',
    FIGURE_SECTION,
    TABLE_SECTION,
    f'<section id="legend"><h2>Legend</h2><dl class="legend">{_terms(LEGEND)}</dl></section>',
  ]
  data = json.dumps(
    payload(effects, contrasts, figures_note), allow_nan=False, ensure_ascii=False, separators=(',', ':')
  ).replace('<', r'\u003c')  # '</script>' would end the element, and '<!--' change how its end is found
  page = [
    '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">',
    f'<link rel="icon" href="data:,"><title>{_text(title)}</title><style>{_own("page.css")}</style></head><body><main>',
    *body,
    '<noscript><p>Figures and the table of effects need JavaScript; the contrasts above do not.</p></noscript></main>',
    f'<script type="application/json" id="data">{data}</script>',
    f'<script>{offline.get_plotlyjs()}</script><script>{_own("page.js")}</script></body></html>',
  ]
  paths.write_text(path, '\n'.join(page))


def payload(
  effects: pd.DataFrame, contrasts: pd.DataFrame, figures_note: Mapping[str, str] | str = ''
) -> dict[str, Any]:
  """What the page embeds: the effects as columns, the figures' words, the filters' options."""
  table = table_rows.labelled(effects)
  budgets = zip(table['teacher'], table['teacher_tokens'], table['budget'], strict=True)
  table['budget_name'] = [
    f'{format_exact_count(tokens)} {budget}'.strip() if teacher else 'none' for teacher, tokens, budget in budgets
  ]
  table['marker'] = table['marker'].map(SYMBOLS)
  known = list(table['setting'].unique())
  notes = figures_note if isinstance(figures_note, Mapping) else dict.fromkeys(figures.FIGURES, figures_note)
  return {
    'columns': [column for column in table if column not in DERIVED],
    'effects': {column: _packed(table[column], whole=column in CONFIGURED) for column in table},
    'figures': {
      name: {
        'title': spec.title,
        'how': spec.how,
        'needs': spec.needs,
        'note': notes.get(name, ''),
        'alpha': [figures.UNVALIDATED, figures.VALIDATED] if spec.one_alpha else [],
        'contrasts': {s: figures.quote_contrasts(table_rows.of_setting(contrasts, s), spec.contrasts) for s in known},
      }
      for name, spec in figures.FIGURES.items()
    },
    'units': {
      measure: [unit, table_rows.SENSE.get(measure, ' (below 0: better)').strip()]
      for measure, unit in table_rows.UNITS.items()
    },
    'sets': list(table_rows.SETS),
    'fitted': table_rows.FITTED,
    'difficulty': table_rows.DIFFICULTY,
    'scenarios': {scenario: SYMBOLS[marker] for scenario, marker in flopplots.SCENARIOS.items()},
    'counted': table_rows.COUNTED,
    'arms': {arm: [SYMBOLS[marker], table_rows.COLOURS.get(arm, '')] for arm, marker in plots.ARMS.items()},
    'symbols': list(SYMBOLS.values()),
    'dashes': DASHES,
    'alphas': {_format_for_js(alpha): plots.alpha_colour(alpha) for alpha in sorted(set(table['alpha'].dropna()))},
    'options': _options(table),
  }


def contrast_table(contrasts: pd.DataFrame) -> str:
  """Format the contrasts as HTML, primary ones first; a verdict is a word and a colour."""
  if contrasts.empty:
    return '<p>No contrasts were declared.</p>'
  several = len(contrasts[table_rows.SETTING].drop_duplicates()) > 1
  head = ['question', 'tested on', 'verdict', 'estimate', 'interval', 'level', 'unit', 'MDE', 'interval over']
  ordered = contrasts.sort_values('primary', ascending=False, kind='stable')
  lines = [_contrast(row, several) for row in ordered.itertuples()]
  caption = (
    'Estimates are the first arm minus the second; in bits per byte, below 0 is better. Only primary contrasts have verdicts; their intervals and MDE '
    'are at a level corrected for all of them. The others are exploratory. MDE: the true difference that is resolved 4 times in 5.'
  )
  cells = ''.join(f'<th scope="col">{_text(name)}</th>' for name in head)
  return f'<div class="box"><table class="contrasts"><thead><tr>{cells}</tr></thead><tbody>{"".join(lines)}</tbody></table></div><p class="how">{caption}</p>'


def _contrast(row, several: bool) -> str:
  tested = row.verdict != NOT_TESTED
  compared = f'<small><i>{_text(row.left)}</i> less <i>{_text(row.right)}</i></small>'
  student = (
    f'<small>student {_text(table_rows.setting_name(row.student, row.student_tokens, row.distinct_tokens))}</small>'
  )
  detail = f'<small>{_text(row.detail)}</small>' if row.detail else ''
  number = lambda text: f'<td class="n">{text if tested else ""}</td>'
  word = row.verdict.partition(':')[0].replace(' ', '-')
  cells = [
    f'<th scope="row">{_text(row.question)}{detail}<small>{_text(row.answer)}</small>{compared if tested else ""}{student if several else ""}</th>',
    f'<td>{_text(row.set)}</td>',
    f'<td><span class="verdict {_text(word)}">{_text(row.verdict)}</span></td>',
    number(f'{row.estimate:+.4f}'),
    number(f'[{row.low:+.4f}, {row.high:+.4f}]'),
    number(f'{row.level:.4g}'),
    f'<td>{_text(row.unit)}</td>',
    number(f'{row.mde:.4f}<br>[{row.mde_low:.4f}, {row.mde_high:.4f}]'),
    f'<td>{_over(row) if tested else ""}</td>',
  ]
  return f'<tr>{"".join(cells)}</tr>'


def _over(row) -> str:
  """Say what an interval covers: without 'seeds', it holds for these seeds only."""
  seeds = f'{row.n_seeds} {"seed" if row.n_seeds == 1 else "seeds"}'
  return (
    f'{seeds} and {row.n_documents} documents'
    if 'seeds' in row.over
    else f'{row.n_documents} documents, for {seeds} only'
  )


def _packed(column: pd.Series, whole: bool = False) -> dict[str, Any]:
  """Pack a column as {'values', 'index'} with each distinct value once, or as {'values'} if most are distinct.

  Infinities become 'inf' and '-inf', and nan becomes null. `whole` keeps every digit.
  """
  values = [_plain(value, 17 if whole else DIGITS) for value in column]
  distinct = list(dict.fromkeys(values))
  if len(distinct) > len(values) / 2:
    return {'values': values}
  place = {value: i for i, value in enumerate(distinct)}
  return {'values': distinct, 'index': [place[value] for value in values]}


def _plain(value: Any, digits: int) -> Any:
  """A JSON value, of the same kind in the page."""
  if isinstance(value, str):
    return value
  if hasattr(value, 'item'):
    value = value.item()
  if value is None or value is pd.NA or value != value:
    return None
  if isinstance(value, float):
    return (
      (float(f'{value:.{digits}g}') if math.isfinite(value) else str(value)) if not value.is_integer() else int(value)
    )
  return value


def _format_for_js(x: float) -> str:
  """Format a number from 1e-6 up as JavaScript's `String(x)` does: the page uses it as a key."""
  return np.format_float_positional(x, trim='-')


def _options(table: pd.DataFrame) -> dict[str, list[str]]:
  """Of each filter, in the order a reader expects."""
  unique = lambda column: [value for value in dict.fromkeys(column) if value != '']
  teachers = table.sort_values(['teacher_params', 'teacher_tokens'], kind='stable')
  known = {
    'student': unique(table['setting']),
    'teacher': unique(teachers['teacher']),
    'budget': unique(table[table['teacher'] != ''].sort_values('teacher_tokens', kind='stable')['budget_name']),
    'alpha': [_format_for_js(alpha) for alpha in sorted(set(table['alpha'].dropna()))],
    'set': table_rows.ordered_sets(table),
    'measure': [measure for measure in table_rows.UNITS if (table['measure'] == measure).any()],
    'arm': [arm for arm in ARMS if (table['arm'] == arm).any()],
  }
  if (table['teacher'] == '').any():
    known['teacher'].append('none')
    known['budget'].append('none')
  return known


def _warnings(warnings: Iterable[str]) -> str:
  items = ''.join(f'<li>{_text(warning)}</li>' for warning in warnings)
  return f'<section class="warnings" role="note"><h2>Read this first</h2><ul>{items}</ul></section>' if items else ''


def _facts(facts: Mapping[str, Any]) -> str:
  words = {
    name.replace('_', ' '): _said(value)
    for name, value in facts.items()
    if name != 'warnings' and value not in ('', None)
  }
  return f'<section><dl class="facts">{_terms(words)}</dl></section>'


def _said(value: Any) -> str:
  if isinstance(value, Mapping):
    return ', '.join(f'{name} {each}' for name, each in value.items())
  return ', '.join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _terms(words: Mapping[str, str]) -> str:
  return ''.join(f'<div><dt>{_text(name)}</dt><dd>{_text(text)}</dd></div>' for name, text in words.items())


def _nav() -> str:
  places = {'contrasts': 'Contrasts', 'figures': 'Figures', 'table': 'All effects', 'legend': 'Legend'}
  return (
    '<nav>' + ''.join(f'<a href="#{place}" data-goto="{place}">{name}</a>' for place, name in places.items()) + '</nav>'
  )


def _own(name: str) -> str:
  """A file beside this one."""
  return pathlib.Path(__file__).with_name(name).read_text(encoding='utf-8')


def _text(value: Any) -> str:
  return html.escape(str(value))


FIGURE_SECTION = """
<section id="figures"><h2>Figures</h2>
<form id="filters" aria-label="filters"></form>
<p class="how">The filters act on all figures and on the table below, and are kept in this page’s address. In figures, controls without a
teacher stay beside the teacher that is chosen. <button type="button" id="clear">Clear all filters</button></p>
<div id="plots"></div></section>"""

TABLE_SECTION = """
<section id="table"><h2>All effects</h2>
<p class="how"><output id="count"></output> pass the filters. Each row is one arm less its baseline, on one set and in one measure. A click on a column’s head
sorts by it. Download as CSV: <a id="csv" download="effects.csv" href="data:,">all rows</a>,
<a id="csv-shown" download="effects-shown.csv" href="data:,">the rows that pass the filters</a>.</p>
<div class="box tall"><table id="effects"><thead></thead><tbody></tbody></table></div>
<p><button type="button" id="more" hidden></button></p></section>"""
