"""Our decoder against Hugging Face's on the same random weights.

Needs torch and transformers, hence an environment of its own. With KDJAX_REQUIRE_PARITY=1 their absence is a failure,
not a skip.
"""

import dataclasses
import os

import jax
import numpy as np
import pytest

from kdjax.config import ModelConfig, RopeScaling
from kdjax.models import build

if os.environ.get('KDJAX_REQUIRE_PARITY') == '1':
  import torch
  import transformers
else:
  reason = 'the reference implementations are not installed (torch, transformers: the [parity] extra)'
  torch = pytest.importorskip('torch', reason=reason)
  transformers = pytest.importorskip('transformers', reason=reason)

LLAMA = ModelConfig(
  vocab_size=160, pad_vocab_to=1, d_model=64, n_layers=3, d_ff=96, n_heads=8, n_kv_heads=2, head_dim=32, tied=False
)
SCALING = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_len=64)
STYLES = {
  'llama untied': LLAMA,
  'llama tied': dataclasses.replace(LLAMA, tied=True),
  'llama 3.1 scaling': dataclasses.replace(LLAMA, rope_scaling=SCALING, rope_theta=1e4),
  'qwen3': dataclasses.replace(LLAMA, tied=True, qk_norm=True, rope_theta=1e6, norm_eps=1e-6),
}


@pytest.mark.parametrize('config', STYLES.values(), ids=STYLES.keys())
def test_logits_are_hugging_faces(config):
  theirs = hugging_face(config)
  tokens = np.random.default_rng(1).integers(0, config.vocab_size, (2, 96))
  with torch.no_grad():
    expected = theirs(torch.tensor(tokens)).logits.numpy()
  model = build(config)
  params = to_kdjax({name: tensor.numpy() for name, tensor in theirs.state_dict().items()}, config)
  assert jax.tree.map(np.shape, params) == jax.tree.map(lambda x: x.shape, model.abstract())
  got = model.hidden(params, tokens) @ model.head(params)
  assert expected.std() > 0.5  # a model that says nothing would agree with anything
  error = np.abs(got - expected).max()
  print(f'largest error {error:.1e}, logits up to {np.abs(expected).max():.1f}')
  assert error < 2e-5


def hugging_face(config: ModelConfig):
  """A random model of theirs; norm scales are moved off 1, weights made large enough to matter."""
  c, scaling = config, config.rope_scaling
  rope = {'rope_type': 'default', 'rope_theta': c.rope_theta}
  if scaling.factor != 1.0:
    rope |= {
      'rope_type': 'llama3',
      'factor': scaling.factor,
      'low_freq_factor': scaling.low_freq_factor,
      'high_freq_factor': scaling.high_freq_factor,
      'original_max_position_embeddings': scaling.original_max_len,
    }
  kind = 'Qwen3' if c.qk_norm else 'Llama'
  settings = getattr(transformers, f'{kind}Config')(
    vocab_size=c.vocab_size,
    hidden_size=c.d_model,
    num_hidden_layers=c.n_layers,
    intermediate_size=c.d_ff,
    num_attention_heads=c.n_heads,
    num_key_value_heads=c.n_kv_heads,
    head_dim=c.head_dim,
    max_position_embeddings=8192,
    rms_norm_eps=c.norm_eps,
    tie_word_embeddings=c.tied,
    rope_parameters=rope,
    attn_implementation='eager',
  )
  torch.manual_seed(0)
  model = getattr(transformers, f'{kind}ForCausalLM')(settings).eval().float()
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.normal_(mean=float(parameter.ndim == 1), std=0.2 if parameter.ndim == 1 else 0.1)
  return model


def to_kdjax(weights: dict[str, np.ndarray], config: ModelConfig):
  """Their state dict -> our tree. Theirs are [out, in], one a layer; ours [L, in, out]."""

  def stack(name):
    layers = [weights[f'model.layers.{i}.{name}.weight'] for i in range(config.n_layers)]
    return np.stack([w.T for w in layers])

  def kernels(part, names):
    return {ours: {'kernel': stack(f'{part}.{theirs}_proj')} for ours, theirs in names.items()}

  attn = kernels('self_attn', {name: name for name in 'qkvo'})
  if config.qk_norm:
    attn |= {name: {'scale': stack(f'self_attn.{name}')} for name in ('q_norm', 'k_norm')}
  params = {
    'embed': {'embedding': weights['model.embed_tokens.weight']},
    'blocks': {
      'attn_norm': {'scale': stack('input_layernorm')},
      'attn': attn,
      'mlp_norm': {'scale': stack('post_attention_layernorm')},
      'mlp': kernels('mlp', {name: name for name in ('gate', 'up', 'down')}),
    },
    'final_norm': {'scale': weights['model.norm.weight']},
  }
  if not config.tied:
    params['head'] = {'kernel': weights['lm_head.weight'].T}
  return params
