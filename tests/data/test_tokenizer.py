import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from kdjax.data.tokenizer import SEPARATOR, Tokenizer, train_bpe
from kdjax.errors import UserError
from kdjax.storage.files import StoreDamaged
from tests.data.helpers import REPO

PADDING = {
  'strategy': 'BatchLongest',
  'direction': 'Right',
  'pad_to_multiple_of': None,
  'pad_id': 0,
  'pad_type_id': 0,
  'pad_token': '!',
}
TEXTS = ['the cat sat on the mat. ' * 20, 'a cat and a hat; ' * 20, f'about {SEPARATOR} itself ' * 20]


@pytest.fixture(scope='module')
def bpe():
  return train_bpe(TEXTS, 280)


def word_level(tokens, specials=(), special=True) -> str:
  model = tokenizers.Tokenizer(tokenizers.models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token=tokens[0]))
  model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  model.add_tokens([tokenizers.AddedToken(t, special=special) for t in specials])
  return model.to_str()


@pytest.mark.parametrize('text', ['', 'ascii', 'ü ℝ 😀', '\r\n\t \x00', f'a{SEPARATOR}b', SEPARATOR])
def test_both_own_tokenizers_are_lossless_and_never_emit_the_separator(bpe, text):
  for tokenizer in (Tokenizer(), bpe):
    (ids,) = tokenizer.encode_batch([text])
    assert ids.dtype == np.int32
    assert tokenizer.separator_id not in ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([tokenizer.separator_id, *ids]) == SEPARATOR + text


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=['Cs']))))
def test_any_text_survives_the_trained_tokenizer(bpe, texts):
  ids = bpe.encode_batch(texts)
  assert [bpe.decode(i) for i in ids] == texts
  assert all(((i >= 0) & (i < bpe.vocab_size)).all() for i in ids)


def test_bytes_are_bytes():
  tokenizer = Tokenizer()
  assert (tokenizer.vocab_size, tokenizer.separator_id) == (257, 256)
  np.testing.assert_array_equal(tokenizer.encode_batch(['aü'])[0], [97, 0xC3, 0xBC])
  assert tokenizer.decode([0xC3]) == '\ufffd'


def test_bytes_written_as_a_file_are_bytes_again():
  text, known = Tokenizer().to_json(), Tokenizer()
  reference = tokenizers.Tokenizer.from_str(text)
  sample = bytes(range(256)).decode('latin-1') + 'ℝ 😀 \r\n  the end'
  assert reference.encode(sample).ids == list(sample.encode()) and reference.decode(list(sample.encode())) == sample
  assert Tokenizer(text).is_bytes and Tokenizer(text).fingerprint == known.fingerprint
  assert reference.token_to_id(SEPARATOR) == known.separator_id


def test_the_same_tokenizer_spelt_otherwise_has_the_same_fingerprint(bpe):
  parsed = json.loads(bpe.to_json())
  model = parsed['model']
  spelt = {**model, 'merges': [' '.join(pair) for pair in model['merges']]}
  del spelt['fuse_unk'], spelt['ignore_merges']
  changes = {
    'model': spelt,
    'padding': PADDING,
    'post_processor': {'type': 'ByteLevel', 'add_prefix_space': True, 'trim_offsets': True, 'use_regex': True},
  }
  same = Tokenizer(json.dumps(parsed | changes, indent=3))
  assert same.fingerprint == bpe.fingerprint
  np.testing.assert_array_equal(same.encode_batch(TEXTS)[0], bpe.encode_batch(TEXTS)[0])
  for other in ({'model': {**model, 'merges': model['merges'][::-1]}}, {'normalizer': {'type': 'NFC'}}):
    assert Tokenizer(json.dumps(parsed | other)).fingerprint != bpe.fingerprint


def test_training_compresses_and_honours_the_size(bpe):
  assert bpe.vocab_size == 280
  assert len(bpe.encode_batch(TEXTS)[0]) < len(TEXTS[0]) / 1.5


def test_training_twice_gives_the_same_tokenizer_in_another_process_too(bpe):
  code = f'from kdjax.data.tokenizer import train_bpe; print(train_bpe({TEXTS!r}, 280).fingerprint)'
  run = subprocess.run([sys.executable, '-c', code], cwd=REPO, capture_output=True, text=True, check=True)
  assert run.stdout.strip() == bpe.fingerprint == train_bpe(iter(TEXTS), 280).fingerprint
  assert train_bpe(TEXTS, 270).fingerprint != bpe.fingerprint


def test_a_vocabulary_too_small_for_bytes_is_refused():
  with pytest.raises(UserError, match='at least 257'):
    train_bpe(TEXTS, 256)


@pytest.mark.parametrize('kind', ['bytes', 'bpe'])
def test_saving_and_pickling_keep_everything(bpe, tmp_path, kind):
  tokenizer = {'bytes': Tokenizer(), 'bpe': bpe}[kind]
  tokenizer.save(tmp_path / 'tokenizer')
  for copy in (Tokenizer.load(tmp_path / 'tokenizer'), pickle.loads(pickle.dumps(tokenizer))):
    assert copy.fingerprint == tokenizer.fingerprint
    assert copy.separator_id == tokenizer.separator_id
    np.testing.assert_array_equal(copy.encode_batch(TEXTS[2:])[0], tokenizer.encode_batch(TEXTS[2:])[0])


def test_a_changed_tokenizer_file_is_seen(bpe, tmp_path):
  bpe.save(tmp_path)
  path = tmp_path / 'tokenizer.json'
  path.write_text(path.read_text().replace('"t"', '"T"', 1))
  with pytest.raises(StoreDamaged):
    Tokenizer.load(tmp_path)
  path.unlink()
  with pytest.raises(StoreDamaged, match='missing'):
    Tokenizer.load(tmp_path)


def test_the_fingerprint_is_of_the_content(bpe, tmp_path):
  for name, indent in (('a.json', None), ('b.json', 2)):
    (tmp_path / name).write_text(json.dumps(json.loads(bpe._model_json), indent=indent))
  a, b = (Tokenizer.from_file(tmp_path / name) for name in ('a.json', 'b.json'))
  assert a.fingerprint == b.fingerprint == bpe.fingerprint
  assert a.fingerprint != Tokenizer().fingerprint


def test_the_separator_is_guessed_or_taken_from_the_config():
  text = word_level(['<unk>', 'a', 'b'], ['<s>', '</s>', '<mask>'])
  assert Tokenizer(text).separator == '<s>'
  assert Tokenizer(text, '</s>').separator_id == 4
  assert Tokenizer(text, '</s>').fingerprint != Tokenizer(text).fingerprint


def test_no_usual_separator_or_an_unknown_one_lists_what_to_set():
  text = word_level(['<unk>', 'a'], ['<start>', '<mask>'])
  with pytest.raises(UserError, match=r"set data.separator .* to .*'<start>', '<mask>'"):
    Tokenizer(text)
  with pytest.raises(UserError, match=r"no token '<s>'; set data.separator .* such as one of \['<start>', '<mask>'\]"):
    Tokenizer(text, '<s>')


def test_a_separator_that_the_file_does_not_mark_as_special_still_stays_out_of_text():
  tokenizer = Tokenizer(word_level(['<unk>', 'a', 'b'], ['</s>'], special=False))
  np.testing.assert_array_equal(tokenizer.encode_batch(['a </s> b'])[0], [1, 0, 2])


def test_a_separator_that_is_an_ordinary_token_is_refused_once_text_contains_it():
  tokenizer = Tokenizer(word_level(['<unk>', 'a', '</s>']))
  np.testing.assert_array_equal(tokenizer.encode_batch(['a'])[0], [1])
  with pytest.raises(UserError, match='ordinary token'):
    tokenizer.encode_batch(['a </s> a'])


def test_truncation_and_padding_of_the_file_are_switched_off():
  model = tokenizers.Tokenizer.from_str(word_level(['<unk>', 'a'], ['</s>']))
  model.enable_truncation(2)
  model.enable_padding(length=4)
  assert [len(i) for i in Tokenizer(model.to_str()).encode_batch(['a', 'a a a a a'])] == [1, 5]


@pytest.mark.parametrize('text', ['no json', '[]', '{}', '{"model": {"type": "BPE"}}'])
def test_what_is_no_tokenizer_file_says_so(tmp_path, text):
  (tmp_path / 'x.json').write_text(text)
  with pytest.raises(UserError, match=r'x.json: .*give the path of a Hugging Face tokenizer.json'):
    Tokenizer.from_file(tmp_path / 'x.json')


def test_a_model_that_the_package_cannot_read_says_so_and_an_added_token_may_leave_its_mark_out():
  values = json.loads(word_level(['<unk>', 'a'], ['</s>']))
  for token in values['added_tokens']:
    del token['special']
  assert Tokenizer(json.dumps(values)).separator == '</s>'
  values['model']['type'] = 'Mystery'
  with pytest.raises(UserError, match=r'x: the tokenizers package cannot read it .*; fetch it again'):
    Tokenizer(json.dumps(values), '', 'x')


def test_a_tokenizer_that_is_not_there_says_so(tmp_path):
  with pytest.raises(UserError, match=r'bpe, bytes, a tokenizer\.json'):
    Tokenizer.from_file(tmp_path / 'bpee')


def test_a_real_tokenizer_file_gives_the_reference_ids_and_keeps_the_separator_out(real_data):
  path = str(real_data / 'tokenizers' / 'gpt-neox-20b.json')
  tokenizer, reference = Tokenizer.from_file(path), tokenizers.Tokenizer.from_file(path)
  assert tokenizer.separator == SEPARATOR and tokenizer.separator_id == reference.token_to_id(SEPARATOR)
  assert tokenizer.vocab_size == max(reference.get_vocab().values()) + 1 == 50280
  text = 'Once upon a time,\n\n    there was ü 😀.'
  np.testing.assert_array_equal(tokenizer.encode_batch([text])[0], reference.encode(text).ids)
  assert tokenizer.separator_id in reference.encode(f'a{SEPARATOR}b').ids
  (ids,) = tokenizer.encode_batch([f'a{SEPARATOR}b <|padding|>'])
  assert not set(ids) & {tokenizer.separator_id, reference.token_to_id('<|padding|>')}
  assert tokenizer.decode(ids) == f'a{SEPARATOR}b <|padding|>'
