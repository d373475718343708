"""A field's declaration holds: identities change exactly where it says so, and its choices and bounds are checked."""

import dataclasses
import typing

import pytest

from kdjax import cli
from kdjax import config as config_lib
from kdjax.config import Config, fields
from kdjax.config.fields import ABSENT, Meta
from kdjax.errors import ConfigError
from kdjax.sweeps import config as grid_config
from kdjax.sweeps import runner
from kdjax.sweeps.config import GridConfig
from kdjax.trainer import experiments

OTHER = {  # values of fields whose other values are not valid by themselves
  'student.arms': ('baseline', 'distilled'),
  'loss.teacher_top_k': 5.0,
  'teacher.trunk': (500_000, 1_000_000),
}
IDENTIFIED = ('teacher', 'student', 'loss', 'data')  # sections that an experiment's identity holds


def declared(kind: type, prefix: str = '') -> dict[str, tuple[dataclasses.Field, Meta]]:
  """Each leaf field by its dotted name."""
  found = {}
  for each in dataclasses.fields(kind):
    if dataclasses.is_dataclass(each.default):
      found |= declared(type(each.default), f'{prefix}{each.name}.')
    else:
      found[prefix + each.name] = (each, fields.meta(each))
  return found


CONFIG = declared(Config)
GRID = {key: value for key, value in declared(GridConfig).items() if not key.startswith('base.')}


def changed(config, key: str, value):
  section, _, rest = key.partition('.')
  return dataclasses.replace(config, **{section: changed(getattr(config, section), rest, value) if rest else value})


def another(key: str, value, meta: Meta):
  """A valid value that is not `value`."""
  if key in OTHER:
    return OTHER[key]
  if meta.choices and isinstance(value, str):
    return next(choice for choice in meta.choices if choice != value)
  match value:
    case bool():
      return not value
    case float():
      return next(x for x in (value / 2, value + 0.5, value + 2) if x != value and fields.in_bounds(meta, x))
    case int():
      return value + 1
    case str():
      return f'{value}x'
    case dict():
      return value | {'new': 'path'}
    case tuple() if meta.choices:
      return tuple(choice for choice in meta.choices if choice not in value) or value[:-1]
    case tuple():
      return tuple(one / 2 if isinstance(one, float) else one for one in value[:-1]) + (
        ('x',) if not value else value[:0]
      )


def value_of(config, key: str):
  for name in key.split('.'):
    config = getattr(config, name)
  return config


@pytest.mark.parametrize('kind', [Config, GridConfig])
def test_every_field_is_declared(kind):
  for key, (each, _) in declared(kind).items():
    assert fields.KEY in each.metadata, key


@pytest.mark.parametrize('key', [key for key in CONFIG if key.partition('.')[0] in IDENTIFIED])
def test_the_identity_of_an_experiment_changes_exactly_where_the_field_says_so(key):
  _, meta = CONFIG[key]
  before, after = Config(), changed(Config(), key, another(key, value_of(Config(), key), meta))
  assert after != before
  assert (experiments.experiment_identity(after) != experiments.experiment_identity(before)) == meta.result


@pytest.mark.parametrize('key', [key for key in CONFIG if key.partition('.')[0] not in IDENTIFIED])
def test_evaluation_and_the_way_of_running_do_not_define_an_experiment(key):
  _, meta = CONFIG[key]
  after = changed(Config(), key, another(key, value_of(Config(), key), meta))
  assert experiments.experiment_identity(after) == experiments.experiment_identity(Config())
  # A grid compares scores: what is scored is part of it.
  assert (runner.grid_identity(GridConfig(base=after)) != runner.grid_identity(GridConfig())) == meta.result


@pytest.mark.parametrize('key', list(GRID))
def test_the_identity_of_a_grid_changes_exactly_where_the_field_says_so(key):
  _, meta = GRID[key]
  after = changed(GridConfig(), key, another(key, value_of(GridConfig(), key), meta))
  assert after != GridConfig()
  assert (runner.grid_identity(after) != runner.grid_identity(GridConfig())) == meta.result


def test_a_field_at_the_value_that_earlier_versions_implied_is_in_no_identity():
  later = [key for key, (_, meta) in CONFIG.items() if meta.implied is not ABSENT]
  assert len(later) >= 12
  for key in later:
    section = value_of(changed(Config(), key, CONFIG[key][1].implied), key.rpartition('.')[0])
    assert key.rpartition('.')[2] not in fields.identity(section), key
    assert CONFIG[key][1].since, f'{key}: which version added it?'


def test_a_former_name_is_accepted_with_a_note_and_kept_in_identities(caplog):
  config = config_lib.default()
  assert config_lib.override(config, {'loss.kd': 'hard_label'}) == []
  assert 'note: --config.loss.kd is called --config.loss.divergence now' in caplog.text
  in_a_file = config_lib.default()
  in_a_file.loss.kd = 'hard_label'
  for each in (config, in_a_file):
    resolved = config_lib.resolve(each)
    assert resolved.loss.divergence == 'hard_label'
    assert fields.identity(resolved.loss)['kd'] == 'hard_label'
  in_a_file.loss.divergence = 'nonsense'
  with pytest.raises(ConfigError, match=r'loss\.kd: is called divergence now, which has another value; leave kd out'):
    config_lib.resolve(in_a_file)
  assert fields.former_names(GridConfig) == {'base.loss.kd': 'base.loss.divergence'}


def test_a_former_name_in_a_config_file_is_noted(tmp_path, caplog):
  file = tmp_path / 'old.py'
  file.write_text(
    'from kdjax import config\n\ndef get_config(arg=None):\n  c = config.default()\n  c.loss.kd = "hard_label"\n  return c\n'
  )
  assert cli.load_config(str(file)).loss.divergence == 'hard_label'
  assert f'note: {file}: loss.kd is called loss.divergence now' in caplog.text


def test_an_identity_that_was_recorded_with_such_fields_equals_one_without():
  new = runner.grid_identity(GridConfig())
  recorded = new | {'declared_alpha': [], 'teacher_seed': 'shared', 'primary': list(grid_config.PRIMARY), 'cohort': 4}
  assert fields.without_implied(recorded, GridConfig) == new
  assert fields.without_implied(new | {'teacher_seed': 'paired'}, GridConfig)['teacher_seed'] == 'paired'


@pytest.mark.parametrize('key', [key for key, (_, meta) in CONFIG.items() if meta.choices])
def test_every_declared_choice_is_checked(key):
  each, meta = CONFIG[key]
  wrong = ('nonsense',) if isinstance(each.default, tuple) else 'nonsense'
  assert f"{key}: unknown value 'nonsense'; known: {', '.join(meta.choices)}" in problems(key, wrong)


@pytest.mark.parametrize('key', [key for key, (_, meta) in CONFIG.items() if fields.bounds(meta)])
def test_every_declared_bound_is_checked(key):
  each, meta = CONFIG[key]
  low = meta.at_least if meta.above is None else meta.above
  high = meta.at_most if meta.below is None else meta.below
  beyond = [] if low is None else [low - 1] if meta.above is None else [low, low - 1]
  beyond += [] if high is None else [high + 1] if meta.below is None else [high, high + 1]
  for value in beyond:
    found = problems(key, type(each.default)(value))
    assert any(line.startswith(f'{key}: must be {fields.bounds(meta)}, got ') for line in found), (value, found)


def problems(key: str, value) -> list[str]:
  config = config_lib.default()
  *parents, leaf = key.split('.')
  node = config
  for name in parents:
    node = node[name]
  with node.unlocked(), node.ignore_type():
    node[leaf] = value
  with pytest.raises(ConfigError) as e:
    config_lib.resolve(config)
  return typing.cast(ConfigError, e.value).problems


@pytest.mark.parametrize(
  ('meta', 'words'),
  [
    (Meta(), ''),
    (Meta(above=0), 'above 0'),
    (Meta(at_least=1), 'at least 1'),
    (Meta(above=0, below=1), 'in (0, 1)'),
    (Meta(at_least=0, below=2**32), 'in [0, 2^32)'),
    (Meta(above=0, at_most=1), 'in (0, 1]'),
    (Meta(below=3), 'below 3'),
    (Meta(at_most=3), 'at most 3'),
  ],
)
def test_bounds_in_words(meta, words):
  assert fields.bounds(meta) == words
