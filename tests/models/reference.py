"""A decoder in plain NumPy float64, from the papers' formulas, one head and one query at a time; slow on purpose."""

import math

import numpy as np


def hidden(params, tokens_BxT, config, segment_ids_BxT=None):
  """Hidden states after the final norm, [B, T, D] in float64."""
  segments = np.ones_like(tokens_BxT) if segment_ids_BxT is None else segment_ids_BxT
  return np.stack([_row(params, tokens, segment, config) for tokens, segment in zip(tokens_BxT, segments, strict=True)])


def _row(params, tokens_T, segments_T, config):
  x_TxD = _f64(params['embed']['embedding'])[tokens_T] * config.embed_scale
  for layer in range(config.n_layers):
    blocks = params['blocks']

    def normed(name, x, blocks=blocks, layer=layer):
      return (
        rms_norm(x, config.norm_offset + _f64(blocks[name]['scale'])[layer], config.norm_eps) if name in blocks else x
      )

    out = _attention(blocks['attn'], layer, normed('attn_norm', x_TxD), segments_T, config)
    x_TxD = x_TxD + normed('attn_post_norm', out)
    gate, up, down = (_f64(blocks['mlp'][name]['kernel'])[layer] for name in ('gate', 'up', 'down'))
    h = normed('mlp_norm', x_TxD)
    x_TxD = x_TxD + normed('mlp_post_norm', (_activation(h @ gate, config) * (h @ up)) @ down)
  assert ('attn_norm' in blocks, 'attn_post_norm' in blocks) == {
    'before': (True, False), 'after': (False, True), 'both': (True, True)
  }[config.norms]  # fmt: skip
  return rms_norm(x_TxD, config.norm_offset + _f64(params['final_norm']['scale']), config.norm_eps)


def _activation(x, config):
  if config.activation == 'silu':
    return x / (1 + np.exp(-x))
  return x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _attention(params, layer, x_TxD, segments_T, config):
  q, k, v, o = (_f64(params[name]['kernel'])[layer] for name in 'qkvo')
  bias = lambda name: _f64(params[name]['bias'])[layer] if config.qkv_bias else 0
  is_local = config.local_window and (layer + 1) % config.global_every != 0
  norm = lambda name, x: rms_norm(x, config.norm_offset + _f64(params[f'{name}_norm']['scale'])[layer], config.norm_eps)
  size = config.head_dim
  q_TxHK, k_TxGK, v_TxGK = x_TxD @ q + bias('q'), x_TxD @ k + bias('k'), x_TxD @ v + bias('v')
  if config.qk_norm_whole:
    q_TxHK, k_TxGK = norm('q', q_TxHK), norm('k', k_TxGK)
  outputs = []
  for head in range(config.n_heads):
    shared = head * config.n_kv_heads // config.n_heads
    q_TxK = q_TxHK[:, head * size : (head + 1) * size]
    k_TxK = k_TxGK[:, shared * size : (shared + 1) * size]
    v_TxK = v_TxGK[:, shared * size : (shared + 1) * size]
    if config.qk_norm:
      q_TxK, k_TxK = norm('q', q_TxK), norm('k', k_TxK)
    q_TxK, k_TxK = rope(q_TxK, config, is_local), rope(k_TxK, config, is_local)
    attend = [_attend(t, q_TxK, k_TxK, v_TxK, segments_T, is_local, config) for t in range(len(x_TxD))]
    outputs.append(np.stack(attend))
  return np.concatenate(outputs, axis=-1) @ o


def _attend(t, q_TxK, k_TxK, v_TxK, segments_T, is_local, config):
  first = max(0, t + 1 - config.local_window) if is_local else 0
  seen = [s for s in range(first, t + 1) if segments_T[s] == segments_T[t]]
  scores = np.array([q_TxK[t] @ k_TxK[s] for s in seen]) * (config.attn_scale or 1 / math.sqrt(q_TxK.shape[1]))
  weights = np.exp(scores - scores.max())
  return (weights / weights.sum()) @ v_TxK[seen]


def rms_norm(x, scale, eps):
  return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps) * scale


def rope(x_TxK, config, is_local=False):
  """Dimensions i and i + K/2 are one complex number, turned by position * frequency."""
  half = x_TxK.shape[1] // 2
  z = x_TxK[:, :half] + 1j * x_TxK[:, half:]
  z = z * np.exp(1j * np.outer(np.arange(len(x_TxK)), frequencies(config, is_local)))
  return np.concatenate([z.real, z.imag], axis=1)


def frequencies(config, is_local=False):
  """Llama 3.1's rule, by wavelength: short waves stay, long ones are stretched by `factor`, others are blends. Local layers have their own."""
  s, result = config.rope_scaling, []
  for i in range(config.head_dim // 2):
    frequency = 1.0 / (config.local_rope_theta if is_local else config.rope_theta) ** (2 * i / config.head_dim)
    wavelength = 2 * math.pi / frequency
    if is_local:
      result.append(frequency)
    elif s.method == 'linear':
      result.append(frequency / s.factor)
    elif wavelength < s.original_max_len / s.high_freq_factor:
      result.append(frequency)
    elif wavelength > s.original_max_len / s.low_freq_factor:
      result.append(frequency / s.factor)
    else:
      smooth = (s.original_max_len / wavelength - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
      result.append((1 - smooth) * frequency / s.factor + smooth * frequency)
  return np.array(result)


def _f64(x):
  return np.asarray(x, np.float64)
