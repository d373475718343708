"""A run's model -> a Hugging Face folder that transformers loads as one of its own: no code of ours in it."""

import json
import os
import pathlib
from typing import Any

import tokenizers

from kdjax.data.tokenizer import Tokenizer
from kdjax.errors import UserError
from kdjax.models import Model
from kdjax.storage import files, paths
from kdjax.teachers.huggingface import families, weights


def export(
  model: Model,
  params,
  tokenizer: Tokenizer,
  out: str | os.PathLike,
  dtype: str = 'float32',
  max_bytes: int = 5_000_000_000,
  max_positions: int = 0,
  origin: dict[str, Any] | None = None,
  trained_here: bool = True,
) -> families.Family:
  """Write config.json, safetensors files and the tokenizer into a new folder, which appears whole or not at all.

  Args:
    dtype: of the weights in the files: float32 | bfloat16 | float16.
    max_bytes: of one file.
    max_positions: the longest text that config.json declares; 0: the model's max_seq_len.
    origin: kept as kdjax.json, for people.
    trained_here: the model's documents began with the separator, so the exported tokenizer puts it before a text.

  Raises:
    UserError: the folder exists, or no known architecture is this model.
  """
  family, values = families.write_config(model.config)
  values |= {
    'max_position_embeddings': max_positions or model.config.max_seq_len,
    'torch_dtype': dtype,
    **_token_ids(tokenizer, model.config.vocab_size),
    'use_cache': True,
  }
  check_new(out)
  try:
    with files.building(paths.expand(out)) as folder:
      weights.save_weights(params, model, family, folder, dtype, max_bytes)
      _write(folder / 'config.json', values)
      (folder / 'tokenizer.json').write_text(tokenizer_file(tokenizer, trained_here), encoding='utf-8')
      _write(folder / 'tokenizer_config.json', {
        'tokenizer_class': 'PreTrainedTokenizerFast',
        **_token_names(tokenizer, trained_here),
        'model_max_length': values['max_position_embeddings'],
        'clean_up_tokenization_spaces': False,
      })  # fmt: skip
      if origin:
        _write(folder / 'kdjax.json', origin)
  except FileExistsError:  # made meanwhile
    check_new(out)
    raise
  return family


def check_new(out: str | os.PathLike) -> None:
  """Raise UserError if `export` could not write to `out`. Call it before a model is read."""
  if paths.is_remote(out):
    raise UserError(f'{out}: a Hugging Face folder is written on a disk; name a folder there and copy it')
  if pathlib.Path(paths.expand(out)).exists():
    raise UserError(f'{out} exists already; name a new folder, or delete it')


def tokenizer_file(tokenizer: Tokenizer, trained_here: bool) -> str:
  """The tokenizer's file as transformers is to read it.

  Where the model was trained here, a text begins with the separator, as each document did; a file that adds tokens of its own is left as it is.
  """
  model = tokenizer.as_others_read_it()
  plain, processed = (model.encode('a', add_special_tokens=add).ids for add in (False, True))
  if plain == processed and (trained_here or tokenizer.is_bytes):
    first, known = tokenizer.separator, model.post_processor
    added = tokenizers.processors.TemplateProcessing(
      single=f'{first}:0 $A:0', pair=f'{first}:0 $A:0 $B:0', special_tokens=[(first, tokenizer.separator_id)]
    )
    model.post_processor = tokenizers.processors.Sequence([known, added]) if known else added
  return model.to_str()


def _token_ids(tokenizer: Tokenizer, n_rows: int) -> dict[str, int | list[int]]:
  """Return the token roles for config.json; transformers stops a generation at the end tokens."""
  stops = [id_ for id_ in tokenizer.stop_ids if id_ < n_rows]
  found: dict[str, int | list[int]] = {
    'bos_token_id': tokenizer.separator_id,
    'eos_token_id': stops if len(stops) > 1 else tokenizer.end_id,
  }
  padding = tokenizer.padding_id
  # An added token may have no row, and transformers' embedding rejects a padding id beyond its rows.
  return found if padding is None or padding >= n_rows else found | {'pad_token_id': padding}


def _token_names(tokenizer: Tokenizer, trained_here: bool) -> dict[str, str | None]:
  """Return the token roles for tokenizer_config.json; null means none."""
  roles = tokenizer.roles
  named = {'bos_token': roles.begin or (roles.separator if trained_here else None), 'eos_token': roles.end}
  return named | ({'pad_token': roles.padding} if roles.padding else {})


def _write(file: pathlib.Path, values: dict[str, Any]) -> None:
  file.write_text(json.dumps(values, indent=2) + '\n', encoding='utf-8')
