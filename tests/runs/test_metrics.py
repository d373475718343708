"""Each step's numbers once, in order, whatever was killed before; rates that mean what they say."""

import json
import time

import pytest

from kdjax.config import ModelConfig
from kdjax.models import build, flops
from kdjax.runs import metrics
from kdjax.runs.metrics import MetricWriter, Speed, memory_gib, read_metrics

MODEL = build(ModelConfig(vocab_size=64, d_model=16, n_layers=1, d_ff=16, n_heads=2, n_kv_heads=2, head_dim=8))


def write(folder, start: int, stop: int, tag: float = 0.0) -> None:
  writer = MetricWriter(folder, start)
  for step in range(start + 1, stop + 1):
    writer.write(step, {'ce': step / 10, 'tag': tag})
  writer.close()


def test_every_step_is_a_line(tmp_path):
  write(tmp_path, 0, 5)
  assert read_metrics(tmp_path) == [{'step': s, 'ce': s / 10, 'tag': 0.0} for s in range(1, 6)]


def test_a_resumed_run_replaces_the_steps_after_its_checkpoint(tmp_path):
  write(tmp_path, 0, 7, tag=1)
  write(tmp_path, 4, 9, tag=2)
  records = read_metrics(tmp_path)
  assert [r['step'] for r in records] == list(range(1, 10))
  assert [r['tag'] for r in records] == [1] * 4 + [2] * 5


def test_a_last_line_cut_by_a_kill_is_left_out_and_written_again(tmp_path):
  write(tmp_path, 0, 5)
  path = tmp_path / 'metrics.jsonl'
  path.write_text(path.read_text()[:-9])
  assert [r['step'] for r in read_metrics(tmp_path)] == [1, 2, 3, 4]
  write(tmp_path, 4, 6)
  assert [r['step'] for r in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize('cut', range(1, 30))
def test_a_file_cut_anywhere_can_be_read_and_gone_on_with(tmp_path, cut):
  """A cut may leave a whole record without its line's end, or half a number that still parses."""
  write(tmp_path, 0, 3)
  path = tmp_path / 'metrics.jsonl'
  whole = read_metrics(tmp_path)
  path.write_text(path.read_text()[:-cut])
  found = read_metrics(tmp_path)
  assert found == whole[: len(found)]
  write(tmp_path, len(found), 4)
  assert [r['step'] for r in read_metrics(tmp_path)] == [1, 2, 3, 4]


def test_a_damaged_line_loses_itself_and_no_other(tmp_path):
  write(tmp_path, 0, 5)
  path = tmp_path / 'metrics.jsonl'
  lines = path.read_bytes().splitlines(keepends=True)
  path.write_bytes(b''.join([*lines[:2], b'\xff' + lines[2][1:], *lines[3:]]))
  assert [r['step'] for r in read_metrics(tmp_path)] == [1, 2, 4, 5]
  write(tmp_path, 5, 6)
  assert [r['step'] for r in read_metrics(tmp_path)] == [1, 2, 4, 5, 6]


def test_a_folder_without_metrics_has_none(tmp_path):
  assert read_metrics(tmp_path) == []


def test_flushed_lines_can_be_read_while_the_run_goes_on(tmp_path):
  writer = MetricWriter(tmp_path, 0)
  writer.write(1, {'ce': 1.0})
  writer.flush()
  assert len(read_metrics(tmp_path)) == 1
  writer.close()


def test_lines_are_json_with_a_step(tmp_path):
  write(tmp_path, 0, 2)
  for line in (tmp_path / 'metrics.jsonl').read_text().splitlines():
    assert 'step' in json.loads(line)


def test_a_number_that_is_not_finite_is_still_read_back(tmp_path):
  writer = MetricWriter(tmp_path, 0)
  writer.write(1, {'ce': float('nan'), 'grad_norm': float('inf')})
  writer.close()
  (record,) = read_metrics(tmp_path)
  assert record['ce'] != record['ce'] and record['grad_norm'] == float('inf')


def test_tensorboard_events_are_written(tmp_path):
  write(tmp_path, 0, 3)
  (events,) = (tmp_path / 'tensorboard').glob('events.out.tfevents.*')
  assert events.stat().st_size > 100


def test_lost_metrics_are_reported_when_the_run_resumes(tmp_path, caplog):
  """As after a crash of the host that emptied the file."""
  write(tmp_path, 0, 5)
  assert not caplog.records
  lines = (tmp_path / 'metrics.jsonl').read_text().splitlines(keepends=True)
  (tmp_path / 'metrics.jsonl').write_text(''.join(lines[3:]))
  write(tmp_path, 5, 6)
  assert f'{tmp_path}/metrics.jsonl: the metrics of 3 of the first 5 steps are lost' in caplog.text
  assert [record['step'] for record in read_metrics(tmp_path)] == [4, 5, 6]


def test_rates_are_tokens_over_time_and_flops_apart():
  speed = Speed(MODEL, 3, MODEL, seq_len=32)
  assert speed(1000, dispatched=0.0, done=10.0) == {}  # the first call's time is compilation
  rates = speed(1000, dispatched=9.0, done=12.0)
  assert rates['tokens_per_second'] == 500
  assert rates['student_tflops'] == pytest.approx(500 * 3 * flops.training_flops(MODEL.config, 32) / 1e12)
  assert rates['teacher_tflops'] == pytest.approx(500 * flops.forward_flops(MODEL.config, 32) / 1e12)
  assert 'mfu' not in rates
  assert speed(1000, dispatched=14.0, done=16.0)['tokens_per_second'] == 250  # waiting for data counts


def test_without_a_teacher_it_does_no_work():
  speed = Speed(MODEL, 1, None, seq_len=32)
  speed(1, 0.0, 10.0)
  assert speed(1, 10.0, 12.0)['teacher_tflops'] == 0


def test_utilisation_is_given_where_the_peak_is_known(monkeypatch):
  monkeypatch.setattr(flops, 'peak_flops', lambda kind: 1e9)
  speed = Speed(MODEL, 1, MODEL, seq_len=32)
  speed(1, 0.0, 10.0)
  rates = speed(1000, 10.0, 12.0)
  peak = 1e9 * metrics.jax.device_count()
  assert rates['mfu'] == pytest.approx((rates['student_tflops'] + rates['teacher_tflops']) * 1e12 / peak)


def test_time_spent_elsewhere_is_left_out():
  speed = Speed(MODEL, 1, None, seq_len=32)
  speed(1, 0.0, 10.0)
  speed(1, 10.0, 12.0)
  speed.pause()
  assert speed(100, dispatched=1000.0, done=1001.0)['tokens_per_second'] == 100


class Slow:
  """An array that is ready after a time."""

  def __init__(self, seconds: float):
    self._until = time.perf_counter() + seconds

  def block_until_ready(self):
    time.sleep(max(0.0, self._until - time.perf_counter()))
    return self


def test_a_call_ends_when_its_results_are_ready_even_while_the_host_is_held_up():
  """As by the dispatch of the next call on a GPU: the time at which the host looks gave an MFU of 1.7."""
  clock, start = metrics.Clock(), time.perf_counter()
  first, second = clock.watch(Slow(0.2)), clock.watch(Slow(0.4))
  time.sleep(0.8)
  assert 0.2 <= first.result() - start < 0.4 <= second.result() - start < 0.7
  clock.close()


def test_a_failed_call_is_raised_where_its_time_is_asked_for():
  class Failed:
    def block_until_ready(self):
      raise ValueError('a device was lost')

  clock = metrics.Clock()
  failed, after = clock.watch(Failed()), clock.watch(Slow(0))
  with pytest.raises(ValueError, match='a device was lost'):
    failed.result()
  assert after.result() > 0
  clock.close()


def test_memory_is_a_plausible_number():
  assert 0.01 < memory_gib() < 1000
