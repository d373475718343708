"""Causal attention with grouped heads, blind across documents: three bodies behind one signature.

`xla` runs everywhere and is the reference. `cudnn` is NVIDIA's flash kernel: no [T, T] scores, but `jax.nn` gives it no
segment ids, so a document mask must be written out. `splash` is the TPU's kernel: it takes segment ids and skips blocks
above the diagonal.
"""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask
from jax.sharding import PartitionSpec as P

from kdjax import backend
from kdjax.errors import UserError
from kdjax.sharding import mesh_in_use, rows_in_use

IMPLEMENTATIONS = ('auto', 'xla', 'cudnn', 'splash')
MAX_DENSE_MASK = 2048  # tokens: a [T, T] mask and the scores behind it grow with the square
SPLASH_BLOCK = 128  # the kernel's smallest tile


def attention(q_BxTxHxK, k_BxTxGxK, v_BxTxGxK, segment_ids_BxT=None, *, implementation: str = 'auto'):
  """Softmax attention of each query to the keys at or before it, in its own document.

  Args:
    q_BxTxHxK: queries; H is a multiple of G, query head h reads key head h // (H // G).
    k_BxTxGxK: keys.
    v_BxTxGxK: values.
    segment_ids_BxT: the document of each token, from 1; 0 is padding. None: one document, no padding.
    implementation: 'xla', 'cudnn', 'splash', or 'auto': the fastest that the default backend has for these shapes.

  Returns:
    [B, T, H, K] in the queries' dtype (softmax in float32). Rows of padding are finite and mean nothing.

  Raises:
    UserError: an unknown or impossible implementation, or a written-out document mask beyond 2,048 tokens.
  """
  check_implementation(implementation)
  if implementation == 'auto':
    implementation = _fastest(q_BxTxHxK)
  body = {'xla': xla, 'cudnn': cudnn, 'splash': splash}[implementation]
  return body(q_BxTxHxK, k_BxTxGxK, v_BxTxGxK, segment_ids_BxT)


def check_backend(implementation: str) -> None:
  """Raises UserError for a kernel that the devices here do not run."""
  needs = {'splash': 'tpu', 'cudnn': 'gpu'}.get(implementation)
  if needs and backend.name() != needs:
    raise UserError(
      f'attention={implementation} runs on {needs.upper()}s, not on {backend.name()}; set it to auto or xla'
    )


def check_implementation(implementation: str) -> None:
  if implementation not in IMPLEMENTATIONS:
    raise UserError(f"attention: unknown implementation '{implementation}'; known: {', '.join(IMPLEMENTATIONS)}")


def xla(q_BxTxHxK, k_BxTxGxK, v_BxTxGxK, segment_ids_BxT=None):
  """The plain formula; [B, H, T, T] scores exist."""
  mask_Bx1xTxT = _document_mask(segment_ids_BxT, 'xla')
  return jax.nn.dot_product_attention(
    q_BxTxHxK, k_BxTxGxK, v_BxTxGxK, mask=mask_Bx1xTxT, is_causal=True, implementation='xla'
  )


def cudnn(q_BxTxHxK, k_BxTxGxK, v_BxTxGxK, segment_ids_BxT=None):
  """NVIDIA's flash attention, 16-bit only."""
  if q_BxTxHxK.dtype not in (jnp.bfloat16, jnp.float16):
    raise UserError(
      f'attention=cudnn computes in bfloat16 or float16, not {q_BxTxHxK.dtype}; set attention=xla or dtype=bfloat16'
    )
  mask_Bx1xTxT = _document_mask(segment_ids_BxT, 'cudnn')
  return jax.nn.dot_product_attention(
    q_BxTxHxK, k_BxTxGxK, v_BxTxGxK, mask=mask_Bx1xTxT, is_causal=True, implementation='cudnn'
  )


def splash(q_BxTxHxK, k_BxTxGxK, v_BxTxGxK, segment_ids_BxT=None, *, interpret: bool = False):
  """The TPU's flash attention. On a mesh each device runs the kernel on its own rows and heads.

  `interpret` runs the kernel's body as ordinary operations, on any backend: for tests.
  """
  n_tokens, head_dim = q_BxTxHxK.shape[1], q_BxTxHxK.shape[3]
  if segment_ids_BxT is None:
    segment_ids_BxT = jnp.ones(q_BxTxHxK.shape[:2], jnp.int32)
  pad = -n_tokens % SPLASH_BLOCK
  q, k, v = (_pad_tokens(x, pad).swapaxes(1, 2) for x in (q_BxTxHxK * head_dim**-0.5, k_BxTxGxK, v_BxTxGxK))
  local = functools.partial(_splash_local, interpret=interpret)
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
    local = jax.shard_map(local, in_specs=(heads, heads, heads, rows), out_specs=heads, check_vma=False)
  out_BxHxTxK = local(q, k, v, _pad_tokens(segment_ids_BxT, pad))
  return out_BxHxTxK.swapaxes(1, 2)[:, :n_tokens]


def _splash_local(q_BxHxTxK, k_BxGxTxK, v_BxGxTxK, segment_ids_BxT, *, interpret):
  _, n_heads, n_tokens, _ = q_BxHxTxK.shape
  block = next(b for b in (512, 256, SPLASH_BLOCK) if n_tokens % b == 0)
  names = ('q', 'kv', 'kv_compute', 'q_dkv', 'kv_dkv', 'kv_dkv_compute', 'q_dq', 'kv_dq')
  sizes: Any = {f'block_{name}': block for name in names}
  kernel = splash_attention_kernel.make_splash_mha_single_device(
    splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((n_tokens, n_tokens))] * n_heads),
    block_sizes=splash_attention_kernel.BlockSizes(**sizes),
    interpret=interpret,
  )
  segments = splash_attention_kernel.SegmentIds(segment_ids_BxT, segment_ids_BxT)
  return jax.vmap(kernel)(q_BxHxTxK, k_BxGxTxK, v_BxGxTxK, segments)


def _fastest(q_BxTxHxK) -> str:
  if backend.name() == 'tpu':
    return 'splash'
  _, n_tokens, _, head_dim = q_BxTxHxK.shape
  # cuDNN's own conditions: Ampere or later, 16 bits, head_dim a multiple of 8, an even length where there is a mask.
  fits = q_BxTxHxK.dtype in (jnp.bfloat16, jnp.float16) and head_dim % 8 == 0 and head_dim <= 128 and n_tokens % 2 == 0
  return 'cudnn' if backend.name() == 'gpu' and fits and _has_ampere() else 'xla'


def _has_ampere() -> bool:
  capability = str(getattr(jax.local_devices()[0], 'compute_capability', ''))
  return bool(re.fullmatch(r'\d+\.\d+', capability)) and float(capability) >= 8.0  # AMD's say 'gfx...'


def _document_mask(segment_ids_BxT, implementation: str):
  """[B, 1, T, T], true where query and key are of one document. Padding sees padding, so that no row is empty (NaN)."""
  if segment_ids_BxT is None:
    return None
  n_tokens = segment_ids_BxT.shape[1]
  if n_tokens > MAX_DENSE_MASK:
    raise UserError(
      f'attention={implementation} would write out a {n_tokens} x {n_tokens} document mask for each row (the limit is '
      f'{MAX_DENSE_MASK} tokens); set data.mask_documents=False, shorten data.seq_len, or use attention=splash on a TPU'
    )
  return segment_ids_BxT[:, None, :, None] == segment_ids_BxT[:, None, None, :]


def _pad_tokens(x_BxTxetc, pad: int):
  return jnp.pad(x_BxTxetc, ((0, 0), (0, pad)) + ((0, 0),) * (x_BxTxetc.ndim - 2))
