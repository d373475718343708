"""Folders on a disk and in an object store: whole files, files that are created once, paths from one to another, and whole runs."""

import contextlib
import dataclasses
import errno
import gzip
import lzma
import os
import pathlib
import shutil
import subprocess
import sys
import threading

import pytest

from kdjax import aot, convert, evaluate, generate, grid, prepare, report
from kdjax import config as config_lib
from kdjax import train as train_command
from kdjax.data.sources import documents, signature
from kdjax.data.tokenizer import Tokenizer, train_bpe
from kdjax.errors import StoreUnavailable, UserError
from kdjax.programs import compiling
from kdjax.runs.folder import RunFolder
from kdjax.runs.metrics import MetricWriter, read_metrics
from kdjax.runs.trackers import KINDS
from kdjax.storage import paths
from kdjax.teachers.huggingface import is_folder
from tests import bucket, commands, test_aot, tiny
from tests.scoring import lm_eval_tasks

STORE = f'gs://{bucket.BUCKET}'


@pytest.fixture(scope='module')
def store():
  """The environment of a process that uses the emulator; this one too."""
  pytest.importorskip('gcp_storage_emulator', reason='the emulator of an object store is in the [dev] extra')
  pytest.importorskip('gcsfs', reason='the client of gs:// is in the [gcs] extra')
  with bucket.serving() as port, pytest.MonkeyPatch.context() as patch:
    for name, value in bucket.environment(port).items():
      patch.setenv(name, value)
    yield bucket.environment(port)


@pytest.fixture(params=['disk', 'store'])
def folder(request, tmp_path):
  if request.param == 'disk':
    return paths.Path(tmp_path)
  request.getfixturevalue('store')
  return paths.Path(f'{STORE}/{tmp_path.name}')


def test_a_file_is_replaced_whole_or_left_as_it_was(folder):
  file = folder / 'deep' / 'a.txt'
  paths.write_text(file, 'one')
  with contextlib.suppress(RuntimeError), paths.replacing(file) as temporary:
    temporary.write_text('half')
    raise RuntimeError
  assert file.read_text() == 'one'
  with paths.replacing(file) as temporary:
    temporary.write_bytes(b'two')
  assert file.read_text() == 'two'
  assert [path.name for path in file.parent.iterdir()] == ['a.txt']
  assert paths.read_json(folder / 'nothing.json') is None


def test_of_several_that_create_a_file_one_succeeds(folder):
  folder.mkdir(parents=True, exist_ok=True)
  made: list[int] = []

  def create(k: int) -> None:
    try:
      paths.create(folder / 'owner.json', str(k))
      made.append(k)
    except FileExistsError:
      pass

  threads = [threading.Thread(target=create, args=(k,)) for k in range(8)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert len(made) == 1 and (folder / 'owner.json').read_text() == str(made[0])


def test_what_another_has_written_meanwhile_is_seen(folder):
  assert not (folder / 'late').exists() and not list(folder.glob('late*'))
  (folder / 'late').write_text('1')
  assert [path.name for path in folder.glob('late*')] == ['late']


def test_a_mirror_shows_what_was_appended_once_it_is_pushed(folder):
  mirror = paths.Mirror(folder)
  (mirror.local / 'sub').mkdir()
  for k in range(3):
    with open(mirror.local / 'sub' / 'lines', 'a') as file:
      file.write(f'{k}\n')
    mirror.push()
    assert (folder / 'sub' / 'lines').read_text() == ''.join(f'{n}\n' for n in range(k + 1))


def test_what_an_earlier_process_wrote_is_appended_to(folder):
  for line in ('one', 'two'):
    mirror = paths.Mirror(folder)
    with mirror.appending('log') as file:
      file.write(f'{line}\n')
    mirror.push()
  assert (folder / 'log').read_text() == 'one\ntwo\n'


def test_a_runs_trackers_go_on_where_an_earlier_process_left_them(folder, monkeypatch):
  class Last:
    def __init__(self, local, step, about):
      self.file = local / 'last'

    write = flush = lambda *_: None

    def close(self):
      self.file.write_text('said at the end')

  monkeypatch.setitem(KINDS, 'last', Last)
  for after, steps in ((0, range(1, 6)), (4, range(5, 9))):
    writer = MetricWriter(folder, after, ('csv', 'last'))
    for step in steps:
      writer.write(step, {'ce': float(step)})
    writer.flush()
    writer.close()
  wanted = [f'{step},{float(step)}' for step in range(1, 9)]
  assert (folder / 'metrics.csv').read_text().splitlines() == ['step,ce', *wanted]
  assert [record['step'] for record in read_metrics(folder)] == list(range(1, 9))
  assert (folder / 'last').read_text() == 'said at the end'


@pytest.mark.parametrize(
  ('path', 'start', 'relative'),
  [
    ('runs/teachers/a', 'runs/b', '../teachers/a'),
    ('/data/teachers/a', '/data/runs/b', '../../teachers/a'),
    ('gs://x/runs/teachers/a', 'gs://x/runs/b', '../teachers/a'),
    ('gs://y/a', 'gs://x/runs/b', 'gs://y/a'),
    ('/local/a', 'gs://x/runs/b', '/local/a'),
    ('gs://x/a', '/local/b', 'gs://x/a'),
  ],
)
def test_a_path_is_found_again_from_a_folder_by_its_relative_name(path, start, relative):
  assert paths.relative(path, start) == relative
  if not (paths.is_remote(start) and relative.startswith('/')):
    assert str(paths.resolve(start, relative)) == path


@pytest.mark.parametrize(
  ('folder', 'says'),
  [('hdfs://x/runs', 'no run can be kept in hdfs://'), ('gs://nowhere/runs', 'correct the name of the')],
)
def test_a_store_that_cannot_be_written_is_told_in_one_line(store, folder, says):
  with pytest.raises(UserError, match=says) as e:
    paths.check_writable(folder)
  assert len(str(e.value).splitlines()) == 1
  paths.check_writable(f'{STORE}/anything')


def test_a_client_that_is_not_installed_is_named(monkeypatch):
  monkeypatch.setitem(sys.modules, 's3fs', None)
  for read in (Tokenizer.from_file, lambda path: list(documents(path))):
    with pytest.raises(UserError, match=r"pip install 'kdjax\[s3\]'"):
      read('s3://bucket/text.json')


@pytest.mark.parametrize('field', ['runs', 'teacher.run', 'data.tokenizer'])
def test_a_command_without_the_client_says_what_to_install(tmp_path, field):
  config = tiny.write_config(tmp_path)
  script = f"""
import sys
sys.modules['gcsfs'] = None
from kdjax import train
train.main(['--config={config}', '--config.{field}=gs://bucket/there'])
"""
  command = [sys.executable, '-c', script]
  done = subprocess.run(
    command, env=commands.environment(), cwd=commands.REPO, capture_output=True, text=True, timeout=100
  )
  told = [line for line in done.stderr.splitlines() if line.startswith('error: ')]
  assert done.returncode == 2 and 'Traceback' not in done.stderr, done.stderr
  assert len(told) == 1 and "pip install 'kdjax[gcs]'" in told[0]


@pytest.mark.parametrize('open_it', [RunFolder, is_folder, paths.check_writable, generate.models])
def test_no_run_is_looked_for_where_none_can_be_kept(open_it):
  with pytest.raises(UserError, match=r's3://bucket/run: no run can be kept in s3://.*gs://'):
    open_it('s3://bucket/run')


@pytest.mark.parametrize(('code', 'passes'), [(401, True), (429, True), (503, True), (403, False), (404, False)])
def test_which_answers_to_tensorstore_may_pass(code, passes):
  """It writes the arrays of checkpoints and retries a 401 not at all; a fault campaign found that."""
  error = ValueError(f"PERMISSION_DENIED: Error writing gs://bucket/runs/a: Text [http_response_code='{code}']")
  assert paths.is_outage('gs://bucket/runs', error) == passes
  assert not paths.is_outage('/runs', error)


def test_nobody_answers_in_time(monkeypatch):
  monkeypatch.setattr(paths, 'PATIENCE', 0.2)
  monkeypatch.setattr(paths, '_trouble', lambda *_: threading.Event().wait(2))
  with pytest.raises(StoreUnavailable, match='gs://bucket/runs: the store does not answer'):
    paths.check_writable('gs://bucket/runs')


@pytest.mark.parametrize(
  ('error', 'raised'),
  [(StoreUnavailable('the store does not answer (503)'), StoreUnavailable), (OSError('HttpError: 403'), UserError)],
)
def test_a_store_that_is_away_at_the_start_is_not_the_users_error(error, raised, monkeypatch):
  """A launcher restarts the one and not the other."""
  monkeypatch.setattr(paths, '_trouble', lambda *_: error)
  with pytest.raises(raised) as caught:
    paths.check_writable('gs://bucket/runs')
  assert type(caught.value) is raised and 'gs://bucket/runs' in str(caught.value)


def train(config, environment, *arguments) -> subprocess.CompletedProcess:
  command = [sys.executable, '-m', 'kdjax.train', f'--config={config}', *arguments]
  return subprocess.run(
    command, env=commands.environment() | environment, cwd=commands.REPO, capture_output=True, text=True, timeout=300
  )


def test_a_bucket_that_is_not_there_ends_the_command_before_it_begins(store, tmp_path):
  done = train(tiny.write_config(tmp_path, runs='gs://nowhere/runs'), store)
  assert done.returncode == 2
  told = [line for line in done.stderr.splitlines() if line.startswith('error: ')]
  assert len(told) == 1 and 'gs://nowhere/runs cannot be written' in told[0]
  assert 'reading' not in done.stderr and 'Traceback' not in done.stderr


@pytest.mark.slow
def test_a_run_in_an_object_store_killed_and_started_again_is_the_run_on_a_disk(store, tmp_path):
  fields = {'student.tokens': 40 * 8 * 16, 'checkpoint.every': 10, 'data.cache': str(tmp_path / 'stores')}
  config = tiny.write_config(tmp_path, **fields, runs=f'{STORE}/{tmp_path.name}')
  folder = paths.Path(f'{STORE}/{tmp_path.name}/mine')
  arguments = (f'--workdir={folder}',)
  process = subprocess.Popen(
    [sys.executable, '-m', 'kdjax.train', f'--config={config}', *arguments],
    env=commands.environment() | store,
    cwd=commands.REPO,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
    start_new_session=True,
  )
  student = RunFolder(folder / 'students' / 'distilled')
  commands.wait_for(lambda: ((student.status() or {}).get('step') or 0) >= 20, process)
  commands.kill(process)
  done = train(config, store, *arguments)
  assert done.returncode == 0, done.stderr[-3000:]
  assert 'bits/byte' in done.stdout
  assert student.is_done()
  again = train(config, store, *arguments)
  assert again.returncode == 0 and 'step/s' not in again.stderr

  disk = tiny.write_config(tmp_path, **fields, runs=str(tmp_path / 'disk'))
  assert train(disk, {}, f'--workdir={tmp_path / "disk" / "mine"}').returncode == 0
  like = RunFolder(tmp_path / 'disk' / 'mine' / 'students' / 'distilled')
  assert commands.metrics(student.path) == commands.metrics(like.path)
  tables = [paths.Path(where / 'table.txt').read_text() for where in (folder, tmp_path / 'disk' / 'mine')]
  assert len({table.partition('\n')[2] for table in tables}) == 1  # the first line names the folder
  assert (folder / 'run.png').exists() and list((student.path / 'tensorboard').iterdir())


def test_a_disk_needs_no_check(tmp_path):
  paths.check_writable(tmp_path / 'not there yet')
  assert os.listdir(tmp_path) == [] and isinstance(paths.Path('a') / 'b', pathlib.PurePath)


def test_text_and_tokenizer_may_lie_in_the_store(store, tmp_path):
  texts = {
    'a.jsonl': b'{"text": "one"}\n',
    'b.jsonl.gz': gzip.compress(b'{"text": "two"}\n'),
    'c.txt.xz': lzma.compress(b'three'),
  }
  for name, data in texts.items():
    (paths.Path(f'{STORE}/texts') / name).write_bytes(data)
  assert list(documents(f'{STORE}/texts/*')) == ['one', 'two', 'three']
  deep = paths.Path(f'{STORE}/texts/deep/er/d.jsonl')
  deep.write_bytes(b'{"text": "four"}\n')
  assert list(documents(f'{STORE}/texts/**/*.jsonl')) == ['one', 'four']
  assert list(documents(f'{STORE}/t*/*/*/d.jsonl')) == list(documents(str(deep))) == ['four']
  with pytest.raises(UserError, match=r'is a folder; give a glob such as .*/texts/\*\*/\*.jsonl'):
    signature(f'{STORE}/texts')
  before = signature(f'{STORE}/texts/*.jsonl')
  (paths.Path(f'{STORE}/texts') / 'a.jsonl').write_bytes(b'{"text": "another"}\n')
  assert signature(f'{STORE}/texts/*.jsonl') != before
  with pytest.raises(UserError, match='matches no file'):
    signature(f'{STORE}/nowhere/*.jsonl')
  tokenizer = train_bpe(['one two three four'] * 20, 300)
  tokenizer.save(tmp_path / 'tokenizer')
  file = tmp_path / 'tokenizer' / 'tokenizer.json'
  (paths.Path(STORE) / 'tokenizer.json').write_bytes(file.read_bytes())
  same = Tokenizer.from_file(f'{STORE}/tokenizer.json', tokenizer.separator)
  assert same.vocab_size == tokenizer.vocab_size
  with pytest.raises(UserError, match=r'only a tokenizer.json can be read from an object store'):
    Tokenizer.from_file(f'{STORE}/a.model')


def test_names_in_a_store_may_have_brackets(store, tmp_path):
  home = paths.Path(f'{STORE}/{tmp_path.name}')
  for name in ('my [v1]/a.txt', 'my [v1]/b.txt', 'c1.txt'):
    (home / name).write_text(name)
  assert list(documents(f'{home}/my [v1]/*.txt')) == ['my [v1]/a.txt', 'my [v1]/b.txt']
  assert list(documents(f'{home}/my [v1]/a.txt')) == ['my [v1]/a.txt']
  assert list(documents(f'{home}/c[1].txt')) == ['c1.txt']


@pytest.mark.parametrize('name', ['my [v1]', 'a*b', 'x**y', 'q?', '[!a]'])
def test_a_folders_name_is_no_pattern_in_a_glob(folder, name):
  for file in ('owner-1.json', 'owner-2.json', 'other.txt'):
    (folder / name / file).parent.mkdir(parents=True, exist_ok=True)
    (folder / name / file).write_text('{}')
  assert sorted(path.name for path in (folder / name).glob('owner-*.json')) == ['owner-1.json', 'owner-2.json']
  assert all(path.parent == folder / name for path in (folder / name).glob('*'))
  assert list((folder / 'nowhere' / name).glob('*')) == []


def test_a_run_in_a_folder_with_brackets_is_trained_and_found_again(tmp_path):
  config = tiny.config(tmp_path, runs=str(tmp_path / 'my runs [v1] a*b'), **{'student.arms': ('distilled',)})
  folder = train_command.run(config, progress=False)
  assert folder.parent == tmp_path / 'my runs [v1] a*b' and RunFolder(folder / 'students' / 'distilled').is_done()
  table = (folder / 'table.txt').read_text()
  before = {path: path.stat().st_mtime_ns for path in pathlib.Path(folder).rglob('*.parquet')}
  train_command.run(config, progress=False)
  evaluate.main(['--workdir', str(folder)])
  assert {path: path.stat().st_mtime_ns for path in pathlib.Path(folder).rglob('*.parquet')} == before
  assert (folder / 'table.txt').read_text() == table


def test_a_backslash_in_the_name_of_runs_is_refused(tmp_path):
  with pytest.raises(UserError, match='reads a backslash as a slash'):
    paths.check_writable(f'{tmp_path}/a\\b')


# ---- the home folder


@pytest.fixture
def at_home(tmp_path, monkeypatch) -> pathlib.Path:
  """A home folder. The current folder is another one, which must stay empty; nowhere is a '~' in the name of a file."""
  (tmp_path / 'home').mkdir()
  (tmp_path / 'here').mkdir()
  monkeypatch.setenv('HOME', str(tmp_path / 'home'))
  monkeypatch.chdir(tmp_path / 'here')
  yield tmp_path / 'home'
  assert os.listdir(tmp_path / 'here') == []
  assert not list(tmp_path.rglob('~*'))


def test_a_tilde_is_expanded_in_front_alone_and_in_no_store(at_home):
  assert paths.expand('~/a/~b') == f'{at_home}/a/~b' and paths.expand('~') == str(at_home)
  assert paths.expand('a/~/b') == 'a/~/b' and paths.expand('gs://~/b') == 'gs://~/b'
  assert paths.expand('~nobody-of-this-name/x') == '~nobody-of-this-name/x'
  assert paths.runs_path('~/a') == paths.absolute('~/a') == RunFolder('~/a').path == paths.Path(at_home / 'a')
  assert paths.relative('~/a/b', '~/c') == '../a/b'


def test_every_path_of_a_config_may_start_with_a_tilde(main_job, at_home):
  (teacher,) = (main_job / 'runs' / 'teachers').iterdir()
  shutil.copytree(teacher, at_home / 'teacher')
  tiny.write_text(at_home / 'texts [1]')
  (at_home / 'task.jsonl').write_text(
    '\n'.join(f'{{"context": "a", "choices": [" b", " c"], "answer": {k % 2}, "id": {k}}}' for k in range(2))
  )
  Tokenizer().save(at_home / 'tokenizer')
  (at_home / 'tokenizer' / 'tokenizer.json').write_text(Tokenizer().to_json())
  fields = {
    'runs': '~/runs',
    'data.source': '~/texts [1]/home.jsonl@.5, ~/texts [1]/further.jsonl@.5',
    'data.cache': '~/cache',
    'data.tokenizer': '~/tokenizer',
    'eval.ood': {'far': '~/texts [1]/far.jsonl'},
    'eval.tasks': {'quiz': '~/task.jsonl'},
    'teacher.run': '~/teacher',
    'student.init': '~/teacher',
    'student.arms': ('distilled',),
    'checkpoint.local': '~/local',
    'checkpoint.local_every': 3,
  }
  config = config_lib.resolve(tiny.config_dict(at_home / 'unused', **fields))
  folder = train_command.run(config, progress=False)
  assert folder.parent == at_home / 'runs' and (at_home / 'cache').is_dir()
  evaluate.main(['--workdir', f'~/runs/{folder.name}'])
  assert train_command.run(dataclasses.replace(config, runs=str(at_home / 'runs')), progress=False) == folder


def test_every_command_takes_a_tilde_for_its_folders(main_job, at_home, capsys):
  shutil.copytree(main_job / 'runs', at_home / 'runs')
  (run,) = (at_home / 'runs').glob('tiny-*/students/distilled')
  name = f'~/{run.relative_to(at_home)}'
  generate.main([name, 'a b', '--max-tokens=3'])
  convert.main(['to-hf', name, '~/exported'])
  convert.main(['from-hf', '~/exported', '~/imported', '--tokenizer=~/exported/tokenizer.json'])
  generate.main(['~/exported', 'a b', '--max-tokens=3'])
  assert (at_home / 'imported' / 'run.json').exists()
  config = tiny.write_config(at_home / 'configs')
  shutil.move(config, at_home / 'mine.py')
  capsys.readouterr()
  prepare.main(['--config=~/mine.py', '--config.runs=~/more runs', '--no-report'])
  assert f'{at_home}/more runs/stores' in capsys.readouterr().out
  for main, argv in (
    (report.main, ['--grid=~/nothing']),
    (evaluate.main, ['--workdir=~/nothing']),
    (convert.main, ['to-hf', '~/nothing', '~/out']),
    (generate.main, ['~/nothing']),
  ):
    with pytest.raises(SystemExit) as caught:
      main(argv)
    assert caught.value.code == 2 and 'nothing' in capsys.readouterr().err


def test_train_takes_a_tilde_for_its_folder(home, at_home, capsys):
  shutil.move(tiny.write_config(at_home / 'configs', **tiny.write_text(home)), at_home / 'mine.py')
  fields = ['--config.runs=~/runs', f'--config.data.cache={home}/runs/stores', '--config.student.arms=baseline']
  train_command.main(['--config=~/mine.py', '--workdir=~/x', *fields])
  assert RunFolder(at_home / 'x' / 'students' / 'baseline').is_done() and (at_home / 'x' / 'table.txt').exists()
  assert f'figure: {at_home}/x/run.png' in capsys.readouterr().out


def test_a_grid_takes_a_tilde_for_its_folder(at_home, capsys):
  (at_home / 'configs').mkdir()
  shutil.move(tiny.write_grid_config(at_home / 'configs', at_home / 'texts'), at_home / 'mine.py')
  for command, says in (
    (['plan'], f'{at_home}/g\n'),
    (['status'], f'tiny-grid: {at_home}/g\n'),
    (['run', '--executor=print'], f' --workdir={at_home}/g'),
  ):
    grid.main([*command, '--config=~/mine.py', '--config.runs=~/runs', '--workdir=~/g'])
    assert says in capsys.readouterr().out


def test_the_harness_takes_a_tilde_for_its_files(main_job, at_home, capsys):
  pytest.importorskip('lm_eval', reason='the harness is not installed (the [lm-eval] extra)')
  from kdjax import harness

  shutil.copytree(main_job / 'runs', at_home / 'runs')
  (run,) = (at_home / 'runs').glob('tiny-*/students/distilled')
  for name in ('t', 'others'):
    (at_home / name).mkdir()
    items = [{'context': 'a', 'choices': [' b', ' c'], 'answer': k % 2, 'id': k} for k in range(2)]
    lm_eval_tasks.write(at_home / name, f'task_{name}', items, lm_eval_tasks.MULTIPLE_CHOICE)
  argv = ['--include-path=~/t', '--no-defaults', '--output=~/o.json', '--replica=8', '--fsdp=1']
  harness.main(
    [f'~/{run.relative_to(at_home)}', *argv, '--tasks', 'task_t,~/others/*.yaml', '~/others/task_others.yaml']
  )
  assert set(paths.read_json(at_home / 'o.json')['distilled']) == {'task_t', 'task_others'}


def test_the_compiler_takes_a_tilde_for_its_figures(at_home, monkeypatch, capsys):
  shutil.move(tiny.write_config(at_home / 'configs'), at_home / 'mine.py')
  monkeypatch.setattr(compiling, 'compile_step', lambda *_: test_aot.report())
  aot.main(['--config=~/mine.py', '--topology=v6e-64', '--json=~/f'])
  assert paths.read_json(at_home / 'f')['chips'] == 64


def test_what_a_killed_process_left_of_a_file_is_removed_by_the_next_that_writes_it(tmp_path):
  script = 'import os, sys; from kdjax.storage import paths\nwith paths.replacing(sys.argv[1]) as file: file.write_text("half"); os._exit(9)'
  file = tmp_path / 'results' / 'in-domain [1].parquet'
  for name in (file, file.with_name('other.parquet')):
    done = subprocess.run([sys.executable, '-c', script, name], env=commands.environment(), check=False)
    assert done.returncode == 9
  (leftover, other) = sorted(file.parent.iterdir(), key=lambda path: 'other' in path.name)
  mine, pid, rest = leftover.name.split('-', 2)
  alive = file.with_name(f'{mine}-{os.getpid()}-{rest}')
  elsewhere = file.with_name(f'.00000000-{pid}-{rest}')
  for path in (alive, elsewhere):
    path.write_text('half')
  paths.write_text(file, 'whole')
  assert {path.name for path in file.parent.iterdir()} == {path.name for path in (file, other, alive, elsewhere)}
  assert file.read_text() == 'whole'


@pytest.mark.parametrize('write', [paths.write_text, paths.create])
def test_a_failing_disks_error_names_the_file(tmp_path, monkeypatch, write):
  def fsync(descriptor):
    raise OSError(errno.EIO, 'Input/output error')

  monkeypatch.setattr(paths.os, 'fsync', fsync)
  with pytest.raises(OSError, match='Input/output error') as e:
    write(tmp_path / 'file', 'text')
  assert e.value.filename == str(tmp_path / 'file')
