import contextlib
import copy
import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdjax.config import ModelConfig
from kdjax.errors import UserError
from kdjax.models import build
from kdjax.teachers.huggingface import families
from tests.teachers.huggingface.folders import LLAMA, MODELS

# Published models: what their config.json says of the architecture, and their number of parameters.
PUBLISHED = {
  'Llama-2-7b': (6_738_415_616, {
    'architectures': ['LlamaForCausalLM'], 'hidden_act': 'silu', 'hidden_size': 4096, 'intermediate_size': 11008,
    'max_position_embeddings': 4096, 'model_type': 'llama', 'num_attention_heads': 32, 'num_hidden_layers': 32,
    'num_key_value_heads': 32, 'pretraining_tp': 1, 'rms_norm_eps': 1e-05, 'rope_scaling': None, 'tie_word_embeddings': False,
    'vocab_size': 32000,
  }),
  'Llama-3.1-8B': (8_030_261_248, {
    'architectures': ['LlamaForCausalLM'], 'attention_bias': False, 'hidden_act': 'silu', 'hidden_size': 4096,
    'intermediate_size': 14336, 'max_position_embeddings': 131072, 'mlp_bias': False, 'model_type': 'llama',
    'num_attention_heads': 32, 'num_hidden_layers': 32, 'num_key_value_heads': 8, 'rms_norm_eps': 1e-05,
    'rope_scaling': {'factor': 8.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0, 'original_max_position_embeddings': 8192, 'rope_type': 'llama3'},
    'rope_theta': 500000.0, 'tie_word_embeddings': False, 'vocab_size': 128256,
  }),
  'Llama-3.2-1B': (1_235_814_400, {
    'architectures': ['LlamaForCausalLM'], 'attention_bias': False, 'head_dim': 64, 'hidden_act': 'silu', 'hidden_size': 2048,
    'intermediate_size': 8192, 'max_position_embeddings': 131072, 'mlp_bias': False, 'model_type': 'llama', 'num_attention_heads': 32,
    'num_hidden_layers': 16, 'num_key_value_heads': 8, 'rms_norm_eps': 1e-05,
    'rope_scaling': {'factor': 32.0, 'high_freq_factor': 4.0, 'low_freq_factor': 1.0, 'original_max_position_embeddings': 8192, 'rope_type': 'llama3'},
    'rope_theta': 500000.0, 'tie_word_embeddings': True, 'vocab_size': 128256,
  }),
  'SmolLM2-135M': (134_515_008, {
    'architectures': ['LlamaForCausalLM'], 'attention_bias': False, 'hidden_act': 'silu', 'hidden_size': 576,
    'intermediate_size': 1536, 'is_llama_config': True, 'max_position_embeddings': 8192, 'model_type': 'llama', 'num_attention_heads': 9,
    'num_hidden_layers': 30, 'num_key_value_heads': 3, 'rms_norm_eps': 1e-05, 'rope_interleaved': False, 'rope_scaling': None,
    'rope_theta': 100000, 'tie_word_embeddings': True, 'vocab_size': 49152,
  }),
  'Qwen2.5-0.5B': (494_032_768, {
    'architectures': ['Qwen2ForCausalLM'], 'hidden_act': 'silu', 'hidden_size': 896, 'intermediate_size': 4864,
    'max_position_embeddings': 32768, 'max_window_layers': 24, 'model_type': 'qwen2', 'num_attention_heads': 14, 'num_hidden_layers': 24,
    'num_key_value_heads': 2, 'rms_norm_eps': 1e-06, 'rope_theta': 1000000.0, 'sliding_window': 32768, 'tie_word_embeddings': True,
    'use_sliding_window': False, 'vocab_size': 151936,
  }),
  'Qwen3-0.6B': (596_049_920, {
    'architectures': ['Qwen3ForCausalLM'], 'attention_bias': False, 'head_dim': 128, 'hidden_act': 'silu', 'hidden_size': 1024,
    'intermediate_size': 3072, 'max_position_embeddings': 40960, 'max_window_layers': 28, 'model_type': 'qwen3',
    'num_attention_heads': 16, 'num_hidden_layers': 28, 'num_key_value_heads': 8, 'rms_norm_eps': 1e-06, 'rope_scaling': None,
    'rope_theta': 1000000, 'sliding_window': None, 'tie_word_embeddings': True, 'use_sliding_window': False, 'vocab_size': 151936,
  }),
  'OLMo-2-1124-7B': (7_298_617_344, {
    'architectures': ['Olmo2ForCausalLM'], 'attention_bias': False, 'hidden_act': 'silu', 'hidden_size': 4096,
    'intermediate_size': 11008, 'max_position_embeddings': 4096, 'model_type': 'olmo2', 'num_attention_heads': 32, 'num_hidden_layers': 32,
    'num_key_value_heads': 32, 'rms_norm_eps': 1e-06, 'rope_scaling': None, 'rope_theta': 500000, 'tie_word_embeddings': False,
    'vocab_size': 100352,
  }),
  'gemma-3-1b': (999_885_952, {
    'architectures': ['Gemma3ForCausalLM'], 'attention_bias': False, 'attn_logit_softcapping': None, 'final_logit_softcapping': None,
    'head_dim': 256, 'hidden_activation': 'gelu_pytorch_tanh', 'hidden_size': 1152, 'intermediate_size': 6912,
    'max_position_embeddings': 32768, 'model_type': 'gemma3_text', 'num_attention_heads': 4, 'num_hidden_layers': 26,
    'num_key_value_heads': 1, 'query_pre_attn_scalar': 256, 'rms_norm_eps': 1e-06, 'rope_local_base_freq': 10000, 'rope_scaling': None,
    'rope_theta': 1000000, 'sliding_window': 512, 'sliding_window_pattern': 6, 'vocab_size': 262144,
  }),
}  # fmt: skip
SMALL = {
  'architectures': ['LlamaForCausalLM'],
  'vocab_size': 300,
  'hidden_size': 64,
  'num_hidden_layers': 2,
  'intermediate_size': 96,
  'num_attention_heads': 4,
}
GEMMA = SMALL | {'architectures': ['Gemma3ForCausalLM'], 'num_hidden_layers': 8}


@pytest.mark.parametrize('name', PUBLISHED)
def test_a_published_model_has_its_number_of_parameters(name):
  wanted, values = PUBLISHED[name]
  assert build(families.read_config(values)[1]).n_params == wanted


def test_what_the_published_ones_say_is_read():
  read = lambda name: families.read_config(PUBLISHED[name][1])[1]
  llama, gemma = read('Llama-3.1-8B'), read('gemma-3-1b')
  assert (llama.rope_theta, llama.rope_scaling.factor, llama.max_seq_len) == (500_000.0, 8.0, 131_072)
  assert read('Llama-2-7b').rope_theta == 10_000.0  # its config.json does not say
  assert (gemma.tied, gemma.local_window, gemma.global_every, gemma.local_rope_theta) == (True, 512, 6, 10_000.0)
  assert (gemma.embed_scale, gemma.attn_scale, gemma.norm_offset) == (1152**0.5, 0.0, True)
  assert read('Qwen2.5-0.5B').local_window == 0  # it names a window that it does not use


@pytest.mark.parametrize('name', MODELS)
def test_a_family_is_written_and_read_back_as_the_same_model(name):
  config = MODELS[name]
  family, values = families.write_config(config)
  assert family.name == name.split()[0]
  assert families.read_config(values)[1] == config


LINEAR, DEFAULT = {'rope_type': 'linear', 'factor': 4.0, 'rope_theta': 1e4}, {'rope_type': 'default', 'rope_theta': 1e6}


@pytest.mark.parametrize('local', [LINEAR, {'type': 'linear', 'factor': 4.0}, {'rope_type': 'llama3', **dict.fromkeys(
  ('factor', 'low_freq_factor', 'high_freq_factor', 'original_max_position_embeddings'), 8)}])  # fmt: skip
@pytest.mark.parametrize('whole', [DEFAULT, LINEAR, None])
def test_scaled_rotary_positions_of_local_layers_are_refused_whatever_the_others_are(whole, local):
  parameters = {'sliding_attention': local} | ({'full_attention': whole} if whole else {})
  with pytest.raises(UserError, match='rotary scaling of the local layers is not supported'):
    families.read_config(GEMMA | {'rope_parameters': parameters})
  # They are accepted if no layer is local, or nothing is scaled.
  kinds = ['full_attention'] * GEMMA['num_hidden_layers']
  assert families.read_config(GEMMA | {'rope_parameters': parameters, 'layer_types': kinds})[1].local_window == 0
  none = {'sliding_attention': {'rope_type': 'linear', 'factor': 1.0}}
  assert families.read_config(GEMMA | {'rope_parameters': parameters | none})[1].local_window > 0


def test_transformers_5_keeps_rotary_parameters_together():
  old = families.read_config(
    GEMMA | {'rope_theta': 5e5, 'rope_local_base_freq': 2e4, 'rope_scaling': {'rope_type': 'linear', 'factor': 4}}
  )[1]
  parameters = {
    'full_attention': {'rope_theta': 5e5, 'rope_type': 'linear', 'factor': 4.0},
    'sliding_attention': {'rope_theta': 2e4, 'rope_type': 'default'},
  }
  assert families.read_config(GEMMA | {'rope_parameters': parameters})[1] == old
  assert (old.rope_theta, old.local_rope_theta, old.rope_scaling.factor) == (5e5, 2e4, 4.0)
  flat = families.read_config(SMALL | {'rope_parameters': {'rope_theta': 3e4, 'rope_type': 'default'}})[1]
  assert flat == families.read_config(SMALL | {'rope_theta': 3e4})[1] != families.read_config(SMALL)[1]


def test_layers_that_see_all_are_told_from_local_ones():
  kinds = ['sliding_attention', 'sliding_attention', 'full_attention'] * 2 + ['sliding_attention'] * 2
  config = families.read_config(GEMMA | {'layer_types': kinds, 'sliding_window': 12})[1]
  assert (config.local_window, config.global_every) == (12, 3)
  everywhere = families.read_config(GEMMA | {'layer_types': ['full_attention'] * 8})[1]
  assert everywhere.local_window == 0


@pytest.mark.parametrize(
  ('change', 'said'),
  [
    ({'architectures': ['MambaForCausalLM']}, r'unknown architecture MambaForCausalLM; known: LlamaForCausalLM, Qwen2ForCausalLM, '),
    ({'architectures': None, 'model_type': 'gpt2'}, r'unknown architecture gpt2; known: '),
    ({'architectures': None}, r'unknown architecture none; known: '),
    ({'architectures': 'GPT2'}, r'unknown architecture GPT2; known: '),
    ({'rope_parameters': 'x'}, r"rope_parameters must be an object with fields, got 'x'"),
    ({'rope_parameters': {'full_attention': {'rope_type': 'default'}}}, r'rope_parameters of LlamaForCausalLM must have one set of fields'),
    ({'rope_parameters': {'rope_type': 'default'}, 'rope_scaling': {'rope_type': 'linear', 'factor': 2.0}}, r'rope_parameters and rope_scaling differ'),
    ({'num_attention_heads': 0, 'num_hidden_layers': -5}, r'no whole number above 0 for num_hidden_layers, num_attention_heads'),
    ({'max_position_embeddings': 0}, r'no whole number above 0 for max_position_embeddings'),
    ({'attention_bias': True}, r'attention_bias = True: biases of all attention matrices are not supported'),
    ({'mlp_bias': True}, r'mlp_bias = True: biases in the MLP are not supported'),
    ({'partial_rotary_factor': 0.5}, r'partial_rotary_factor = 0.5: .* not supported'),
    ({'quantization_config': {'bits': 4}}, r"quantization_config = \{'bits': 4\}: quantised weights are not supported"),
    ({'hidden_act': 'relu'}, r"the activation 'relu' is not supported in LlamaForCausalLM"),
    ({'rope_scaling': {'rope_type': 'yarn', 'factor': 4.0}}, r"rotary scaling 'yarn' is not supported; known: default, llama3, linear"),
    ({'rope_scaling': {'type': 'dynamic', 'factor': 4.0}}, r"rotary scaling 'dynamic' is not supported"),
    ({'rope_scaling': {'rope_type': 'llama3', 'factor': 8.0}}, r"rotary scaling 'llama3' has no number for low_freq_factor, high_freq_factor, original_max_pos"),
    ({'hidden_size': None}, r'no whole number above 0 for hidden_size'),
    ({'vocab_size': 'many', 'num_hidden_layers': 2.5}, r'no whole number above 0 for vocab_size, num_hidden_layers'),
    ({'rms_norm_eps': 'small'}, r"norm_eps would be 'small', which is no float"),
    ({'layer_types': ['full_attention', 'sliding_attention'], 'sliding_window': 8}, r'local layers other than all but each n-th are not'),
    ({'layer_types': ['full_attention']}, r'layer_types must be 2 of full_attention and sliding_attention, got full_attention'),
    ({'layer_types': ['linear_attention'] * 2}, r'layer_types must be 2 of'),
  ],
)  # fmt: skip
def test_what_the_decoder_cannot_be_is_refused_by_name(change, said):
  with pytest.raises(UserError, match=rf'^config\.json: {said}') as e:
    families.read_config(SMALL | change)
  assert '\n' not in str(e.value)


@pytest.mark.parametrize(
  ('change', 'said'),
  [
    (
      {'architectures': ['Gemma2ForCausalLM']},
      r'attn_logit_softcapping = 50.0: soft caps on attention scores are not supported',
    ),
    ({'final_logit_softcapping': 30.0}, r'final_logit_softcapping = 30.0: soft caps on logits are not supported'),
    ({'use_bidirectional_attention': True}, r'attention to later tokens'),
    ({'layer_types': ['full_attention'] + ['sliding_attention'] * 7}, r'local layers other than all but each n-th'),
    (
      {
        'architectures': ['Gemma2ForCausalLM'],
        'attn_logit_softcapping': None,
        'final_logit_softcapping': None,
        'rope_scaling': {'rope_type': 'linear', 'factor': 2.0},
      },
      r'rotary scaling of the local layers is not supported',
    ),
  ],
)
def test_gemmas_own_traps(change, said):
  with pytest.raises(UserError, match=said):
    families.read_config(GEMMA | change)


@pytest.mark.parametrize(
  ('change', 'said'),
  [
    ({'qk_norm': True, 'qkv_bias': True}, r'qk_norm = False where the model has qk_norm = True'),
    ({'attn_scale': 0.3}, r'LlamaForCausalLM has attn_scale = 0.0 where the model has attn_scale = 0.3'),
    ({'norms': 'after'}, r'norms = after'),
  ],
)
def test_a_model_that_no_architecture_is_says_what_the_nearest_lacks(change, said):
  with pytest.raises(UserError, match=rf'no architecture of Hugging Face .* is this model: .*{said}'):
    families.write_config(dataclasses.replace(LLAMA, **change))


def test_fields_that_mean_nothing_do_not_stand_in_the_way():
  unused = dataclasses.replace(
    LLAMA, global_every=3, local_rope_theta=7.0, pad_vocab_to=8, dtype='bfloat16', remat='full'
  )
  assert families.write_config(unused)[0].name == 'LlamaForCausalLM'
  assert families.write_config(ModelConfig(vocab_size=257))[0].name == 'LlamaForCausalLM'


NAMES = [
  'architectures', 'model_type', 'vocab_size', 'hidden_size', 'num_hidden_layers', 'num_attention_heads', 'num_key_value_heads', 'head_dim',
  'rope_theta', 'rope_scaling', 'rope_parameters', 'rope_local_base_freq', 'sliding_window', 'sliding_window_pattern', 'layer_types',
  'hidden_act', 'hidden_activation', 'query_pre_attn_scalar', 'tie_word_embeddings', 'rms_norm_eps', 'max_position_embeddings',
  'final_logit_softcapping', 'quantization_config', 'partial_rotary_factor', 'use_sliding_window', 'rope_parameters.full_attention',
  'rope_parameters.sliding_attention', 'rope_parameters.sliding_attention.rope_type', 'rope_parameters.full_attention.factor',
]  # fmt: skip
ANYTHING = st.recursive(
  st.none()
  | st.booleans()
  | st.integers(-2, 70_000)
  | st.floats()
  | st.sampled_from(['linear', 'llama3', 'x', 'full_attention']),
  lambda inner: (
    st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(['rope_type', 'factor', 'x']), inner, max_size=3)
  ),
  max_leaves=4,
)


@settings(max_examples=100, deadline=None)
@given(
  st.sampled_from(list(PUBLISHED)), st.lists(st.tuples(st.sampled_from(NAMES), ANYTHING | st.just('drop')), max_size=3)
)
def test_a_damaged_config_is_one_line_or_a_model(name, changes):
  values = copy.deepcopy(PUBLISHED[name][1])
  if 'gemma' in name and any('.' in field for field, _ in changes):
    values['rope_parameters'] = {'full_attention': {}, 'sliding_attention': {}}
  for field, value in changes:
    *inside, leaf = field.split('.')
    place = values
    for part in inside:
      place = place.get(part) if isinstance(place, dict) else None
    if isinstance(place, dict):
      place[leaf] = value
      if value == 'drop':
        del place[leaf]
  with contextlib.suppress(UserError):  # any other error fails
    build(families.read_config(values)[1])
