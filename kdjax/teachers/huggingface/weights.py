"""The tensors of a Hugging Face folder: safetensors files read and written a slice at a time, to and from kdjax's tree of parameters.

Theirs are one tensor a layer and [out, in]; ours are stacked over layers and [in, out] (the embedding [V, D] in both), with the vocabulary
padded. Only safetensors files are read: a pickle runs whatever code is in it.
"""

import json
import logging
import math
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from kdjax.config import ModelConfig
from kdjax.errors import UserError
from kdjax.models import Model
from kdjax.runtime.sharding import path_name
from kdjax.storage import paths
from kdjax.teachers.huggingface.families import Family

log = logging.getLogger('kdjax')

INDEX, SINGLE = 'model.safetensors.index.json', 'model.safetensors'
_PICKLES = ('.bin', '.pt', '.pth', '.ckpt', '.pkl', '.msgpack', '.h5')
_DTYPES = {'F32': 'float32', 'BF16': 'bfloat16', 'F16': 'float16'}
_BLOCKS = {  # a parameter of `blocks` -> theirs, of each layer
  'attn/q': 'self_attn.q_proj',
  'attn/k': 'self_attn.k_proj',
  'attn/v': 'self_attn.v_proj',
  'attn/o': 'self_attn.o_proj',
  'attn/q_norm': 'self_attn.q_norm',
  'attn/k_norm': 'self_attn.k_norm',
  'mlp/gate': 'mlp.gate_proj',
  'mlp/up': 'mlp.up_proj',
  'mlp/down': 'mlp.down_proj',
}
_WHOLE = {
  'embed/embedding': 'model.embed_tokens.weight',
  'head/kernel': 'lm_head.weight',
  'final_norm/scale': 'model.norm.weight',
}
_BASE_EMBEDDING = _WHOLE['embed/embedding'].removeprefix('model.')  # of a base model, saved without its head
_VOCABULARY = ('embed/embedding', 'head/kernel')  # theirs have the vocabulary first, and no padding
_NEEDLESS = re.compile(r'.*\.rotary_emb\.inv_freq')  # old Llama files keep what is computed


class Place(NamedTuple):
  """Where a parameter is: the name of a tensor, or of one of each layer (`{}`); [out, in] there if `turned`."""

  name: str
  turned: bool

  def names(self, n_layers: int) -> list[str]:
    return [self.name.format(i) for i in range(n_layers)] if '{}' in self.name else [self.name]


def places(model: Model, family: Family) -> dict[str, Place]:
  """Our path -> its place, for each parameter of the model."""
  norms = {f'{ours}/scale': theirs for ours, theirs in family.norms.items()}

  def place(path: str) -> Place:
    block, leaf = path.removeprefix('blocks/').rpartition('/')[::2]
    if path in _WHOLE:
      return Place(_WHOLE[path], leaf == 'kernel')
    theirs = norms.get(f'{block}/{leaf}') or _BLOCKS[block]
    return Place(f'model.layers.{{}}.{theirs}.{"bias" if leaf == "bias" else "weight"}', leaf == 'kernel')

  return {path: place(path) for path in _leaves(model.abstract())}


class Tensors:
  """The tensors of a folder's safetensors files; opening reads their headers alone.

  Raises UserError where the folder has none, or a file is not whole.
  """

  def __init__(self, folder: pathlib.Path):
    self.folder = folder
    self._files = {}
    self.shapes: dict[str, tuple[int, ...]] = {}
    self.dtypes: dict[str, str] = {}
    self._where: dict[str, tuple[str, str]] = {}  # tensor -> its file, its name there
    for name in _files(folder):
      try:
        self._files[name] = file = safetensors.safe_open(folder / name, framework='np')
      except (safetensors.SafetensorError, OSError) as e:
        raise UserError(f'{folder / name}: not a whole safetensors file ({e}); fetch it again') from None
      for tensor in file.keys():  # noqa: SIM118 - it is no mapping
        self._where[tensor] = name, tensor
    if _BASE_EMBEDDING in self._where:  # a base model's folder: transformers adds the prefix too
      self._where = {n if n.startswith('lm_head.') else f'model.{n}': at for n, at in self._where.items()}
    for tensor, (name, original) in self._where.items():
      described = self._files[name].get_slice(original)
      self.shapes[tensor], self.dtypes[tensor] = tuple(described.get_shape()), described.get_dtype()

  def slice(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
    file, original = self._where[name]
    return self._files[file].get_slice(original)[index]

  def dtype(self) -> str:
    """In which all fit: bfloat16 where all are, else float32."""
    return 'bfloat16' if set(self.dtypes.values()) == {'BF16'} else 'float32'

  def check(self, model: Model, family: Family) -> None:
    """Raise UserError, listing them, where tensors are missing, too many, or of another shape or dtype than the model's."""
    config, where = model.config, str(self.folder)
    leaves = _leaves(model.abstract())
    wanted = {
      name: shape
      for path, place in places(model, family).items()
      for name, shape in _their_shapes(path, place, config, leaves[path].shape)
    }
    tied = {'lm_head.weight'} if config.tied else set()
    extra = sorted(name for name in self.shapes.keys() - wanted.keys() - tied if not _NEEDLESS.fullmatch(name))
    missing = sorted(wanted.keys() - self.shapes.keys())
    wrong = [
      f'{n} is {self.shapes[n]}, {shape} by config.json'
      for n, shape in wanted.items()
      if self.shapes.get(n, shape) != shape
    ]
    odd = [f'{name} is {self.dtypes[name]}' for name in wanted if self.dtypes.get(name, 'F32') not in _DTYPES]
    problems = [('missing tensors', missing), ('tensors that the architecture has not', extra), ('wrong shapes', wrong)]
    problems += [(f'dtypes other than {", ".join(_DTYPES)}', odd)]
    told = [f'{what}: {_some(names)}' for what, names in problems if names]
    if told:
      raise UserError(f'{where} does not hold the weights of its config.json ({family.name}): {"; ".join(told)}')


def load_weights(tensors: Tensors, model: Model, family: Family, shardings) -> Any:
  """The parameters on a mesh, in the model's param_dtype: each process reads the slices that its devices hold, each once."""
  all_places = places(model, family)
  dtype = jnp.dtype(model.config.param_dtype)
  _check_tied(tensors, model.config)

  def read(path, leaf, sharding):
    place = all_places[path_name(path)]
    indices = sharding.addressable_devices_indices_map(leaf.shape)
    devices: dict[tuple, list[jax.Device]] = {}
    for device, index in indices.items():
      key = tuple(part.indices(n)[:2] for part, n in zip(index, leaf.shape, strict=True))
      devices.setdefault(key, []).append(device)
    arrays = []
    for key, holders in devices.items():
      value = _read(tensors, place, key).astype(dtype)
      arrays += [jax.device_put(value, device) for device in holders]
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, arrays)

  return jax.tree_util.tree_map_with_path(read, model.abstract(), shardings)


def save_weights(params, model: Model, family: Family, folder: pathlib.Path, dtype: str, max_bytes: int) -> None:
  """Write the parameters as safetensors files of at most `max_bytes` (a tensor is never cut), with an index where there are several."""
  leaves, cast_to = _leaves(params), jnp.dtype(dtype)
  tensors = [
    (name, path, place, layer, math.prod(shape) * cast_to.itemsize)
    for path, place in places(model, family).items()
    for layer, (name, shape) in enumerate(_their_shapes(path, place, model.config, leaves[path].shape))
  ]
  shards: list[list[tuple]] = [[]]
  for tensor in tensors:
    if shards[-1] and sum(size for *_, size in shards[-1]) + tensor[-1] > max_bytes:
      shards.append([])
    shards[-1].append(tensor)
  index: dict[str, str] = {}
  for number, shard in enumerate(shards, 1):
    name = SINGLE if len(shards) == 1 else f'model-{number:05}-of-{len(shards):05}.safetensors'
    values = {
      tensor: _theirs(leaves[path], place, layer, path, model.config, cast_to)
      for tensor, path, place, layer, _ in shard
    }
    safetensors.numpy.save_file(values, folder / name, metadata={'format': 'pt'})
    index |= dict.fromkeys(values, name)
  if len(shards) > 1:
    whole = {'metadata': {'total_size': sum(size for *_, size in tensors)}, 'weight_map': index}
    (folder / INDEX).write_text(json.dumps(whole, indent=2, sort_keys=True) + '\n')


def _check_tied(tensors: Tensors, config: ModelConfig, n_rows: int = 8192) -> None:
  """Raise UserError if a tied model's files have a head that is not the embedding: transformers would use it."""
  head, embedding = _WHOLE['head/kernel'], _WHOLE['embed/embedding']
  if not config.tied or head not in tensors.shapes:
    return
  for first in range(0, config.vocab_size, n_rows):
    rows = (slice(first, min(first + n_rows, config.vocab_size)),)
    if not np.array_equal(tensors.slice(head, rows), tensors.slice(embedding, rows)):
      raise UserError(
        f'{tensors.folder}: tie_word_embeddings is true, but {head} is not {embedding}; set it to false in config.json'
      )


def _theirs(leaf, place: Place, layer: int, path: str, config: ModelConfig, dtype) -> np.ndarray:
  """One tensor as they have it."""
  value = np.asarray(jax.device_get(leaf[layer] if '{}' in place.name else leaf)).astype(dtype)
  value = value.T if place.turned else value
  return np.ascontiguousarray(value[: config.vocab_size] if path in _VOCABULARY else value)


def _read(tensors: Tensors, place: Place, index: tuple[tuple[int, int], ...]) -> np.ndarray:
  """A part of a parameter, of the positions (first, last + 1) along each axis."""
  if '{}' not in place.name:
    return _read_one(tensors, place.name, place.turned, index)
  layers = range(*index[0])
  return np.stack([_read_one(tensors, place.name.format(i), place.turned, index[1:]) for i in layers])


def _read_one(tensors: Tensors, name: str, turned: bool, index: tuple[tuple[int, int], ...]) -> np.ndarray:
  wanted = index[::-1] if turned else index
  there = [(min(a, n), min(b, n)) for (a, b), n in zip(wanted, tensors.shapes[name], strict=True)]
  value = tensors.slice(name, tuple(slice(a, b) for a, b in there))
  if not np.isfinite(value).all():
    raise UserError(f'{tensors.folder}: {name} holds numbers that are not finite; fetch the weights again')
  value = np.pad(value, [(0, (b - a) - n) for (a, b), n in zip(wanted, value.shape, strict=True)])  # of the vocabulary
  return value.T if turned else value


def _their_shapes(
  path: str, place: Place, config: ModelConfig, shape: tuple[int, ...]
) -> Iterator[tuple[str, tuple[int, ...]]]:
  """(name, shape) of each tensor of a parameter that has `shape` here."""
  shape = shape[1:] if '{}' in place.name else shape
  shape = shape[::-1] if place.turned else shape
  if path in _VOCABULARY:
    shape = (config.vocab_size, *shape[1:])
  for name in place.names(config.n_layers):
    yield name, shape


def _leaves(tree) -> Mapping[str, Any]:
  return {path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _files(folder: pathlib.Path) -> list[str]:
  """List the folder's safetensors files: the single file if it exists, as in transformers, else those of the index."""
  if (folder / SINGLE).is_file():
    if (folder / INDEX).exists() and _index(folder) != [SINGLE]:
      log.warning('%s: reading %s and ignoring %s, which lists other files', folder, SINGLE, INDEX)
    return [SINGLE]
  if (folder / INDEX).exists():
    return _shards(folder)
  pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
  if pickles:
    raise UserError(
      f'{folder}: its weights are in {_some(pickles)}, which can run code when it is read; only safetensors files are read: '
      'load them with transformers where you trust them, and save_pretrained writes safetensors'
    )
  raise UserError(f'{folder}: no {SINGLE} and no {INDEX} in it; fetch the weights')


def _shards(folder: pathlib.Path) -> list[str]:
  """List the files that the index names. Raises UserError if it names none, or files that are not in the folder."""
  names = _index(folder)
  if not names:
    raise UserError(f'{folder / INDEX}: not an index of safetensors files; fetch it again')
  outside = [name for name in names if pathlib.PurePath(name).is_absolute() or '..' in pathlib.PurePath(name).parts]
  if outside:
    raise UserError(
      f'{folder}: its index names files that are not in the folder: {_some(outside)}; fetch the model again'
    )
  missing = [name for name in names if not (folder / name).is_file()]
  if missing:
    raise UserError(f'{folder}: files that its index names are missing: {_some(missing)}; fetch them')
  return names


def _index(folder: pathlib.Path) -> list[str]:
  """Read the file names in an index; [] if it is not a valid index."""
  try:
    names = paths.parse_json((folder / INDEX).read_bytes())['weight_map'].values()
    return sorted({name for name in names if isinstance(name, str)})
  except (ValueError, KeyError, AttributeError, TypeError):
    return []


def _some(names: list[str], most: int = 6) -> str:
  return ', '.join(names[:most]) + (f' and {len(names) - most} more' if len(names) > most else '')
