"""Real processes that receive a signal during a call into C, where Python runs no handler."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests import commands

# Locking a mutex twice blocks forever, without the GIL, and no signal interrupts it: like a compiler.
STUCK = """
import contextlib, ctypes, os, signal, sys, threading, time
from kdjax.runtime import interrupts
interrupts.GRACE = interrupts.GRACE_TERMINATED = .3
def compile_for_ever():
  mutex = ctypes.create_string_buffer(64)
  for _ in range(2): ctypes.CDLL(None).pthread_mutex_lock(mutex)
def say(text): os.write(1, text.encode() + b'\\n')
"""
RAISING = """
class Stop(BaseException): ...
interrupts.begin()
try:
  with interrupts.raise_on_signals(Stop('come back')):
    threading.Timer(.3, say, ['ready']).start()  # once the main thread is in the body
    BODY
except KeyboardInterrupt: say('interrupted'); sys.exit(7)
except Stop: say('told'); sys.exit(8)
"""
TRAINING = """
from kdjax import cli
from kdjax.runtime import preemption
interrupts.begin()
with cli.user_errors():
  with preemption.stop_signal() as asked:
    threading.Timer(.3, say, ['ready']).start()  # once the main thread is in the body
    BODY
  raise preemption.Preempted('saved', asked.code) if asked(0, 1) else AssertionError
"""
WAIT = 'time.sleep(60)'
STEP = 'time.sleep(.5); time.sleep(.5)'  # a signal whose handler raises nothing does not end the sleep
COMPILE = 'compile_for_ever()'


def start(code: str, body: str) -> subprocess.Popen:
  process = subprocess.Popen(
    [sys.executable, '-c', STUCK + code.replace('BODY', body)],
    env=commands.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
  )  # fmt: skip
  assert process.stdout and process.stdout.readline() == 'ready\n', process.communicate()[1]
  return process


def end(process: subprocess.Popen) -> tuple[int, str, str]:
  out, err = process.communicate(timeout=60)
  return process.returncode, out, err


@pytest.mark.parametrize(
  ('number', 'body', 'code', 'out', 'err'),
  [
    (signal.SIGINT, WAIT, 7, 'interrupted\n', ''),
    (signal.SIGTERM, WAIT, 8, 'told\n', ''),
    (signal.SIGINT, COMPILE, 130, '', 'stopped\n'),
    (signal.SIGTERM, COMPILE, 75, '', 'come back\n'),
    # It hangs while it exits.
    (signal.SIGINT, f'with contextlib.ExitStack() as s: s.callback(time.sleep, 60); {WAIT}', 130, '', 'stopped\n'),
  ],
)
def test_a_signal_ends_a_command_in_time_wherever_it_is(number, body, code, out, err):
  process = start(RAISING, body)
  process.send_signal(number)
  begin = time.monotonic()
  assert end(process) == (code, out, err)
  assert time.monotonic() - begin < 5


def test_a_signal_after_the_work_does_not_change_the_exit_code():
  """The interpreter's exit takes a moment."""
  code = """
import atexit
from kdjax import cli
from kdjax.runtime import preemption
interrupts.begin()
atexit.register(BODY)
with cli.user_errors(resumable=True):
  pass
say('ready')
"""
  process = start(code, 'time.sleep, 3')
  process.send_signal(signal.SIGTERM)
  assert end(process) == (0, '', '')


def test_two_interrupts_end_a_command_with_one_line():
  process = start(RAISING, COMPILE)
  process.send_signal(signal.SIGINT)
  process.send_signal(signal.SIGINT)
  assert end(process) == (130, '', 'stopped\n')


def test_a_process_that_is_no_command_gets_exceptions_and_is_never_ended():
  code = RAISING.replace('interrupts.begin()', '')
  process = start(code, 'time.sleep(1)')
  process.send_signal(signal.SIGTERM)
  assert process.wait(60) == -signal.SIGTERM  # as it was
  process = start(code, WAIT)
  process.send_signal(signal.SIGINT)
  assert end(process)[:2] == (7, 'interrupted\n')


@pytest.mark.parametrize(('number', 'code'), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_stop_is_announced_at_once_and_takes_effect_after_the_step(number, code):
  process = start(TRAINING, STEP)
  process.send_signal(number)
  assert process.stderr and process.stderr.readline().startswith('Stopping after this step.')
  assert process.poll() is None
  assert end(process) == (code, '', 'saved\n')


def test_a_stop_is_announced_while_the_main_thread_is_in_the_compiler_and_the_second_interrupt_ends_it():
  process = start(TRAINING, COMPILE)
  process.send_signal(signal.SIGTERM)
  assert process.stderr and process.stderr.readline() == (
    'Stopping after this step. The run is saved, and the same command resumes it.\n'
  )
  process.send_signal(signal.SIGINT)  # the first: the launcher's SIGTERM and the terminal's SIGINT come together
  time.sleep(1)
  assert process.poll() is None
  process.send_signal(signal.SIGINT)
  assert end(process) == (130, '', 'stopped\n')


def test_two_interrupts_stop_a_training_at_once():
  process = start(TRAINING, WAIT)
  process.send_signal(signal.SIGINT)
  assert process.stderr and 'Ctrl-C again: stop at once' in process.stderr.readline()
  process.send_signal(signal.SIGINT)
  assert end(process) == (130, '', 'stopped\n')


COMMANDS = ('train', 'evaluate', 'grid', 'report', 'prepare', 'generate', 'convert', 'harness', 'aot')


@pytest.fixture(scope='module')
def slow_jax(tmp_path_factory):
  """A folder with a fake `jax` that takes a minute to import and prints when it starts."""
  folder = tmp_path_factory.mktemp('slow')
  (folder / 'jax.py').write_text("import os, time\nos.write(1, b'importing\\n')\ntime.sleep(60)\n")
  return folder


@pytest.mark.parametrize('command', COMMANDS)
@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_the_imports_of_a_command_is_one_line(slow_jax, command, number):
  process = subprocess.Popen(
    [sys.executable, '-m', f'kdjax.{command}', '--help'],
    env=os.environ | {'PYTHONPATH': f'{slow_jax}:{commands.REPO}'}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
  )  # fmt: skip
  assert process.stdout and process.stdout.readline() == 'importing\n'
  process.send_signal(number)
  told = (75, '', 'Stopped by SIGTERM. The same command resumes what is left.\n')
  resumable = command in ('train', 'evaluate', 'grid', 'prepare')
  expected = (130, '', 'stopped\n') if number == signal.SIGINT else told if resumable else (-signal.SIGTERM, '', '')
  assert end(process) == expected


def test_importing_the_package_in_another_program_changes_nothing(slow_jax):
  code = """
import os, signal, sys
before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
import kdjax.errors
assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before and 'MPLBACKEND' not in os.environ
assert not any(name.startswith(('jax', 'numpy', 'kdjax.runtime.interrupts')) for name in sys.modules)
"""
  env = {name: value for name, value in os.environ.items() if name != 'MPLBACKEND'}
  subprocess.run([sys.executable, '-c', code], env=env | {'PYTHONPATH': str(commands.REPO)}, check=True, timeout=60)
