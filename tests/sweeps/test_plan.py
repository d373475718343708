"""Costs and cohorts, by arithmetic."""

import dataclasses

import pytest

from kdjax import grid as command
from kdjax.errors import UserError
from kdjax.models import flops
from kdjax.sweeps import cells, plan
from kdjax.sweeps.config import ControlsConfig, GridConfig, HardwareConfig, TunedConfig
from tests.sweeps.test_cells import tokenizer_file

PLAIN = ControlsConfig(unigram=False, flop_matched=(), tuned=TunedConfig(enabled=False))
LARGE = HardwareConfig(gib=100.0)


def grid(**fields) -> GridConfig:
  return dataclasses.replace(GridConfig(controls=PLAIN, teacher=('tiny-1m',), hardware=LARGE, seed=(43,)), **fields)


def main_jobs(g):
  return plan.plan_jobs(g, 'main', cells.main_groups(g))


def test_every_cell_is_in_one_job_and_teachers_come_first():
  g = grid(controls=ControlsConfig(), teacher=('tiny-0.1m', 'tiny-1m'), teacher_tokens=(1000, 2000), seed=(43, 44))
  jobs = main_jobs(g)
  ids = [cell.id for job in jobs for cell in job.cells]
  assert sorted(ids) == sorted(cell.id for cell in cells.cells_of(cells.main_groups(g)))
  assert len(ids) == len(set(ids))
  seen = set()
  for job in jobs:
    assert not job.teacher or job.teacher in seen
    seen.add(job.id)
  assert sum(not job.cells for job in jobs) == 4


def test_later_phases_do_nothing_again():
  g = grid()
  known = main_jobs(g)
  assert plan.plan_jobs(g, 'validated', cells.main_groups(g), known) == []


def test_alphas_of_one_teacher_and_seed_share_it():
  (job,) = [job for job in main_jobs(grid()) if job.teacher]
  assert sorted(cell.alpha for cell in job.cells) == [0.2, 0.4, 0.6, 0.8]


def test_seeds_do_not_share_a_cohort():
  assert all(len({cell.seed for cell in job.cells}) <= 1 for job in main_jobs(grid(seed=(43, 44))))


@pytest.mark.parametrize(('limit', 'sizes'), [(8, [4]), (3, [2, 2]), (1, [1, 1, 1, 1])])
def test_a_cohort_has_a_largest_size_and_its_parts_are_even(limit, sizes):
  assert [len(job.cells) for job in main_jobs(grid(cohort=limit)) if job.teacher] == sizes


def test_a_cohort_fits_the_memory():
  student = flops.count_params(cells.sized(grid(), 'tiny-0.3m')).total
  teacher = flops.count_params(cells.sized(grid(), 'tiny-1m')).total
  two = (4 * teacher + 2.5 * plan.STATE_BYTES * student) / 0.7 / 2**30
  g = grid(hardware=HardwareConfig(gib=two))
  assert [len(job.cells) for job in main_jobs(g) if job.teacher] == [2, 2]


def test_a_cohort_whose_teacher_costs_nothing_does_not_pay():
  g = grid(student=('tiny-3m',), teacher=('tiny-0.1m',))
  cell = next(job for job in main_jobs(g) if job.teacher).cells[0]
  assert plan.saved_share(g, cell, 4) < plan.PAYS
  assert all(len(job.cells) == 1 for job in main_jobs(g) if job.teacher)


def test_costs_are_the_ledgers():
  g = grid()
  (job,) = [job for job in main_jobs(g) if job.teacher]
  student, teacher = cells.sized(g, 'tiny-0.3m'), cells.sized(g, 'tiny-1m')
  tokens, seq_len = g.student_tokens[0], g.base.data.seq_len
  entries = flops.ledger(student, teacher, tokens, tokens, seq_len)
  cost = plan.estimate_cost(g, job)
  assert cost.student == pytest.approx(4 * entries.student)
  assert cost.teacher == pytest.approx(entries.logits)
  assert cost.saved == pytest.approx(3 * entries.logits)
  assert cost.tokens == 4 * tokens
  (trained,) = [job for job in main_jobs(g) if not job.cells]
  assert plan.estimate_cost(g, trained).teacher == pytest.approx(entries.pretraining)
  kept = max(g.base.checkpoint.keep, g.last)
  assert cost.checkpoint_bytes == 4 * kept * plan.CHECKPOINT_BYTES * flops.count_params(student).total


def test_seconds_are_of_the_named_hardware():
  assert plan.estimate_seconds(HardwareConfig('H100', 8, 80.0, 0.5), 8 * 989e12) == pytest.approx(2.0)
  for device in ('cpu', 'CPU'):
    assert plan.estimate_seconds(HardwareConfig(device, cpu_gflops=50, utilisation=0.5), 25e9) == pytest.approx(1.0)


@pytest.mark.parametrize(
  ('short', 'long', 'tera'), [('v5p', 'TPU v5p', 459), ('L4', 'NVIDIA L4', 121), ('v6e', 'TPU v6 lite', 918)]
)
def test_a_device_goes_by_its_short_name_too(short, long, tera):
  for name in (short, long):
    assert plan.estimate_seconds(HardwareConfig(name, 1, 16.0, 1.0), 1e15) == pytest.approx(1000 / tera)


def test_an_unknown_device_is_no_cpu():
  with pytest.raises(UserError, match=r"hardware.device: unknown device 'abacus'"):
    plan.estimate_seconds(HardwareConfig('abacus'), 1e15)


def test_the_plan_of_a_tokenizer_file_counts_its_tokens(tmp_path):
  """No corpus is needed. FLOPs, bytes and names of runs stay the same as long as the number of table rows does."""
  texts = {}
  for name in ('bytes', str(tokenizer_file(tmp_path, 300)), 'bpe'):
    data = dataclasses.replace(GridConfig().base.data, tokenizer=name)
    g = grid(base=dataclasses.replace(GridConfig().base, data=data))
    texts[name] = [plan.estimate_cost(g, job) for job in main_jobs(g)]
    assert command.plan_text(g, tmp_path / 'grid')
  small, file, large = texts.values()
  assert small == file
  assert all(a.flops < b.flops and a.checkpoint_bytes < b.checkpoint_bytes for a, b in zip(small, large, strict=True))


def test_the_plan_runs_nothing_and_names_every_job(tmp_path):
  g = grid(runs=str(tmp_path), controls=ControlsConfig(), teacher=('tiny-0.1m', 'tiny-1m'))
  text = command.plan_text(g, tmp_path / 'grid')
  assert not list(tmp_path.iterdir())
  for job in plan.plan_jobs(g, 'main', cells.main_groups(g)):
    assert job.id in text
  for word in ('weak-to-strong', 'strong-to-weak', 'pilot', 'validated', 'lm-', 'unigram_a?', 'FLOPs', 'saved'):
    assert word in text, word


def test_checkpoints_of_a_period_take_room():
  g = grid()
  checkpoint = dataclasses.replace(g.base.checkpoint, keep_period=50)
  often = grid(base=dataclasses.replace(g.base, checkpoint=checkpoint))
  for few, many in zip(main_jobs(g), main_jobs(often), strict=True):
    n_steps = (
      plan.estimate_cost(g, few).tokens // max(1, len(few.cells)) // (g.base.student.batch_size * g.base.data.seq_len)
    )
    kept = max(g.base.checkpoint.keep, g.last)
    ratio = plan.estimate_cost(often, many).checkpoint_bytes / plan.estimate_cost(g, few).checkpoint_bytes
    assert ratio == pytest.approx((kept + n_steps // 50) / kept)
