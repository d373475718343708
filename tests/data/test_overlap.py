import numpy as np
import pytest

from kdjax.data import overlap
from kdjax.data.store import TokenStore, write_store
from kdjax.data.tokenizer import Tokenizer


def stored(folder, docs) -> TokenStore:
  write_store(folder, [(f'{i:016x}', len(doc), np.asarray(doc)) for i, doc in enumerate(docs)], Tokenizer())
  return TokenStore.open(folder)


@pytest.fixture
def rng():
  return np.random.default_rng(0)


def changed(rng, doc, share):
  """The document with a share of its tokens replaced, all in one stretch."""
  out, n = doc.copy(), int(share * len(doc))
  out[10 : 10 + n] = rng.integers(0, 256, n)
  return out


def test_near_duplicates_are_found_and_others_are_not(rng, tmp_path):
  docs = [rng.integers(0, 256, 400) for _ in range(50)]
  near = [changed(rng, docs[0], 0.03), changed(rng, docs[0], 0.05), docs[1][:390]]
  half = [changed(rng, docs[2], 0.5)]
  tiny = [np.array([1, 2]), np.array([1, 2]), np.zeros(0, int)]  # no shingle in them
  found = overlap.duplicates(stored(tmp_path / 'a', docs + near + half + tiny))
  assert found == {'documents': 57, 'in_clusters': 5, 'clusters': 2, 'largest': 3, 'left_without': 54}


def test_the_estimate_of_similarity_is_that_of_the_shingles(rng, tmp_path):
  doc = rng.integers(0, 256, 1000)
  near = stored(tmp_path / 'near', [doc, changed(rng, doc, 0.05)])  # Jaccard 0.9
  far = stored(tmp_path / 'far', [doc, changed(rng, doc, 0.25)])  # 0.6
  assert overlap.duplicates(near)['clusters'] == 1
  assert overlap.duplicates(far)['clusters'] == 0


def test_text_of_a_test_set_is_found_wherever_it_stands(rng, tmp_path, monkeypatch):
  monkeypatch.setattr(overlap, '_CHUNK', 100)  # so that stretches lie across the seams
  train = [rng.integers(0, 256, 333) for _ in range(20)]
  test = [
    train[3].copy(),  # all of it
    np.concatenate([rng.integers(0, 256, 100), train[7][50:80]]),  # 30 tokens: 18 stretches of 118
    rng.integers(0, 256, 200),
    np.concatenate([train[4][-6:], train[5][:7]]),  # of two documents: no stretch of one
    np.arange(5),
  ]
  found = overlap.overlaps(stored(tmp_path / 'train', train), {'test': stored(tmp_path / 'test', test)})['test']
  assert (found.documents, found.too_short, found.touched, found.mostly) == (5, 1, 2, 1)
  stretches = [333 - 12, 130 - 12, 200 - 12, 1]
  assert found.share == pytest.approx((stretches[0] + 18) / sum(stretches))


def test_a_stretch_is_hashed_by_its_tokens_and_their_order(rng):
  tokens = rng.integers(0, 50_000, 500)
  hashed = overlap._rolling(tokens, 13)
  assert len(hashed) == 488 and len(np.unique(hashed)) == 488
  assert overlap._rolling(tokens[100:113], 13)[0] == hashed[100]
  assert overlap._rolling(tokens[100:113][::-1], 13)[0] != hashed[100]
