"""Long texts in pieces: every kind of tokenizer gives the same ids as for the whole text, in bounded memory."""

import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
import tokenizers

from kdjax.data import pieces
from kdjax.data.pieces import Cutter, Encoder
from kdjax.data.sources import documents
from kdjax.data.tokenizer import Tokenizer, train_bpe
from tests.data import tokenizer_kinds
from tests.data.helpers import REPO

WHOLE = {  # kinds of tokenizers whose texts are never cut
  'unigram of documents',
  'stripped',
  'added words',
  'added with spaces',
  'looking back',
  'scripts',
  'replaced by pattern',
}
NAMES = [name for name, _ in tokenizer_kinds.kinds().items()]


def loaded(file: str) -> tokenizers.Tokenizer:
  model = tokenizers.Tokenizer.from_str(file)
  model.encode_special_tokens = True
  return model


def whole(model: tokenizers.Tokenizer, text: str) -> list[int]:
  return model.encode_batch_fast([text], add_special_tokens=False)[0].ids


@pytest.fixture
def short_pieces(monkeypatch):
  monkeypatch.setattr(pieces, 'SIZE', 300)


@pytest.mark.parametrize('name', NAMES)
def test_pieces_have_the_ids_of_the_whole(name, short_pieces):
  model = loaded(tokenizer_kinds.kinds()[name])
  encoder, cutter = Encoder(model), Cutter(json.loads(tokenizer_kinds.kinds()[name]))
  text = tokenizer_kinds.corpus(7, 9000)
  spans = cutter.spans(text)
  assert spans[0][0] == 0 and spans[-1][1] == len(text) and all(a[1] == b[0] for a, b in itertools.pairwise(spans))
  assert len(spans) == 1 if name in WHOLE else len(spans) > 5
  texts = ['', text, text[:700], 'short', text[100:5000]]
  for found, one in zip(encoder.encode(texts), texts, strict=True):
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, whole(model, one))


@pytest.mark.parametrize(
  'text',
  [
    'a' * 5000,
    'word ' * 3000,
    '  ' * 3000,
    '\n' * 5000,
    '中文' * 3000,
    'é' * 4000,
    '12' * 3000,
    '▁' * 3000,
    "'s" * 3000,
  ],
)
def test_monotonous_text_is_cut_rightly_or_not_at_all(text, short_pieces):
  for name in ('gpt2', 'cl100k', 'neox', 'llama2', 'gemma', 'metaspace always True', 'unigram', 'one word'):
    model = loaded(tokenizer_kinds.kinds()[name])
    np.testing.assert_array_equal(Encoder(model).encode([text])[0], whole(model, text))


def test_a_piece_that_is_not_the_first_gets_no_space_before_it(short_pieces):
  """Llama 2's normalizer prepends a space to each text it is given."""
  model = loaded(tokenizer_kinds.kinds()['llama2'])
  cutter = Cutter(json.loads(tokenizer_kinds.kinds()['llama2']))
  assert cutter.has_rest and len(list(cutter.pieces('a b. ' * 900))) > 5
  ids = Encoder(model).encode(['a b. ' * 900])[0].tolist()
  assert ids == whole(model, 'a b. ' * 900) and ids != [
    i for piece in cutter.pieces('a b. ' * 900) for i in whole(model, piece)
  ]


def test_text_that_merges_may_join_is_not_cut_there(short_pieces):
  """A BPE that sees whole documents, and has merges across word boundaries."""
  made = json.loads(tokenizer_kinds.kinds()['merges over spaces'])
  text = tokenizer_kinds.corpus(3, 9000)
  glued = {entry[k : k + 2] for entry in made['model']['vocab'] for k in range(len(entry) - 1)}
  cuts = [first for first, _ in Cutter(made).spans(text)[1:]]
  assert cuts and not any(text[cut - 1 : cut + 1] in glued for cut in cuts)
  assert sum(text[k : k + 2] in glued for k in range(len(text) - 1) if text[k + 1] == ' ') > 100


def test_a_tokenizer_is_trained_on_pieces_as_on_the_whole(short_pieces, monkeypatch):
  text = tokenizer_kinds.corpus(5, 20_000)
  cut = train_bpe([text], 400).fingerprint
  monkeypatch.setattr(pieces, 'SIZE', 1 << 30)
  assert train_bpe([text], 400).fingerprint == cut


def test_real_tokenizers_and_text(real_data, monkeypatch):
  monkeypatch.setattr(pieces, 'SIZE', 5000)
  text = '\n\n'.join(documents(str(real_data / 'wiki' / 'valid.jsonl.xz')))[:400_000]
  assert len(text) > 100_000
  file = real_data / 'tokenizers' / 'gpt-neox-20b.json'
  model = loaded(file.read_text())
  model.no_truncation()
  np.testing.assert_array_equal(Tokenizer.from_file(file).encode_batch([text])[0], whole(model, text))


PEAK = """
import pathlib, sys
from kdjax.config import DataConfig, EvalConfig
from kdjax.data import fidelity
from kdjax.data.corpus import prepare
from kdjax import prepare as command

fidelity.TOO_MUCH = fidelity.AT_ONCE = 1.0  # some of these tokenizers lose text, and are measured all the same

def memory(name):
  return int(pathlib.Path('/proc/self/status').read_text().partition(name + ':')[2].split()[0]) * 1024

*sources, tokenizer, runs = sys.argv[1:]
for source in sources:  # the figures are of the last one, above what the others left
  before = memory('VmRSS')
  corpus = prepare(DataConfig(source=source, tokenizer=tokenizer, vocab_size=500), EvalConfig(ood={}), runs, False)
  command.report(corpus, progress=False)
print(memory('VmHWM') - before, max(corpus.train.n_bytes), corpus.train.n_tokens)
"""


def written(path, *long: str) -> str:
  """Write a corpus of short documents and the long ones."""
  lines = [*(f'a short document {i} ' * 20 for i in range(60)), *long]
  path.write_text(''.join(json.dumps({'text': line}, ensure_ascii=False) + '\n' for line in lines), encoding='utf-8')
  return str(path)


def measured(runs, tokenizer: str, *sources: str) -> tuple[int, int]:
  """Return (peak memory, bytes of the longest document) of the last of the corpora, built by one process."""
  command = [sys.executable, '-c', PEAK, *sources, tokenizer, str(runs)]
  done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  peak, longest, _ = map(int, done.stdout.split())
  return peak, longest


@pytest.mark.parametrize('kind', ['bpe', 'bytes'])
def test_a_document_of_megabytes_takes_40_bytes_a_character_at_most(tmp_path, kind):
  text = 'The quick brown fox; it jumps over 13 dogs!\n' * 80_000
  small = written(tmp_path / 'small.jsonl')  # what a corpus takes at any size
  peak, longest = measured(tmp_path / 'runs', kind, small, written(tmp_path / 'a.jsonl', text))
  assert longest == len(text) == 3_520_000  # it is in the training split
  assert peak < 40 * len(text), f'{peak / len(text):.1f} bytes a character'


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['bpe', 'bytes', 'gpt2', 'llama2', 'unigram'])
@pytest.mark.parametrize('language', ['English', 'Chinese'])
def test_a_document_of_19_megabytes_takes_40_bytes_a_character_at_most(tmp_path, kind, language):
  words = tokenizer_kinds.corpus(1, 5000) if language == 'Chinese' else 'The quick brown fox; it jumps over 12 dogs!\n'
  filler = '他在这里说了一些话，然后走了。' if language == 'Chinese' else ''
  unit = words + filler * 400
  text = (unit * (19_000_000 // len(unit) + 1))[:19_000_000]
  tokenizer = kind
  if kind not in ('bpe', 'bytes'):
    tokenizer = str(tmp_path / 'tokenizer.json')
    (tmp_path / 'tokenizer.json').write_text(tokenizer_kinds.kinds()[kind])
  peak, longest = measured(tmp_path / 'runs', tokenizer, written(tmp_path / 'a.jsonl', text))
  assert longest == len(text.encode())  # it is in the training split
  assert peak < 40 * len(text), f'{peak / len(text):.1f} bytes a character'
