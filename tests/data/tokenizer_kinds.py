"""Tokenizers of every common kind, trained here on a few kilobytes: name -> the JSON of a `tokenizers` file."""

import functools
import json
import random
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from kdjax.data import foreign

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN = LLAMA3.replace('{1,3}', '')
DEEPSEEK = (r'[\r\n]', r'\s?\p{L}+', r'\s?\p{P}+', r'[一-龥]+')
SPECIAL = '<|endoftext|>'


def corpus(seed: int = 0, size: int = 30_000) -> str:
  """Generate text with everything that tokenizers treat differently."""
  rng = random.Random(seed)
  words = [''.join(rng.choices('abcdefghijklmnop', k=rng.randrange(1, 9))) for _ in range(300)]
  make = [
    lambda: ' '.join(rng.choices(words, k=rng.randrange(1, 20))),
    lambda: ' ' * rng.randrange(1, 9),
    lambda: rng.choice(['\n', '\n\n', '\n\n\n', '\t', '\r\n', ' \n ', '\n  ']),
    lambda: rng.choice(['. ', ', ', '! ', "'s ", "don't ", '’s ', ' -- ', '(x) ', '"q" ', '...', ' ."', '//', '#! ']),
    lambda: str(rng.randrange(10 ** rng.randrange(1, 30))),
    lambda: ''.join(rng.choices([chr(0x4E00 + k) for k in range(60)], k=rng.randrange(1, 12))) + rng.choice('，。 、'),
    lambda: ''.join(rng.choices('😀😁é\u0301e\u0301ßИИİıﬁ①ａΣς한글가\u200d\u00a0\u3000\u2028▁', k=rng.randrange(1, 8))),
    lambda: rng.choice([SPECIAL, '<s>', '</s>', '[MASK]', '<0x41>', '▁▁', '<extra>', 'def f(x):\n    return x\n']),
    lambda: rng.choice('abc') * rng.randrange(1, 40),
  ]
  out, length = [], 0
  while length < size:
    out.append(rng.choices(make, weights=[30, 4, 6, 12, 4, 6, 4, 2, 1])[0]())
    length += len(out[-1])
  return ''.join(out)


@functools.cache
def kinds() -> dict[str, str]:
  return {name: json.dumps(value) for name, value in _kinds()}


def _trained(pre: Any = None, normalizer: Any = None, model: Any = None, **training: Any) -> dict[str, Any]:
  model = tokenizers.Tokenizer(model or models.BPE())
  if pre is not None:
    model.pre_tokenizer = pre
  if normalizer is not None:
    model.normalizer = normalizer
  of = {models.BPE: trainers.BpeTrainer, models.Unigram: trainers.UnigramTrainer}.get(
    type(model.model), trainers.WordPieceTrainer
  )
  alphabet = pre_tokenizers.ByteLevel.alphabet() if 'ByteLevel' in str(pre) else []
  special = training.pop('special_tokens', [SPECIAL])
  options = {'vocab_size': 700, 'special_tokens': special, 'show_progress': False, 'initial_alphabet': sorted(alphabet)}
  text = corpus(99, 60_000)
  model.train_from_iterator([text[k : k + 500] for k in range(0, len(text), 500)], of(**options | training))
  return json.loads(model.to_str())


def _byte_level(pattern: str, **options: Any) -> Any:
  split = pre_tokenizers.Split(tokenizers.Regex(pattern), 'isolated')
  return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _added(values: dict[str, Any], *contents: str, **flags: bool) -> dict[str, Any]:
  """Add tokens that are not special."""
  first = 1 + max(token['id'] for token in values['added_tokens'])
  first = max(first, len(values['model']['vocab']))
  plain = {'single_word': False, 'lstrip': False, 'rstrip': False, 'normalized': False, 'special': False}
  more = [{'id': first + k, 'content': content, **plain, **flags} for k, content in enumerate(contents)]
  return {**values, 'added_tokens': [*values['added_tokens'], *more]}


def _sentencepiece(byte_fallback: bool = True, **changes: Any) -> dict[str, Any]:
  """Build a tokenizer as converted from SentencePiece: no pre-tokenizer, so the model sees a whole document."""
  special = ['<unk>', '<s>', '</s>', *(f'<0x{byte:02X}>' for byte in range(256))]
  values = _trained(pre_tokenizers.Metaspace(), special_tokens=special, vocab_size=900)
  model = values['model'] | {'byte_fallback': byte_fallback, 'unk_token': '<unk>', 'fuse_unk': True}
  added = [token for token in values['added_tokens'] if token['id'] < 3]
  replace = {'type': 'Replace', 'pattern': {'String': ' '}, 'content': '▁'}
  normalizer = {'type': 'Sequence', 'normalizers': [{'type': 'Prepend', 'prepend': '▁'}, replace]}
  return values | {'model': model, 'added_tokens': added, 'normalizer': normalizer, 'pre_tokenizer': None} | changes


def _kinds():
  level = lambda **options: pre_tokenizers.ByteLevel(**{'add_prefix_space': False} | options)
  gpt2 = _trained(level())
  yield 'gpt2', gpt2
  yield 'gpt2 with a space before', _trained(level(add_prefix_space=True))
  yield 'gpt2 by its pattern', _trained(_byte_level(GPT2))
  yield (
    'llama3',
    _trained(_byte_level(LLAMA3)) | {'model': _trained(_byte_level(LLAMA3))['model'] | {'ignore_merges': True}},
  )
  yield 'qwen', _trained(_byte_level(QWEN), normalizers.NFC())
  yield 'cl100k', _trained(_byte_level(foreign._CL100K))
  yield 'o200k', _trained(_byte_level(foreign._O200K))
  yield 'smollm', _trained(pre_tokenizers.Sequence([pre_tokenizers.Digits(True), level()]))
  punctuation, digits = pre_tokenizers.Punctuation('contiguous'), pre_tokenizers.Digits(False)
  yield 'falcon', _trained(pre_tokenizers.Sequence([punctuation, level(), digits]))
  split = [pre_tokenizers.Split(tokenizers.Regex(pattern), 'isolated') for pattern in DEEPSEEK]
  yield 'deepseek', _trained(pre_tokenizers.Sequence([*split, pre_tokenizers.Digits(True), level(use_regex=False)]))
  yield 'neox', _added(gpt2, *(' ' * n for n in range(2, 25)))
  yield 'added tokens with letters', _added(gpt2, 'a b', ' c', '. ', '\n\n', normalized=True)
  yield 'one word', _trained(level(use_regex=False))
  sentencepiece = _sentencepiece()
  replace = sentencepiece['normalizer']['normalizers'][1]
  yield 'llama2', sentencepiece
  yield 'llama2 without bytes', _sentencepiece(byte_fallback=False)
  before = {'type': 'Split', 'pattern': {'String': ' '}, 'behavior': 'MergedWithPrevious', 'invert': False}
  gemma = _sentencepiece(normalizer=replace, pre_tokenizer=before)
  yield 'gemma', _added(gemma, '\n\n', '\n\n\n', '▁▁', '▁▁▁', '<extra>')
  for scheme in ('always', 'first', 'never'):
    for cuts in (True, False):
      pre = {'type': 'Metaspace', 'replacement': '▁', 'prepend_scheme': scheme, 'split': cuts}
      yield f'metaspace {scheme} {cuts}', _sentencepiece(normalizer=None, pre_tokenizer=pre)
  yield 'merges over spaces', _trained(None, vocab_size=500)
  unigram = models.Unigram()
  yield (
    'unigram',
    _trained(pre_tokenizers.Metaspace(), normalizers.NFKC(), unigram, unk_token='<unk>', special_tokens=['<unk>']),
  )
  yield 'unigram of documents', _trained(pre_tokenizers.Metaspace(), None, models.Unigram(), unk_token='<unk>', special_tokens=['<unk>']) | {
    'pre_tokenizer': {'type': 'Metaspace', 'replacement': '▁', 'prepend_scheme': 'always', 'split': False}}  # fmt: skip
  bert = models.WordPiece(unk_token='[UNK]')
  yield (
    'bert',
    _trained(pre_tokenizers.BertPreTokenizer(), normalizers.BertNormalizer(), bert, special_tokens=['[UNK]', SPECIAL]),
  )
  words = models.WordLevel(unk_token='[UNK]')
  tokenizer = tokenizers.Tokenizer(words)
  tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
  tokenizer.train_from_iterator(
    [corpus(98)], trainers.WordLevelTrainer(vocab_size=300, special_tokens=['[UNK]'], show_progress=False)
  )
  yield 'words', json.loads(tokenizer.to_str())
  yield (
    'lower case without accents',
    _trained(level(), normalizers.Sequence([normalizers.NFD(), normalizers.Lowercase(), normalizers.StripAccents()])),
  )
  # Texts of these are not cut.
  yield 'stripped', _trained(level(), normalizers.Strip())
  yield 'added words', _added(gpt2, 'abc', single_word=True)
  yield 'added with spaces', _added(gpt2, 'abc', rstrip=True, lstrip=True)
  yield 'looking back', _trained(_byte_level(r'(?<=\s)\p{L}+|\p{L}+|\s+|.'))
  yield 'scripts', _trained(pre_tokenizers.Sequence([pre_tokenizers.UnicodeScripts(), level()]))
  yield 'replaced by pattern', _trained(level(), normalizers.Replace(tokenizers.Regex(r'\w+ \w+'), 'x'))
  yield 'lines', _trained(pre_tokenizers.Split(tokenizers.Regex(r'[^\n]+\n?'), 'isolated'), vocab_size=400)
  assert decoders
