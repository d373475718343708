"""SentencePiece and tiktoken files against their own libraries."""

import os
import pathlib

import numpy as np
import pytest

from kdjax.data.tokenizer import Tokenizer
from kdjax.errors import UserError

if os.environ.get('KDJAX_REQUIRE_PARITY') == '1':
  import sentencepiece
  import tiktoken
  import tiktoken.load
  import transformers
else:
  reason = 'the reference implementations are not installed (the [parity] extra)'
  sentencepiece = pytest.importorskip('sentencepiece', reason=reason)
  tiktoken = pytest.importorskip('tiktoken', reason=reason)
  transformers = pytest.importorskip('transformers', reason=reason)

RANKS = pathlib.Path(__file__).parents[2].parent / 'shared/data/tokenizers/gpt2.tiktoken'
TEXTS = [
  'Hello  world!\n\n It costs 12 €; naïve 日本, 12345678.5 and so ON: they\'re "quoted".\tTab \r\n end ',
  " I'll don't CAN'T   spaces\n \n  42nd İstanbul straße 😀 été_x==y//z",
  (pathlib.Path(__file__).parents[1] / 'models/reference.py').read_text(),
]


@pytest.fixture(scope='module', params=['bpe', 'unigram'])
def model(request, tmp_path_factory):
  folder = tmp_path_factory.mktemp(request.param)
  text = folder / 'text.txt'
  text.write_text('\n'.join(path.read_text() for path in sorted(pathlib.Path(__file__).parents[1].glob('*.py'))))
  sentencepiece.SentencePieceTrainer.train(
    input=str(text),
    model_prefix=str(folder / 'tokenizer'),
    vocab_size=900,
    model_type=request.param,
    byte_fallback=True,
    minloglevel=2,
  )
  return folder / 'tokenizer.model'


def test_a_sentencepiece_file_gives_its_ids(model):
  reference, tokenizer = sentencepiece.SentencePieceProcessor(str(model)), Tokenizer.from_file(model)
  assert (tokenizer.separator, tokenizer.separator_id, tokenizer.vocab_size) == ('<s>', 1, 900)
  for text, ids in zip(TEXTS, tokenizer.encode_batch(TEXTS), strict=True):
    np.testing.assert_array_equal(ids, reference.encode(text))


def test_so_does_the_folder_that_holds_it(model, tmp_path):
  folder = tmp_path / 'folder'
  folder.mkdir()
  (folder / 'tokenizer.model').write_bytes(model.read_bytes())
  assert Tokenizer.from_file(folder).fingerprint == Tokenizer.from_file(model).fingerprint


@pytest.mark.skipif(not RANKS.exists(), reason=f'there is no {RANKS}')
def test_tiktokens_ranks_give_its_ids():
  ranks = tiktoken.load.load_tiktoken_bpe(str(RANKS))
  pattern = tiktoken_pattern('r50k')
  reference = tiktoken.Encoding(
    'gpt2', pat_str=pattern, mergeable_ranks=ranks, special_tokens={'<|endoftext|>': 50_256}
  )
  tokenizer = Tokenizer.from_file(RANKS)
  assert (tokenizer.separator_id, tokenizer.vocab_size) == (50_256, 50_257)
  for text, ids in zip(TEXTS, tokenizer.encode_batch(TEXTS), strict=True):
    np.testing.assert_array_equal(ids, reference.encode_ordinary(text))
    assert tokenizer.decode(ids) == text


@pytest.mark.skipif(not RANKS.exists(), reason=f'there is no {RANKS}')
@pytest.mark.parametrize(('name', 'end'), [('cl100k_base', 100_257), ('o200k_base', 199_999)])
def test_the_newer_encodings_cut_text_as_tiktoken_does(name, end, tmp_path):
  """Their ranks are not here, but how they cut text is in the library: GPT-2's ranks stand in."""
  (tmp_path / f'{name}.tiktoken').write_bytes(RANKS.read_bytes())
  ranks = tiktoken.load.load_tiktoken_bpe(str(RANKS))
  reference = tiktoken.Encoding(name, pat_str=tiktoken_pattern(name), mergeable_ranks=ranks, special_tokens={})
  tokenizer = Tokenizer.from_file(tmp_path / f'{name}.tiktoken')
  assert tokenizer.separator_id == end
  for text, ids in zip(TEXTS, tokenizer.encode_batch(TEXTS), strict=True):
    np.testing.assert_array_equal(ids, reference.encode_ordinary(text))


def tiktoken_pattern(name: str) -> str:
  """As the library itself has it, without the download that comes with it."""
  import tiktoken_ext.openai_public as public

  if name == 'r50k':
    return public.r50k_pat_str
  original, public.load_tiktoken_bpe = public.load_tiktoken_bpe, lambda *args, **kwargs: {}
  try:
    return getattr(public, name)()['pat_str']
  finally:
    public.load_tiktoken_bpe = original


def test_ranks_of_no_known_encoding_and_broken_files_are_refused(tmp_path):
  (tmp_path / 'mine.tiktoken').write_text('IQ== 0\n')
  with pytest.raises(
    UserError, match=r'ranks do not say how text is cut; name the file after its encoding, one of gpt2\.tiktoken'
  ):
    Tokenizer.from_file(tmp_path / 'mine.tiktoken')
  (tmp_path / 'broken.model').write_bytes(b'no protobuf')
  with pytest.raises(UserError, match='transformers can make no tokenizer of it'):
    Tokenizer.from_file(tmp_path / 'broken.model')
  with pytest.raises(UserError, match='transformers can make no tokenizer of it'):
    Tokenizer.from_file(tmp_path)
  (tmp_path / 'empty').mkdir()
  with pytest.raises(UserError, match=r'there is no tokenizer\.json in it, nor another tokenizer'):
    Tokenizer.from_file(tmp_path / 'empty')
