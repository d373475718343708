"""Convert the harness's answers into result files: one table of items for each task and filter."""

import logging
import math
import numbers
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd

from kdjax import config as config_lib
from kdjax.runs.folder import RunFolder
from kdjax.scoring import job as jobs
from kdjax.scoring import results
from kdjax.storage import paths
from kdjax.storage.files import canonical_json, digest

log = logging.getLogger('kdjax')

VERSION = 2  # of the meaning of a result; 1 averaged over the filters
ACCURACY = ('acc', 'exact_match', 'acc_mutual_info', 'pass@1')  # the first of these that a task has is its accuracy
CHOSEN = ('acc', 'acc_mutual_info')  # the metrics that pick one of several choices
NORMALISED = {'acc_norm': 'per character', 'acc_bytes': 'per byte'}  # the length that divides lm_eval's log-likelihoods
MEANS = {'accuracy': 'correct', 'accuracy_norm': 'correct_norm', 'chance': 'chance'}
NO_FILTER = 'none'  # the harness's filter name for a task that names none

Sample = Mapping[str, Any]


class Items(NamedTuple):
  """One task under one filter: a table with a row per item, and the metadata of its result file."""

  name: str
  table: pd.DataFrame
  facts: dict[str, Any]


def read_items(answer: Mapping[str, Any]) -> Iterator[Items]:
  """Yield the items of each task and filter with a per-item accuracy; log the tasks without one.

  Args:
    answer: the return value of lm_eval.simple_evaluate, with samples.
  """
  for task, samples in answer['samples'].items():
    filters = dict.fromkeys(sample['filter'] for sample in samples)
    found = [_items(answer, task, name, [s for s in samples if s['filter'] == name]) for name in filters]
    yield from (items for items in found if items)
    if not any(found):
      log.info('%s: no per-item accuracy; it is in the table above but not in that of the experiment', task)


def write_items(run: RunFolder, step: int, items: Items, facts: dict[str, Any]) -> paths.Path:
  """Write a result file into a run's folder. `facts` are what else the result depends on; the file's metadata keep them."""
  key = items.facts | facts | {'version': VERSION}
  target = results.result_path(run.results, step, re.sub(r'[^\w.@-]+', '_', items.name), config_lib.fingerprint(key))
  means = {name: float(items.table[column].mean()) for name, column in MEANS.items()}
  results.write_result(
    target, items.table, key | means | {'kind': 'task', 'run': run.name, 'step': step, 'set': items.name}
  )
  return target


def add_to_experiment(
  job: jobs.Job, step: int, at: Mapping[str, int], found: Mapping[str, Mapping[str, paths.Path]]
) -> None:
  """Add result files to the experiment's table; they replace older ones of the same tasks.

  Args:
    step: the table's step; 0: the newest.
    at: arm -> the step that was scored. Files of other steps are removed, because a table holds one checkpoint per arm.
    found: arm -> set -> result file.
  """
  file = job.folder / jobs.file_name(step)
  known = paths.read_json(file) or {}
  for arm, new in found.items():
    tasks = {name.partition(':')[0] for name in new}
    old = {name: kept for name, kept in known.get(arm, {}).items() if name.partition(':')[0] not in tasks}
    same = {name: kept for name, kept in old.items() if jobs.is_of_step(kept, at[arm])}
    if left_out := sorted(old.keys() - same.keys()):
      log.info(
        '%s: %s removed from the table, because they are not of step %d; kdjax.evaluate scores them again',
        arm, ', '.join(left_out), at[arm],
      )  # fmt: skip
    known[arm] = same | {name: paths.relative(path, job.folder) for name, path in new.items()}
  paths.write_json(file, known)


def _items(answer: Mapping[str, Any], task: str, filter_name: str, samples: Sequence[Sample]) -> Items | None:
  """Return the items of one filter; None if they have no accuracy. The item number distinguishes items with the same text."""
  metric = next((name for name in ACCURACY if _is_mean(answer, task, name, samples)), '')
  if not metric:
    return None
  own = answer['configs'][task].get('process_results') is not None  # the task's own code does the scoring
  norm = next((name for name in NORMALISED if metric == 'acc' and _all_numbers(samples, name)), '')
  table = pd.DataFrame({
    'doc': [digest(canonical_json([sample['doc_id'], str(sample['doc'])])).encode() for sample in samples],
    'group': '',
    'correct': [float(sample[metric]) for sample in samples],
    'correct_norm': [float(sample[norm]) if norm else math.nan for sample in samples],
    'bytes': [[len(_scored_text(sample).encode())] for sample in samples],
    'chance': [math.nan if own and metric in CHOSEN else _chance(sample, metric) for sample in samples],
  })  # fmt: skip
  facts = {
    'task': task,
    'filter': filter_name,
    'metric': metric,
    'normalised': "by the task's own rule" if own and norm else NORMALISED.get(norm, ''),
    'task_version': answer['versions'].get(task),
    'few_shot': answer['n-shot'].get(task),
    'items': len(samples),
  }
  return Items(f'{jobs.HARNESS}{task}' + (f':{filter_name}' if filter_name != NO_FILTER else ''), table, facts)


def _is_mean(answer: Mapping[str, Any], task: str, metric: str, samples: Sequence[Sample]) -> bool:
  """Check that the harness's own result is the mean over items. Otherwise a mean over items is not the task's accuracy."""
  if not _all_numbers(samples, metric):
    return False
  mean = sum(float(sample[metric]) for sample in samples) / len(samples)
  known = answer['results'][task].get(f'{metric},{samples[0]["filter"]}')
  return isinstance(known, numbers.Real) and math.isclose(mean, known, abs_tol=1e-9)


def _all_numbers(samples: Sequence[Sample], name: str) -> bool:
  values = [sample.get(name) for sample in samples]
  return all(isinstance(value, numbers.Real) and math.isfinite(value) for value in values)


def _chance(sample: Sample, metric: str) -> float:
  """Return the share of right answers among an item's choices; 0 if there are no choices."""
  n = _n_choices(sample)
  if metric not in CHOSEN or n < 2:
    return 0.0
  target = sample['target']
  if isinstance(target, str):
    return 1 / n
  right = {int(i) for i in (target if isinstance(target, list) else [target]) if isinstance(i, numbers.Integral)}
  return len(right & set(range(n))) / n


def _n_choices(sample: Sample) -> int:
  """Count an item's requests without those that acc_mutual_info adds (each choice without the question)."""
  n = len(sample['resps'])
  return n // 2 if 'acc_mutual_info' in sample['metrics'] else n


def _scored_text(sample: Sample) -> str:
  """Join the scored continuations, or the generated texts."""
  asked = list(zip(sample['arguments'], sample['resps'], strict=True))[: _n_choices(sample)]
  return ''.join(''.join(resps) if isinstance(resps[0], str) else args[:2][-1] for args, resps in asked)
