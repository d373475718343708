"""Scores against plain NumPy on whole logits: likelihood, entropy, top-1, KL, calibration, temperature; the same on any mesh."""

import jax
import numpy as np
import pandas as pd
import pytest

from kdjax.config import MeshConfig, ModelConfig
from kdjax.models import build
from kdjax.runtime import sharding
from kdjax.scoring import windows
from kdjax.scoring.text import (
  BINS,
  DIFFICULTIES,
  Scored,
  difficulties,
  expected_calibration_error,
  fit_temperature,
  score_documents,
)
from tests.data.helpers import make_store

WINDOW, STRIDE = 16, 6
TEMPERATURES = (0.7, 1.0, 1.6)
SUMS = ['tokens', 'nll', 'entropy', 'correct', 'kl_to_teacher', 'agreement']


def model(seed: int, d_model: int) -> Scored:
  """A tied model with weights large enough for confident and wrong predictions."""
  config = ModelConfig(
    vocab_size=257, pad_vocab_to=8, d_model=d_model, n_layers=1, d_ff=16, n_heads=2, n_kv_heads=2, head_dim=8
  )
  built = build(config)
  rng = np.random.default_rng(seed)
  draw = lambda path, x: (
    np.ones(x.shape, x.dtype) if 'scale' in str(path) else rng.normal(0, 0.6, x.shape).astype(x.dtype)
  )
  return Scored(built, jax.tree_util.tree_map_with_path(draw, built.abstract()))


@pytest.fixture(scope='module')
def store(tmp_path_factory):
  return make_store(tmp_path_factory.mktemp('score') / 'store', [5, 0, 15, 16, 17, 40, 95, 1], seed=3)


@pytest.fixture(scope='module')
def student():
  return model(0, 16)


@pytest.fixture(scope='module')
def teacher():
  return model(1, 8)


def mesh(replica=1, fsdp=1, tensor=1):
  return sharding.make_mesh(MeshConfig(replica, fsdp, tensor), jax.devices()[: replica * fsdp * tensor])


def scored(student, teacher, store, batch_size=8, on=None, **kwargs) -> pd.DataFrame:
  on = on or mesh()
  arguments = {'temperatures': TEMPERATURES, 'window': WINDOW, 'stride': STRIDE} | kwargs
  with jax.set_mesh(on):
    return score_documents(student, teacher, store, batch_size=batch_size, mesh=on, **arguments)


@pytest.fixture(scope='module')
def table(student, teacher, store):
  return scored(student, teacher, store)


def logits(scored_: Scored, text: np.ndarray) -> np.ndarray:
  """float64 [len(text), 257]: the model's logits over a document, each position with the context that its window gives it."""
  hidden = jax.jit(scored_.model.hidden)
  out = np.zeros((len(text) - 1, 257))
  for start, first, end in windows.spans(len(text) - 1, WINDOW, STRIDE):
    padded = np.zeros((1, WINDOW), np.int32)
    padded[0, : end - start] = text[start:end]
    whole = np.asarray(hidden(scored_.params, padded)[0], np.float64) @ np.asarray(
      scored_.model.head(scored_.params), np.float64
    )
    out[first:end] = whole[first - start : end - start, :257]
  return out


def log_softmax(x: np.ndarray) -> np.ndarray:
  x = x - x.max(-1, keepdims=True)
  return x - np.log(np.exp(x).sum(-1, keepdims=True))


@pytest.fixture(scope='module')
def plain(student, teacher, store) -> list[dict[str, np.ndarray]]:
  """Per-token values of each document, by the definitions."""
  found = []
  for doc in range(store.n_docs):
    text = np.append(store.read(int(store.offsets[doc]), int(store.offsets[doc + 1])), store.separator_id)
    z, z_teacher = logits(student, text), logits(teacher, text)
    log_p, log_q = log_softmax(z), log_softmax(z_teacher)
    labels, at = text[1:], np.arange(len(text) - 1)
    found.append({
      'nll': -log_p[at, labels],
      'entropy': -(np.exp(log_p) * log_p).sum(-1),
      'correct': (log_p.argmax(-1) == labels).astype(float),
      'kl_to_teacher': (np.exp(log_q) * (log_q - log_p)).sum(-1),
      'agreement': (log_p.argmax(-1) == log_q.argmax(-1)).astype(float),
      'confidence': np.exp(log_p.max(-1)),
      'tokens': np.ones(len(labels)),
      **{f'nll@{t}': -log_softmax(z / t)[at, labels] for t in TEMPERATURES},
    })  # fmt: skip
  return found


@pytest.mark.parametrize('column', SUMS)
def test_sums_per_document_are_those_of_the_plain_definitions(table, plain, column):
  np.testing.assert_allclose(table[column], [doc[column].sum() for doc in plain], rtol=2e-5, atol=1e-5)


def test_a_document_longer_than_the_window_counts_each_token_once(table, store):
  lengths = np.diff(store.offsets)  # the separator before it counts for the end after it
  assert lengths.max() > 3 * WINDOW
  np.testing.assert_array_equal(table['tokens'], lengths)


def test_likelihood_by_difficulty_adds_up_to_the_whole_and_goes_by_the_label(student, store, plain):
  bins = np.arange(257) % DIFFICULTIES
  table = scored(student, None, store, difficulty_V=bins)
  by_bin = {name: np.stack(table[f'difficulty_{name}'].to_list()) for name in ('tokens', 'nll')}
  np.testing.assert_array_equal(by_bin['tokens'].sum(1), table['tokens'])
  np.testing.assert_allclose(by_bin['nll'].sum(1), table['nll'], rtol=1e-6)
  doc = 4
  text = np.append(store.read(int(store.offsets[doc]), int(store.offsets[doc + 1])), store.separator_id)
  expected = np.bincount(bins[text[1:]], plain[doc]['nll'], DIFFICULTIES)
  np.testing.assert_allclose(by_bin['nll'][doc], expected, rtol=2e-5)


def test_difficulty_is_by_frequency_and_each_bin_about_a_fifth_of_the_text():
  rng = np.random.default_rng(0)
  counts = np.floor(10_000 / np.arange(1, 3001) ** 1.1)
  shuffled = rng.permutation(3000)
  found = difficulties(counts[shuffled])
  share = np.bincount(found, counts[shuffled]) / counts.sum()
  np.testing.assert_allclose(share, 0.2, atol=0.07)  # one token alone may be a tenth of the text
  for easier, harder in zip(range(DIFFICULTIES - 1), range(1, DIFFICULTIES), strict=True):
    assert counts[shuffled][found == easier].min() >= counts[shuffled][found == harder].max()
  assert difficulties(np.array([5.0, 0.0, 5.0]))[1] == DIFFICULTIES - 1  # never seen


def test_documents_and_bytes_are_the_stores(table, store):
  assert list(table['doc']) == list(store.doc_ids)
  np.testing.assert_array_equal(table['bytes'], store.n_bytes)


def test_likelihoods_at_other_temperatures(table, plain):
  for i, temperature in enumerate(TEMPERATURES):
    found = [values[i] for values in table['nll_at']]
    np.testing.assert_allclose(found, [doc[f'nll@{temperature}'].sum() for doc in plain], rtol=2e-5)
  np.testing.assert_allclose([values[1] for values in table['nll_at']], table['nll'], rtol=1e-6)


def test_the_calibration_error_is_the_definition(table, plain):
  confidence = np.concatenate([doc['confidence'] for doc in plain])
  correct = np.concatenate([doc['correct'] for doc in plain])
  error = 0.0
  for i in range(BINS):
    in_bin = (confidence >= i / BINS) & ((confidence < (i + 1) / BINS) | (i == BINS - 1))
    if in_bin.any():
      error += in_bin.mean() * abs(correct[in_bin].mean() - confidence[in_bin].mean())
  assert expected_calibration_error(table) == pytest.approx(error, abs=1e-5)
  assert error > 0.05


def test_a_model_has_no_divergence_from_itself(student, store):
  found = scored(student, student, store)
  assert not found['kl_to_teacher'].any()
  np.testing.assert_array_equal(found['agreement'], found['tokens'])


def test_without_a_teacher_the_rest_is_the_same(table, student, store):
  found = scored(student, None, store)
  assert {'kl_to_teacher', 'agreement'}.isdisjoint(found.columns)
  np.testing.assert_allclose(found['nll'], table['nll'], rtol=1e-6)


@pytest.mark.parametrize('batch_size', [1, 5, 64])
def test_the_batch_size_changes_nothing(table, student, teacher, store, batch_size):
  found = scored(student, teacher, store, batch_size)
  for column in SUMS:
    np.testing.assert_allclose(found[column], table[column], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('shape', [(1, 8, 1), (2, 2, 2), (1, 1, 8)])
def test_the_mesh_changes_nothing(table, student, teacher, store, shape):
  on = mesh(*shape)
  placed = [
    m._replace(params=jax.device_put(m.params, sharding.param_shardings(m.params, on))) for m in (student, teacher)
  ]
  found = scored(*placed, store, on=on)
  for column in SUMS:
    np.testing.assert_allclose(found[column], table[column], rtol=1e-5, atol=1e-5)
  for column in ('nll_at', 'bin_count'):
    np.testing.assert_allclose(np.stack(found[column]), np.stack(table[column]), rtol=1e-5)


def test_more_context_is_used_where_the_stride_is_smaller(student, store):
  """With stride 1 each token has a whole window before it; with stride = window the first of each has none."""
  dense, sparse = scored(student, None, store, stride=1), scored(student, None, store, stride=WINDOW)
  np.testing.assert_array_equal(dense['tokens'], sparse['tokens'])
  short = np.asarray(store.n_bytes) < WINDOW
  np.testing.assert_allclose(dense['nll'][short], sparse['nll'][short], rtol=1e-5)
  assert (np.abs(dense['nll'] - sparse['nll'])[~short] > 1e-3).any()


def draws(temperature: float) -> pd.DataFrame:
  """Labels drawn from softmax(logits / temperature), scored on a grid."""
  rng = np.random.default_rng(0)
  z = rng.normal(0, 3, (20_000, 12))
  labels = (z / temperature + rng.gumbel(size=z.shape)).argmax(-1)
  grid = np.geomspace(0.5, 3.0, 12)
  nll = np.stack([-log_softmax(z / t)[np.arange(len(z)), labels] for t in grid], -1)
  return pd.DataFrame({'nll_at': list(nll.reshape(20, 1000, -1).sum(1))}), grid


@pytest.mark.parametrize('temperature', [0.8, 1.0, 1.7])
def test_the_fitted_temperature_is_the_true_one(temperature):
  assert fit_temperature(*draws(temperature)) == pytest.approx(temperature, rel=0.02)


def test_a_best_temperature_outside_the_grid_is_its_end():
  grid = np.geomspace(0.7, 2.0, 5)
  assert fit_temperature(pd.DataFrame({'nll_at': [np.arange(5.0)]}), grid) == pytest.approx(0.7)
  assert fit_temperature(pd.DataFrame({'nll_at': [-np.arange(5.0)]}), grid) == pytest.approx(2.0)
