"""One decoder for the Llama, Qwen, OLMo-2 and Gemma-3 styles of model: RMSNorm, rotary positions, grouped heads, a gated MLP.

It ends at the final norm. The head's weight goes to the loss, which forms logits a chunk of tokens at a time
(kdjax/losses/fused.py), so logits are never whole. `Model` is the face that the rest of kdjax sees: a hashable value
and plain dicts of arrays, no NNX types.

Shapes: B rows, T tokens, S positions of a cache, D d_model, H query heads, G key/value heads, K head_dim, L layers, V the padded vocabulary.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kdjax.config import ModelConfig, RopeScaling
from kdjax.errors import UserError
from kdjax.models.attention import Local, attention, cached_attention, check_implementation
from kdjax.models.quantized import widened
from kdjax.runtime import backend
from kdjax.runtime.sharding import constrain

DTYPES = ('auto', 'float32', 'bfloat16', 'float16')
PARAM_DTYPES = ('float32', 'bfloat16', 'float16')
REMAT = {
  'none': None,
  'full': jax.checkpoint_policies.nothing_saveable,
  'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
ACTIVATIONS: dict[str, Callable] = {'silu': jax.nn.silu, 'gelu_tanh': functools.partial(jax.nn.gelu, approximate=True)}
NORMS = {'before': (True, False), 'after': (False, True), 'both': (True, True)}  # of attention and MLP: before, after
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


class Cache(NamedTuple):
  """The keys and values of the positions seen so far: what the next token's attention needs of them.

  Positions are the rows' own index in the cache; a row whose text begins later has padding before `first_B`.
  """

  k_LxBxSxGxK: Any
  v_LxBxSxGxK: Any
  length: Any  # int32: how many positions are filled, the same in all rows
  first_B: Any  # int32


class Seen(NamedTuple):
  """What a block's attention knows besides the hidden states; the same for all layers, but for `local` and `cached`."""

  rope_TxK: Any
  segment_ids_BxT: Any = None
  local: Local | None = None
  cached: tuple[Any, Any] | None = None  # this layer's keys and values [B, S, G, K]
  start: Any = 0  # with a cache: the position of the first token,
  first_B: Any = None  # and of each row's first


class RMSNorm(nnx.Module):
  """`x / rms(x) * scale`, over the last axis; statistics in float32 whatever the input."""

  def __init__(self, size: int, config: ModelConfig, rngs: nnx.Rngs):
    self.offset, self.eps = float(config.norm_offset), config.norm_eps
    self.scale = nnx.Param(jnp.full(size, 1 - self.offset, config.param_dtype))

  def __call__(self, x):
    x_f32 = x.astype(jnp.float32)
    inverse_rms = jax.lax.rsqrt(jnp.mean(x_f32**2, axis=-1, keepdims=True) + self.eps)
    scale = self.scale[...].astype(jnp.float32)
    return (x_f32 * inverse_rms * (self.offset + scale if self.offset else scale)).astype(x.dtype)


class Attention(nnx.Module):
  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    c = config
    self.config = c
    self.q = _linear(c.d_model, c.n_heads * c.head_dim, c, rngs, bias=c.qkv_bias)
    self.k = _linear(c.d_model, c.n_kv_heads * c.head_dim, c, rngs, bias=c.qkv_bias)
    self.v = _linear(c.d_model, c.n_kv_heads * c.head_dim, c, rngs, bias=c.qkv_bias)
    self.o = _linear(c.n_heads * c.head_dim, c.d_model, c, rngs, std=_residual_std(c))
    if c.qk_norm or c.qk_norm_whole:
      self.q_norm = RMSNorm(c.head_dim * (c.n_heads if c.qk_norm_whole else 1), c, rngs)
      self.k_norm = RMSNorm(c.head_dim * (c.n_kv_heads if c.qk_norm_whole else 1), c, rngs)

  def __call__(self, x_BxTxD, seen: Seen):
    """(output [B, T, D], this layer's keys and values [B, S, G, K] where there is a cache)."""
    c = self.config
    q, k, v = self.q(x_BxTxD), self.k(x_BxTxD), self.v(x_BxTxD)
    if c.qk_norm_whole:
      q, k = self.q_norm(q), self.k_norm(k)
    heads = functools.partial(jnp.reshape, shape=(*x_BxTxD.shape[:2], -1, c.head_dim))
    q_BxTxHxK, k_BxTxGxK, v_BxTxGxK = heads(q), heads(k), heads(v)
    if c.qk_norm:
      q_BxTxHxK, k_BxTxGxK = self.q_norm(q_BxTxHxK), self.k_norm(k_BxTxGxK)
    q_BxTxHxK, k_BxTxGxK = rotate(q_BxTxHxK, seen.rope_TxK), rotate(k_BxTxGxK, seen.rope_TxK)
    scale, cached = c.attn_scale or None, seen.cached
    if cached is None:
      out_BxTxHxK = attention(
        q_BxTxHxK, k_BxTxGxK, v_BxTxGxK, seen.segment_ids_BxT,
        implementation=c.attention, scale=scale, local=seen.local,
      )  # fmt: skip
    else:
      put = lambda whole, new: jax.lax.dynamic_update_slice_in_dim(whole, new.astype(whole.dtype), seen.start, axis=1)
      cached = put(cached[0], k_BxTxGxK), put(cached[1], v_BxTxGxK)
      out_BxTxHxK = cached_attention(q_BxTxHxK, *cached, seen.start, seen.first_B, scale=scale, local=seen.local)
    return self.o(out_BxTxHxK.reshape(*x_BxTxD.shape[:2], -1)), cached


class MLP(nnx.Module):
  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    self.activation = ACTIVATIONS[config.activation]
    self.gate = _linear(config.d_model, config.d_ff, config, rngs)
    self.up = _linear(config.d_model, config.d_ff, config, rngs)
    self.down = _linear(config.d_ff, config.d_model, config, rngs, std=_residual_std(config))

  def __call__(self, x_BxTxD):
    return self.down(self.activation(self.gate(x_BxTxD)) * self.up(x_BxTxD))


class Block(nnx.Module):
  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    before, after = NORMS[config.norms]
    norm = lambda: RMSNorm(config.d_model, config, rngs)
    self.attn = Attention(config, rngs)
    self.mlp = MLP(config, rngs)
    if before:
      self.attn_norm, self.mlp_norm = norm(), norm()
    if after:
      self.attn_post_norm, self.mlp_post_norm = norm(), norm()

  def __call__(self, x_BxTxD, seen: Seen):
    """(hidden states, as Attention's second result)."""
    normed = lambda name, x: getattr(self, name)(x) if hasattr(self, name) else x
    out_BxTxD, cached = self.attn(normed('attn_norm', x_BxTxD), seen)
    x_BxTxD = x_BxTxD + normed('attn_post_norm', out_BxTxD)
    out_BxTxD = self.mlp(normed('mlp_norm', x_BxTxD))
    return x_BxTxD + normed('mlp_post_norm', out_BxTxD), cached


class Embed(nnx.Module):
  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    init = nnx.initializers.normal(INIT_STD)
    shape = (config.padded_vocab_size, config.d_model)
    self.embedding = nnx.Param(init(rngs.params(), shape, config.param_dtype))

  def __call__(self, tokens_BxT):
    return jnp.asarray(self.embedding[...])[tokens_BxT]


class Decoder(nnx.Module):
  """Tokens [B, T] -> hidden states [B, T, D] after the final norm, in the compute dtype, and the cache with these tokens in it."""

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    self.config = config
    self.embed = Embed(config, rngs)
    stack = nnx.vmap(Block, in_axes=(None, 0), out_axes=0)
    self.blocks = stack(config, rngs.split(config.n_layers))
    self.final_norm = RMSNorm(config.d_model, config, rngs)
    if not config.tied:
      self.head = _linear(config.d_model, config.padded_vocab_size, config, rngs)

  def __call__(self, tokens_BxT, segment_ids_BxT=None, cache: Cache | None = None):
    config, n_tokens = self.config, tokens_BxT.shape[1]
    start, first_B = (cache.length, cache.first_B) if cache else (0, None)
    position_T = start + jnp.arange(n_tokens, dtype=jnp.float32)
    rope_TxK = rope_angles(position_T, rope_frequencies(config))
    local_rope_TxK = rope_angles(position_T, rope_frequencies(config, local=True))
    graph, layers = nnx.split(self.blocks)

    def block(x_BxTxD, layer):
      weights, is_local, cached = layer
      weights = widened(weights, compute_dtype(config))
      seen = Seen(rope_TxK, segment_ids_BxT, cached=cached, start=start, first_B=first_B)
      if config.local_window:
        rope = jnp.where(is_local, local_rope_TxK, rope_TxK)
        seen = seen._replace(rope_TxK=rope, local=Local(config.local_window, is_local))
      x_BxTxD, cached = nnx.merge(graph, weights)(x_BxTxD, seen)
      return constrain(x_BxTxD), cached

    if config.remat != 'none':
      # Inside a scan the compiler cannot merge the recomputed part with the first pass, so nothing need prevent it.
      block = jax.checkpoint(block, policy=REMAT[config.remat], prevent_cse=False)
    x_BxTxD = self.embed(tokens_BxT).astype(compute_dtype(config))
    if config.embed_scale != 1:
      x_BxTxD = x_BxTxD * jnp.asarray(config.embed_scale, x_BxTxD.dtype)
    is_local_L = (jnp.arange(config.n_layers) + 1) % config.global_every != 0 if config.local_window else None
    per_layer = layers, is_local_L, (cache.k_LxBxSxGxK, cache.v_LxBxSxGxK) if cache else None
    x_BxTxD, cached = jax.lax.scan(block, constrain(x_BxTxD), per_layer, unroll=config.scan_unroll)
    if cache:
      cache = Cache(cached[0], cached[1], cache.length + n_tokens, cache.first_B)
    return self.final_norm(x_BxTxD), cache


@dataclasses.dataclass(frozen=True)
class Model:
  """A decoder as a value: equal configs are equal models, so one may be a static argument of `jit`."""

  config: ModelConfig

  def __post_init__(self):
    check_model(self.config)

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
    self._check_length(tokens_BxT.shape[1])
    return self._decoder(params)(tokens_BxT, segment_ids_BxT)[0]

  def empty_cache(self, first_B, n_positions: int) -> Cache:
    """Room for so many positions of B rows, whose texts begin at the positions `first_B`."""
    c = self.config
    self._check_length(n_positions)
    shape = (c.n_layers, first_B.shape[0], n_positions, c.n_kv_heads, c.head_dim)
    zeros = jnp.zeros(shape, compute_dtype(c))
    return Cache(zeros, zeros, jnp.zeros((), jnp.int32), jnp.asarray(first_B, jnp.int32))

  def extend(self, params, tokens_BxT, cache: Cache):
    """(hidden states [B, T, D] of the next T tokens, the cache with them in it): what `hidden` of the whole text gives for them."""
    return self._decoder(params)(tokens_BxT, cache=cache)

  def _decoder(self, params) -> Decoder:
    return nnx.merge(_graph(self.config, compute_dtype(self.config)), params)

  def _check_length(self, n_tokens: int) -> None:
    if n_tokens > self.config.max_seq_len:
      raise UserError(
        f'model: {n_tokens} tokens exceed max_seq_len = {self.config.max_seq_len}; raise it or shorten the window'
      )

  def head(self, params):
    """The output weight [D, V], in the dtype in which it is stored."""
    return params['embed']['embedding'].T if self.config.tied else params['head']['kernel']

  @property
  def n_params(self) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(self.abstract()))


def build(config: ModelConfig) -> Model:
  """Raise UserError if the config does not make a model."""
  return Model(config)


def check_model(config: ModelConfig) -> None:
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
  known = {'dtype': DTYPES, 'param_dtype': PARAM_DTYPES, 'remat': REMAT, 'norms': NORMS, 'activation': ACTIVATIONS}
  for name, values in known.items():
    if getattr(c, name) not in values:
      raise UserError(f"model: unknown {name} '{getattr(c, name)}'; known: {', '.join(values)}")
  if c.qk_norm and c.qk_norm_whole:
    raise UserError('model: qk_norm is of each head, qk_norm_whole of all together: set one of the two')


def compute_dtype(config: ModelConfig):
  if config.dtype == 'auto':
    return jnp.dtype('float32' if backend.name() == 'cpu' else 'bfloat16')
  return jnp.dtype(config.dtype)


def rope_frequencies(config: ModelConfig, local: bool = False) -> np.ndarray:
  """Radians per position of each pair of dimensions, [K // 2], float64: of the layers that see all, stretched, or of the local ones."""
  theta = config.local_rope_theta if local else config.rope_theta
  frequencies = theta ** -(np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim)
  return frequencies if local else _scale_frequencies(frequencies, config.rope_scaling)


def rope_angles(position_T, frequencies):
  """The angle of each position and dimension, [T, K]: both halves of K turn alike."""
  half_TxK = position_T[:, None] * jnp.asarray(frequencies, jnp.float32)
  return jnp.concatenate([half_TxK, half_TxK], axis=-1)


def rotate(x_BxTxHxK, angles_TxK):
  """Turn dimension i against dimension i + K/2 by the position's angle: Hugging Face's half-rotation, in float32."""
  x = x_BxTxHxK.astype(jnp.float32)
  first, second = jnp.split(x, 2, axis=-1)
  turned = jnp.concatenate([-second, first], axis=-1)
  angles_Tx1xK = angles_TxK[:, None, :]
  return (x * jnp.cos(angles_Tx1xK) + turned * jnp.sin(angles_Tx1xK)).astype(x_BxTxHxK.dtype)


def _scale_frequencies(frequencies, scaling: RopeScaling):
  """Llama 3.1 slows the long waves by `factor`, keeps the short ones and blends between (Meta's `apply_scaling`)."""
  if scaling.factor == 1.0:
    return frequencies
  if scaling.method == 'linear':
    return frequencies / scaling.factor
  turns = scaling.original_max_len * frequencies / (2 * math.pi)  # in the length trained on
  keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
  keep = np.clip(keep, 0.0, 1.0)
  return keep * frequencies + (1 - keep) * frequencies / scaling.factor


def _linear(
  n_in: int, n_out: int, config: ModelConfig, rngs: nnx.Rngs, std: float = INIT_STD, bias: bool = False
) -> nnx.Linear:
  return nnx.Linear(
    n_in,
    n_out,
    use_bias=bias,
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
