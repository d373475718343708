"""Eight virtual devices, and the folder of real data where there is one."""

import os
import pathlib

import pytest

from tests.data.helpers import REPO

# Before JAX starts: `test_batches` places batches on eight devices.
if 'host_platform_device_count' not in os.environ.get('XLA_FLAGS', ''):
  os.environ['XLA_FLAGS'] = os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=8'


@pytest.fixture
def real_data() -> pathlib.Path:
  folder = REPO.parent / 'shared' / 'data'
  if not folder.is_dir():
    pytest.skip(f'no real data in {folder}')
  return folder
