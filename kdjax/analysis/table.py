"""The table at the end of a run: every model on every set, then the paired differences, from the result files alone."""

import dataclasses
import logging
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from kdjax.analysis.crossed import Effect, Paired, crossed_effect
from kdjax.data import fidelity
from kdjax.errors import UserError
from kdjax.runs.checksums import differ
from kdjax.runs.folder import RunFolder
from kdjax.scoring import job as jobs
from kdjax.scoring import results
from kdjax.scoring.text import TEMPERATURES
from kdjax.storage import paths
from kdjax.storage.paths import read_json, write_text
from kdjax.sweeps.config import OOD_MEAN

log = logging.getLogger('kdjax')

LN2 = math.log(2)
BASELINE = 'baseline'
CONTROLLED = ('data', 'tokenizer', 'init')  # fingerprints that arms of one comparison must share


@dataclasses.dataclass(frozen=True)
class Cell:
  """One model on one set. `per`: the column that bits are divided by; 'tokens' if the tokenizer loses or rewrites text."""

  documents: pd.DataFrame
  meta: dict
  per: str = 'bytes'

  @property
  def perplexity(self) -> float:
    with np.errstate(over='ignore'):  # a diverged model gives inf
      return float(np.exp(self.documents['nll'].sum() / self.documents['tokens'].sum()))

  def bits(self, column: str = 'nll') -> float:
    """Return bits per byte, or per token."""
    return float(self.documents[column].sum() / self.documents[self.per].sum() / LN2)

  def mean(self, column: str) -> float:
    return self.documents[column].sum() / self.documents['tokens'].sum()

  @property
  def is_task(self) -> bool:
    """Downstream multiple choice (kdjax/scoring/choices.py): a row is an item, and `correct` is 0 or 1."""
    return self.meta.get('kind') == 'task'


Cells = dict[str, dict[str, Cell]]  # arm -> set -> cell


def write_table(folder: paths.Path, step: int = 0) -> str:
  """The table as text; also kept as table.txt and, for machines, results.csv in the folder; a named step's beside them."""
  job = jobs.find_job(folder)
  cells = _load(job, step)
  text, name = format_all(folder, job, cells, step), f'-step{step}' if step else ''
  write_text(folder / f'table{name}.txt', text + '\n')
  write_text(folder / f'results{name}.csv', to_frame(cells).to_csv(index=False))
  return text


def load_cells(job: jobs.Job) -> Cells:
  """The text sets' cells of the folder's newest evaluation. Raises UserError if there is none, or runs must not be compared."""
  return _apart(_load(job))[0]


def _load(job: jobs.Job, step: int = 0) -> Cells:
  files = read_json(job.folder / jobs.file_name(step))
  if files is None:
    raise UserError(f'{job.folder} has no results yet; run python -m kdjax.evaluate --workdir={job.folder}')
  check_comparable(job.students)
  per = 'tokens' if read_text_losses(job) else 'bytes'
  cells = {
    arm: {name: Cell(*results.read_result(paths.resolve(job.folder, file)), per) for name, file in sets.items()}
    for arm, sets in files.items()
  }
  return _drop_averages(cells)


def _drop_averages(cells: Cells) -> Cells:
  """Drop, with a warning, the harness results of earlier versions, which contain each item once per filter."""
  mixed = {
    name
    for sets in cells.values()
    for name, cell in sets.items()
    if cell.is_task and cell.documents['doc'].duplicated().any()
  }
  for name in sorted(mixed):
    log.warning('warning: %s averages over several filters and is left out; run kdjax.harness again', name)
  return {arm: {name: cell for name, cell in sets.items() if name not in mixed} for arm, sets in cells.items()}


def read_text_losses(job: jobs.Job) -> dict[str, float]:
  """Return the losses of the tokenizer's round trip, as the runs recorded them; {} if there are none."""
  return next((found for run in job.runs if (found := (run.read_record() or {}).get('facts', {}).get('text_lost'))), {})


def unit(cells: Cells) -> str:
  """Return the unit that bits are counted per: 'byte' or 'token'."""
  return next((cell.per for sets in cells.values() for cell in sets.values()), 'bytes')[:-1]


def _apart(cells: Cells) -> tuple[Cells, Cells]:
  """(the text sets' cells, the tasks')."""
  text, tasks = (
    {arm: {name: cell for name, cell in sets.items() if cell.is_task == wanted} for arm, sets in cells.items()}
    for wanted in (False, True)
  )
  return text, tasks


def check_comparable(runs: list[RunFolder]) -> None:
  """Raise UserError, naming the field, if two arms did not see the same data in the same order from the same weights."""
  for run in runs:
    if run.read_record() is None:
      raise UserError(f'{run.path} has no run.json: nobody knows what it is; start the run again with the same command')
  known = [(run, (run.read_record() or {}).get('fingerprints', {})) for run in runs]
  for run, fingerprints in known[1:]:
    if name := differing(fingerprints, known[0][1]):
      raise UserError(f'{run.path} and {known[0][0].path} must not be compared: their {name} fingerprints differ')


def differing(left: Mapping[str, Any], right: Mapping[str, Any]) -> str:
  """The first controlled fingerprint in which two runs differ; '' if there is none."""
  for name in CONTROLLED:
    values = left.get(name), right.get(name)
    if differ(*values) if name == 'init' else values[0] != values[1]:
      return name
  return ''


def difference(cell: Cell, baseline: Cell, column: str = 'nll') -> Effect:
  """Subtract `baseline`'s bits per byte (or per token) from `cell`'s, paired by document; negative is better."""
  return crossed_effect([_bits(cell, baseline, column)])


def accuracy_difference(cell: Cell, baseline: Cell, column: str = 'correct') -> Effect:
  """Subtract `baseline`'s accuracy from `cell`'s, paired by item; positive is better. `column`: correct or correct_norm."""
  pair = _merged(cell, baseline, column)
  return crossed_effect([Paired(_less(pair, column), np.ones(len(pair)))])


def _bits(cell: Cell, baseline: Cell, column: str) -> Paired:
  pair = _merged(cell, baseline, column, cell.per)
  return Paired(_less(pair, column) / LN2, pair[cell.per].to_numpy())


def _less(pair: pd.DataFrame, column: str) -> np.ndarray:
  """[1, documents]: of the one seed there is."""
  return (pair[f'{column}_x'] - pair[f'{column}_y']).to_numpy(float)[None]


def _merged(cell: Cell, baseline: Cell, column: str, *shared: str) -> pd.DataFrame:
  pair = cell.documents[['doc', *shared, column]].merge(
    baseline.documents[['doc', column]], on='doc', validate='one_to_one'
  )
  if len(pair) != len(cell.documents) or len(pair) != len(baseline.documents):
    raise UserError(
      f'set {cell.meta["set"]}: {cell.meta["run"]} and {baseline.meta["run"]} were scored on other documents'
    )
  return pair


def differences(cells: Cells, column: str = 'nll') -> dict[str, dict[str, Effect]]:
  """arm -> set -> paired difference against the baseline, with the plain mean over the OOD sets."""
  out: dict[str, dict[str, Effect]] = {}
  for arm in cells:
    if arm in (BASELINE, 'teacher') or BASELINE not in cells:
      continue
    pairs = {name: _bits(cells[arm][name], cells[BASELINE][name], column) for name in cells[BASELINE]}
    ood = [pair for name, pair in pairs.items() if name != jobs.IN_DOMAIN]
    out[arm] = {name: crossed_effect([pair]) for name, pair in pairs.items()}
    out[arm] |= {OOD_MEAN: crossed_effect(ood)} if ood else {}
  return out


def to_frame(cells: Cells) -> pd.DataFrame:
  """One row an arm and set or task: text has the likelihoods, a task the accuracies."""
  return pd.DataFrame(
    {'arm': arm, 'set': name, 'step': cell.meta['step'], 'documents': len(cell.documents)}
    | (_task_values(cell) if cell.is_task else _text_values(cell))
    for arm, sets in cells.items()
    for name, cell in sets.items()
  )


def _text_values(cell: Cell) -> dict[str, Any]:
  return {
    'bytes': int(cell.documents['bytes'].sum()),
    'tokens': int(cell.documents['tokens'].sum()),
    'perplexity': cell.perplexity,
    'bits_per_byte': cell.bits() if cell.per == 'bytes' else np.nan,
    'bits_per_byte_fitted': cell.bits('nll_fitted') if cell.per == 'bytes' else np.nan,
    'temperature': cell.meta['temperature'],
    'top1': cell.mean('correct'),
    'entropy': cell.mean('entropy'),
    'ece': cell.meta['ece'],
    'kl_to_teacher': cell.mean('kl_to_teacher') if 'kl_to_teacher' in cell.documents else np.nan,
    'agreement': cell.mean('agreement') if 'agreement' in cell.documents else np.nan,
    'kind': 'text',
    'accuracy': np.nan,
    'accuracy_norm': np.nan,
    'normalised': '-',
    'chance': np.nan,
  }


def _task_values(cell: Cell) -> dict[str, Any]:
  """Return a task's row; bytes and tokens count the scored or generated text. The harness counts no tokens."""
  sums = {
    name: int(np.stack(cell.documents[name].to_list()).sum()) for name in ('bytes', 'tokens') if name in cell.documents
  }
  return {
    'bytes': sums['bytes'],
    'tokens': sums.get('tokens', np.nan),
    'kind': 'task',
    'accuracy': cell.meta['accuracy'],
    'accuracy_norm': cell.meta['accuracy_norm'],
    'normalised': normalisation(cell) or '-',
    'chance': cell.meta['chance'],
  }


def normalisation(cell: Cell) -> str:
  """Name the length that divides log-likelihoods in a task's normalised accuracy; '' if it has none."""
  return cell.meta.get('normalised', 'per character' if cell.meta['set'].startswith(jobs.HARNESS) else 'per byte')


def format_all(folder: paths.Path, job: jobs.Job, cells: Cells, step: int = 0) -> str:
  cells, tasks = _apart(cells)
  sets = _ordered_sets(cells)
  parts = [f'{job.config.name} (scale={job.config.scale}): {folder}' + (f', step {step}' if step else ''), '']
  if sets:
    parts += [_quality(cells, sets), '', _legend(job, cells, sets)]
  else:
    named = f' --step={step}' if step else ''
    parts.append(f'No text set has been scored yet: python -m kdjax.evaluate --workdir={folder}{named}')
  if sets and differences(cells):
    parts += ['', _differences_table(cells, sets)]
  if any(tasks.values()):
    parts += [line for part in _tasks_tables(tasks) for line in ('', part)]
  parts += ['', _facts(job, {arm: scored | tasks[arm] for arm, scored in cells.items()})]
  return '\n'.join(parts)


def _quality(cells: Cells, sets: list[str]) -> str:
  """Format bits per byte and perplexity as trained, then bits per byte at each model's fitted temperature; per token if text is lost."""
  plain = [[f'bits/{unit(cells)} (perplexity)', *sets, 'top-1', 'ECE']]
  fitted = [[f'bits/{unit(cells)} at fitted T (T)', *sets]]
  for arm, scored in cells.items():
    home = scored[jobs.IN_DOMAIN]
    plain.append([arm, *(f'{scored[name].bits():.3f} ({scored[name].perplexity:.1f})' for name in sets)])
    plain[-1] += [f'{home.mean("correct"):.3f}', f'{home.meta["ece"]:.3f}']
    fitted.append(
      [
        arm,
        *(f'{scored[name].bits("nll_fitted"):.3f} ({_temperature(scored[name])})' for name in sets),
      ]
    )
  return f'{align(plain)}\n\n{align(fitted)}'


def _legend(job: jobs.Job, cells: Cells, sets: list[str]) -> str:
  first = next(iter(cells.values()))
  counts = ', '.join(
    f'{name} {len(first[name].documents)} documents / {first[name].documents["bytes"].sum() / 1e3:.0f} kB'
    for name in sets
  )
  windows = first[sets[0]].meta['windows']
  return (
    'Perplexity per token; top-1 accuracy and ECE (expected calibration error, 15 bins) in-domain. Fitted T: the evaluation temperature\n'
    'of that model and set, fitted on documents of the set that are not scored. unigram: a control whose teacher is no model but the\n'
    f"training tokens' frequencies.\nScored: {counts};\n{windows}."
  )


def _differences_table(cells: Cells, sets: list[str]) -> str:
  plain, fitted = differences(cells), differences(cells, 'nll_fitted')
  columns = sets + ([OOD_MEAN] if len(sets) > 1 else [])
  rows = [[f'bits/{unit(cells)} less the baseline', *columns]]
  for arm in plain:
    for label, found in (('', plain), (' at fitted T', fitted)):
      rows.append([f'{arm}{label}'] + [_interval(found[arm][name]) for name in columns])
    cell = lambda name, arm=arm: 100 * (cells[arm][name].perplexity / cells[BASELINE][name].perplexity - 1)
    rows.append([f'{arm}, perplexity'] + [f'{cell(name):+.1f}%' for name in sets] + [''] * (len(columns) - len(sets)))
  out = [
    align(rows),
    'Paired by document; negative is better; 95% intervals over documents. One seed: seed variance not included.',
  ]
  if 'teacher' in cells and 'distilled' in cells:
    loss = lambda arm, name: cells[arm][name].bits()
    gaps = {
      name: performance_gap_recovered(loss('teacher', name), loss('distilled', name), loss(BASELINE, name))
      for name in sets
    }
    shown = ', '.join(f'{name} {gap:.2f}' if math.isfinite(gap) else f'{name} undefined' for name, gap in gaps.items())
    out.append(
      f'PGR of the distilled student (0: its teacher, 1: the LM-only baseline; undefined where the teacher is not the weaker): {shown}'
    )
  return '\n'.join(out)


def _tasks_tables(tasks: Cells) -> list[str]:
  """Format one table per normalisation of the accuracy, so that a label holds for its whole column."""
  first = next(iter(tasks.values()))
  names = sorted(set.intersection(*(set(scored) for scored in tasks.values())))
  by_norm = {
    norm: [n for n in names if normalisation(first[n]) == norm] for norm in sorted(map(normalisation, first.values()))
  }
  return [_tasks_table(tasks, of_norm, norm) for norm, of_norm in by_norm.items() if of_norm]


def _tasks_table(tasks: Cells, names: list[str], norm: str) -> str:
  """Format the accuracies of every arm, then the paired differences against the baseline."""
  first = next(iter(tasks.values()))
  rows = [[f'accuracy ({norm} normalised)' if norm else 'accuracy', *names]]
  for arm, scored in tasks.items():
    rows.append([arm, *(_accuracies(scored[name].meta, norm) for name in names)])
  rows.append(['chance', *(_share(first[name].meta['chance']) for name in names)])
  base = tasks.get(BASELINE, {})
  for arm, scored in tasks.items():
    if base and arm not in (BASELINE, 'teacher'):
      for label, column in (('', 'correct'), (f', {norm}', 'correct_norm')) if norm else (('', 'correct'),):
        found = [_interval(accuracy_difference(scored[name], base[name], column)) for name in names]
        rows.append([f'{arm} less the baseline{label}', *found])
  counts = ', '.join(f'{name} {len(first[name].documents)}' for name in names)
  paired = 'Paired by item; positive is better; 95% intervals over items. ' if base else ''
  return f'{align(rows)}\n{paired}Items: {counts}.'


def _accuracies(meta: dict[str, Any], norm: str) -> str:
  return _share(meta['accuracy']) + (f' ({_share(meta["accuracy_norm"])})' if norm else '')


def _share(value: float) -> str:
  return f'{value:.3f}' if math.isfinite(value) else '-'


def _parameters(facts: dict[str, Any]) -> str:
  return f'{facts["parameters"]:,} parameters ({facts["non_embedding"]:,} outside the embedding)'


def _facts(job: jobs.Job, cells: Cells) -> str:
  """Tokens, epochs, parameters and the yardstick, from the runs' own records."""
  lines = []
  for run in job.runs:
    facts = (run.read_record() or {}).get('facts', {})
    arm = job.arm(run)
    if 'imported' in facts and arm in cells:
      lines.append(f'{arm}: {_parameters(facts)}, imported from {facts["imported"]}')
    elif facts and arm in cells:
      step = next(iter(cells[arm].values())).meta['step']
      done = step / facts['steps']
      planned = f' of {facts["steps"]:,}' if done != 1 else ''
      lines.append(
        f'{arm}: {_parameters(facts)}, '
        f'{done * facts["tokens"]:,.0f} tokens in {step:,} steps{planned}, '
        f'{done * facts["epochs"]:.2f} epochs of {facts["distinct_tokens"]:,} distinct tokens'
      )
  every = [(run.read_record() or {}).get('facts', {}) for run in job.runs]
  if lost := read_text_losses(job):
    return '\n'.join([*lines, f'warning: {fidelity.describe(lost)}'])
  corpus = next((facts for facts in every if 'xz9_bits_per_byte' in facts), None)
  if corpus and all(jobs.IN_DOMAIN in sets for sets in cells.values()):
    best = min(sets[jobs.IN_DOMAIN].bits() for arm, sets in cells.items() if arm != 'teacher')
    verdict = (
      'the best student beats it'
      if best < corpus['xz9_bits_per_byte']
      else 'no student beats it: they are too small or saw too little'
    )
    lines.append(
      f'xz -9 on the in-domain test text: {corpus["xz9_bits_per_byte"]:.3f} bits per byte; {verdict} ({best:.3f})'
    )
  return '\n'.join(lines)


def _temperature(cell: Cell) -> str:
  """The fitted temperature; at an end of the grid, which it may have wanted to pass, with a sign."""
  value = cell.meta['temperature']
  sign = '<=' if value <= min(TEMPERATURES) else '>=' if value >= max(TEMPERATURES) else ''
  return f'{sign}{value:.2f}'


def _ordered_sets(cells: Cells) -> list[str]:
  names = set.intersection(*(set(scored) for scored in cells.values()))
  return [jobs.IN_DOMAIN] * (jobs.IN_DOMAIN in names) + sorted(names - {jobs.IN_DOMAIN})


def performance_gap_recovered(weak: float, strong: float, ceiling: float) -> float:
  """(weak - strong) / (weak - ceiling) of losses (Burns et al. 2023): 0 at the weak teacher, 1 at the ceiling; nan where there is no gap.

  Args:
    weak: the teacher's loss.
    strong: the loss of the student that learned from it.
    ceiling: the loss of the student that learned from the data alone.
  """
  return (weak - strong) / (weak - ceiling) if weak > ceiling else float('nan')


def _interval(effect: Effect) -> str:
  return f'{effect.estimate:+.4f} [{effect.low:+.4f}, {effect.high:+.4f}]'


def align(rows: list[list[str]]) -> str:
  widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
  lines = ['  '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
  return '\n'.join([lines[0], '  '.join('-' * width for width in widths), *lines[1:]])
