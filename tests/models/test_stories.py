"""A real trained model: what it writes shows at once whether weights, rotary convention and norms are right."""

import jax
import numpy as np
import pytest

from kdjax.models import build
from tests.models import reference, stories

pytestmark = pytest.mark.skipif(
  not stories.FOLDER.exists(), reason=f'the stories260K model is not here ({stories.FOLDER})'
)
TEXT = (
  'Once upon a time, there was a little girl named Lily. She loved to play outside in the park. '
  'One day, she saw a big, red ball.'
)


@pytest.fixture(scope='module')
def model_and_params():
  config, params = stories.load(stories.FOLDER / 'stories260K.bin')
  return build(config), params


def test_the_greedy_story_is_the_known_one(model_and_params):
  model, params = model_and_params
  pieces = stories.load_pieces(stories.FOLDER / 'tok512.bin', model.config.vocab_size)
  window = 128

  @jax.jit
  def next_token(tokens_1xT, position):
    logits = model.hidden(params, tokens_1xT)[0, position] @ model.head(params)
    return logits[: model.config.vocab_size].argmax()

  tokens = np.zeros((1, window), np.int32)
  tokens[0, 0] = stories.BOS
  for t in range(window - 1):
    tokens[0, t + 1] = next_token(tokens, t)
  text = b''.join(pieces[t] for t in tokens[0, 1:]).decode().strip()
  assert text.startswith(TEXT)


def test_the_reference_agrees_on_trained_weights(model_and_params):
  model, params = model_and_params
  tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (1, 40))
  got = model.hidden(params, tokens)
  np.testing.assert_allclose(got, reference.hidden(params, tokens, model.config), atol=2e-5)
