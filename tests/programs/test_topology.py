"""Slices by their names: what Cloud TPU's documentation says of them."""

import pytest

from kdjax.errors import UserError
from kdjax.programs import topology


@pytest.mark.parametrize(
  ('name', 'shape', 'chips'),
  [
    ('v4-8', (2, 2, 1), 4),
    ('v4-128', (4, 4, 4), 64),
    ('v4-4096', (8, 16, 16), 2048),
    ('v5p-8', (2, 2, 1), 4),
    ('v5p-32', (2, 2, 4), 16),
    ('v5p-64', (2, 4, 4), 32),
    ('v5p-256', (4, 4, 8), 128),
    ('v5litepod-256', (16, 16), 256),
    ('v5e-8', (2, 4), 8),
    ('v6e-1', (1, 1), 1),
    ('v6e-64', (8, 8), 64),
    ('V6E-128', (8, 16), 128),
    ('v6e:8x8', (8, 8), 64),
    ('v5p:4x4x12', (4, 4, 12), 192),
  ],
)
def test_a_name_is_a_shape_of_chips(name, shape, chips):
  found = topology.parse_slice(name)
  assert found.shape == shape and found.n_chips == chips
  assert topology.parse_slice(found.accelerator).n_chips == chips if chips & (chips - 1) == 0 else True


def test_several_slices_are_counted_together():
  found = topology.parse_slice('v5litepod-256', 8)
  assert found.n_chips == 2048 and found.name == 'v5e:16x16 x 8'


@pytest.mark.parametrize(
  ('name', 'slices', 'says'),
  [
    ('v9-64', 1, 'no such slice'),
    ('64', 1, 'no such slice'),
    ('v6e', 1, 'no such slice'),
    ('v5p-63', 1, 'counts TensorCores, two a chip, and must be a power of two'),
    ('v5p-1', 1, 'counts TensorCores'),
    ('v6e-48', 1, 'counts chips'),
    ('v6e-0', 1, 'counts chips'),
    ('v6e:8', 1, '2 directions, as in v6e:4x4'),
    ('v4:8x8', 1, '3 directions, as in v4:4x4x4'),
    ('v6e:0x4', 1, '2 directions'),
    ('v6e-512', 1, 'at most 256; take several with --num-slices'),
    ('v6e-64', 0, '--num-slices=0'),
  ],
)
def test_what_is_no_slice_is_told_in_one_line(name, slices, says):
  with pytest.raises(UserError, match=says) as error:
    topology.parse_slice(name, slices)
  assert '\n' not in str(error.value)
