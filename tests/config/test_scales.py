"""The three scales: the paper's recipe to the letter, and a laptop's that is small."""

import pathlib

import pytest

from kdjax import cli
from kdjax import config as config_lib
from kdjax.config import Config
from kdjax.models.flops import count_params
from kdjax.trainer.optimizer import learning_rate

CONFIGS = pathlib.Path(__file__).parents[2] / 'configs'


def load(name: str, scale: str) -> Config:
  return cli.load_config(f'{CONFIGS / name}.py:scale={scale}')


@pytest.mark.parametrize('name', ['weak2strong', 'same_level', 'strong2weak'])
def test_the_paper_scale_is_the_papers_recipe(name):
  config = load(name, 'paper')
  assert config.data.seq_len == 8192
  assert not config.data.mask_documents
  assert (config.loss.divergence, config.loss.temperature, config.loss.mixing) == ('forward_kl', 1.0, 'normalised')
  assert (config.loss.teacher_top_k, config.loss.teacher_top_p, config.loss.z_loss) == (0.0, 1.0, 0.0)
  assert (config.teacher.seed, config.student.seed) == (42, 43)
  for section in (config.teacher, config.student):
    assert section.batch_size * config.data.seq_len == pytest.approx(2.1e6, rel=0.01)
    optimizer = section.optimizer
    assert (optimizer.learning_rate, optimizer.schedule) == (3e-4, 'cosine')
    assert (optimizer.b1, optimizer.b2, optimizer.eps) == (0.9, 0.95, 1e-8)
    assert (optimizer.weight_decay, optimizer.clip_norm) == (0.1, 1.0)
    assert (optimizer.warmup_fraction, optimizer.final_fraction) == (0.05, 0.1)
    assert section.model.param_dtype == 'float32'
    assert section.model.dtype in ('auto', 'bfloat16')
    assert section.model.max_seq_len >= 8192
    assert section.model.vocab_size == section.model.padded_vocab_size == 128_256
  assert config.student.tokens == 50_000_000_000
  assert config_lib.n_steps(config.student, config.data) == pytest.approx(25_000, rel=0.05)


def test_the_papers_learning_rate_peaks_after_5_percent_and_ends_at_10():
  config = load('same_level', 'paper')
  total = config_lib.n_steps(config.student, config.data)
  rate = learning_rate(config.student.optimizer, total)
  assert float(rate(round(0.05 * total) - 1)) == pytest.approx(3e-4)
  assert float(rate(total - 1)) == pytest.approx(3e-5)


PAPER = {'0.5B': (1024, 12, 8192, 0.69e9), '1.7B': (2048, 16, 8192, 1.67e9), '8B': (4096, 32, 14_336, 8.03e9)}


@pytest.mark.parametrize(
  ('name', 'teacher', 'student'),
  [('weak2strong', '0.5B', '1.7B'), ('same_level', '1.7B', '1.7B'), ('strong2weak', '8B', '1.7B')],
)
def test_the_papers_models(name, teacher, student):
  config = load(name, 'paper')
  for model, label in ((config.teacher.model, teacher), (config.student.model, student)):
    d, n, f, total = PAPER[label]
    assert (model.d_model, model.n_layers, model.d_ff) == (d, n, f)
    assert (model.n_heads, model.n_kv_heads, model.head_dim, model.tied) == (32, 8, 128, False)
    assert (model.rope_theta, model.norm_eps, model.qk_norm) == (5e5, 1e-5, False)
    # Embedding and head, then a layer: queries, keys, values, output; three ffn matrices; two norms; and the last norm.
    by_hand = 2 * 128_256 * d + n * (d * (4096 + 1024 + 1024 + 4096) + 3 * d * f + 2 * d) + d
    assert count_params(model).total == by_hand == pytest.approx(total, rel=0.005)


def test_the_weak_teacher_is_smaller_and_undertrained_at_every_scale():
  for scale in ('laptop', 'colab', 'paper'):
    config = load('weak2strong', scale)
    assert count_params(config.teacher.model).non_embedding < count_params(config.student.model).non_embedding
    assert config.teacher.tokens < config.student.tokens


def test_the_relationships_hold_at_every_scale():
  size = lambda section: count_params(section.model).non_embedding
  for scale in ('laptop', 'colab', 'paper'):
    same, strong = load('same_level', scale), load('strong2weak', scale)
    assert same.teacher.model == same.student.model
    assert same.teacher.tokens == same.student.tokens
    assert same.teacher.seed != same.student.seed
    assert size(strong.teacher) > size(strong.student)


def test_the_laptop_scale_is_a_laptops():
  for name in ('weak2strong', 'same_level', 'strong2weak'):
    config = load(name, 'laptop')
    assert config.data.source.startswith('embedded:')
    assert all(source.startswith('embedded:') for source in config.eval.ood.values())
    assert count_params(config.student.model).total < 5e6
    assert config.student.tokens <= 4e6
