"""All forms of rotary settings in config.json: read as transformers reads them, or refused."""

import copy
import os

import numpy as np
import pytest

from kdjax.errors import UserError
from kdjax.models.decoder import rope_frequencies
from kdjax.teachers.huggingface import families

if os.environ.get('KDJAX_REQUIRE_PARITY') == '1':
  import transformers
  from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding
  from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
else:
  reason = 'the reference implementation is not installed (the [parity] extra)'
  pytest.importorskip('torch', reason=reason)
  transformers = pytest.importorskip('transformers', reason=reason)
  from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding
  from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

SHAPE = {
  'vocab_size': 64,
  'hidden_size': 32,
  'num_hidden_layers': 4,
  'intermediate_size': 64,
  'num_attention_heads': 2,
  'num_key_value_heads': 2,
  'head_dim': 16,
  'max_position_embeddings': 256,
}
GEMMA = {
  **SHAPE,
  'architectures': ['Gemma3ForCausalLM'],
  'query_pre_attn_scalar': 16,
  'sliding_window': 16,
  'sliding_window_pattern': 2,
}
LLAMA = {**SHAPE, 'architectures': ['LlamaForCausalLM']}


def linear(factor, **more):
  return {'rope_type': 'linear', 'factor': factor, **more}


DEFAULT = {'rope_type': 'default'}
LLAMA_3 = {
  'rope_type': 'llama3',
  'factor': 8.0,
  'low_freq_factor': 1.0,
  'high_freq_factor': 4.0,
  'original_max_position_embeddings': 64,
}
COMMON = {
  'nothing': {},
  'theta': {'rope_theta': 5e5},
  'scaling': {'rope_scaling': linear(8.0), 'rope_theta': 1e6},
  'scaling type': {'rope_scaling': {'type': 'linear', 'factor': 8.0}},
  'scaling of 1': {'rope_scaling': linear(1.0)},
  'theta in scaling': {'rope_scaling': linear(8.0, rope_theta=3e5)},
  'llama3': {'rope_scaling': LLAMA_3},
  'flat': {'rope_parameters': linear(8.0, rope_theta=1e6)},
  'flat default': {'rope_parameters': {**DEFAULT, 'rope_theta': 5e5}, 'rope_theta': 1e4},
  'flat without theta': {'rope_parameters': linear(8.0), 'rope_theta': 2e5},
  'both': {'rope_parameters': {**DEFAULT, 'rope_theta': 1e6}, 'rope_scaling': linear(2.0)},
  'nested': {'rope_parameters': {'full_attention': linear(8.0, rope_theta=1e6), 'sliding_attention': DEFAULT}},
  'nulls': {'rope_parameters': None, 'rope_scaling': None},
}
LOCAL = {
  'both thetas': {'rope_theta': 5e5, 'rope_local_base_freq': 2e4},
  'local scaled': {'rope_parameters': {'full_attention': {**DEFAULT, 'rope_theta': 1e6}, 'sliding_attention': linear(4.0)}},
  'local alone': {'rope_parameters': {'sliding_attention': linear(4.0, rope_theta=1e4)}},
  'local type': {'rope_parameters': {'full_attention': DEFAULT, 'sliding_attention': {'type': 'linear', 'factor': 4.0}}},
  'local llama3': {'rope_parameters': {'full_attention': DEFAULT, 'sliding_attention': LLAMA_3}},
  'both scaled': {'rope_parameters': {'full_attention': linear(8.0), 'sliding_attention': linear(4.0)}},
  'local factor 1': {'rope_parameters': {'full_attention': linear(8.0), 'sliding_attention': linear(1.0)}},
  'full alone': {'rope_parameters': {'full_attention': linear(8.0)}, 'rope_theta': 3e5, 'rope_local_base_freq': 3e4},
  'null full': {'rope_parameters': {'full_attention': None, 'sliding_attention': DEFAULT}},
  'no local layer': {
    'layer_types': ['full_attention'] * 4,
    'rope_parameters': {'full_attention': DEFAULT, 'sliding_attention': linear(4.0)},
  },
  'all local': {
    'layer_types': ['sliding_attention'] * 4,
    'rope_parameters': {'full_attention': linear(8.0), 'sliding_attention': DEFAULT},
  },
}  # fmt: skip
REFUSED = {
  'gemma': {
    'scaling type', 'flat', 'flat default', 'flat without theta', 'both', 'local scaled', 'local alone', 'local type', 'local llama3', 'both scaled'
  },
  'llama': {'both', 'nested'},
}  # fmt: skip


def ours(values) -> dict[str, np.ndarray]:
  config = families.read_config(values)[1]
  found = {'full_attention': rope_frequencies(config)}
  return found | ({'sliding_attention': rope_frequencies(config, local=True)} if config.local_window else {})


@pytest.mark.parametrize('name', [*COMMON, *LOCAL])
def test_gemma_3(name):
  values = {**GEMMA, **(COMMON | LOCAL)[name]}
  if name in REFUSED['gemma']:
    with pytest.raises(UserError, match=r'rope|rotary'):
      families.read_config(values)
    return
  theirs = Gemma3RotaryEmbedding(transformers.Gemma3TextConfig(**copy.deepcopy(values)))
  found = ours(values)
  for kind in theirs.layer_types:
    np.testing.assert_allclose(found[kind], getattr(theirs, f'{kind}_inv_freq').numpy(), rtol=1e-5)


@pytest.mark.parametrize('name', COMMON)
def test_one_rope_for_all_layers(name):
  values = {**LLAMA, **COMMON[name]}
  if name in REFUSED['llama']:
    with pytest.raises(UserError, match='rope'):
      families.read_config(values)
    return
  theirs = LlamaRotaryEmbedding(transformers.LlamaConfig(**copy.deepcopy(values)))
  np.testing.assert_allclose(ours(values)['full_attention'], theirs.inv_freq.numpy(), rtol=1e-5)
