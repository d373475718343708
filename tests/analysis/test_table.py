"""The table's numbers are those of the result files; what must not be compared is refused."""

import math

import numpy as np
import pandas as pd
import pytest

from kdjax.analysis import table
from kdjax.analysis.crossed import Paired, crossed_effect
from kdjax.errors import UserError
from kdjax.scoring import job as jobs
from kdjax.scoring import results
from tests.analysis import experiment
from tests.analysis.experiment import ARMS, SETS, TEMPERATURE, documents


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return experiment.write(tmp_path_factory.mktemp('table'))


@pytest.fixture(scope='module')
def text(folder):
  return table.write_table(folder)


def row(text: str, start: str, header: str) -> list[str]:
  """The cells of the row that starts so, in the part whose header starts so."""
  part = text[text.index(header) :].split('\n\n')[0]
  line = next(line for line in part.splitlines() if line.startswith(start))
  return [cell.strip() for cell in line.split('  ') if cell.strip()]


def test_there_is_a_row_for_each_model_and_a_column_for_each_set(text):
  assert row(text, 'bits/byte', 'bits/byte (perplexity)')[1:4] == ['in-domain', 'far', 'further']
  for arm in ARMS:
    assert row(text, arm, 'bits/byte (perplexity)')[0] == arm


@pytest.mark.parametrize('arm', ARMS)
def test_perplexity_and_bits_per_byte_are_those_of_the_documents(text, arm):
  cells, fitted = row(text, arm, 'bits/byte (perplexity)'), row(text, arm, 'bits/byte at fitted T')
  for i, name in enumerate(SETS, 1):
    d = documents(arm, name)
    bits = d['nll'].sum() / math.log(2) / d['bytes'].sum()
    assert cells[i] == f'{bits:.3f} ({math.exp(d["nll"].sum() / d["tokens"].sum()):.1f})'
    assert fitted[i] == f'{0.9 * bits:.3f} ({TEMPERATURE:.2f})'
  assert cells[4:] == ['0.250', '0.125']


@pytest.mark.parametrize('arm', ['distilled', 'unigram'])
def test_differences_are_paired_by_document_against_the_baseline(text, arm):
  cells, fitted = row(text, arm, 'bits/byte less'), row(text, f'{arm} at fitted T', 'bits/byte less')
  for scale, found in ((1.0, cells), (0.9, fitted)):
    parts = []
    for i, name in enumerate(SETS, 1):
      ours, base = documents(arm, name), documents('baseline', name)
      parts.append(Paired(scale * (ours['nll'] - base['nll']).to_numpy()[None] / math.log(2), ours['bytes'].to_numpy()))
      estimate, low, high, *_ = crossed_effect(parts[-1:])
      assert found[i] == f'{estimate:+.4f} [{low:+.4f}, {high:+.4f}]'
    estimate, low, high, *_ = crossed_effect(parts[1:])
    assert found[4] == f'{estimate:+.4f} [{low:+.4f}, {high:+.4f}]'


def test_where_the_tokenizer_loses_text_there_are_no_bits_per_byte(tmp_path):
  """Instead, bits are per token, the compressor's bits per byte are omitted, and the table says why."""
  lost = {'unknown': 0.0, 'lost': 0.002, 'changed': 0.041}
  change = lambda arm, identity: identity.update(facts=identity['facts'] | {'text_lost': lost})
  folder = experiment.write(tmp_path, change=change)
  text = table.write_table(folder)
  assert 'bits/byte' not in text and 'xz' not in text
  assert (
    '(0.00% of the tokens unknown, 0.20% of the characters lost, 4.10% lost or rewritten): bits per byte would be'
    in text
  )
  d = documents('distilled', 'far')
  cells = row(text, 'distilled', 'bits/token (perplexity)')
  assert cells[2].startswith(f'{d["nll"].sum() / math.log(2) / d["tokens"].sum():.3f} (')
  less = (d['nll'] - documents('baseline', 'far')['nll']).to_numpy()[None] / math.log(2)
  wanted = crossed_effect([Paired(less, d['tokens'].to_numpy())])
  assert row(text, 'distilled', 'bits/token less')[2].startswith(f'{wanted.estimate:+.4f} [{wanted.low:+.4f}')
  frame = pd.read_csv(folder / 'results.csv')
  assert frame['bits_per_byte'].isna().all() and frame['bits_per_byte_fitted'].isna().all()
  assert frame['perplexity'].notna().all()


def test_perplexity_changes_are_percentages(text):
  cells = row(text, 'distilled, perplexity', 'bits/byte less')
  for i, name in enumerate(SETS, 1):
    ours, base = documents('distilled', name), documents('baseline', name)
    change = math.exp(ours['nll'].sum() / ours['tokens'].sum() - base['nll'].sum() / base['tokens'].sum()) - 1
    assert cells[i] == f'{100 * change:+.1f}%'


def test_pairing_makes_the_interval_narrow(folder):
  cells = table.load_cells(jobs.find_job(folder))
  paired = table.difference(cells['distilled']['far'], cells['baseline']['far'])
  far = documents('distilled', 'far')
  alone = crossed_effect([Paired(far['nll'].to_numpy()[None] / math.log(2), far['bytes'].to_numpy())])
  assert paired.error < alone.error / 2


def test_the_order_of_documents_does_not_matter(folder):
  cells = table.load_cells(jobs.find_job(folder))
  ours, base = cells['distilled']['far'], cells['baseline']['far']
  shuffled = table.Cell(ours.documents.sample(frac=1, random_state=0), ours.meta)
  np.testing.assert_allclose(table.difference(shuffled, base)[:6], table.difference(ours, base)[:6])


def test_models_scored_on_other_documents_are_refused(folder):
  cells = table.load_cells(jobs.find_job(folder))
  ours, base = cells['distilled']['far'], cells['baseline']['far']
  with pytest.raises(UserError, match='set far: distilled and baseline were scored on other documents'):
    table.difference(table.Cell(ours.documents[1:], ours.meta), base)


def test_what_the_table_must_say(text):
  assert 'One seed: seed variance not included.' in text
  assert 'xz -9 on the in-domain test text: 2.960 bits per byte' in text
  assert '95% intervals over documents' in text
  assert '1,536 tokens in 12 steps, 0.22 epochs of 6,831 distinct tokens' in text
  assert 'in-domain 30 documents' in text


def test_the_yardsticks_verdict_is_about_the_best_student(text):
  best = min(documents(arm, 'in-domain')['nll'].sum() for arm in ARMS if arm != 'teacher')
  bits = best / documents('baseline', 'in-domain')['bytes'].sum() / math.log(2)
  assert f'({bits:.3f})' in text
  assert ('the best student beats it' in text) == (bits < 2.96)


def test_the_gap_recovered_stands_beside_the_differences(text):
  bits = lambda arm: documents(arm, 'far')['nll'].sum()
  gap = (bits('teacher') - bits('distilled')) / (bits('teacher') - bits('baseline'))
  assert f'far {gap:.2f}' in text and 'PGR' in text


def test_the_gap_is_undefined_beside_a_stronger_teacher(tmp_path, monkeypatch):
  monkeypatch.setitem(ARMS, 'teacher', -0.5)
  assert 'in-domain undefined, far undefined, further undefined' in table.write_table(experiment.write(tmp_path))


def test_the_table_is_kept_as_text_and_as_csv(folder, text):
  assert (folder / 'table.txt').read_text() == text + '\n'
  frame = pd.read_csv(folder / 'results.csv')
  assert len(frame) == len(ARMS) * len(SETS)
  for _, line in frame.iterrows():
    d = documents(line['arm'], line['set'])
    assert line['bits_per_byte'] == pytest.approx(d['nll'].sum() / math.log(2) / d['bytes'].sum())
    assert line['bits_per_byte_fitted'] == pytest.approx(0.9 * line['bits_per_byte'])
    assert (line['documents'], line['tokens'], line['step'], line['ece']) == (30, d['tokens'].sum(), 12, 0.125)
    assert math.isnan(line['kl_to_teacher']) == (line['arm'] == 'teacher')


@pytest.mark.parametrize('field', ['data', 'init', 'tokenizer'])
def test_arms_that_differ_in_a_controlled_fingerprint_are_refused_naming_it(tmp_path, field):
  def change(arm, identity):
    if arm == 'distilled':
      identity['fingerprints'][field] = 'other'

  with pytest.raises(
    UserError, match=f'distilled and .*baseline must not be compared: their {field} fingerprints differ'
  ):
    table.write_table(experiment.write(tmp_path, change=change))


def test_an_arm_without_fingerprints_is_refused(tmp_path):
  def change(arm, identity):
    if arm == 'unigram':
      del identity['fingerprints']

  with pytest.raises(UserError, match='must not be compared: their data fingerprints differ'):
    table.write_table(experiment.write(tmp_path, change=change))


def test_the_teacher_may_have_seen_other_data(tmp_path):
  def change(arm, identity):
    if arm == 'teacher':
      identity['fingerprints'] = {'data': 'other', 'tokenizer': 't', 'init': 'other'}

  assert 'teacher' in table.write_table(experiment.write(tmp_path, change=change))


def test_without_a_baseline_there_are_no_differences(tmp_path):
  text = table.write_table(experiment.write(tmp_path, arms=('teacher', 'distilled')))
  assert 'distilled' in text and 'less the baseline' not in text and 'PGR' not in text


def test_a_baseline_alone_is_a_table(tmp_path):
  text = table.write_table(experiment.write(tmp_path, arms=('baseline',)))
  assert row(text, 'baseline', 'bits/byte (perplexity)')[0] == 'baseline'
  assert 'less the baseline' not in text


def test_a_folder_without_results_says_what_to_run(tmp_path):
  folder = experiment.write(tmp_path)
  (folder / 'evaluation.json').unlink()
  with pytest.raises(UserError, match='has no results yet; run python -m kdjax'):
    table.write_table(folder)


def test_a_missing_or_damaged_result_file_is_one_line(tmp_path):
  folder = experiment.write(tmp_path)
  file = results.result_path(folder / 'students' / 'distilled' / 'results', 12, 'far', 'abc')
  file.write_bytes(b'x')
  with pytest.raises(UserError, match='is damaged'):
    table.write_table(folder)
  file.unlink()
  with pytest.raises(UserError, match=r'far-step12-abc\.parquet'):
    table.write_table(folder)


@pytest.mark.parametrize(
  ('weak', 'strong', 'ceiling', 'gap'),
  [(3.0, 3.0, 2.0, 0.0), (3.0, 2.0, 2.0, 1.0), (3.0, 2.5, 2.0, 0.5), (3.0, 1.5, 2.0, 1.5), (3.0, 3.5, 2.0, -0.5)],
)
def test_the_gap_recovered(weak, strong, ceiling, gap):
  assert table.performance_gap_recovered(weak, strong, ceiling) == pytest.approx(gap)


@pytest.mark.parametrize(('weak', 'ceiling'), [(2.0, 2.0), (1.9, 2.0)])
def test_the_gap_recovered_is_undefined_where_the_teacher_is_not_the_weaker(weak, ceiling):
  assert math.isnan(table.performance_gap_recovered(weak, 2.5, ceiling))
