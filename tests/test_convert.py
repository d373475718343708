"""`python -m kdjax.convert`, and models that a config names by a folder."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import tokenizers

from kdjax import convert, train
from kdjax.config import MeshConfig
from kdjax.data.tokenizer import Tokenizer, train_bpe
from kdjax.errors import UserError
from kdjax.models import build
from kdjax.runs.checkpoint import Checkpoints
from kdjax.runs.folder import RunFolder
from kdjax.runtime import sharding
from kdjax.scoring import job as jobs
from kdjax.teachers import by_name, frozen, huggingface
from kdjax.teachers.huggingface import Source
from kdjax.teachers.huggingface.exporting import tokenizer_file
from tests import tiny
from tests.teachers.huggingface.folders import LLAMA, change_config, copied, make, random_params

SMALL = dataclasses.replace(LLAMA, vocab_size=257, pad_vocab_to=128)


def one_device():
  return sharding.make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return make(tmp_path_factory.mktemp('models') / 'small', SMALL)


@pytest.fixture(autouse=True)
def platforms():
  """The command turns to the CPU for its whole process."""
  yield
  jax.config.update('jax_platforms', 'cpu')


def said(capsys, *argv) -> str:
  with pytest.raises(SystemExit) as e:
    convert.main([str(arg) for arg in argv])
  assert e.value.code == 2
  return capsys.readouterr().err.strip()


def test_there_and_back_is_the_same_folder(folder, tmp_path, capsys):
  convert.main(['from-hf', str(folder), str(tmp_path / 'run')])
  assert capsys.readouterr().out.startswith(f'{folder} (LlamaForCausalLM) -> {tmp_path / "run"}: ')
  run = RunFolder(tmp_path / 'run')
  assert run.is_done() and run.tokenizer().fingerprint == Source(folder).tokenizer.fingerprint
  model, params, step = frozen.load_saved(run, one_device())
  assert (model.config, step) == (SMALL, 0)
  jax.tree.map(np.testing.assert_array_equal, params, random_params(SMALL))
  convert.main(['to-hf', str(tmp_path / 'run'), str(tmp_path / 'back')])
  for name in ('model.safetensors', 'config.json', 'tokenizer.json', 'tokenizer_config.json'):
    assert (tmp_path / 'back' / name).read_bytes() == (folder / name).read_bytes(), name
  origin = json.loads((tmp_path / 'back/kdjax.json').read_text())
  assert origin['run'] == 'run' and origin['config']['imported'] == {
    'from': 'small',
    'architecture': 'LlamaForCausalLM',
    'version': Source(folder).folder_name.removeprefix('small-'),
  }


def test_importing_again_does_nothing_and_anything_else_in_the_folder_is_refused(folder, tmp_path, capsys):
  convert.main(['from-hf', str(folder), str(tmp_path / 'run')])
  before = (tmp_path / 'run/run.json').read_bytes()
  convert.main(['from-hf', str(folder), str(tmp_path / 'run')])
  assert (tmp_path / 'run/run.json').read_bytes() == before
  same_model = make(tmp_path / 'other/small', SMALL, seed=1)
  other_tokenizer = tmp_path / 'other.json'
  other_tokenizer.write_text(train_bpe(['a text'], 257).to_json())
  (tmp_path / 'precious').mkdir()
  (tmp_path / 'precious/file.txt').write_text('mine')
  for argv in (
    (same_model, tmp_path / 'run'),
    (folder, tmp_path / 'run', '--tokenizer', other_tokenizer),
    (folder, tmp_path / 'precious'),
    (folder, folder),
  ):
    before = sorted(path.name for path in argv[1].iterdir())
    assert f'{argv[1]} holds something else already; name a new folder' in said(capsys, 'from-hf', *argv)
    assert sorted(path.name for path in argv[1].iterdir()) == before


def test_what_an_exported_tokenizer_puts_before_a_text(folder, tmp_path):
  """The separator, where the model was trained here, whatever the file did; what it always did, where it was imported."""
  trained = tokenizers.Tokenizer.from_str(train_bpe(['a text'], 257).to_json())
  silent = tokenizers.processors.TemplateProcessing(single='$A:0', special_tokens=[])
  for processor in (None, tokenizers.processors.ByteLevel(trim_offsets=False), silent):
    if processor:
      trained.post_processor = processor
    first = tokenizers.Tokenizer.from_str(tokenizer_file(Tokenizer(trained.to_str()), True))
    assert first.encode('a text').ids == [
      trained.token_to_id('<|endoftext|>'),
      *trained.encode('a text', add_special_tokens=False).ids,
    ]
    again = tokenizer_file(Tokenizer(first.to_str()), True)
    assert tokenizers.Tokenizer.from_str(again).encode('a').ids == first.encode('a').ids
  other = copied(folder, tmp_path / 'other')
  (other / 'tokenizer.json').write_text(train_bpe(['a text'], 257).to_json())
  convert.main(['from-hf', str(other), str(tmp_path / 'run')])
  convert.main(['to-hf', str(tmp_path / 'run'), str(tmp_path / 'back')])
  assert len(tokenizers.Tokenizer.from_file(str(tmp_path / 'back/tokenizer.json')).encode('a').ids) == 1
  assert (
    by_name.open_model(str(other), one_device()).imported
    and by_name.open_model(str(tmp_path / 'run'), one_device()).imported
  )


def test_an_import_that_was_cut_off_is_no_run_and_is_made_whole(folder, tmp_path, monkeypatch):
  run = RunFolder(tmp_path / 'run')
  with monkeypatch.context() as m:
    m.setattr(RunFolder, 'keep_tokenizer', lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
      Source(folder).import_into(run, one_device())
  assert run.read_record() is None and not run.is_done()
  (tmp_path / 'run/.0123abcd.status.json').write_text('{')  # as a kill leaves it
  with pytest.raises(UserError, match='is no run folder'):
    frozen.build_model(run)
  Source(folder).import_into(run, one_device())
  assert run.is_done()
  jax.tree.map(np.testing.assert_array_equal, frozen.load_saved(run, one_device())[1], random_params(SMALL))


def test_options_of_the_way_out(folder, tmp_path):
  convert.main(['from-hf', str(folder), str(tmp_path / 'run')])
  convert.main(
    [
      'to-hf',
      str(tmp_path / 'run'),
      str(tmp_path / 'out'),
      '--dtype',
      'bfloat16',
      '--shard-size',
      '40KB',
      '--max-positions',
      '32',
    ]
  )
  values = json.loads((tmp_path / 'out/config.json').read_text())
  assert (values['torch_dtype'], values['max_position_embeddings'], values['bos_token_id']) == ('bfloat16', 32, 256)
  assert len(list((tmp_path / 'out').glob('*.safetensors'))) > 1
  assert Source(tmp_path / 'out').model.config.param_dtype == 'bfloat16'


def test_a_tokenizer_of_its_own_may_be_named(folder, tmp_path, capsys):
  bare = copied(folder, tmp_path / 'bare')
  (bare / 'tokenizer.json').rename(tmp_path / 'mine.json')
  (bare / 'tokenizer_config.json').unlink()
  assert 'tokenizer.json' in said(capsys, 'from-hf', bare, tmp_path / 'run')
  convert.main(['from-hf', str(bare), str(tmp_path / 'run'), '--tokenizer', str(tmp_path / 'mine.json')])
  other = tmp_path / 'other.json'
  other.write_text(train_bpe(['a text'], 257).to_json())
  argv = ('to-hf', tmp_path / 'run', tmp_path / 'out')
  assert f'--tokenizer {other} is not the one' in said(capsys, *argv, '--tokenizer', other)
  assert '--separator goes with --tokenizer' in said(capsys, *argv, '--separator', '<s>')


@pytest.mark.parametrize(
  ('argv', 'line'),
  [
    (('from-hf', '{t}/none', '{t}/out'), 'no such folder'),
    (('to-hf', '{t}', '{t}/out'), 'is no run folder: it has no run.json; an experiment keeps its runs in students/'),
    (('to-hf', '{t}/run', '{t}'), 'exists already; name a new folder'),
    (('to-hf', '{t}/run', '{t}/out', '--step', '7'), 'has no checkpoint of step 7; it has 0'),
    (('to-hf', '{t}/run', 'gs://bucket/out'), 'gs://bucket/out: a Hugging Face folder is written on a disk'),
    (('to-hf', '{t}/run', '{t}/out', '--max-positions', '-5'), 'must be at least 1, got -5'),
    (('to-hf', '{t}/run', '{t}/out', '--shard-size', 'big'), "'big' is no size such as 500MB or 5GB"),
  ],
)
def test_mistakes_are_one_line_and_leave_nothing(argv, line, folder, tmp_path, capsys):
  Source(folder).import_into(RunFolder(tmp_path / 'run'), one_device())
  assert line in said(capsys, *[arg.format(t=tmp_path) for arg in argv]).splitlines()[-1]
  assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('out', ['{t}', 'gs://bucket/out'])
def test_where_an_export_cannot_go_is_told_before_any_weights_are_read(out, folder, tmp_path, capsys, monkeypatch):
  Source(folder).import_into(RunFolder(tmp_path / 'run'), one_device())
  monkeypatch.delattr(convert.frozen, 'load_saved')
  assert out.format(t=tmp_path) in said(capsys, 'to-hf', tmp_path / 'run', out.format(t=tmp_path))


def config(home, teacher='', init='', **fields):
  hugging = {'student.model.vocab_size': 257, 'student.model.pad_vocab_to': 128} | fields
  return tiny.config(home, **{'teacher.run': str(teacher), 'student.init': str(init), **hugging})


def test_a_hugging_face_folder_teaches(folder, tmp_path, capsys):
  home = tmp_path / 'home'
  experiment = train.run(config(home, teacher=folder), progress=False)
  (imported,) = (home / 'runs/imported').iterdir()
  assert imported.name.startswith('small-')
  job = jobs.find_job(experiment)
  assert job.teacher.path.resolve() == imported.resolve()
  assert job.config.teacher.model.d_model == 32  # the folder's, not the config's 8
  assert RunFolder(experiment / 'students/distilled').read_record()['config']['target'].endswith('@0')
  out = capsys.readouterr().out
  assert f'teacher: {build(SMALL).n_params:,} parameters' in out and 'imported from small (LlamaForCausalLM)' in out
  # Once more: everything is there.
  stamp = (imported / 'run.json').stat().st_mtime_ns
  assert train.run(config(home, teacher=folder), progress=False) == experiment
  assert (imported / 'run.json').stat().st_mtime_ns == stamp


def test_a_student_starts_from_a_folders_weights_goes_on_and_is_exported(folder, tmp_path):
  home = tmp_path / 'home'
  fresh = config(home, init=folder, **{'student.arms': ('baseline',), 'student.optimizer.warmup_fraction': 0.0})
  experiment = train.run(fresh, progress=False)
  run = RunFolder(experiment / 'students/baseline')
  identity = run.read_record()
  imported = RunFolder(next((home / 'runs/imported').iterdir()))
  assert identity['config']['init'] == by_name.identify_weights(imported)
  assert identity['fingerprints']['init'] == imported.read_record()['fingerprints']['init']
  assert identity['config']['model']['d_model'] == 32
  convert.main(['to-hf', str(run.path), str(tmp_path / 'out')])
  out = Source(tmp_path / 'out')
  assert out.model.config.max_seq_len == 16  # the window that it has seen
  before, after = random_params(SMALL), out.load(one_device())
  moved = jax.tree.map(lambda a, b: float(abs(a - b).max()), before, after)
  assert all(0 < value < 0.5 for value in jax.tree.leaves(moved))  # a little, and everywhere
  # An exported student is a start again.
  again = config(tmp_path / 'again', init=tmp_path / 'out', **{'student.arms': ('baseline',)})
  train.run(again, progress=False)


def test_a_window_beyond_the_one_that_a_model_is_made_for_is_said(folder, tmp_path, caplog):
  short = copied(folder, tmp_path / 'short')
  change_config(short, max_position_embeddings=12)
  train.run(config(tmp_path / 'home', init=short, **{'student.arms': ('baseline',)}), progress=False)
  assert f'warning: student.init = {short} is made for 12 tokens at once, and data.seq_len is 16' in caplog.text


def test_a_run_can_start_a_student_too(main_job, tmp_path):
  run = next((main_job / 'runs').glob('tiny-*/students/baseline'))
  adopted = by_name.adopt_models(config(tmp_path, init=run))
  assert adopted.student.model == dataclasses.replace(
    frozen.build_model(RunFolder(run)).config, **{f: getattr(adopted.student.model, f) for f in frozen.FREE}
  )


def test_where_the_folder_does_not_go_with_the_corpus_it_is_said_before_training(folder, tmp_path):
  bpe = {'data.tokenizer': 'bpe', 'data.vocab_size': 257}
  with pytest.raises(
    UserError, match=r'teacher.run = .* learned with another tokenizer .* set --config.data.tokenizer to its'
  ):
    train.run(config(tmp_path, teacher=folder, **bpe), progress=False)
  with pytest.raises(UserError, match=r'student.init = .* learned with another tokenizer'):
    train.run(config(tmp_path, init=folder, **bpe, **{'student.arms': ('baseline',)}), progress=False)
  with pytest.raises(UserError, match=r'it has no steps; leave teacher\.step at 0'):
    train.run(config(tmp_path, teacher=folder, **{'teacher.step': 3}), progress=False)
  # Of another tokenizer that is said, not that it has more tokens than the model that it names.
  bpe = {'data.tokenizer': 'bpe', 'data.vocab_size': 300, 'student.model.vocab_size': 0}
  with pytest.raises(UserError, match=r'student.init = .* learned with another tokenizer'):
    train.run(config(tmp_path, init=folder, **bpe, **{'student.arms': ('baseline',)}), progress=False)
  with pytest.raises(UserError, match='no such folder; a model of the hub is fetched with: hf download'):
    train.run(config(tmp_path, teacher=tmp_path / 'none'), progress=False)
  assert not list((tmp_path / 'runs').glob('*/students'))


def test_the_tokenizer_of_a_folder_is_compared_by_content(folder, tmp_path):
  other = copied(folder, tmp_path / 'other')
  values = json.loads((other / 'tokenizer.json').read_text())
  values |= {
    'truncation': {'direction': 'Right', 'max_length': 8, 'strategy': 'LongestFirst', 'stride': 0},
    'post_processor': None,
  }
  (other / 'tokenizer.json').write_text(json.dumps(values, indent=7))
  known = Source(folder).tokenizer.fingerprint
  assert Source(other).tokenizer.fingerprint == known
  assert Source(folder, '<|endoftext|>').tokenizer.fingerprint == known
  values['model']['vocab'] |= {'!': 1, '"': 0}
  (other / 'tokenizer.json').write_text(json.dumps(values))
  assert Source(other).tokenizer.fingerprint != known


def test_another_version_of_a_folder_is_another_run(folder, tmp_path):
  other = copied(folder, tmp_path / 'small')
  name = Source(other).folder_name
  change_config(other, rms_norm_eps=1e-3)
  assert Source(other).folder_name != name


def test_runs_keep_their_tokenizer(main_job, tmp_path):
  run = RunFolder(next((main_job / 'runs').glob('tiny-*/students/distilled')))
  assert run.tokenizer().is_bytes and not (run.path / 'tokenizer.json').exists()
  fields = {'data.tokenizer': 'bpe', 'data.vocab_size': 300, 'student.arms': ('baseline',)}
  experiment = train.run(tiny.config(tmp_path, **fields), progress=False)
  run = RunFolder(experiment / 'students/baseline')
  assert run.tokenizer().vocab_size == 300
  assert Tokenizer.from_file(run.path).fingerprint == run.tokenizer().fingerprint
  (run.path / 'tokenizer.json').write_text(train_bpe(['x'], 257).to_json())
  with pytest.raises(UserError, match='is not the tokenizer with which this run learned'):
    run.tokenizer()


def test_a_checkpoint_of_weights_alone_has_no_optimizer(folder, tmp_path):
  Source(folder).import_into(RunFolder(tmp_path / 'run'), one_device())
  meta = Checkpoints(tmp_path / 'run/checkpoints', read_only=True).meta(0)
  assert set(meta['leaves']) == {'params'}


def test_a_folder_is_told_from_a_run(folder, main_job):
  assert huggingface.is_folder(folder)
  assert not huggingface.is_folder(next((main_job / 'runs').glob('tiny-*/students/baseline')))
