"""Hugging Face folders of random small models, one of each family, written without transformers; and ways to spoil one."""

import dataclasses
import json
import math
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from kdjax.config import ModelConfig, RopeScaling
from kdjax.data.tokenizer import Tokenizer
from kdjax.models import build
from kdjax.teachers import huggingface

LLAMA = ModelConfig(
  vocab_size=260,
  d_model=32,
  n_layers=3,
  d_ff=48,
  n_heads=4,
  n_kv_heads=2,
  head_dim=8,
  tied=False,
  max_seq_len=64,
  rope_theta=1e4,
)
GEMMA = dataclasses.replace(
  LLAMA,
  tied=True,
  norms='both',
  norm_offset=True,
  activation='gelu_tanh',
  embed_scale=math.sqrt(32),
  attn_scale=0.25,
  local_window=6,
  global_every=2,
)
MODELS = {
  'LlamaForCausalLM': LLAMA,
  'LlamaForCausalLM tied': dataclasses.replace(LLAMA, tied=True, head_dim=16),
  'LlamaForCausalLM 3.1': dataclasses.replace(LLAMA, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 32)),
  'LlamaForCausalLM linear': dataclasses.replace(LLAMA, rope_scaling=RopeScaling(2.0, method='linear')),
  'Qwen2ForCausalLM': dataclasses.replace(LLAMA, qkv_bias=True),
  'Qwen3ForCausalLM': dataclasses.replace(LLAMA, qk_norm=True, tied=True),
  'Olmo2ForCausalLM': dataclasses.replace(LLAMA, norms='after', qk_norm_whole=True),
  'Gemma2ForCausalLM': dataclasses.replace(GEMMA, local_rope_theta=1e4),
  'Gemma3ForCausalLM': dataclasses.replace(
    GEMMA, qk_norm=True, rope_theta=1e6, rope_scaling=RopeScaling(8.0, method='linear'), attn_scale=0.0
  ),
}


def random_params(config: ModelConfig, seed: int = 0):
  """Weights of which each matters; the padding of the vocabulary is zeros, as the importer leaves it."""
  model, rng = build(config), np.random.default_rng(seed)
  params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.2, x.dtype), model.abstract())
  if not config.norm_offset:
    params = jax.tree_util.tree_map_with_path(
      lambda path, x: x + 1 if 'scale' in jax.tree_util.keystr(path) else x, params
    )
  padding = np.arange(config.padded_vocab_size) >= config.vocab_size
  params['embed']['embedding'] = jnp.where(padding[:, None], 0, params['embed']['embedding'])
  if not config.tied:
    params['head']['kernel'] = jnp.where(padding, 0, params['head']['kernel'])
  return params


def make(folder: pathlib.Path, config: ModelConfig = LLAMA, seed: int = 0, **options) -> pathlib.Path:
  huggingface.export(build(config), random_params(config, seed), Tokenizer(), folder, **options)
  return folder


def copied(source: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
  shutil.copytree(source, folder)
  return folder


def change_config(folder: pathlib.Path, remove: tuple[str, ...] = (), **values) -> None:
  file = folder / 'config.json'
  known = json.loads(file.read_text()) | values
  file.write_text(json.dumps({key: value for key, value in known.items() if key not in remove}))


def change_tensors(folder: pathlib.Path, change) -> None:
  """`change` gets the dict of a single file's tensors, to be changed in place."""
  file = folder / 'model.safetensors'
  tensors = dict(safetensors.numpy.load_file(file))
  change(tensors)
  safetensors.numpy.save_file(tensors, file)
