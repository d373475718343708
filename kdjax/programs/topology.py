"""TPU slices by the names that people know them by, and what their chips can do.

`v5p-64` counts TensorCores, two a chip, as Cloud TPU does for v4 and v5p; `v6e-64` and `v5litepod-64` count chips. A shape counts chips
in each direction of the torus: `v6e:8x8`, `v5p:4x4x4`. Several slices of the same kind are joined by the data centre's network.
"""

import dataclasses
import math
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

from kdjax.errors import UserError

# Where no TPU is, its library would ask the machine's metadata for one, and complain that there is none.
ENVIRONMENT = {
  'TPU_SKIP_MDS_QUERY': '1',
  'TPU_ACCELERATOR_TYPE': 'v5litepod-16',
  'TPU_WORKER_HOSTNAMES': 'localhost',
  'TPU_WORKER_ID': '0',
  'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',  # its lock is for devices, of which there are none
}


@dataclasses.dataclass(frozen=True)
class Chip:
  """A generation, by its maker's documentation (docs.cloud.google.com/tpu/docs): bytes and seconds.

  `hbm_gib` is what the compiler lets a program use, a little less than what is built in.
  """

  name: str  # the compiler's
  dimensions: int  # of the torus
  cores: int  # that an accelerator's name counts for each chip
  largest: int  # chips of a slice
  hbm_gib: float
  hbm_bandwidth: float
  link_bandwidth: float  # of one ICI link in one direction
  dcn_bandwidth: float  # of a chip's share of its host's network; 0: not published
  config: str = ''  # the compiler's name of the way in which a chip's cores are one device, where it is not its default


CHIPS = {
  'v4': Chip('v4', 3, 2, 4096, 30.75, 1228e9, 50e9, 0.0, 'megacore'),
  'v5e': Chip('v5e', 2, 1, 256, 15.75, 819e9, 50e9, 3.125e9),
  'v5p': Chip('v5p', 3, 2, 6144, 95.74, 2765e9, 100e9, 6.25e9),
  'v6e': Chip('v6e', 2, 1, 256, 31.25, 1640e9, 100e9, 12.5e9),
}
ALIASES = {'v5litepod': 'v5e', 'v5lite': 'v5e', 'v6lite': 'v6e', 'trillium': 'v6e'}


@dataclasses.dataclass(frozen=True)
class Slice:
  """One kind of slice, and how many of them."""

  chip: Chip
  shape: tuple[int, ...]  # chips in each direction
  slices: int = 1

  @property
  def n_chips(self) -> int:
    return math.prod(self.shape) * self.slices

  @property
  def topology(self) -> str:
    """The compiler's name of one slice: 'v5p:2x4x4'."""
    return f'{self.chip.name}:{"x".join(map(str, self.shape))}'

  @property
  def name(self) -> str:
    return self.topology + (f' x {self.slices}' if self.slices > 1 else '')

  @property
  def accelerator(self) -> str:
    """The name of one slice that counts: 'v5p-64'."""
    return f'{self.chip.name}-{math.prod(self.shape) * self.chip.cores}'


def parse_slice(text: str, slices: int = 1) -> Slice:
  """`v6e-64`, `v5p-64`, `v5litepod-256` or `v6e:8x8`. Raises UserError for what is no slice."""
  match = re.fullmatch(r'([a-z0-9]+?)(?:-(\d+)|:(\d+(?:x\d+)*))', text.lower())
  kind = ALIASES.get(match[1], match[1]) if match else ''
  if not match or kind not in CHIPS:
    raise UserError(
      f"--topology={text}: no such slice; write its accelerator's name or its shape, as in v4-128, v5litepod-256, v5p-64, v6e-64, v6e:8x8"
    )
  chip = CHIPS[kind]
  if slices < 1:
    raise UserError(f'--num-slices={slices}: must be at least 1')
  shape = _cubic(text, int(match[2]), chip) if match[2] else tuple(int(n) for n in match[3].split('x'))
  if len(shape) != chip.dimensions or min(shape) < 1:
    raise UserError(f'--topology={text}: a {kind} slice has {chip.dimensions} directions, as in {_example(chip)}')
  if math.prod(shape) > chip.largest:
    raise UserError(
      f'--topology={text}: {math.prod(shape)} chips, but a {kind} slice has at most {chip.largest}; take several with --num-slices'
    )
  return Slice(chip, shape, slices)


def slice_devices(slice_: Slice) -> list[jax.Device]:
  """The slice's devices, for the compiler alone: none of them is here. Raises UserError if there is no compiler for it."""
  for name, value in ENVIRONMENT.items():
    os.environ.setdefault(name, value)
  kwargs: dict[str, Any] = {'num_slices': slice_.slices} if slice_.slices > 1 else {}
  if slice_.chip.config:
    kwargs['chip_config_name'] = slice_.chip.config
  try:
    found = topologies.get_topology_desc(platform='tpu', topology_name=slice_.topology, **kwargs)
  except Exception as e:  # the plugin's own kinds of errors
    reason = (str(e).splitlines() or [''])[0]
    if 'libtpu' in reason.lower() or 'not found' in reason.lower() or isinstance(e, ModuleNotFoundError):
      raise UserError(f"no TPU compiler here: pip install -e '.[tpu]' ({reason[:120]})") from None
    raise UserError(f'the TPU compiler knows no {slice_.name} ({reason[:160]})') from None
  return list(found.devices)


def _cubic(text: str, count: int, chip: Chip) -> tuple[int, ...]:
  """The shape of a slice of so many chips or cores: powers of two, as near to a cube (or square) as may be, the shortest side first."""
  n, rest = divmod(count, chip.cores)
  if rest or n < 1 or n & (n - 1):
    unit = 'TensorCores, two a chip' if chip.cores == 2 else 'chips'
    raise UserError(
      f'--topology={text}: counts {unit}, and must be a power of two; give any other slice by its shape, as in {_example(chip)}'
    )
  exponent = n.bit_length() - 1
  sides = [1 << (exponent + i) // chip.dimensions for i in range(chip.dimensions)]
  # Three directions of four chips are 2x2x1 to Cloud TPU, and not 1x2x2.
  return tuple(sorted(sides, reverse=chip.dimensions == 3 and 1 in sides))


def _example(chip: Chip) -> str:
  return f'{chip.name}:' + 'x'.join(['4'] * chip.dimensions)
