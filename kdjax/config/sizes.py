"""Known sizes. `named('llama3-1.7b', remat='full')` is a changed copy of one."""

import dataclasses
import difflib

from kdjax.config import ModelConfig
from kdjax.errors import UserError


def _llama3(d_model: int, n_layers: int, d_ff: int) -> ModelConfig:
  """Lu & Liu 2026: head_dim stays 128, so the queries' width (4096) is not d_model in the smaller ones."""
  return ModelConfig(
    vocab_size=128_256,
    d_model=d_model,
    n_layers=n_layers,
    d_ff=d_ff,
    n_heads=32,
    n_kv_heads=8,
    head_dim=128,
    tied=False,
    rope_theta=500_000.0,
    norm_eps=1e-5,
  )


def _qwen3(d_model: int, n_layers: int, d_ff: int, n_heads: int, n_kv_heads: int, head_dim: int) -> ModelConfig:
  return ModelConfig(
    vocab_size=151_936,
    d_model=d_model,
    n_layers=n_layers,
    d_ff=d_ff,
    n_heads=n_heads,
    n_kv_heads=n_kv_heads,
    head_dim=head_dim,
    tied=True,
    qk_norm=True,
    rope_theta=1_000_000.0,
    norm_eps=1e-6,
  )


def _laptop(d_model: int, n_layers: int, d_ff: int, n_heads: int, qk_norm: bool = False) -> ModelConfig:
  """Llama style, tied; the vocabulary is the tokenizer's. Named by non-embedding parameters. So few layers that none is worth a loop."""
  return ModelConfig(
    d_model=d_model,
    n_layers=n_layers,
    d_ff=d_ff,
    n_heads=n_heads,
    n_kv_heads=n_heads,
    head_dim=d_model // n_heads,
    tied=True,
    qk_norm=qk_norm,
    scan_unroll=n_layers,
  )


NAMED: dict[str, ModelConfig] = {
  # The paper's four; 0.69, 1.67, 3.78 and 8.03 billion parameters in all.
  'llama3-0.5b': _llama3(1024, 12, 8192),
  'llama3-1.7b': _llama3(2048, 16, 8192),
  'llama3-3.8b': _llama3(3072, 28, 8192),
  'llama3-8b': _llama3(4096, 32, 14_336),
  # The paper's second family. Only 0.3B's shape is the paper's. The other three are OURS, chosen for the right totals:
  # 0.6B is the published Qwen3-0.6B, 0.15B and 1B follow 0.3B's proportions.
  'qwen3-0.15b': _qwen3(512, 24, 1536, 8, 4, 64),
  'qwen3-0.3b': _qwen3(768, 24, 2304, 12, 4, 64),
  'qwen3-0.6b': _qwen3(1024, 28, 3072, 16, 8, 128),
  'qwen3-1b': _qwen3(1536, 28, 4608, 24, 8, 64),
  'tiny-0.1m': _laptop(64, 2, 192, 4),
  'tiny-0.3m': _laptop(96, 3, 256, 4),
  'tiny-1m': _laptop(128, 5, 384, 4),
  'tiny-3m': _laptop(192, 6, 576, 6),
  'tiny-10m': _laptop(384, 6, 960, 6),
  'tiny-30m': _laptop(576, 8, 1536, 9),
  # Qwen3 style: with QK-norm.
  'tiny-qwen-0.1m': _laptop(64, 2, 192, 4, qk_norm=True),
  'tiny-qwen-0.3m': _laptop(96, 3, 256, 4, qk_norm=True),
  'tiny-qwen-1m': _laptop(128, 5, 384, 4, qk_norm=True),
  'tiny-qwen-3m': _laptop(192, 6, 576, 6, qk_norm=True),
  'tiny-qwen-10m': _laptop(384, 6, 960, 6, qk_norm=True),
}


def named(name: str, **changes) -> ModelConfig:
  """A known config, with fields changed. Raises UserError for an unknown name or field."""
  if name not in NAMED:
    raise UserError(f"model: unknown name '{name}'; {nearest(name, NAMED)}")
  fields = [field.name for field in dataclasses.fields(ModelConfig)]
  for field in changes:
    if field not in fields:
      raise UserError(f"model: unknown field '{field}' for {name}; {nearest(field, fields)}")
  return dataclasses.replace(NAMED[name], **changes)


def nearest(name: str, known) -> str:
  """'did you mean a or b?', or what is known."""
  near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
  return f'did you mean {" or ".join(near)}?' if near else f'known: {", ".join(known)}'
