"""Multiple choice against plain log-softmax on whole logits: every kind of record, the window, batches, meshes; what is refused; the job."""

import functools
import gzip
import itertools
import json
import lzma
import math
import pathlib
import shutil

import jax
import numpy as np
import pandas as pd
import pytest
import zstandard

from kdjax import config as config_lib
from kdjax.analysis import table as tables
from kdjax.config import ModelConfig
from kdjax.data.corpus import prepare
from kdjax.data.tokenizer import Tokenizer, train_bpe
from kdjax.errors import ConfigError, UserError
from kdjax.models import build
from kdjax.runs.folder import RunFolder
from kdjax.runtime import sharding
from kdjax.scoring import choices, likelihood, results
from kdjax.scoring import job as jobs
from kdjax.scoring.text import Scored
from kdjax.storage.paths import read_json, write_json
from tests import tiny
from tests.analysis.textbook import ratio_interval
from tests.models import stories
from tests.models.test_stories import TEXT
from tests.scoring.test_text import log_softmax, mesh

CHOICES = {'context': 'Der Bär schläft', 'choices': [' tief.', ' im Fluß und lacht.', ' x'], 'answer': 2, 'id': 7}
PARTIAL = {'contexts': ['Ann saw Eve, so Ann', 'Ann saw Eve, so Eve'], 'continuation': ' waved.', 'answer': 1}
PAIR = {'good': 'Cats sleep.', 'bad': 'Cats sleeps.', 'paradigm': 'agreement', 'field': 'syntax'}
LAST_WORD = {'text': 'She took the key and opened the door\n'}
RECORDS = [CHOICES, PARTIAL, PAIR, LAST_WORD]
WINDOW = 24
TASKS = stories.FOLDER.parents[1] / 'tasks'


def write(path: pathlib.Path, records) -> str:
  path.write_text(''.join(json.dumps(record) + '\n' for record in records), encoding='utf-8')
  return str(path)


def items_of(tmp_path: pathlib.Path, *records) -> list[choices.Item]:
  return choices.read_choices(write(tmp_path / 'items.jsonl', records))


def many(n: int, seed: int = 0) -> list[dict]:
  """Made-up records of all kinds, with texts of 1 to 60 bytes."""
  rng = np.random.default_rng(seed)
  text = lambda longest: ' ' + ''.join(rng.choice(list('abc é'), rng.integers(1, longest))).strip() + 'z'
  made = []
  for i in range(n):
    size = int(rng.integers(2, 6))
    made.append(
      [
        {'context': text(60), 'choices': [text(20) for _ in range(size)], 'answer': int(rng.integers(size))},
        {'contexts': [text(60), text(40)], 'continuation': text(20), 'answer': int(rng.integers(2))},
        {'good': text(60), 'bad': text(60)},
        {'text': f'w{text(60)}{text(4)}'},
      ][i % 4]
    )
  return made


@pytest.fixture(scope='module')
def model() -> Scored:
  """A tied model of bytes, with weights large enough for confident and wrong predictions."""
  built = build(
    ModelConfig(
      vocab_size=257, pad_vocab_to=8, d_model=16, n_layers=1, d_ff=16, n_heads=2, n_kv_heads=2, head_dim=8, tied=True
    )
  )
  rng = np.random.default_rng(5)
  draw = lambda path, x: (
    np.ones(x.shape, x.dtype) if 'scale' in str(path) else rng.normal(0, 0.6, x.shape).astype(x.dtype)
  )
  return Scored(built, jax.tree_util.tree_map_with_path(draw, built.abstract()))


def scored(model, items, tokenizer=None, window=WINDOW, batch_size=8, on=None) -> pd.DataFrame:
  on = on or mesh()
  with jax.set_mesh(on):
    return choices.score_choices(model, items, tokenizer or Tokenizer(), window, batch_size, on)


@functools.partial(jax.jit, static_argnums=0)
def _hidden(model, params, tokens):
  return model.hidden(params, tokens)


def logits(model: Scored, tokens: list[int]) -> np.ndarray:
  """float64 [n, 257] over n tokens, which see only what is before them."""
  padded = np.zeros((1, 64), np.int32)
  padded[0, : len(tokens)] = tokens
  hidden = np.asarray(_hidden(model.model, model.params, padded)[0, : len(tokens)], np.float64)
  return (hidden @ np.asarray(model.model.head(model.params), np.float64))[:, :257]


def dense(model: Scored, tokens: list[int]) -> np.ndarray:
  """float64 [n]: the log-probability of each token but the first, from whole logits."""
  return log_softmax(logits(model, tokens[:-1]))[np.arange(len(tokens) - 1), tokens[1:]]


def plain(model: Scored, context: str, continuation: str, window: int = WINDOW) -> float:
  """Of bytes, by the definition; the continuation fits into the window."""
  tokens = [256, *context.encode(), *continuation.encode()][-window - 1 :]
  return float(dense(model, tokens)[-len(continuation.encode()) :].sum())


# Reading.


def test_each_kind_of_record_is_an_item(tmp_path):
  first, partial, pair, last = items_of(tmp_path, *RECORDS)
  assert first[1:] == ('', ('Der Bär schläft',) * 3, (' tief.', ' im Fluß und lacht.', ' x'), 2, 'choices')
  assert partial[1:] == ('', tuple(PARTIAL['contexts']), (' waved.',) * 2, 1, 'partial')
  assert pair[1:] == ('agreement', ('', ''), ('Cats sleep.', 'Cats sleeps.'), 0, 'pair')
  assert last[1:] == ('', ('She took the key and opened the',), (' door',), 0, 'last_word')


def test_the_id_is_of_the_content_alone(tmp_path):
  (item,) = items_of(tmp_path, PAIR)
  assert len(item.id) == 16
  assert items_of(tmp_path, PAIR | {'paradigm': 'other', 'id': 3})[0].id == item.id
  assert items_of(tmp_path, {k: v for k, v in PAIR.items() if k != 'paradigm'})[0].group == 'syntax'
  others = [PAIR | {'bad': 'Cats slept.'}, {'good': PAIR['bad'], 'bad': PAIR['good']}, CHOICES, CHOICES | {'answer': 0}]
  assert len({item.id, *(other.id for other in items_of(tmp_path, *others))}) == 5


def test_an_item_that_is_there_twice_counts_once(tmp_path):
  assert len(items_of(tmp_path, *RECORDS, *RECORDS[::-1])) == len(RECORDS)


@pytest.mark.parametrize(
  ('suffix', 'compress'), [('', bytes), ('.gz', gzip.compress), ('.xz', lzma.compress), ('.zst', zstandard.compress)]
)
def test_files_may_be_compressed_and_several(tmp_path, suffix, compress):
  for name, records in (('a', RECORDS[:2]), ('b', RECORDS[2:])):
    data = ''.join(json.dumps(record) + '\n' for record in records).encode()
    (tmp_path / f'{name}.jsonl{suffix}').write_bytes(compress(data))
  assert choices.read_choices(str(tmp_path / f'*.jsonl{suffix}')) == items_of(tmp_path / '..', *RECORDS)


def without(record: dict, field: str) -> dict:
  return {key: value for key, value in record.items() if key != field}


@pytest.mark.parametrize(
  ('record', 'words'),
  [
    (without(CHOICES, 'answer'), ['fields', "['choices', 'context', 'id']", 'contexts, continuation, answer']),
    ({}, ['fields', '[]']),
    (CHOICES | {'answer': 3}, ["'answer'", '0 to 2, got 3']),
    (CHOICES | {'answer': -1}, ['0 to 2, got -1']),
    (CHOICES | {'answer': '1'}, ["got '1'"]),
    (CHOICES | {'answer': True}, ['got True']),
    (CHOICES | {'answer': 1.0}, ['got 1.0']),
    (CHOICES | {'choices': [' a']}, ["'choices' must be a list of at least two", "[' a']"]),
    (CHOICES | {'choices': ' a'}, ["'choices' must be a list of at least two"]),
    (CHOICES | {'choices': [' a', 3]}, ["'choices[1]' must be text, got 3"]),
    (CHOICES | {'choices': [' a', ' ']}, ["'choices[1]' is empty"]),
    (CHOICES | {'context': None}, ["'context' must be text, got None"]),
    (PARTIAL | {'contexts': ['a']}, ["'contexts' must be a list of at least two"]),
    (PARTIAL | {'continuation': ''}, ["'continuation' is empty"]),
    (PAIR | {'bad': '\n'}, ["'bad' is empty"]),
    (PAIR | {'paradigm': 3}, ["'paradigm' must be text, got 3"]),
    ({'text': 'word '}, ['at least two words']),
    ({'text': ' word'}, ['at least two words']),
    ({'text': 5}, ["'text' must be text, got 5"]),
    ({'text': 'half \ud800'}, ['surrogate']),
    (CHOICES | {'context': 'x' * 999, 'choices': ['x' * 999]}, ['at least two texts, got', '...']),
  ],
)
def test_a_wrong_record_is_named_by_file_and_line(tmp_path, record, words):
  with pytest.raises(UserError) as e:
    items_of(tmp_path, PARTIAL, record)
  assert str(e.value).startswith(f'{tmp_path / "items.jsonl"}:2: ')
  assert '\n' not in str(e.value) and len(str(e.value)) < 400
  assert all(word in str(e.value) for word in words), e.value


def test_what_is_no_file_of_items_is_refused(tmp_path):
  (tmp_path / 'a.txt').write_text('text')
  (tmp_path / 'empty.jsonl').write_text('\n')
  (tmp_path / 'list.jsonl').write_text('[1]')
  for source, words in {
    'a.txt': 'not JSON lines',
    'empty.jsonl': 'there is no item in it',
    'list.jsonl': 'list.jsonl:1: not a JSON object',
    'none.jsonl': 'matches no file',
  }.items():
    with pytest.raises(UserError, match=words):
      choices.read_choices(str(tmp_path / source))
  with pytest.raises(UserError, match='not JSON lines'):
    choices.read_choices('embedded:code')
  with pytest.raises(UserError, match=r'^eval\.tasks\.mine: .*no item'):
    choices.read_tasks({'mine': str(tmp_path / 'empty.jsonl')})


def test_the_first_items_are_the_same_in_any_order_of_lines(tmp_path):
  records = many(40)
  forth, back = (
    choices.read_tasks({'x': write(tmp_path / f'{i}.jsonl', r)}, 9)['x'] for i, r in enumerate((records, records[::-1]))
  )
  assert forth == back and len(forth) == 9
  more = choices.read_tasks({'x': str(tmp_path / '0.jsonl')}, 20)['x']
  assert more[:9] == forth
  assert choices.read_tasks({'x': str(tmp_path / '0.jsonl')})['x'] == choices.read_choices(str(tmp_path / '0.jsonl'))


# Scores.


@pytest.fixture(scope='module')
def items(tmp_path_factory) -> list[choices.Item]:
  return items_of(tmp_path_factory.mktemp('choices'), *many(60))


@pytest.fixture(scope='module')
def table(model, items) -> pd.DataFrame:
  return scored(model, items)


def test_likelihoods_are_those_of_whole_logits(model, items, table):
  assert any(len(c.encode()) > WINDOW for item in items for c in item.contexts)
  compared = 0
  for item, (_, row) in zip(items, table.iterrows(), strict=True):
    for i, (context, continuation) in enumerate(zip(item.contexts, item.continuations, strict=True)):
      if len(continuation.encode()) <= WINDOW:
        assert row['logprob'][i] == pytest.approx(plain(model, context, continuation), rel=1e-5, abs=1e-5)
        compared += 1
      assert row['bytes'][i] == row['tokens'][i] == len(continuation.encode())
  assert compared > 90


def test_what_is_derived_follows_from_the_likelihoods(items, table):
  assert list(table['doc']) == [item.id.encode() for item in items]
  for item, (_, row) in zip(items, table.iterrows(), strict=True):
    n = len(item.continuations)
    assert (row['answer'], row['n_choices'], row['group']) == (item.answer, n, item.group)
    logprob, n_bytes = row['logprob'][:n], row['bytes'][:n]
    assert all(np.isneginf(row['logprob'][n:])) and not any(row['bytes'][n:]) and not any(row['tokens'][n:])
    assert row['correct'] == (row['predicted'] == item.answer)
    assert row['correct_norm'] == (row['predicted_norm'] == item.answer)
    if item.kind != 'last_word':
      assert row['predicted'] == logprob.argmax() and row['predicted_norm'] == (logprob / n_bytes).argmax()
      best_other = max(value for i, value in enumerate(logprob) if i != item.answer)
      assert row['margin'] == pytest.approx(logprob[item.answer] - best_other)
      assert row['correct'] == (row['margin'] > 0) and row['chance'] == 1 / n
  kinds = table[[item.kind != 'last_word' for item in items]]
  assert (kinds['predicted'] != kinds['predicted_norm']).any()
  assert choices.summarize(table) == {
    'accuracy': table['correct'].mean(),
    'accuracy_norm': table['correct_norm'].mean(),
    'chance': table['chance'].mean(),
  }


class Latin(Tokenizer):
  """One token for each character below 256."""

  def encode_batch(self, texts):
    return [np.frombuffer(text.encode('latin-1'), np.uint8).astype(np.int32) for text in texts]


def written(model: Scored, context: str, n: int) -> str:
  """The n characters that the model would write."""
  tokens = [256, *context.encode('latin-1')]
  for _ in range(n):
    tokens.append(int(logits(model, tokens)[-1].argmax()))
  return bytes(tokens[-n:]).decode('latin-1')


def test_the_last_word_counts_where_the_model_would_write_it_whole(model, tmp_path):
  (item,) = items_of(tmp_path, {'text': 'he sat on chairs'})
  word = written(model, 'he sat on', 3)
  almost = word[:-1] + chr((ord(word[-1]) + 1) % 256)
  found = scored(model, [item._replace(continuations=(text,)) for text in (word, almost)], Latin())
  assert list(found['predicted']) == [0, -1]
  assert list(found['correct']) == list(found['correct_norm']) == [1.0, 0.0]
  assert found['margin'].isna().all() and not found['chance'].any()
  assert found['logprob'][0][0] > found['logprob'][1][0]


def test_white_space_at_a_contexts_end_goes_to_the_continuation(model, tmp_path):
  glued, apart = {'context': 'It is ', 'choices': ['so.', 'no.']}, {'context': 'It is', 'choices': [' so.', ' no.']}
  a, b = (scored(model, items_of(tmp_path, record | {'answer': 0})) for record in (glued, apart))
  np.testing.assert_array_equal(a['logprob'][0], b['logprob'][0])
  assert list(a['tokens'][0]) == [4, 4] and list(a['bytes'][0]) == [3, 3]  # bytes are the choice's own


def test_tokens_of_the_continuation_are_those_after_the_contexts(tmp_path):
  tokenizer = train_bpe(['the cat sat on the mat ' * 50], 300)
  record = {'context': 'on the', 'choices': [' cat sat', ' mat'], 'answer': 0}
  merged = {'context': 'the ca', 'choices': ['t', 'n'], 'answer': 0}
  for tokens, first in choices._encode(items_of(tmp_path, record), tokenizer):
    assert tokens[0] == tokenizer.separator_id
    assert tokenizer.decode(tokens[1 : first + 1]) == 'on the'
    assert tokenizer.decode(tokens[first + 1 :]) in record['choices']
  # " cat" is one token, " ca" is three: nothing is left after as many as the context's, so what differs from it counts.
  (tokens, first), _ = choices._encode(items_of(tmp_path, merged), tokenizer)
  assert len(tokens) - 1 < len(tokenizer.encode_batch(['the ca'])[0])
  assert tokenizer.decode(tokens[first + 1 :]) == ' cat'


def test_a_continuation_without_tokens_is_refused(model, tmp_path):
  class Deaf(Tokenizer):
    def encode_batch(self, texts):
      return super().encode_batch([text.replace('?', '') for text in texts])

  with pytest.raises(UserError, match=r"no token of '\?' after 'what'"):
    scored(model, items_of(tmp_path, {'context': 'what', 'choices': ['?', '!'], 'answer': 0}), Deaf())


@pytest.mark.parametrize('window', [9, 16])
def test_a_context_longer_than_the_window_loses_its_oldest_tokens(model, tmp_path, window):
  record = {'context': 'a long story of cats', 'choices': [' and mats', ' or'], 'answer': 0}
  found = scored(model, items_of(tmp_path, record), window=window)['logprob'][0]
  expected = [plain(model, record['context'], choice, window) for choice in record['choices']]
  np.testing.assert_allclose(found, expected, rtol=1e-5)
  kept = items_of(tmp_path, record | {'context': record['context'][-window:]})
  np.testing.assert_allclose(scored(model, kept, window=window)['logprob'][0], expected, rtol=1e-5)


@pytest.mark.parametrize('window', [1, 7, 20])
def test_a_continuation_longer_than_the_window_is_scored_in_windows_each_token_once(model, tmp_path, window):
  context, choice = 'so it was', ' that all of them went home again'
  found = scored(model, items_of(tmp_path, {'context': context, 'choices': [choice, ' x'], 'answer': 0}), window=window)
  assert found['tokens'][0][0] == len(choice)
  tokens = np.asarray([256, *context.encode(), *choice.encode()])
  first, n, half = len(context), len(tokens) - 1, window // 2
  total, start, done = 0.0, max(0, first - half), first
  while done < n:  # a window of context and all; each next one a stride of half a window later, the last one flush
    end = min(start + window, n)
    total += dense(model, tokens[start : end + 1].tolist())[done - start :].sum()
    start, done = min(start + max(1, half), n - window), end
  assert found['logprob'][0][0] == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize('window', [16, 32, 40, 64, 100])
def test_rows_of_like_length_share_few_shapes(items, window):
  requests = list(choices._encode(items, Tokenizer()))
  rows = [row for i, request in enumerate(requests) for row in likelihood._rows(i, *request, window)]
  batches = list(likelihood._batches(rows, window, 4, 2))
  shapes = {batch.tokens_RxL.shape for batch in batches}
  lengths = [length for _, length in shapes]
  assert len(set(lengths)) == len(lengths) <= 1 + max(0, math.ceil(math.log2(window / likelihood.SHORTEST)))
  assert set(lengths) <= {16, 32, 64, window}
  for n_rows, length in shapes:
    assert n_rows % 2 == 0 and n_rows * length < 4 * window + 2 * length
  assert sum(int((batch.labels_RxL >= 0).sum()) for batch in batches) == sum(
    len(t) - 1 - first for t, first in requests
  )


@pytest.mark.parametrize('batch_size', [1, 7, 32])
def test_the_batch_size_changes_nothing(model, items, table, batch_size):
  found = scored(model, items, batch_size=batch_size)
  np.testing.assert_allclose(np.stack(found['logprob']), np.stack(table['logprob']), rtol=1e-5, atol=1e-5)
  np.testing.assert_array_equal(found['predicted'], table['predicted'])


def test_the_length_that_a_row_is_padded_to_changes_nothing(model, items):
  """At window 62 the longer rows are padded to 62 tokens, at 100 to 64."""
  lengths = lambda item: [len((a + b).encode()) for a, b in zip(item.contexts, item.continuations, strict=True)]
  items = [item for item in items if max(lengths(item)) <= 62]
  assert len(items) > 20 and max(max(lengths(item)) for item in items) > 32
  one, two = (np.stack(scored(model, items, window=window)['logprob']) for window in (62, 100))
  np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('shape', [(1, 8, 1), (2, 2, 2)])
def test_the_mesh_changes_nothing(model, items, table, shape):
  on = mesh(*shape)
  placed = model._replace(params=jax.device_put(model.params, sharding.param_shardings(model.params, on)))
  found = scored(placed, items, on=on)
  np.testing.assert_allclose(np.stack(found['logprob']), np.stack(table['logprob']), rtol=1e-5, atol=1e-5)
  np.testing.assert_array_equal(found['predicted'], table['predicted'])


def test_a_result_file_holds_all_of_it(tmp_path, table):
  meta = {'kind': 'task', **choices.summarize(table)}
  results.write_result(tmp_path / 'x.parquet', table, meta)
  found, found_meta = results.read_result(tmp_path / 'x.parquet')
  assert found_meta == meta
  pd.testing.assert_frame_equal(found, table, check_dtype=False)


# A real model on real items.


class StoriesTokenizer:
  """llama2.c's: from characters up, the pair with the least id is merged first; a space stands before the text."""

  separator_id = stories.BOS

  def __init__(self, pieces: list[bytes]):
    self._ids = {piece: i for i, piece in enumerate(pieces) if i > 2}

  def encode_batch(self, texts):
    return [np.asarray(self._encode(text), np.int32) for text in texts]

  def _encode(self, text: str) -> list[int]:
    parts = [character.encode() for character in f' {text}'] if text else []
    while merges := [(self._ids.get(a + b, 1 << 30), i) for i, (a, b) in enumerate(itertools.pairwise(parts))]:
      best, i = min(merges)
      if best == 1 << 30:
        break
      parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return [i for part in parts for i in ([self._ids[part]] if part in self._ids else [3 + byte for byte in part])]


@pytest.fixture(scope='module')
def real() -> tuple[Scored, StoriesTokenizer]:
  if not TASKS.exists() or not stories.FOLDER.exists():
    pytest.skip(f'no real data here ({TASKS}, {stories.FOLDER})')
  config, params = stories.load(stories.FOLDER / 'stories260K.bin')
  pieces = stories.load_pieces(stories.FOLDER / 'tok512.bin', config.vocab_size)
  return Scored(build(config), params), StoriesTokenizer(pieces)


def test_a_real_model_would_write_each_word_of_its_own_story_and_prefers_it(real, tmp_path):
  words = TEXT.split()
  ends = [' '.join(words[: i + 1]) for i in range(1, len(words))]
  found = scored(real[0], items_of(tmp_path, *({'text': text} for text in ends)), real[1], window=64)
  assert found['correct'].all()
  swapped = [' '.join([*words[:i], words[i + 1], words[i], *words[i + 2 :]]) for i in range(len(words) - 1)]
  found = scored(real[0], items_of(tmp_path, *({'good': TEXT, 'bad': text} for text in swapped)), real[1], window=64)
  assert found['correct'].all() and (found['margin'] > 1).all()


def test_a_real_model_knows_some_grammar(real):
  """An easy paradigm of BLiMP; over all of them so small a model is only just above chance (0.52)."""
  items = [
    item
    for item in choices.read_choices(str(TASKS / 'blimp.jsonl.xz'))
    if item.group == 'irregular_past_participle_verbs'
  ]
  found = scored(real[0], items[:300], real[1], window=128, batch_size=32)
  assert 0.8 < found['correct'].mean() < 1, choices.summarize(found)


@pytest.mark.skipif(not TASKS.exists(), reason=f'no real data here ({TASKS})')
def test_every_real_task_is_read():
  sizes = {path.name.split('.')[0]: len(choices.read_choices(str(path))) for path in sorted(TASKS.glob('*.jsonl.xz'))}
  assert len(sizes) == 10 and min(sizes.values()) >= 99, sizes


# The config, the eval job and its table.


def test_tasks_are_named_on_the_command_line(tmp_path):
  config = tiny.config_dict(tmp_path)
  assert config_lib.override(config, {'eval.tasks.blimp': 'a/b.jsonl.xz', 'eval.max_items': '5'}) == []
  evals = config_lib.resolve(config).eval
  assert (evals.tasks, evals.max_items) == ({'blimp': 'a/b.jsonl.xz'}, 5)


@pytest.mark.parametrize(
  ('fields', 'problem'),
  [
    ({'eval.tasks.far': 'x.jsonl'}, 'eval.tasks.far: eval.ood has a set of that name'),
    ({'eval.tasks.validation': 'x.jsonl'}, 'eval.tasks.validation: that is the name of a set of data.source'),
    ({'eval.ood.in-domain': 'x.jsonl'}, 'eval.ood.in-domain: that is the name of a set of data.source'),
    ({'eval.tasks.a/b': 'x.jsonl'}, "eval.tasks: the task name 'a/b' is invalid"),
    ({'eval.tasks.mine': ' '}, 'eval.tasks.mine: must name a file'),
    ({'eval.max_items': -1}, 'eval.max_items: must be at least 0'),
  ],
)
def test_names_that_clash_are_config_errors(tmp_path, fields, problem):
  with pytest.raises(ConfigError) as e:
    tiny.config(tmp_path, **fields)
  assert len(e.value.problems) == 1 and e.value.problems[0].startswith(problem), e.value.problems


def test_tasks_do_not_change_the_corpus(tmp_path):
  plain_, with_tasks = (
    tiny.config(tmp_path, **fields) for fields in ({}, {'eval.tasks.mine': 'x.jsonl', 'eval.max_items': 3})
  )
  assert (
    prepare(plain_.data, plain_.eval, plain_.runs, False).folder
    == prepare(with_tasks.data, with_tasks.eval, with_tasks.runs, False).folder
  )


@pytest.fixture(scope='module')
def experiment(main_job, tmp_path_factory) -> tuple[pathlib.Path, str]:
  """(A finished run whose eval job has two tasks more, its table)."""
  home = tmp_path_factory.mktemp('experiment')
  shutil.copytree(main_job / 'runs', home / 'runs')
  (folder,) = (home / 'runs').glob('tiny-*')
  known = read_json(folder / 'experiment.json')
  known['resolved']['eval'] |= {
    'tasks': {'mixed': write(home / 'mixed.jsonl', many(30)), 'pairs': write(home / 'pairs.jsonl', [PAIR] * 2)},
    'max_items': 20,
  }
  write_json(folder / 'experiment.json', known)
  return folder, evaluate(folder)


def evaluate(folder: pathlib.Path) -> str:
  job, on = jobs.find_job(folder), mesh()
  with jax.set_mesh(on):
    jobs.evaluate(job, prepare(job.config.data, job.config.eval, job.config.runs, False), on, progress=False)
  return tables.write_table(folder)


def read_task(folder: pathlib.Path, arm: str, name: str = 'mixed'):
  return results.read_result(folder / read_json(folder / 'evaluation.json')[arm][name])


def test_the_job_writes_a_file_for_each_task(experiment):
  folder, _ = experiment
  job = jobs.find_job(folder)
  for arm in ('teacher', 'baseline', 'distilled', 'unigram'):
    found, meta = read_task(folder, arm)
    assert len(found) == 20
    assert {'kind': 'task', 'set': 'mixed', 'window': 16, **choices.summarize(found)}.items() <= meta.items()
    assert meta.keys() >= {'version', 'run', 'step', 'weights', 'items', 'tokenizer'}
  items = choices.read_tasks(job.config.eval.tasks, job.config.eval.max_items)['mixed']
  assert list(read_task(folder, 'baseline')[0]['doc']) == [item.id.encode() for item in items]


def test_evaluating_again_changes_no_file_and_other_items_are_another_result(experiment, tmp_path):
  folder, _ = experiment
  times = {path: path.stat().st_mtime_ns for path in folder.parent.rglob('*.parquet')}
  evaluate(folder)
  assert {path: path.stat().st_mtime_ns for path in folder.parent.rglob('*.parquet')} == times
  job = jobs.find_job(folder)
  key = lambda n: jobs._task(
    job, job.runs[0], 1, 'w', '', 'mixed', choices.ChoiceSet(items_of(tmp_path, *many(n)), Tokenizer()), ''
  )
  assert key(5).file != key(6).file and key(5).file == key(5).file


def test_the_table_of_accuracies_stands_apart(experiment):
  folder, text = experiment
  part = text[text.index('accuracy (per byte normalised)') :].split('\nPaired by item')[0]
  lines = {line.split('  ')[0]: line for line in part.splitlines()}
  assert part.splitlines()[0].split()[-2:] == ['mixed', 'pairs']
  for arm in ('teacher', 'baseline', 'distilled', 'unigram'):
    _, meta = read_task(folder, arm)
    assert f'{meta["accuracy"]:.3f} ({meta["accuracy_norm"]:.3f})' in lines[arm]
  assert '0.500' in lines['chance'].split()[-1]
  for label, column in (('', 'correct'), (', per byte', 'correct_norm')):
    ours, base = (read_task(folder, arm)[0][column] for arm in ('distilled', 'baseline'))
    estimate, low, high, *_ = ratio_interval(ours - base, np.ones(20))
    assert f'{estimate:+.4f} [{low:+.4f}, {high:+.4f}]' in lines[f'distilled less the baseline{label}']
  assert 'Items: mixed 20, pairs 1.' in text
  head = text[: text.index('accuracy (per byte')]
  assert 'mixed' not in head and 'pairs' not in head


def test_accuracies_are_compared_item_by_item():
  def cell(run: str, correct: dict[str, int]) -> tables.Cell:
    table = pd.DataFrame({'doc': [doc.encode() for doc in correct], 'correct': [float(c) for c in correct.values()]})
    return tables.Cell(table, {'set': 'mixed', 'run': run})

  base = cell('baseline', {'a': 0, 'b': 1, 'c': 0, 'd': 1})
  better = cell('distilled', {'d': 1, 'c': 0, 'b': 1, 'a': 1})
  found = tables.accuracy_difference(better, base)
  assert found[:4] == pytest.approx(ratio_interval([1, 0, 0, 0], np.ones(4))[:4]) and found.over == 'documents'
  assert tables.accuracy_difference(better, base).estimate == 0.25
  with pytest.raises(UserError, match='set mixed: distilled and baseline were scored on other documents'):
    tables.accuracy_difference(cell('distilled', {'a': 1, 'b': 1, 'c': 0, 'e': 1}), base)


def test_likelihoods_are_as_without_tasks(experiment, main_job):
  folder, _ = experiment
  (before,) = (main_job / 'runs').glob('tiny-*')
  frame, old = pd.read_csv(folder / 'results.csv'), pd.read_csv(before / 'results.csv')
  text = frame[frame['kind'] == 'text'].reset_index(drop=True)
  pd.testing.assert_frame_equal(text, old)
  assert text['accuracy'].isna().all()
  tasks = frame[frame['kind'] == 'task']
  assert len(tasks) == 4 * 2 and tasks['bits_per_byte'].isna().all()
  for _, row in tasks.iterrows():
    _, meta = read_task(folder, row['arm'], row['set'])
    assert (row['accuracy'], row['accuracy_norm']) == pytest.approx((meta['accuracy'], meta['accuracy_norm']))
  cells = tables.load_cells(jobs.find_job(folder))
  assert all(set(sets) == {'in-domain', 'far', 'further'} for sets in cells.values())


def score_sets(folder: pathlib.Path, *names: str):
  job, on = jobs.find_job(folder), mesh()
  corpus = prepare(job.config.data, job.config.eval, job.config.runs, False)
  run = RunFolder(folder / 'students' / 'baseline')
  with jax.set_mesh(on):
    return corpus, jobs.score_missing(job, [(run, tiny.STEPS)], corpus, on, False, sets=names)


def test_the_validation_split_is_a_set_where_it_is_named(experiment):
  folder, _ = experiment
  assert all('validation' not in sets for sets in read_json(folder / 'evaluation.json').values())
  corpus, (task,) = score_sets(folder, jobs.VALIDATION)
  found, meta = results.read_result(task.file)
  assert list(found['doc']) == list(corpus.validation.doc_ids) and meta['set'] == 'validation'


def test_named_sets_are_scored_and_no_others(experiment):
  folder, _ = experiment
  _, tasks = score_sets(folder, 'pairs', 'in-domain')
  assert [task.name for task in tasks] == ['in-domain', 'pairs']
  with pytest.raises(UserError, match=r'no set is named fur; there are in-domain, validation, .*further, mixed, pairs'):
    score_sets(folder, 'fur')


def test_a_tasks_file_that_is_gone_is_one_line(experiment, tmp_path):
  folder, _ = experiment
  shutil.copytree(folder.parent, tmp_path / 'runs')
  (copy,) = (tmp_path / 'runs').glob('tiny-*')
  known = read_json(copy / 'experiment.json')
  known['resolved']['eval']['tasks'] = {'gone': 'gone.jsonl'}
  write_json(copy / 'experiment.json', known)
  with pytest.raises(UserError, match=r"^eval\.tasks\.gone: .*'gone\.jsonl' matches no file"):
    score_sets(copy, 'gone')
