"""Our models against transformers' own, both ways: logits, generation, folders; on random weights of each family and on trained ones.

Needs torch and transformers, hence an environment of its own. With KDJAX_REQUIRE_PARITY=1 their absence is a failure,
not a skip.
"""

import os
import pathlib

import jax
import numpy as np
import pytest

from kdjax import convert, train
from kdjax.config import MeshConfig
from kdjax.models import build
from kdjax.runs.folder import RunFolder
from kdjax.runtime import sharding
from kdjax.teachers import frozen
from kdjax.teachers.huggingface import Source, export
from tests import tiny
from tests.models import stories
from tests.teachers.huggingface import folders

if os.environ.get('KDJAX_REQUIRE_PARITY') == '1':
  import torch
  import transformers
else:
  reason = 'the reference implementations are not installed (torch, transformers: the [parity] extra)'
  torch = pytest.importorskip('torch', reason=reason)
  transformers = pytest.importorskip('transformers', reason=reason)

from tests.parity import trained

SHAPE = {
  'vocab_size': 300,
  'hidden_size': 64,
  'num_hidden_layers': 4,
  'intermediate_size': 96,
  'num_attention_heads': 8,
  'num_key_value_heads': 2,
  'max_position_embeddings': 512,
}
LLAMA_3 = {
  'rope_type': 'llama3',
  'rope_theta': 5e5,
  'factor': 8.0,
  'low_freq_factor': 1.0,
  'high_freq_factor': 4.0,
  'original_max_position_embeddings': 64,
}
GEMMA_ROPE = {
  'full_attention': {'rope_type': 'linear', 'rope_theta': 1e6, 'factor': 8.0},
  'sliding_attention': {'rope_type': 'default', 'rope_theta': 1e4},
}
LAYERS = ['sliding_attention', 'sliding_attention', 'full_attention', 'sliding_attention']
NO_CAPS = {'attn_logit_softcapping': None, 'final_logit_softcapping': None}
FAMILIES = {  # their names of the classes, what is said of the model
  'llama': ('Llama', {'head_dim': 32}),
  'llama tied': ('Llama', {'tie_word_embeddings': True}),
  'llama 3.1': ('Llama', {'rope_parameters': LLAMA_3}),
  'llama linear': ('Llama', {'rope_parameters': {'rope_type': 'linear', 'rope_theta': 1e4, 'factor': 4.0}}),
  'qwen 2.5': ('Qwen2', {'tie_word_embeddings': True}),
  'qwen 3': ('Qwen3', {'head_dim': 16}),
  'olmo 2': ('Olmo2', {}),
  'gemma 2': ('Gemma2', {'head_dim': 16, 'sliding_window': 16, 'query_pre_attn_scalar': 24, **NO_CAPS}),
  'gemma 3': ('Gemma3', {'head_dim': 16, 'sliding_window': 16, 'query_pre_attn_scalar': 16, 'layer_types': LAYERS, 'rope_parameters': GEMMA_ROPE}),
}  # fmt: skip
N_TOKENS = 96  # more than any window


def theirs(name: str):
  """A random model of transformers; norms are moved off 1, weights made large enough to matter."""
  kind, values = FAMILIES[name]
  config = getattr(transformers, f'{kind}TextConfig' if kind == 'Gemma3' else f'{kind}Config')(
    **SHAPE | values, attn_implementation='eager'
  )
  torch.manual_seed(0)
  model = getattr(transformers, f'{kind}ForCausalLM')(config).eval().float()
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.normal_(mean=float(parameter.ndim == 1), std=0.2 if parameter.ndim == 1 else 0.1)
  return model


def their_logits(model, tokens) -> np.ndarray:
  with torch.no_grad():
    return model(torch.tensor(tokens)).logits.float().numpy()


def our_logits(model, params, tokens) -> np.ndarray:
  return np.asarray(model.hidden(params, tokens) @ model.head(params))[..., : model.config.vocab_size]


def random_tokens(vocab_size: int, seed: int = 1) -> np.ndarray:
  return np.random.default_rng(seed).integers(0, vocab_size, (2, N_TOKENS))


def one_device():
  return sharding.make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])


@pytest.mark.parametrize('name', FAMILIES)
def test_a_folder_of_theirs_gives_their_logits_and_their_text(name, tmp_path):
  reference = theirs(name)
  reference.save_pretrained(tmp_path / 'theirs', max_shard_size='60KB' if name == 'llama' else '5GB')
  assert len(list((tmp_path / 'theirs').glob('*.safetensors'))) > (name == 'llama')
  source = Source(tmp_path / 'theirs')
  params = source.load(one_device())
  tokens = random_tokens(300)
  expected = their_logits(reference, tokens)
  assert expected.std() > 0.5  # a model that says nothing would agree with anything
  error = np.abs(our_logits(source.model, params, tokens) - expected).max()
  print(f'{name}: largest error {error:.1e}, logits up to {np.abs(expected).max():.1f}')
  assert error < 1e-4
  # Greedy, 24 tokens: theirs by their own loop and cache, ours by our cache.
  prompt = tokens[:, :40]
  continued = reference.generate(
    torch.tensor(prompt), max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0
  )
  np.testing.assert_array_equal(greedy(source.model, params, prompt, 24), continued[:, 40:].numpy())


def greedy(model, params, prompt_BxT, n: int) -> np.ndarray:
  step = jax.jit(lambda tokens, cache: extended(model, params, tokens, cache))
  cache = model.empty_cache(np.zeros(len(prompt_BxT), np.int32), prompt_BxT.shape[1] + n)
  (tokens, cache), out = step(prompt_BxT, cache), []
  for _ in range(n):
    out.append(tokens)
    tokens, cache = step(tokens[:, None], cache)
  return np.stack(out, axis=1)


def extended(model, params, tokens_BxT, cache):
  hidden, cache = model.extend(params, tokens_BxT, cache)
  return (hidden[:, -1] @ model.head(params))[:, : model.config.vocab_size].argmax(-1), cache


@pytest.mark.parametrize('name', folders.MODELS)
def test_a_folder_of_ours_is_loaded_by_theirs_with_nothing_missing(name, tmp_path):
  config = folders.MODELS[name]
  params = folders.random_params(config)
  folder = folders.make(tmp_path / 'ours', config, max_bytes=30_000)
  model, told = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
  assert not any(told.values()) and type(model).__name__ == name.split()[0]
  tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 60))
  expected = our_logits(build(config), params, tokens)
  assert expected.std() > 0.2
  assert np.abs(their_logits(model.eval(), tokens) - expected).max() < 1e-4
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  assert tokenizer('Hé').input_ids == [256, *'Hé'.encode()] and tokenizer.bos_token_id == tokenizer.eos_token_id == 256


def test_bfloat16_is_loaded_as_such(tmp_path):
  folder = folders.make(tmp_path / 'ours', dtype='bfloat16')
  assert transformers.AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16


def test_pickled_weights_of_theirs_are_refused(tmp_path):
  reference = theirs('llama')
  reference.config.save_pretrained(tmp_path)
  torch.save(reference.state_dict(), tmp_path / 'pytorch_model.bin')
  with pytest.raises(Exception, match=r'pytorch_model\.bin, which can run code'):
    Source(tmp_path)


@pytest.mark.skipif(not stories.FOLDER.exists(), reason=f'the stories260K model is not here ({stories.FOLDER})')
def test_a_real_model_goes_there_is_trained_and_goes_back(tmp_path, capsys):
  """Hugging Face -> kdjax -> train -> Hugging Face -> transformers."""
  original = trained.stories_folder(tmp_path / 'stories')
  reference = transformers.AutoModelForCausalLM.from_pretrained(original).eval()
  tokenizer = transformers.AutoTokenizer.from_pretrained(original)
  story = reference.generate(
    **tokenizer('Once upon a time', return_tensors='pt', return_token_type_ids=False),
    max_new_tokens=60,
    do_sample=False,
  )
  assert 'there was a little girl named Lily. She loved to play outside in the park.' in tokenizer.decode(story[0])

  convert.main(['from-hf', str(original), str(tmp_path / 'run')])
  model, params, _ = frozen.load_saved(RunFolder(tmp_path / 'run'), one_device())
  tokens = random_tokens(512)
  assert np.abs(our_logits(model, params, tokens) - their_logits(reference, tokens)).max() < 1e-4

  config = tiny.config(
    tmp_path / 'home',
    **{
      'data.tokenizer': str(original),
      'student.init': str(original),
      'student.arms': ('baseline', 'distilled'),
      'student.optimizer.learning_rate': 1e-4,
      'teacher.run': str(tmp_path / 'run'),
    },
  )
  experiment = train.run(config, progress=False)
  run = RunFolder(experiment / 'students/distilled')
  convert.main(['to-hf', str(run.path), str(tmp_path / 'back')])
  model, params, _ = frozen.load_saved(run, one_device())
  back, told = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'back', output_loading_info=True)
  assert not any(told.values())
  found = their_logits(back.eval(), tokens[:, :16])
  assert np.abs(our_logits(model, params, tokens[:, :16]) - found).max() < 1e-4
  assert np.abs(their_logits(reference, tokens[:, :16]) - found).max() > 1e-2  # it has learned something
  again = transformers.AutoTokenizer.from_pretrained(tmp_path / 'back')
  assert again('Once upon a time').input_ids == tokenizer('Once upon a time').input_ids


@pytest.mark.slow
def test_a_model_of_the_users_choice(tmp_path):
  """KDJAX_HF_MODEL=~/models/SmolLM2-135M pytest tests/parity -m slow -k choice: logits of real weights on real text."""
  if 'KDJAX_HF_MODEL' not in os.environ:
    pytest.skip('KDJAX_HF_MODEL names no folder of a real model')
  folder = pathlib.Path(os.environ['KDJAX_HF_MODEL']).expanduser()
  reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
  text = pathlib.Path(__file__).read_text()
  tokens = np.array([transformers.AutoTokenizer.from_pretrained(folder)(text).input_ids[:128]])
  source = Source(folder)
  params = jax.tree.map(lambda x: x.astype('float32'), source.load(one_device()))
  expected = their_logits(reference, tokens)
  error = np.abs(our_logits(source.model, params, tokens) - expected).max()
  print(f'largest error {error:.1e}, logits up to {np.abs(expected).max():.1f}')
  assert error < 1e-3 * np.abs(expected).max()
  export(source.model, params, source.tokenizer, tmp_path / 'back')
  back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'back').eval()
  assert np.abs(their_logits(back, tokens) - expected).max() < 1e-4
