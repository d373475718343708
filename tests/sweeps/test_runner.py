"""A tiny grid, run for real: its phases, what it leaves, what it does again and what it does not."""

import dataclasses
import json
import pathlib
import shutil

import pytest

import kdjax.data.corpus
from kdjax import grid as command
from kdjax import report
from kdjax.errors import TrainingError, UserError
from kdjax.runs.folder import RunFolder
from kdjax.scoring import job as evaluation
from kdjax.scoring import results
from kdjax.storage.paths import read_json
from kdjax.sweeps import cells, pilots, runner
from kdjax.sweeps.names import format_exact
from tests.sweeps.test_cells import tokenizer_file


@pytest.fixture(scope='module')
def home(tiny_grid) -> pathlib.Path:
  return tiny_grid[0]


@pytest.fixture(scope='module')
def grid(tiny_grid):
  return tiny_grid[1]


@pytest.fixture(scope='module')
def folder(tiny_grid) -> pathlib.Path:
  return tiny_grid[2]


def written(folder: pathlib.Path) -> dict[str, int]:
  kept = ('checkpoints', 'results')
  return {
    str(p.relative_to(folder)): p.stat().st_mtime_ns
    for p in folder.rglob('*')
    if p.is_file() and any(k in p.parts for k in kept)
  }


def all_cells(grid, folder):
  return cells.cells_of(group for _, groups in runner.phases(grid, folder) for group in groups)


def test_every_cell_of_every_phase_is_trained_and_scored(grid, folder):
  scores = runner.read_scores(grid, folder)
  assert [phase for phase, _ in runner.phases(grid, folder)] == ['pilot', 'main', 'validated']
  for cell in all_cells(grid, folder):
    assert runner.cell_folder(folder, cell).is_done()
    sets = runner.newest_step(scores[cell.id])
    expected = {evaluation.VALIDATION} if cell.seed == grid.pilot.seed else {'in-domain', 'far', 'further'}
    assert set(sets) == expected
  for job in runner.list_jobs(grid, folder):
    assert runner.job_state(folder, job, 60) == 'done'
    if not job.cells:
      assert set(runner.newest_step(scores[job.id])) == {'in-domain', 'far', 'further'}


def test_the_pilot_is_written_down_before_the_main_cells_start(grid, folder):
  pilot = pilots.read_outcome(folder, grid)
  for group in [g for phase, found in runner.phases(grid, folder) if phase != 'pilot' for g in found]:
    for cell in group.cells:
      assert runner.cell_folder(folder, cell).read_record()['commands'][0]['time'] > pilot['time']


def test_the_pilot_keeps_its_whole_curve_and_chooses_the_least(grid, folder):
  pilot = pilots.read_outcome(folder, grid)
  for key, curve in pilot['curves'].items():
    if key.endswith('/tuned'):
      assert pilot['chosen'][key] == min(curve, key=curve.get)
      assert len(curve) == 2
    else:
      assert set(curve) == {'0', '0.3', '0.6'}
      assert pilot['chosen'][key] == min((0.3, 0.6), key=lambda alpha: curve[f'{alpha:g}'])


def test_a_changed_pilot_is_refused(grid, folder, tmp_path):
  shutil.copy(folder / pilots.FILE, tmp_path)
  pilot = json.loads((tmp_path / pilots.FILE).read_text())
  pilot['chosen'][next(iter(pilot['chosen']))] = 0.123
  (tmp_path / pilots.FILE).write_text(json.dumps(pilot))
  with pytest.raises(UserError, match='has been changed since it was written'):
    pilots.read_outcome(tmp_path, grid)


NAN, INF = float('nan'), float('inf')


def test_a_value_that_is_not_finite_is_never_chosen():
  """Wherever it is: a NaN that comes first wins every `min`."""
  curves = {
    'x/t': {'0': 2.0, '0.2': NAN, '0.4': 1.9, '0.6': 1.8},
    'x/u': {'0': NAN, '0.2': 1.9, '0.4': -INF},
    'x/tuned': {'a': NAN, 'b': 2.0, 'c': INF},
    'x/unigram': {'0': NAN},  # no control was run: there is nothing to choose from
  }
  outcome = pilots.choose_values(curves)
  assert outcome['chosen'] == {'x/t': 0.6, 'x/u': 0.2, 'x/tuned': 'b'}
  assert outcome['not_finite'] == {'x/t': ['0.2'], 'x/u': ['0', '0.4'], 'x/tuned': ['a', 'c'], 'x/unigram': ['0']}
  assert outcome['curves']['x/t'] == {'0': 2.0, '0.4': 1.9, '0.6': 1.8}
  assert 'NaN' not in json.dumps(outcome, allow_nan=False)


def test_curves_without_a_finite_value_are_refused():
  with pytest.raises(
    UserError, match=r'pilot: no run of x/t, x/tuned has a finite likelihood .* lower the learning rate'
  ):
    pilots.choose_values({'x/t': {'0': 2.0, '0.2': NAN}, 'x/tuned': {'a': NAN}, 'x/u': {'0.2': 1.0}})


def test_a_diverged_run_of_the_pilot_is_logged_and_recorded(grid, folder, tmp_path, monkeypatch, caplog):
  bits = runner.results.bits_per_byte
  values = iter([bits, lambda _: NAN, lambda _: 2.0])  # the baseline, the first alpha, all other alphas
  value_of = lambda table: next(values, lambda _: 2.5)(table)
  monkeypatch.setattr(runner.results, 'bits_per_byte', value_of)
  shutil.copytree(folder, tmp_path / 'grid')
  (tmp_path / 'grid' / pilots.FILE).unlink()
  runner.Runner(grid, tmp_path / 'grid', None, None)._choose()
  pilot = pilots.read_outcome(tmp_path / 'grid', grid)
  ((key, names),) = pilot['not_finite'].items()
  assert names == ['0.3'] and pilot['chosen'][key] == 0.6
  assert f'pilot: {key}: the likelihood at 0.3 is not finite, so it is never chosen' in caplog.text


def test_a_pilot_of_an_older_version_is_found_by_its_short_names(grid, tmp_path):
  """If no two settings share a short name."""
  close = dataclasses.replace(grid, student_tokens=(16_384_000, 1_000_000, 1_000_001), teacher_tokens=(0,))
  keys = [cells.pilot_key(s, t) for s in cells.settings(close) for t in cells.sources(close, s)]
  short = [f'{s.name}/{t.name}' for s in cells.settings(close) for t in cells.sources(close, s)]
  assert keys[0] != short[0] and short[1] == short[2] == keys[1] != keys[2]
  content = {'chosen': {short[0]: 0.3, short[1]: 0.6}, 'curves': {}, 'criterion': 'x'}
  (tmp_path / pilots.FILE).write_text(json.dumps(content | {'time': 0, 'hash': pilots._digest(content)}))
  chosen = pilots.read_outcome(tmp_path, close)['chosen']
  assert chosen[keys[0]] == 0.3 and keys[2] not in chosen


def test_an_alpha_of_more_digits_is_chosen_with_all_of_them(grid, folder):
  alphas = (0.0, 0.1234567, 0.1234568)
  exact = dataclasses.replace(grid, pilot=dataclasses.replace(grid.pilot, alpha=alphas))
  curves: dict[str, dict[str, float]] = {}
  for k, group in enumerate(g for g in cells.pilot_groups(exact) if g.kind == 'distilled'):
    curves.setdefault(group.pilot_key, {})[format_exact(group.alpha)] = 2.0 - k / 10
  (curve,) = curves.values()
  assert len(curve) == 2
  chosen = pilots.choose_values(curves)['chosen']
  groups = [g for g in cells.validated_groups(exact, chosen) if g.kind == 'distilled']
  assert [g.alpha for g in groups] == [0.1234568] and groups[0].cells[0].alpha == 0.1234568


def test_a_report_needs_no_tokenizer_file(grid, tmp_path):
  """The grid's folder records the vocabulary size when the grid starts."""
  path = tokenizer_file(tmp_path, 300)
  base = dataclasses.replace(grid.base, data=dataclasses.replace(grid.base.data, tokenizer=str(path)))
  of_file = dataclasses.replace(grid, base=base)
  runner.claim_grid(tmp_path / 'grid', of_file)
  ids = [c.id for c in all_cells(of_file, tmp_path / 'grid')]
  path.unlink()
  kdjax.data.corpus.vocab_size.cache_clear()
  loaded = report.load_grid(tmp_path / 'grid')
  assert cells.vocab_size(loaded) == 300
  assert runner.grid_identity(loaded) == runner.grid_identity(of_file)
  assert [c.id for c in all_cells(loaded, tmp_path / 'grid')] == ids
  with pytest.raises(UserError, match='cannot be read'):
    cells.vocab_size(of_file)


def test_a_report_does_not_ask_what_the_plans_device_was(grid, tmp_path):
  odd = dataclasses.replace(grid, hardware=dataclasses.replace(grid.hardware, device='abacus', gib=3.0))
  runner.claim_grid(tmp_path, odd)
  assert report.load_grid(tmp_path).hardware.gib == 3.0


def test_a_vocabulary_that_is_not_the_tokenizers_is_refused_before_any_training(grid, home):
  path = tokenizer_file(home, 300)
  base = dataclasses.replace(grid.base, data=dataclasses.replace(grid.base.data, tokenizer=str(path)))
  wrong = dataclasses.replace(grid, base=base, vocab_size=299)
  with pytest.raises(UserError, match=r'vocab_size: 299, but .*words.json has 300 tokens'):
    command.run(wrong, home / 'wrong', progress=False)
  assert not (home / 'wrong' / 'jobs').exists()


def test_arms_share_weights_and_data_with_their_baseline(grid, folder):
  for _, groups in runner.phases(grid, folder):
    for group in groups:
      for cell, base in zip(group.cells, group.baseline, strict=group.kind != 'baseline'):
        mine, theirs = (runner.cell_folder(folder, c).read_record()['fingerprints'] for c in (cell, base))
        assert all(mine[name] == theirs[name] for name in ('data', 'init', 'tokenizer'))


def test_run_again_it_does_nothing(grid, folder, capsys):
  before = written(folder)
  assert before
  command.run(grid, folder, progress=False)
  assert written(folder) == before
  assert 'all done' in capsys.readouterr().out


@pytest.mark.slow
def test_a_cohorts_member_equals_the_same_cell_alone(grid, folder, home):
  """One teacher forward pass for several alphas changes no result beyond float tolerance."""
  job = next(job for job in runner.list_jobs(grid, folder) if job.phase == 'pilot' and len(job.cells) > 1)
  alone, copy = dataclasses.replace(grid, cohort=1), home / 'alone'
  command.run(alone, copy, cell=job.cells[0].id, progress=False)
  likelihood = lambda g, f: results.read_result(
    f / runner.newest_step(runner.read_scores(g, f)[job.cells[0].id])[evaluation.VALIDATION]
  )[0]['nll'].sum()
  assert likelihood(grid, folder) == pytest.approx(likelihood(alone, copy), rel=1e-5)


@pytest.mark.slow
def test_one_cell_alone_does_what_it_needs_and_no_more(grid, home):
  folder = home / 'one'
  cell = next(c for c in cells.cells_of(cells.pilot_groups(grid)) if c.arm == 'distilled')
  command.run(grid, folder, cell=cell.id, progress=False)
  done = [job for job in runner.list_jobs(grid, folder) if runner.job_state(folder, job, 60) == 'done']
  assert [bool(job.cells) for job in done] == [False, True]
  assert cell.id in {c.id for job in done for c in job.cells}
  assert not (folder / pilots.FILE).exists()


def test_main_cells_wait_for_the_pilot(grid, home, caplog):
  folder = home / 'waits'
  cell = next(c for c in cells.cells_of(cells.main_groups(grid)) if c.arm == 'baseline')
  command.run(grid, folder, cell=cell.id, progress=False)
  assert 'main cells wait for it' in caplog.text
  assert not runner.cell_folder(folder, cell).path.exists()


@pytest.mark.parametrize('text', ['0/2', '3/2', 'x', '1', '1/0', '-1/2'])
def test_a_shard_that_is_none_is_refused(grid, home, text):
  with pytest.raises(UserError, match='write i/n'):
    command.run(grid, home / 'shard', shard=text, progress=False)


def test_shards_are_a_partition(grid, folder):
  jobs = runner.list_jobs(grid, folder)
  parts = [runner.shard(jobs, f'{i}/3') for i in (1, 2, 3)]
  assert sorted(i for part in parts for i in part) == sorted(job.id for job in jobs if job.cells)


def test_an_unknown_cell_is_told_with_those_there_are(grid, home):
  with pytest.raises(UserError, match='0 cells of this grid have that in their id; name one, such as tiny'):
    command.run(grid, home / 'unknown', cell='nonsense', progress=False)


def test_another_grid_in_the_same_folder_is_refused(grid, folder):
  with pytest.raises(UserError, match=r'was written by another config: .*contrasts'):
    command.run(dataclasses.replace(grid, contrasts=('weak_helps',)), folder, progress=False)


@pytest.mark.slow
def test_a_failed_job_is_kept_with_its_error_and_the_rest_go_on(grid, home, monkeypatch):
  folder = home / 'fails'
  train = runner.experiments.train_students

  def broken(arms, *args):
    if arms[0].name == 'distilled':
      raise ValueError('this one breaks')
    return train(arms, *args)

  monkeypatch.setattr(runner.experiments, 'train_students', broken)
  with pytest.raises(TrainingError, match='this one breaks'):
    command.run(grid, folder, progress=False)
  states = {job.id: runner.job_state(folder, job, 60) for job in runner.list_jobs(grid, folder) if job.phase == 'pilot'}
  assert set(states.values()) == {'done', 'failed'}
  failed = next(i for i, state in states.items() if state == 'failed')
  assert 'this one breaks' in (folder / 'jobs' / failed / 'error.txt').read_text()
  assert RunFolder(folder / 'jobs' / failed).status()['error'] == 'this one breaks'
  assert 'this one breaks' in command.status_text(grid, folder)
  monkeypatch.undo()
  command.run(grid, folder, progress=False)  # and again: it is tried again
  assert all(runner.job_state(folder, job, 60) == 'done' for job in runner.list_jobs(grid, folder))


@pytest.mark.slow
def test_a_failed_teacher_fails_its_students_alone(grid, home, monkeypatch):
  folder = home / 'no-teacher'

  def broken(config, *args):
    raise UserError('no such teacher')

  monkeypatch.setattr(runner.experiments, 'train_teacher', broken)
  with pytest.raises(TrainingError, match='no such teacher'):
    command.run(grid, folder, progress=False)
  for job in runner.list_jobs(grid, folder):
    if job.phase == 'pilot':
      assert runner.job_state(folder, job, 60) == ('missing' if job.teacher else 'done'), job.id


def test_results_are_those_of_the_grids_own_cells(grid, folder):
  record = read_json(next((folder / 'jobs').glob('*/job.json')))
  assert record['seconds'] > 0 and record['flops'] > 0
