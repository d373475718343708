"""The mesh and both models' sharding rules, in one screen.

Three axes, outermost first: `replica` (data parallel, across slices), `fsdp` (data parallel, weights sharded), `tensor` (heads, ffn and
vocabulary sharded). All are `Auto`: the compiler places the collectives, except in the loss, which says its own (kdjax/losses/fused.py).
"""

import contextlib
import contextvars
import math
import re
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kdjax.config import MeshConfig
from kdjax.errors import UserError
from kdjax.runtime import backend

AXES = ('replica', 'fsdp', 'tensor')
BATCH_AXES = ('replica', 'fsdp')

# A parameter's path -> its spec; the first match counts. Stacked blocks have the layer axis first, never sharded. `values`: in int8.
RULES = (
  (r'embed/embedding', P('tensor', 'fsdp')),  # [V, D]
  (r'head/kernel', P('fsdp', 'tensor')),  # [D, V]
  (r'blocks/attn/[qkv]/kernel(/values)?', P(None, 'fsdp', 'tensor')),  # [L, D, H*K]
  (r'blocks/attn/o/kernel(/values)?', P(None, 'tensor', 'fsdp')),  # [L, H*K, D]
  (r'blocks/mlp/(gate|up)/kernel(/values)?', P(None, 'fsdp', 'tensor')),  # [L, D, F]
  (r'blocks/mlp/down/kernel(/values)?', P(None, 'tensor', 'fsdp')),  # [L, F, D]
  (r'blocks/attn/[qkv]/bias', P(None, 'tensor')),  # [L, H*K]
  (r'.*/scale', P()),
)

# How a teacher lies on the mesh (its weights only go forward, and it may be far smaller or larger than the student).
LAYOUTS = (
  'student',  # as the student: rows over (replica, fsdp), weights over fsdp and tensor
  'fsdp',  # rows over all three axes, weights cut over fsdp and tensor together and gathered layer by layer: no sums over tensor
  'replicated',  # rows over all three axes, all weights on each device: no collective but for the hidden states at the end
)
_ROWS: contextvars.ContextVar[tuple[str, ...]] = contextvars.ContextVar('rows', default=BATCH_AXES)


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None, flags: str = '--config.mesh.*') -> Mesh:
  """A (replica, fsdp, tensor) mesh over all devices. Raises UserError if the shape does not fit their number; `flags` set it."""
  devices = backend.devices() if devices is None else devices
  shape = [config.replica, config.fsdp, config.tensor]
  known = math.prod(n for n in shape if n > 0)
  if -1 in shape and len(devices) % known == 0:
    shape[shape.index(-1)] = len(devices) // known
  if math.prod(shape) != len(devices):
    asked = ' x '.join(f'{axis} {n}' for axis, n in zip(AXES, shape, strict=True))
    raise UserError(
      f'mesh: {asked} does not divide the {len(devices)} devices here; set {flags} so that the product is {len(devices)}'
    )
  return Mesh(_arranged(shape, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def one_device() -> Mesh:
  """A mesh of this process's first device."""
  backend.devices()  # raises a clear error if there is none
  return make_mesh(MeshConfig(1, 1, 1), jax.local_devices()[:1])


def _arranged(shape: Sequence[int], devices: Sequence[jax.Device]) -> np.ndarray:
  """The devices in the mesh's shape, neighbours in the machine as neighbours in the mesh; slices along one of the outer axes."""
  slices = len({getattr(device, 'slice_index', 0) for device in devices})
  if slices == 1:
    # Split: fsdp 16 x tensor 4 lies on an 8 x 8 torus too.
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
  outer = next((i for i in (0, 1) if shape[i] % slices == 0), None)
  if outer is None:
    raise UserError(
      f'mesh: neither replica = {shape[0]} nor fsdp = {shape[1]} is a multiple of the {slices} slices; '
      f'set --config.mesh.replica={slices}, so that only data parallelism crosses them'
    )
  across = [slices if i == outer else 1 for i in range(len(shape))]
  within = [n // s for n, s in zip(shape, across, strict=True)]
  return mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)


def local_bytes(shapes, shardings) -> int:
  """What one device holds of a tree of (possibly abstract) arrays."""
  sizes = jax.tree.map(lambda x, s: math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize, shapes, shardings)
  return sum(jax.tree.leaves(sizes))


def path_name(path) -> str:
  """A key path of a nested dict as 'a/b/c'."""
  return '/'.join(str(getattr(k, 'key', getattr(k, 'name', getattr(k, 'idx', k)))) for k in path)


def n_row_shards(mesh: Mesh | AbstractMesh) -> int:
  """How many parts the rows of a batch are divided into."""
  return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def abstract(shapes, shardings):
  """A tree of ShapeDtypeStructs with these shardings."""
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def param_shardings(params, mesh: Mesh, layout: str = 'student'):
  """A tree of NamedShardings for a tree of parameters (or of their ShapeDtypeStructs), by RULES and one of LAYOUTS."""

  def sharding(path, leaf) -> NamedSharding:
    name = path_name(path)
    spec = next((spec for pattern, spec in RULES if re.fullmatch(pattern, name)), None)
    if spec is None:
      raise UserError(
        f'sharding: no rule matches the parameter {name} {leaf.shape}; add one to RULES in kdjax/runtime/sharding.py'
      )
    spec = _laid_out(spec, layout)
    for dim, axis in zip(leaf.shape, spec, strict=False):
      axes: tuple[str, ...] = (axis,) if isinstance(axis, str) else tuple(axis or ())
      size = math.prod(mesh.shape[one] for one in axes)
      if dim % size:
        raise UserError(
          f'mesh: {" x ".join(axes)} = {size} does not divide {dim} of {name} {leaf.shape}; change --config.mesh.{axes[0]} or the model'
        )
    return NamedSharding(mesh, spec)

  return jax.tree_util.tree_map_with_path(sharding, params)


def _laid_out(spec: P, layout: str) -> P:
  if layout == 'student':
    return spec
  both = ('fsdp', 'tensor') if layout == 'fsdp' else None
  return P(*[both if axis == 'fsdp' else None for axis in spec])


def row_axes(layout: str = 'student') -> tuple[str, ...]:
  """The axes over which a model of that layout has its rows."""
  return BATCH_AXES if layout == 'student' else AXES


def rows_in_use() -> tuple[str, ...]:
  return _ROWS.get()


@contextlib.contextmanager
def rows_over(axes: tuple[str, ...]) -> Iterator[None]:
  """While a model is traced inside, its rows lie over these axes."""
  token = _ROWS.set(axes)
  try:
    yield
  finally:
    _ROWS.reset(token)


def gather(matrix, name: str):
  """A block's matrix (one layer's) gathered over `fsdp` here, and not wherever the compiler would."""
  if mesh_in_use() is None:
    return matrix
  spec = next(spec for pattern, spec in RULES if re.match(pattern, name))[1:]
  kept = [axis if axis == 'tensor' and rows_in_use() == BATCH_AXES else None for axis in spec]
  return jax.lax.with_sharding_constraint(matrix, P(*kept))


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, P())


def mesh_in_use() -> jax.sharding.AbstractMesh | None:
  """The ambient mesh where it has more than one device, else None."""
  mesh = jax.sharding.get_abstract_mesh()
  return mesh if mesh is not None and not mesh.empty and mesh.size > 1 else None


def constrain(x_BxTxD):
  """Keep hidden states sharded by rows: without this an embedding sharded over `fsdp` replicates the batch."""
  if mesh_in_use() is None:
    return x_BxTxD
  return jax.lax.with_sharding_constraint(x_BxTxD, P(rows_in_use(), *(None,) * (x_BxTxD.ndim - 1)))
