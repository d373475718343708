"""Small tasks in the harness's format: a YAML file and JSON lines each."""

import json
import pathlib
from typing import Any

MULTIPLE_CHOICE = {
  'output_type': 'multiple_choice',
  'doc_to_text': '{{context}}',
  'doc_to_choice': '{{choices}}',
  'doc_to_target': 'answer',
  'target_delimiter': '',
  'metric_list': [{'metric': 'acc'}, {'metric': 'acc_norm'}],
}
GENERATE = {
  'output_type': 'generate_until',
  'doc_to_text': '{{context}}',
  'doc_to_target': '{{target}}',
  'generation_kwargs': {'until': ['.'], 'do_sample': False, 'max_gen_toks': 12},
  'metric_list': [{'metric': 'exact_match', 'aggregation': 'mean', 'higher_is_better': True}],
}
# As in gsm8k.
FILTERS = [
  {
    'name': name,
    'filter': [{'function': 'regex', 'regex_pattern': pattern}, {'function': 'take_first'}],
  }
  for name, pattern in (('strict-match', '#### ([0-9]+)'), ('flexible-extract', '([0-9]+)'))
]


def write(folder: pathlib.Path, name: str, items: list[dict[str, Any]], fields: dict[str, Any], code: str = '') -> None:
  """Write a task; JSON is YAML. `code`: a module in the same folder; its function `score` becomes the task's process_results."""
  data = folder / f'{name}.jsonl'
  data.write_text(''.join(json.dumps(item) + '\n' for item in items))
  whole = {
    'task': name,
    'dataset_path': 'json',
    'dataset_kwargs': {'data_files': {'test': str(data)}},
    'test_split': 'test',
  }
  lines = [f'{key}: {json.dumps(value)}\n' for key, value in (whole | fields).items()]
  if code:
    (folder / f'{name}_code.py').write_text(code)
    lines.append(f'process_results: !function {name}_code.score\n')
  (folder / f'{name}.yaml').write_text(''.join(lines))


def write_group(folder: pathlib.Path, name: str, tasks: list[str]) -> None:
  metrics = [{'metric': 'acc', 'weight_by_size': True}]
  whole = {'group': name, 'task': tasks, 'aggregate_metric_list': metrics}
  (folder / f'{name}.yaml').write_text(''.join(f'{key}: {json.dumps(value)}\n' for key, value in whole.items()))
