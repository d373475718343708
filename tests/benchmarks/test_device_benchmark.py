"""The dry run of benchmarks.device: every part at tiny sizes on this machine, and the page made of results."""

import json
import subprocess
import sys

import pytest

from benchmarks.device import page
from benchmarks.device.results import PARTS, read
from tests import commands


def measure(tmp_path, *arguments: str):
  results = tmp_path / 'device.jsonl'
  command = [sys.executable, '-m', 'benchmarks.device', '--tiny', f'--results={results}', *arguments]
  env = commands.environment() | {'PYTHONPATH': str(commands.REPO)}
  done = subprocess.run(command, cwd=commands.REPO, env=env, capture_output=True, text=True, timeout=900, check=False)
  assert done.returncode == 0, done.stderr[-3000:]
  return read(results)


def test_a_part_adds_its_cases_to_the_results(tmp_path):
  rows = measure(tmp_path, '--only', 'loss', 'liger')
  assert not [row for row in rows if 'error' in row]
  assert rows[0]['case'] == 'bfloat16 T=1 chunk auto' and rows[0]['fused / dense'][0] > 0
  by_part = {part: [row for row in rows if row['part'] == part] for part in PARTS}
  missing = [line.split(':')[0] for line in page.failures(by_part)]
  assert {'`correctness`', '`throughput`', '`resume`', '`main_job`'} <= set(missing) and '`loss`' not in missing


@pytest.mark.slow
def test_every_part_ends_well_on_any_machine(tmp_path):
  rows = measure(tmp_path)
  assert not [row for row in rows if 'error' in row]
  assert {row['part'] for row in rows} == set(PARTS)
  by_case = {row['case']: row for row in rows}
  assert by_case['equal models']['kl'] == by_case['equal models']['gradient'] == 0
  assert by_case['one compile']['programs'] == 1
  assert by_case['not finite']['skipped'] == 1 and by_case['not finite']['unchanged']
  assert by_case['loss float32 T=2']['fused']['dW'] < 1e-6 and by_case['attention xla with documents']['dK'] < 0.01
  resumed, job = by_case['kill and resume'], by_case['colab']
  assert resumed['same metrics'] and resumed['same weights'] and 0 < resumed['killed at step'] < resumed['steps']
  assert 'distilled' in job['table'] and job['wall seconds'] > 0


def test_a_part_that_fails_or_hangs_costs_only_itself(tmp_path):
  """Its line says so, and the results of the others stay."""
  results = tmp_path / 'device.jsonl'
  old = {'part': 'loss', 'case': 'of an earlier run', 'seconds': 1.0}
  results.write_text(json.dumps(old) + '\n')
  rows = measure(tmp_path, '--only', 'main_job', '--seconds=12')
  assert rows[0] == old
  assert [(row['part'], 'ended with code -9' in row['error']) for row in rows[1:]] == [('main_job', True)]


def test_the_page_lists_what_failed_first(tmp_path, monkeypatch):
  monkeypatch.setattr(page, 'PAGE', tmp_path / 'DEVICE.md')
  rows = [
    {'part': 'correctness', 'case': 'equal models', 'kl': 0.0, 'gradient': 1e-12, 'seconds': 1.0},
    {'part': 'correctness', 'case': 'alpha 0', 'difference': 1e-8, 'seconds': 1.0},
    {'part': 'resume', 'case': 'kill and resume', 'same metrics': True, 'same weights': False, 'seconds': 1.0},
    {'part': 'throughput', 'case': 'distilled', 'error': 'RuntimeError: out of memory', 'seconds': 1.0},
  ]
  results = tmp_path / 'device.jsonl'
  results.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  text = page.write(results)
  failed = text.split('## Failed, or not measured')[1].split('## Correctness')[0]
  assert 'gradient is 1e-12, above 0' in failed and 'not same weights' in failed and 'out of memory' in failed
  assert 'alpha 0' not in failed and '`main_job`: not run' in failed
  assert '| alpha 0 | difference 1e-08 |' in text


def test_the_committed_page_is_made_of_the_committed_results(tmp_path, monkeypatch):
  monkeypatch.setattr(page, 'PAGE', tmp_path / 'DEVICE.md')
  assert page.write(commands.REPO / 'docs/results/device.jsonl') == (commands.REPO / 'docs/DEVICE.md').read_text()
