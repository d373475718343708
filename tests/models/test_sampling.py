import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdjax.errors import UserError
from kdjax.models import build
from kdjax.models.sampling import CHUNK, Sampling, _draw, _read, filter_logits, generate, stream
from tests.teachers.huggingface.folders import MODELS, random_params

NEVER = 259  # a token that stops


@pytest.fixture(scope='module', params=['LlamaForCausalLM', 'Gemma3ForCausalLM'])
def model_and_params(request):
  config = dataclasses.replace(MODELS[request.param], max_seq_len=128)
  params = random_params(config)
  return build(config), jax.tree.map(lambda x: 2 * x, params)


@pytest.fixture(scope='module')
def llama():
  config = dataclasses.replace(MODELS['LlamaForCausalLM'], max_seq_len=128)
  return build(config), random_params(config)


def whole(model, params, prompt, n) -> list[int]:
  """Greedy without a cache: the whole text again for each token."""
  tokens = list(prompt)
  logits = jax.jit(lambda tokens, position: model.hidden(params, tokens)[0, position] @ model.head(params))
  for _ in range(n):
    padded = np.zeros((1, 128), np.int32)
    padded[0, : len(tokens)] = tokens
    tokens.append(int(logits(padded, len(tokens) - 1)[: model.config.vocab_size].argmax()))
  return tokens[len(prompt) :]


def test_greedy_text_is_that_of_a_model_without_a_cache(model_and_params):
  model, params = model_and_params
  prompts = [[256, 5, 9], [256], list(range(100, 123))]
  got = generate(model, params, prompts, 40, Sampling(0.0), stop_id=NEVER)
  for prompt, row in zip(prompts, got, strict=True):
    expected = whole(model, params, prompt, 40)
    expected = expected[: expected.index(NEVER)] if NEVER in expected else expected
    assert row == expected
  assert len({tuple(row) for row in got}) == 3


def test_a_row_does_not_depend_on_its_neighbours_but_on_its_seed_and_number(llama):
  model, params = llama
  draw = lambda prompts, seed=3: generate(model, params, prompts, 20, stop_id=NEVER, seed=seed)
  alone = draw([[256, 5, 9]])
  assert draw([[256, 5, 9]]) == alone
  assert draw([[256, 5, 9], [256] * 30])[0] == alone[0]
  assert draw([[256, 5, 9]], seed=4) != alone
  twice = draw([[256, 5, 9], [256, 5, 9]])
  assert twice[0] != twice[1]


def test_a_rows_number_is_its_own_wherever_the_row_is_drawn(llama):
  model, params = llama
  draw = lambda *numbers: generate(model, params, [[256, 5, 9]] * len(numbers), 20, stop_id=NEVER, numbers=numbers)
  together = draw(7, 2**32 - 1, 0, 3)
  assert len({tuple(row) for row in together}) == 4
  assert draw(3) + draw(0, 7) == [together[3], together[2], together[0]]
  assert draw(0, 1) == generate(model, params, [[256, 5, 9]] * 2, 20, stop_id=NEVER)
  with pytest.raises(UserError, match='numbers: got 1 for 2 prompts'):
    generate(model, params, [[256], [256]], 2, stop_id=NEVER, numbers=[0])


@pytest.mark.parametrize('sampling', [Sampling(top_k=1), Sampling(top_p=1e-6), Sampling(temperature=1e-4)])
def test_what_leaves_one_token_is_greedy(sampling, llama):
  model, params = llama
  prompts = [[256, 1, 2, 3]]
  assert generate(model, params, prompts, 20, sampling, stop_id=NEVER) == generate(
    model, params, prompts, 20, Sampling(0.0), stop_id=NEVER
  )


@pytest.mark.parametrize('sampling', [Sampling(), Sampling(0.5), Sampling(top_k=5), Sampling(1.5, top_p=0.6)])
def test_tokens_come_as_often_as_their_probability_says(sampling, llama):
  model, params = llama
  n = 4000
  got = np.array(generate(model, params, [[256, 7]] * n, 1, sampling, stop_id=-1)).ravel()
  logits = (model.hidden(params, np.array([[256, 7]]))[0, -1] @ model.head(params))[: model.config.vocab_size]
  expected = np.asarray(jax.nn.softmax(filter_logits(logits[None] / sampling.temperature, sampling))[0], np.float64)
  found = np.bincount(got, minlength=len(expected)) / n
  assert not found[expected == 0].any()
  assert np.abs(found - expected).max() < 4 * np.sqrt(expected.max() / n)


@settings(max_examples=60, deadline=None)
@given(
  st.lists(st.floats(-5, 5, width=32, allow_subnormal=False), min_size=8, max_size=8, unique=True),
  st.integers(0, 9),
  st.floats(0.05, 1.0),
)
def test_top_k_and_then_top_p_by_the_letter(logits, top_k, top_p):
  kept = np.isfinite(np.asarray(filter_logits(jnp.asarray([logits]), Sampling(1.0, top_k, top_p))[0]))
  order = sorted(range(8), key=lambda i: -logits[i])[: top_k or 8]
  shares = np.exp(np.array([logits[i] for i in order], np.float64))
  shares /= shares.sum()
  before = np.cumsum(shares) - shares
  wanted = {i for i, share in zip(order, before, strict=True) if share < top_p}
  close = {
    i for i, share in zip(order, before, strict=True) if abs(share - top_p) < 1e-5
  }  # float32 may have it either way
  assert set(np.flatnonzero(kept)) ^ wanted <= close


def test_a_row_ends_at_the_stop_token_and_all_end_together(llama):
  model, params = llama
  free = generate(model, params, [[256, 5, 9]], 60, Sampling(0.0), stop_id=-1)[0]
  stop = free[20]
  assert generate(model, params, [[256, 5, 9]], 60, Sampling(0.0), stop_id=stop)[0] == free[: free.index(stop)]
  chunks = list(stream(model, params, [[256, 5, 9]], 60, Sampling(0.0), stop_id=stop))
  assert sum(chunk.shape[1] for chunk in chunks) <= (free.index(stop) // CHUNK + 1) * CHUNK
  assert (np.concatenate(chunks, axis=1)[0, free.index(stop) :] == stop).all()


def test_any_of_several_tokens_ends_a_row(llama):
  model, params = llama
  prompts = [[256, 5, 9], [256, 7], [256, 100, 3]]
  free = generate(model, params, prompts, 40, Sampling(0.0), stop_id=NEVER)
  stops = (free[0][12], free[1][5], 999)
  got = generate(model, params, prompts, 40, Sampling(0.0), stop_id=stops)
  for row, whole in zip(got, free, strict=True):
    first = min((whole.index(stop) for stop in stops if stop in whole), default=len(whole))
    assert row == whole[:first]
  assert len(got[0]) <= 12 and len(got[1]) <= 5


@pytest.mark.parametrize('n', [1, CHUNK, CHUNK + 1, 37])
def test_no_more_tokens_than_asked_for(n, llama):
  assert len(generate(*llama, [[256]], n, Sampling(0.0), stop_id=-1)[0]) == n


def test_few_programs_serve_all_lengths(llama):
  model, params = llama
  _read.clear_cache()
  _draw.clear_cache()
  for n in range(1, 33):
    generate(model, params, [[256] * n], 16, Sampling(0.0), stop_id=-1)
  assert (_read._cache_size(), _draw._cache_size()) == (2, 2)


def test_a_text_up_to_the_models_length_whatever_the_padding(llama):
  model, params = llama
  assert len(generate(model, params, [[256] * 100], 28, Sampling(0.0), stop_id=-1)[0]) == 28
  with pytest.raises(
    UserError, match=r'100 tokens of prompt and 29 to follow are more than the model can see at once \(128\)'
  ):
    generate(model, params, [[256] * 100], 29, Sampling(0.0), stop_id=-1)


def test_what_means_nothing_is_refused(llama):
  with pytest.raises(UserError, match='a prompt is empty'):
    generate(*llama, [[256], []], 4, stop_id=-1)
  for wrong, said in (
    ({'temperature': -1.0}, 'temperature'),
    ({'temperature': float('nan')}, 'temperature'),
    ({'top_k': -1}, 'top_k'),
  ):
    with pytest.raises(UserError, match=said):
      Sampling(**wrong)
  for top_p in (0.0, 1.5):
    with pytest.raises(UserError, match='top_p'):
      Sampling(top_p=top_p)
