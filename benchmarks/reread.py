"""Reanalyse the published laptop grid under today's rules: print the tables of docs/RESULTS.md that were added after the grid was run.

python -m benchmarks.reread
"""

import pathlib

import pandas as pd
from scipy import stats

from kdjax.analysis import crossed
from kdjax.sweeps.config import MAX_PRIMARY

RESULTS = pathlib.Path(__file__).parents[1] / 'docs' / 'results'
OOD = ['code', 'dialogue', 'genres', 'reference', 'web']


def levels(contrasts: pd.DataFrame) -> pd.DataFrame:
  """Compute each contrast's interval at the level of one of four primary tests, from its standard error and degrees of freedom."""
  level = crossed.corrected_level(MAX_PRIMARY)
  half = stats.t.ppf((1 + level) / 2, contrasts['df']) * contrasts['error']
  table = contrasts[['contrast', 'set', 'left', 'estimate']]
  return table.assign(low=contrasts['estimate'] - half, high=contrasts['estimate'] + half)


def without_each_set(effects: pd.DataFrame, measure: str) -> pd.DataFrame:
  """Compute the OOD mean of each validated arm, over all sets and with each set left out."""
  rows = effects[effects['validated'] & (effects['scenario'] == '') & (effects['measure'] == measure)]
  rows = rows[rows['arm'].isin(['distilled', 'unigram']) & rows['set'].isin(OOD)]
  table = rows.pivot_table(index=['arm', 'teacher', 'teacher_tokens', 'alpha'], columns='set', values='estimate')
  left = {f'without {name}': table.drop(columns=name).mean(axis=1) for name in OOD}
  return pd.DataFrame({'OOD mean': table[OOD].mean(axis=1), **left})


def main() -> None:
  effects, contrasts = pd.read_parquet(RESULTS / 'effects.parquet'), pd.read_csv(RESULTS / 'contrasts.csv')
  print(f'intervals at {crossed.corrected_level(MAX_PRIMARY):.4g}\n{levels(contrasts).round(3).to_string(index=False)}')
  for measure in ('bits_per_byte', 'bits_per_byte_fitted'):
    print(f'\n{measure}, leave one set out\n{without_each_set(effects, measure).round(3).to_string()}')


if __name__ == '__main__':
  main()
