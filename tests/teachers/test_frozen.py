"""The teacher's treatment: what it may be, how it is loaded, and the unigram that is no model."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import config as config_lib
from kdjax.config import AlphaSchedule, Config, MeshConfig, ModelConfig, OptimizerConfig
from kdjax.config.sizes import named
from kdjax.data.batches import Windows
from kdjax.data.tokenizer import Tokenizer
from kdjax.errors import UserError
from kdjax.losses import alpha_state
from kdjax.models import build
from kdjax.models.quantized import Int8
from kdjax.programs.hlo import Program
from kdjax.runs.checkpoint import Checkpoints
from kdjax.runs.checksums import params_fingerprint
from kdjax.runs.folder import RunFolder
from kdjax.runtime import sharding
from kdjax.runtime.sharding import path_name
from kdjax.storage.paths import write_json
from kdjax.teachers import frozen
from kdjax.trainer import preflight
from kdjax.trainer.optimizer import adamw, learning_rate
from kdjax.trainer.step import Recipe, init_state
from tests.data.helpers import make_store

MODEL = ModelConfig(pad_vocab_to=8, d_model=8, n_layers=1, d_ff=16, n_heads=2, n_kv_heads=2, head_dim=4, max_seq_len=64)
BYTES = Tokenizer()


def mesh():
  return sharding.make_mesh(MeshConfig(1, 2, 1), jax.devices()[:2])


@pytest.fixture(scope='module')
def run(tmp_path_factory) -> RunFolder:
  """A run folder with checkpoints of steps 3 and 6."""
  folder = RunFolder(tmp_path_factory.mktemp('teacher') / 'run')
  model = build(frozen.set_vocabulary(MODEL, BYTES, 'teacher'))
  folder.record({'model': config_lib.as_dict(model.config)}, {'tokenizer': BYTES.fingerprint})
  optimizer = OptimizerConfig()
  recipe = Recipe(model, None, ('none',), adamw(optimizer), learning_rate(optimizer, 6), 1.0, config_lib.LossConfig())
  saves = Checkpoints(folder.checkpoints)
  for step in (3, 6):
    init = jax.jit(lambda key: init_state(recipe, alpha_state(0.0, AlphaSchedule(), 6), key))
    saves.save(step, init(jax.random.key(step)), {})
    saves.wait()
  saves.close()
  write_json(folder.path / 'status.json', {'state': 'done'})
  return folder


def refused(folder, tokenizer=BYTES) -> str:
  with pytest.raises(UserError) as e:
    frozen.check_teacher_run(RunFolder(folder), 'teacher.run', tokenizer)
  assert '\n' not in str(e.value)
  return str(e.value)


def test_a_teacher_still_in_training_is_refused_unless_a_checkpoint_is_named(run, tmp_path):
  folder = copy(run, tmp_path / 'x', lambda identity: None)
  write_json(folder / 'status.json', {'state': 'running'})
  assert 'is not finished; wait for it' in refused(folder)
  frozen.check_teacher_run(RunFolder(folder), 'teacher.run', BYTES, step=3)


def load_refused(folder, step=0) -> str:
  with pytest.raises(UserError) as e:
    frozen.load_teacher(RunFolder(folder), 'float32', mesh(), step)
  assert '\n' not in str(e.value)
  return str(e.value)


def copy(run, folder, change) -> RunFolder:
  """A folder whose run.json is the run's, changed."""
  identity = json.loads(json.dumps(run.read_record()))
  change(identity)
  folder.mkdir()
  (folder / 'run.json').write_text(json.dumps(identity))
  return folder


def test_a_teacher_of_the_same_architecture_and_tokenizer_is_taken(run):
  frozen.check_teacher_run(run, 'teacher.run', BYTES)


def test_a_missing_folder_is_no_run_folder(tmp_path):
  assert 'no such folder' in refused(tmp_path / 'none')
  assert 'is no run folder' in refused(tmp_path)
  assert 'is no run folder' in load_refused(tmp_path)


def test_another_tokenizer_is_refused(run, tmp_path):
  folder = copy(run, tmp_path / 'x', lambda identity: identity['fingerprints'].update(tokenizer='another'))
  assert 'another tokenizer (fingerprint another' in refused(folder)


def test_a_damaged_run_json_is_refused(tmp_path):
  (tmp_path / 'run.json').write_text('{"config": ')
  assert 'run.json is damaged' in refused(tmp_path)


def test_a_run_json_without_a_model_is_refused(tmp_path):
  (tmp_path / 'run.json').write_text('{"config": {}}')
  assert 'run.json' in refused(tmp_path)


def test_a_run_json_of_another_version_with_unknown_fields_is_refused(run, tmp_path):
  folder = copy(run, tmp_path / 'x', lambda identity: identity['config']['model'].update(new_field=1))
  assert 'new_field' in refused(folder)


def test_a_folder_without_checkpoints_is_refused(run, tmp_path):
  folder = copy(run, tmp_path / 'x', lambda identity: None)
  assert 'has no checkpoint yet' in load_refused(folder)
  assert not (folder / 'checkpoints').exists()


def test_a_step_that_is_not_there_is_refused_naming_those_that_are(run):
  assert 'has no checkpoint of step 5; it has 3, 6' in load_refused(run.path, 5)


def test_another_architecture_than_run_json_says_is_refused(run, tmp_path):
  folder = copy(run, tmp_path / 'x', lambda identity: identity['config']['model'].update(d_ff=32))
  (folder / 'checkpoints').symlink_to(run.checkpoints)
  assert 'blocks/mlp' in load_refused(folder)


@pytest.mark.parametrize(('asked', 'step'), [(0, 6), (3, 3), (6, 6)])
def test_the_newest_or_the_named_step_is_loaded(run, asked, step):
  model, params, found, weights = frozen.load_teacher(run, 'float32', mesh(), asked)
  assert found == step
  fresh = jax.jit(model.init)(jax.random.key(step))
  jax.tree.map(np.testing.assert_array_equal, params, fresh)
  assert weights == params_fingerprint(fresh)


def test_the_weights_are_cast_and_sharded_and_keep_the_saved_fingerprint(run):
  model, params, _, weights = frozen.load_teacher(run, 'bfloat16', mesh())
  _, whole, _, same = frozen.load_teacher(run, 'float32', mesh())
  assert weights == same
  shardings = sharding.param_shardings(model.abstract(), mesh())
  for low, full, placed in zip(*map(jax.tree.leaves, (params, whole, shardings)), strict=True):
    assert low.dtype == jnp.bfloat16 and low.sharding == placed
    np.testing.assert_array_equal(low, full.astype(jnp.bfloat16))


def test_a_model_is_run_as_its_user_says(run):
  """Fields that change speed and reach are no part of a run: a teacher reads longer windows than it was trained on."""
  like = dataclasses.replace(MODEL, attention='xla', remat='full', max_seq_len=16_384, scan_unroll=2, d_model=999)
  config = frozen.load_teacher(run, 'float32', mesh(), like=like)[0].config
  assert (config.attention, config.remat, config.max_seq_len, config.scan_unroll) == ('xla', 'full', 16_384, 2)
  assert config.d_model == MODEL.d_model


def test_auto_is_float32_on_cpu(run):
  assert {leaf.dtype for leaf in jax.tree.leaves(frozen.load_teacher(run, 'auto', mesh())[1])} == {jnp.dtype('float32')}


def test_the_vocabulary_is_the_tokenizers_or_larger():
  assert frozen.set_vocabulary(MODEL, BYTES, 'student').vocab_size == 257
  larger = dataclasses.replace(MODEL, vocab_size=300)
  masked = frozen.set_vocabulary(larger, BYTES, 'student')
  assert (masked.vocab_size, masked.padded_vocab_size) == (257, larger.padded_vocab_size)
  with pytest.raises(UserError, match=r"student.model.vocab_size = 100 is less than the tokenizer's 257"):
    frozen.set_vocabulary(dataclasses.replace(MODEL, vocab_size=100), BYTES, 'student')


def test_the_folder_is_named_by_what_defines_the_teacher(tmp_path):
  model = build(named('tiny-1m', vocab_size=256))
  assert frozen.locate_teacher(str(tmp_path), model, 'abc').path == tmp_path / 'teachers' / '1.07M-abc'


@pytest.mark.parametrize('part', [(0.0, 1.0), (0.0, 0.5), (0.5, 1.0)])
def test_unigram_log_probabilities_are_counted_frequencies(tmp_path, part):
  store = make_store(tmp_path / 'store', [50, 200, 7, 90, 300])
  windows = Windows(store, 16, part)
  found = frozen.unigram_log_probs(windows, 264)
  tokens = store.read(*windows.range)
  counts = np.asarray([1 + (tokens == v).sum() for v in range(264)])
  np.testing.assert_allclose(found, np.log(counts / (len(tokens) + 264)), rtol=1e-6)
  assert found.dtype == np.float32 and np.isfinite(found).all()
  assert np.exp(found.astype(np.float64)).sum() == pytest.approx(1.0, abs=1e-6)


def test_unigram_counts_stop_at_max_tokens_and_at_the_distinct_tokens(tmp_path):
  store = make_store(tmp_path / 'store', [500, 700])
  first = frozen.unigram_log_probs(Windows(store, 16), 257, max_tokens=100)
  np.testing.assert_array_equal(first, frozen.unigram_log_probs(Windows(store, 16, distinct_tokens=100), 257))
  counts = 1 + np.bincount(store.read(0, 100), minlength=257)
  np.testing.assert_allclose(first, np.log(counts / 357), rtol=1e-6)


def wide(params):
  return jax.tree.map(
    lambda leaf: np.asarray(leaf.values, np.float32) * np.asarray(leaf.scale) if isinstance(leaf, Int8) else leaf,
    params,
    is_leaf=lambda leaf: isinstance(leaf, Int8),
  )


def test_int8_rounds_the_blocks_matrices_to_half_a_step_and_nothing_else():
  model = build(frozen.set_vocabulary(MODEL, BYTES, 'teacher'))
  params = model.init(jax.random.key(0))
  params['blocks']['mlp']['up']['kernel'] = params['blocks']['mlp']['up']['kernel'].at[..., 3].set(0)
  rounded = frozen.to_dtype(params, 'int8')
  assert {path_name(path) for path, leaf in jax.tree_util.tree_flatten_with_path(rounded)[0] if leaf.dtype == jnp.int8} == {
    f'blocks/{name}/kernel/values' for name in ('attn/q', 'attn/k', 'attn/v', 'attn/o', 'mlp/gate', 'mlp/up', 'mlp/down')
  }  # fmt: skip
  up, was = rounded['blocks']['mlp']['up']['kernel'], params['blocks']['mlp']['up']['kernel']
  assert int(jnp.abs(up.values).max()) == 127
  error = np.abs(wide(rounded)['blocks']['mlp']['up']['kernel'] - np.asarray(was))
  assert (error <= np.asarray(up.scale) * 0.5001).all() and not error[..., 3].any()
  np.testing.assert_array_equal(rounded['embed']['embedding'], params['embed']['embedding'])


@pytest.mark.parametrize('layout', sharding.LAYOUTS)
def test_int8_is_what_is_gathered_and_the_hidden_states_are_those_of_the_rounded_weights(layout):
  on = sharding.make_mesh(MeshConfig(1, 4, 2))
  model = build(dataclasses.replace(frozen.set_vocabulary(MODEL, BYTES, 'teacher'), d_model=32, d_ff=32, n_layers=2))
  params = model.init(jax.random.key(0))
  tokens = jax.random.randint(jax.random.key(1), (8, 16), 0, 256)
  expected = model.hidden(wide(frozen.to_dtype(params, 'int8')), tokens)
  with jax.set_mesh(on), sharding.rows_over(sharding.row_axes(layout)):
    placed = frozen.cast(params, 'int8', on, layout)
    rows = jax.device_put(tokens, jax.NamedSharding(on, jax.P(sharding.BATCH_AXES)))
    compiled = jax.jit(model.hidden).lower(placed, rows).compile()
    np.testing.assert_allclose(compiled(placed, rows), expected, atol=2e-5)
  in_loop = [one for one in Program(compiled.as_text()).collectives(on.shape) if one.loop and one.kind == 'all-gather']
  assert len(in_loop) == (0 if layout == 'replicated' else 7)
  assert all(one.array.startswith('s8[') for one in in_loop)


def test_models_that_a_device_cannot_hold_are_told_before_they_are_made():
  model = build(frozen.set_vocabulary(MODEL, BYTES, 'teacher'))
  config = Config()
  held = 4 * model.n_params
  students = 3 * held * len(config.student.arms)
  one = sharding.make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
  preflight.check_memory(config, one, model, model, limit=students + held)
  with pytest.raises(
    UserError, match=r'3 students and their optimizers and .* for the teacher in auto on each device'
  ) as e:
    preflight.check_memory(config, one, model, model, limit=students + held - 1)
  assert '\n' not in str(e.value)
  large = build(
    dataclasses.replace(model.config, d_ff=512)
  )  # its own training needs more than students and it together
  alone = dataclasses.replace(config, student=dataclasses.replace(config.student, arms=('distilled',)))
  with pytest.raises(UserError, match='for the teacher and its optimizer on each device'):
    preflight.check_memory(alone, one, model, large, limit=12 * large.n_params - 1)
  preflight.check_memory(alone, one, model, large, limit=12 * large.n_params)
  # Two devices hold half each, but for the norms; int8 is less than float32.
  preflight.check_memory(config, mesh(), model, model, limit=int(0.6 * (students + held)))
  small = dataclasses.replace(config, teacher=dataclasses.replace(config.teacher, dtype='int8'))
  preflight.check_memory(small, one, model, model, limit=students + held - 1)
  preflight.check_memory(config, one, model, model)  # a CPU does not say what it has
