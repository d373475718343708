"""One decoder for Llama-3 and Qwen3 style models: RMSNorm, rotary positions, grouped heads, SwiGLU.

It ends at the final norm. The head's weight goes to the loss, which forms logits a chunk of tokens at a time
(kdjax/losses/fused.py), so logits are never whole. `Model` is the face that the rest of kdjax sees: a hashable value
and plain dicts of arrays, no NNX types.

Shapes: B rows, T tokens, D d_model, H query heads, G key/value heads, K head_dim, L layers, V the padded vocabulary.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kdjax import backend
from kdjax.config import ModelConfig, RopeScaling
from kdjax.errors import UserError
from kdjax.models.attention import attention, check_implementation
from kdjax.models.quantized import widened
from kdjax.sharding import constrain

DTYPES = ('auto', 'float32', 'bfloat16', 'float16')
PARAM_DTYPES = ('float32', 'bfloat16', 'float16')
REMAT = {
  'none': None,
  'full': jax.checkpoint_policies.nothing_saveable,
  'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
SIZES = (
  'vocab_size',
  'pad_vocab_to',
  'd_model',
  'n_layers',
  'd_ff',
  'n_heads',
  'n_kv_heads',
  'head_dim',
  'scan_unroll',
)
INIT_STD = 0.02  # also of tied embeddings: logits then start within about 0.2 nats of uniform at every named size


class RMSNorm(nnx.Module):
  """`x / rms(x) * scale`, over the last axis; statistics in float32 whatever the input."""

  def __init__(self, size: int, config: ModelConfig, rngs: nnx.Rngs):
    self.scale = nnx.Param(jnp.ones(size, config.param_dtype))
    self.eps = config.norm_eps

  def __call__(self, x):
    x_f32 = x.astype(jnp.float32)
    inverse_rms = jax.lax.rsqrt(jnp.mean(x_f32**2, axis=-1, keepdims=True) + self.eps)
    return (x_f32 * inverse_rms * self.scale[...].astype(jnp.float32)).astype(x.dtype)


class Attention(nnx.Module):
  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    c = config
    self.config = c
    self.q = _linear(c.d_model, c.n_heads * c.head_dim, c, rngs)
    self.k = _linear(c.d_model, c.n_kv_heads * c.head_dim, c, rngs)
    self.v = _linear(c.d_model, c.n_kv_heads * c.head_dim, c, rngs)
    self.o = _linear(c.n_heads * c.head_dim, c.d_model, c, rngs, std=_residual_std(c))
    if c.qk_norm:
      self.q_norm = RMSNorm(c.head_dim, c, rngs)
      self.k_norm = RMSNorm(c.head_dim, c, rngs)

  def __call__(self, x_BxTxD, rope_TxK, segment_ids_BxT):
    heads = functools.partial(jnp.reshape, shape=(*x_BxTxD.shape[:2], -1, self.config.head_dim))
    q_BxTxHxK, k_BxTxGxK, v_BxTxGxK = heads(self.q(x_BxTxD)), heads(self.k(x_BxTxD)), heads(self.v(x_BxTxD))
    if self.config.qk_norm:
      q_BxTxHxK, k_BxTxGxK = self.q_norm(q_BxTxHxK), self.k_norm(k_BxTxGxK)
    out_BxTxHxK = attention(
      rotate(q_BxTxHxK, rope_TxK),
      rotate(k_BxTxGxK, rope_TxK),
      v_BxTxGxK,
      segment_ids_BxT,
      implementation=self.config.attention,
    )
    return self.o(out_BxTxHxK.reshape(*x_BxTxD.shape[:2], -1))


class MLP(nnx.Module):
  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    self.gate = _linear(config.d_model, config.d_ff, config, rngs)
    self.up = _linear(config.d_model, config.d_ff, config, rngs)
    self.down = _linear(config.d_ff, config.d_model, config, rngs, std=_residual_std(config))

  def __call__(self, x_BxTxD):
    return self.down(jax.nn.silu(self.gate(x_BxTxD)) * self.up(x_BxTxD))


class Block(nnx.Module):
  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    self.attn_norm = RMSNorm(config.d_model, config, rngs)
    self.attn = Attention(config, rngs)
    self.mlp_norm = RMSNorm(config.d_model, config, rngs)
    self.mlp = MLP(config, rngs)

  def __call__(self, x_BxTxD, rope_TxK, segment_ids_BxT):
    x_BxTxD = x_BxTxD + self.attn(self.attn_norm(x_BxTxD), rope_TxK, segment_ids_BxT)
    return x_BxTxD + self.mlp(self.mlp_norm(x_BxTxD))


class Embed(nnx.Module):
  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    init = nnx.initializers.normal(INIT_STD)
    shape = (config.padded_vocab_size, config.d_model)
    self.embedding = nnx.Param(init(rngs.params(), shape, config.param_dtype))

  def __call__(self, tokens_BxT):
    return jnp.asarray(self.embedding[...])[tokens_BxT]


class Decoder(nnx.Module):
  """Tokens [B, T] -> hidden states [B, T, D] after the final norm, in the compute dtype."""

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    self.config = config
    self.embed = Embed(config, rngs)
    stack = nnx.vmap(Block, in_axes=(None, 0), out_axes=0)
    self.blocks = stack(config, rngs.split(config.n_layers))
    self.final_norm = RMSNorm(config.d_model, config, rngs)
    if not config.tied:
      self.head = _linear(config.d_model, config.padded_vocab_size, config, rngs)

  def __call__(self, tokens_BxT, segment_ids_BxT=None):
    config = self.config
    rope_TxK = rope_angles(tokens_BxT.shape[1], config)
    graph, layers = nnx.split(self.blocks)

    def block(x_BxTxD, layer):
      layer = widened(layer, compute_dtype(config))
      return constrain(nnx.merge(graph, layer)(x_BxTxD, rope_TxK, segment_ids_BxT)), None

    if config.remat != 'none':
      # Inside a scan the compiler cannot merge the recomputed part with the first pass, so nothing need prevent it.
      block = jax.checkpoint(block, policy=REMAT[config.remat], prevent_cse=False)
    x_BxTxD = constrain(self.embed(tokens_BxT).astype(compute_dtype(config)))
    x_BxTxD, _ = jax.lax.scan(block, x_BxTxD, layers, unroll=config.scan_unroll)
    return self.final_norm(x_BxTxD)


@dataclasses.dataclass(frozen=True)
class Model:
  """A decoder as a value: equal configs are equal models, so one may be a static argument of `jit`."""

  config: ModelConfig

  def __post_init__(self):
    check(self.config)

  def init(self, key):
    """Fresh parameters: a nested dict of arrays in `config.param_dtype`. A key gives the same weights on any mesh."""
    return nnx.to_pure_dict(nnx.state(Decoder(self.config, nnx.Rngs(params=key)), nnx.Param))

  def abstract(self):
    """The parameters' shapes and dtypes; nothing is allocated."""
    return jax.eval_shape(lambda: self.init(jax.random.key(0)))

  def hidden(self, params, tokens_BxT, segment_ids_BxT=None):
    """Final-normed hidden states [B, T, D] in the compute dtype; `params` may be in any float dtype, its blocks' matrices in int8.

    Positions are positions in the window: rotary attention sees only their differences, so documents need no reset.
    """
    n_tokens = tokens_BxT.shape[1]
    if n_tokens > self.config.max_seq_len:
      raise UserError(
        f'model: {n_tokens} tokens exceed max_seq_len = {self.config.max_seq_len}; raise it or shorten the window'
      )
    return nnx.merge(_graph(self.config, compute_dtype(self.config)), params)(tokens_BxT, segment_ids_BxT)

  def head(self, params):
    """The output weight [D, V], in the dtype in which it is stored."""
    return params['embed']['embedding'].T if self.config.tied else params['head']['kernel']

  @property
  def n_params(self) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(self.abstract()))


def build(config: ModelConfig) -> Model:
  """Raises UserError where the config does not make a model."""
  return Model(config)


def check(config: ModelConfig) -> None:
  c = config
  for name in SIZES:
    if getattr(c, name) < 1:
      hint = '; take it from the tokenizer' if name == 'vocab_size' else ''
      raise UserError(f'model: {name} = {getattr(c, name)} must be at least 1{hint}')
  if c.n_heads % c.n_kv_heads:
    raise UserError(f'model: n_kv_heads = {c.n_kv_heads} does not divide n_heads = {c.n_heads}')
  if c.head_dim % 2:
    raise UserError(f'model: head_dim = {c.head_dim} is odd; rotary positions turn pairs of dimensions')
  check_implementation(c.attention)
  for name, known in (('dtype', DTYPES), ('param_dtype', PARAM_DTYPES), ('remat', REMAT)):
    if getattr(c, name) not in known:
      raise UserError(f"model: unknown {name} '{getattr(c, name)}'; known: {', '.join(known)}")


def compute_dtype(config: ModelConfig):
  if config.dtype == 'auto':
    return jnp.dtype('float32' if backend.name() == 'cpu' else 'bfloat16')
  return jnp.dtype(config.dtype)


def rope_frequencies(config: ModelConfig) -> np.ndarray:
  """Radians per position of each pair of dimensions, [K // 2], float64, with Llama-3.1's scaling."""
  frequencies = config.rope_theta ** -(np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim)
  return _scale_frequencies(frequencies, config.rope_scaling)


def rope_angles(n_tokens: int, config: ModelConfig):
  """The angle of each position and dimension, [T, K]: both halves of K turn alike."""
  half_TxK = jnp.arange(n_tokens, dtype=jnp.float32)[:, None] * jnp.asarray(rope_frequencies(config), jnp.float32)
  return jnp.concatenate([half_TxK, half_TxK], axis=-1)


def rotate(x_BxTxHxK, angles_TxK):
  """Turns dimension i against dimension i + K/2 by the position's angle: Hugging Face's half-rotation, in float32."""
  x = x_BxTxHxK.astype(jnp.float32)
  first, second = jnp.split(x, 2, axis=-1)
  turned = jnp.concatenate([-second, first], axis=-1)
  angles_Tx1xK = angles_TxK[:, None, :]
  return (x * jnp.cos(angles_Tx1xK) + turned * jnp.sin(angles_Tx1xK)).astype(x_BxTxHxK.dtype)


def _scale_frequencies(frequencies, scaling: RopeScaling):
  """Llama 3.1 slows the long waves by `factor`, keeps the short ones and blends between (Meta's `apply_scaling`)."""
  if scaling.factor == 1.0:
    return frequencies
  turns = scaling.original_max_len * frequencies / (2 * math.pi)  # in the length trained on
  keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
  keep = np.clip(keep, 0.0, 1.0)
  return keep * frequencies + (1 - keep) * frequencies / scaling.factor


def _linear(n_in: int, n_out: int, config: ModelConfig, rngs: nnx.Rngs, std: float = INIT_STD) -> nnx.Linear:
  return nnx.Linear(
    n_in,
    n_out,
    use_bias=False,
    dtype=compute_dtype(config),
    param_dtype=jnp.dtype(config.param_dtype),
    kernel_init=nnx.initializers.normal(std),
    rngs=rngs,
  )


def _residual_std(config: ModelConfig) -> float:
  """Each layer adds to the residual stream twice; so its size at the start does not depend on the depth (GPT-2)."""
  return INIT_STD / math.sqrt(2 * config.n_layers)


@functools.lru_cache
def _graph(config: ModelConfig, dtype):  # dtype: where it is 'auto' it depends on the backend
  return nnx.split(nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(0))))[0]
