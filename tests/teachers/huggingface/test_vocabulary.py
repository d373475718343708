"""Folders whose weight tables and tokenizers differ in size: added tokens beyond the table, padded tables, several at once."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import convert, train
from kdjax.config import LossConfig, MeshConfig, ModelConfig
from kdjax.data.tokenizer import Tokenizer
from kdjax.errors import UserError
from kdjax.losses import ModelTargets, token_losses
from kdjax.models import build
from kdjax.runs.folder import RunFolder
from kdjax.runtime import sharding
from kdjax.scoring import results
from kdjax.storage import paths
from kdjax.teachers import by_name, frozen
from kdjax.teachers.huggingface import Source
from tests import tiny
from tests.teachers.huggingface import shapes
from tests.teachers.huggingface.folders import random_params
from tests.teachers.huggingface.shapes import SHAPES, Shape

CASES = pathlib.Path(__file__).parents[3].parent / 'shared/cases/hf'
SOFT = SHAPES['Gemma 3']._replace(ordinary=('<b>', '</b>'))
PADDED = Shape(('<unk>', '<s>', '</s>'), True, '', {}, {})
QWEN = SHAPES['Qwen2.5']


def one_device():
  return sharding.make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])


def with_token(folder: pathlib.Path, content: str, special: bool) -> pathlib.Path:
  """Add a token to the folder's tokenizer, but not to its weights."""
  file = folder / 'tokenizer.json'
  values = json.loads(file.read_text())
  beyond = 1 + max([*values['model']['vocab'].values(), *(t['id'] for t in values['added_tokens'])])
  values['added_tokens'].append(values['added_tokens'][0] | {'id': beyond, 'content': content, 'special': special})
  file.write_text(json.dumps(values))
  return folder


@pytest.mark.parametrize(('shape', 'content'), [(SOFT, '<image_soft_token>'), (PADDED, '[PAD]')])
def test_a_special_token_beyond_the_table_is_no_obstacle(shape, content, tmp_path, capsys):
  folder = with_token(shapes.make(tmp_path / 'x', shape), content, special=True)
  source = Source(folder)
  rows = source.model.config.vocab_size
  assert source.tokenizer.vocab_size == rows + 1
  (ids,) = source.tokenizer.encode_batch([f'text with {content} in it'])
  assert ids.max() < rows and source.tokenizer.decode(ids) == f'text with {content} in it'
  convert.main(['from-hf', str(folder), str(tmp_path / 'run')])
  convert.main(['to-hf', str(tmp_path / 'run'), str(tmp_path / 'back')])
  assert Source(tmp_path / 'back').tokenizer.fingerprint == source.tokenizer.fingerprint
  assert json.loads((tmp_path / 'back/config.json').read_text()).get('pad_token_id', 0) < rows
  # A text can name the token only if special tokens in it are recognised.
  opened = by_name.open_model(str(folder), one_device())
  with pytest.raises(
    UserError, match=rf"holds the special token '{content.replace('[', chr(92) + '[')}', for which x has no"
  ):
    opened.check_ids(source.tokenizer.encode_batch([content], special=True)[0].tolist())


@pytest.mark.parametrize('content', ['<table>', 'word'])
def test_an_ordinary_token_beyond_the_table_is_refused(content, tmp_path):
  folder = with_token(shapes.make(tmp_path / 'x', SOFT), content, special=False)
  with pytest.raises(
    UserError, match=rf"'{content}', which texts can contain, has none; use the model's own tokenizer"
  ):
    Source(folder).tokenizer  # noqa: B018


def test_an_end_token_beyond_the_table_is_refused_and_as_a_further_stop_it_is_not(tmp_path):
  folder = with_token(shapes.make(tmp_path / 'x', PADDED), '<eot>', special=True)
  (folder / 'generation_config.json').write_text('{"eos_token_id": [2, 259]}')
  assert Source(folder).tokenizer.stop_ids == (2, 259)
  (folder / 'tokenizer_config.json').write_text('{"eos_token": "<eot>"}')
  with pytest.raises(UserError, match=r"'<eot>', which texts can contain, has none"):
    Source(folder).tokenizer  # noqa: B018


SMALL = ModelConfig(vocab_size=300, d_model=16, n_layers=1, d_ff=16, n_heads=2, n_kv_heads=2, head_dim=8, tied=False)


@pytest.mark.parametrize('rows', [(384, 256), (256, 384), (384, 512)])
@pytest.mark.parametrize('tied', [False, True])
def test_a_teacher_beside_a_student_is_its_softmax_over_their_tokens(rows, tied, tmp_path):
  """Independent of table rows beyond the tokenizer, and of the student's number of rows."""
  theirs, ours = rows
  config = frozen.resize_table(ModelConfig(**{**vars(SMALL), 'tied': tied, 'vocab_size': min(300, theirs)}), theirs)
  student = build(frozen.resize_table(ModelConfig(**{**vars(SMALL), 'vocab_size': 200}), ours))
  params = jax.tree.map(lambda x: x + 0.1, random_params(config))  # no row is zero
  tokens, labels = np.random.default_rng(0).integers(0, 200, (2, 2, 12))
  with jax.set_mesh(mesh := one_device()):
    model, fitted = frozen.fit_to_student(build(config), params, student.config, mesh, 'student')
    assert jax.tree.map(jnp.shape, fitted) == jax.tree.map(jnp.shape, model.abstract())
    mine = random_params(student.config, 1)
    found = token_losses(
      student.hidden(mine, tokens), student.head(mine), labels, (), ModelTargets(model.hidden(fitted, tokens), model.head(fitted)),
      loss=LossConfig(temperature=2.0), vocab_size=200,
    )  # fmt: skip
  logits = lambda m, p: np.asarray(m.hidden(p, tokens) @ m.head(p), np.float64)[..., :200]
  t, s = logits(build(config), params), logits(student, mine)
  log_softmax = lambda x: x - np.log(np.exp(x).sum(-1, keepdims=True))
  p, q = log_softmax(t / 2), log_softmax(s / 2)
  np.testing.assert_allclose(found['kd'], 4 * (np.exp(p) * (p - q)).sum(-1), rtol=1e-4, atol=1e-5)
  picked = np.take_along_axis(log_softmax(s), labels[..., None], -1)[..., 0]
  np.testing.assert_allclose(found['ce'], -picked, rtol=1e-4)


def test_a_table_is_masked_beyond_the_tokenizer_and_keeps_its_rows():
  known = Tokenizer()
  large = frozen.set_vocabulary(ModelConfig(vocab_size=1000), known, 'student')
  assert (large.vocab_size, large.padded_vocab_size) == (257, 1024)
  assert frozen.set_vocabulary(ModelConfig(), known, 'student').vocab_size == 257
  assert frozen.set_vocabulary(ModelConfig(vocab_size=257), known, 'student') == ModelConfig(vocab_size=257)


# End to end on a tiny corpus.


def config(home, tokenizer, teacher=None, init=None, **fields):
  small = {
    'student.tokens': 4 * 8 * 16,
    'checkpoint.every': 4,
    'eval.every': 4,
    'student.arms': ('baseline', 'distilled'),
  }
  named = {'teacher.run': str(teacher or ''), 'student.init': str(init or ''), 'data.tokenizer': str(tokenizer)}
  return tiny.config(home, **small | named | fields)


def vocabulary(run: RunFolder) -> tuple[int, int]:
  """Return (tokens, rows of the table in the checkpoint)."""
  model = frozen.build_model(run)
  return model.config.vocab_size, frozen.load_saved(run, one_device())[1]['embed']['embedding'].shape[0]


@pytest.fixture(scope='module')
def padded(tmp_path_factory):
  """One tokenizer of 259 tokens; tables of 640 and 300 rows (padded tables, like published Qwen models)."""
  home = tmp_path_factory.mktemp('padded')
  return shapes.make(home / 'big', QWEN, rows=640), shapes.make(home / 'small', QWEN, rows=300, seed=1, tied=True)


def test_tables_padded_to_different_sizes_train_together(padded, tmp_path):
  big, small = padded
  experiment = train.run(config(tmp_path, big, teacher=big, init=small), progress=False)
  run = RunFolder(experiment / 'students/distilled')
  assert vocabulary(run) == (259, 384)
  assert (run.read_record() or {})['config']['target'].endswith('@0/259')
  assert 'bits/byte' in (experiment / 'table.txt').read_text()
  # When the teacher is scored, its tokens beyond the tokenizer are masked too.
  known = json.loads((experiment / 'evaluation.json').read_text())
  metas = {arm: results.read_result(paths.resolve(experiment, files['in-domain']))[1] for arm, files in known.items()}
  assert {arm: meta.get('vocabulary') for arm, meta in metas.items()} == {
    'teacher': 259,
    'baseline': None,
    'distilled': None,
  }
  # Exported again: only the rows of tokens.
  convert.main(['to-hf', str(run.path), str(tmp_path / 'out')])
  assert Source(tmp_path / 'out').model.config.vocab_size == 259


@pytest.mark.slow
@pytest.mark.parametrize('which', ['teacher alone', 'init alone', 'old advice'])
def test_a_padded_table_alone_trains_too(which, padded, tmp_path):
  big, small = padded
  fields = {
    'teacher alone': {'teacher': big},
    'init alone': {'init': small, 'student.arms': ('baseline',)},
    'old advice': {'teacher': big, 'student.model.vocab_size': 640},
  }[which]
  experiment = train.run(config(tmp_path, big, **fields), progress=False)
  run = RunFolder(experiment / 'students/baseline')
  rows = {'teacher alone': 264, 'init alone': 384, 'old advice': 640}[which]  # the tiny config pads to 8
  assert vocabulary(run) == (259, rows)


@pytest.mark.parametrize('fields', [{'teacher': True}, pytest.param({'init': True}, marks=pytest.mark.slow)])
def test_a_table_without_a_row_for_padding_trains_students_without_one(fields, tmp_path):
  folder = with_token(shapes.make(tmp_path / 'x', PADDED), '[PAD]', special=True)
  experiment = train.run(config(tmp_path, folder, **dict.fromkeys(fields, folder)), progress=False)
  run = RunFolder(experiment / 'students/distilled')
  assert vocabulary(run)[0] == 259 and run.tokenizer().vocab_size == 260
  known = run.read_record() or {}
  assert known['tokenizer']['roles'] == {
    'separator': '<s>', 'end': '</s>', 'begin': '<s>', 'padding': '[PAD]', 'stops': ['</s>']
  }  # fmt: skip
  assert known['config']['data']['end'] == '</s>'


@pytest.mark.slow
@pytest.mark.skipif(not CASES.exists(), reason=f'there is no {CASES}')
@pytest.mark.parametrize('name', ['gemma3', 'gemma3soft', 'llama2pad', 'llama_eos', 'qwen_big', 'staleidx'])
def test_the_cases_are_teachers(name, tmp_path):
  experiment = train.run(config(tmp_path, CASES / name, teacher=CASES / name), progress=False)
  assert 'teacher' in (experiment / 'table.txt').read_text()
