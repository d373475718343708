"""Checksums of arrays on the devices that hold them, and fingerprints of a model's weights."""

import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp

from kdjax.runtime.sharding import path_name

VERSION = 2  # the checksums of version 1 were weaker; they are still computed, to compare with old ones


def checksums(tree, version: int = VERSION) -> dict[str, int]:
  """Compute a 32-bit checksum of each leaf's bits and their positions: the same on any mesh.

  A change of one element always changes it; any other change does but for one chance in 2^32.

  Args:
    version: of the checksums that these are compared with.
  """
  # One leaf after the other: a CPU's reduction needs as much again as what it reduces, and several programs at once, each waiting for all
  # devices, can take one another's threads on a busy CPU (XLA then aborts the process).
  return {name: int(_CHECKSUMS[version](leaf)) for name, leaf in named_leaves(tree).items()}


def params_fingerprint(params, like: str = '') -> str:
  """Return a short hash of a model's weights.

  Args:
    like: an earlier fingerprint, which this one is to be compared with: the hash is computed by the version that made it.
  """
  version = VERSION if not like or like.startswith(_MARK) else 1
  return fingerprint(checksums(params, version), version)


def differ(left: str | None, right: str | None) -> bool:
  """Return whether two fingerprints of weights show different weights. Those of different versions show nothing: runs keep the one they had."""
  if not left or not right:
    return left != right
  return left != right and left.startswith(_MARK) == right.startswith(_MARK)


@jax.jit
def _mixed_sum(x: jax.Array) -> jax.Array:
  """Sum `mix(bits ^ position)` over the elements, modulo 2^32; a position is the sum of a hash of each of its indices.

  For each position `mix` is a bijection of the bits, so one changed element cannot pass.
  """
  position = jnp.zeros((), jnp.uint32)
  for axis, size in enumerate(x.shape):
    index = jax.lax.iota(jnp.uint32, size) + jnp.uint32((axis + 1) * 0x9E3779B9 % 2**32)
    position = position + _mix(index).reshape(-1, *[1] * (x.ndim - axis - 1))
  return jnp.sum(_mix(_unsigned(x) ^ position), dtype=jnp.uint32)


def _mix(x: jax.Array) -> jax.Array:
  """Spread each bit over the whole word: MurmurHash3's 32-bit finalizer (Appleby), a bijection."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
  return x ^ (x >> 16)


@jax.jit
def _weighted_sum(x: jax.Array) -> jax.Array:
  """Version 1: sum bits * (an odd number of the position), modulo 2^32. Two flipped sign bits cancel."""
  position = jnp.zeros(x.shape, jnp.uint32)
  for axis, size in enumerate(x.shape):
    position = position * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
  return jnp.sum(_unsigned(x) * (2 * position + 1), dtype=jnp.uint32)


_CHECKSUMS = {1: _weighted_sum, 2: _mixed_sum}
_MARK = '2-'  # begins a fingerprint of version 2


def _unsigned(x: jax.Array) -> jax.Array:
  """View each element's bits as a uint32."""
  unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
  return jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)


def fingerprint(sums: dict[str, int], version: int) -> str:
  """Return a short hash of checksums, marked with their version."""
  digest = hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()[:12]
  return digest if version == 1 else _MARK + digest


def named_leaves(tree) -> dict[str, Any]:
  """The leaves of a tree by their path."""
  return {path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}
