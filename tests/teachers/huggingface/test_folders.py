"""Folders read and written: each weight where it belongs, and each way in which a folder can be wrong."""

import dataclasses
import json
import pickle

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from kdjax.config import MeshConfig
from kdjax.data.tokenizer import Tokenizer
from kdjax.errors import UserError
from kdjax.models import build
from kdjax.runtime import sharding
from kdjax.teachers.huggingface import Source, export, is_folder
from tests import small
from tests.teachers.huggingface.folders import LLAMA, MODELS, change_config, change_tensors, copied, make, random_params


def one_device():
  return sharding.make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])


@pytest.fixture(scope='module')
def llama(tmp_path_factory):
  return make(tmp_path_factory.mktemp('llama') / 'small')


@pytest.mark.parametrize('name', MODELS)
def test_what_is_written_is_read_back_bit_for_bit(name, tmp_path):
  config = MODELS[name]
  source = Source(make(tmp_path / 'x', config))
  assert source.family.name == name.split()[0]
  assert source.model.config == config
  jax.tree.map(np.testing.assert_array_equal, source.load(one_device()), random_params(config))


def test_the_tensors_are_named_and_turned_as_theirs(tmp_path):
  folder = make(tmp_path / 'x', MODELS['Gemma3ForCausalLM'])
  params = random_params(MODELS['Gemma3ForCausalLM'])
  tensors = safetensors.numpy.load_file(folder / 'model.safetensors')
  wanted = {
    'model.embed_tokens.weight': params['embed']['embedding'][:260],
    'model.norm.weight': params['final_norm']['scale'],
    'model.layers.1.self_attn.q_proj.weight': params['blocks']['attn']['q']['kernel'][1].T,
    'model.layers.2.mlp.down_proj.weight': params['blocks']['mlp']['down']['kernel'][2].T,
    'model.layers.0.self_attn.k_norm.weight': params['blocks']['attn']['k_norm']['scale'][0],
    'model.layers.0.input_layernorm.weight': params['blocks']['attn_norm']['scale'][0],
    'model.layers.0.post_attention_layernorm.weight': params['blocks']['attn_post_norm']['scale'][0],
    'model.layers.0.pre_feedforward_layernorm.weight': params['blocks']['mlp_norm']['scale'][0],
    'model.layers.0.post_feedforward_layernorm.weight': params['blocks']['mlp_post_norm']['scale'][0],
  }
  for tensor, value in wanted.items():
    np.testing.assert_array_equal(tensors[tensor], value)
  assert 'lm_head.weight' not in tensors and len(tensors) == 2 + 3 * 13
  llama = safetensors.numpy.load_file(make(tmp_path / 'llama') / 'model.safetensors')
  np.testing.assert_array_equal(llama['lm_head.weight'], random_params(LLAMA)['head']['kernel'].T[:260])


@pytest.mark.parametrize('shape', [(1, 8, 1), (2, 2, 2), (1, 1, 8)])
def test_a_mesh_gets_its_slices_of_sharded_files(shape, tmp_path):
  config = dataclasses.replace(LLAMA, n_heads=8, n_kv_heads=8, d_ff=64, vocab_size=250, n_layers=2)
  folder = make(tmp_path / 'x', config, max_bytes=30_000)
  assert len(list(folder.glob('model-*-of-*.safetensors'))) > 2
  mesh = sharding.make_mesh(MeshConfig(*shape))
  params = Source(folder).load(mesh)
  wanted = sharding.param_shardings(params, mesh)
  assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding == s, params, wanted))
  jax.tree.map(np.testing.assert_array_equal, params, random_params(config))


def test_each_slice_is_read_once(tmp_path, monkeypatch):
  source = Source(make(tmp_path / 'x'))
  read, original = [], source.tensors.slice
  monkeypatch.setattr(source.tensors, 'slice', lambda name, index: read.append((name, index)) or original(name, index))
  mesh = sharding.make_mesh(MeshConfig(4, 2, 1))  # the replicas hold the same
  source.load(mesh)
  assert len({str(one) for one in read}) == len(read)
  assert (
    max(one.stop - one.start for name, index in read if 'q_proj' in name for one in index[1:]) == LLAMA.d_model // 2
  )


def test_files_are_cut_at_the_size_and_indexed(tmp_path):
  folder = make(tmp_path / 'x', max_bytes=40_000)
  index = json.loads((folder / 'model.safetensors.index.json').read_text())
  names = sorted(set(index['weight_map'].values()))
  assert names == [f'model-{i:05}-of-{len(names):05}.safetensors' for i in range(1, len(names) + 1)]
  sizes = [sum(t.nbytes for t in safetensors.numpy.load_file(folder / name).values()) for name in names]
  assert index['metadata']['total_size'] == sum(sizes) == 4 * (build(LLAMA).n_params - 2 * 124 * 32)
  assert max(sizes) <= 40_000
  for name in names:
    assert {t for t, file in index['weight_map'].items() if file == name} == set(
      safetensors.numpy.load_file(folder / name)
    )


def test_bfloat16_stays_and_float16_is_widened(tmp_path):
  half = make(tmp_path / 'bf16', dtype='bfloat16')
  source = Source(half)
  assert source.model.config.param_dtype == 'bfloat16'
  params = source.load(one_device())
  jax.tree.map(
    np.testing.assert_array_equal, params, jax.tree.map(lambda x: x.astype(jnp.bfloat16), random_params(LLAMA))
  )
  source = Source(make(tmp_path / 'f16', dtype='float16'))
  assert source.model.config.param_dtype == 'float32'
  jax.tree.map(
    np.testing.assert_array_equal,
    source.load(one_device()),
    jax.tree.map(lambda x: x.astype(jnp.float16), random_params(LLAMA)),
  )


def test_one_float32_tensor_makes_the_model_float32(tmp_path):
  folder = make(tmp_path / 'x', dtype='bfloat16')
  change_tensors(folder, lambda t: t.update({'model.norm.weight': t['model.norm.weight'].astype(np.float32)}))
  assert Source(folder).model.config.param_dtype == 'float32'


def test_what_older_files_hold_needlessly_is_passed_over(tmp_path):
  folder = make(tmp_path / 'x', MODELS['LlamaForCausalLM tied'])

  def add(tensors):
    tensors['lm_head.weight'] = tensors['model.embed_tokens.weight']
    tensors['model.layers.0.self_attn.rotary_emb.inv_freq'] = np.ones(4, np.float32)

  change_tensors(folder, add)
  Source(folder)


def refused(folder) -> str:
  with pytest.raises(UserError) as e:
    Source(folder).tokenizer  # noqa: B018
  assert '\n' not in str(e.value)
  return str(e.value)


def test_missing_extra_misshapen_and_odd_tensors_are_listed_together(llama, tmp_path):
  folder = copied(llama, tmp_path / 'x')

  def spoil(tensors):
    del tensors['model.layers.1.mlp.up_proj.weight'], tensors['model.norm.weight']
    tensors['model.layers.0.mlp.gate.weight'] = np.zeros((2, 2), np.float32)
    tensors['model.layers.2.self_attn.v_proj.weight'] = np.zeros((4, 32), np.float32)
    tensors['lm_head.weight'] = tensors['lm_head.weight'].astype(ml_dtypes.float8_e4m3fn)

  change_tensors(folder, spoil)
  said = refused(folder)
  assert 'missing tensors: model.layers.1.mlp.up_proj.weight, model.norm.weight;' in said
  assert 'tensors that the architecture has not: model.layers.0.mlp.gate.weight;' in said
  assert 'model.layers.2.self_attn.v_proj.weight is (4, 32), (16, 32) by config.json' in said
  assert 'dtypes other than F32, BF16, F16: lm_head.weight is F8_E4M3' in said


def test_a_long_list_is_cut(llama, tmp_path):
  folder = copied(llama, tmp_path / 'x')
  change_config(folder, num_hidden_layers=5)
  assert 'missing tensors: ' in refused(folder) and 'and 12 more' in refused(folder)


def test_a_head_of_its_own_in_a_model_that_has_none_is_a_missing_tensor(llama, tmp_path):
  folder = copied(llama, tmp_path / 'x')
  change_tensors(folder, lambda tensors: tensors.pop('lm_head.weight'))
  assert 'missing tensors: lm_head.weight' in refused(folder)


def test_pickles_are_refused_by_name_and_never_opened(llama, tmp_path):
  folder = copied(llama, tmp_path / 'x')
  (folder / 'model.safetensors').unlink()
  marker = tmp_path / 'ran'

  class Trap:
    def __reduce__(self):
      return marker.touch, ()

  (folder / 'pytorch_model.bin').write_bytes(pickle.dumps(Trap()))
  assert 'its weights are in pytorch_model.bin, which can run code when it is read; only safetensors' in refused(folder)
  assert not marker.exists()


def test_truncated_and_missing_files_are_named(llama, tmp_path):
  folder = copied(llama, tmp_path / 'x')
  data = (folder / 'model.safetensors').read_bytes()
  (folder / 'model.safetensors').write_bytes(data[: len(data) // 2])
  assert 'model.safetensors: not a whole safetensors file' in refused(folder)
  (folder / 'model.safetensors').unlink()
  assert 'no model.safetensors and no model.safetensors.index.json in it' in refused(folder)
  sharded = make(tmp_path / 'sharded', max_bytes=40_000)
  next(sharded.glob('model-00002-of-*.safetensors')).unlink()
  assert 'files that its index names are missing: model-00002-of-' in refused(sharded)


@pytest.mark.parametrize(
  'index', ['{', '[]', '{"weight_map": 3}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}', '\xff']
)
def test_an_index_that_is_none_is_refused(index, llama, tmp_path):
  folder = copied(llama, tmp_path / 'x')
  (folder / 'model.safetensors').unlink()
  (folder / 'model.safetensors.index.json').write_bytes(index.encode('latin-1'))
  assert 'model.safetensors.index.json: not an index of safetensors files; fetch it again' in refused(folder)


@pytest.mark.parametrize('name', ['../secret.safetensors', '/etc/passwd', 'inner/../../secret.safetensors', '..'])
def test_an_index_that_points_outside_is_refused(name, llama, tmp_path):
  folder = copied(llama, tmp_path / 'x')
  (tmp_path / 'secret.safetensors').write_bytes((folder / 'model.safetensors').read_bytes())
  (folder / 'model.safetensors').unlink()
  (folder / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': {'a': name}}))
  assert f'its index names files that are not in the folder: {name}' in refused(folder)


@pytest.mark.parametrize('shards', ['gone', 'there', 'broken index'])
def test_a_single_file_wins_over_an_index_beside_it(shards, tmp_path, caplog):
  """The index is left over from an earlier, sharded version: transformers reads the single file, and so does kdjax."""
  folder = make(tmp_path / 'x')
  old = make(tmp_path / 'old', seed=1, max_bytes=40_000)
  for file in old.glob('*.safetensors*') if shards == 'there' else [old / 'model.safetensors.index.json']:
    (folder / file.name).write_bytes(file.read_bytes())
  if shards == 'broken index':
    (folder / 'model.safetensors.index.json').write_text('{')
  jax.tree.map(np.testing.assert_array_equal, Source(folder).load(one_device()), random_params(LLAMA))
  said = [record.getMessage() for record in caplog.records]
  assert said == [
    f'{folder}: reading model.safetensors and ignoring model.safetensors.index.json, which lists other files'
  ]


def test_an_index_of_the_single_file_is_no_news_and_shards_beyond_the_index_are_ignored(tmp_path, caplog):
  folder = make(tmp_path / 'x')
  (folder / 'model.safetensors.index.json').write_text('{"weight_map": {"model.norm.weight": "model.safetensors"}}')
  Source(folder)
  sharded = make(tmp_path / 'sharded', max_bytes=40_000)
  (sharded / 'model-00009-of-00009.safetensors').write_bytes(b'left over')
  jax.tree.map(np.testing.assert_array_equal, Source(sharded).load(one_device()), random_params(LLAMA))
  assert not caplog.records


def test_a_tied_model_with_another_head_and_numbers_that_are_none_are_refused(llama, tmp_path):
  tied = make(tmp_path / 'tied', MODELS['LlamaForCausalLM tied'])
  change_tensors(tied, lambda t: t.update({'lm_head.weight': 2 * t['model.embed_tokens.weight']}))
  with pytest.raises(UserError, match=r'tie_word_embeddings is true, but lm_head.weight is not model.embed_tokens'):
    Source(tied).load(one_device())
  broken = copied(llama, tmp_path / 'broken')
  change_tensors(broken, lambda t: t.update({'model.norm.weight': np.full_like(t['model.norm.weight'], np.nan)}))
  with pytest.raises(UserError, match=r'model.norm.weight holds numbers that are not finite'):
    Source(broken).load(one_device())


def test_folders_that_are_none(llama, tmp_path):
  assert 'no such folder; a model of the hub is fetched with: hf download' in refused(
    tmp_path / 'HuggingFaceTB/SmolLM2'
  )
  assert 'it has no config.json' in refused(tmp_path)
  assert 'must be on a disk' in refused('gs://bucket/model')
  folder = copied(llama, tmp_path / 'x')
  (folder / 'config.json').write_text('{"architectures": ')
  assert 'config.json: not JSON' in refused(folder)
  (folder / 'config.json').write_text('[]')
  assert 'not an object' in refused(folder)
  assert is_folder(llama) and not is_folder(tmp_path)


@pytest.mark.parametrize('name', ['config.json', 'generation_config.json', 'tokenizer.json', 'tokenizer_config.json'])
def test_json_that_is_nested_too_deeply_is_refused_by_name(llama, tmp_path, name):
  folder = copied(llama, tmp_path / 'x')
  (folder / name).write_text('{"a":' * 200_000 + '1' + '}' * 200_000)
  found = refused(folder)
  assert name in found and 'not JSON (nested too deeply)' in found and '\n' not in found


@pytest.mark.parametrize('value', [2**31, 2**63, 10**30])
@pytest.mark.parametrize('name', ['hidden_size', 'num_hidden_layers', 'vocab_size', 'head_dim', 'num_key_value_heads'])
def test_sizes_that_no_model_has_are_refused_at_once(llama, tmp_path, name, value):
  folder = copied(llama, tmp_path / 'x')
  config = json.loads((folder / 'config.json').read_text())
  (folder / 'config.json').write_text(json.dumps(config | {name: value}))
  assert f'{name} = {value} is not a size that a model can have' in refused(folder)


def test_a_base_models_folder_and_shards_in_a_subfolder_are_read_as_transformers_does(tmp_path):
  """AutoModel.save_pretrained leaves out the `model.` prefix; an index may name files in folders below it."""
  whole = make(tmp_path / 'whole', dataclasses.replace(LLAMA, tied=True))
  base = copied(whole, tmp_path / 'base')
  rewrite = lambda tensors: {name.removeprefix('model.'): value for name, value in tensors.items()}
  tensors = safetensors.numpy.load_file(whole / 'model.safetensors')
  safetensors.numpy.save_file(rewrite(tensors), base / 'model.safetensors')
  below = copied(whole, tmp_path / 'below')
  (below / 'inner').mkdir()
  (below / 'model.safetensors').rename(below / 'inner' / 'part.safetensors')
  (below / 'model.safetensors.index.json').write_text(
    json.dumps({'weight_map': dict.fromkeys(tensors, 'inner/part.safetensors')})
  )
  expected = small.host(Source(whole).load(one_device()))
  for folder in (base, below):
    small.assert_identical(small.host(Source(folder).load(one_device())), expected)


def test_the_tokenizer_is_the_folders_and_no_larger_than_the_model(llama, tmp_path):
  assert Source(llama).tokenizer.separator == '<|endoftext|>'
  folder = copied(llama, tmp_path / 'x')
  (folder / 'tokenizer.json').unlink()
  (folder / 'tokenizer_config.json').unlink()
  assert 'there is no tokenizer.json in it' in refused(folder)
  small = make(tmp_path / 'small', dataclasses.replace(LLAMA, vocab_size=200))
  assert 'the tokenizer has 257 tokens but the model 200 rows' in refused(small)


def test_nothing_is_left_of_an_export_that_fails(tmp_path, monkeypatch):
  model = build(LLAMA)
  monkeypatch.setattr(safetensors.numpy, 'save_file', lambda *args, **kwargs: 1 / 0)
  with pytest.raises(ZeroDivisionError):
    export(model, random_params(LLAMA), Tokenizer(), tmp_path / 'out')
  assert not list(tmp_path.iterdir())


def test_an_export_never_overwrites(llama):
  with pytest.raises(UserError, match='exists already; name a new folder'):
    export(build(LLAMA), random_params(LLAMA), Tokenizer(), llama)
