"""A made-up experiment: result files of known numbers, with no model behind them."""

import pathlib

import numpy as np
import pandas as pd

from kdjax import config as config_lib
from kdjax.runs.folder import RunFolder
from kdjax.scoring import results
from kdjax.storage.paths import write_json
from tests import tiny

SETS = ('in-domain', 'far', 'further')
ARMS = {'teacher': 0.3, 'baseline': 0.0, 'distilled': -0.05, 'unigram': 0.1}  # nats per byte more than the baseline
TEMPERATURE = 1.25
FACTS = {
  'parameters': 6832,
  'non_embedding': 2608,
  'tokens': 1536,
  'steps': 12,
  'distinct_tokens': 6831,
  'epochs': 0.22,
  'xz9_bits_per_byte': 2.96,
}


def documents(arm: str, set_name: str, n: int = 30) -> pd.DataFrame:
  """The same documents for every arm; an arm's likelihoods are shifted by about what ARMS says."""
  shared = np.random.default_rng(SETS.index(set_name))
  own = np.random.default_rng([SETS.index(set_name), list(ARMS).index(arm)])
  n_bytes = shared.integers(50, 500, n)
  nll = n_bytes * (2.0 + shared.normal(0, 0.1, n)) + n_bytes * (ARMS[arm] + own.normal(0, 0.02, n))
  tokens = (n_bytes // 2).astype(float)
  columns = {
    'bytes': n_bytes,
    'tokens': tokens,
    'nll': nll,
    'nll_fitted': 0.9 * nll,
    'entropy': nll / 2,
    'correct': tokens / 4,
  }
  if arm != 'teacher':
    columns |= {'kl_to_teacher': tokens / 8, 'agreement': tokens / 2}
  return pd.DataFrame({'doc': [f'{i:016x}'.encode() for i in range(n)]} | columns)


def write(folder: pathlib.Path, arms=tuple(ARMS), change=None) -> pathlib.Path:
  """An experiment's folder with results and metrics; `change(arm, run.json)` edits what a run says of itself."""
  config = config_lib.as_dict(tiny.config(folder)) | {'runs': '.'}
  students = [arm for arm in arms if arm != 'teacher']
  runs = {arm: RunFolder(folder / ('teachers/t' if arm == 'teacher' else f'students/{arm}')) for arm in arms}
  files: dict[str, dict[str, str]] = {}
  for arm, run in runs.items():
    identity = {'fingerprints': {'data': 'd', 'tokenizer': 't', 'init': 'i'}, 'facts': FACTS, 'config': {'arm': arm}}
    if change:
      change(arm, identity)
    write_json(run.path / 'run.json', identity)
    records = [
      f'{{"step": {s}, "ce": {5 - s / 10}, "validation_ce": {5 - s / 10 + ARMS[arm]}}}\n' for s in range(1, 13)
    ]
    run.metrics.write_text(''.join(records))
    for name in SETS:
      meta = {
        'run': run.name,
        'set': name,
        'step': 12,
        'temperature': TEMPERATURE,
        'ece': 0.125,
        'windows': 'windows of 16 tokens',
      }
      path = results.result_path(run.results, 12, name, 'abc')
      results.write_result(path, documents(arm, name), meta)
      files.setdefault(arm, {})[name] = str(path.relative_to(folder))
  write_json(folder / 'evaluation.json', files)
  known = {
    'config': {},
    'resolved': config,
    'teacher': 'teachers/t' if 'teacher' in arms else None,
    'students': [f'students/{arm}' for arm in students],
  }
  write_json(folder / 'experiment.json', known)
  return folder
