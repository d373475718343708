"""The whole step compiled by the real TPU compiler for slices that are not here; and what the command says and refuses."""

import importlib.util
import json

import jax
import jax.numpy as jnp
import pytest

from kdjax import aot, cli
from kdjax.errors import UserError
from kdjax.programs import compiling, topology
from kdjax.programs.compiling import GIB, Report
from kdjax.programs.hlo import SLICES, Collective
from kdjax.trainer import step

CONFIG = 'configs/weak2strong.py:scale=colab'
VOCAB = 32_768
SMALL = {  # two models of the colab scale, their layers in a loop as at paper scale: half a minute on two cores
  'student.arms': 'distilled',
  'student.batch_size': '32',
  'student.model.scan_unroll': '1',
  'teacher.model.scan_unroll': '1',
  'data.seq_len': '1024',
  'steps_per_call': '1',
  'loss.chunk_tokens': '512',
}

needs_compiler = pytest.mark.skipif(
  importlib.util.find_spec('libtpu') is None, reason="no TPU compiler here: pip install -e '.[tpu]'"
)


def config(**changes: str):
  return cli.load_config(CONFIG, SMALL | {name.replace('__', '.'): value for name, value in changes.items()})


def report(**changes) -> Report:
  """A report by hand: a chip of v6e among 64, whose every figure is round."""
  gather = Collective('all-gather', ('fsdp',), 'bf16[1024,1024]', 1e9, 4, 1, 'jit(run)/jvp(student)/while/dot_general')
  known = {
    'slice': topology.parse_slice('v6e-64'),
    'mesh': {'replica': 1, 'fsdp': 16, 'tensor': 4},
    'settings': {'remat': 'full', 'microbatches': 1, 'batch_size': 256, 'seq_len': 8192},
    'parameters': {'student': 1_670_000_000, 'teacher': 690_000_000},
    'students': 1,
    'tokens': 2_097_152,
    'memory': {'student weights': 1.0 * GIB, 'temporaries': 20.0 * GIB},
    'loss_bytes': 4.0 * GIB,
    'flops': {'student': 64 * 900e12, 'teacher': 64 * 90e12, 'recomputed': 64 * 10e12},
    'traffic': 1640e9 / 2,
    'collectives': [gather, gather._replace(kind='all-reduce', axes=('tensor',), bytes=1e10, times=2, source='')],
    'largest': (2 * GIB, 'bf16[16,4,8192,2048]'),
    'peak_flops': 1000e12,
    'compile_seconds': 61.0,
  }
  return Report(**(known | changes))


def test_the_roofline_is_each_resource_at_its_peak():
  r = report()
  assert r.seconds() == pytest.approx(
    {'compute': 1.0, 'hbm': 0.5, 'network (fsdp)': 4e9 / 200e9, 'network (tensor)': 2e10 / 200e9}
  )
  assert r.best_seconds == 1.0 and r.worst_seconds == pytest.approx(1.62)
  assert r.mfu(1.0) == pytest.approx(0.99)  # what remat adds is no use


def test_what_crosses_slices_goes_at_the_speed_of_the_network_between_them():
  gather = report().collectives[0]
  between = gather._replace(kind='transfer', axes=(SLICES,))
  r = report(slice=topology.parse_slice('v6e-64', 2), collectives=[between, gather._replace(axes=('replica', 'fsdp'))])
  assert r.seconds()['network (slices)'] == pytest.approx(4e9 / 12.5e9)
  assert r.seconds()['network (replica x fsdp)'] == pytest.approx(4e9 / 200e9)  # a replica axis within a slice


def test_a_network_of_no_documented_speed_is_not_counted_and_says_so():
  gather = report().collectives[0]._replace(axes=(SLICES,))
  r = report(
    slice=topology.parse_slice('v4-128', 2), mesh={'replica': 2, 'fsdp': 16, 'tensor': 4}, collectives=[gather]
  )
  assert set(r.seconds()) == {'compute', 'hbm'}
  assert 'network (slices): no documented speed, not counted' in aot.describe(r)


def test_the_report_says_whether_it_fits_and_by_how_much():
  text = aot.describe(report())
  assert 'fits: 21.00 of 31.25 GiB a chip, 10.25 GiB free' in text
  assert 'student 1.67B, teacher 690.0M' in text
  assert 'student  all-gather         over fsdp                  4 times     3.725 GiB' in text
  large = report(memory={'temporaries': 40.0 * GIB})
  assert not large.fits and 'DOES NOT FIT: 40.00 of 31.25 GiB a chip, 8.75 GiB too much' in aot.describe(large)
  assert json.loads(json.dumps(aot.figures(large)))['fits'] is False


@pytest.mark.parametrize(
  ('arguments', 'says'),
  [
    (['--topology=v9-64'], 'no such slice'),
    (['--topology=v6e-64', '--config.mesh.tensr=4'], 'mesh.tensr'),
    (['--topology=v6e-64', '--config=configs/weak.py'], 'does not exist'),
  ],
)
def test_a_mistake_is_one_line_and_code_2(capsys, arguments, says):
  with pytest.raises(SystemExit) as stopped:
    aot.main([f'--config={CONFIG}', *arguments])
  assert stopped.value.code == 2
  error = capsys.readouterr().err
  assert says in error and 'Traceback' not in error and len(error.strip().splitlines()) == 1


@pytest.fixture(scope='module')
def compiled():
  return compiling.compile_step(config(mesh__tensor='2'), topology.parse_slice('v6e:4x4'), VOCAB)


@needs_compiler
@pytest.mark.slow
def test_the_losss_loop_holds_one_small_all_gather_and_nothing_else(compiled):
  inside = [one for one in compiled.collectives if compiling.part(one) == 'loss' and one.loop]
  assert [(one.kind, one.axes) for one in inside] == [('all-gather', ('tensor',))]
  assert inside[0].array.startswith('f32[2,')
  local_tokens = compiled.tokens // 8  # fsdp 8
  assert inside[0].bytes * inside[0].times < 64 * local_tokens  # a few floats a token


@needs_compiler
@pytest.mark.slow
def test_no_array_of_tokens_by_vocabulary_is_in_the_program(compiled):
  logits = compiled.tokens // 8 * VOCAB // 2 * 2  # bytes on one chip, in bfloat16
  assert compiled.largest[0] < logits
  assert compiled.loss_bytes < 2 * logits


@needs_compiler
@pytest.mark.slow
def test_the_memory_is_the_compilers_and_its_parts_are_those_of_the_shardings(compiled):
  n = compiled.parameters
  # Norms are on every chip; all the rest is cut over 16.
  assert compiled.memory['student weights'] == pytest.approx(4 * n['student'] / 16, rel=0.02)
  assert compiled.memory['optimizer'] == pytest.approx(8 * n['student'] / 16, rel=0.02)
  assert compiled.memory['teacher weights'] == pytest.approx(2 * n['teacher'] / 16, rel=0.02)  # bfloat16
  assert compiled.memory['temporaries'] > 0 and compiled.fits
  assert {compiling.part(one) for one in compiled.collectives} >= {'teacher', 'student', 'loss'}


@needs_compiler
@pytest.mark.slow
def test_the_teachers_weights_are_gathered_once_a_microbatch(compiled):
  """A layer's seven matrices once each in the loop over its layers, the embedding and the head once."""
  layers = config().teacher.model.n_layers
  gathers = [one for one in compiled.collectives if compiling.part(one) == 'teacher' and 'fsdp' in one.axes]
  gathered = sum(one.total for one in gathers)
  weights = 2 * compiled.parameters['teacher'] / 2  # a chip's part of the tensor axis, in bfloat16
  assert layers > 1 and gathered < 1.5 * weights


def on_whole_logits(students, labels, weights, targets, *, loss, vocab_size):
  """The mixed loss as anybody would write it first, with nothing that training does not need."""
  ((student, head, alpha, _),) = students
  (teacher,) = targets
  log_p = jax.nn.log_softmax((student @ head.astype(student.dtype)).astype(jnp.float32))
  log_q = jax.nn.log_softmax((teacher.hidden_BxTxD @ teacher.head_DxV).astype(jnp.float32))
  ce = -jnp.take_along_axis(log_p, jnp.maximum(labels, 0)[..., None], axis=-1)[..., 0]
  kl = jnp.sum(jnp.exp(log_q) * (log_q - log_p), axis=-1)
  total = jnp.sum(weights * ((1 - alpha) * ce + alpha * kl))
  return [(total, {'ce': jnp.sum(weights * ce), 'kd': jnp.sum(weights * kl)})]


@needs_compiler
@pytest.mark.slow
def test_the_whole_steps_peak_is_at_most_three_quarters_of_that_with_whole_logits(monkeypatch):
  changes = {'student.arms': 'distilled', 'student.batch_size': '64', 'data.seq_len': '2048', 'mesh.tensor': '4'}
  paper = cli.load_config('configs/strong2weak.py:scale=paper', changes)  # 1.7B from 8B
  fused = compiling.compile_step(paper, topology.parse_slice('v6e:4x4'))
  monkeypatch.setattr(step, 'fused_losses', on_whole_logits)
  dense = compiling.compile_step(paper, topology.parse_slice('v6e:4x4'))
  print(f'fused {fused.bytes / GIB:.2f} GiB, whole logits {dense.bytes / GIB:.2f} GiB')
  assert fused.bytes <= 0.75 * dense.bytes


@needs_compiler
@pytest.mark.slow
def test_more_microbatches_and_remat_take_less_memory():
  plain = compiling.compile_step(config(), topology.parse_slice('v5e:4x4'), VOCAB)
  saving = compiling.compile_step(
    config(student__batch_size='64', student__microbatches='4', student__model__remat='full'),
    topology.parse_slice('v5e:4x4'),
    VOCAB,
  )
  assert saving.memory['temporaries'] < plain.memory['temporaries']
  assert saving.flops['recomputed'] > plain.flops['recomputed'] == 0


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
  ('changes', 'says'),
  [
    ({'mesh__tensor': '3'}, 'mesh: '),
    ({'mesh__fsdp': '16', 'student__batch_size': '8'}, "does not divide the student's batch_size"),
    ({'mesh__fsdp': '4', 'mesh__tensor': '2'}, 'does not divide the 16 devices'),
  ],
)
def test_a_mesh_that_does_not_fit_is_told_before_anything_is_compiled(changes, says):
  with pytest.raises(UserError, match=says):
    compiling.compile_step(config(**changes), topology.parse_slice('v6e:4x4'), VOCAB)


@needs_compiler
@pytest.mark.slow
def test_a_slice_that_the_compiler_does_not_know_is_told_in_one_line():
  with pytest.raises(UserError, match='the TPU compiler knows no v6e:3x5'):
    compiling.compile_step(config(), topology.parse_slice('v6e:3x5'), VOCAB)
