"""A Hugging Face folder -> a run's folder, which everything else in kdjax reads as one that was trained here."""

import dataclasses
import functools
import json
import os
import pathlib
import re
from typing import Any

from jax.sharding import Mesh

from kdjax import config as config_lib
from kdjax import machine
from kdjax.data.tokenizer import Tokenizer
from kdjax.errors import UserError
from kdjax.models import build, flops
from kdjax.runs.checkpoint import Checkpoints
from kdjax.runs.checksums import params_fingerprint
from kdjax.runs.folder import Heartbeat, RunFolder, claim_all
from kdjax.runtime import sharding
from kdjax.storage import paths
from kdjax.teachers.huggingface import families, weights

# The first: of a file that was being written.
_LEFT_BY_AN_IMPORT = re.compile(r'(\.[0-9a-f]{8}\.)?((owner-\d+|status|tokenizer|run)\.json|checkpoints|logs)')
STEP = 0  # of the one checkpoint: nothing was trained here


def is_folder(path: str | os.PathLike) -> bool:
  """Return whether a path is a Hugging Face folder, rather than a run's."""
  folder = paths.runs_path(path)
  return (folder / 'config.json').exists() and not (folder / 'run.json').exists()


class Source:
  """A Hugging Face folder: its model and its tokenizer. Opening it reads config.json and the headers of its safetensors files.

  Args:
    path: the folder, on a disk.
    separator: one token that starts and ends documents; '': the tokens with these roles in the folder's files.
    tokenizer: another tokenizer's file or folder; '': the folder's own.

  Raises:
    UserError: no such folder, an architecture or a field of it that is not supported, tensors that do not fit it.
  """

  def __init__(self, path: str | os.PathLike, separator: str = '', tokenizer: str = ''):
    if paths.is_remote(path):
      raise UserError(
        f'{path}: a Hugging Face folder must be on a disk; copy it there, or import it with kdjax.convert first'
      )
    self.path = pathlib.Path(paths.expand(path))
    if not self.path.is_dir():
      raise UserError(
        f'{path}: no such folder; a model of the hub is fetched with: hf download NAME --local-dir FOLDER'
      )
    self._values = _config(self.path)
    self.family, config = families.read_config(self._values, str(self.path / 'config.json'))
    self.tensors = weights.Tensors(self.path)
    self.model = build(dataclasses.replace(config, param_dtype=self.tensors.dtype()))
    self.tensors.check(self.model, self.family)
    self._tokenizer, self._separator = tokenizer, separator

  @functools.cached_property
  def tokenizer(self) -> Tokenizer:
    found = Tokenizer.from_file(self._tokenizer or self.path, self._separator)
    rows = self.model.config.vocab_size
    if beyond := found.tokens_beyond(rows):  # special tokens may have no row, because no text contains them
      raise UserError(
        f'{self.path}: the tokenizer has {found.vocab_size} tokens but the model {rows} rows, and {beyond[0]!r}, which texts can contain, has none; '
        "use the model's own tokenizer, or resize the embedding for added tokens (resize_token_embeddings)"
      )
    return found

  @property
  def folder_name(self) -> str:
    """Of the run's folder: with a fingerprint of the files' sizes and times, so that another version is another folder."""
    return f'{self.path.resolve().name}-{self._version()}'

  def _version(self) -> str:
    files = [(p.name, (stat := p.stat()).st_size, stat.st_mtime_ns) for p in sorted(self.path.iterdir()) if p.is_file()]
    return config_lib.fingerprint([self._values, files, self.tokenizer.fingerprint])

  def load(self, mesh: Mesh) -> Any:
    """The weights, on the mesh as a student's are."""
    shardings = sharding.param_shardings(self.model.abstract(), mesh)
    return weights.load_weights(self.tensors, self.model, self.family, shardings)

  def import_into(self, folder: RunFolder, mesh: Mesh, timeout: float = 30) -> None:
    """Make the folder the one of a finished run with these weights. What an import that was cut off has left is replaced.

    Raises UserError if anything else is in the folder.
    """
    config = dataclasses.asdict(self.model.config)
    identity = {
      'arm': 'teacher',
      'model': config,
      'imported': {'from': self.path.name, 'architecture': self.family.name, 'version': self._version()},
    }
    known = folder.read_record()
    if known is None:
      there = folder.path.iterdir() if folder.path.exists() else ()
      its_own = all(_LEFT_BY_AN_IMPORT.fullmatch(path.name) for path in there)
    else:
      its_own = known['config'] == json.loads(json.dumps(identity))
    if not its_own:
      raise UserError(f'{folder.path} holds something else already; name a new folder')
    if folder.is_done():
      return
    claim_all([folder], timeout)
    heart = Heartbeat([folder], STEP)
    with heart.beating():
      params = self.load(mesh)
      init = params_fingerprint(params, like=folder.fingerprint('init'))
      known = {'tokenizer': self.tokenizer.fingerprint, 'init': init}
      saves = Checkpoints(folder.checkpoints)
      try:
        saves.save_params(STEP, params, known)
      finally:
        saves.close()
      facts = {
        'parameters': self.model.n_params,
        'non_embedding': flops.count_params(self.model.config).non_embedding,
        'imported': f'{self.path.name} ({self.family.name})',
      }
      notes = {
        'facts': facts,
        'tokenizer': folder.keep_tokenizer(self.tokenizer),
        'versions': machine.versions(),
        'git': machine.git_commit(),
      }
      folder.record(identity, known, notes)
      heart.finish('done')


def _config(folder: pathlib.Path) -> dict[str, Any]:
  file = folder / 'config.json'
  try:
    values = paths.parse_json(file.read_bytes())
  except FileNotFoundError:
    raise UserError(f'{folder} is no Hugging Face folder: it has no config.json') from None
  except ValueError as e:
    raise UserError(f'{file}: not JSON ({e}); fetch it again') from None
  if not isinstance(values, dict):
    raise UserError(f'{file}: not an object with fields; fetch it again')
  return values
