"""Eight virtual CPU devices for every test, set before jax is imported; a finished run to look at."""

import atexit
import os
import pathlib
import shutil
import tempfile

import pytest

os.environ['JAX_PLATFORMS'] = os.environ.get('KDJAX_TEST_PLATFORM', 'cpu')  # cuda: for the tests that need a GPU
os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} --xla_force_host_platform_device_count=8'.strip()

import jax

# The tests compile the same small programs again and again. Not by the environment: processes that a test starts are as a user's.
CACHE = tempfile.mkdtemp(prefix='kdjax-compiled-')
jax.config.update('jax_compilation_cache_dir', CACHE)
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)
atexit.register(shutil.rmtree, CACHE, ignore_errors=True)


@pytest.fixture(scope='session')
def main_job(tmp_path_factory) -> pathlib.Path:
  """A folder with the tiny texts and a finished run of the tiny main job in `runs`. To be copied, not changed."""
  from kdjax import train
  from tests import tiny

  home = tmp_path_factory.mktemp('main_job')
  train.run(tiny.config(home), progress=False)
  return home


@pytest.fixture(scope='session')
def tiny_grid(tmp_path_factory):
  """(home, config, folder) of a finished tiny grid. To be copied, not changed."""
  from kdjax import grid as command
  from tests import tiny

  home = tmp_path_factory.mktemp('tiny_grid')
  grid = tiny.grid(home)
  command.run(grid, home / 'finished', progress=False)
  return home, grid, home / 'finished'


@pytest.fixture(scope='session')
def home(tmp_path_factory) -> pathlib.Path:
  """Text and token stores for experiments."""
  from kdjax.data.corpus import prepare
  from tests import tiny

  folder = tmp_path_factory.mktemp('home')
  config = tiny.config(folder)
  prepare(config.data, config.eval, config.runs, progress=False)
  return folder


@pytest.fixture(scope='session')
def undisturbed(home, tmp_path_factory) -> pathlib.Path:
  """The students of a finished experiment on that text, of tests/cohorts.py. To be copied, not changed."""
  from tests import cohorts

  folder = tmp_path_factory.mktemp('undisturbed')
  cohorts.fit(home, folder)
  return folder
