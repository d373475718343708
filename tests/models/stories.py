"""Reads llama2.c's legacy binary model and tokenizer files (Karpathy's stories260K): a real small Llama to test on.

Layout: seven int32 (dim, ffn, layers, heads, kv heads, vocabulary, context; a negative vocabulary would mean an untied
head), then float32 arrays, each stacked over layers, weights as [out, in].
"""

import pathlib
import struct

import numpy as np

from kdjax.config import ModelConfig

FOLDER = pathlib.Path(__file__).parents[2].parent / 'shared/data/models/stories260K'
BOS = 1


def load(path: pathlib.Path):
  """(config, params) of a kdjax model."""
  data = path.read_bytes()
  dim, ffn, layers, heads, kv_heads, vocab, context = struct.unpack('7i', data[:28])
  assert vocab > 0, 'an untied head is not read here'
  config = ModelConfig(
    vocab_size=vocab,
    d_model=dim,
    n_layers=layers,
    d_ff=ffn,
    n_heads=heads,
    n_kv_heads=kv_heads,
    head_dim=dim // heads,
    max_seq_len=context,
    tied=True,
    rope_theta=1e4,
    norm_eps=1e-5,
  )
  rest = np.frombuffer(data, np.float32, offset=28)
  kv_dim = kv_heads * config.head_dim

  def take(*shape):
    nonlocal rest
    size = int(np.prod(shape))
    taken, rest = rest[:size].reshape(shape), rest[size:]
    return taken

  embedding = take(vocab, dim)
  attn_norm = take(layers, dim)
  q, k, v = take(layers, dim, dim), take(layers, kv_dim, dim), take(layers, kv_dim, dim)
  o = take(layers, dim, dim)
  mlp_norm = take(layers, dim)
  gate, down, up = take(layers, ffn, dim), take(layers, dim, ffn), take(layers, ffn, dim)
  final_norm = take(dim)
  assert len(rest) == context * config.head_dim  # the rotary tables: recomputed here
  params = {
    'embed': {'embedding': np.pad(embedding, ((0, config.padded_vocab_size - vocab), (0, 0)))},
    'blocks': {
      'attn_norm': {'scale': attn_norm},
      'attn': {
        'q': _kernel(_half_rotation(q, heads)),
        'k': _kernel(_half_rotation(k, kv_heads)),
        'v': _kernel(v),
        'o': _kernel(o),
      },
      'mlp_norm': {'scale': mlp_norm},
      'mlp': {'gate': _kernel(gate), 'up': _kernel(up), 'down': _kernel(down)},
    },
    'final_norm': {'scale': final_norm},
  }
  return config, params


def load_pieces(path: pathlib.Path, vocab_size: int) -> list[bytes]:
  """The bytes of each token. The file: the longest length, then each one's float32 score, int32 length and bytes."""
  data, position, pieces = path.read_bytes(), 4, []
  for _ in range(vocab_size):
    _, length = struct.unpack_from('fi', data, position)
    pieces.append(data[position + 8 : position + 8 + length])
    position += 8 + length
  assert position == len(data)
  return pieces


def _kernel(weight_LxOxI):
  return {'kernel': np.ascontiguousarray(weight_LxOxI.swapaxes(1, 2))}


def _half_rotation(weight_LxOxI, heads):
  """llama2.c turns dimension 2i against 2i + 1, kdjax i against i + K/2: even rows first, then odd ones."""
  layers, n_out, n_in = weight_LxOxI.shape
  pairs = weight_LxOxI.reshape(layers, heads, n_out // heads // 2, 2, n_in)
  return pairs.swapaxes(2, 3).reshape(layers, n_out, n_in)
