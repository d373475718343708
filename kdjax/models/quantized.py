"""Weights in int8 with a scale for each output: a teacher's matrices at half the bytes of bfloat16, in memory and on the network.

Plain symmetric rounding of the blocks' matrices, `values * scale` with scale = max|w| / 127 over the inputs. The products are of the compute
dtype: a layer's matrices are widened inside the loop over layers, so that never more than one layer is. Embedding, head and norms stay as
they are: the head's logits are what is learnt from, and a rounded one would be felt most. benchmarks/int8.py measures what it costs.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp

from kdjax.runtime.sharding import gather, path_name

MATRICES = r'blocks/.*/kernel'


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8:
  """A matrix [..., n_in, n_out]: int8 `values`, and float32 `scale` [..., 1, n_out]."""

  values: jax.Array
  scale: jax.Array


def rounded(weight) -> Int8:
  """The nearest Int8 to a float matrix; a column of zeros stays one."""
  w = weight.astype(jnp.float32)
  scale = jnp.max(jnp.abs(w), axis=-2, keepdims=True) / 127
  return Int8(jnp.round(w / jnp.where(scale == 0, 1, scale)).astype(jnp.int8), scale)


def quantize(params, dtype):
  """The blocks' matrices as Int8, all else in `dtype`."""

  def one(path, leaf):
    return rounded(leaf) if re.fullmatch(MATRICES, path_name(path)) else leaf.astype(dtype)

  return jax.tree_util.tree_map_with_path(one, params)


def widened(layer, dtype):
  """Each Int8 of a block as the float matrix that it stands for; the other leaves as they are."""

  def one(path, leaf):
    if not isinstance(leaf, Int8):
      return leaf
    values = gather(leaf.values, f'blocks/{path_name(path)}')  # before they are widened: a quarter or half of the bytes
    return (values.astype(jnp.float32) * leaf.scale).astype(dtype)

  return jax.tree_util.tree_map_with_path(one, layer, is_leaf=lambda leaf: isinstance(leaf, Int8))
