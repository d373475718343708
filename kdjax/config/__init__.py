"""The config: frozen dataclasses, checked once, every mistake reported at once.

A config file's `get_config(arg)` returns an ml-collections `ConfigDict` that starts from `default()`, so that each field can be overridden on
the command line (`--config.student.alpha=0.4`). `kdjax.cli` reads the command line; `resolve` turns the ConfigDict into the dataclasses of
`schema`. Inside the library no ConfigDict travels, and nothing here imports JAX.
"""

from kdjax.config.checks import problems
from kdjax.config.reading import default, leaves, override, parse_arg, resolve, resolve_as, set_model
from kdjax.config.schema import (
  AlphaSchedule,
  CheckpointConfig,
  Config,
  DataConfig,
  EvalConfig,
  LossConfig,
  MeshConfig,
  ModelConfig,
  OptimizerConfig,
  RopeScaling,
  StudentConfig,
  TeacherConfig,
  TrainingConfig,
  as_dict,
  fingerprint,
  n_steps,
)

__all__ = [
  'AlphaSchedule',
  'CheckpointConfig',
  'Config',
  'DataConfig',
  'EvalConfig',
  'LossConfig',
  'MeshConfig',
  'ModelConfig',
  'OptimizerConfig',
  'RopeScaling',
  'StudentConfig',
  'TeacherConfig',
  'TrainingConfig',
  'as_dict',
  'default',
  'fingerprint',
  'leaves',
  'n_steps',
  'override',
  'parse_arg',
  'problems',
  'resolve',
  'resolve_as',
  'set_model',
]
