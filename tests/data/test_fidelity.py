"""Tokenizers that lose or rewrite text are refused, or bits per byte are not reported."""

import json

import numpy as np
import pandas as pd
import pytest
import tokenizers

from kdjax import grid, train
from kdjax.data import fidelity
from kdjax.data.corpus import prepare
from kdjax.data.fidelity import Fidelity
from kdjax.data.tokenizer import Tokenizer, train_bpe
from kdjax.errors import UserError
from kdjax.runs.folder import RunFolder
from tests import tiny

WORDS = ['the', 'cat', 'sat', 'on', 'a', 'mat', 'and', 'it', 'was', 'good']
rng = np.random.default_rng(0)
TEXTS = [' '.join(rng.choice(WORDS, 60)) for _ in range(40)]


def word_level(words) -> tokenizers.Tokenizer:
  model = tokenizers.Tokenizer(
    tokenizers.models.WordLevel({t: i for i, t in enumerate(['<unk>', *words])}, unk_token='<unk>')
  )
  model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  model.add_special_tokens(['<|endoftext|>'])
  return model


def byte_level(normalizer=None, **changes) -> Tokenizer:
  model = tokenizers.Tokenizer.from_str(train_bpe(TEXTS, 280).to_json())
  if normalizer:
    model.normalizer = normalizer
  return Tokenizer(json.dumps(json.loads(model.to_str()) | changes))


def measured(tokenizer: Tokenizer, texts=TEXTS) -> dict[str, float]:
  measure = Fidelity(tokenizer, 'x')
  measure.add(texts, tokenizer.encode_batch(texts))
  return measure.shares()


@pytest.mark.parametrize(
  'tokenizer',
  [
    Tokenizer(),
    train_bpe(TEXTS, 270),
    byte_level(pre_tokenizer={'type': 'Sequence', 'pretokenizers': [{'type': 'Digits', 'individual_digits': True}, {
      'type': 'ByteLevel', 'add_prefix_space': True, 'trim_offsets': True, 'use_regex': True}]}),
  ],
)  # fmt: skip
def test_byte_level_tokenizers_keep_text_by_design(tokenizer):
  assert tokenizer.keeps_text and tokenizer.key() == [tokenizer.fingerprint]
  assert fidelity.worst({'x': measured(tokenizer)}) == {}


def test_published_tokenizers_keep_text_by_design(real_data):
  tokenizer = Tokenizer.from_file(real_data / 'tokenizers' / 'gpt-neox-20b.json')
  assert not tokenizer.keeps_text  # it normalises to NFC
  assert fidelity.worst({'x': measured(tokenizer, ['Once upon a time,\n\n    ü 😀 日本.\t'] * 9)}) == {}


@pytest.mark.parametrize('known', range(len(WORDS)))
def test_the_share_of_unknown_tokens_is_measured_on_all_of_it(known):
  tokenizer = Tokenizer(word_level(WORDS[:known]).to_str())
  words = ' '.join(TEXTS).split()
  unknown = sum(word not in WORDS[:known] for word in words) / len(words)
  with pytest.raises(UserError, match=rf'loses the text of x: {unknown:.1%} of the tokens are unknown,'):
    measured(tokenizer)


def test_a_few_unknown_tokens_are_reported_and_leave_no_bits_per_byte():
  texts = [*TEXTS, 'the dog sat'] * 2
  found = measured(Tokenizer(word_level(WORDS).to_str()), texts)
  assert found['unknown'] == pytest.approx(1 / (20 * 60 + 1.5), rel=0.6) and found['lost'] > 0
  assert fidelity.worst({'a': found, 'b': dict.fromkeys(found, 0.0)}) == (found if max(found.values()) > 0.001 else {})


@pytest.mark.parametrize(
  ('normalizer', 'texts', 'kind'),
  [
    (tokenizers.normalizers.Lowercase(), ['The Cat Sat On A Mat'] * 5, 'changed'),
    (tokenizers.normalizers.Sequence([tokenizers.normalizers.NFD(), tokenizers.normalizers.StripAccents()]), ['naïve café'] * 5, 'changed'),
    (tokenizers.normalizers.Replace('\n', ' '), ['a line\nand another\n'] * 5, 'changed'),
  ],
)  # fmt: skip
def test_rewritten_text_is_distinguished_from_lost_text(normalizer, texts, kind):
  found = measured(byte_level(normalizer), texts)
  assert found[kind] > 0.05 and found['lost'] == found['unknown'] == 0
  assert 'bits per byte would be wrong' in fidelity.describe(fidelity.worst({'x': found}))


@pytest.mark.parametrize(
  'normalizer',
  [
    tokenizers.normalizers.NFC(),
    tokenizers.normalizers.Sequence([tokenizers.normalizers.Prepend('▁'), tokenizers.normalizers.Replace(' ', '▁')]),
  ],
)
def test_composed_characters_and_a_prefix_space_lose_nothing(normalizer):
  changes = {}
  if not isinstance(normalizer, tokenizers.normalizers.NFC):  # like Llama 2
    changes = {'decoder': {'type': 'Sequence', 'decoders': [
      {'type': 'ByteLevel', 'add_prefix_space': True, 'trim_offsets': True, 'use_regex': True},
      {'type': 'Replace', 'pattern': {'String': '▁'}, 'content': ' '}, {'type': 'Fuse'}, {'type': 'Strip', 'content': ' ', 'start': 1, 'stop': 0},
    ]}}  # fmt: skip
  found = measured(byte_level(normalizer, **changes), ['naïve café\n  of  two'] * 9)
  assert fidelity.worst({'x': found}) == {}


def test_characters_that_vanish_are_lost():
  """A BPE without bytes and without an unknown token drops unknown characters."""
  model = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate('abcdefghijklmnopqrstuvwxyz ')}, []))
  model.add_special_tokens(['<|endoftext|>'])
  tokenizer = Tokenizer(model.to_str())
  assert tokenizer.unknown_id is None
  with pytest.raises(UserError, match=r'0.0% of the tokens are unknown, and 50.0% of the characters cannot be decoded'):
    measured(tokenizer, ['ab日本'] * 9)


def test_a_model_without_an_unknown_token_says_what_it_cannot_encode():
  model = json.loads(word_level(WORDS).to_str())
  model['model']['unk_token'] = '<none>'
  with pytest.raises(UserError, match=r'x: cannot encode the text \(.*\); set data.tokenizer to another tokenizer'):
    Tokenizer(json.dumps(model), '', 'x').encode_batch(['a dog'])


def saved(path, model) -> str:
  model.save(str(path))
  return str(path)


def test_a_corpus_of_unknown_tokens_is_refused(tmp_path):
  path = saved(tmp_path / 'x.json', word_level(['none', 'of', 'these']))
  config = tiny.config(tmp_path, **{'data.tokenizer': path})
  with pytest.raises(
    UserError,
    match=r'loses the text of .*home.jsonl: 100.0% of the tokens are unknown.*; set data.tokenizer to bpe',
  ):
    prepare(config.data, config.eval, config.runs, progress=False)
  assert not [path for path in (tmp_path / 'runs/stores').iterdir() if not path.name.startswith('.')]


def test_no_bits_per_byte_of_rewritten_text(tmp_path):
  """With a lower-casing tokenizer, the table counts per token, says why, and does not compare with a compressor."""
  for name in ('home', 'far', 'further'):
    tiny.write_text(tmp_path)
    file = tmp_path / f'{name}.jsonl'
    rows = [json.loads(line)['text'].title() for line in file.read_text().splitlines()]
    file.write_text(''.join(json.dumps({'text': text}) + '\n' for text in rows))
  model = tokenizers.Tokenizer.from_str(Tokenizer().to_json())
  model.normalizer = tokenizers.normalizers.Lowercase()
  path = saved(tmp_path / 'x.json', model)
  fields = {
    'data.tokenizer': path,
    'student.arms': ('baseline', 'unigram'),
    'student.tokens': 2 * 8 * 16,
    'checkpoint.every': 2,
  }
  config = tiny.config(tmp_path, **fields)
  folder = train.run(config, progress=False)
  facts = (RunFolder(folder / 'students/baseline').read_record() or {})['facts']
  assert facts['text_lost']['changed'] > 0.05 and facts['text_lost']['lost'] == 0
  text, rows = (folder / 'table.txt').read_text(), pd.read_csv(folder / 'results.csv')
  assert 'bits/token (perplexity)' in text and 'bits/byte' not in text and 'xz' not in text
  assert 'the tokenizer does not preserve the text (0.00% of the tokens unknown, 0.00% of the characters lost, ' in text
  assert rows['bits_per_byte'].isna().all() and rows['perplexity'].notna().all()
  with pytest.raises(UserError, match=r'does not preserve the text .* and a grid reports bits per byte'):
    grid.run(tiny.grid(tmp_path, base={'data.tokenizer': path}), tmp_path / 'grid', progress=False)
