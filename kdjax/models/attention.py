"""Causal attention with grouped heads, blind across documents: three bodies behind one signature.

`xla` runs everywhere and is the reference. `cudnn` is NVIDIA's flash kernel: no [T, T] scores, but `jax.nn` gives it no
segment ids, so a document mask must be written out. `splash` is the TPU's kernel: it takes segment ids and skips blocks
above the diagonal.
"""

import functools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask
from jax.sharding import PartitionSpec as P

from kdjax.errors import UserError
from kdjax.runtime import backend, environment
from kdjax.runtime.sharding import mesh_in_use, rows_in_use

IMPLEMENTATIONS = ('auto', 'xla', 'cudnn', 'splash')
MAX_DENSE_MASK = 2048  # tokens: a [T, T] mask and the scores behind it grow with the square
SPLASH_BLOCK = 128  # the kernel's smallest tile
# The step's execution raises an IndexError: measured with JAX 0.11.2 and cuDNN 9.19 on an H200 (docs/DEVICE.md).
_DETERMINISM = "XLA's deterministic operations (XLA_FLAGS, set by deterministic=True)"


class Local(NamedTuple):
  """A layer whose queries look back on `window` tokens, their own included, where `here` (a traced bool) says so; else on all."""

  window: int
  here: Any


def attention(
  q_BxTxHxK,
  k_BxTxGxK,
  v_BxTxGxK,
  segment_ids_BxT=None,
  *,
  implementation: str = 'auto',
  scale: float | None = None,
  local: Local | None = None,
):
  """Softmax attention of each query to the keys at or before it, in its own document.

  Args:
    q_BxTxHxK: queries; H is a multiple of G, query head h reads key head h // (H // G).
    k_BxTxGxK: keys.
    v_BxTxGxK: values.
    segment_ids_BxT: the document of each token, from 1; 0 is padding. None: one document, no padding.
    implementation: 'xla', 'cudnn', 'splash', or 'auto': the fastest that the default backend has for these shapes.
    scale: of the scores; None: 1 / sqrt(K).
    local: None: every query looks back on all of its document.

  Returns:
    [B, T, H, K] in the queries' dtype (softmax in float32). Rows of padding are finite and mean nothing.

  Raises:
    UserError: an unknown or impossible implementation, or a written-out document mask beyond 2,048 tokens.
  """
  check_implementation(implementation)
  if implementation == 'auto':
    implementation = _fastest(q_BxTxHxK)
  if local is not None and local.window >= q_BxTxHxK.shape[1]:
    local = None  # it looks back on all there is
  body = {'xla': xla, 'cudnn': cudnn, 'splash': splash}[implementation]
  return body(q_BxTxHxK, k_BxTxGxK, v_BxTxGxK, segment_ids_BxT, scale=scale, local=local)


def cached_attention(
  q_BxTxHxK, k_BxSxGxK, v_BxSxGxK, start, first_B, *, scale: float | None = None, local: Local | None = None
):
  """The same for queries at the positions from `start` on, over the keys of all S positions of a cache.

  Args:
    start: the position of the first query; the cache's keys at later positions than a query's are not seen.
    first_B: the position at which each row begins; what is before is padding.
  """
  query_Tx1 = start + jnp.arange(q_BxTxHxK.shape[1])[:, None]
  key_S = jnp.arange(k_BxSxGxK.shape[1])
  seen_BxTxS = (key_S <= query_Tx1) & (key_S >= first_B[:, None, None])
  if local is not None:
    seen_BxTxS &= ~local.here | (query_Tx1 - key_S < local.window)
  return jax.nn.dot_product_attention(
    q_BxTxHxK, k_BxSxGxK, v_BxSxGxK, mask=seen_BxTxS[:, None], scale=scale, implementation='xla'
  )


def check_backend(implementation: str) -> None:
  """Raise UserError for a kernel that the devices here do not run, or not with XLA's deterministic operations."""
  needs = {'splash': 'tpu', 'cudnn': 'gpu'}.get(implementation)
  if needs and backend.name() != needs:
    raise UserError(
      f'attention={implementation} runs on {needs.upper()}s, not on {backend.name()}; set it to auto or xla'
    )
  if implementation == 'cudnn' and environment.excludes_nondeterminism():
    raise UserError(f'attention=cudnn fails under {_DETERMINISM}; set attention=auto, or --config.deterministic=False')


def check_implementation(implementation: str) -> None:
  if implementation not in IMPLEMENTATIONS:
    raise UserError(f"attention: unknown implementation '{implementation}'; known: {', '.join(IMPLEMENTATIONS)}")


def xla(q_BxTxHxK, k_BxTxGxK, v_BxTxGxK, segment_ids_BxT=None, *, scale=None, local=None):
  """The plain formula; [B, H, T, T] scores exist."""
  mask = _mask(q_BxTxHxK.shape[1], segment_ids_BxT, local, 'xla')
  return jax.nn.dot_product_attention(
    q_BxTxHxK, k_BxTxGxK, v_BxTxGxK, mask=mask, scale=scale, is_causal=True, implementation='xla'
  )


def cudnn(q_BxTxHxK, k_BxTxGxK, v_BxTxGxK, segment_ids_BxT=None, *, scale=None, local=None):
  """NVIDIA's flash attention, 16-bit only."""
  if q_BxTxHxK.dtype not in (jnp.bfloat16, jnp.float16):
    raise UserError(
      f'attention=cudnn computes in bfloat16 or float16, not {q_BxTxHxK.dtype}; set attention=xla or dtype=bfloat16'
    )
  mask = _mask(q_BxTxHxK.shape[1], segment_ids_BxT, local, 'cudnn')
  return jax.nn.dot_product_attention(
    q_BxTxHxK, k_BxTxGxK, v_BxTxGxK, mask=mask, scale=scale, is_causal=True, implementation='cudnn'
  )


def splash(q_BxTxHxK, k_BxTxGxK, v_BxTxGxK, segment_ids_BxT=None, *, scale=None, local=None, interpret: bool = False):
  """The TPU's flash attention. On a mesh each device runs the kernel on its own rows and heads.

  `interpret` runs the kernel's body as ordinary operations, on any backend: for tests.
  """
  n_tokens, head_dim = q_BxTxHxK.shape[1], q_BxTxHxK.shape[3]
  if segment_ids_BxT is None:
    segment_ids_BxT = jnp.ones(q_BxTxHxK.shape[:2], jnp.int32)
  pad = -n_tokens % SPLASH_BLOCK
  scaled = q_BxTxHxK * (scale or head_dim**-0.5)
  q, k, v = (_pad_tokens(x, pad).swapaxes(1, 2) for x in (scaled, k_BxTxGxK, v_BxTxGxK))
  on_device = functools.partial(_splash_on_device, interpret=interpret)
  here = jnp.zeros((), bool)
  if local is not None:
    on_device, here = functools.partial(on_device, window=local.window), local.here
  mesh = mesh_in_use()
  if mesh is not None:
    on_rows = rows_in_use()
    by_head = None if 'tensor' in on_rows else 'tensor'
    if by_head and k.shape[1] % mesh.shape['tensor']:
      raise UserError(
        f'attention=splash: mesh tensor = {mesh.shape["tensor"]} does not divide the {k.shape[1]} key/value heads; '
        'lower --config.mesh.tensor'
      )
    heads, rows = P(on_rows, by_head), P(on_rows)
    # The kernel's outputs carry no varying-axes annotation, hence check_vma=False.
    on_device = jax.shard_map(on_device, in_specs=(heads, heads, heads, rows, P()), out_specs=heads, check_vma=False)
  out_BxHxTxK = on_device(q, k, v, _pad_tokens(segment_ids_BxT, pad), here)
  return out_BxHxTxK.swapaxes(1, 2)[:, :n_tokens]


def _splash_on_device(q_BxHxTxK, k_BxGxTxK, v_BxGxTxK, segment_ids_BxT, is_local, *, interpret, window: int = 0):
  """One device's rows and heads; a kernel's mask is static, so a layer that may be local has both and takes one."""
  segments = splash_attention_kernel.SegmentIds(segment_ids_BxT, segment_ids_BxT)
  n_heads, n_tokens = q_BxHxTxK.shape[1:3]
  square = (n_tokens, n_tokens)

  def attend(mask):
    kernel = _splash_kernel([mask] * n_heads, n_tokens, interpret)
    return lambda: jax.vmap(kernel)(q_BxHxTxK, k_BxGxTxK, v_BxGxTxK, segments)

  to_all = attend(splash_attention_mask.CausalMask(square))
  if not window:
    return to_all()
  # Keys from `window - 1` before the query to the query.
  return jax.lax.cond(is_local, attend(splash_attention_mask.LocalMask(square, (window - 1, 0), 0)), to_all)


def _splash_kernel(masks, n_tokens: int, interpret: bool):
  block = next(b for b in (512, 256, SPLASH_BLOCK) if n_tokens % b == 0)
  names = ('q', 'kv', 'kv_compute', 'q_dkv', 'kv_dkv', 'kv_dkv_compute', 'q_dq', 'kv_dq')
  sizes: Any = {f'block_{name}': block for name in names}
  return splash_attention_kernel.make_splash_mha_single_device(
    splash_attention_mask.MultiHeadMask(masks),
    block_sizes=splash_attention_kernel.BlockSizes(**sizes),
    interpret=interpret,
  )


def _fastest(q_BxTxHxK) -> str:
  if backend.name() == 'tpu':
    return 'splash'
  _, n_tokens, _, head_dim = q_BxTxHxK.shape
  # cuDNN's own conditions: Ampere or later, 16 bits, head_dim a multiple of 8, an even length where there is a mask.
  fits = q_BxTxHxK.dtype in (jnp.bfloat16, jnp.float16) and head_dim % 8 == 0 and head_dim <= 128 and n_tokens % 2 == 0
  if backend.name() != 'gpu' or not fits or not _has_ampere():
    return 'xla'
  if not environment.excludes_nondeterminism():
    return 'cudnn'
  if n_tokens > MAX_DENSE_MASK:
    raise UserError(
      f'attention=auto: cuDNN fails under {_DETERMINISM}, and attention=xla writes out {n_tokens} x {n_tokens} scores; '
      'set --config.deterministic=False, shorten data.seq_len, or set attention=xla if the memory allows it'
    )
  return 'xla'


def _has_ampere() -> bool:
  capability = str(getattr(jax.local_devices()[0], 'compute_capability', ''))
  return bool(re.fullmatch(r'\d+\.\d+', capability)) and float(capability) >= 8.0  # AMD's say 'gfx...'


def _mask(n_tokens: int, segment_ids_BxT, local: Local | None, implementation: str):
  """[B or 1, 1, T, T], true where a query may see a key, besides that it must not come later; None where it may see all.

  A key of another document is not seen. Padding sees padding, so that no row is empty (NaN). A local layer's query sees its window.
  """
  if segment_ids_BxT is None and local is None:
    return None
  if n_tokens > MAX_DENSE_MASK:
    what, mend = 'document mask for each row', 'set data.mask_documents=False, shorten data.seq_len'
    if segment_ids_BxT is None:
      what, mend = "mask of the model's local layers", 'shorten data.seq_len'
    raise UserError(
      f'attention={implementation} would write out a {n_tokens} x {n_tokens} {what} (the limit is {MAX_DENSE_MASK} tokens); '
      f'{mend}, or use attention=splash on a TPU'
    )
  seen = jnp.ones((1, 1, 1, 1), bool)
  if segment_ids_BxT is not None:
    seen &= segment_ids_BxT[:, None, :, None] == segment_ids_BxT[:, None, None, :]
  if local is not None:
    position_T = jnp.arange(n_tokens)
    seen &= ~local.here | (position_T[:, None] - position_T < local.window)
  return jnp.broadcast_to(seen, (seen.shape[0], 1, n_tokens, n_tokens))


def _pad_tokens(x_BxTxetc, pad: int):
  return jnp.pad(x_BxTxetc, ((0, 0), (0, pad)) + ((0, 0),) * (x_BxTxetc.ndim - 2))
