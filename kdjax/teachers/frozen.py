"""Find, load and cast teachers. A teacher is trained once, found again by fingerprint, and loaded read-only in its own dtype."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from kdjax.config import Config, ModelConfig, RopeScaling, fields, n_steps
from kdjax.data.batches import Windows
from kdjax.data.store import COUNTED_TOKENS
from kdjax.data.tokenizer import Tokenizer
from kdjax.errors import UserError
from kdjax.models import Model, build, flops
from kdjax.models.quantized import quantize
from kdjax.runs.checkpoint import Checkpoints, read_checkpoints
from kdjax.runs.folder import RunFolder
from kdjax.runtime import backend, sharding
from kdjax.storage import paths

# Fields of a model that change its speed and memory but not what it computes. The folder of a run does not record them.
RUN_AS = fields.names(ModelConfig, lambda declared: not declared.result)
FREE = fields.names(ModelConfig, lambda declared: declared.precision or not declared.result)


def set_vocabulary(model: ModelConfig, tokenizer: Tokenizer, name: str, n_tokens: int = 0) -> ModelConfig:
  """Give a model the tokenizer's vocabulary. Further rows of its table are kept and masked like padding.

  Args:
    n_tokens: number of the tokenizer's tokens to use; 0: all.

  Raises UserError if the config asks for a table that is too small.
  """
  n_tokens = n_tokens or tokenizer.vocab_size
  if not model.vocab_size:
    return dataclasses.replace(model, vocab_size=n_tokens)
  if tokenizer.tokens_beyond(model.vocab_size):
    raise UserError(
      f"{name}.model.vocab_size = {model.vocab_size} is less than the tokenizer's {tokenizer.vocab_size} tokens; set it to 0"
    )
  return restrict_tokens(model, n_tokens)


def restrict_tokens(model: ModelConfig, n_tokens: int) -> ModelConfig:
  """Restrict a model to its first `n_tokens` tokens; its table keeps its size."""
  if model.vocab_size <= n_tokens:
    return model
  return resize_table(dataclasses.replace(model, vocab_size=n_tokens), model.padded_vocab_size)


def resize_table(model: ModelConfig, n_rows: int) -> ModelConfig:
  """Give a model's table `n_rows` rows."""
  return model if model.padded_vocab_size == n_rows else dataclasses.replace(model, pad_vocab_to=n_rows)


def match_student(teacher: ModelConfig, student: ModelConfig) -> ModelConfig:
  """Give a teacher the student's vocabulary and number of table rows."""
  return resize_table(dataclasses.replace(teacher, vocab_size=student.vocab_size), student.padded_vocab_size)


def build_model(folder: RunFolder, like: ModelConfig | None = None) -> Model:
  """Build the model of a run's folder, with the fields of `like` that change no result (attention, remat, ...).

  Raises UserError if it is not the folder of a run.
  """
  identity = folder.read_record()
  if identity is None:
    if not folder.path.is_dir():
      raise UserError(
        f'{folder.path}: no such folder; a model of the hub is fetched with: hf download NAME --local-dir FOLDER'
      )
    raise UserError(f'{folder.path} is no run folder: it has no run.json; an experiment keeps its runs in students/')
  try:
    values = identity['config']['model']
    config = ModelConfig(**values | {'rope_scaling': RopeScaling(**values['rope_scaling'])})
  except (KeyError, TypeError) as e:
    raise UserError(f'{folder.path}: its run.json describes no model of this version of kdjax ({e})') from None
  if like:
    config = dataclasses.replace(config, **{field: getattr(like, field) for field in RUN_AS})
  return build(config)


def choose_step(folder: RunFolder, saves: Checkpoints, step: int = 0) -> int:
  """Return the requested step, or the newest if `step` is 0. Raises UserError if there is no such checkpoint."""
  steps = saves.steps()
  if not steps:
    raise UserError(f'{folder.path} has no checkpoint yet; train it first, or name another folder')
  if step and step not in steps:
    raise UserError(f'{folder.path} has no checkpoint of step {step}; it has {", ".join(map(str, steps))}')
  return step or steps[-1]


def teacher_step(config: Config) -> int:
  """Return which checkpoint of its run is the config's teacher; 0: the newest."""
  section = config.teacher
  if section.run:
    return section.step
  return n_steps(section, config.data) if section.trunk else 0


def check_teacher_run(folder: RunFolder, field: str, tokenizer: Tokenizer, step: int = 0) -> None:
  """Raise UserError if the run that a config's `field` names was trained with another tokenizer, or is not finished."""
  build_model(folder)
  check_tokenizer(f'{field} = {folder.path}', folder.fingerprint('tokenizer') or None, tokenizer)
  if not step and not folder.is_done():
    raise UserError(
      f'{field} = {folder.path} is not finished; wait for it, or name one of its checkpoints with --config.teacher.step'
    )


def check_tokenizer(what: str, known: str | None, tokenizer: Tokenizer) -> None:
  """Raise UserError if a model was trained with another tokenizer than the corpus's. Contents are compared, not names."""
  if known != tokenizer.fingerprint:
    raise UserError(
      f"{what} learned with another tokenizer (fingerprint {known}, the student's is {tokenizer.fingerprint}); "
      'distillation needs the same tokenizer, with the same tokens around a document; set --config.data.tokenizer to its file or folder'
    )


def load_teacher(
  folder: RunFolder, dtype: str, mesh: Mesh, step: int = 0, like: ModelConfig | None = None, layout: str = 'student'
) -> tuple[Model, Any, int, str]:
  """Load a teacher and cast its weights: (model, weights on the mesh by `layout`, step, fingerprint of the weights as saved).

  Raises UserError if there is no such checkpoint or it does not verify.
  """
  model, params, step = load_saved(folder, mesh, step, like, layout)
  return model, cast(params, dtype, mesh, layout), step, saved_fingerprint(folder, step)


def saved_fingerprint(folder: RunFolder, step: int) -> str:
  """Return the fingerprint of a step's weights as they were saved: older checkpoints keep the fingerprint of their version."""
  with read_checkpoints(folder.checkpoints) as saves:
    return saves.fingerprint(step)


def load_saved(
  folder: RunFolder, mesh: Mesh, step: int = 0, like: ModelConfig | None = None, layout: str = 'student'
) -> tuple[Model, Any, int]:
  """Load (model, weights in the dtype in which they were saved, step)."""
  model = build_model(folder, like)
  with read_checkpoints(folder.checkpoints) as saves:
    step = choose_step(folder, saves, step)
    shapes = model.abstract()
    placed = sharding.abstract(shapes, sharding.param_shardings(shapes, mesh, layout))
    return model, saves.restore_params(step, placed), step


def to_dtype(params, dtype: str):
  """Cast weights. 'auto' is bfloat16 on accelerators and float32 on CPU; 'int8' is 'auto' with the matrices rounded."""
  wide = 'float32' if backend.name() == 'cpu' else 'bfloat16'
  if dtype == 'int8':
    return quantize(params, wide)
  return jax.tree.map(lambda x: x.astype(wide if dtype == 'auto' else dtype), params)


def cast(params, dtype: str, mesh: Mesh, layout: str):
  """Cast weights on the mesh, sharded by `layout`."""
  convert = functools.partial(to_dtype, dtype=dtype)
  wanted = jax.eval_shape(convert, params)
  if dtype != 'int8' and all(jax.tree.leaves(jax.tree.map(lambda x, w: x.dtype == w.dtype, params, wanted))):
    return params  # nothing to cast
  return jax.jit(convert, out_shardings=sharding.param_shardings(wanted, mesh, layout))(params)


def fit_to_student(model: Model, params, student: ModelConfig, mesh: Mesh, layout: str) -> tuple[Model, Any]:
  """Cut or pad a teacher's tables to the student's rows. Rows beyond the student's tokens are masked: they are never labels."""
  n_rows = student.padded_vocab_size
  fitted = build(match_student(model.config, student))
  if model.config.padded_vocab_size == n_rows:
    return fitted, params
  tables = {name: params[name] for name in ('embed', 'head') if name in params}  # other weights stay in place
  shapes = jax.eval_shape(functools.partial(_resize, n_rows=n_rows), tables)
  placed = sharding.param_shardings(shapes, mesh, layout)
  return fitted, params | jax.jit(_resize, static_argnums=1, out_shardings=placed)(tables, n_rows)


def _resize(tables, n_rows: int):
  """Cut or zero-pad V to `n_rows`, in an embedding [V, D] and optionally a head [D, V]."""

  def resize(path, x):
    axis = 0 if path[0].key == 'embed' else 1
    kept = jax.lax.slice_in_dim(x, 0, min(n_rows, x.shape[axis]), axis=axis)
    return jnp.pad(kept, [(0, n_rows - kept.shape[axis] if i == axis else 0) for i in range(x.ndim)])

  return jax.tree_util.tree_map_with_path(resize, tables)


def unigram_log_probs(windows: Windows, padded_vocab_size: int, max_tokens: int = COUNTED_TOKENS) -> np.ndarray:
  """Return log-probabilities [V] of the training tokens' frequencies, with one added to each count: the unigram teacher.

  They are counted over the first `max_tokens` of the student's own slice.
  """
  first, last = windows.range
  counts = 1 + windows.store.counts(padded_vocab_size, first, min(last, first + max_tokens))
  return np.log(counts / counts.sum()).astype(np.float32)


def locate_teacher(runs: str, model: Model, identity: str) -> RunFolder:
  """Return the folder of a teacher that a config trains. Configs that describe the same teacher share it; its name has its non-embedding parameters."""
  millions = flops.count_params(model.config).non_embedding / 1e6
  return RunFolder(paths.runs_path(runs) / 'teachers' / f'{millions:.3g}M-{identity}')
