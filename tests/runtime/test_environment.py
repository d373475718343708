"""XLA_FLAGS, JAX_PLATFORMS and MPLBACKEND as users and notebooks set them."""

import os
import subprocess
import sys

import jax
import pytest

from kdjax.config import MeshConfig
from kdjax.errors import UserError
from kdjax.runtime import backend, environment, sharding
from tests import commands


def python(code: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
  env = {name: value for name, value in os.environ.items() if name not in ('XLA_FLAGS', 'MPLBACKEND')}
  return subprocess.run(
    [sys.executable, *(['-c', code] if code else arguments)],
    env=env | {'PYTHONPATH': str(commands.REPO)} | variables, capture_output=True, text=True, timeout=100, check=False,
  )  # fmt: skip


def test_deterministic_flags_are_added_once(monkeypatch):
  monkeypatch.setenv('XLA_FLAGS', '--xla_a=1')
  environment.set_deterministic()
  environment.set_deterministic()
  assert os.environ['XLA_FLAGS'].split() == ['--xla_a=1', '--xla_gpu_deterministic_ops=true']


def test_the_users_own_determinism_flag_is_kept(monkeypatch):
  monkeypatch.setenv('XLA_FLAGS', '--xla_gpu_deterministic_ops=false')
  environment.set_deterministic()
  assert os.environ['XLA_FLAGS'] == '--xla_gpu_deterministic_ops=false'


@pytest.mark.parametrize(
  ('flags', 'excluded'),
  [
    ('', False),
    ('--xla_a=1', False),
    ('--xla_gpu_deterministic_ops=true', True),
    ('--xla_gpu_deterministic_ops', True),
    ('--xla_gpu_deterministic_ops=false', False),
    ('--xla_gpu_deterministic_ops=true --xla_gpu_deterministic_ops=false', False),
    ('--xla_gpu_deterministic_ops=false --xla_gpu_exclude_nondeterministic_ops=1', True),
  ],
)
def test_which_flags_exclude_nondeterministic_operations(flags, excluded, monkeypatch):
  monkeypatch.setenv('XLA_FLAGS', flags)
  assert environment.excludes_nondeterminism() == excluded


def test_a_file_of_flags_is_left_alone_and_read(monkeypatch, tmp_path):
  file = tmp_path / 'flags'
  file.write_text('--xla_a=1')
  monkeypatch.setenv('XLA_FLAGS', str(file))
  environment.set_deterministic()
  assert os.environ['XLA_FLAGS'] == str(file)
  assert environment.xla_flags() == '--xla_a=1' and not environment.is_deterministic()
  file.write_text('--xla_a=1\n--xla_gpu_deterministic_ops=true\n')
  assert environment.is_deterministic()


def test_a_file_of_flags_that_is_not_there_is_named(monkeypatch):
  monkeypatch.setenv('XLA_FLAGS', 'xla_a=1')
  with pytest.raises(UserError, match=r"^XLA_FLAGS=xla_a=1: a value without a leading '-' names a file of flags"):
    environment.is_deterministic()


CHECK = """
import os, sys
import jax
from kdjax.errors import UserError
from kdjax.runtime import environment, interrupts
interrupts.begin()
try: environment.check_xla_flags()
except UserError as e: sys.exit(str(e))
print(len(jax.devices()), os.environ.get('XLA_FLAGS'))
"""


@pytest.mark.parametrize(
  ('flags', 'says'),
  [
    ('--xla_foo=1', 'XLA_FLAGS: XLA rejects the flags (Unknown flag in XLA_FLAGS: --xla_foo=1); correct or unset it'),
    ('--xla_force_host_platform_device_count=two', "Couldn't interpret value two for flag xla_force_host_platform"),
    ('nowhere', "names a file of flags, but this file cannot be read (No such file or directory)"),
    ('/', 'cannot be read (Is a directory)'),
  ],
)  # fmt: skip
def test_flags_that_xla_refuses_are_one_line(flags, says):
  done = python(CHECK, XLA_FLAGS=flags)
  assert done.returncode == 1 and done.stdout == ''
  (line,) = done.stderr.splitlines()
  assert says in line


def test_flags_that_xla_takes_are_taken_from_wherever_they_are(tmp_path):
  (tmp_path / 'flags').write_text('--xla_force_host_platform_device_count=3\n')
  flags = '--xla_force_host_platform_device_count=2'
  for value, says in ((flags, f'2 {flags}'), (str(tmp_path / 'flags'), f'3 {tmp_path}/flags'), (' ', '1 None')):
    done = python(CHECK, XLA_FLAGS=value)
    assert (done.stdout, done.stderr) == (f'{says}\n', '')


@pytest.mark.parametrize(
  'error', [AssertionError(), RuntimeError("Unable to initialize backend 'x': y (set JAX_PLATFORMS='' to")]
)
def test_a_device_that_is_not_here_is_one_line_for_library_calls_too(monkeypatch, error):
  def devices():
    raise error

  monkeypatch.setattr(jax, 'devices', devices)
  for ask in (backend.devices, sharding.one_device, lambda: sharding.make_mesh(MeshConfig())):
    with pytest.raises(
      UserError, match=r'^JAX_PLATFORMS=cpu: JAX cannot use this platform here \([^(]*\); unset it'
    ) as e:
      ask()
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('platform', ['cuda', 'cudaa'])
def test_a_command_without_its_device_is_one_line(platform, tmp_path):
  if platform == 'cuda' and backend.name() == 'gpu':
    pytest.skip('it is here')
  done = python('', '-m', 'kdjax.generate', str(tmp_path), JAX_PLATFORMS=platform)
  assert done.returncode == 2 and done.stdout == ''
  (line,) = done.stderr.splitlines()
  assert line.startswith(f'error: JAX_PLATFORMS={platform}: JAX cannot use this platform here (')


IMPORT = """
import os
import kdjax.analysis.figures
import matplotlib
print(matplotlib.rcParams._get('backend') if hasattr(matplotlib.rcParams, '_get') else matplotlib.rcParams['backend'], os.environ['MPLBACKEND'])
"""


@pytest.mark.parametrize(('name', 'kept'), [('nowhere', False), ('svg', True)])
def test_figures_need_no_backend_and_one_that_is_there_is_left_to_the_caller(name, kept):
  done = python(IMPORT, MPLBACKEND=name)
  assert done.stderr == '' and done.stdout.split() == [name if kept else 'agg', name]


def test_a_command_needs_no_backend_either():
  done = python('', '-m', 'kdjax.report', '--help', MPLBACKEND='nowhere')
  assert (done.returncode, done.stderr) == (0, '')
