"""What the tests of the data share."""

import json
import pathlib

import numpy as np

from kdjax.data.store import TokenStore, write_store
from kdjax.data.tokenizer import Tokenizer

REPO = pathlib.Path(__file__).parents[2]


def make_docs(lengths, seed=0):
  """Random documents of bytes, as `write_store` takes them."""
  rng = np.random.default_rng(seed)
  return [(f'{i:016x}', int(n), rng.integers(0, 256, n).astype(np.int32)) for i, n in enumerate(lengths)]


def make_store(folder, lengths, seed=0) -> TokenStore:
  write_store(folder, make_docs(lengths, seed), Tokenizer())
  return TokenStore.open(folder)


def write_jsonl(path, texts, field='text'):
  path.write_text(''.join(json.dumps({field: text}) + '\n' for text in texts), encoding='utf-8')
  return str(path)
