"""Files of documents: accepted and refused input, compared with other libraries' readers."""

import gzip
import io
import json
import lzma
import pathlib
import subprocess
import sys

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from array_record.python.array_record_module import ArrayRecordWriter

from kdjax.data import compressed
from kdjax.data.sources import documents, records
from kdjax.errors import UserError
from tests.data.helpers import REPO, write_jsonl

CASES = pathlib.Path(__file__).parent / 'cases'
SENTENCES = [f'document number {i} says hello world and some more words {7 * i}' for i in range(60)]


def read_error(source, text_field='text') -> str:
  with pytest.raises(UserError) as caught:
    list(documents(str(source), text_field))
  assert '\n' not in str(caught.value)
  return str(caught.value)


def skipping(source, text_field='text') -> tuple[list[str], int]:
  """Return (texts, number of skipped records)."""
  nulls: list[UserError] = []
  return list(documents(str(source), text_field, on_null=nulls.append)), len(nulls)


# ---- zstd


def zstd_frame(data: bytes, window_log: int) -> bytes:
  """Make a frame that requests this window, like a stream of unknown size."""
  parameters = zstandard.ZstdCompressionParameters(window_log=window_log, enable_ldm=True)
  compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
  frame = compressor.compress(data) + compressor.flush()
  assert zstandard.get_frame_parameters(frame).window_size == 1 << window_log
  return frame


def lines_of(texts) -> bytes:
  return b''.join(json.dumps({'text': text}).encode() + b'\n' for text in texts)


def test_a_file_made_with_a_long_window_is_read(tmp_path):
  path = CASES / 'long28.jsonl.zst'
  with zstandard.ZstdDecompressor(max_window_size=1 << 31).stream_reader(path.read_bytes()) as reader:
    expected = [json.loads(line)['text'] for line in io.TextIOWrapper(reader, encoding='utf-8')]
  assert list(documents(str(path))) == expected
  for window_log in (10, 27, 29, 31):
    (tmp_path / 'a.jsonl.zst').write_bytes(zstd_frame(lines_of(SENTENCES), window_log))
    assert list(documents(str(tmp_path / 'a.jsonl.zst'))) == SENTENCES


def skippable(content: bytes, number=0) -> bytes:
  return (0x184D2A50 + number).to_bytes(4, 'little') + len(content).to_bytes(4, 'little') + content


def test_frames_of_every_kind_follow_one_another(tmp_path):
  frames = [zstd_frame(lines_of(SENTENCES[i::3]), window) for i, window in enumerate((17, 30, 21))]
  data = skippable(b'') + frames[0] + skippable(b'a note', 15) + frames[1] + frames[2] + skippable(bytes(99_999))
  (tmp_path / 'a.jsonl.zst').write_bytes(data)
  assert list(documents(str(tmp_path / 'a.jsonl.zst'))) == [*SENTENCES[::3], *SENTENCES[1::3], *SENTENCES[2::3]]


def test_text_that_a_few_bytes_stand_for_is_read_at_once(tmp_path):
  text = 'the same again ' * 2_000_000
  (tmp_path / 'a.txt.zst').write_bytes(zstandard.compress(text.encode()))
  assert list(documents(str(tmp_path / 'a.txt.zst'))) == [text]


def with_dictionary() -> bytes:
  samples = [json.dumps({'id': i, 'text': sentence}).encode() for i, sentence in enumerate(SENTENCES * 20)]
  return zstandard.ZstdCompressor(dict_data=zstandard.train_dictionary(2048, samples)).compress(samples[0])


WIDE = b'\x28\xb5\x2f\xfd\x00' + bytes([22 << 3]) + bytes([1, 0, 0])  # an empty frame with a window of 4 GiB


@pytest.mark.parametrize(
  ('damage', 'said'),
  [
    (lambda b: b[: len(b) // 2], 'damaged (it ends in the middle of a frame); fetch it again'),
    *((lambda b, n=n: b[:n], 'the compressed file is damaged') for n in range(1, 10)),
    (lambda b: b[:-1], 'damaged (it ends in the middle of a frame)'),
    (lambda b: b[:40] + bytes([b[40] ^ 255]) + b[41:], 'the compressed file is damaged'),
    (lambda b: b + b'garbage', 'the compressed file is damaged'),
    (lambda b: b + bytes(64), 'the compressed file is damaged'),
    (
      lambda b: WIDE,
      'needs a window of 4,294,967,296 bytes, but zstd supports at most 2,147,483,648; compress it with',
    ),
    (lambda b: with_dictionary(), 'compressed with a dictionary'),
  ],
)
def test_a_zstd_file_that_cannot_be_read_says_why(tmp_path, damage, said):
  whole = zstandard.ZstdCompressor(write_checksum=True).compress(lines_of(SENTENCES))
  (tmp_path / 'a.jsonl.zst').write_bytes(damage(whole))
  assert said in read_error(tmp_path / 'a.jsonl.zst')


PACK = {'.gz': gzip.compress, '.xz': lzma.compress, '.zst': zstandard.compress}
NAMES = {'.gz': 'gzip', '.xz': 'xz', '.zst': 'zstd'}


@pytest.mark.parametrize('suffix', ['.jsonl', '.jsonl.zst', '.jsonl.gz', '.jsonl.xz', '.txt', '.txt.zst'])
def test_a_document_that_would_fill_the_memory_is_refused(tmp_path, monkeypatch, suffix):
  """A few kilobytes of zstd can stand for gigabytes without a line's end."""
  monkeypatch.setattr(compressed, 'LONGEST', 100_000)
  path = tmp_path / f'bomb{suffix}'
  data = b'{"text": "a"}\n{"text": "' + b'x' * 5_000_000
  pack = {'.zst': zstandard.ZstdCompressor().compress, '.gz': gzip.compress, '.xz': lzma.compress}
  path.write_bytes(pack.get(path.suffix, bytes)(data))
  where = r'bomb\S*:2: ' if '.jsonl' in suffix else r'bomb\S*: '
  with pytest.raises(UserError, match=where + 'a single document of more than 100,000 bytes, decompressed; split it'):
    list(documents(str(path)))


@pytest.mark.parametrize('suffix', PACK)
@pytest.mark.parametrize('kind', ['.jsonl', '.txt'])
def test_a_name_that_lies_about_compression_is_told_from_damage(tmp_path, suffix, kind):
  data = lines_of(SENTENCES)
  plain, packed = tmp_path / f'a{kind}', tmp_path / f'b{kind}{suffix}'
  plain.write_bytes(PACK[suffix](data))
  packed.write_bytes(data)
  assert f'a{kind}: it begins like a {NAMES[suffix]} file; name it ...{suffix}' in read_error(plain)
  assert f'misnamed: it begins with plain text; fetch it again, or remove {suffix} from its name' in read_error(packed)
  for other in set(PACK) - {suffix}:
    packed.write_bytes(PACK[other](data))
    assert f'misnamed: it begins like a {NAMES[other]} file; name it ...{other}' in read_error(packed)
  with pytest.raises(UserError, match='begins like a'):
    list(records(str(write_as(tmp_path / 'c.jsonl', PACK[suffix](data)))))


def write_as(path, data: bytes):
  path.write_bytes(data)
  return path


# ---- JSON lines


@pytest.mark.parametrize('name', ['deep.jsonl'])
def test_json_that_is_nested_too_deeply_is_named_by_file_and_line(name, tmp_path):
  assert f'{name}:2: not JSON (nested too deeply); each line must be one JSON object' in read_error(CASES / name)
  with pytest.raises(UserError, match=f'{name}:2: not JSON'):
    list(records(str(CASES / name)))
  for deep in (b'{"a":' * 200_000, b'[' * 200_000, b'{"text": ' + b'[' * 99_999 + b']' * 99_999 + b'}'):
    path = write_as(tmp_path / 'b.jsonl', b'{"text": "a"}\n' + deep + b'\n')
    assert 'b.jsonl:2: not JSON (nested too deeply)' in read_error(path)
    path = tmp_path / 'c.array_record'
    writer = ArrayRecordWriter(str(path), 'group_size:1')
    writer.write(b'{"text": "a"}'), writer.write(deep), writer.close()
    assert 'c.array_record, record 1: not JSON (nested too deeply)' in read_error(path)
  writer = ArrayRecordWriter(str(path), 'group_size:1')
  writer.write(b'{"a":' * 200_000), writer.close()
  assert 'c.array_record, record 0: not JSON (nested too deeply)' in read_error(path)


def test_deep_json_ends_a_command_in_one_line_and_code_2(tmp_path):
  command = [sys.executable, '-m', 'kdjax.prepare', '--config=configs/weak2strong.py']
  command += [f'--config.data.source={CASES / "deep.jsonl"}', f'--config.runs={tmp_path}']
  done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
  assert done.returncode == 2 and 'Traceback' not in done.stderr
  assert 'deep.jsonl:2: not JSON' in done.stderr.splitlines()[-1]


GOOD = [
  ('numbers of any length', b'{"text": "a", "n": ' + b'9' * 5000 + b'}\n{"text": "b", "x": -1' + b'0' * 9999 + b'}\n'),
  ('what Python writes for floats', b'{"text": "a", "n": NaN}\n{"text": "b", "n": [Infinity, -Infinity]}\n'),
  ('a mark at the start', b'\xef\xbb\xbf{"text": "a"}\n{"text": "b"}\n'),
  ('a mark within, as in joined files', b'{"text": "a"}\n\xef\xbb\xbf{"text": "b"}\n'),
  ('blank lines', b'\n  \n{"text": "a"}\n\r\n\t\n{"text": "b"}\n\n'),
  ('no end of the last line', b'{"text": "a"}\n{"text": "b"}'),
  ('ends of Windows', b'{"text": "a"}\r\n{"text": "b"}\r\n'),
  ('ends of old Macs', b'{"text": "a"}\r{"text": "b"}\r'),
  ('ends of all kinds', b'{"text": "a"}\r\r\n{"text":\r "b"}'),
  ('escaped halves of a character elsewhere', b'{"text": "a", "id": "\\ud800"}\n{"text": "b", "\\udfff": 1}\n'),
  ('a field twice: the last counts', b'{"text": "z", "text": "a"}\n{"text": "b"}\n'),
]


@pytest.mark.parametrize(('what', 'data'), GOOD, ids=[what for what, _ in GOOD])
def test_json_lines_are_read_whatever_wrote_them(tmp_path, what, data):
  path = write_as(tmp_path / 'a.jsonl', data)
  assert list(documents(str(path))) == ['a', 'b']
  assert [record['text'] for _, record in records(str(path))] == ['a', 'b']


def test_pandas_reads_the_same_lines(tmp_path):
  texts = ['plain', 'ü\u2028\x85\u0085', 'a\r\nb\tc\x00', '😀 and \\ud83d', '']
  pd.DataFrame({'text': texts, 'n': range(5)}).to_json(tmp_path / 'a.jsonl', orient='records', lines=True)
  pd.DataFrame({'text': texts}).to_json(tmp_path / 'b.jsonl.gz', orient='records', lines=True, force_ascii=False)
  assert list(documents(f'{tmp_path}/a.jsonl')) == list(documents(f'{tmp_path}/b.jsonl.gz')) == texts


BAD = [
  (b'{"text": "a"}\n{"text": "b"', ['a.jsonl:2: not JSON (', 'at column 13']),
  (b'{"text": "a"}\n{"text": "b"} {"text": "c"}\n', ['a.jsonl:2: not JSON (Extra data at column 15)']),
  (b'{"text": "a"}\r{"text": "b"}\r[1]\r', ['a.jsonl:3: not a JSON object but a list']),
  (b'\n{"text": "a"}\r\n\n{"text"}\n', ['a.jsonl:4: not JSON']),
  (b'{"text": "a"}\n"text"\n', ['a.jsonl:2: not a JSON object but a str']),
  (b'{"text": "a"}\nnull\n', ['a.jsonl:2: not a JSON object but a NoneType']),
  (b'{"text": "a"}\n' + b'8' * 6000 + b'\n', ['a.jsonl:2: not a JSON object but a Decimal']),
  (b'{"text": ' + b'7' * 6000 + b'}\n', ["a.jsonl:1: field 'text' holds a Decimal, not a string"]),
  (b'{"text": "a\x00b"}\n', ['a.jsonl:1: not JSON (Invalid control character']),
  (bytes(4096), ['a.jsonl:1: not JSON']),
  (b'{"text": "a"}\n{"text": "\\udc80 b"}\n', ['a.jsonl:2: character 0 of the text is half a surrogate pair']),
  (lines_of('ab').decode().encode('utf-16'), ['a.jsonl: not UTF-8 but UTF-16']),
  (lines_of('ab').decode().encode('utf-16-be'), ['a.jsonl: not UTF-8 but UTF-16']),
  (lines_of('ab').decode().encode('utf-32-le'), ['a.jsonl: not UTF-8 but UTF-16 or UTF-32']),
  ('{"text": "ü"}\n'.encode('latin-1'), ['a.jsonl: not UTF-8 at byte 10 (0xfc)']),
  (
    b'{"body": 1, ' + b', '.join(b'"f%02d": 0' % i for i in range(99)) + b'}\n',
    ["no field 'text'", "'f18', ... 100 in"],
  ),
]


@pytest.mark.parametrize(('data', 'words'), BAD)
def test_json_lines_that_are_refused_say_where_and_why(tmp_path, data, words):
  path = write_as(tmp_path / 'a.jsonl', data)
  error = read_error(path)
  assert all(word in error for word in words), error


def test_a_text_file_in_utf_16_is_named_as_such(tmp_path):
  for encoding in ('utf-16', 'utf-16-le', 'utf-32-be'):
    path = write_as(tmp_path / 'a.txt', 'some English text\n'.encode(encoding))
    assert 'a.txt: not UTF-8 but UTF-16 or UTF-32; convert the file to UTF-8' in read_error(path)


# ---- Parquet


COLUMNS = {'text': ['one', 'zwei ü', ''], 'title': ['a', 'b', 'c'], 'n': [1, 2, 3]}


def write_parquet(path, columns=COLUMNS) -> str:
  pq.write_table(pa.table(columns), path, row_group_size=2)
  return str(path)


def test_parquet_is_read_by_column(tmp_path):
  path = write_parquet(tmp_path / 'a.parquet')
  assert list(documents(path)) == COLUMNS['text']
  assert list(documents(path, 'title')) == COLUMNS['title']
  assert "no column 'body'; it has ['n', 'text', 'title']; set data.text_field" in read_error(path, 'body')
  assert "column 'n' holds int64, not strings" in read_error(path, 'n')
  for damage in (b'', b'PAR1', (tmp_path / 'a.parquet').read_bytes()[:-20]):
    (tmp_path / 'c.parquet').write_bytes(damage)
    assert 'c.parquet: the Parquet file is damaged' in read_error(tmp_path / 'c.parquet')


@pytest.mark.parametrize('name', ['sv', 'dict', 'binary'])
def test_the_cases_are_what_pandas_reads(name):
  path = CASES / f'{name}.parquet'
  expected = [t.decode() if isinstance(t, bytes) else t for t in pd.read_parquet(path)['text']]
  assert list(documents(str(path))) == expected == SENTENCES


BYTES = [b'one', 'zwei ü 😀'.encode(), b'', None, b'one']
CATEGORIES = pa.DictionaryArray.from_arrays(pa.array([1, 0, 2, None, 1]), pa.array(['zwei ü 😀', 'one', '']))


@pytest.mark.parametrize(
  'column',
  [
    *(pa.array([b and b.decode() for b in BYTES], kind) for kind in (pa.string(), pa.large_string(), pa.string_view())),
    *(pa.array(BYTES, kind) for kind in (pa.binary(), pa.large_binary(), pa.binary_view())),
    pa.array(BYTES).dictionary_encode(),
    CATEGORIES,
    CATEGORIES.cast(pa.dictionary(pa.int8(), pa.large_string())),
    pa.chunked_array([CATEGORIES, CATEGORIES.dictionary_encode()]).slice(5),
  ],
  ids=lambda column: str(column.type),
)
def test_every_kind_of_string_column_is_read(tmp_path, column):
  path = write_parquet(tmp_path / 'a.parquet', {'id': range(5), 'text': column})
  assert skipping(path) == (['one', 'zwei ü 😀', '', 'one'], 1)
  assert "a.parquet, row 4: column 'text' is null; set data.nulls=skip" in read_error(path)


def test_pandas_categories_with_missing_values_are_read(tmp_path):
  texts = [*SENTENCES[:5], None, *SENTENCES[:3]] * 100
  pd.DataFrame({'text': pd.Series(texts, dtype='category')}).to_parquet(tmp_path / 'a.parquet', row_group_size=70)
  assert skipping(tmp_path / 'a.parquet') == ([t for t in texts if t is not None], 100)


@pytest.mark.parametrize(
  ('column', 'kind'),
  [
    (pa.array([['a'], ['b']]), 'list'),
    (pa.array([{'a': 'b'}, None]), 'struct'),
    (pa.array([[('a', 'b')], []], pa.map_(pa.string(), pa.string())), 'map'),
    (pa.array([5, 6]).dictionary_encode(), 'int64'),
    (pa.array([1.5, 2]), 'double'),
    (pa.array([True, False]), 'bool'),
  ],
)
def test_a_column_of_another_type_is_refused_by_its_name(tmp_path, column, kind):
  path = write_parquet(tmp_path / 'a.parquet', {'text': column})
  error = read_error(path)
  assert f"a.parquet: column 'text' holds {kind}" in error and 'not strings; set data.text_field' in error


@pytest.mark.parametrize('kind', [pa.binary(), pa.string(), pa.large_string(), 'dictionary'])
def test_a_value_that_is_not_utf8_is_named_by_file_and_row(tmp_path, kind):
  column = pa.array([b'fine'] * 300 + [b'caf\xe9'])
  if kind == 'dictionary':
    column = column.view(pa.string()).dictionary_encode()
  elif kind != pa.binary():
    column = column.view(pa.string()) if kind == pa.string() else pa.array(column, pa.large_binary()).view(kind)
  path = write_parquet(tmp_path / 'a.parquet', {'text': column})
  assert 'a.parquet, row 301: not UTF-8 at byte 3 (0xe9); convert' in read_error(path)


def test_columns_whose_names_have_dots_or_are_there_twice(tmp_path):
  struct = pa.array([{'b': 'inner'}])
  pq.write_table(pa.table([struct, pa.array(['outer'])], ['a', 'a.b']), tmp_path / 'a.parquet')
  assert list(documents(str(tmp_path / 'a.parquet'), 'a.b')) == ['outer']
  pq.write_table(pa.table([pa.array(['x']), pa.array(['y'])], ['text', 'text']), tmp_path / 'b.parquet')
  assert "b.parquet: several columns are named 'text'" in read_error(tmp_path / 'b.parquet')


# ---- records without text


def test_a_null_is_an_error_or_left_out_and_counted(tmp_path):
  path = CASES / 'null.parquet'
  assert "null.parquet, row 51: column 'text' is null; set data.nulls=skip to skip such records" in read_error(path)
  expected = pd.read_parquet(path)['text'].dropna().tolist()
  assert skipping(path) == (expected, 1) and len(expected) == 59
  lines = [{'text': 'a'}, {'text': None}, {'id': 3}, {'text': ''}, {'text': 'b', 'id': None}]
  path = write_as(tmp_path / 'a.jsonl', b''.join(json.dumps(line).encode() + b'\n' for line in lines))
  assert "a.jsonl:2: field 'text' is null; set data.nulls=skip" in read_error(path)
  assert skipping(path) == (['a', '', 'b'], 2)
  writer = ArrayRecordWriter(str(tmp_path / 'a.array_record'), 'group_size:1')
  for line in lines:
    writer.write(json.dumps(line).encode())
  writer.close()
  assert skipping(tmp_path / 'a.array_record') == (['a', '', 'b'], 2)
  assert 'a.array_record, record 1: ' in read_error(tmp_path / 'a.array_record')


def test_a_field_that_no_record_has_is_a_wrong_name_and_not_a_null(tmp_path):
  path = write_jsonl(tmp_path / 'a.jsonl', ['x', 'y'], 'body')
  with pytest.raises(UserError, match=r"a.jsonl:1: no field 'text'; it has \['body'\]; set data.text_field"):
    skipping(path)
  write_jsonl(tmp_path / 'b.jsonl', ['z'])
  assert skipping(f'{tmp_path}/*.jsonl') == (['z'], 2)
  assert skipping(write_parquet(tmp_path / 'c.parquet', {'text': pa.nulls(3)})) == ([], 3)


@pytest.mark.parametrize('value', [3, 1.5, True, ['a'], {'a': 1}])
def test_another_type_is_an_error_even_where_nulls_are_left_out(tmp_path, value):
  path = write_as(tmp_path / 'a.jsonl', json.dumps({'text': value}).encode())
  with pytest.raises(UserError, match=rf"a.jsonl:1: field 'text' holds a {type(value).__name__}, not a string"):
    skipping(path)
