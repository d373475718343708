"""The figure of a run: training loss, validation loss against the baseline's, and the paired differences on every set."""

import matplotlib.figure
import numpy as np

from kdjax.analysis import table
from kdjax.runs.metrics import read_metrics
from kdjax.scoring import job as jobs
from kdjax.storage import paths

COLOURS = {'baseline': '#4c4c4c', 'distilled': '#0072b2', 'unigram': '#d55e00', 'teacher': '#009e73'}
SMOOTHING = 40  # points of a loss curve after averaging


def write_figure(folder: paths.Path) -> paths.Path:
  """run.png in the experiment's folder, from its metrics and results alone; one that is newer than they are is left alone."""
  folder = paths.runs_path(folder)
  job, path = jobs.find_job(folder), folder / 'run.png'
  shown = [folder / 'evaluation.json', *(run.metrics for run in job.students)]
  if path.exists() and all(path.stat().mtime >= f.stat().mtime for f in shown if f.exists()):
    return path
  curves = {run.name: read_metrics(run.path) for run in job.students}
  figure = matplotlib.figure.Figure(figsize=(14, 4.4), layout='constrained')
  training, validation, forest = figure.subplots(1, 3, width_ratios=(1, 1, 1.15))
  _training(training, curves)
  _validation(validation, curves)
  _forest(forest, table.load_cells(job))
  figure.suptitle(f'{job.config.name}, scale={job.config.scale}: students on the same batches, one seed', fontsize=11)
  with paths.replacing(path) as temporary:
    figure.savefig(temporary, dpi=130)
  return path


def _training(axes, curves) -> None:
  for arm, records in curves.items():
    steps, ce = _series(records, 'ce')
    n = max(1, len(ce) // SMOOTHING)
    usable = len(ce) // n * n
    average = lambda x, n=n, usable=usable: x[:usable].reshape(-1, n).mean(1)
    axes.plot(average(steps), average(ce), label=arm, color=COLOURS.get(arm))
  axes.set(title='Training', xlabel='optimizer step', ylabel='cross-entropy, nats per token')
  axes.legend(frameon=False)
  axes.grid(alpha=0.25)


def _validation(axes, curves) -> None:
  """The difference to the baseline where there is one: the curves themselves lie on top of each other."""
  base = dict(zip(*_series(curves.get(table.BASELINE, []), 'validation_ce'), strict=True))
  for arm, records in curves.items():
    steps, ce = _series(records, 'validation_ce')
    if base:
      pairs = [(step, value - base[step]) for step, value in zip(steps, ce, strict=True) if step in base]
      steps, ce = np.asarray(pairs, float).reshape(-1, 2).T
    axes.plot(steps, ce, marker='o', markersize=3, label=arm, color=COLOURS.get(arm))
  what = 'less the baseline’s, nats per token\n(below 0: better)' if base else 'nats per token'
  axes.set(title='In-domain validation during training', xlabel='optimizer step', ylabel=f'cross-entropy, {what}')
  axes.grid(alpha=0.25)


def _forest(axes, cells) -> None:
  plain, fitted = table.differences(cells), table.differences(cells, 'nll_fitted')
  names: list[str] = []
  offsets = [(arm, found, marker) for arm in plain for found, marker in ((plain, 'o'), (fitted, 'D'))]
  for arm, found, marker in offsets:
    names = sorted(found[arm], key=lambda name: (name != jobs.IN_DOMAIN, name == table.OOD_MEAN, name))
    slot = offsets.index((arm, found, marker))
    for row, name in enumerate(names):
      interval = found[arm][name]
      y = row + (slot - (len(offsets) - 1) / 2) * 0.17
      error = [[interval.estimate - interval.low], [interval.high - interval.estimate]]
      label = f'{arm}, {"T = 1" if marker == "o" else "fitted T"}' if row == 0 else None
      face = COLOURS.get(arm) if marker == 'o' else 'white'
      axes.errorbar(
        interval.estimate,
        y,
        xerr=error,
        fmt=marker,
        markersize=4,
        capsize=2,
        color=COLOURS.get(arm),
        mfc=face,
        label=label,
      )
  axes.axvline(0, color=COLOURS['baseline'], linewidth=1)
  axes.set_yticks(range(len(names)), names)
  axes.invert_yaxis()
  axes.set(
    title='Test sets: difference to the baseline',
    xlabel=f'bits per {table.unit(cells)} (left of 0: better), 95% over documents',
  )
  if names:
    axes.legend(frameon=False, fontsize=8, loc='best')
  axes.grid(alpha=0.25, axis='x')


def _series(records, name: str) -> tuple[np.ndarray, np.ndarray]:
  pairs = [(record['step'], record[name]) for record in records if name in record]
  return np.asarray([step for step, _ in pairs], float), np.asarray([value for _, value in pairs], float)
