"""The paper's model sizes, and a cost table worked out by hand (50B = 25,000 steps of 64 x 4 x 8192 tokens)."""

import dataclasses
import math

import numpy as np
import pytest

from kdjax.config import ModelConfig
from kdjax.config.sizes import NAMED
from kdjax.models.flops import (
  count_params,
  distillation_flops,
  forward_flops,
  ledger,
  matched_tokens,
  peak_flops,
  training_flops,
)

LLAMAS = [f'llama3-{size}' for size in ('0.5b', '1.7b', '3.8b', '8b')]
STUDENT = NAMED['llama3-1.7b']
STEP = 64 * 4 * 8192
B50, B300 = 25_000 * STEP, 150_000 * STEP
LOGITS_ONLY = {'count_logits': True, 'count_pretraining': False, 'attention': False}


def two_digits(x):
  return float(f'{x:.1e}')


@pytest.mark.parametrize(
  ('name', 'non_embedding', 'total'),
  list(zip(LLAMAS, (0.43, 1.14, 2.99, 6.98), (0.69, 1.67, 3.78, 8.03), strict=True)),
)
def test_the_papers_sizes(name, non_embedding, total):
  params = count_params(NAMED[name])
  assert round(params.non_embedding / 1e9, 2) == non_embedding
  assert round(params.total / 1e9, 2) == total
  assert params.total == params.non_embedding + params.embedding + params.head


def test_parameters_by_hand():
  config = ModelConfig(
    vocab_size=10, pad_vocab_to=8, d_model=4, n_layers=2, d_ff=6, n_heads=2, n_kv_heads=1, head_dim=8, qk_norm=True
  )
  params = count_params(config)
  attention, mlp, norms = 4 * 16 + 4 * 8 + 4 * 8 + 16 * 4, 3 * 4 * 6, 2 * 4 + 2 * 8
  assert params.non_embedding == 2 * (attention + mlp + norms) + 4
  assert (params.embedding, params.head) == (16 * 4, 0)  # tied; the vocabulary as it is stored
  assert forward_flops(config, 5) == 2 * (2 * (attention + mlp) + 16 * 4) + 2 * 2 * 5 * 16


@pytest.mark.parametrize('n_layers', [1, 5, 6, 13])
@pytest.mark.parametrize('window', [1, 7, 128, 512, 4096])
def test_local_layers_attend_to_their_window_alone(n_layers, window):
  """Against the model's mask, counted entry by entry; the formula counts half of the diagonal, as for full attention."""
  seq_len = 512
  config = dataclasses.replace(NAMED['tiny-1m'], vocab_size=257, n_layers=n_layers, local_window=window, global_every=6)
  behind = np.arange(seq_len)[:, None] - np.arange(seq_len)
  kept = [(behind >= 0) & ((behind < window) | ((layer + 1) % 6 == 0)) for layer in range(n_layers)]
  pairs = sum(mask.sum() for mask in kept) / seq_len
  attention = forward_flops(config, seq_len) - forward_flops(config, seq_len, attention=False)
  assert attention == pytest.approx(4 * pairs * config.n_heads * config.head_dim, rel=1 / seq_len)
  assert training_flops(config, seq_len) == 3 * forward_flops(config, seq_len)


def test_a_window_as_long_as_the_text_is_no_window():
  config = dataclasses.replace(NAMED['tiny-3m'], vocab_size=257)
  for window in (512, 10_000):
    assert forward_flops(dataclasses.replace(config, local_window=window), 512) == forward_flops(config, 512)
  assert forward_flops(dataclasses.replace(config, local_window=64), 512) < forward_flops(config, 512)


@pytest.mark.parametrize(('name', 'percent'), list(zip(LLAMAS, (72, 38, 28, 14), strict=True)))
def test_attention_adds_this_much_at_8192_tokens(name, percent):
  with_it, without = forward_flops(NAMED[name], 8192), forward_flops(NAMED[name], 8192, attention=False)
  assert round(100 * (with_it / without - 1)) == percent


@pytest.mark.parametrize(
  ('name', 'inference', 'share', 'matched', 'trained_50b', 'trained_300b'),
  [
    ('llama3-0.5b', 5.9e19, 13, 59, 1.8e20, 1.1e21),
    ('llama3-1.7b', 1.5e20, 33, 70, 4.4e20, 2.6e21),
    ('llama3-3.8b', 3.6e20, 80, 95, 1.1e21, 6.4e21),
    ('llama3-8b', 7.9e20, 178, 146, 2.4e21, 1.4e22),
  ],
)
def test_the_cost_table(name, inference, share, matched, trained_50b, trained_300b):
  teacher = NAMED[name]
  costs = ledger(STUDENT, teacher, B50, B50, 8192, attention=False)
  assert two_digits(costs.student) == 4.4e20
  assert two_digits(costs.logits) == inference
  assert round(100 * costs.logits / costs.student) == share
  assert two_digits(costs.pretraining) == trained_50b
  assert two_digits(ledger(STUDENT, teacher, B50, B300, 8192, attention=False).pretraining) == trained_300b
  assert round(matched_tokens(STUDENT, teacher, B50, B50, 8192, **LOGITS_ONLY) / 1e9) == matched


@pytest.mark.parametrize(('name', 'share'), [('llama3-0.5b', 17), ('llama3-8b', 147)])
def test_the_teachers_share_with_attention(name, share):
  costs = ledger(STUDENT, NAMED[name], B50, B50, 8192)
  assert round(100 * costs.logits / costs.student) == share


@pytest.mark.parametrize('count_logits', [False, True])
@pytest.mark.parametrize('count_pretraining', [False, True])
def test_the_four_scenarios_are_equation_9(count_logits, count_pretraining):
  teacher, switches = NAMED['llama3-8b'], {'count_logits': count_logits, 'count_pretraining': count_pretraining}
  expected = 3 * forward_flops(STUDENT, 4096) * 7e9
  expected += forward_flops(teacher, 4096) * (count_logits * 7e9 + count_pretraining * 3 * 9e9)
  assert distillation_flops(STUDENT, teacher, 7e9, 9e9, 4096, **switches) == pytest.approx(expected, rel=1e-12)
  tokens = matched_tokens(STUDENT, teacher, 7e9, 9e9, 4096, **switches)
  assert tokens * training_flops(STUDENT, 4096) == pytest.approx(expected, rel=1e-12)
  assert (tokens == 7e9) == (not count_logits and not count_pretraining)


@pytest.mark.parametrize(
  ('kind', 'tera'),
  [
    ('TPU v4', 275),
    ('TPU v5 lite', 197),
    ('TPU v5', 459),
    ('TPU v5p', 459),
    ('TPU v6 lite', 918),
    ('TPU7x', 1153.5),
    ('NVIDIA A100-SXM4-80GB', 312),
    ('NVIDIA H100 80GB HBM3', 989),
    ('NVIDIA H100 PCIe', 756),
    ('NVIDIA H200', 989),
    ('NVIDIA B200', 2250),
    ('NVIDIA GB200', 2500),
    ('NVIDIA L4', 121),
    ('NVIDIA L40S', 362),
    ('NVIDIA GeForce RTX 4090', 165.2),
    ('v5p', 459),
    ('V5P', 459),
    ('tpu-v5p', 459),
    ('v5e', 197),
    ('v5litepod', 197),
    ('v4', 275),
    ('v6e', 918),
    ('Trillium', 918),
    ('L4', 121),
    ('l4', 121),
    ('a100', 312),
    ('A100-80GB', 312),
    ('H100', 989),
    ('H100-PCIe', 756),
  ],
)
def test_peaks(kind, tera):
  assert math.isclose(peak_flops(kind), tera * 1e12)


@pytest.mark.parametrize(
  'kind', ['cpu', '', 'TPU', 'TPU v2', 'v50', 'Tesla T4', 'H1000', 'L400', 'XA100', 'lite', 'RTX', 'gpu']
)
def test_an_unknown_device_has_no_peak(kind):
  assert peak_flops(kind) is None
