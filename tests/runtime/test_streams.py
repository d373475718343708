"""Streams without a reader, with a limited encoding, closed or full: in small processes and in commands."""

import os
import subprocess
import sys

import pytest

from kdjax.runtime import streams
from tests import commands

PROGRAM = """
import sys
from kdjax.errors import UserError
from kdjax.runtime import streams
streams.open_missing()
streams.make_printable()
try:
  with streams.exit_without_reader():
    BODY
except OSError as e:
  sys.exit(f'{e.filename}: {e.strerror}')
except UserError as e:
  print(e, file=sys.stderr)
  sys.exit(2)
"""
BUFFERED = {name: value for name, value in os.environ.items() if name != 'PYTHONUNBUFFERED'}


def run(body: str, shell: str, **environment: str) -> tuple[int, bytes]:
  """Run a program, as $PROGRAM in `shell`. Returns (exit code, stderr)."""
  program = f'\'{sys.executable}\' -c "$CODE"'
  done = subprocess.run(
    ['bash', '-c', shell.replace('$PROGRAM', program)],
    env=BUFFERED | {'PYTHONPATH': str(commands.REPO), 'CODE': PROGRAM.replace('BODY', body)} | environment,
    capture_output=True, timeout=60, check=False,
  )  # fmt: skip
  return done.returncode, done.stderr


UNREAD = '{ sleep .5; $PROGRAM; echo $? >&2; } | true'


@pytest.mark.parametrize('unbuffered', ['', '1'])
@pytest.mark.parametrize(
  ('body', 'code'),
  [
    ("print('x')", 141),  # noticed at the final flush
    ("print('x' * 100_000)", 141),
    ("print('x'); sys.exit(0)", 141),
    ("print('x', file=sys.stderr)", 0),
  ],
)
def test_a_reader_that_has_left_ends_it_without_a_word(body, code, unbuffered):
  _, err = run(body, UNREAD, PYTHONUNBUFFERED=unbuffered)
  lines = err.decode().split()
  assert lines[-1] == str(code)
  assert lines[:-1] == (['x'] if 'stderr' in body else [])


def test_an_error_is_reported_though_nobody_reads_the_output():
  _, err = run("print('x'); raise UserError('wrong')", UNREAD)
  assert err.decode().split() == ['wrong', '2']


def test_a_reader_of_stderr_that_has_left_ends_it_too():
  _, err = run(
    "print('x' * 100_000, file=sys.stderr)", '{ sleep .5; $PROGRAM 2>&1 >/dev/null; echo $? >&3; } 3>&2 | true'
  )
  assert err.decode().split() == ['141']


def test_another_pipe_that_breaks_is_an_error_like_any_other():
  code, err = run("raise BrokenPipeError(32, 'Broken pipe', 'elsewhere')", '$PROGRAM')
  assert (code, err) == (1, b'elsewhere: Broken pipe\n')


def test_a_full_disk_under_stdout_is_named():
  code, err = run("print('x')", '$PROGRAM >/dev/full')
  assert (code, err) == (1, b'stdout: No space left on device\n')


@pytest.mark.parametrize('shell', ['$PROGRAM >&-', '$PROGRAM 2>&-', '$PROGRAM <&- >&- 2>&-'])
def test_closed_streams_are_the_null_device_and_no_file_gets_their_number(shell):
  body = "print('x'); print('y', file=sys.stderr, end=''); sys.stderr.isatty(); assert open('/dev/null').fileno() > 2"
  assert run(body, shell) == (0, b'' if '2>&-' in shell else b'y')


@pytest.mark.parametrize(
  ('encoding', 'out'),
  [
    ('ascii', b'? ? ?'),
    ('latin-1', '? ? ²'.encode('latin-1')),
    ('utf-8', 'α — ²'.encode()),
    ('ascii:strict', b'? ? ?'),
  ],
)
def test_characters_that_stdout_lacks_are_question_marks(tmp_path, encoding, out):
  code, err = run("print('\\u03b1 \\u2014 \\u00b2')", f'$PROGRAM > {tmp_path}/out', PYTHONIOENCODING=encoding)
  assert (code, err, (tmp_path / 'out').read_bytes()) == (0, b'', out + b'\n')


def test_a_file_name_that_is_not_utf_8_can_be_printed(tmp_path):
  code, err = run("print('caf\\udce9')", f'$PROGRAM > {tmp_path}/out')
  assert (code, err, (tmp_path / 'out').read_bytes()) == (0, b'', b'caf?\n')


def test_streams_that_are_not_files_are_left_alone(capsys):
  streams.make_printable()
  with streams.exit_without_reader():
    print('α')
  assert capsys.readouterr().out == 'α\n'
