"""A decoder in plain NumPy float64, from the papers' formulas, one head and one query at a time; slow on purpose."""

import math

import numpy as np


def hidden(params, tokens_BxT, config, segment_ids_BxT=None):
  """Hidden states after the final norm, [B, T, D] in float64."""
  segments = np.ones_like(tokens_BxT) if segment_ids_BxT is None else segment_ids_BxT
  return np.stack([_row(params, tokens, segment, config) for tokens, segment in zip(tokens_BxT, segments, strict=True)])


def _row(params, tokens_T, segments_T, config):
  x_TxD = _f64(params['embed']['embedding'])[tokens_T]
  for layer in range(config.n_layers):
    blocks = params['blocks']
    normed = rms_norm(x_TxD, _f64(blocks['attn_norm']['scale'])[layer], config.norm_eps)
    x_TxD = x_TxD + _attention(blocks['attn'], layer, normed, segments_T, config)
    normed = rms_norm(x_TxD, _f64(blocks['mlp_norm']['scale'])[layer], config.norm_eps)
    gate, up, down = (_f64(blocks['mlp'][name]['kernel'])[layer] for name in ('gate', 'up', 'down'))
    a = normed @ gate
    x_TxD = x_TxD + (a / (1 + np.exp(-a)) * (normed @ up)) @ down
  return rms_norm(x_TxD, _f64(params['final_norm']['scale']), config.norm_eps)


def _attention(params, layer, x_TxD, segments_T, config):
  q, k, v, o = (_f64(params[name]['kernel'])[layer] for name in 'qkvo')
  size = config.head_dim
  outputs = []
  for head in range(config.n_heads):
    shared = head * config.n_kv_heads // config.n_heads
    q_TxK = x_TxD @ q[:, head * size : (head + 1) * size]
    k_TxK = x_TxD @ k[:, shared * size : (shared + 1) * size]
    v_TxK = x_TxD @ v[:, shared * size : (shared + 1) * size]
    if config.qk_norm:
      q_TxK = rms_norm(q_TxK, _f64(params['q_norm']['scale'])[layer], config.norm_eps)
      k_TxK = rms_norm(k_TxK, _f64(params['k_norm']['scale'])[layer], config.norm_eps)
    q_TxK, k_TxK = rope(q_TxK, config), rope(k_TxK, config)
    outputs.append(np.stack([_attend(t, q_TxK, k_TxK, v_TxK, segments_T) for t in range(len(x_TxD))]))
  return np.concatenate(outputs, axis=-1) @ o


def _attend(t, q_TxK, k_TxK, v_TxK, segments_T):
  seen = [s for s in range(t + 1) if segments_T[s] == segments_T[t]]
  scores = np.array([q_TxK[t] @ k_TxK[s] for s in seen]) / math.sqrt(q_TxK.shape[1])
  weights = np.exp(scores - scores.max())
  return (weights / weights.sum()) @ v_TxK[seen]


def rms_norm(x, scale, eps):
  return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps) * scale


def rope(x_TxK, config):
  """Dimensions i and i + K/2 are one complex number, turned by position * frequency."""
  half = x_TxK.shape[1] // 2
  z = x_TxK[:, :half] + 1j * x_TxK[:, half:]
  z = z * np.exp(1j * np.outer(np.arange(len(x_TxK)), frequencies(config)))
  return np.concatenate([z.real, z.imag], axis=1)


def frequencies(config):
  """Llama 3.1's rule, by wavelength: short waves stay, long ones are stretched by `factor`, others are blends."""
  s, result = config.rope_scaling, []
  for i in range(config.head_dim // 2):
    frequency = 1.0 / config.rope_theta ** (2 * i / config.head_dim)
    wavelength = 2 * math.pi / frequency
    if wavelength < s.original_max_len / s.high_freq_factor:
      result.append(frequency)
    elif wavelength > s.original_max_len / s.low_freq_factor:
      result.append(frequency / s.factor)
    else:
      smooth = (s.original_max_len / wavelength - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
      result.append((1 - smooth) * frequency / s.factor + smooth * frequency)
  return np.array(result)


def _f64(x):
  return np.asarray(x, np.float64)
