import itertools
import pathlib
import random
import threading

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from kdjax.data import store as store_module
from kdjax.data.batches import BatchStream, Windows, local_rows, to_global
from kdjax.data.store import TokenStore
from kdjax.errors import UserError
from kdjax.storage.files import StoreDamaged
from tests.data.helpers import make_store

NAMES = ['labels', 'segment_ids', 'tokens']
_counter = itertools.count()


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> pathlib.Path:
  return tmp_path_factory.mktemp('stores')


@pytest.fixture(scope='module')
def opened(folder) -> TokenStore:
  return make_store(folder / 'main', [30 + (i * 37) % 200 for i in range(150)])


@pytest.fixture(scope='module')
def stream(opened) -> BatchStream:
  return BatchStream(Windows(opened, 64), 8, seed=5)


def assert_same(a, b):
  assert sorted(a) == sorted(b) == NAMES
  for name in NAMES:
    assert a[name].dtype == np.int32
    np.testing.assert_array_equal(a[name], b[name])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
  lengths=st.lists(st.integers(1, 40), min_size=4, max_size=12),
  seq_len=st.integers(1, 50),
  cuts=st.tuples(st.integers(0, 8), st.integers(0, 8)).filter(lambda c: c[0] + 2 < c[1]),
  distinct=st.one_of(st.just(0), st.integers(2, 200)),
  masked=st.booleans(),
)
def test_windows_use_each_token_once_and_predict_each_next_one_once(folder, lengths, seq_len, cuts, distinct, masked):
  store = make_store(folder / str(next(_counter)), lengths)
  windows = Windows(store, seq_len, (cuts[0] / 8, cuts[1] / 8), distinct, masked)
  start, stop = windows.range
  text = store.read(start, stop)
  made = [windows.window(i) for i in range(len(windows))]
  assert all(value.shape == (seq_len,) and value.dtype == np.int32 for window in made for value in window.values())
  tokens, labels, segments = (np.concatenate([w[name] for w in made]) for name in ('tokens', 'labels', 'segment_ids'))
  n = stop - start
  assert windows.n_tokens == n and len(windows) == -(-n // seq_len)
  np.testing.assert_array_equal(tokens[:n], text)
  np.testing.assert_array_equal(labels[: n - 1], text[1:])
  assert labels[n - 1] == -1
  assert (tokens[n:] == 0).all() and (labels[n:] == -1).all() and (segments[n:] == 0).all()
  for i, window in enumerate(made):
    own = window['segment_ids'][: max(0, n - i * seq_len)]
    starts = window['tokens'][: len(own)] == store.separator_id
    # A segment begins at each separator; the one before the first separator, or at it, is number 1.
    expected = np.cumsum(starts) + (0 if starts[0] else 1) if masked else np.ones(len(own))
    np.testing.assert_array_equal(own, expected)


def test_the_label_of_a_documents_last_token_is_the_separator_and_the_first_token_is_predicted(folder):
  store = make_store(folder / 'two', [3, 2])
  (a, b, c), (d, e) = store.read(1, 4), store.read(5, 7)
  window = Windows(store, 8).window(0)
  np.testing.assert_array_equal(window['tokens'], [256, a, b, c, 256, d, e, 0])
  np.testing.assert_array_equal(window['labels'], [a, b, c, 256, d, e, -1, -1])
  np.testing.assert_array_equal(window['segment_ids'], [1, 1, 1, 1, 2, 2, 2, 0])
  unmasked = Windows(store, 8, mask_documents=False).window(0)
  np.testing.assert_array_equal(unmasked['segment_ids'], [1] * 7 + [0])
  np.testing.assert_array_equal(unmasked['labels'], window['labels'])


def test_windows_longer_than_a_block_are_whole(folder):
  store = make_store(folder / 'long', [30_000, 10])
  windows = Windows(store, 20_000)
  np.testing.assert_array_equal(windows.window(0)['labels'], store.read(1, 20_001))
  assert (windows.window(1)['segment_ids'] == 0).sum() == 40_000 - 30_012


@pytest.mark.parametrize('cuts', [[0, 0.5, 1], [0, 0.1, 0.3, 1], [0.0, 1 / 3, 2 / 3, 1]])
def test_slices_side_by_side_share_nothing_and_leave_nothing_out(opened, cuts):
  ranges = [Windows(opened, 16, part).range for part in itertools.pairwise(cuts)]
  assert ranges[0][0] == 0 and ranges[-1][1] == opened.n_tokens
  assert all(a[1] == b[0] for a, b in itertools.pairwise(ranges))
  assert all(edge in opened.offsets for pair in ranges for edge in pair)


def test_distinct_tokens_cuts_the_slice_and_never_makes_it_longer(opened):
  full = Windows(opened, 16, (0.2, 0.6))
  cut = Windows(opened, 16, (0.2, 0.6), distinct_tokens=100)
  assert cut.range == (full.range[0], full.range[0] + 100) and len(cut) == 7
  assert Windows(opened, 16, (0.2, 0.6), distinct_tokens=10**9).range == full.range


@pytest.mark.parametrize(
  ('arguments', 'words'),
  [
    ({'slice': (0.5, 0.4)}, 'not within'),
    ({'slice': (-0.1, 0.4)}, 'not within'),
    ({'slice': (0.0, 1.1)}, 'not within'),
    ({'slice': (0.5, 0.5)}, 'not within'),
    ({'slice': (float('nan'), 1.0)}, 'not within'),
    ({'slice': (0.0, 0.001)}, 'holds no window'),
    ({'distinct_tokens': 1}, 'holds no window'),
    ({'distinct_tokens': -1}, 'at least 0'),
    ({'seq_len': 0}, 'at least 1'),
  ],
)
def test_a_slice_without_windows_says_so(opened, arguments, words):
  with pytest.raises(UserError, match=words):
    Windows(opened, **{'seq_len': 16, **arguments})


def test_a_window_outside_is_refused(opened):
  windows = Windows(opened, 16)
  for i in (-1, len(windows)):
    with pytest.raises(IndexError):
      windows.window(i)


def test_each_epoch_visits_each_window_once_in_another_order(stream):
  n = len(stream.windows)
  order = np.concatenate([stream.indices(step) for step in range(-(-3 * n // 8))])
  epochs = order[: 3 * n].reshape(3, n)
  for epoch in epochs:
    np.testing.assert_array_equal(np.sort(epoch), np.arange(n))
  assert not np.array_equal(epochs[0], epochs[1]) and not np.array_equal(epochs[0], np.arange(n))
  assert stream.steps_per_epoch == n / 8


def test_sample_i_is_row_i_mod_b_of_step_i_div_b_for_every_batch_size(opened):
  windows = Windows(opened, 64)
  order = {b: np.concatenate([BatchStream(windows, b, 5).indices(s) for s in range(96 // b)]) for b in (1, 4, 8, 32)}
  for b in (1, 4, 8):
    np.testing.assert_array_equal(order[b], order[32])
  assert not np.array_equal(BatchStream(windows, 32, 6).indices(0), order[32][:32])


def test_any_rows_equal_those_of_the_full_batch(stream):
  rng = random.Random(0)
  for _ in range(30):
    step = rng.randrange(1000)
    whole = stream.rows(step, range(8))
    assert_same(whole, {n: np.stack([stream.windows.window(int(i))[n] for i in stream.indices(step)]) for n in NAMES})
    rows = rng.sample(range(8), rng.randrange(1, 9))
    assert_same(stream.rows(step, rows), {name: value[rows] for name, value in whole.items()})


def test_reading_ahead_gives_the_steps_of_each_call_padded_to_its_size(stream):
  rows = np.array([1, 2, 6])
  items = list(stream.iterate([(0, 3), (3, 3), (6, 1)], 3, rows, threads=2, prefetch=2))
  assert len(items) == 3
  for first, item in zip((0, 3, 6), items, strict=True):
    for i in range(3 if first < 6 else 1):
      assert_same({name: value[i] for name, value in item.items()}, stream.rows(first + i, rows))
    assert all(value.shape == (3, 3, 64) for value in item.values())
  last = items[-1]
  assert (last['labels'][1:] == -1).all() and not last['tokens'][1:].any() and not last['segment_ids'][1:].any()


@pytest.mark.parametrize(('threads', 'prefetch'), [(0, 0), (1, 1), (2, 8), (8, 2)])
def test_resuming_at_any_step_gives_the_same_batches_with_any_number_of_threads(opened, stream, threads, prefetch):
  rows = np.arange(8)
  calls = [(step, 1) for step in range(60)]
  undisturbed = list(stream.iterate(calls, 1, rows, threads=1, prefetch=1))
  for start in (0, 1, 29, 59):
    fresh = BatchStream(Windows(TokenStore.open(opened.folder), 64), 8, seed=5)
    resumed = list(fresh.iterate(calls[start:], 1, rows, threads, prefetch))
    assert len(resumed) == 60 - start
    for a, b in zip(undisturbed[start:], resumed, strict=True):
      assert_same(a, b)


def test_no_calls_give_nothing_and_a_call_that_does_not_fit_is_refused(stream):
  assert list(stream.iterate([], 1, [0], 1, 1)) == []
  for call in [(0, 3), (0, 0)]:
    with pytest.raises(ValueError, match='at most 2 fit'):
      list(stream.iterate([call], 2, [0], 1, 1))


def test_an_iterator_that_is_dropped_ends_its_threads(stream):
  before = threading.active_count()
  for _ in range(5):
    iterator = stream.iterate([(step, 1) for step in range(1000)], 1, range(8), threads=2, prefetch=4)
    next(iterator)
    del iterator
  assert threading.active_count() <= before + 8


def test_damage_found_while_reading_ahead_is_raised_where_it_is_reached(folder, monkeypatch):
  made = make_store(folder / 'damaged', [8192 * 20])
  path = made.folder / 'tokens.array_record'
  data = bytearray(path.read_bytes())
  data[8192 * 2 * 10] ^= 1
  path.write_bytes(data)
  monkeypatch.setattr(store_module, 'HASH_AT_OPEN', 0)
  stream = BatchStream(Windows(TokenStore.open(made.folder), 512), 8, seed=0)
  with pytest.raises(StoreDamaged, match='delete its folder'):
    list(stream.iterate([(step, 1) for step in range(50)], 1, range(8), threads=2, prefetch=4))


def test_the_fingerprint_changes_with_all_that_changes_a_batch(opened, folder):
  def fingerprint(store=opened, seq_len=64, batch_size=8, seed=5, **changes):
    return BatchStream(Windows(store, seq_len, **changes), batch_size, seed).fingerprint

  other = make_store(folder / 'other', [30 + (i * 37) % 200 for i in range(150)], seed=1)
  prints = [
    fingerprint(),
    fingerprint(seq_len=32),
    fingerprint(batch_size=4),
    fingerprint(seed=6),
    fingerprint(store=other),
    fingerprint(slice=(0.0, 0.5)),
    fingerprint(distinct_tokens=1000),
    fingerprint(distinct_tokens=1001),  # as many windows in the same order
    fingerprint(distinct_tokens=1000, slice=(0.5, 1.0)),
    fingerprint(mask_documents=False),
  ]
  assert len(set(prints)) == len(prints)
  assert fingerprint(store=TokenStore.open(opened.folder)) == prints[0]


def test_the_fingerprint_notices_a_library_that_shuffles_differently(stream, monkeypatch):
  indices = BatchStream.indices
  expected = stream.fingerprint
  assert BatchStream(stream.windows, 8, 5).fingerprint == expected
  monkeypatch.setattr(BatchStream, 'indices', lambda self, step: indices(self, step)[:: -1 if step == 70 else 1])
  assert BatchStream(stream.windows, 8, 5).fingerprint != expected


@pytest.fixture(scope='module')
def mesh():
  devices = jax.devices('cpu')
  assert len(devices) >= 8, 'needs XLA_FLAGS=--xla_force_host_platform_device_count=8 before JAX starts'
  axis_types = (jax.sharding.AxisType.Auto,) * 3
  return jax.make_mesh((2, 2, 2), ('replica', 'fsdp', 'tensor'), axis_types=axis_types, devices=devices[:8])


class ProcessSharding:
  """What a process that holds only some of the devices sees of a sharding."""

  def __init__(self, sharding, devices):
    self.num_devices = sharding.num_devices
    self._sharding, self._devices = sharding, devices

  def addressable_devices_indices_map(self, shape):
    found = self._sharding.addressable_devices_indices_map(shape)
    return {device: found[device] for device in self._devices}


@pytest.mark.parametrize('axes', [('replica', 'fsdp'), ('fsdp', 'replica'), 'fsdp', 'tensor', None])
def test_a_process_reads_each_of_its_rows_once_and_all_processes_read_all(mesh, axes):
  sharding = NamedSharding(mesh, PartitionSpec(axes))
  np.testing.assert_array_equal(local_rows(sharding, 16), np.arange(16))
  processes = [list(mesh.devices.flat[i : i + 2]) for i in range(0, 8, 2)]
  rows = [local_rows(ProcessSharding(sharding, devices), 16) for devices in processes]
  assert all(len(np.unique(r)) == len(r) and (np.diff(r) > 0).all() for r in rows)
  assert set(np.concatenate(rows)) == set(range(16))
  if axes == ('replica', 'fsdp'):  # devices along `tensor` hold the same rows
    np.testing.assert_array_equal(np.concatenate(rows), np.arange(16))


def test_a_sharded_time_axis_does_not_change_the_rows(mesh):
  sharding = NamedSharding(mesh, PartitionSpec('replica', ('fsdp', 'tensor')))
  devices = list(mesh.devices.flat[:4])
  np.testing.assert_array_equal(local_rows(ProcessSharding(sharding, devices), 16), np.arange(8))


@pytest.mark.parametrize(
  'spec', [(None, ('replica', 'fsdp')), (None, ('fsdp', 'tensor'), 'replica'), (None, 'tensor', None), (None,)]
)
def test_the_global_array_is_the_batch_on_any_sharding(stream, mesh, spec):
  sharding = NamedSharding(mesh, PartitionSpec(*spec))
  rows = local_rows(NamedSharding(mesh, PartitionSpec(*spec[1:])), 8)
  (item,) = stream.iterate([(4, 2)], 2, rows, 1, 1)
  batch = to_global(item, rows, sharding, 8)
  assert sorted(batch) == NAMES
  for name in NAMES:
    assert batch[name].shape == (2, 8, 64) and batch[name].sharding == sharding
    expected = np.stack([stream.rows(step, range(8))[name] for step in (4, 5)])
    np.testing.assert_array_equal(np.asarray(batch[name]), expected)


def test_rows_that_were_not_read_are_never_made_up(stream, mesh):
  rows = np.array([0, 1, 2, 4, 5, 6, 7])
  (item,) = stream.iterate([(0, 1)], 1, rows, 1, 1)
  with pytest.raises(ValueError, match='are wanted here'):
    to_global(item, rows, NamedSharding(mesh, PartitionSpec(None, ('replica', 'fsdp'))), 8)
