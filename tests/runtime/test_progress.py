"""Bars on a terminal, whole lines elsewhere."""

import io
import logging
import sys

import pytest

from kdjax.runs.metrics import Progress
from kdjax.runtime import progress


class Stream(io.StringIO):
  def __init__(self, terminal: bool):
    super().__init__()
    self._terminal = terminal

  def isatty(self) -> bool:
    return self._terminal


@pytest.fixture
def stderr(monkeypatch):
  def put(terminal: bool, term: str = 'xterm', every: float = 0.0) -> Stream:
    stream = Stream(terminal)
    monkeypatch.setattr(sys, 'stderr', stream)
    monkeypatch.setenv('TERM', term)
    monkeypatch.setattr(progress, 'EVERY', every)
    return stream

  return put


@pytest.mark.parametrize(('terminal', 'term'), [(False, 'xterm'), (False, 'dumb'), (True, 'dumb')])
def test_where_no_bar_can_be_drawn_there_are_whole_lines(stderr, terminal, term):
  stream = stderr(terminal, term)
  bar = Progress('student', 4, 1)
  for _ in range(3):
    bar.update(1, ce='2.5', **{'tok/s': '7'})
  bar.close()
  text = stream.getvalue()
  lines = text.splitlines()
  assert '\r' not in text and '\x1b' not in text and text.endswith('\n') and all(lines) and len(lines) == 3
  assert lines[0].startswith('student:  50%| 2/4 [') and lines[-1].startswith('student: 100%| 4/4 [')
  assert lines[-1].endswith(', ce=2.5, tok/s=7]')


def test_lines_come_now_and_then(stderr):
  stream = stderr(False, every=1000.0)
  bar = Progress('student', 1000)
  for _ in range(1000):
    bar.update(1)
  assert stream.getvalue() == ''
  bar.close()
  bar.close()
  assert len(stream.getvalue().splitlines()) == 1


def test_a_bar_that_leaves_nothing_behind_is_silent_where_it_was_quick(stderr):
  stream = stderr(False, every=1000.0)
  with progress.bar('reading x', unit='B', unit_scale=True, leave=False) as bar:
    bar.update(3_000_000)
  assert stream.getvalue() == ''
  stream = stderr(False)
  with progress.bar('reading x', unit='B', unit_scale=True, leave=False) as bar:
    bar.update(3_000_000)
  assert stream.getvalue().splitlines()[0].startswith('reading x: 3.00MB [')


def test_a_terminal_has_a_bar_and_log_lines_above_it(stderr):
  stream = stderr(True)
  handler = progress.Handler(stream)
  with progress.bar('student', 4) as bar:
    bar.update(1)
    handler.emit(logging.LogRecord('kdjax', logging.INFO, '', 0, 'a line', (), None))
  text = stream.getvalue()
  assert '\ra line\n' in text.replace('\x1b[A', '').replace(' ', '').replace('aline', 'a line') and '25%|' in text


@pytest.mark.parametrize('terminal', [True, False])
def test_a_bar_that_is_off_prints_nothing(stderr, terminal):
  stream = stderr(terminal)
  bar = Progress('student', 4, enabled=False)
  bar.update(4)
  bar.close()
  assert stream.getvalue() == ''


def test_a_bar_that_nobody_reads_raises_once(stderr):
  stream = stderr(False)
  stream.write = lambda text: (_ for _ in ()).throw(BrokenPipeError())
  bar = Progress('student', 4)
  with pytest.raises(BrokenPipeError):
    bar.update(1)
  bar.update(1)
  bar.close()
