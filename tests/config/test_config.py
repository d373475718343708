"""The config: every field can be set, every mistake is found, all of them at once."""

import dataclasses
import pathlib

import ml_collections
import pytest

from kdjax import cli
from kdjax import config as config_lib
from kdjax.config import Config, scales
from kdjax.errors import ConfigError

FOLDER = pathlib.Path(__file__).parents[2] / 'configs'
CONFIGS = sorted(
  path for path in FOLDER.glob('*.py') if path.stem not in ('grid', 'evidence')
)  # the grids': tests/sweeps/test_cells.py
LEAVES = dict(config_lib.leaves(Config, ''))


def problems(**overrides) -> list[str]:
  """What `resolve` finds in the default config with fields changed (dots as double underscores), as the config file would."""
  config = config_lib.default()
  for key, value in overrides.items():
    *parents, leaf = key.split('__')
    node = config
    for name in parents:
      node = node[name]
    with node.unlocked(), node.ignore_type():
      node[leaf] = value
  with pytest.raises(ConfigError) as e:
    config_lib.resolve(config)
  return e.value.problems


def problem(**overrides) -> str:
  found = problems(**overrides)
  assert len(found) == 1, found
  return found[0]


def overridden(**texts) -> Config:
  """The default config with fields changed as the command line does."""
  config = config_lib.default()
  assert config_lib.override(config, {key.replace('__', '.'): text for key, text in texts.items()}) == []
  return config_lib.resolve(config)


def override_problems(**texts) -> list[str]:
  return config_lib.override(config_lib.default(), {key.replace('__', '.'): text for key, text in texts.items()})


def test_the_default_is_right():
  assert config_lib.resolve(config_lib.default()) == Config()


@pytest.mark.parametrize('scale', scales.SCALES)
@pytest.mark.parametrize('path', CONFIGS, ids=lambda p: p.stem)
def test_every_config_resolves_at_every_scale(path, scale):
  config = cli.load_config(f'{path}:scale={scale}')
  assert (config.name, config.scale) == (path.stem, scale)
  assert config == cli.load_config(f'{path}:scale={scale}')
  assert cli.load_config(str(path)).scale == 'laptop'


@pytest.mark.parametrize('path', CONFIGS, ids=lambda p: p.stem)
def test_a_config_with_every_field_given_on_the_command_line_is_the_same_config(path):
  config = cli.load_config(str(path))
  texts = {}
  for key in LEAVES:
    value = config
    for name in key.split('.'):
      value = getattr(value, name)
    if isinstance(value, dict):
      texts |= {f'{key}.{name}': source for name, source in value.items()}
    else:
      texts[key] = ','.join(map(str, value)) if isinstance(value, tuple) else str(value)
  assert cli.load_config(str(path), texts) == config


@pytest.mark.parametrize('key', LEAVES)
def test_every_field_can_be_reached_from_the_command_line(key):
  annotation = LEAVES[key]
  text, value = {
    str: ('zebra', 'zebra'),
    int: ('7', 7),
    float: ('0.125', 0.125),
    bool: ('false', False),
    tuple[float, float]: ('0.25,0.5', (0.25, 0.5)),
    tuple[int, ...]: ('1000, 2e3', (1000, 2000)),
    tuple[str, ...]: ('baseline', ('baseline',)),
    dict[str, str]: ('zebra', 'zebra'),
  }[annotation]
  name = f'{key}.new' if annotation == dict[str, str] else key
  config = config_lib.default()
  assert config_lib.override(config, {name: text}) == []
  node = config.to_dict()
  for part in name.split('.'):
    node = node[part]
  assert node == value
  assert type(node) is type(value)


@pytest.mark.parametrize(
  ('text', 'value'), [('1e6', 1_000_000), ('1_000', 1000), ('2.5e3', 2500), ('12', 12), ('8.0', 8)]
)
def test_a_whole_number_may_be_written_as_1e6(text, value):
  tokens = overridden(student__tokens=f'{value * 1024}', student__batch_size='8').student.tokens
  assert tokens == value * 1024
  config = config_lib.default()
  assert config_lib.override(config, {'student.tokens': text}) == []
  assert config.student.tokens == value and type(config.student.tokens) is int


def test_a_whole_number_of_a_config_file_may_be_a_whole_float():
  config = config_lib.default()
  with config.student.ignore_type():
    config.student.tokens = 5e6
  tokens = config_lib.resolve(config).student.tokens
  assert tokens == 5_000_000 and type(tokens) is int


@pytest.mark.parametrize('text', ['1.5', '1e-3', 'many', '', 'true', 'nan', 'inf', '1e400', '0x10'])
def test_what_is_no_whole_number_is_refused(text):
  assert override_problems(student__batch_size=text) == [
    f'--config.student.batch_size: expected a whole number, got {text!r}'
  ]


@pytest.mark.parametrize('text', ['half', '', 'true', '1,2', 'nan', 'inf', '-inf'])
def test_what_is_no_number_is_refused(text):
  assert override_problems(student__alpha=text) == [f'--config.student.alpha: expected a number, got {text!r}']


@pytest.mark.parametrize(
  ('text', 'value'),
  [('true', True), ('True', True), ('1', True), ('false', False), ('False', False), ('0', False)],
)
def test_booleans(text, value):
  assert overridden(data__mask_documents=text).data.mask_documents is value


@pytest.mark.parametrize('text', ['yes', '', '2', 'on'])
def test_what_is_no_boolean_is_refused(text):
  assert override_problems(data__mask_documents=text) == [
    f'--config.data.mask_documents: expected true or false, got {text!r}'
  ]


@pytest.mark.parametrize('text', ['0.25,0.75', '(0.25, 0.75)', '[0.25,0.75]', ' 0.25 , 0.75 '])
def test_a_pair_of_numbers(text):
  assert overridden(student__slice=text).student.slice == (0.25, 0.75)


@pytest.mark.parametrize('text', ['0.25', '0,0.5,1', 'a,b', ''])
def test_what_is_no_pair_of_numbers_is_refused(text):
  (found,) = override_problems(student__slice=text)
  assert found.startswith('--config.student.slice: expected ') and repr(text) in found


@pytest.mark.parametrize('text', ["('baseline','distilled')", 'baseline,distilled', '["baseline", "distilled"]'])
def test_a_list_of_names(text):
  assert overridden(student__arms=text).student.arms == ('baseline', 'distilled')


def test_the_out_of_domain_sets_can_be_changed_and_added_to():
  config = overridden(eval__ood__mine='data/*.txt', eval__ood__code='other.jsonl')
  assert config.eval.ood['mine'] == 'data/*.txt'
  assert config.eval.ood['code'] == 'other.jsonl'
  assert set(config.eval.ood) > {'mine', 'code'}


def test_the_mapping_itself_cannot_be_set_to_text():
  (found,) = override_problems(eval__ood='data/*.txt')
  assert '--config.eval.ood' in found and 'NAME' in found


@pytest.mark.parametrize(
  ('key', 'nearest'),
  [
    ('student__alhpa', 'student.alpha'),
    ('studnet__alpha', 'student.alpha'),
    ('teacher__optimizer__learning_rat', 'teacher.optimizer.learning_rate'),
    ('temperature', 'loss.temperature'),
  ],
)
def test_an_unknown_field_names_the_nearest(key, nearest):
  assert override_problems(**{key: '1'}) == [
    f'--config.{key.replace("__", ".")}: no such field; did you mean {nearest}?'
  ]


@pytest.mark.parametrize('key', ['student', 'student__model', '', 'student__', 'student__alpha__x', '__alpha'])
def test_what_is_no_field_is_refused(key):
  (found,) = override_problems(**{key: '1'})
  assert 'no such field' in found


def test_an_unknown_field_of_a_config_file_names_the_nearest():
  assert problem(student__alhpa=0.3) == 'student.alhpa: no such field; did you mean alpha?'


def test_a_section_replaced_by_a_value_is_refused():
  assert 'student.optimizer: expected a section' in problem(student__optimizer=3)


@pytest.mark.parametrize(
  ('key', 'value', 'expected'),
  [
    ('student__alpha', '0.4', 'a number'),
    ('student__alpha', None, 'a number'),
    ('student__batch_size', 8.5, 'a whole number'),
    ('student__batch_size', True, 'a whole number'),
    ('student__batch_size', float('inf'), 'a whole number'),
    ('data__source', 3, 'text'),
    ('data__source', pathlib.Path('x'), 'text'),
    ('data__mask_documents', 1, 'true or false'),
    ('student__slice', (0.5,), 'two numbers'),
    ('student__arms', 'baseline', 'a list of names'),
    ('eval__ood', 'x', 'entries (.NAME=TEXT)'),
  ],
)
def test_a_value_of_another_type_is_refused(key, value, expected):
  found = problem(**{key: value})
  assert found.startswith(f'{key.replace("__", ".")}: expected {expected}, got ')


WRONG = [
  ('student__alpha', -0.1, 'student.alpha: must be in [0, 1], got -0.1'),
  ('student__alpha', 1.01, 'student.alpha: must be in [0, 1], got 1.01'),
  ('student__alpha_schedule__final', 2.0, 'student.alpha_schedule.final: must be in [0, 1], got 2'),
  ('student__alpha_schedule__kind', 'step', 'student.alpha_schedule.kind: unknown value'),
  ('student__alpha_schedule__begin', 1.5, 'begin <= end'),
  ('loss__temperature', 0.0, 'loss.temperature: must be above 0'),
  ('loss__temperature', -1.0, 'loss.temperature: must be above 0'),
  ('loss__teacher_top_k', 2.5, 'loss.teacher_top_k'),
  ('loss__teacher_top_k', -1.0, 'loss.teacher_top_k'),
  ('loss__teacher_top_p', 0.0, 'loss.teacher_top_p'),
  ('loss__teacher_top_p', 1.5, 'loss.teacher_top_p'),
  ('loss__divergence', 'reverse', "loss.divergence: unknown value 'reverse'; known: forward_kl, hard_label"),
  ('loss__mixing', 'sum', 'loss.mixing: unknown value'),
  ('loss__rest', 'drop', 'loss.rest: unknown value'),
  ('loss__z_loss', -1.0, 'loss.z_loss'),
  ('loss__chunk_tokens', -1, 'loss.chunk_tokens'),
  ('student__arms', (), 'student.arms'),
  ('student__arms', ('baseline', 'baseline'), 'student.arms'),
  ('student__arms', ('baseline', 'other'), 'student.arms'),
  ('student__microbatches', 3, 'student.microbatches: 3 does not divide student.batch_size = 8'),
  ('student__microbatches', 0, 'student.microbatches'),
  ('student__batch_size', 0, 'student.'),
  ('student__tokens', 10, 'student.tokens: 10 is less than one step'),
  ('student__slice', (0.5, 0.5), 'student.slice'),
  ('student__slice', (0.0, 1.5), 'student.slice'),
  ('student__optimizer__learning_rate', 0.0, 'student.optimizer.learning_rate'),
  ('student__optimizer__schedule', 'linear', 'student.optimizer.schedule: unknown value'),
  ('student__optimizer__warmup_fraction', 1.5, 'student.optimizer.warmup_fraction'),
  ('student__optimizer__b2', 1.0, 'student.optimizer.b2'),
  ('student__optimizer__eps', -1e-8, 'student.optimizer.eps'),
  ('student__optimizer__weight_decay', -0.1, 'student.optimizer.weight_decay'),
  ('student__optimizer__clip_norm', 0.0, 'student.optimizer.clip_norm'),
  ('student__model__dtype', 'float16', 'student.model.dtype: unknown value'),
  ('student__model__attention', 'flash', 'student.model.attention: unknown value'),
  ('student__model__remat', 'all', 'student.model.remat: unknown value'),
  ('student__seed', -1, 'student.seed'),
  ('teacher__seed', 2**32, 'teacher.seed'),
  ('data__split_seed', -1, 'data.split_seed'),
  ('student__model__d_model', 0, 'student.model.d_model'),
  ('student__model__n_kv_heads', 3, 'student.model.n_kv_heads: 3 does not divide student.model.n_heads = 4'),
  ('student__model__n_kv_heads', 0, 'student.model.n_kv_heads'),
  ('student__model__head_dim', 7, 'student.model.head_dim'),
  ('student__model__pad_vocab_to', 0, 'student.model.pad_vocab_to'),
  ('teacher__model__vocab_size', -1, 'teacher.model.vocab_size'),
  ('teacher__model__rope_scaling__factor', 0.0, 'teacher.model.rope_scaling.factor'),
  ('teacher__dtype', 'int4', 'teacher.dtype: unknown value'),
  ('teacher__step', -5, 'teacher.step'),
  ('teacher__step', 100, 'teacher.step: there is no teacher.run'),
  ('teacher__forward_microbatch', -1, 'teacher.forward_microbatch'),
  ('teacher__forward_microbatch', 3, 'teacher.forward_microbatch: 3 does not divide'),
  ('data__seq_len', 0, 'data.seq_len'),
  ('data__validation_fraction', 0.0, 'data.validation_fraction'),
  ('data__test_fraction', 0.95, 'data: validation_fraction + test_fraction'),
  ('data__distinct_tokens', -1, 'data.distinct_tokens'),
  ('data__prefetch', -1, 'data.prefetch'),
  ('eval__ood_validation_fraction', 1.0, 'eval.ood_validation_fraction'),
  ('eval__stride', 1000, 'eval.stride'),
  ('eval__stride', -1, 'eval.stride'),
  ('eval__window', -1, 'eval.window'),
  ('eval__batch_size', 0, 'eval.batch_size'),
  ('eval__every', -1, 'eval.every'),
  ('eval__max_bytes', -1, 'eval.max_bytes'),
  ('checkpoint__every', -1, 'checkpoint.every'),
  ('checkpoint__keep', 0, 'checkpoint.keep'),
  ('checkpoint__keep_period', -1, 'checkpoint.keep_period'),
  ('checkpoint__keep_minutes', -1.0, 'checkpoint.keep_minutes'),
  ('checkpoint__local', '/dev/shm/kdjax', 'checkpoint: local and local_every belong together'),
  ('checkpoint__local_every', 5, 'checkpoint: local and local_every belong together'),
  ('checkpoint__local', 'gs://bucket/local', 'checkpoint.local: must be a folder of each host'),
  ('runs', ' ', 'runs: must name a folder'),
  ('data__cache', 'gs://bucket/stores', 'data.cache: must be a folder of each host'),
  ('data__separator', '<s>', 'data.separator: the tokenizer bpe'),
  ('student__tokens', 10**15, 'student.tokens: 1e+15 are more than 10,000,000 steps'),
  ('mesh__tensor', 0, 'mesh.tensor'),
  ('mesh__replica', -2, 'mesh.replica'),
  ('mesh__tensor', -1, 'mesh: only one axis can be -1'),
  ('steps_per_call', 0, 'steps_per_call'),
  ('max_skipped', 0, 'max_skipped'),
  ('heartbeat_timeout', 0, 'heartbeat_timeout'),
  ('scale', 'huge', 'scale: unknown value'),
]


@pytest.mark.parametrize(('key', 'value', 'words'), WRONG)
def test_a_value_out_of_range_is_refused_naming_the_field(key, value, words):
  assert words in problem(**{key: value})


def test_local_checkpoints_come_between_those_of_the_folder():
  fields = {'checkpoint__local': '/dev/shm/kdjax', 'checkpoint__every': 10}
  for every in (10, 20):
    told = f'checkpoint.local_every: must be below checkpoint.every = 10, got {every}: none would be written'
    assert problem(**fields, checkpoint__local_every=every) == told
  other = {'checkpoint__local': '/dev/shm/kdjax', 'scale': 'huge'}
  for every, local_every in ((10, 4), (10, 15), (0, 4)):
    assert problem(**other, checkpoint__every=every, checkpoint__local_every=local_every).startswith('scale')


@pytest.mark.parametrize('value', [float('nan'), float('inf'), float('-inf')])
@pytest.mark.parametrize('key', [key for key, annotation in LEAVES.items() if annotation is float])
def test_every_number_must_be_finite(key, value):
  assert any(p.startswith(f'{key}: expected a number, got') for p in problems(**{key.replace('.', '__'): value}))


def test_a_sequence_longer_than_the_models_limit_is_refused_for_each_model():
  found = problems(
    data__seq_len=256,
    student__model__max_seq_len=128,
    teacher__model__max_seq_len=128,
    eval__window=64,
    eval__stride=32,
  )
  assert found == [
    f'data.seq_len: 256 tokens are more than {name}.model.max_seq_len = 128' for name in ('student', 'teacher')
  ]


def test_an_evaluation_window_longer_than_the_models_limit_is_refused():
  assert 'eval.window: 9000 tokens are more than student.model.max_seq_len = 8192' in problems(eval__window=9000)


@pytest.mark.parametrize(
  'change', [{'loss__temperature': 2.0}, {'loss__teacher_top_k': 5.0}, {'loss__teacher_top_p': 0.9}]
)
def test_hard_labels_have_no_temperature_and_no_top_k(change):
  assert 'hard_label' in problem(loss__divergence='hard_label', **change)


def test_warm_up_and_decay_fit_into_the_run():
  assert 'more than the whole run' in problem(
    student__optimizer__schedule='wsd', student__optimizer__warmup_fraction=0.5, student__optimizer__decay_fraction=0.6
  )


def test_all_mistakes_are_reported_at_once():
  found = problems(student__alpha=3.0, loss__temperature=-1.0, data__seq_len=0, mesh__tensor=-1, steps_per_call=0)
  assert len(found) == 5
  found = problems(student__alhpa=3.0, loss__temperature='hot', data=4)
  assert len(found) == 3


def test_a_wrong_type_does_not_hide_another_fields_value():
  """Types and values are two passes; a mistake of the one kind must not hide the other."""
  assert len(problems(student__alpha='much', loss__temperature=-1.0)) == 2


def test_the_config_cannot_be_changed():
  with pytest.raises(dataclasses.FrozenInstanceError):
    Config().name = 'other'  # type: ignore[misc]


def test_the_config_files_argument():
  known = {'scale': ('laptop', 'paper'), 'size': ('small', 'large')}
  assert config_lib.parse_arg(None, **known) == {'scale': 'laptop', 'size': 'small'}
  assert config_lib.parse_arg('size=large,scale=paper', **known) == {'scale': 'paper', 'size': 'large'}


@pytest.mark.parametrize(
  ('arg', 'words'),
  [
    ('scale=papper', "unknown scale 'papper'; known: laptop, paper"),
    ('sclae=paper', "unknown argument 'sclae' after the config file's colon; did you mean scale?"),
    ('paper', "unknown argument 'paper'"),
    ('scale=', "unknown scale ''"),
  ],
)
def test_an_unknown_argument_of_the_config_file_is_refused(arg, words):
  with pytest.raises(ConfigError) as e:
    config_lib.parse_arg(arg, scale=('laptop', 'paper'))
  (found,) = e.value.problems
  assert words in found


def test_the_fingerprint_depends_on_every_value_and_on_nothing_else():
  a, b = overridden(student__alpha='0.3'), overridden(student__alpha='0.3')
  assert config_lib.fingerprint(a) == config_lib.fingerprint(b) == config_lib.fingerprint(config_lib.as_dict(a))
  assert config_lib.fingerprint(a) != config_lib.fingerprint(overridden(student__alpha='0.30001'))
  assert config_lib.fingerprint({'a': 1, 'b': 2}) == config_lib.fingerprint({'b': 2, 'a': 1})


def test_steps_spend_the_tokens():
  config = overridden(student__tokens='1e6', student__batch_size='8', data__seq_len='128')
  assert config_lib.n_steps(config.student, config.data) == round(1e6 / 1024)


def test_a_resolved_config_survives_json_and_back():
  """What run.json keeps is what the eval job reads."""
  import json

  config = overridden(student__slice='0,0.5', eval__ood__mine='x.txt')
  values = json.loads(json.dumps(config_lib.as_dict(config)))
  assert config_lib.resolve(ml_collections.ConfigDict(values)) == config


@pytest.mark.parametrize('value', [10**400, -(10**400), 2**63, 1e300], ids=['1e400', '-1e400', '2**63', '1e300'])
def test_a_number_beyond_any_meaning_is_refused(value):
  (problem,) = problems(student__tokens=value)
  assert problem.startswith('student.tokens: expected whole numbers below 2^63, got ')
  tree = config_lib.default().to_dict()
  tree['student']['alpha'] = value
  with pytest.raises(ConfigError, match=r'student\.alpha: '):
    config_lib.resolve(ml_collections.ConfigDict(tree))
  assert override_problems(data__vocab_size=str(value))
