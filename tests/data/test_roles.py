"""Begin, end and padding tokens, read from every file that names them, in order of precedence."""

import contextlib
import json
import logging
import pathlib
import pickle

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

from kdjax.data import roles as roles_lib
from kdjax.data.batches import Windows
from kdjax.data.roles import Roles
from kdjax.data.store import TokenStore, write_store
from kdjax.data.tokenizer import Tokenizer, train_bpe
from kdjax.errors import UserError
from kdjax.scoring import windows
from tests.teachers.huggingface import shapes
from tests.teachers.huggingface.shapes import SHAPES, Shape

LLAMA = Shape(('<unk>', '<s>', '</s>', '[PAD]', '<start>', '<stop>'), True, '', {}, {})


def folder_of(tmp_path, shape=LLAMA, processor=None, **files) -> pathlib.Path:
  """Write a folder with a tokenizer and, by keyword, JSON files."""
  model = shapes.tokenizer(shape)
  if processor:
    model.post_processor = processor(model)
  (tmp_path / 'tokenizer.json').write_text(model.to_str())
  for name, values in files.items():
    (tmp_path / f'{name}.json').write_text(json.dumps(values))
  return tmp_path


def roles(*args, **files) -> Roles:
  return Tokenizer.from_file(folder_of(*args, **files)).roles


def around(before: str, after: str):
  """Build a post-processor that puts these tokens around a text."""

  def make(model):
    ids = [(token, model.token_to_id(token)) for token in (before, after) if token]
    return processors.TemplateProcessing(single=f'{before} $A {after}'.strip(), special_tokens=ids)

  return make


@pytest.mark.parametrize('name', SHAPES)
def test_folders_in_the_shapes_of_published_models(name, tmp_path):
  shape = SHAPES[name]
  found = Tokenizer.from_file(shapes.make(tmp_path / 'x', name)).roles
  named = lambda value: value['content'] if isinstance(value, dict) else value or ''
  assert found.begin == named(shape.tokenizer_config['bos_token'])
  assert found.end == named(shape.tokenizer_config['eos_token']) == found.stops[0]
  assert found.padding == named(shape.tokenizer_config.get('pad_token'))
  assert found.separator == (found.begin or '<|endoftext|>')


@pytest.mark.parametrize('name', ['tokenizer_config.json', 'special_tokens_map.json', 'config.json'])
def test_half_a_surrogate_pair_names_no_token(name, tmp_path):
  folder = shapes.make(tmp_path / 'x', 'Llama 2')
  before = Tokenizer.from_file(folder).roles
  values = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
  (folder / name).write_text(json.dumps(values | {'bos_token': '\ud800', 'pad_token': {'content': '\udfff'}}))
  found = Tokenizer.from_file(folder).roles
  assert (found.begin, found.end) == (before.begin, before.end)


def test_each_source_is_asked_in_its_turn(tmp_path):
  """Each source names other tokens; the first source present wins."""
  said = {
    'tokenizer_config': {'bos_token': '<s>', 'eos_token': '</s>'},
    'special_tokens_map': {'bos_token': {'content': '<start>'}, 'eos_token': {'content': '[PAD]'}},
    'config': {'bos_token_id': 4, 'eos_token_id': 5},
    'generation_config': {'bos_token_id': 0, 'eos_token_id': [5, 2]},
  }
  expected = [('<s>', '</s>'), ('<start>', '[PAD]'), ('<start>', '<stop>'), ('<unk>', '<stop>'), ('<s>', '</s>')]
  for k, (begin, end) in enumerate(expected):
    (folder := tmp_path / f'{k}').mkdir()
    found = roles(folder, **dict(list(said.items())[k:]))
    assert (found.begin, found.end) == (begin, end), k
  (folder := tmp_path / 'processor').mkdir()
  found = roles(folder, LLAMA, around('<start>', '<stop>'), **said)
  assert (found.begin, found.end) == ('<start>', '<stop>')


@pytest.mark.parametrize(
  'processor',
  [
    around('<s>', '</s>'),
    lambda model: processors.Sequence([processors.ByteLevel(trim_offsets=False), around('<s>', '</s>')(model)]),
    lambda model: processors.RobertaProcessing(('</s>', 2), ('<s>', 1), add_prefix_space=False),
    lambda model: processors.BertProcessing(('</s>', 2), ('<s>', 1)),
  ],
  ids=['template', 'sequence', 'roberta', 'bert'],
)
def test_every_kind_of_post_processor_is_understood(processor, tmp_path):
  found = roles(tmp_path, LLAMA, processor, tokenizer_config={'bos_token': '<start>', 'eos_token': '<stop>'})
  assert (found.begin, found.end) == ('<s>', '</s>')


@pytest.mark.parametrize(
  'value', ['<start>', {'__type': 'AddedToken', 'content': '<start>', 'special': True}, ['<start>', '<s>'], 4, [4]]
)
def test_a_token_is_named_in_many_ways(value, tmp_path):
  assert roles(tmp_path, tokenizer_config={'bos_token': value}).begin == '<start>'


@pytest.mark.parametrize(
  'value', [99_999, 70, -1, 1 << 40, 1.5, True, '', '<none>', [], {}, {'content': None}, [None], None]
)
def test_what_names_no_token_says_nothing(value, tmp_path):
  found = roles(tmp_path, config={'bos_token_id': value, 'eos_token_id': value, 'pad_token_id': value})
  assert (found.begin, found.end, found.padding) == ('<s>', '</s>', '[PAD]')


def test_null_in_the_tokenizers_own_file_is_no_beginning_token(tmp_path):
  stale = roles(tmp_path, tokenizer_config={'bos_token': None, 'eos_token': '</s>'}, config={'bos_token_id': 70})
  assert (stale.begin, stale.separator) == ('', '</s>')  # 70 is a letter
  found = roles(tmp_path, tokenizer_config={'bos_token': None, 'eos_token': '</s>'}, config={'bos_token_id': 1})
  assert (found.begin, found.end) == ('', '</s>')
  assert roles_lib.read_roles(shapes.tokenizer(LLAMA), {'tokenizer_config.json': {}}, 'x').begin == '<s>'


def test_special_names_come_before_ordinary_ones_and_partners_before_strangers(tmp_path):
  odd = Shape(('<bos>', '<eos>', '<pad>'), True, '', {}, {}, ordinary=('<s>', '</s>', '<|endoftext|>'))
  found = roles(tmp_path, odd)
  assert (found.begin, found.end, found.padding) == ('<bos>', '<eos>', '<pad>')
  assert Tokenizer(shapes.tokenizer(Shape(('<s>', '[SEP]'), True, '', {}, {})).to_str()).roles.end == '[SEP]'
  assert Tokenizer(shapes.tokenizer(Shape(('<s>',), True, '', {}, {})).to_str()).roles == roles_lib.share_token('<s>')


def test_files_that_disagree_are_logged_once_each(tmp_path, caplog):
  roles_lib._log_once.cache_clear()
  said = {
    'tokenizer_config': {'bos_token': '<s>', 'eos_token': '</s>'},
    'config': {'bos_token_id': 1, 'eos_token_id': 5},
  }
  with caplog.at_level(logging.WARNING, 'kdjax'):
    for _ in range(2):
      assert roles(tmp_path, **said).stops == ('</s>', '<stop>')
  assert [record.getMessage() for record in caplog.records] == [
    f'{tmp_path}: tokenizer_config.json names </s> as the end token, config.json names <stop>; using </s>'
  ]
  caplog.clear()  # no warning: a list that contains the end token; config.json overruled by generation_config.json
  roles(tmp_path, **said, generation_config={'eos_token_id': [5, 2]})
  assert not caplog.records
  roles(tmp_path, tokenizer_config={'bos_token': '<s>', 'eos_token': '<|nowhere|>'})
  assert "names the eos_token '<|nowhere|>', which is not in the vocabulary; ignoring it" in caplog.text


def test_generation_stops_where_transformers_does(tmp_path):
  config = {'eos_token_id': [5, 2]}
  assert roles(tmp_path, tokenizer_config={'eos_token': '</s>'}, config=config).stops == ('</s>', '<stop>')
  (other := tmp_path / 'other').mkdir()
  tokenizer = Tokenizer.from_file(folder_of(other, generation_config={'eos_token_id': 4}, config=config))
  assert tokenizer.roles.stops == ('<stop>', '<start>') and tokenizer.stop_ids == (5, 4)


def test_a_separator_of_the_users_choice_is_one_token_for_both(tmp_path):
  found = Tokenizer.from_file(
    folder_of(tmp_path, tokenizer_config={'eos_token': '</s>', 'pad_token': '[PAD]'}), '<start>'
  )
  assert found.roles == Roles('<start>', '<start>', '<start>', '[PAD]', ('<start>', '</s>'))
  assert not found.roles.closes and found.begin_id == found.end_id == found.separator_id == 4


def test_fingerprints_change_where_documents_do_and_nowhere_else(tmp_path):
  text = shapes.tokenizer(LLAMA).to_str()
  both = Tokenizer(text)
  assert both.roles.closes and both.fingerprint != Tokenizer(text, '<s>').fingerprint
  # Fingerprints from before roles existed.
  assert Tokenizer(text, '<s>').fingerprint == 'ac18fb873ca8b800'
  shared = shapes.tokenizer(Shape(('<|endoftext|>', '<pad>'), True, '', {}, {})).to_str()
  assert Tokenizer(shared).fingerprint == Tokenizer(shared, '<|endoftext|>').fingerprint == '70bbc46a2c43d736'
  padded = folder_of(tmp_path, tokenizer_config={'bos_token': '<s>', 'eos_token': '</s>', 'pad_token': '<stop>'})
  assert Tokenizer.from_file(padded).fingerprint == both.fingerprint


def test_a_token_with_a_role_that_the_file_leaves_unmarked_stays_out_of_text(tmp_path):
  shape = Shape(('<unk>', '<s>'), True, '', {}, {}, ordinary=('</s>', '[PAD]', '<b>'))
  named = Tokenizer.from_file(folder_of(tmp_path, shape, tokenizer_config={'eos_token': '</s>', 'pad_token': '[PAD]'}))
  (ids,) = named.encode_batch(['a</s>[PAD]<b>'])
  assert not set(ids.tolist()) & {named.end_id, named.padding_id} and len(ids) == 1 + 4 + 5 + 1
  assert named.decode(ids) == 'a</s>[PAD]<b>'
  (tmp_path / 'tokenizer_config.json').write_text('{"eos_token": "</s>"}')
  plain = Tokenizer.from_file(tmp_path)
  assert len(plain.encode_batch(['[PAD]'])[0]) == 1 and plain.fingerprint != named.fingerprint


def test_roles_are_kept_wherever_a_tokenizer_is(tmp_path):
  tokenizer = Tokenizer.from_file(shapes.make(tmp_path / 'x', 'Qwen2.5 Instruct'))
  tokenizer.save(tmp_path / 'kept')
  (tmp_path / 'run').mkdir()
  (tmp_path / 'run/tokenizer.json').write_text(tokenizer.to_json())
  (tmp_path / 'run/run.json').write_text(json.dumps({'tokenizer': tokenizer.note()}))
  copies = [Tokenizer.load(tmp_path / 'kept'), pickle.loads(pickle.dumps(tokenizer))]
  copies += [Tokenizer.from_file(tmp_path / name) for name in ('kept', 'run', 'run/tokenizer.json', 'x/tokenizer.json')]
  for copy in copies:
    assert (copy.roles, copy.fingerprint) == (tokenizer.roles, tokenizer.fingerprint)
    assert copy.stop_ids == tokenizer.stop_ids == (258, 256)
  # A run from before roles existed: one token for both.
  (tmp_path / 'run/run.json').write_text(json.dumps({'tokenizer': {'kind': 'tokenizers', 'separator': '<|im_end|>'}}))
  assert Tokenizer.from_file(tmp_path / 'run').fingerprint == Tokenizer(tokenizer.to_json(), '<|im_end|>').fingerprint


def test_our_own_tokenizers_have_one_token_for_all():
  for tokenizer in (Tokenizer(), train_bpe(['some text'], 270), Tokenizer(Tokenizer().to_json())):
    assert tokenizer.roles == roles_lib.share_token('<|endoftext|>') and not tokenizer.roles.closes
    assert tokenizer.begin_id == tokenizer.end_id == tokenizer.separator_id and tokenizer.padding_id is None


def test_a_broken_file_beside_it_is_one_line(tmp_path):
  folder = folder_of(tmp_path)
  for text in ('{', '[]', '"x"'):
    (folder / 'tokenizer_config.json').write_text(text)
    with pytest.raises(UserError, match=r'tokenizer_config.json: .*fetch it again'):
      Tokenizer.from_file(folder)


VALUES = st.recursive(
  st.none()
  | st.booleans()
  | st.integers(-2, 300)
  | st.sampled_from(['<s>', '</s>', '[PAD]', '<x>', '', 'a'])
  | st.floats(),
  lambda inner: (
    st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(['content', 'id', 'x']), inner, max_size=2)
  ),
  max_leaves=5,
)
FIELDS = [f'{short}_token{suffix}' for short in ('bos', 'eos', 'pad') for suffix in ('', '_id')]


@settings(max_examples=100, deadline=None)
@given(
  st.dictionaries(st.sampled_from([*roles_lib.FIELDS]), st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=6))
)
def test_whatever_the_files_say_there_are_roles(files):
  tokenizer = Tokenizer(shapes.tokenizer(LLAMA).to_str(), files=files)
  assert tokenizer.roles.separator and tokenizer.end_id in tokenizer.stop_ids


PARTS = [
  'version',
  'added_tokens',
  'normalizer',
  'pre_tokenizer',
  'post_processor',
  'decoder',
  'model',
  'truncation',
  'padding',
]
INSIDE = ['type', 'vocab', 'merges', 'unk_token', 'byte_fallback', 'continuing_subword_prefix', 'fuse_unk', 'dropout']


@settings(max_examples=100, deadline=None)
@given(st.sampled_from([*PARTS, *(f'model.{name}' for name in INSIDE)]), VALUES | st.just('drop'), st.integers(0, 3))
def test_a_damaged_tokenizer_file_is_one_line_or_a_tokenizer(name, value, swap):
  parsed = json.loads(shapes.tokenizer(SHAPES['Llama 3']).to_str())
  *inside, leaf = name.split('.')
  place = parsed['model'] if inside else parsed
  if value == 'drop':
    place.pop(leaf, None)
  else:
    place[leaf] = parsed[PARTS[swap]] if swap else value
  with contextlib.suppress(UserError):  # any other error fails
    Tokenizer(json.dumps(parsed), '', 'x').encode_batch(['some text <|eot_id|>'])


# Uses of the roles.


@pytest.fixture
def llama() -> Tokenizer:
  return Tokenizer(shapes.tokenizer(Shape(('<unk>', '<s>', '</s>'), True, '', {}, {})).to_str())


def stored(tmp_path, tokenizer, texts, cut=()) -> TokenStore:
  docs = [
    (f'{i:016x}', len(t), ids) for i, (t, ids) in enumerate(zip(texts, tokenizer.encode_batch(texts), strict=True))
  ]
  write_store(tmp_path / 'store', docs, tokenizer, {'cut': [docs[i][0] for i in cut]})
  return TokenStore.open(tmp_path / 'store')


def test_a_document_in_a_store_has_its_beginning_and_its_end(llama, tmp_path):
  texts = ['one', '', 'three <s>']
  store = stored(tmp_path, llama, texts, cut=[2])
  ids = [ids.tolist() for ids in llama.encode_batch(texts)]
  whole = store.read(0, store.n_tokens).tolist()
  assert whole == [1, *ids[0], 2, 1, 2, 1, *ids[2]]
  assert [store.document(i).tolist() for i in range(3)] == [[1, *ids[0], 2], [1, 2], [1, *ids[2]]]
  assert [store.text(i).tolist() for i in range(3)] == ids
  counts = store.counts(llama.vocab_size)
  assert (counts[1], counts[2], counts.sum()) == (0, 2, sum(map(len, ids)) + 2)
  with pytest.raises(UserError, match='the end token is among its tokens'):
    write_store(tmp_path / 'x', [('0' * 16, 1, np.array([5, 2]))], llama)


def test_one_token_for_both_is_the_stream_that_it_was(llama, tmp_path):
  one = Tokenizer(llama.to_json(), '<s>')
  store = stored(tmp_path, one, ['one', 'two'])
  ids = [ids.tolist() for ids in one.encode_batch(['one', 'two'])]
  assert store.read(0, store.n_tokens).tolist() == [1, *ids[0], 1, *ids[1]]
  assert 'end_id' not in store.meta and store.document(1).tolist() == [1, *ids[1], 1]


def test_training_predicts_each_texts_tokens_and_its_end_and_never_a_beginning(llama, tmp_path):
  store = stored(tmp_path, llama, ['one', 'four', 'x'])
  window = Windows(store, 32).window(0)
  n = store.n_tokens
  following = np.append(window['tokens'][1:n], -1)
  np.testing.assert_array_equal(window['labels'][:n], np.where(following == 1, -1, following))
  assert (window['labels'] >= 0).sum() == 3 + 4 + 1 + 3  # texts and ends
  assert window['segment_ids'][:n].tolist() == [1] * 5 + [2] * 6 + [3] * 3


def test_a_document_is_scored_with_its_end_token(llama, tmp_path):
  store = stored(tmp_path, llama, ['one', 'four'], cut=[1])
  rows = windows.rows(store, 16, 8)
  ids = [ids.tolist() for ids in llama.encode_batch(['one', 'four'])]
  assert rows.labels_RxL[0][:4].tolist() == [*ids[0], 2] and (rows.labels_RxL[0][4:] == -1).all()
  assert rows.tokens_RxL[0][:4].tolist() == [1, *ids[0]]
  assert rows.labels_RxL[1][:5].tolist() == [*ids[1], -1]


def test_ordinary_tokens_with_a_role_are_refused_once_a_text_holds_them():
  model = tokenizers.Tokenizer(
    tokenizers.models.WordLevel({'<unk>': 0, 'a': 1, '<s>': 2, '</s>': 3}, unk_token='<unk>')
  )
  model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  tokenizer = Tokenizer(model.to_str())
  with pytest.raises(UserError, match=r"the end token '</s>' is an ordinary token and occurs in a text"):
    tokenizer.encode_batch(['a </s> a'])
