"""Generate text: read a prompt once into a cache of keys and values, then sample one token after the other on the device.

Rows of different length are padded on the left. A row's text depends only on its prompt, the seed and its number, not on the rest of the
batch. The host reads the tokens a chunk at a time.

Shapes: B rows, P the prompts' common length, N tokens of a chunk, S tokens that end a row, V the padded vocabulary.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kdjax.errors import UserError
from kdjax.models import Model
from kdjax.models.decoder import Cache

CHUNK = 16  # tokens between two reads by the host
TEMPERATURES = '0 (greedy) or above 1e-6 and up to 1e6'
SHORTEST = 16  # the prompts' common length is this times a power of two, so that few programs serve all


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How a token is drawn: from softmax(logits / temperature) of the `top_k` likeliest tokens, and of those from the least number of the
  likeliest that have together `top_p` of the probability. Temperature 0 takes the likeliest; top_k 0 and top_p 1 take all.

  Raises UserError for values that mean nothing.
  """

  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0

  def __post_init__(self):
    if not is_temperature(self.temperature):
      raise UserError(f'temperature: must be {TEMPERATURES}, got {self.temperature:g}')
    if self.top_k < 0:
      raise UserError(f'top_k: must be 0 (all) or a number of tokens, got {self.top_k}')
    if not 0 < self.top_p <= 1:
      raise UserError(f'top_p: must be in (0, 1], got {self.top_p:g}')


def is_temperature(value: float) -> bool:
  """Check that a temperature is 0 or can divide logits in float32."""
  return value == 0 or 1e-6 < value <= 1e6


class State(NamedTuple):
  """Where the rows stand: the last token of each that the cache has not seen yet, and who has ended."""

  cache: Cache
  token_B: Any
  done_B: Any
  key_B: Any  # one for each row
  n: Any  # tokens drawn so far


def generate(
  model: Model,
  params,
  prompts: Sequence[Sequence[int]],
  max_tokens: int,
  sampling: Sampling = Sampling(),
  *,
  seed: int = 0,
  numbers: Sequence[int] | None = None,
  stop_id: int | Sequence[int],
  stopped: Callable[[list[int]], bool] = lambda ids: False,
) -> list[list[int]]:
  """Return at most `max_tokens` tokens after each prompt, up to and without the first `stop_id`.

  Sampling ends when each row has ended or `stopped` returns True for its tokens so far. For `numbers` see `stream`.
  """
  rows: list[list[int]] = [[] for _ in prompts]
  for tokens_BxN in stream(model, params, prompts, max_tokens, sampling, seed=seed, numbers=numbers, stop_id=stop_id):
    for row, new in zip(rows, tokens_BxN, strict=True):
      row += new.tolist()
    if all(len(cut_at(row, stop_id)) < len(row) or stopped(row) for row in rows):
      break
  return [cut_at(row, stop_id) for row in rows]


def cut_at(ids: list[int], stop_id: int | Sequence[int]) -> list[int]:
  """Return the ids before the first `stop_id`."""
  stops = set(_as_tuple(stop_id))
  return ids[: next((k for k, id_ in enumerate(ids) if id_ in stops), len(ids))]


def _as_tuple(stop_id: int | Sequence[int]) -> tuple[int, ...]:
  return (stop_id,) if isinstance(stop_id, int) else tuple(stop_id)


def stream(
  model: Model,
  params,
  prompts: Sequence[Sequence[int]],
  max_tokens: int,
  sampling: Sampling = Sampling(),
  *,
  seed: int = 0,
  numbers: Sequence[int] | None = None,
  stop_id: int | Sequence[int],
) -> Iterator[np.ndarray]:
  """Yield int32 arrays [B, N] of the next tokens until all rows have ended; an ended row is filled with (the first) `stop_id`.

  Args:
    prompts: token ids, at least one each; a model expects a document's separator first.
    numbers: a number below 2**32 for each row that seeds its random numbers; None: 0, 1, 2 ... To sample a set of texts in several calls,
      give each text its own number: rows with equal numbers are not independent draws.
    stop_id: the token or tokens that end a row.

  Raises:
    UserError: a prompt is empty; a prompt with `max_tokens` more tokens is too long for the model; prompts and numbers differ in length.
  """
  if not prompts or not all(len(prompt) for prompt in prompts):
    raise UserError('a prompt is empty; begin it with the separator that starts each document')
  if numbers is not None and len(numbers) != len(prompts):
    raise UserError(f'numbers: got {len(numbers)} for {len(prompts)} prompts; give one for each prompt')
  longest = max(map(len, prompts))
  width = SHORTEST
  while width < longest:
    width *= 2
  n_chunks = -(-max_tokens // CHUNK)
  if longest + max_tokens > model.config.max_seq_len:
    raise UserError(
      f'{longest} tokens of prompt and {max_tokens} to follow are more than the model can see at once ({model.config.max_seq_len}); '
      'shorten the prompt, or ask for fewer tokens'
    )
  tokens_BxP = np.zeros((len(prompts), width), np.int32)
  for row, prompt in zip(tokens_BxP, prompts, strict=True):
    row[width - len(prompt) :] = prompt
  first_B = np.array([width - len(prompt) for prompt in prompts], np.int32)
  # Rotary attention depends on differences of positions alone, so padding on the left uses up none of the model's length.
  roomy = Model(dataclasses.replace(model.config, max_seq_len=width + n_chunks * CHUNK))
  stop_S = np.asarray(_as_tuple(stop_id), np.int32)
  number_B = np.asarray(range(len(prompts)) if numbers is None else numbers, np.uint32)
  state = _read(roomy, sampling, params, tokens_BxP, first_B, jax.random.key(seed), number_B, stop_S)
  for k in range(n_chunks):
    state, tokens_BxN = _draw(roomy, sampling, params, state, stop_S)
    yield np.asarray(tokens_BxN)[:, : max_tokens - k * CHUNK]
    if bool(state.done_B.all()):
      return


@functools.partial(jax.jit, static_argnums=(0, 1))
def _read(model: Model, sampling: Sampling, params, tokens_BxP, first_B, key, number_B, stop_S) -> State:
  """Fill the cache with the prompts and sample the first token after each."""
  keys_B = jax.vmap(lambda number: jax.random.fold_in(key, number))(number_B)
  cache = model.empty_cache(first_B, model.config.max_seq_len)
  hidden_BxPxD, cache = model.extend(params, tokens_BxP, cache)
  token_B = _next(model, sampling, params, hidden_BxPxD[:, -1], keys_B, 0)
  return State(cache, token_B, _is_stop(token_B, stop_S), keys_B, jnp.ones((), jnp.int32))


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _draw(model: Model, sampling: Sampling, params, state: State, stop_S) -> tuple[State, Any]:
  """Return (the state, the next CHUNK tokens [B, N]); the first token is the one that the state held."""

  def one(state: State, _):
    hidden_Bx1xD, cache = model.extend(params, state.token_B[:, None], state.cache)
    token_B = _next(model, sampling, params, hidden_Bx1xD[:, 0], state.key_B, state.n)
    token_B = jnp.where(state.done_B, stop_S[0], token_B)
    return State(cache, token_B, state.done_B | _is_stop(token_B, stop_S), state.key_B, state.n + 1), state.token_B

  state, tokens_NxB = jax.lax.scan(one, state, None, length=CHUNK)
  return state, tokens_NxB.T


def _is_stop(token_B, stop_S):
  return (token_B[:, None] == stop_S).any(axis=-1)


def _next(model: Model, sampling: Sampling, params, hidden_BxD, key_B, n):
  logits_BxV = jnp.matmul(hidden_BxD, model.head(params), preferred_element_type=jnp.float32)
  logits_BxV = logits_BxV[:, : model.config.vocab_size]
  if sampling.temperature == 0:
    return logits_BxV.argmax(axis=-1).astype(jnp.int32)
  keys_B = jax.vmap(lambda key: jax.random.fold_in(key, n))(key_B)
  return jax.vmap(jax.random.categorical)(keys_B, filter_logits(logits_BxV / sampling.temperature, sampling)).astype(
    jnp.int32
  )


def filter_logits(logits_BxV, sampling: Sampling):
  """The logits with those of the tokens that top-k and top-p leave out at -inf. Ties with the last token that stays, stay."""
  if not sampling.top_k and sampling.top_p == 1:
    return logits_BxV
  descending_BxV = jnp.sort(logits_BxV, axis=-1, descending=True)
  last_B = descending_BxV[:, min(sampling.top_k or logits_BxV.shape[1], logits_BxV.shape[1]) - 1]
  if sampling.top_p < 1:
    shares_BxV = jax.nn.softmax(jnp.where(descending_BxV >= last_B[:, None], descending_BxV, -jnp.inf))
    before_BxV = jnp.cumsum(shares_BxV, axis=-1) - shares_BxV  # of the tokens that are likelier
    n_kept_B = (before_BxV < sampling.top_p).sum(axis=-1)
    last_B = jnp.maximum(last_B, jnp.take_along_axis(descending_BxV, n_kept_B[:, None] - 1, axis=-1)[:, 0])
  return jnp.where(logits_BxV >= last_B[:, None], logits_BxV, -jnp.inf)
