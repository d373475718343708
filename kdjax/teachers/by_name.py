"""Models that a config names by their folder: `teacher.run` and `student.init`.

A folder of a run is used where it is. One of Hugging Face is imported once, into `<runs>/imported`, and from then on is a run like any other.
"""

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from kdjax.config import Config, ModelConfig
from kdjax.data.tokenizer import Tokenizer
from kdjax.errors import UserError
from kdjax.models import Model
from kdjax.runs.checkpoint import read_checkpoints
from kdjax.runs.folder import RunFolder
from kdjax.storage import paths
from kdjax.teachers import frozen, huggingface

log = logging.getLogger('kdjax')


@dataclasses.dataclass(frozen=True)
class OpenModel:
  """A model that is ready to run: its weights in the dtype in which the device computes."""

  model: Model
  params: Any
  tokenizer: Tokenizer
  name: str
  step: int = 0
  trained_window: int = 0  # tokens; 0: unknown
  imported: bool = False  # not trained here: its tokenizer puts before a text what it does, and no more

  @property
  def prefix_id(self) -> int:
    """The token that an empty text begins with: the separator, or for imported models the begin or else the end token, as in transformers."""
    known = self.tokenizer
    if not self.imported:
      return known.separator_id
    return known.end_id if known.begin_id is None else known.begin_id

  def check_ids(self, ids: Sequence[int]) -> None:
    """Raise UserError for tokens without a row in the model's table: added special tokens, which a text contains only by name."""
    beyond = [i for i in ids if i >= self.model.config.vocab_size]
    if beyond:
      name = self.tokenizer.decode(beyond[:1])
      raise UserError(f'the text holds the special token {name!r}, for which {self.name} has no weights; leave it out')


def open_model(path: str, mesh: Mesh, step: int = 0, separator: str = '') -> OpenModel:
  """The model of a run's folder, or of Hugging Face's, which is read where it is. Raises UserError where it is neither."""
  folder = RunFolder(path)
  if folder.read_record() is None and not paths.is_remote(path):
    source = huggingface.Source(path, separator)
    if step:
      raise UserError(f'{path} is a Hugging Face folder: it has no steps; leave --step out')
    params = frozen.cast(source.load(mesh), 'auto', mesh, 'student')
    return OpenModel(source.model, params, source.tokenizer, source.path.name, imported=True)
  model, params, step, _ = frozen.load_teacher(folder, 'auto', mesh, step)
  known = (folder.read_record() or {})['config']
  window = known.get('data', {}).get('seq_len', 0)
  return OpenModel(model, params, folder.tokenizer(), folder.name, step, window, 'imported' in known)


def adopt_models(config: Config) -> Config:
  """The config with the models of the folders that it names: what they are is not for the config to say, only how they are run."""
  for name, path in (('teacher', config.teacher.run), ('student', config.student.init)):
    if path:
      section = getattr(config, name)
      section = dataclasses.replace(section, model=_as_run(_model(path, config), section.model))
      config = dataclasses.replace(config, **{name: section})
  return config


def student_vocab_size(config: Config, tokenizer: Tokenizer) -> int:
  """Return the vocabulary size of an adopted config's students: the tokenizer's, or less if an imported model's table has fewer rows.

  The tokens without a row are special tokens that no text contains (`Tokenizer.tokens_beyond`).
  """
  named = (
    (config.teacher.run and 'distilled' in config.student.arms, config.teacher),
    (config.student.init, config.student),
  )
  tables = [section.model.vocab_size for path, section in named if path and section.model.vocab_size]
  return min([tokenizer.vocab_size, *tables])


def check_named_run(path: str, field: str, config: Config, tokenizer: Tokenizer, step: int = 0) -> RunFolder:
  """The folder of the run that a path names, or that it will be imported into. Raises UserError where it does not go with the corpus."""
  if not huggingface.is_folder(path):
    folder = RunFolder(path)
    frozen.check_teacher_run(folder, field, tokenizer, step)
  elif step:
    raise UserError(f'{field} = {path} is a Hugging Face folder: it has no steps; leave teacher.step at 0')
  else:
    source = huggingface.Source(path, config.data.separator)
    frozen.check_tokenizer(f'{field} = {path}', source.tokenizer.fingerprint, tokenizer)
    folder = _imported(source, config)
  limit = _model(path, config).max_seq_len
  if config.data.seq_len > limit:
    log.warning(
      'warning: %s = %s is made for %d tokens at once, and data.seq_len is %d', field, path, limit, config.data.seq_len
    )
  return folder


def import_run(path: str, config: Config, mesh: Mesh) -> RunFolder:
  """The folder of the run that a path names, imported first if need be."""
  if not huggingface.is_folder(path):
    return RunFolder(path)
  source = huggingface.Source(path, config.data.separator)
  folder = _imported(source, config)
  source.import_into(folder, mesh, config.heartbeat_timeout)
  return folder


def load_weights(folder: RunFolder, model: Model, mesh: Mesh) -> Any:
  """A run's newest weights as those of `model`: on the mesh, in its param_dtype."""
  params = frozen.load_saved(folder, mesh, like=model.config)[1]
  dtype = jnp.dtype(model.config.param_dtype)
  return jax.tree.map(lambda x: x.astype(dtype), params)


def identify_weights(folder: RunFolder) -> str:
  """Tells a run's newest weights from all others."""
  with read_checkpoints(folder.checkpoints) as saves:
    step = frozen.choose_step(folder, saves)
    return f'{saves.fingerprint(step)}@{step}'


def _imported(source: huggingface.Source, config: Config) -> RunFolder:
  return RunFolder(paths.runs_path(config.runs) / 'imported' / source.folder_name)


def _model(path: str, config: Config) -> ModelConfig:
  if huggingface.is_folder(path):
    return huggingface.Source(path, config.data.separator).model.config
  return frozen.build_model(RunFolder(path)).config


def _as_run(model: ModelConfig, like: ModelConfig) -> ModelConfig:
  return dataclasses.replace(model, **{field: getattr(like, field) for field in frozen.FREE})
