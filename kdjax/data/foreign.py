"""Tokenizer files other than tokenizer.json, turned into one by transformers: SentencePiece models, tiktoken's ranks, whole folders.

transformers is imported here alone, and only when there is such a file to read.
"""

import importlib
import json
import pathlib
import shutil
import tempfile
from typing import Any

from kdjax.errors import UserError

_EXTRA = "pip install 'kdjax[hf]'"
# A file of ranks does not say how text is cut before its pieces are joined: the encodings that are known by the file's name.
# Their patterns, and the id of <|endoftext|>, as tiktoken has them. None: GPT-2's own, which `tokenizers` knows.
_CL100K = '|'.join(
  [
    r"'(?i:[sdmt]|ll|ve|re)",
    r'[^\r\n\p{L}\p{N}]?\p{L}+',
    r'\p{N}{1,3}',
    r' ?[^\s\p{L}\p{N}]+[\r\n]*',
    r'\s+\z',
    r'\s*[\r\n]',
    r'\s+(?!\S)',
    r'\s',
  ]
)
_UPPER, _LOWER = r'[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]', r'[\p{Ll}\p{Lm}\p{Lo}\p{M}]'
_ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_O200K = '|'.join(
  [
    rf'[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENDING}',
    rf'[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENDING}',
    r'\p{N}{1,3}',
    r' ?[^\s\p{L}\p{N}]+[\r\n/]*',
    r'\s*[\r\n]+',
    r'\s+(?!\S)',
    r'\s+',
  ]
)
_TIKTOKEN: dict[str, tuple[str | None, int]] = {
  'gpt2': (None, 50_256),
  'r50k_base': (None, 50_256),
  'p50k_base': (None, 50_256),
  'cl100k_base': (_CL100K, 100_257),
  'o200k_base': (_O200K, 199_999),
}
SUFFIXES = ('.model', '.tiktoken')
_OTHERS = ('vocab.json', 'vocab.txt', 'tokenizer_config.json')


def to_json(path: pathlib.Path) -> str:
  """The text of a tokenizer.json that gives the ids of a `.model` or `.tiktoken` file, or of a folder with such files in it.

  Raises UserError if transformers is not installed, or can make nothing of it.
  """
  try:
    if path.suffix == '.tiktoken':
      return _from_ranks(path)
    if path.is_dir():
      if not any(file.suffix in SUFFIXES or file.name in _OTHERS for file in path.iterdir()):
        raise UserError(f'{path}: there is no tokenizer.json in it, nor another tokenizer; fetch it, or name one')
      return _from_folder(path)
    with (
      tempfile.TemporaryDirectory() as folder
    ):  # a folder with this file alone: nothing else says how it is to be read
      shutil.copy(path, pathlib.Path(folder) / 'tokenizer.model')
      return _from_folder(pathlib.Path(folder))
  except UserError:
    raise
  except ImportError as e:
    raise UserError(f'{path}: reading it needs a package that is not installed ({_line(e)}); run: {_EXTRA}') from None
  except Exception as e:  # whatever transformers and its converters raise
    raise UserError(f'{path}: transformers can make no tokenizer of it ({_line(e)}); give a tokenizer.json') from None


def _from_folder(folder: pathlib.Path) -> str:
  transformers = _module('transformers')
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
  return tokenizer.backend_tokenizer.to_str()


def _from_ranks(path: pathlib.Path) -> str:
  if path.stem not in _TIKTOKEN:
    raise UserError(
      f'{path}: ranks do not say how text is cut; name the file after its encoding, one of {", ".join(f"{n}.tiktoken" for n in _TIKTOKEN)}'
    )
  pattern, end_of_text = _TIKTOKEN[path.stem]
  converters = _module('transformers.convert_slow_tokenizer')
  known = {} if pattern is None else {'pattern': pattern}
  converted = converters.TikTokenConverter(
    vocab_file=str(path), extra_special_tokens=['<|endoftext|>'], **known
  ).converted()
  values = json.loads(converted.to_str())
  if pattern is None:
    values['pre_tokenizer'] = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': True}
  values['model']['vocab']['<|endoftext|>'] = end_of_text
  values['added_tokens'] = [token | {'id': end_of_text} for token in values['added_tokens']]
  return json.dumps(values)


def _module(name: str) -> Any:
  return importlib.import_module(name)


def _line(error: Exception) -> str:
  return f'{type(error).__name__}: {" ".join(str(error).split())[:160]}'
