"""The size of a chunk: by the budget, even, and by the backend that a program is made for."""

import dataclasses

import pytest

from kdjax.config import LossConfig
from kdjax.losses.chunks import CACHE_BYTES, CPU_EVALUATION, cache_rows, chunk_tokens, evaluation_tokens
from kdjax.runtime import backend


def test_a_chunk_has_the_tokens_that_the_budget_allows_and_chunks_are_even():
  loss = dataclasses.replace(LossConfig(), chunk_megabytes=64)
  for columns, students in ((32768, 1), (2048, 1), (2048, 8), (128256, 1)):
    chunk = chunk_tokens(loss, 10**6, columns, students)
    assert chunk % 16 == 0
    bytes_of = lambda c, v=columns, k=students: 4 * c * v * (1 + 2 * k)
    assert chunk == 16 or bytes_of(chunk - 16) <= 64 * 2**20 < bytes_of(chunk + 32)
  assert chunk_tokens(loss, 10**6, 10**7) == 16  # never less
  assert chunk_tokens(loss, 2048, 32768) == 160  # 13 chunks of about 158, not 12 of 170 and one of 8
  assert chunk_tokens(LossConfig(), 1024, 128_256) == 256  # the default budget alone would have 176
  assert chunk_tokens(loss, 50, 2048) == 50  # no chunk is longer than the tokens there are
  assert chunk_tokens(dataclasses.replace(loss, chunk_tokens=200), 10**6, 2048) == 200
  assert chunk_tokens(dataclasses.replace(loss, chunk_tokens=200), 50, 2048) == 50
  more = dataclasses.replace(loss, chunk_megabytes=128)
  assert chunk_tokens(more, 10**6, 2048) == pytest.approx(2 * chunk_tokens(loss, 10**6, 2048), abs=64)


def test_an_evaluations_chunks_are_small_on_cpu_alone():
  assert evaluation_tokens(LossConfig(), 10**6, 2048) == CPU_EVALUATION
  assert evaluation_tokens(LossConfig(), 100, 2048) == 100
  assert evaluation_tokens(LossConfig(chunk_tokens=4096), 10**6, 2048) == 4096  # the user's word
  with backend.compiling_for('tpu'):
    assert evaluation_tokens(LossConfig(), 10**6, 2048) == chunk_tokens(LossConfig(), 10**6, 2048) > 10 * CPU_EVALUATION


def test_an_accelerators_chunks_are_long_and_whole():
  on_cpu = chunk_tokens(LossConfig(), 10**6, 32_768)
  with backend.compiling_for('tpu'):
    chunk = chunk_tokens(LossConfig(), 10**6, 32_768)
    assert chunk % 128 == 0 and chunk > 2 * on_cpu
    assert cache_rows(chunk, 32_768) == chunk
  assert chunk_tokens(LossConfig(), 10**6, 32_768) == on_cpu


@pytest.mark.parametrize(('n_rows', 'width'), [(256, 2048), (160, 32_768), (96, 4096), (7, 2048)])
def test_rows_that_fit_the_cache_divide_the_chunk(n_rows, width):
  block = cache_rows(n_rows, width)
  assert n_rows % block == 0
  assert block == n_rows or 4 * block * width <= CACHE_BYTES
