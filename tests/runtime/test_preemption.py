"""Preemption notices with several processes; for signals see tests/runtime/test_interrupts.py."""

import jax
import pytest
from jax.experimental import multihost_utils

from kdjax.runtime import preemption
from kdjax.runtime.preemption import Preempted


@pytest.fixture
def notice(monkeypatch):
  """The steps that JAX was asked about; it gives notice at the third."""
  asked = []
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  monkeypatch.setattr(multihost_utils, 'reached_preemption_sync_point', lambda n: asked.append(n) or len(asked) == 3)
  return asked


def test_between_pieces_of_work_a_notice_ends_the_command_with_work_left(notice):
  preemption.check_notice()
  preemption.check_notice()
  with pytest.raises(Preempted) as e:
    preemption.check_notice()
  assert e.value.code == 75 and not isinstance(e.value, Exception)


def test_every_question_has_a_number_of_its_own_whoever_asks(notice):
  preemption.check_notice()
  with preemption.stop_signal() as asked:
    assert [asked(0, 1), asked(1, 1)] == [False, True] and asked.code == 75
  assert notice == list(range(notice[0], notice[0] + 3))


def test_one_process_is_told_by_signals_alone():
  preemption.check_notice()
