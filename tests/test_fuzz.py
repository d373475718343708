"""Arbitrary wrong input from a user gives a UserError of one line, or exit code 2, and no traceback.

100 fixed examples in all. For more, random ones: KDJAX_FUZZ_EXAMPLES=2000 pytest tests/test_fuzz.py (2000 for each test).
"""

import contextlib
import copy
import gzip
import io
import json
import lzma
import math
import os
import pathlib
import shutil
import string

import ml_collections
import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from kdjax import aot, cli, convert, evaluate, generate, grid, harness, prepare, report, train
from kdjax import config as config_lib
from kdjax.config import Config, leaves
from kdjax.data import sources
from kdjax.data.tokenizer import Tokenizer
from kdjax.errors import ConfigError, UserError
from kdjax.scoring import choices, harness_tasks
from kdjax.sweeps import cells as cells_lib
from kdjax.sweeps import config as grid_config
from kdjax.sweeps import executors
from kdjax.sweeps.config import GridConfig
from kdjax.teachers import huggingface
from tests.teachers.huggingface.folders import MODELS, make

CONFIGS = pathlib.Path(__file__).parents[1] / 'configs'
EXAMPLES = int(os.environ.get('KDJAX_FUZZ_EXAMPLES', 9))
fuzz = settings(
  max_examples=EXAMPLES,
  deadline=None,
  derandomize='KDJAX_FUZZ_EXAMPLES' not in os.environ,
  database=None,
  suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)


@contextlib.contextmanager
def one_line_at_most():
  """A mistake raises a UserError of one line (a ConfigError: one line a problem), or exits with code 2 (--help: 0)."""
  out, err = io.StringIO(), io.StringIO()
  lines, code = ['nothing was raised'], 0
  try:
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
      yield
  except ConfigError as e:
    lines = e.problems
  except UserError as e:
    lines = [str(e)]
  except SystemExit as e:
    code = e.code
  assert all(line.strip() and '\n' not in line for line in lines) and lines, lines
  assert code in (0, 2) and 'Traceback' not in err.getvalue(), (code, err.getvalue())


# Common mistakes. No NUL: a command line cannot contain one.

WORDS = (
  '', ' ', '0', '1', '-1', '2', '3.5', '-0.5', '.5', '1e9', '1e400', '-1e400', 'nan', 'inf', '-inf', '9' * 25, '-' + '9' * 400, '9' * 5000, '0x10', '1_000',
  'true', 'None', 'null', '[]', '[1,', '()', '(1, 2)', '{}', 'a,b', ',', '=', '--', '-', '~', '~nobody/x', '/', '..', '../../x', '*', '[a-', '?',
  '@0.5', 'a@0', 'bytes', 'bpe', 'float32', 'wsd', 'runs', 'embedded:speeches', 'embedded:none', 'tfds:x', 'hf:', 'tokens:', 'é', '💥', '\udcff',
  '%s', '{x}', '$HOME', 'x' * 3000,
)  # fmt: skip
words = st.one_of(
  st.integers(-2, 20).map(str), st.sampled_from(WORDS), st.text(st.characters(exclude_characters='\0'), max_size=12)
)
numbers = st.one_of(st.integers(), st.floats(), st.sampled_from([0, 1, -1, 2**31, 2**63, 10**400, math.nan, math.inf]))
texts = st.text(st.characters(exclude_categories=['Cc', 'Zl', 'Zp']), max_size=12)
values = st.recursive(
  st.one_of(st.none(), st.booleans(), numbers, texts),
  lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)),
  max_leaves=6,
)


@st.composite
def misspelt(draw, names):
  """Draw a name, mostly unchanged, otherwise with a letter missing or added."""
  name = draw(st.sampled_from(names))
  at = draw(st.integers(0, len(name)))
  return draw(
    st.sampled_from(
      [name, name, name, name[:at] + name[at + 1 :], name[:at] + draw(st.sampled_from('.x-_= ')) + name[at:]]
    )
  )


# Configs.


def fields(kind: type) -> list[str]:
  return [name for name, _ in leaves(kind, '')]


OVERRIDES = st.dictionaries(misspelt([*fields(Config), 'eval.ood.mine', 'eval.tasks.mine']), words, max_size=4)


@fuzz
@given(st.sampled_from(['weak2strong.py', 'same_level.py', 'weak2strong.py:scale=paper']), OVERRIDES)
def test_overrides_of_a_config(spec, overrides):
  with one_line_at_most():
    config = cli.load_config(f'{CONFIGS}/{spec}', overrides)
    config_lib.fingerprint(config)


@st.composite
def spoilt(draw, tree, how=values):
  """Draw a nested value with a few parts dropped, swapped or replaced."""
  tree = copy.deepcopy(tree)
  for _ in range(draw(st.integers(1, 3))):
    places = list(_places(tree))
    if not places:
      return tree
    node, key = draw(st.sampled_from(places))
    match draw(st.sampled_from(['drop', 'replace', 'null', 'swap', 'rename'])):
      case 'drop':
        del node[key]
      case 'replace':
        node[key] = draw(how)
      case 'null':
        node[key] = None
      case 'swap':
        other, name = draw(st.sampled_from(places))
        node[key], other[name] = copy.deepcopy(other[name]), copy.deepcopy(node[key])
      case 'rename' if isinstance(node, dict):
        node[draw(texts)] = node.pop(key)
  return tree


def _places(tree):
  """Yield (container, key) of each part; only the first few of long lists and tables."""
  keys = list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else []
  for key in keys[:40]:
    yield tree, key
    yield from _places(tree[key])


def _plain(tree):
  return json.loads(json.dumps(tree))


@fuzz
@given(spoilt(_plain(config_lib.as_dict(Config()))))
def test_a_config_file_that_returns_anything(tree):
  try:
    config = ml_collections.ConfigDict(tree)
  except ValueError:  # a name with a dot: a mistake of the file
    assume(False)
  with one_line_at_most():
    config_lib.resolve(config)


@fuzz
@given(
  st.sampled_from(['grid.py', 'grid.py:study=temperature', 'grid.py:study=top_k,scale=paper', 'grid.py:study=none']),
  st.dictionaries(misspelt(fields(GridConfig)), words, max_size=4),
)
def test_overrides_of_a_grid(spec, overrides):
  with one_line_at_most():
    found = cli.load_as(GridConfig, grid_config.problems, f'{CONFIGS}/{spec}', overrides)
    cells_lib.check_grid(found)


# Command lines.

DISTRIBUTED = ['--distributed', '--coordinator', '--processes', '--process']
MESH = ['--fsdp', '--replica', '--tensor']
CONFIG = f'--config={CONFIGS}/weak2strong.py'
# Accepted command lines, and further options.
COMMANDS = {
  train: ([CONFIG], [*DISTRIBUTED, '--profile', '--workdir', '--config', '--config.runs', '--config.student.tokens']),
  prepare: ([CONFIG], ['--no-report', '--config', '--config.data.source']),
  aot: ([CONFIG, '--topology=v4-128'], ['--topology', '--num-slices', '--vocab-size', '--search', '--json', '--config.mesh.fsdp']),
  evaluate: (['--workdir=none'], [*MESH, '--workdir', '--step', '--watch', '--processes']),
  generate: (['none'], ['--max-tokens', '--temperature', '--top-k', '--top-p', '--seed', '--samples', '--step', '--separator', '--special']),
  harness: (
    ['none', '--tasks=a'],
    [
      *MESH, '--tasks', '--include-path', '--no-defaults', '--num-fewshot', '--limit', '--batch-size', '--max-length', '--gen-kwargs', '--seed',
      '--step', '--separator', '--output',
    ],
  ),
  grid: (
    ['plan', f'--config={CONFIGS}/grid.py'],
    [
      'run', 'status', '--workdir', '--cell', '--shard', '--executor', '--executor=print', '--executor=slurm', '--runners', '--resources',
      '--address', '--sbatch', '--config.seed', *DISTRIBUTED,
    ],
  ),
  report: (['--grid=none'], ['--grid', '--advise', '--student', '--tokens', '--budget-flops', '--set']),
  convert: (['from-hf', 'none', 'out'], ['to-hf', '--separator', '--tokenizer', '--step', '--dtype']),
}  # fmt: skip
WORK = (
  (train, 'run'), (train.distributed, 'initialize'), (prepare, 'prepare'), (aot.compiling, 'compile_step'), (aot, '_best'), (grid, 'run'),
  (grid, 'plan_text'), (grid, 'status_text'), (executors, 'submit_to_slurm'), (harness_tasks, 'find_tasks'), (train.environment, 'set_deterministic'),
  (generate.by_name, 'open_model'),
)  # fmt: skip


@st.composite
def command_lines(draw):
  """Draw (command, its arguments): mostly accepted ones, with a few added, misspelt or omitted."""
  command = draw(st.sampled_from(list(COMMANDS)))
  whole, flags = COMMANDS[command]
  argv = [part for part in whole if draw(st.integers(0, 9))]
  for _ in range(draw(st.integers(0, 3))):
    flag, value = draw(misspelt(flags)), draw(words)
    new = draw(st.sampled_from([[flag], [flag, value], [f'{flag}={value}'], [f'{flag}={value}'], [value]]))
    at = draw(st.integers(0, len(argv)))
    argv[at:at] = new
  return command, argv


@fuzz
@given(command_lines())
def test_command_lines(tmp_path, monkeypatch, line):
  def reached(*args, **kwargs):
    raise UserError('reached: the arguments were accepted')

  for module, name in WORK:
    monkeypatch.setattr(module, name, reached)
  monkeypatch.chdir(tmp_path)
  command, argv = line
  with one_line_at_most():
    command.main(argv)


# Hugging Face folders.


@pytest.fixture(scope='module')
def folders(tmp_path_factory) -> dict[str, pathlib.Path]:
  home = tmp_path_factory.mktemp('folders')
  names = ('LlamaForCausalLM', 'LlamaForCausalLM 3.1', 'Qwen3ForCausalLM', 'Gemma2ForCausalLM', 'Gemma3ForCausalLM')
  return {name: make(home / str(i), MODELS[name]) for i, name in enumerate(names)}


def with_file(source: pathlib.Path, folder: pathlib.Path, name: str, tree) -> pathlib.Path:
  shutil.rmtree(folder, ignore_errors=True)
  shutil.copytree(source, folder)
  (folder / name).write_text(json.dumps(tree))
  return folder


@fuzz
@given(st.data())
def test_a_folders_config_json(folders, tmp_path, data):
  source = folders[data.draw(st.sampled_from(sorted(folders)))]
  name = data.draw(st.sampled_from(['config.json', 'config.json', 'config.json', 'tokenizer_config.json']))
  tree = data.draw(spoilt(json.loads((source / name).read_text())))
  folder = with_file(source, tmp_path / 'folder', name, tree)
  with one_line_at_most():
    _ = huggingface.Source(folder).tokenizer


SHORT = {f'{chr(97 + i)}': i for i in range(8)} | {'ab': 8, '<s>': 9, '</s>': 10}


def _tokenizer_tree() -> dict:
  special = [
    {'id': i, 'content': c, 'single_word': False, 'lstrip': False, 'rstrip': False, 'normalized': False, 'special': True}
    for c, i in SHORT.items() if c.startswith('<')
  ]  # fmt: skip
  single = [{'SpecialToken': {'id': '<s>', 'type_id': 0}}, {'Sequence': {'id': 'A', 'type_id': 0}}]
  return {
    'version': '1.0',
    'truncation': None,
    'padding': None,
    'added_tokens': special,
    'normalizer': {'type': 'Sequence', 'normalizers': [{'type': 'NFC'}]},
    'pre_tokenizer': {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': True},
    'post_processor': {
      'type': 'TemplateProcessing',
      'single': single,
      'pair': single,
      'special_tokens': {'<s>': {'id': '<s>', 'ids': [9], 'tokens': ['<s>']}},
    },
    'decoder': {'type': 'ByteLevel', 'add_prefix_space': True, 'trim_offsets': True, 'use_regex': True},
    'model': {'type': 'BPE', 'dropout': None, 'unk_token': None, 'vocab': SHORT, 'merges': [['a', 'b']]},
  }


@fuzz
@given(spoilt(_tokenizer_tree()), words, words)
def test_a_tokenizer_json(tmp_path, tree, separator, text):
  file = tmp_path / 'tokenizer.json'
  file.write_text(json.dumps(tree))
  for name in ('', separator):
    with one_line_at_most():
      tokenizer = Tokenizer.from_file(file, name)
      tokenizer.decode(tokenizer.encode_batch([''.join(c for c in text if c in string.printable)])[0])


# Text files.


@st.composite
def damaged(draw, data: bytes) -> bytes:
  """Draw data with bytes flipped, removed, doubled or inserted."""
  for _ in range(draw(st.integers(1, 4))):
    at, n = draw(st.integers(0, len(data))), draw(st.integers(0, 40))
    new = draw(st.sampled_from([b'', data[at : at + n] * 2, draw(st.binary(max_size=8))]))
    data = data[:at] + new + data[at + n :]
  return data


RECORDS = [{'text': 'one is here', 'id': 1}, {'text': 'zwei – ü'}, {'text': 'three', 'more': {'a': [1, None]}}]
JSONL = ''.join(json.dumps(record) + '\n' for record in RECORDS).encode()
PACK = {
  '': bytes,
  '.gz': gzip.compress,
  '.xz': lzma.compress,
  '.zst': lambda data: zstandard.ZstdCompressor().compress(data),
}


def assert_readable(folder: pathlib.Path, name: str, data: bytes, field: str = 'text') -> None:
  """Check that documents can be encoded, or that reading them fails with one line."""
  (folder / name).write_bytes(data)
  with one_line_at_most():
    for text in sources.documents(str(folder / name), field):
      assert isinstance(text, str)
      text.encode()


@fuzz
@given(st.sampled_from(sorted(PACK)), st.data())
def test_bytes_of_json_lines(tmp_path, suffix, data):
  assert_readable(tmp_path, f'x.jsonl{suffix}', data.draw(damaged(PACK[suffix](JSONL))))
  assert_readable(tmp_path, f'y.jsonl{suffix}', PACK[suffix](data.draw(damaged(JSONL))))


@fuzz
@given(st.lists(st.one_of(spoilt(RECORDS[2]), values), max_size=4), words, st.integers(0, 3000))
def test_records_of_json_lines(tmp_path, records, field, depth):
  lines = [json.dumps(record) for record in records] + ['{"text": ' + '[' * depth + ']' * depth + '}'] * (depth > 2000)
  data = '\n'.join(lines).encode()
  for name in ('text', field):
    assert_readable(tmp_path, 'x.jsonl', data, name)
  with one_line_at_most():
    choices.read_choices(str(tmp_path / 'x.jsonl'))


ITEMS = [
  {'context': 'He sat', 'choices': [' down.', ' blue.'], 'answer': 0},
  {'contexts': ['so Sarah', 'so Maria'], 'continuation': ' won.', 'answer': 1},
  {'good': 'Cats sleep.', 'bad': 'Cats sleeps.', 'paradigm': 'agreement'},
  {'text': 'and sat on his chair'},
]


@fuzz
@given(spoilt(ITEMS))
def test_items_of_a_task(tmp_path, items):
  file = tmp_path / 'x.jsonl'
  file.write_text('\n'.join(json.dumps(item) for item in items))
  with one_line_at_most():
    choices.read_choices(str(file))


def _parquet(table: pa.Table, **options) -> bytes:
  out = io.BytesIO()
  pyarrow.parquet.write_table(table, out, **options)
  return out.getvalue()


TABLES = [_parquet(pa.table({'text': ['one', 'two ü', None][:n] * 20, 'n': [1, 2, 3][:n] * 20}), **options)
  for n in (2, 3) for options in ({}, {'compression': 'none'}, {'use_dictionary': False})]  # fmt: skip


@fuzz
@given(st.sampled_from(TABLES).flatmap(damaged))
def test_bytes_of_parquet(tmp_path, data):
  assert_readable(tmp_path, 'x.parquet', data)


COLUMNS = [
  pa.string(), pa.large_string(), pa.binary(), pa.large_binary(), pa.int32(), pa.float64(), pa.bool_(), pa.null(), pa.list_(pa.string()),
  pa.struct([('a', pa.string())]), pa.dictionary(pa.int32(), pa.string()), pa.timestamp('s'), pa.decimal128(9, 2), pa.binary(3), pa.string_view(),
]  # fmt: skip


@st.composite
def columns(draw):
  kind = draw(st.sampled_from(COLUMNS))
  value = {
    'int32': st.integers(-9, 9), 'double': st.floats(), 'bool': st.booleans(), 'null': st.none(), 'timestamp[s]': st.integers(0, 9),
    'decimal128(9, 2)': st.decimals(0, 9, places=2), 'fixed_size_binary[3]': st.binary(min_size=3, max_size=3),
    'list<element: string>': st.lists(st.text(max_size=3)), 'struct<a: string>': st.fixed_dictionaries({'a': st.text(max_size=3)}),
  }.get(str(kind), st.binary(max_size=9) if 'binary' in str(kind) else st.text(max_size=9))  # fmt: skip
  if str(kind).startswith('list'):
    value = st.lists(st.text(max_size=3), max_size=3)
  found = draw(st.lists(st.one_of(st.none(), value), max_size=5))
  return pa.array(found, kind)


@fuzz
@given(columns(), columns(), words)
def test_columns_of_parquet(tmp_path, one, other, field):
  n = min(len(one), len(other))
  table = pa.table({'text': one[:n], 'more': other[:n]})
  for name in ('text', 'more', field):
    assert_readable(tmp_path, 'x.parquet', _parquet(table), name)
