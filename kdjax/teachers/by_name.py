"""Models that a config names by their folder: `teacher.run` and `student.init`.

The folder of a run is used in place. A Hugging Face folder is imported once, into `<runs>/imported`; the result is a run like any other.
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
  """A model that is ready to run, with its weights in the dtype in which the device computes."""

  model: Model
  params: Any
  tokenizer: Tokenizer
  name: str
  step: int = 0
  trained_window: int = 0  # tokens; 0: unknown
  imported: bool = False  # from a Hugging Face folder: a text begins with what its own tokenizer adds, and nothing else

  @property
  def prefix_id(self) -> int:
    """The token that an empty text begins with: the separator; for imported models the begin token, or else the end token, as in transformers."""
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
  """Open the model of a run's folder or of a Hugging Face folder, in place. Raises UserError if it is neither."""
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
  """Replace the models of a config by those of the folders that it names. Fields that change no result, and dtypes, stay the config's."""
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
  """Return the folder of the run that a path names, or into which it will be imported. Raises UserError if it does not fit the corpus."""
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
  """Return the folder of the run that a path names; import it first if it is a Hugging Face folder."""
  if not huggingface.is_folder(path):
    return RunFolder(path)
  source = huggingface.Source(path, config.data.separator)
  folder = _imported(source, config)
  source.import_into(folder, mesh, config.heartbeat_timeout)
  return folder


def load_weights(folder: RunFolder, model: Model, mesh: Mesh) -> Any:
  """Load a run's newest weights for `model`: on the mesh, in its param_dtype."""
  params = frozen.load_saved(folder, mesh, like=model.config)[1]
  dtype = jnp.dtype(model.config.param_dtype)
  return jax.tree.map(lambda x: x.astype(dtype), params)


def identify_weights(folder: RunFolder) -> str:
  """Return a text that identifies a run's newest weights: their fingerprint and step."""
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
