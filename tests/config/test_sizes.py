import pytest

from kdjax.config.sizes import NAMED, named
from kdjax.errors import UserError
from kdjax.models import build
from kdjax.models.flops import count_params


@pytest.mark.parametrize('name', NAMED)
def test_every_named_model_can_be_built(name):
  build(named(name, vocab_size=NAMED[name].vocab_size or 512))


def test_the_papers_llama_shapes():
  shapes = {name: (c.d_model, c.n_layers, c.d_ff) for name, c in NAMED.items() if name.startswith('llama3')}
  assert shapes == {
    'llama3-0.5b': (1024, 12, 8192),
    'llama3-1.7b': (2048, 16, 8192),
    'llama3-3.8b': (3072, 28, 8192),
    'llama3-8b': (4096, 32, 14336),
  }
  for name in shapes:
    c = NAMED[name]
    assert (c.n_heads, c.n_kv_heads, c.head_dim, c.vocab_size, c.tied) == (32, 8, 128, 128_256, False)
    assert (c.norm_eps, c.rope_theta, c.qk_norm) == (1e-5, 5e5, False)


def test_the_papers_qwen_shape():
  c = NAMED['qwen3-0.3b']
  assert (c.d_model, c.n_layers, c.d_ff, c.n_heads, c.n_kv_heads, c.head_dim) == (768, 24, 2304, 12, 4, 64)
  assert (c.vocab_size, c.tied, c.qk_norm) == (151_936, True, True)


@pytest.mark.parametrize('name', [n for n in NAMED if n.startswith('qwen3')])
def test_a_qwen_name_is_its_total(name):
  assert count_params(NAMED[name]).total == pytest.approx(float(name[6:-1]) * 1e9, rel=0.07)


@pytest.mark.parametrize('name', [n for n in NAMED if n.startswith('tiny')])
def test_a_laptop_name_is_its_non_embedding_count(name):
  assert NAMED[name].tied and not NAMED[name].vocab_size
  size = float(name.rpartition('-')[2].removesuffix('m')) * 1e6
  assert NAMED[name].qk_norm == ('qwen' in name)
  assert count_params(named(name, vocab_size=512)).non_embedding == pytest.approx(size, rel=0.12)


def test_named_returns_a_changed_copy():
  changed = named('llama3-1.7b', remat='full')
  assert changed.remat == 'full' and NAMED['llama3-1.7b'].remat == 'none'
  assert changed.d_model == 2048


@pytest.mark.parametrize(
  ('name', 'changes', 'message'),
  [
    ('lama3-1.7b', {}, "unknown name 'lama3-1.7b'; did you mean llama3-1.7b"),
    ('xyz', {}, "unknown name 'xyz'; known: llama3-0.5b, "),
    ('tiny-1m', {'remta': 'full'}, "unknown field 'remta' for tiny-1m; did you mean remat"),
  ],
)
def test_an_unknown_name_or_field_is_refused_with_the_nearest(name, changes, message):
  with pytest.raises(UserError) as caught:
    named(name, **changes)
  assert message in str(caught.value) and '\n' not in str(caught.value)
