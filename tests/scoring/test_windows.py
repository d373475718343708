"""Every token of a document is scored once, with the context that the window promises."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdjax.data.store import TokenStore, write_store
from kdjax.data.tokenizer import Tokenizer
from kdjax.scoring import windows
from tests.data.helpers import make_docs, make_store

sizes = st.integers(1, 40).flatmap(lambda window: st.tuples(st.just(window), st.integers(1, window)))


@settings(max_examples=400, deadline=None)
@given(st.integers(0, 300), sizes)
def test_every_prediction_is_scored_exactly_once_with_enough_context(n, size):
  window, stride = size
  scored = np.zeros(n, int)
  for start, first, end in windows.spans(n, window, stride):
    assert 0 <= start <= first < end <= n
    assert end - start <= window
    if first:
      assert first - start >= min(window - stride, first)
    else:
      assert start == 0
    scored[first:end] += 1
  assert (scored == 1).all()


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 300), sizes)
def test_no_more_windows_than_needed(n, size):
  window, stride = size
  assert len(list(windows.spans(n, window, stride))) == 1 + max(0, -(-(n - window) // stride))


@pytest.fixture(scope='module')
def store(tmp_path_factory):
  return make_store(tmp_path_factory.mktemp('windows') / 'store', [3, 0, 1, 7, 8, 9, 16, 17, 40, 100])


@pytest.mark.parametrize(('window', 'stride'), [(8, 4), (8, 8), (8, 1), (16, 5), (128, 64), (1, 1)])
def test_rows_predict_each_documents_tokens_and_its_end(store, window, stride):
  rows = windows.rows(store, window, stride)
  assert rows.tokens_RxL.shape == rows.labels_RxL.shape == (len(rows.doc_R), window)
  for doc, (_, _, ids) in enumerate(make_docs([3, 0, 1, 7, 8, 9, 16, 17, 40, 100])):
    text = np.concatenate([[store.separator_id], ids, [store.separator_id]])
    found = []
    for tokens, labels in zip(rows.tokens_RxL[rows.doc_R == doc], rows.labels_RxL[rows.doc_R == doc], strict=True):
      at = np.flatnonzero(labels >= 0)
      # The row's tokens stand in the document just before what they predict.
      first = len(found)
      start = first - at[0]
      found += labels[at].tolist()
      np.testing.assert_array_equal(tokens[: at[-1] + 1], text[start : start + at[-1] + 1])
      assert at.tolist() == list(range(at[0], at[-1] + 1))
      assert start == 0 or at[0] >= window - stride
    np.testing.assert_array_equal(found, text[1:])


@pytest.mark.parametrize('batch_size', [1, 3, 8, 64])
@pytest.mark.parametrize('window', [8, 16])
def test_batches_hold_every_row_once_and_padding_is_never_scored(store, window, batch_size):
  rows = windows.rows(store, window, window // 2)
  batches = list(windows.batches(rows, batch_size))
  sizes = {len(b.doc_R) for b in batches}
  assert len(sizes) == 1 and max(sizes) <= batch_size
  key = lambda tokens, labels, doc: (
    int(doc),
    tuple(tokens[: (labels >= 0).nonzero()[0][-1] + 1]),
    tuple(labels[labels >= 0]),
  )
  seen = [key(*row) for b in batches for row in zip(*b, strict=True) if (row[1] >= 0).any()]
  assert sorted(seen) == sorted(key(*row) for row in zip(*rows, strict=True))
  assert sum((b.labels_RxL >= 0).sum() for b in batches) == (rows.labels_RxL >= 0).sum()
  assert (rows.labels_RxL >= 0).sum() == store.n_tokens


@pytest.mark.parametrize('multiple', [1, 3, 8, 16])
def test_batches_of_few_rows_are_no_larger_than_they_need_be(store, multiple):
  rows = windows.rows(store, 8, 4)
  batch_size = 8 * multiple
  sizes = [len(b.doc_R) for b in windows.batches(rows, batch_size, multiple)]
  step = multiple * -(-8 // multiple)
  assert all(size % multiple == 0 and size <= batch_size for size in sizes)
  assert sum(sizes) - len(rows.doc_R) < max(step * len(sizes), batch_size)
  assert len(sizes) == -(-len(rows.doc_R) // batch_size)  # no more batches than full ones


def test_few_row_lengths_are_compiled_and_no_scored_token_is_cut_off():
  rng = np.random.default_rng(0)
  lengths = rng.integers(1, 4097, 200)
  labels = np.where(np.arange(4096) < lengths[:, None], 5, -1).astype(np.int32)
  rows = windows.Rows(np.ones_like(labels), labels, np.arange(200, dtype=np.int32))
  batches = list(windows.batches(rows, 8))
  assert len({b.tokens_RxL.shape for b in batches}) <= 3
  assert sum((b.labels_RxL >= 0).sum() for b in batches) == lengths.sum()
  assert sum(b.tokens_RxL.size for b in batches) < 0.9 * labels.size


def test_a_cut_document_has_no_end_to_predict(tmp_path):
  docs = make_docs([5, 20])
  write_store(tmp_path / 'store', docs, Tokenizer(), {'cut': [docs[1][0]]})
  store = TokenStore.open(tmp_path / 'store')
  rows = windows.rows(store, 8, 4)
  scored = [rows.labels_RxL[rows.doc_R == doc] for doc in (0, 1)]
  assert [(labels >= 0).sum() for labels in scored] == [5 + 1, 20]
  assert (scored[0] == store.separator_id).sum() == 1
  assert (scored[1] == store.separator_id).sum() == 0
