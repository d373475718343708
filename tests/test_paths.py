"""Folders on a disk and in an object store: whole files, files that are created once, paths from one to another, and whole runs."""

import contextlib
import gzip
import lzma
import os
import pathlib
import subprocess
import sys
import threading

import pytest

from kdjax import generate, paths
from kdjax.data.sources import documents, signature
from kdjax.data.tokenizer import Tokenizer, train_bpe
from kdjax.errors import UserError
from kdjax.huggingface import is_folder
from kdjax.metrics import MetricWriter, read_metrics
from kdjax.run import RunFolder
from kdjax.trackers import KINDS
from tests import bucket, runs, tiny

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
    assert str(paths.under(start, relative)) == path


@pytest.mark.parametrize(
  ('folder', 'says'),
  [('hdfs://x/runs', 'no run can be kept in hdfs://'), ('gs://nowhere/runs', 'mend the name of the')],
)
def test_a_store_that_cannot_be_written_is_told_in_one_line(store, folder, says):
  with pytest.raises(UserError, match=says) as e:
    paths.check(folder)
  assert len(str(e.value).splitlines()) == 1
  paths.check(f'{STORE}/anything')


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
  done = subprocess.run(command, env=runs.environment(), cwd=runs.REPO, capture_output=True, text=True, timeout=100)
  told = [line for line in done.stderr.splitlines() if line.startswith('error: ')]
  assert done.returncode == 2 and 'Traceback' not in done.stderr, done.stderr
  assert len(told) == 1 and "pip install 'kdjax[gcs]'" in told[0]


@pytest.mark.parametrize('open_it', [RunFolder, is_folder, paths.check, generate.models])
def test_no_run_is_looked_for_where_none_can_be_kept(open_it):
  with pytest.raises(UserError, match=r's3://bucket/run: no run can be kept in s3://.*gs://'):
    open_it('s3://bucket/run')


def test_nobody_answers_in_time(monkeypatch):
  monkeypatch.setattr(paths, 'PATIENCE', 0.2)
  monkeypatch.setattr(paths, '_trouble', lambda *_: threading.Event().wait(2))
  with pytest.raises(UserError, match='no answer'):
    paths.check('gs://bucket/runs')


def train(config, environment, *arguments) -> subprocess.CompletedProcess:
  command = [sys.executable, '-m', 'kdjax.train', f'--config={config}', *arguments]
  return subprocess.run(
    command, env=runs.environment() | environment, cwd=runs.REPO, capture_output=True, text=True, timeout=300
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
    env=runs.environment() | store,
    cwd=runs.REPO,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
    start_new_session=True,
  )
  student = RunFolder(folder / 'students' / 'distilled')
  runs.wait_for(lambda: ((student.status() or {}).get('step') or 0) >= 20, process)
  runs.kill(process)
  done = train(config, store, *arguments)
  assert done.returncode == 0, done.stderr[-3000:]
  assert 'bits/byte' in done.stdout
  assert student.is_done()
  again = train(config, store, *arguments)
  assert again.returncode == 0 and 'step/s' not in again.stderr

  disk = tiny.write_config(tmp_path, **fields, runs=str(tmp_path / 'disk'))
  assert train(disk, {}, f'--workdir={tmp_path / "disk" / "mine"}').returncode == 0
  like = RunFolder(tmp_path / 'disk' / 'mine' / 'students' / 'distilled')
  assert runs.metrics(student.path) == runs.metrics(like.path)
  tables = [paths.Path(where / 'table.txt').read_text() for where in (folder, tmp_path / 'disk' / 'mine')]
  assert len({table.partition('\n')[2] for table in tables}) == 1  # the first line names the folder
  assert (folder / 'run.png').exists() and list((student.path / 'tensorboard').iterdir())


def test_a_disk_needs_no_check(tmp_path):
  paths.check(tmp_path / 'not there yet')
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
  with pytest.raises(UserError, match=r'only a tokenizer.json is read; copy this one to a disk'):
    Tokenizer.from_file(f'{STORE}/a.model')


def test_names_in_a_store_may_have_brackets(store, tmp_path):
  home = paths.Path(f'{STORE}/{tmp_path.name}')
  for name in ('my [v1]/a.txt', 'my [v1]/b.txt', 'c1.txt'):
    (home / name).write_text(name)
  assert list(documents(f'{home}/my [v1]/*.txt')) == ['my [v1]/a.txt', 'my [v1]/b.txt']
  assert list(documents(f'{home}/my [v1]/a.txt')) == ['my [v1]/a.txt']
  assert list(documents(f'{home}/c[1].txt')) == ['c1.txt']
