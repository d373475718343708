"""The main job, whole: a teacher, three students, the eval job, the table. And what it refuses."""

import dataclasses
import json
import logging
import pathlib
import shutil

import jax
import numpy as np
import pandas as pd
import pytest

from kdjax import cli, train
from kdjax import config as config_lib
from kdjax.analysis import table
from kdjax.config import fields as field_lib
from kdjax.errors import UserError
from kdjax.models import flops
from kdjax.runs.checkpoint import Checkpoints
from kdjax.runs.folder import RunFolder
from kdjax.runs.metrics import read_metrics
from kdjax.scoring import job as jobs
from kdjax.storage.paths import write_text
from kdjax.trainer import experiments
from tests import tiny

ARMS = ('baseline', 'distilled', 'unigram')
SETS = ('in-domain', 'far', 'further')


@pytest.fixture(scope='module')
def home(main_job, tmp_path_factory) -> pathlib.Path:
  """A copy of the finished run: the tests here add to it."""
  home = tmp_path_factory.mktemp('train')
  shutil.copytree(main_job / 'runs', home / 'runs')
  return home


@pytest.fixture(scope='module')
def make(main_job, home):
  """A config of the same texts, its runs in this module's copy."""
  return lambda **overrides: tiny.config(main_job, **({'runs': str(home / 'runs')} | overrides))


@pytest.fixture(scope='module')
def config(make):
  return make()


@pytest.fixture(scope='module')
def folder(home) -> pathlib.Path:
  (folder,) = (home / 'runs').glob('tiny-*')
  return folder


@pytest.fixture(scope='module')
def teacher(folder) -> RunFolder:
  return jobs.find_job(folder).teacher


def run(config, capsys, workdir=None) -> tuple[pathlib.Path, str]:
  capsys.readouterr()
  folder = train.run(config, workdir, progress=False)
  return folder, capsys.readouterr().out


def students(folder) -> dict[str, RunFolder]:
  return {run.name: run for run in jobs.find_job(folder).students}


def written(root: pathlib.Path) -> dict[pathlib.Path, int]:
  """When each checkpoint's files were written."""
  return {
    path: path.stat().st_mtime_ns for path in sorted(pathlib.Path(root).rglob('checkpoints/**/*')) if path.is_file()
  }


def results(root: pathlib.Path) -> dict[pathlib.Path, int]:
  return {path: path.stat().st_mtime_ns for path in sorted(root.rglob('*.parquet'))}


def test_a_teacher_and_three_students_are_trained(folder, teacher):
  assert set(students(folder)) == set(ARMS)
  for each in (teacher, *students(folder).values()):
    assert each.is_done()
    assert each.status()['step'] == each.status()['total_steps']
  assert teacher.status()['step'] == tiny.STEPS // 2
  assert students(folder)['baseline'].status()['step'] == tiny.STEPS


def test_the_folders_stand_where_the_config_says(folder, teacher, config):
  runs = pathlib.Path(config.runs)
  assert folder.parent == runs and folder.name.startswith('tiny-')
  assert teacher.path.parent == runs / 'teachers'
  assert (runs / 'stores').is_dir()


def test_the_table_has_a_row_for_each_model(folder):
  text = (folder / 'table.txt').read_text()
  first = text[text.index('bits/byte (perplexity)') :].split('\n\n')[0].splitlines()
  assert [line.split()[0] for line in first[2:]] == ['teacher', *ARMS]
  frame = pd.read_csv(folder / 'results.csv')
  assert set(zip(frame['arm'], frame['set'], strict=True)) == {(a, s) for a in ('teacher', *ARMS) for s in SETS}
  assert np.isfinite(frame[['perplexity', 'bits_per_byte', 'bits_per_byte_fitted', 'top1', 'entropy', 'ece']]).all(None)
  assert frame[frame['arm'] != 'teacher'][['kl_to_teacher', 'agreement']].notna().all(None)


def test_training_has_taught_something(folder):
  for arm in ARMS:
    ce = [record['ce'] for record in read_metrics(students(folder)[arm].path)]
    assert ce[-1] < ce[0] - 0.5


def test_the_figure_is_there(folder):
  assert (folder / 'run.png').read_bytes().startswith(b'\x89PNG')


def test_run_again_it_trains_nothing_scores_nothing_and_prints_the_same_table(folder, home, config, capsys):
  before, scored, text = written(home), results(home), (folder / 'table.txt').read_text()
  assert before and scored
  again, out = run(config, capsys)
  assert again == folder
  assert written(home) == before
  assert results(home) == scored
  lines = text.splitlines()
  assert out.splitlines()[1 : len(lines)] == lines[1:]


def test_students_share_their_first_weights_and_their_data(folder):
  found = [run.read_record()['fingerprints'] for run in students(folder).values()]
  for name in ('data', 'init', 'tokenizer', 'teacher'):
    assert len({f[name] for f in found}) == 1, name


def test_the_teacher_has_weights_and_data_order_of_its_own(folder, teacher):
  baseline = students(folder)['baseline'].read_record()['fingerprints']
  for name in ('data', 'init'):
    assert teacher.read_record()['fingerprints'][name] != baseline[name]


def test_no_teacher_weight_is_in_any_students_checkpoint(folder, teacher, config):
  """By name, by shape and by weight: a checkpoint holds the student, its two moments, and a few scalars."""
  model = jobs.frozen.build_model(teacher)
  theirs = {leaf.shape for leaf in jax.tree.leaves(model.abstract())}
  for each in students(folder).values():
    own = jobs.frozen.build_model(each)
    shapes = [leaf.shape for leaf in jax.tree.leaves(own.abstract())]
    assert theirs.isdisjoint({shape for shape in shapes if len(shape) > 1})
    saves = Checkpoints(each.checkpoints, read_only=True)
    leaves = saves.meta(tiny.STEPS)['leaves']
    saves.close()
    names = [f'{item}/{name}' for item, found in leaves.items() for name in found]
    assert not [name for name in names if 'teacher' in name.lower() or 'unigram' in name.lower()]
    saved = [tuple(shape) for found in leaves.values() for _, shape, _ in found.values()]
    assert sorted(s for s in saved if s) == sorted(3 * shapes)
    arrays = sum(4 * np.prod(shape, dtype=int) for shape in saved)
    assert arrays == 4 * (3 * own.n_params + sum(not s for s in saved))


def test_metrics_hold_every_step_once_with_all_that_is_promised(folder, teacher):
  always = {'ce', 'loss', 'grad_norm', 'learning_rate', 'alpha', 'tokens', 'memory_gib', 'skipped', 'skipped_in_row'}
  rates = {'tokens_per_second', 'student_tflops', 'teacher_tflops'}
  for each in (teacher, *students(folder).values()):
    records = read_metrics(each.path)
    assert [r['step'] for r in records] == list(range(1, each.status()['total_steps'] + 1))
    assert all(always <= r.keys() for r in records)
    assert any(rates <= r.keys() for r in records)
    at = [r['step'] for r in records if 'validation_ce' in r]
    assert at == sorted({*range(4, len(records) + 1, 4), len(records)})
    assert all(np.isfinite(list(r.values())).all() for r in records)
  for arm in ('distilled', 'unigram'):
    records = read_metrics(students(folder)[arm].path)
    assert all({'kd', 'agreement', 'student_entropy', 'teacher_entropy'} <= r.keys() for r in records)


def test_the_mixed_loss_is_the_mixture_of_its_parts(folder, config):
  for arm in ('distilled', 'unigram'):
    for r in read_metrics(students(folder)[arm].path):
      alpha = config.student.alpha
      assert r['alpha'] == pytest.approx(alpha)
      assert r['loss'] == pytest.approx((1 - alpha) * r['ce'] + alpha * r['kd'], rel=1e-5)
  for r in read_metrics(students(folder)['baseline'].path):
    assert r['alpha'] == 0 and r['loss'] == pytest.approx(r['ce'], rel=1e-6)


def test_the_learning_rate_in_the_metrics_is_the_schedules(folder, config):
  rate = experiments.learning_rate(config.student.optimizer, tiny.STEPS)
  records = read_metrics(students(folder)['baseline'].path)
  np.testing.assert_allclose([r['learning_rate'] for r in records], [rate(s) for s in range(tiny.STEPS)], rtol=1e-6)


def test_the_baseline_counts_no_teacher_flops(folder):
  """Rates are the cohort's: they hold the teacher's part because one of its members learns from it."""
  for r in read_metrics(students(folder)['distilled'].path):
    if 'student_tflops' in r:
      assert r['student_tflops'] > r['teacher_tflops'] > 0


def test_tensorboard_events_are_there(folder, teacher):
  for each in (teacher, *students(folder).values()):
    assert list((each.path / 'tensorboard').glob('events.out.tfevents.*'))


def test_a_run_knows_what_it_is(folder):
  for arm, each in students(folder).items():
    identity = each.read_record()
    assert identity['config']['arm'] == arm
    assert identity['config']['alpha'] == (0.0 if arm == 'baseline' else 0.4)
    assert {'data', 'tokenizer', 'init'} <= identity['fingerprints'].keys()
    assert identity['versions']['jax'] == jax.__version__
    assert identity['commands'] and identity['commands'][0]['argv']
    facts = identity['facts']
    assert facts['parameters'] == flops.count_params(jobs.frozen.build_model(each).config).total
    assert facts['tokens'] == tiny.STEPS * 8 * 16


def test_changing_how_it_is_evaluated_scores_again_and_trains_nothing(make, folder, home, config, capsys):
  before, scored = written(home), results(home)
  other = make(**{'eval.window': 32, 'eval.stride': 8})
  again, out = run(other, capsys)
  assert again == folder
  assert written(home) == before
  new = results(home)
  assert {path: new[path] for path in scored} == scored
  assert len(new) == 2 * len(scored)
  assert 'windows of 32 tokens' in out
  _, out = run(config, capsys)  # and back: the files are still there
  assert results(home) == new
  assert 'windows of 16 tokens' in out


def test_more_context_does_not_hurt(folder):
  """Both evaluations of the test above are of the same documents and tokens."""
  for each in students(folder).values():
    tables = [jobs.results.read_result(path)[0] for path in each.results.glob('far-*.parquet')]
    assert len({tuple(t['doc']) for t in tables}) == 1
    assert len({tuple(t['tokens']) for t in tables}) == 1


def test_another_alpha_shares_the_teacher(make, folder, home, teacher, capsys):
  before = written(teacher.path)
  other, out = run(make(**{'student.alpha': 0.9, 'student.arms': ('distilled',)}), capsys)
  assert other != folder
  assert jobs.find_job(other).teacher.path == teacher.path
  assert written(teacher.path) == before
  assert len(list((home / 'runs' / 'teachers').iterdir())) == 1
  assert 'less the baseline' not in out and 'PGR' not in out and 'distilled' in out
  (mine,) = students(other).values()
  theirs = students(folder)['distilled']
  assert mine.read_record()['fingerprints'] == theirs.read_record()['fingerprints']


def test_a_baseline_alone_needs_no_teacher(tmp_path, home, capsys):
  config = tiny.config(
    home, **{'student.arms': ('baseline',), 'runs': str(tmp_path), 'data.cache': str(home / 'runs' / 'stores')}
  )
  folder, out = run(config, capsys)
  assert not (tmp_path / 'teachers').exists()
  assert 'less the baseline' not in out and 'baseline' in out
  assert jobs.find_job(folder).teacher is None


def test_a_teacher_named_by_its_folder(make, folder, teacher, tmp_path, capsys):
  """The distilled student is then the one that learned from the same teacher in the shared run: bit for bit."""
  config = make(**{'teacher.run': str(teacher.path), 'student.arms': ('baseline', 'distilled')})
  workdir = tmp_path / 'mine'
  _, out = run(config, capsys, workdir)
  assert jobs.find_job(workdir).teacher.path == teacher.path
  assert [line.split()[0] for line in out[out.index('bits/byte') :].split('\n\n')[0].splitlines()[2:]] == [
    'teacher',
    'baseline',
    'distilled',
  ]
  for arm in ('baseline', 'distilled'):
    ours, theirs = read_metrics(workdir / 'students' / arm), read_metrics(folder / 'students' / arm)
    np.testing.assert_allclose([r['ce'] for r in ours], [r['ce'] for r in theirs], rtol=1e-5)
  assert (
    students(workdir)['distilled'].read_record()['fingerprints']['teacher']
    == students(folder)['distilled'].read_record()['fingerprints']['teacher']
  )


def refused(config, workdir=None) -> str:
  with pytest.raises(UserError) as e:
    train.run(config, workdir, progress=False)
  assert '\n' not in str(e.value)
  return str(e.value)


def test_a_folder_of_another_config_is_refused_naming_the_fields(make, folder, home):
  before = written(home)
  config = make(**{'student.alpha': 0.7, 'student.optimizer.weight_decay': 0.2})
  found = refused(config, folder)
  assert 'was written by another config' in found
  assert 'student.alpha is 0.4 there, 0.7 here' in found
  assert 'student.optimizer.weight_decay is 0.1 there, 0.2 here' in found
  assert written(home) == before


def test_a_folder_of_something_else_is_left_alone(folder, home, config, tmp_path):
  (tmp_path / 'experiment.json').write_text('{"resolved":')
  assert 'is damaged' in refused(config, tmp_path)


@pytest.mark.parametrize(
  ('changes', 'words'),
  [
    ({'teacher.run': 'nowhere'}, 'nowhere: no such folder'),
    ({'teacher.step': 5}, 'has no checkpoint of step 5; it has'),
    ({'data.tokenizer': 'bpe', 'data.vocab_size': 300}, 'learned with another tokenizer'),
  ],
)
def test_a_teacher_that_does_not_fit_is_refused_before_any_training(make, folder, teacher, tmp_path, changes, words):
  config = make(**({'teacher.run': str(teacher.path)} | changes))
  found = refused(config, tmp_path / 'mine')
  assert words in found
  assert not (tmp_path / 'mine' / 'students').exists()


def test_a_students_vocabulary_that_is_too_small_is_refused_before_the_teacher_is_trained(make, home, tmp_path):
  config = make(**{'student.model.vocab_size': 100, 'teacher.seed': 77})
  assert 'student.model.vocab_size = 100 is less' in refused(config, tmp_path / 'mine')
  assert len(list((home / 'runs' / 'teachers').iterdir())) == 1


def test_a_batch_that_the_mesh_does_not_divide_is_refused_before_the_teacher_is_trained(make, home, tmp_path):
  config = make(**{'student.batch_size': 12, 'teacher.seed': 78})
  assert "does not divide the student's batch_size / microbatches = 12" in refused(config, tmp_path / 'mine')
  assert len(list((home / 'runs' / 'teachers').iterdir())) == 1


def test_a_mesh_of_other_than_the_devices_here_is_refused(make, tmp_path):
  config = make(**{'mesh.tensor': 3})
  assert 'does not divide the 8 devices here' in refused(config, tmp_path / 'mine')


def test_more_tokens_than_an_epoch_are_noted(folder, home, config, caplog):
  corpus = train.prepare(config.data, config.eval, config.runs, progress=False)
  section = dataclasses.replace(config.student, tokens=50_000)
  stream = experiments.BatchStream(experiments._windows(config, section, corpus), 8, 0)
  with caplog.at_level(logging.WARNING, 'kdjax'):
    experiments._warn_of_epochs('student', section, stream, config_lib.n_steps(section, config.data))
    assert 'distinct tokens' in caplog.text
    caplog.clear()
    experiments._warn_of_epochs('student', config.student, stream, tiny.STEPS)
    assert not caplog.text


def test_arms_of_another_data_order_are_refused_by_the_table(folder, home, tmp_path):
  copied = tmp_path / 'runs' / folder.name
  shutil.copytree(folder, copied)
  shutil.copytree(home / 'runs' / 'teachers', tmp_path / 'runs' / 'teachers')
  path = copied / 'students' / 'unigram' / 'run.json'
  identity = json.loads(path.read_text())
  identity['fingerprints']['data'] = 'another'
  path.write_text(json.dumps(identity))
  with pytest.raises(UserError, match='their data fingerprints differ'):
    table.write_table(copied)


def test_a_run_folder_can_be_moved(folder, home, tmp_path):
  """Paths inside it are relative: the table is the same from the new place."""
  copied = tmp_path / 'elsewhere' / folder.name
  shutil.copytree(folder, copied)
  shutil.copytree(home / 'runs' / 'teachers', tmp_path / 'elsewhere' / 'teachers')
  text = table.write_table(copied)
  assert text.splitlines()[1:] == table.write_table(folder).splitlines()[1:]


def test_a_run_folder_is_no_place_for_an_experiment(make, folder):
  assert 'is the folder of one run' in refused(make(), folder / 'students' / 'baseline')


def test_a_workdir_that_cannot_be_one_is_told_in_one_line(main_job, tmp_path, capsys):
  (tmp_path / 'file').write_text('')
  config = tiny.write_config(main_job)
  for workdir in (tmp_path / 'file', tmp_path / 'file' / 'sub'):
    with pytest.raises(SystemExit) as e:
      train.main([f'--config={config}', f'--workdir={workdir}'])
    err = capsys.readouterr().err
    assert e.value.code == 2 and 'Traceback' not in err
    assert [str(workdir) in line for line in err.splitlines() if line.startswith('error: ')] == [True]


def test_a_kernel_of_other_hardware_is_refused_before_any_training(make, tmp_path):
  for kernel, needs in (('splash', 'TPU'), ('cudnn', 'GPU')):
    config = make(**{'student.model.attention': kernel, 'runs': str(tmp_path)})
    assert f'attention={kernel} runs on {needs}s, not on cpu' in refused(config)
  assert not (tmp_path / 'teachers').exists()


def test_a_teacher_of_other_text_is_another_teacher(main_job, tmp_path):
  """Behind the same path: a teacher is found by what it learned from."""
  shutil.copytree(main_job, tmp_path / 'home')
  config = tiny.config(tmp_path / 'home')
  found = []
  for _ in range(2):
    corpus = train.prepare(config.data, config.eval, config.runs, progress=False)
    found.append(experiments.teacher_folder(config, corpus).path)
    with open(tmp_path / 'home' / 'home.jsonl', 'a') as file:
      file.writelines(json.dumps({'text': f'one more document, number {i}'}) + '\n' for i in range(20))
  assert found[0] != found[1]


def test_files_that_say_so_already_are_left_alone(tmp_path):
  """So that a finished run can stand on a read-only disk."""
  inodes = set()
  for text in ('text', 'text', 'other'):
    write_text(tmp_path / 'x', text)
    inodes.add((tmp_path / 'x').stat().st_ino)
  assert len(inodes) == 2 and (tmp_path / 'x').read_text() == 'other'


@pytest.mark.parametrize(('name', 'known'), [('weak2strong', '8c385e2f8494'), ('strong2weak', 'de88abc274da')])
def test_what_an_experiment_was_called_before_later_fields_came_it_is_called_still(name, known):
  """As named before the fields with an implied value existed: otherwise nobody would find the runs that are done."""
  config = cli.load_config(f'{pathlib.Path(__file__).parents[1]}/configs/{name}.py')
  assert config_lib.fingerprint(experiments.experiment_identity(config)) == known


@pytest.mark.parametrize(
  ('fields', 'differs'),
  [
    ({'loss.teacher_top_p': '.9', 'loss.temperature': '2'}, True),
    ({'loss.teacher_top_p': '.9', 'loss.temperature': '2', 'student.arms': 'unigram'}, True),
    ({'loss.teacher_top_p': '.9', 'loss.temperature': '2', 'student.arms': 'baseline'}, False),
    ({'loss.teacher_top_p': '.9'}, False),
    ({'loss.temperature': '2'}, False),
    ({'loss.teacher_top_k': '5', 'loss.temperature': '2'}, False),
  ],
  ids=str,
)
def test_a_run_whose_nucleus_was_cut_at_temperature_1_is_another_run(fields, differs):
  """Only runs whose results have changed get a new identity."""
  config = cli.load_config(f'{pathlib.Path(__file__).parents[1]}/configs/weak2strong.py', fields)
  older = field_lib.identity(config.loss)
  assert (experiments.experiment_identity(config)['loss'] != older) == differs
  for arm in config.student.arms:
    run = experiments.run_identity(config, config.student, config.student.model, arm, 'teacher')
    assert ('nucleus' in run['loss']) == (differs and arm != 'baseline')
