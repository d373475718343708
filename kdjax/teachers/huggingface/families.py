"""config.json of Hugging Face <-> ModelConfig: one Family for each architecture that the decoder can be.

A family says what all its models have in common, what config.json means where it leaves a field out (it holds what differs from the
defaults of transformers' config class), and where its norms are. What the decoder cannot do is refused by its name.
"""

import dataclasses
import math
import types
from collections.abc import Iterator, Mapping
from typing import Any

from kdjax.config import ModelConfig, RopeScaling, fields
from kdjax.errors import UserError

_SIZES = {  # ours -> theirs
  'vocab_size': 'vocab_size',
  'd_model': 'hidden_size',
  'n_layers': 'num_hidden_layers',
  'd_ff': 'intermediate_size',
  'n_heads': 'num_attention_heads',
}
_OTHER_SIZES = ('num_key_value_heads', 'head_dim', 'max_position_embeddings', 'sliding_window')
MOST, MOST_LAYERS = (
  2**31 - 1,
  10_000,
)  # the largest sizes read: above them a folder would exhaust the memory before it is refused
# Theirs -> why the decoder cannot do it. Where it is set (neither null, false nor 1) the folder is refused.
_BEYOND = {
  'attention_bias': 'biases of all attention matrices',
  'mlp_bias': 'biases in the MLP',
  'attn_logit_softcapping': 'soft caps on attention scores',
  'final_logit_softcapping': 'soft caps on logits',
  'use_sliding_window': 'sliding windows in this family',
  'use_bidirectional_attention': 'attention to later tokens',
  'partial_rotary_factor': 'rotary positions of a part of each head',
  'quantization_config': 'quantised weights',
}
_ROPE = {
  'llama3': ('factor', 'low_freq_factor', 'high_freq_factor', 'original_max_position_embeddings'),
  'linear': ('factor',),
}
# config.json says nothing of how a model is run, but it does have the window.
_FREE = {
  *fields.names(ModelConfig, lambda declared: declared.precision or not declared.result),
  'pad_vocab_to',
} - {'max_seq_len'}
_LLAMA_NORMS = {'attn_norm': 'input_layernorm', 'mlp_norm': 'post_attention_layernorm'}
_OLMO_NORMS = {'attn_post_norm': 'post_attention_layernorm', 'mlp_post_norm': 'post_feedforward_layernorm'}
_GEMMA_NORMS = {
  'attn_norm': 'input_layernorm',
  'attn_post_norm': 'post_attention_layernorm',
  'mlp_norm': 'pre_feedforward_layernorm',
  'mlp_post_norm': 'post_feedforward_layernorm',
}


@dataclasses.dataclass(frozen=True)
class Family:
  """An architecture of transformers.

  Attributes:
    name: of its causal model's class.
    model_type: as config.json has it.
    style: fields of ModelConfig that all its models share.
    norms: our name of a block's norm -> theirs.
    defaults: what their fields are where config.json leaves them out.
    global_every: with a local window, the layers that see all where config.json does not say; 0: no layer is local.
  """

  name: str
  model_type: str
  style: Mapping[str, Any]
  norms: Mapping[str, str]
  defaults: Mapping[str, Any]
  global_every: int = 0

  @property
  def is_gemma(self) -> bool:
    return 'norm_offset' in self.style


def _family(
  name: str, model_type: str, style=types.MappingProxyType({}), norms=_LLAMA_NORMS, global_every=0, **defaults
) -> Family:
  common = {'hidden_act': 'silu', 'rms_norm_eps': 1e-6, 'rope_theta': 10_000.0, 'tie_word_embeddings': False}
  return Family(name, model_type, style, norms, common | defaults, global_every)


def _gemma(name: str, model_type: str, global_every: int, style: Mapping[str, Any], **defaults) -> Family:
  style = {'norms': 'both', 'norm_offset': True, 'activation': 'gelu_tanh', **style}
  common = {
    'num_key_value_heads': 4,
    'head_dim': 256,
    'query_pre_attn_scalar': 256,
    'sliding_window': 4096,
    'tie_word_embeddings': True,
    'hidden_activation': 'gelu_pytorch_tanh',
  }
  return _family(name, model_type, style, _GEMMA_NORMS, global_every, **common | defaults)


FAMILIES = {
  family.name: family
  for family in (
    # Llama 2, 3, 3.1, 3.2 and whatever else is saved as one: SmolLM2, TinyLlama, OpenLLaMA.
    _family('LlamaForCausalLM', 'llama', max_position_embeddings=2048),
    _family('Qwen2ForCausalLM', 'qwen2', {'qkv_bias': True}, num_key_value_heads=32, max_position_embeddings=32_768),
    _family('Qwen3ForCausalLM', 'qwen3', {'qk_norm': True}, num_key_value_heads=32, head_dim=128, max_position_embeddings=32_768),
    _family(
      'Olmo2ForCausalLM', 'olmo2', {'norms': 'after', 'qk_norm_whole': True}, _OLMO_NORMS, rms_norm_eps=1e-5, max_position_embeddings=2048
    ),
    # Published Gemma 2 models cap their logits, which is refused; those without caps are read.
    _gemma(
      'Gemma2ForCausalLM', 'gemma2', 2, {}, attn_logit_softcapping=50.0, final_logit_softcapping=30.0, max_position_embeddings=8192
    ),
    _gemma(
      'Gemma3ForCausalLM', 'gemma3_text', 6, {'qk_norm': True},
      rope_theta=1_000_000.0, rope_local_base_freq=10_000.0, max_position_embeddings=131_072,
    ),
  )
}  # fmt: skip


def family_of(values: Mapping[str, Any], where: str) -> Family:
  """The family of a config.json. Raises UserError for an architecture that is not known."""
  names = values.get('architectures') or []
  names = names if isinstance(names, list) else [names]
  found = [FAMILIES[name] for name in map(str, names) if name in FAMILIES]
  found = found or [
    family for family in FAMILIES.values() if not names and family.model_type == values.get('model_type')
  ]
  if not found:
    said = ', '.join(map(str, names)) or values.get('model_type') or 'none'
    raise UserError(f'{where}: unknown architecture {said}; known: {", ".join(FAMILIES)}')
  return found[0]


def read_config(values: Mapping[str, Any], where: str = 'config.json') -> tuple[Family, ModelConfig]:
  """What a config.json describes. Raises UserError, naming the field, if the decoder cannot be that."""
  family = family_of(values, where)
  known = {**family.defaults, **values}
  for name, what in _BEYOND.items():
    value = known.get(name)
    if (value and value != 1.0) or value is True:
      raise UserError(f'{where}: {name} = {value}: {what} are not supported')
  sizes = (*_SIZES.values(), 'max_position_embeddings')
  missing = [name for name in sizes if not isinstance(known.get(name), int) or known[name] < 1]
  if missing:
    raise UserError(f'{where}: no whole number above 0 for {", ".join(missing)}')
  _check_sizes(known, where)
  activation = known['hidden_activation' if family.is_gemma else 'hidden_act']
  if activation != family.defaults['hidden_activation' if family.is_gemma else 'hidden_act']:
    raise UserError(f'{where}: the activation {activation!r} is not supported in {family.name}')
  ours = {name: known[theirs] for name, theirs in _SIZES.items()} | dict(family.style)
  ours |= {
    'n_kv_heads': known.get('num_key_value_heads') or ours['n_heads'],
    'head_dim': known.get('head_dim') or ours['d_model'] // ours['n_heads'],
    'max_seq_len': known['max_position_embeddings'],
    'tied': known['tie_word_embeddings'],
    'norm_eps': known['rms_norm_eps'],
  }
  whole, local = _rope_sections(known, family, where)
  ours |= {'rope_theta': whole['rope_theta'], 'rope_scaling': _read_scaling(whole, where)}
  ours |= _read_window(known, family, ours['n_layers'], local['rope_theta'], where)
  if 'local_window' in ours and _read_scaling(local, where) != RopeScaling():
    raise UserError(f'{where}: rotary scaling of the local layers is not supported')
  if family.is_gemma:
    ours |= _gemma_scales(known, ours['d_model'], ours['head_dim'], where)
  config = ModelConfig(**ours)
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if field.type in (int, float, bool) and not isinstance(value, (int, float) if field.type is float else field.type):
      raise UserError(f'{where}: {field.name} would be {value!r}, which is no {field.type.__name__}')
  return family, config


def _check_sizes(known: Mapping[str, Any], where: str) -> None:
  """Raise UserError for sizes above MOST and MOST_LAYERS."""
  for name, value in known.items():
    most = MOST_LAYERS if name == 'num_hidden_layers' else MOST
    if name in (*_SIZES.values(), *_OTHER_SIZES) and isinstance(value, int) and value > most:
      raise UserError(f'{where}: {name} = {value} is not a size that a model can have (at most {most:,})')


def _gemma_scales(known: Mapping[str, Any], d_model: int, head_dim: int, where: str) -> dict[str, float]:
  scalar = known['query_pre_attn_scalar']
  if type(scalar) not in (int, float) or not scalar > 0:
    raise UserError(f'{where}: query_pre_attn_scalar must be a number above 0, got {scalar!r}')
  return {'embed_scale': math.sqrt(d_model), 'attn_scale': 0.0 if scalar == head_dim else scalar**-0.5}


def write_config(config: ModelConfig) -> tuple[Family, dict[str, Any]]:
  """(family, config.json) of a model: of the first family whose config.json, read again, is that model.

  Raises UserError if there is none, with what the nearest one lacks.
  """
  nearest: list[str] | None = None
  for family in FAMILIES.values():
    values = _write(config, family)
    try:
      different = [
        f'{family.name} has {there} where the model has {here}'
        for here, there in _differences(config, read_config(values)[1])
      ]
    except UserError as e:  # it is beyond the family
      different = [f'{family.name}: {e}']
    if not different:
      return family, values
    if nearest is None or len(different) < len(nearest):
      nearest = different
  raise UserError(f'no architecture of Hugging Face that is known here is this model: {"; ".join(nearest or [])}')


def _write(config: ModelConfig, family: Family) -> dict[str, Any]:
  """The config.json of the family's model that is nearest to `config`; readable by transformers 4 and 5."""
  c = config
  values = {theirs: getattr(c, ours) for ours, theirs in _SIZES.items()} | {
    'architectures': [family.name],
    'model_type': family.model_type,
    'num_key_value_heads': c.n_kv_heads,
    'head_dim': c.head_dim,
    'max_position_embeddings': c.max_seq_len,
    'tie_word_embeddings': c.tied,
    'rms_norm_eps': c.norm_eps,
    'rope_theta': c.rope_theta,
    'rope_scaling': _write_scaling(c.rope_scaling),
    'attention_bias': False,
    'hidden_act': 'silu',
  }
  if not family.is_gemma:
    return values
  pattern = c.global_every if c.local_window else 1
  scalar = round(c.attn_scale**-2, 6) if c.attn_scale else c.head_dim
  del values['hidden_act']
  return values | {
    'hidden_activation': 'gelu_pytorch_tanh',
    'attn_logit_softcapping': None,
    'final_logit_softcapping': None,
    'query_pre_attn_scalar': int(scalar) if scalar == int(scalar) else scalar,
    'sliding_window': c.local_window or 4096,
    'sliding_window_pattern': pattern,
    'layer_types': ['sliding_attention' if (i + 1) % pattern else 'full_attention' for i in range(c.n_layers)],
    'rope_local_base_freq': c.local_rope_theta,
  }


def _rope_sections(known: Mapping[str, Any], family: Family, where: str) -> tuple[dict[str, Any], dict[str, Any]]:
  """Return the rotary settings of (the global layers, the local layers), each with its rope_theta.

  transformers 5 keeps them in `rope_parameters`, 4 in separate fields. Raises UserError for values that the two versions read differently.
  """
  parameters, scaling = (_object(known.get(name), name, where) for name in ('rope_parameters', 'rope_scaling'))
  if parameters and scaling and parameters != scaling:
    raise UserError(f'{where}: rope_parameters and rope_scaling differ; keep the one that the model was trained with')
  separate = 'rope_local_base_freq' in family.defaults
  nested = {name: _object(parameters.get(name), name, where) for name in ('full_attention', 'sliding_attention')}
  if parameters and separate != any(name in parameters for name in nested):
    raise UserError(
      f'{where}: rope_parameters of {family.name} must have {"the fields of each kind of layer" if separate else "one set of fields"}; '
      f'got {", ".join(map(str, parameters))}'
    )
  if separate and 'type' in scaling and 'rope_type' not in scaling:
    raise UserError(
      f"{where}: rope_scaling has 'type', which {family.name} ignores in transformers 5; rename it to 'rope_type'"
    )
  whole = (nested['full_attention'] if separate else parameters) or scaling
  theta = whole.get('rope_theta', known['rope_theta'])
  if not separate:
    return {**whole, 'rope_theta': theta}, {**whole, 'rope_theta': theta}
  local = nested['sliding_attention']
  local_theta = local.get('rope_theta', known['rope_local_base_freq'])
  return {**whole, 'rope_theta': theta}, {**local, 'rope_theta': local_theta}


def _object(value: Any, name: str, where: str) -> dict[str, Any]:
  if not isinstance(value or {}, dict):
    raise UserError(f'{where}: {name} must be an object with fields, got {value!r}')
  return value or {}


def _read_scaling(rope: Mapping[str, Any], where: str) -> RopeScaling:
  method = rope.get('rope_type', rope.get('type', 'default'))
  if method == 'default':
    return RopeScaling()
  if not isinstance(method, str) or method not in _ROPE:
    raise UserError(f"{where}: rotary scaling '{method}' is not supported; known: default, {', '.join(_ROPE)}")
  missing = [name for name in _ROPE[method] if type(rope.get(name)) not in (int, float)]
  if missing:
    raise UserError(f"{where}: rotary scaling '{method}' has no number for {', '.join(missing)}")
  if rope.get('partial_rotary_factor', 1.0) != 1.0:
    raise UserError(f'{where}: rotary positions of a part of each head are not supported')
  if method == 'linear':
    factor = float(rope['factor'])
    return RopeScaling() if factor == 1.0 else RopeScaling(factor=factor, method='linear')
  factor, low, high, length = (rope[name] for name in _ROPE['llama3'])
  return RopeScaling(float(factor), float(low), float(high), int(length))


def _write_scaling(scaling: RopeScaling) -> dict[str, Any] | None:
  if scaling.factor == 1.0:
    return None
  values = (scaling.factor, scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_len)
  return {'rope_type': scaling.method, **dict(zip(_ROPE[scaling.method], values, strict=False))}


def _read_window(
  known: Mapping[str, Any], family: Family, n_layers: int, local_theta: float, where: str
) -> dict[str, Any]:
  """Return the fields of the local layers; {} if all layers are global."""
  pattern = known.get('sliding_window_pattern') or known.get('_sliding_window_pattern') or family.global_every
  if type(pattern) is not int or pattern < 0:
    raise UserError(f'{where}: sliding_window_pattern must be a whole number above 0, got {pattern!r}')
  kinds = known.get('layer_types') or _layer_types(n_layers, pattern)
  kinds = kinds if isinstance(kinds, list) else [kinds]
  if len(kinds) != n_layers or any(kind not in ('full_attention', 'sliding_attention') for kind in kinds):
    shown = ', '.join(map(str, kinds))
    raise UserError(f'{where}: layer_types must be {n_layers} of full_attention and sliding_attention, got {shown}')
  if 'sliding_attention' not in kinds:
    return {}
  every = next((n for n in range(2, n_layers + 2) if _layer_types(n_layers, n) == list(kinds)), None)
  if every is None or not family.global_every:
    raise UserError(
      f'{where}: local layers other than all but each n-th are not supported; layer_types is {", ".join(kinds)}'
    )
  return {'local_window': known['sliding_window'], 'global_every': every, 'local_rope_theta': local_theta}


def _layer_types(n_layers: int, global_every: int) -> list[str]:
  every = global_every or 1
  return ['sliding_attention' if (i + 1) % every else 'full_attention' for i in range(n_layers)]


def _differences(config: ModelConfig, again: ModelConfig) -> Iterator[tuple[str, str]]:
  """('name = here', 'name = there') of each field that matters and is not the same."""
  ours, theirs = dataclasses.asdict(_plain(config)), dataclasses.asdict(_plain(again))
  for name in ours:
    close = isinstance(ours[name], float) and math.isclose(ours[name], theirs[name], rel_tol=1e-9)
    if name not in _FREE and ours[name] != theirs[name] and not close:
      yield f'{name} = {ours[name]}', f'{name} = {theirs[name]}'


def _plain(config: ModelConfig) -> ModelConfig:
  """The model with the fields that mean nothing in it at their defaults."""
  scaling, default = config.rope_scaling, ModelConfig()
  if scaling.factor == 1.0:
    scaling = RopeScaling()
  elif scaling.method == 'linear':
    scaling = RopeScaling(factor=scaling.factor, method='linear')
  config = dataclasses.replace(config, rope_scaling=scaling)
  if not config.local_window or config.global_every == 1:
    config = dataclasses.replace(
      config, local_window=0, global_every=default.global_every, local_rope_theta=default.local_rope_theta
    )
  elif config.global_every > config.n_layers:
    config = dataclasses.replace(config, global_every=config.n_layers + 1)
  return config
