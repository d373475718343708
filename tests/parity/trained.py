"""stories260K as a Hugging Face folder: a real trained model, with its own tokenizer."""

import pathlib

import numpy as np
import tokenizers
import torch
import transformers

from tests.models import stories


def stories_folder(folder: pathlib.Path) -> pathlib.Path:
  """Saved by transformers itself, its weights put in by hand: nothing of kdjax's exporter is in it."""
  config, params = stories.load(stories.FOLDER / 'stories260K.bin')
  settings = transformers.LlamaConfig(
    vocab_size=config.vocab_size,
    hidden_size=config.d_model,
    num_hidden_layers=config.n_layers,
    intermediate_size=config.d_ff,
    num_attention_heads=config.n_heads,
    num_key_value_heads=config.n_kv_heads,
    max_position_embeddings=config.max_seq_len,
    rms_norm_eps=config.norm_eps,
    tie_word_embeddings=True,
    rope_parameters={'rope_type': 'default', 'rope_theta': config.rope_theta},
    bos_token_id=1,
    eos_token_id=2,
  )
  model = transformers.LlamaForCausalLM(settings).eval()
  put = lambda parameter, value: parameter.data.copy_(torch.tensor(np.array(value)))
  with torch.no_grad():
    put(model.model.embed_tokens.weight, params['embed']['embedding'][: config.vocab_size])
    put(model.model.norm.weight, params['final_norm']['scale'])
    for i, layer in enumerate(model.model.layers):
      blocks = params['blocks']
      put(layer.input_layernorm.weight, blocks['attn_norm']['scale'][i])
      put(layer.post_attention_layernorm.weight, blocks['mlp_norm']['scale'][i])
      for name in 'qkvo':
        put(getattr(layer.self_attn, f'{name}_proj').weight, blocks['attn'][name]['kernel'][i].T)
      for name in ('gate', 'up', 'down'):
        put(getattr(layer.mlp, f'{name}_proj').weight, blocks['mlp'][name]['kernel'][i].T)
  model.save_pretrained(folder)
  fast = transformers.PreTrainedTokenizerFast(
    tokenizer_object=_tokenizer(config.vocab_size), bos_token='<s>', eos_token='</s>', unk_token='<unk>'
  )
  fast.save_pretrained(folder)
  return folder


def _tokenizer(vocab_size: int) -> tokenizers.Tokenizer:
  """SentencePiece's BPE: of all neighbours the pair whose union has the best score, that is, the lowest id, is joined first."""
  pieces = stories.load_pieces(stories.FOLDER / 'tok512.bin', vocab_size)
  names = ['<unk>', '<s>', '</s>', *(f'<0x{byte:02X}>' for byte in range(256))]
  names += [piece.decode().replace(' ', '▁') for piece in pieces[259:]]
  vocab = {name: i for i, name in enumerate(names)}
  assert len(vocab) == vocab_size
  merges = []
  for name in names[259:]:
    cuts = [(name[:k], name[k:]) for k in range(1, len(name)) if name[:k] in vocab and name[k:] in vocab]
    merges += sorted(cuts, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
  model = tokenizers.Tokenizer(
    tokenizers.models.BPE(vocab, merges, unk_token='<unk>', byte_fallback=True, fuse_unk=True)
  )
  model.normalizer = tokenizers.normalizers.Sequence(
    [tokenizers.normalizers.Prepend('▁'), tokenizers.normalizers.Replace(' ', '▁')]
  )
  model.decoder = tokenizers.decoders.Sequence(
    [
      tokenizers.decoders.Replace('▁', ' '),
      tokenizers.decoders.ByteFallback(),
      tokenizers.decoders.Fuse(),
      tokenizers.decoders.Strip(' ', 1, 0),
    ]
  )
  model.post_processor = tokenizers.processors.TemplateProcessing(
    single='<s> $A', pair='<s> $A $B', special_tokens=[('<s>', 1)]
  )
  return model
