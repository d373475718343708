"""A whole run in seconds: generated text, a byte tokenizer, models of some thousand weights. For tests of whole commands.

config = tiny.config(tmp_path, **{'student.alpha': 0.2})   in this process
file = tiny.write_config(tmp_path)                         for a process of its own: --config={file}
"""

import dataclasses
import json
import pathlib
import textwrap
from typing import Any

import ml_collections
import numpy as np

from kdjax import config as config_lib
from kdjax.config import Config
from kdjax.sweeps.config import ControlsConfig, GridConfig, PilotConfig, TunedConfig

STEPS = 12  # of the students; the teacher's are half as many
FIELDS: dict[str, Any] = {
  'name': 'tiny',
  'data.tokenizer': 'bytes',
  'data.seq_len': 16,
  'data.validation_fraction': 0.2,
  'data.test_fraction': 0.3,
  'data.threads': 1,
  'data.prefetch': 1,
  'eval.batch_size': 16,
  'eval.max_bytes': 3000,
  'eval.every': 4,
  'eval.every_batches': 1,
  'checkpoint.every': 4,
  'steps_per_call': 2,
  **{
    f'{section}.{key}': value
    for section, tokens in (('teacher', STEPS // 2 * 8 * 16), ('student', STEPS * 8 * 16))
    for key, value in {
      'batch_size': 8,
      'tokens': tokens,
      'optimizer.learning_rate': 1e-2,
      'model.pad_vocab_to': 8,
      'model.d_model': 8 if section == 'teacher' else 16,
      'model.n_layers': 1,
      'model.d_ff': 32,
      'model.n_heads': 2,
      'model.n_kv_heads': 2,
      'model.head_dim': 8,
      'model.max_seq_len': 64,
    }.items()
  },
}


def write_text(folder: pathlib.Path, documents: int = 60) -> dict[str, str]:
  """Writes JSONL files of made-up words; the config's fields that name them: one in-domain source and two sets out of domain."""
  folder.mkdir(parents=True, exist_ok=True)
  paths = {}
  for seed, name in enumerate(('home', 'far', 'further')):
    path = folder / f'{name}.jsonl'
    if not path.exists():
      path.write_text(''.join(json.dumps({'text': t}) + '\n' for t in _texts(seed, documents)), encoding='utf-8')
    paths[name] = str(path)
  return {'data.source': paths.pop('home')} | {f'eval.ood.{name}': path for name, path in paths.items()}


def config_dict(folder: pathlib.Path, **overrides: Any):
  """The ConfigDict: text in `folder`, run folders in `folder`/runs. Overrides by dotted name, e.g. **{'student.alpha': 0.2}."""
  config = config_lib.default()
  config.eval.ood = ml_collections.ConfigDict()
  for key, value in (FIELDS | write_text(folder) | {'runs': str(folder / 'runs')} | overrides).items():
    parent, _, leaf = key.rpartition('.')
    node = config
    for part in parent.split('.') if parent else ():
      node = node[part]
    with node.unlocked(), node.ignore_type():
      node[leaf] = value
  return config


def config(folder: pathlib.Path, **overrides: Any) -> Config:
  """The same, checked and frozen."""
  return config_lib.resolve(config_dict(folder, **overrides))


def write_config(folder: pathlib.Path, **overrides: Any) -> pathlib.Path:
  """A config file for `--config=`; its scale is the only argument that it knows."""
  values = FIELDS | write_text(folder) | {'runs': str(folder / 'runs')} | overrides
  path = folder / 'tiny_config.py'
  path.write_text(
    textwrap.dedent(
      f"""\
      import ml_collections
      from kdjax import config as config_lib

      FIELDS = {values!r}


      def get_config(arg=None):
        config_lib.parse_arg(arg, scale=('laptop',))
        config = config_lib.default()
        config.eval.ood = ml_collections.ConfigDict()
        for key, value in FIELDS.items():
          *parents, leaf = key.split('.')
          node = config
          for part in parents:
            node = node[part]
          with node.unlocked(), node.ignore_type():
            node[leaf] = value
        return config
      """
    )
  )
  return path


def _texts(seed: int, documents: int) -> list[str]:
  """Documents of 5 to 80 words, of a vocabulary of each seed's own."""
  rng = np.random.default_rng(seed)
  letters = np.asarray(list('etaoinshrdlucmfwypvbgkjqxz'))
  words = [''.join(rng.choice(letters[seed:], rng.integers(2, 8))) for _ in range(150)]
  share = 1 / np.arange(1, 151)
  return [' '.join(rng.choice(words, rng.integers(5, 80), p=share / share.sum())) for _ in range(documents)]


def grid(folder: pathlib.Path, **fields: Any) -> GridConfig:
  """A grid of the same texts: one student, one teacher, one alpha and the baseline, two seeds and two fresh ones; seconds a cell."""
  base = config(folder, **fields.pop('base', {}))
  tokens = STEPS * 8 * 16
  small = {
    'runs': base.runs,
    'base': base,
    'student': ('tiny-0.1m',),
    'student_tokens': (tokens,),
    'teacher': ('tiny-0.1m',),
    'teacher_tokens': (tokens // 2,),
    'alpha': (0.0, 0.4),
    'seed': (43, 44),
    'validated_seed': (46, 47),
    'pilot': PilotConfig(alpha=(0.0, 0.3, 0.6)),
    'controls': ControlsConfig(flop_matched=('logits',), tuned=TunedConfig(draws=2)),
    'last': 1,
  }
  return dataclasses.replace(GridConfig(name='tiny-grid'), **small | fields)


def write_grid_config(folder: pathlib.Path, home: pathlib.Path) -> pathlib.Path:
  """The grid of `home`'s texts and stores for a process of its own; teachers and compiled programs in `folder`."""
  path = folder / 'tiny_grid_config.py'
  path.write_text(
    textwrap.dedent(
      f"""\
      import dataclasses
      import pathlib
      from kdjax import config as config_lib
      from tests import tiny


      def get_config(arg=None):
        home = pathlib.Path({str(home)!r})
        grid = tiny.grid(home, base={{'data.cache': str(home / 'runs' / 'stores')}})
        return config_lib.default(dataclasses.replace(grid, runs={str(folder / 'runs')!r}))
      """
    )
  )
  return path
