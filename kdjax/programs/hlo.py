"""Reads the text of a compiled program: its collectives, over which axes of the mesh, how often each runs, and how many bytes it moves.

The compiler's own cost analysis counts a loop's body once; here a loop counts as often as it runs.
"""

import collections
import itertools
import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

BYTES = {
  'pred': 1, 's4': 0.5, 'u4': 0.5, 's8': 1, 'u8': 1, 's16': 2, 'u16': 2, 's32': 4, 'u32': 4, 's64': 8, 'u64': 8,
  'bf16': 2, 'f16': 2, 'f32': 4, 'f64': 8, 'f8e4m3fn': 1, 'f8e5m2': 1, 'token': 0,
}  # fmt: skip
SLICES = 'slices'  # in place of a mesh axis: what goes from one slice to others, by way of the hosts
KINDS = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'ragged-all-to-all', 'collective-permute')
_HEADER = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\{$')
_INSTRUCTION = re.compile(r'^\s+(?:ROOT )?%?([\w.\-]+) = ')
_ARRAY = re.compile(r'([a-z][a-z0-9]*)\[([\d,]*)\]')
_CALLED = re.compile(r'(?:calls|to_apply|body|condition)=%?([\w.\-]+)')
_CALLED_LISTS = re.compile(r'(?:branch_computations|called_computations)=\{([^}]*)\}')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


class Instruction(NamedTuple):
  name: str
  arrays: tuple[tuple[str, tuple[int, ...]], ...]  # (dtype, shape) of the result, or of the parts of a tuple
  opcode: str
  rest: str  # operands and attributes


class Collective(NamedTuple):
  """One collective of one device's program."""

  kind: str
  axes: tuple[str, ...]  # of the mesh
  array: str  # its result: 'f32[4,128]'
  bytes: float  # that one device sends each time, by the ring algorithm
  times: int  # in one call of the program
  loop: int  # how deep in loops it stands; 0: at the top
  source: str  # where the program's author asked for it, as far as the compiler knows

  @property
  def total(self) -> float:
    return self.bytes * self.times


class Program:
  """A compiled module's text, as computations of instructions."""

  def __init__(self, text: str):
    self.computations: dict[str, list[Instruction]] = {}
    self.entry = ''
    current: list[Instruction] = []
    for line in text.splitlines():
      if header := _HEADER.match(line):
        current = self.computations.setdefault(header[2], [])
        self.entry = header[2] if header[1] else self.entry
      elif named := _INSTRUCTION.match(line):
        current.append(_instruction(named[1], line[named.end() :]))

  def runs(self) -> dict[str, tuple[int, int]]:
    """Computation -> (how often it runs, how deep in loops): what the entry reaches. A branch counts as taken."""
    found: dict[str, tuple[int, int]] = {}

    def visit(name: str, times: int, depth: int) -> None:
      before = found.get(name, (0, 0))
      found[name] = (before[0] + times, max(before[1], depth))
      for instruction in self.computations.get(name, ()):
        trips = self._trips(instruction) if instruction.opcode == 'while' else 1
        for called in _called(instruction):
          visit(called, times * trips, depth + (instruction.opcode == 'while'))

    visit(self.entry, 1, 0)
    return found

  def collectives(self, mesh: Mapping[str, int]) -> list[Collective]:
    """All that a call of the program runs, those of the most bytes first.

    Args:
      mesh: axis -> size, in the order of the mesh's devices.
    """
    found = []
    for name, (times, depth) in self.runs().items():
      body = self.computations.get(name, [])
      for instruction in body:
        kind = instruction.opcode.removesuffix('-start')
        if kind == 'send' and 'xla_megascale_runtime' in instruction.rest:
          # Of a collective over slices the program holds what one device hands to its host, and what it gets back.
          array = instruction.arrays[0]
          one = Collective(
            'transfer', (SLICES,), _text(array), float(_bytes(array)), times, depth, _source(instruction)
          )
          found.append(one)
        elif kind in KINDS:
          if kind == 'all-reduce' and 'all-reduce-scatter' in name:
            kind = 'reduce-scatter'  # a TPU's: the fusion keeps only this device's part of the sum
          one = _collective(kind, instruction, mesh, times, depth, 'all-reduce-scatter' in name)
          # The compiler joins collectives and forgets who asked for them: those of a loop are of what else is in it.
          found.append(one if one.source or not depth else one._replace(source=_usual_source(body)))
    return sorted((c for c in found if c.axes), key=lambda c: -c.total)

  def largest_array(self) -> tuple[int, str]:
    """(bytes, array) of the largest result of any instruction, arguments apart: what the program may hold whole on one device."""
    bodies = self.computations.values()
    arrays = [array for body in bodies for one in body if one.opcode != 'parameter' for array in one.arrays]
    return max(((_bytes(array), _text(array)) for array in arrays), default=(0, ''))

  def _trips(self, loop: Instruction) -> int:
    if known := _TRIPS.search(loop.rest):
      return int(known[1])
    condition = re.search(r'condition=%?([\w.\-]+)', loop.rest)
    body = self.computations.get(condition[1], []) if condition else []
    constants = [re.match(r'(\d+)\)', i.rest) for i in body if i.opcode == 'constant']
    counts = [int(constant[1]) for constant in constants if constant]
    return max(counts, default=1)  # a loop of unknown length counts once


def _instruction(name: str, text: str) -> Instruction:
  if text.startswith('('):
    depths = itertools.accumulate((character == '(') - (character == ')') for character in text)
    end = 1 + next(i for i, depth in enumerate(depths) if not depth)
    shape, rest = text[:end], text[end + 1 :]
  else:
    shape, _, rest = text.partition(' ')
  opcode, _, rest = rest.partition('(')
  arrays = tuple((dtype, tuple(int(n) for n in dims.split(',') if n)) for dtype, dims in _ARRAY.findall(shape))
  return Instruction(name, arrays, opcode, rest)


def _called(instruction: Instruction) -> Iterator[str]:
  yield from _CALLED.findall(instruction.rest)
  for names in _CALLED_LISTS.findall(instruction.rest):
    yield from (name.strip().lstrip('%') for name in names.split(',') if name.strip())


def _usual_source(body: list[Instruction]) -> str:
  sources = collections.Counter(_source(instruction) for instruction in body)
  del sources['']
  return max(sources, key=lambda source: sources[source], default='')


def _source(instruction: Instruction) -> str:
  named = re.search(r'op_name="([^"]*)"', instruction.rest)
  return named[1] if named else ''


def _collective(
  kind: str, instruction: Instruction, mesh: Mapping[str, int], times: int, depth: int, whole: bool
) -> Collective:
  arrays = instruction.arrays
  if instruction.opcode in ('all-gather-start', 'collective-permute-start') and len(arrays) > 1:
    arrays = arrays[len(arrays) // 2 :] if instruction.opcode == 'all-gather-start' else arrays[1:2]
  group = _group(instruction.rest, mesh)
  n = len(group)
  size = sum(_bytes(array) for array in arrays)
  share = (n - 1) / n
  sent = {
    'all-gather': size * share,
    'all-reduce': 2 * size * share,
    'reduce-scatter': size * share if whole else size * (n - 1),
    'collective-permute': float(size),
  }.get(kind, size * share)
  text = ', '.join(map(_text, arrays[:3])) + (', ...' if len(arrays) > 3 else '')
  return Collective(kind, _axes(group, mesh), text, sent, times, depth, _source(instruction))


def _group(attributes: str, mesh: Mapping[str, int]) -> list[int]:
  """The devices, as numbers in the mesh's order, that one collective joins: its first group of more than one."""
  if pairs := re.search(r'source_target_pairs=\{\{([\d,{}]*)\}\}', attributes):
    return next((p for p in ([int(n) for n in pair.split(',')] for pair in pairs[1].split('},{')) if p[0] != p[1]), [0])
  if iota := re.search(r'replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', attributes):
    shape, source = ([int(n) for n in text.split(',')] for text in (iota[1], iota[2]))
    ids = np.arange(math.prod(source)).reshape(source)
    if iota[3]:
      ids = ids.transpose([int(n) for n in iota[3].split(',')])
    return ids.reshape(shape).reshape(-1, shape[-1])[0].tolist()
  if named := re.search(r'replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}', attributes):
    return _named_group(named[1], named[2])
  if listed := re.search(r'replica_groups=\{\{([\d,]+)\}', attributes):
    return [int(n) for n in listed[1].split(',')]
  return list(range(math.prod(mesh.values())))  # replica_groups={}: all


def _named_group(sizes: str, joined: str) -> list[int]:
  """The first group of `mesh['a'=4,'b'=2] {'b'}`: the compiler's own mesh, whose devices are numbered in order. `'a':(2)2` is a part of an axis."""
  shape: list[int] = []
  parts = {name: (before, size) for name, before, size in re.findall(r"'(\w+)':\((\d+)\)(\d+)", joined)}
  whole = set(re.findall(r"'(\w+)'(?!:)", joined))
  varying: list[bool] = []
  for name, text in re.findall(r"'(\w+)'=(\d+)", sizes):
    size = int(text)
    if name in parts:
      before, mine = (int(n) for n in parts[name])
      shape += [before, mine, size // before // mine]
      varying += [False, True, False]
    else:
      shape.append(size)
      varying.append(name in whole)
  ids = np.arange(math.prod(shape)).reshape(shape)
  return ids[tuple(slice(None) if one else 0 for one in varying)].ravel().tolist()


def _axes(group: list[int], mesh: Mapping[str, int]) -> tuple[str, ...]:
  places = np.stack(np.unravel_index(group, tuple(mesh.values())), -1)
  return tuple(axis for axis, column in zip(mesh, places.T, strict=True) if len(set(column.tolist())) > 1)


def _bytes(array: tuple[str, tuple[int, ...]]) -> int:
  dtype, shape = array
  return int(BYTES.get(dtype, 4) * math.prod(shape))


def _text(array: tuple[str, tuple[int, ...]]) -> str:
  return f'{array[0]}[{",".join(map(str, array[1]))}]'
