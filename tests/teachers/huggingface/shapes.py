"""Hugging Face folders shaped like published models, above all in their token roles; written without kdjax and transformers.

The models are small and random, the tokenizers byte-level. The folders differ in their special tokens, and in the files that give these a role.
"""

import json
import pathlib
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy
import tokenizers
from tokenizers import processors


class Shape(NamedTuple):
  """A tokenizer's special tokens, and their roles in the files. `first`: the special tokens come before the bytes, as in Llama 2."""

  special: tuple[str, ...]
  first: bool
  before: str  # the token that the post-processor puts before a text
  tokenizer_config: dict[str, Any]
  config: dict[str, Any]
  generation_config: dict[str, Any] | None = None
  ordinary: tuple[str, ...] = ()  # added tokens that are not special
  model_type: str = 'llama'


def added(content: str) -> dict[str, Any]:
  """Return a token in the format of older tokenizer_config.json files."""
  return {
    '__type': 'AddedToken',
    'content': content,
    'lstrip': False,
    'normalized': False,
    'rstrip': False,
    'single_word': False,
  }


SHAPES = {
  'Llama 2': Shape(
    ('<unk>', '<s>', '</s>'), True, '<s>',
    {'bos_token': added('<s>'), 'eos_token': added('</s>'), 'unk_token': added('<unk>'), 'pad_token': None, 'add_bos_token': True},
    {'bos_token_id': 1, 'eos_token_id': 2, 'pad_token_id': None},
    {'bos_token_id': 1, 'eos_token_id': 2},
  ),
  'Llama 3': Shape(
    ('<|begin_of_text|>', '<|end_of_text|>', '<|finetune_right_pad_id|>', '<|eot_id|>'), False, '<|begin_of_text|>',
    {'bos_token': '<|begin_of_text|>', 'eos_token': '<|eot_id|>', 'pad_token': '<|finetune_right_pad_id|>'},
    {'bos_token_id': 256, 'eos_token_id': 257},
    {'bos_token_id': 256, 'eos_token_id': [257, 259]},
  ),
  'Gemma 3': Shape(
    ('<pad>', '<eos>', '<bos>', '<unk>'), True, '<bos>',
    {'bos_token': '<bos>', 'eos_token': '<eos>', 'pad_token': '<pad>', 'unk_token': '<unk>', 'add_bos_token': True},
    {'bos_token_id': 2, 'eos_token_id': 1, 'pad_token_id': 0},
    ordinary=('<table>', '<s>', '</s>'), model_type='gemma3_text',
  ),
  'SmolLM2': Shape(
    ('<|endoftext|>', '<|im_start|>', '<|im_end|>'), True, '',
    {'bos_token': '<|endoftext|>', 'eos_token': '<|endoftext|>', 'unk_token': '<|endoftext|>'},
    {'bos_token_id': 0, 'eos_token_id': 0},
  ),
  'SmolLM2 Instruct': Shape(
    ('<|endoftext|>', '<|im_start|>', '<|im_end|>'), True, '',
    {'bos_token': '<|im_start|>', 'eos_token': '<|im_end|>', 'pad_token': '<|im_end|>', 'unk_token': '<|endoftext|>'},
    {'bos_token_id': 1, 'eos_token_id': 2, 'pad_token_id': 2},
    {'bos_token_id': 1, 'eos_token_id': 2, 'pad_token_id': 2},
  ),
  'Qwen2.5': Shape(
    ('<|endoftext|>', '<|im_start|>', '<|im_end|>'), False, '',
    {'bos_token': None, 'eos_token': '<|endoftext|>', 'pad_token': '<|endoftext|>', 'add_bos_token': False},
    {'bos_token_id': 256, 'eos_token_id': 256},
    {'bos_token_id': 256, 'eos_token_id': 256}, model_type='qwen2',
  ),
  'Qwen2.5 Instruct': Shape(
    ('<|endoftext|>', '<|im_start|>', '<|im_end|>'), False, '',
    {'bos_token': None, 'eos_token': '<|im_end|>', 'pad_token': '<|endoftext|>', 'add_bos_token': False},
    {'bos_token_id': 256, 'eos_token_id': 258},
    {'bos_token_id': 256, 'eos_token_id': [258, 256], 'pad_token_id': 256}, model_type='qwen2',
  ),
}  # fmt: skip
ARCHITECTURES = {'llama': 'LlamaForCausalLM', 'gemma3_text': 'Gemma3ForCausalLM', 'qwen2': 'Qwen2ForCausalLM'}
NORMS = {
  'gemma3_text': ('input_layernorm', 'post_attention_layernorm', 'pre_feedforward_layernorm', 'post_feedforward_layernorm')
}  # fmt: skip
D, LAYERS, HEADS, HEAD, FF = 32, 2, 2, 16, 48


def make(folder: pathlib.Path, shape: Shape | str, rows: int = 0, seed: int = 0, tied: bool = False) -> pathlib.Path:
  """Write a folder. `rows`: rows of the weight table; 0: one for each token."""
  shape = SHAPES[shape] if isinstance(shape, str) else shape
  folder.mkdir(parents=True)
  model = tokenizer(shape)
  model.save(str(folder / 'tokenizer.json'))
  rows = rows or model.get_vocab_size()
  config = {
    'architectures': [ARCHITECTURES[shape.model_type]],
    'model_type': shape.model_type,
    'vocab_size': rows,
    'hidden_size': D,
    'num_hidden_layers': LAYERS,
    'intermediate_size': FF,
    'num_attention_heads': HEADS,
    'num_key_value_heads': HEADS,
    'head_dim': HEAD,
    'max_position_embeddings': 256,
    'tie_word_embeddings': tied,
    'rms_norm_eps': 1e-5,
    **({'query_pre_attn_scalar': HEAD, 'sliding_window': 64} if shape.model_type == 'gemma3_text' else {}),
    **shape.config,
  }
  tokenizer_config = {'tokenizer_class': 'PreTrainedTokenizerFast', **shape.tokenizer_config}
  files = {
    'config.json': config,
    'tokenizer_config.json': tokenizer_config,
    'generation_config.json': shape.generation_config,
  }
  for name, values in files.items():
    if values is not None:
      (folder / name).write_text(json.dumps(values))
  safetensors.numpy.save_file(
    weights(shape.model_type, rows, seed, tied), folder / 'model.safetensors', {'format': 'pt'}
  )
  return folder


def tokenizer(shape: Shape) -> tokenizers.Tokenizer:
  alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  pieces = [*shape.special, *alphabet] if shape.first else [*alphabet, *shape.special]
  model = tokenizers.Tokenizer(tokenizers.models.BPE({piece: i for i, piece in enumerate(pieces)}, []))
  model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  model.decoder = tokenizers.decoders.ByteLevel()
  model.add_special_tokens([tokenizers.AddedToken(token, normalized=False, special=True) for token in shape.special])
  model.add_tokens([tokenizers.AddedToken(token, normalized=False) for token in shape.ordinary])
  byte_level = processors.ByteLevel(trim_offsets=False)
  model.post_processor = byte_level
  if shape.before:
    first = (shape.before, model.token_to_id(shape.before))
    template = processors.TemplateProcessing(
      single=f'{first[0]} $A', pair=f'{first[0]} $A {first[0]}:1 $B:1', special_tokens=[first]
    )
    model.post_processor = processors.Sequence([byte_level, template])
  return model


def weights(model_type: str, rows: int, seed: int, tied: bool) -> dict[str, np.ndarray]:
  """Draw random weights, large enough that the model's predictions are not uniform."""
  rng = np.random.default_rng(seed)
  draw = lambda *shape: (rng.normal(size=shape) * 0.3).astype(np.float32)
  norm = lambda: (draw(D) + (model_type != 'gemma3_text')).astype(np.float32)
  out = {'model.embed_tokens.weight': draw(rows, D), 'model.norm.weight': norm()}
  if not tied:
    out['lm_head.weight'] = draw(rows, D)
  for i in range(LAYERS):
    layer = f'model.layers.{i}.'
    for name in NORMS.get(model_type, ('input_layernorm', 'post_attention_layernorm')):
      out[f'{layer}{name}.weight'] = norm()
    for name in 'qkvo':
      out[f'{layer}self_attn.{name}_proj.weight'] = draw(HEADS * HEAD, D) if name != 'o' else draw(D, HEADS * HEAD)
      if model_type == 'qwen2' and name != 'o':
        out[f'{layer}self_attn.{name}_proj.bias'] = draw(HEADS * HEAD)
    for name, size in (('q_norm', HEAD), ('k_norm', HEAD)) if model_type == 'gemma3_text' else ():
      out[f'{layer}self_attn.{name}.weight'] = draw(size)
    for name, size in (('gate', (FF, D)), ('up', (FF, D)), ('down', (D, FF))):
      out[f'{layer}mlp.{name}_proj.weight'] = draw(*size)
  return out


def change(folder: pathlib.Path, file: str = 'config.json', remove: tuple[str, ...] = (), **values) -> None:
  """Set or remove fields of a folder's JSON file."""
  path = folder / file
  known = json.loads(path.read_text()) | values
  path.write_text(json.dumps({key: value for key, value in known.items() if key not in remove}))


def change_tensors(folder: pathlib.Path, do) -> None:
  """Call `do` with the dict of tensors, which it changes in place."""
  file = folder / 'model.safetensors'
  tensors = {name: value.copy() for name, value in safetensors.numpy.load_file(file).items()}
  do(tensors)
  safetensors.numpy.save_file(tensors, file, {'format': 'pt'})
