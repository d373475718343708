"""Invalid arguments raise an error of one clear line. Invalid values known only on the device make the loss NaN, never a plausible number."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.config import LossConfig
from kdjax.errors import ConfigError, UserError
from kdjax.losses import (
  LogitTargets,
  ModelTargets,
  Student,
  UnigramTargets,
  dense_loss,
  fused_loss,
  fused_losses,
  token_losses,
)
from tests.losses import reference

B, T, D, V = 2, 3, 8, 24
X, W, XT, WT, LABELS = reference.problem(B, T, D, 12, V)
WEIGHTS = jnp.full((B, T), 1 / 6)
TEACHER = XT @ WT
GOOD = {
  'dense': {
    'student': X @ W,
    'labels': LABELS,
    'weights': WEIGHTS,
    'alpha': 0.4,
    'teacher': TEACHER,
    'loss': LossConfig(),
  },
  'fused': {
    'x': X,
    'w': W,
    'labels': LABELS,
    'weights': WEIGHTS,
    'alpha': 0.4,
    'targets': ModelTargets(XT, WT),
    'loss': LossConfig(),
  },
}


def dense(student, labels, weights, alpha, teacher, loss):
  return dense_loss(student, labels, weights, alpha, teacher, loss=loss)[0]


def fused(x, w, labels, weights, alpha, targets, loss, **settings):
  return fused_loss(x, w, labels, weights, alpha, targets, loss=loss, **settings)[0]


def cohort(x, w, labels, weights, alpha, targets, loss, **settings):
  students = [Student(x, w, alpha, 0), Student(X, W)]
  return fused_losses(students, labels, weights, [targets], loss=loss, **settings)[0][0]


def tokens(x, w, labels, weights, alpha, targets, loss, **settings):
  return token_losses(x, w, labels, (1.0,), targets, loss=loss, **settings)['kd'].sum()


CALLS = {'dense': dense, 'fused': fused, 'cohort': cohort, 'tokens': tokens}


def refuse(call: str, **changes) -> str:
  good = GOOD['dense' if call == 'dense' else 'fused'] | changes
  with pytest.raises(UserError) as e:
    CALLS[call](**good)
  message = str(e.value)
  assert '\n' not in message
  return message


@pytest.mark.parametrize('call', CALLS)
def test_good_arguments_are_taken(call):
  assert np.isfinite(CALLS[call](**GOOD['dense' if call == 'dense' else 'fused']))


# Settings.


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'divergence': 'reverse_kl'}, "LossConfig.divergence: unknown value 'reverse_kl'; known: forward_kl, hard_label"),
    ({'divergence': None}, 'LossConfig.divergence: unknown value None'),
    ({'mixing': 'sum'}, "LossConfig.mixing: unknown value 'sum'; known: normalised"),
    ({'rest': 'drop'}, "LossConfig.rest: unknown value 'drop'; known: renormalise, other"),
    ({'temperature': 0}, 'LossConfig.temperature: must be above 0, got 0'),
    ({'temperature': -2.0}, 'LossConfig.temperature: must be above 0, got -2'),
    ({'temperature': float('nan')}, 'LossConfig.temperature: expected a number, got nan'),
    ({'temperature': float('inf')}, 'LossConfig.temperature: expected a number, got inf'),
    ({'temperature': '2'}, "LossConfig.temperature: expected a number, got '2'"),
    ({'temperature': True}, 'LossConfig.temperature: expected a number, got True'),
    ({'temperature': jnp.ones(())}, 'LossConfig.temperature: expected a number, got Array(1'),
    ({'teacher_top_k': 2.5}, 'LossConfig.teacher_top_k: must be 0 (all), a share in (0, 1) or a whole number, got 2.5'),
    ({'teacher_top_k': -3}, 'LossConfig.teacher_top_k: must be 0'),
    ({'teacher_top_p': 0.0}, 'LossConfig.teacher_top_p: must be in (0, 1], got 0'),
    ({'teacher_top_p': 90}, 'LossConfig.teacher_top_p: must be in (0, 1], got 90'),
    ({'z_loss': -1e-4}, 'LossConfig.z_loss: must be at least 0, got -0.0001'),
    ({'chunk_tokens': -1}, 'LossConfig.chunk_tokens: must be at least 0'),
    ({'chunk_tokens': 1.5}, 'LossConfig.chunk_tokens: expected a whole number, got 1.5'),
    (
      {'divergence': 'hard_label', 'temperature': 2.0},
      'LossConfig.divergence: hard_label has no temperature, top-k or top-p',
    ),
  ],
  ids=str,
)
def test_a_loss_config_is_checked_when_it_is_built(fields, message):
  with pytest.raises(ConfigError) as e:
    LossConfig(**fields)
  assert message in str(e.value)
  with pytest.raises(ConfigError):
    dataclasses.replace(LossConfig(), **fields)


def test_a_loss_config_names_all_its_mistakes_and_takes_whole_numbers():
  with pytest.raises(ConfigError) as e:
    LossConfig(divergence='x', mixing='y', temperature=0, teacher_top_k=2.5, z_loss=-1)
  assert len(e.value.problems) == 5
  assert LossConfig(temperature=2, teacher_top_k=3, teacher_top_p=1, z_loss=0) == LossConfig(
    2 and 'forward_kl', 2.0, teacher_top_k=3.0
  )


@pytest.mark.parametrize('call', CALLS)
def test_settings_of_another_type_are_refused(call):
  assert refuse(call, loss='forward_kl') == "loss: expected a LossConfig, got 'forward_kl'"
  assert refuse(call, loss={'temperature': 2.0}) == 'loss: expected a LossConfig, got a dict'


@pytest.mark.parametrize('call', ['fused', 'cohort', 'tokens'])
@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    ({'chunk': 0}, 'chunk: must be a whole number above 0, or None, got 0'),
    ({'chunk': 2.5}, 'chunk: must be a whole number'),
    ({'vocab_size': -1}, 'vocab_size: must be a whole number'),
    ({'vocab_size': V + 1}, f'the vocabulary has {V + 1} tokens but the head only {V} columns'),
  ],
  ids=str,
)
def test_a_chunk_or_a_vocabulary_that_is_none_is_refused(call, settings, message):
  assert message in refuse(call, **settings)


# Arrays.


@pytest.mark.parametrize('call', CALLS)
@pytest.mark.parametrize(
  ('labels', 'message'),
  [
    (LABELS[0], 'labels_BxT: expected an array [B, T], got an array of int32[3]'),
    (jax.nn.one_hot(LABELS, V), f'labels_BxT: expected an array [B, T], got an array of float32[2, 3, {V}]'),
    (LABELS.astype(jnp.float32), 'labels_BxT: expected integers, got float32'),
    (LABELS[:, :2], 'labels_BxT: its T is 2, but that of '),
    (LABELS.T, 'labels_BxT: its B is 3, but that of '),
    ([[1, 2, 3]], 'labels_BxT: expected an array [B, T], got a list'),
    (None, 'labels_BxT: expected an array [B, T], got None'),
  ],
  ids=str,
)
def test_labels_of_another_shape_or_dtype_are_refused(call, labels, message):
  assert message in refuse(call, labels=labels)


@pytest.mark.parametrize('call', ['dense', 'fused', 'cohort'])
@pytest.mark.parametrize(
  ('weights', 'message'),
  [
    (WEIGHTS.ravel(), 'weights_BxT: expected an array [B, T], got an array of float32[6]'),
    (WEIGHTS[..., None], 'weights_BxT: expected an array [B, T]'),
    (WEIGHTS[:1], 'weights_BxT: its B is 1, but that of '),
    (1 / 6, 'weights_BxT: expected an array [B, T], got 0.16'),
    (WEIGHTS.astype(jnp.complex64), 'weights_BxT: expected numbers, got complex64'),
  ],
  ids=str,
)
def test_weights_of_another_shape_or_dtype_are_refused(call, weights, message):
  assert message in refuse(call, weights=weights)


@pytest.mark.parametrize('call', ['dense', 'fused', 'cohort'])
@pytest.mark.parametrize('alpha', [jnp.full(2, 0.4), [0.4], '0.4', None, 1.5, -0.1, float('nan')], ids=str)
def test_an_alpha_that_is_no_share_is_refused(call, alpha):
  assert 'alpha: ' in refuse(call, alpha=alpha)


def test_an_alpha_above_1_is_for_the_mixing_that_adds():
  loss = LossConfig(mixing='ce_plus_alpha_kd')
  assert fused(**GOOD['fused'] | {'alpha': 2.0, 'loss': loss}) > fused(**GOOD['fused'] | {'alpha': 1.0, 'loss': loss})
  assert refuse('fused', alpha=-1.0, loss=loss) == 'alpha: must be at least 0, got -1'


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'student': (X @ W)[0]}, f'student_BxTxV: expected an array [B, T, V], got an array of float32[3, {V}]'),
    ({'student': LABELS}, 'student_BxTxV: expected an array [B, T, V], got an array of int32[2, 3]'),
    ({'student': (X @ W).astype(int)}, 'student_BxTxV: expected floating-point numbers, got int32'),
    ({'teacher': TEACHER[..., :20]}, f'teacher_BxTxV: its V is 20, but that of student_BxTxV is {V}'),
    ({'teacher': TEACHER[:1]}, 'teacher_BxTxV: its B is 1, but that of student_BxTxV is 2'),
    ({'teacher': TEACHER[0]}, 'teacher_BxTxV: expected an array [B, T, V]'),
    ({'teacher': LogitTargets(TEACHER)}, 'teacher_BxTxV: expected an array [B, T, V], got a LogitTargets'),
  ],
  ids=lambda x: x if isinstance(x, str) else '',
)
def test_logits_that_do_not_fit_are_refused(changes, message):
  assert message in refuse('dense', **changes)


@pytest.mark.parametrize('call', ['fused', 'cohort', 'tokens'])
@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'x': X.reshape(-1, D)}, 'hidden_BxTxD: expected an array [B, T, D], got an array of float32[6, 8]'),
    ({'x': LABELS}, 'hidden_BxTxD: expected an array [B, T, D], got an array of int32[2, 3]'),
    ({'w': W.T}, f'head_DxV: its D is {V}, but that of '),
    ({'w': W[None]}, 'head_DxV: expected an array [D, V]'),
    ({'w': W.astype(jnp.int8)}, 'head_DxV: expected floating-point numbers, got int8'),
    ({'targets': TEACHER}, f'expected Targets, got an array of float32[2, 3, {V}]; wrap logits as LogitTargets(logits)'),
    ({'targets': (XT, WT)}, 'expected Targets, got a tuple; wrap logits as LogitTargets(logits), a model as ModelTargets'),
    ({'targets': LogitTargets}, 'expected Targets'),
    ({'targets': LogitTargets(TEACHER[0])}, '.logits_BxTxV: expected an array [B, T, V], got an array of float32[3, '),
    ({'targets': LogitTargets(TEACHER[:, :2])}, '.logits_BxTxV: its T is 2, but that of '),
    ({'targets': LogitTargets([1.0])}, '.logits_BxTxV: expected an array [B, T, V], got a list'),
    ({'targets': ModelTargets(XT[0], WT)}, '.hidden_BxTxD: expected an array [B, T, D]'),
    ({'targets': ModelTargets(XT, WT.T)}, f'.head_DxV: its D is {V}, but that of targets.hidden_BxTxD is 12'),
    ({'targets': ModelTargets(XT[:1], WT)}, '.hidden_BxTxD: its B is 1, but that of '),
    ({'targets': UnigramTargets(TEACHER)}, '.log_probs_V: expected an array [V]'),
  ],
  ids=lambda x: x if isinstance(x, str) else '',
)  # fmt: skip
def test_models_and_targets_that_do_not_fit_are_refused(call, changes, message):
  assert message in refuse(call, **changes)


@pytest.mark.parametrize(
  ('students', 'targets', 'message'),
  [
    ([], [], 'students: at least one is needed'),
    (Student(X, W), [], 'students[0]: expected a Student(hidden, head), got an array'),
    ([(X, W)], [], 'students[0]: expected a Student(hidden, head), got a tuple'),
    ([Student(X, W, 0.4, 0)], [], 'target: must be an index of the 0 targets, got 0'),
    ([Student(X, W, 0.4, 0)], ModelTargets(XT, WT), 'targets: expected a list, got a ModelTargets'),
    ([Student(X, W), Student(X, W[:, :20])], [], 'students[1].head_DxV: its V is 20, but that of students[0].head_DxV'),
    ([Student(X, W), Student(X[:, :2], W)], [], 'students[1].hidden_BxTxD: its T is 2'),
  ],
  ids=lambda x: x if isinstance(x, str) else '',
)  # fmt: skip
def test_a_cohort_that_does_not_fit_is_refused(students, targets, message):
  with pytest.raises(UserError) as e:
    fused_losses(students, LABELS, WEIGHTS, targets)
  assert message in str(e.value)


@pytest.mark.parametrize(('temperatures', 'message'), [((0.0, 1.0), 'above 0'), ((-1.0,), 'above 0'), (1.0, 'expected an array [K]'), (jnp.ones((1, 2)), 'expected an array [K]')], ids=str)  # fmt: skip
def test_evaluation_temperatures_that_are_none_are_refused(temperatures, message):
  with pytest.raises(UserError, match='temperatures_K: ') as e:
    token_losses(X, W, LABELS, temperatures)
  assert message in str(e.value)


# Values of labels.


@pytest.mark.parametrize('label', [-100, -1, V, 2**31 - 1])
@pytest.mark.parametrize('call', ['dense', 'fused', 'cohort'])
def test_a_label_that_is_no_token_is_refused_where_its_token_counts(call, label):
  message = refuse(call, labels=LABELS.at[1, 2].set(label))
  assert message == (
    f'labels_BxT: 1 of 6 are outside the vocabulary of {V} tokens, first {label} at [1, 2]; '
    'give a token without a label the weight 0'
  )
  good = GOOD['dense' if call == 'dense' else 'fused'] | {'labels': LABELS.at[1, 2].set(label)}
  assert np.isfinite(CALLS[call](**good | {'weights': WEIGHTS.at[1, 2].set(0)}))
  with pytest.raises(UserError):  # labels are known while a gradient is traced
    jax.grad(lambda x: CALLS[call](**good | {'student' if call == 'dense' else 'x': x}))(
      X @ W if call == 'dense' else X
    )


def test_a_label_of_the_vocabularys_padding_is_refused():
  assert 'vocabulary of 20 tokens' in refuse('fused', labels=LABELS.at[0, 0].set(20), vocab_size=20)
  assert 'vocabulary of 20 tokens' in refuse('tokens', labels=LABELS.at[0, 0].set(20), vocab_size=20)


def test_an_evaluation_takes_padding_but_no_label_beyond_the_vocabulary():
  padded = LABELS.at[0, 0].set(-100)
  reference.assert_same_bits(token_losses(X, W, padded)['ce'][0, 1:], token_losses(X, W, LABELS)['ce'][0, 1:])
  assert 'a label below 0 marks padding' in refuse('tokens', labels=LABELS.at[0, 0].set(V))


@pytest.mark.parametrize('label', [-100, V, 2**31 - 1])
def test_in_a_compiled_function_such_a_label_makes_loss_and_gradient_nan(label):
  """The result is never a plausible number: the training step skips updates that are not finite, and stops a run with many of them."""
  wrong = LABELS.at[1, 2].set(label)
  for weights, finite in ((WEIGHTS, False), (WEIGHTS.at[1, 2].set(0), True)):
    results = [
      jax.jit(jax.value_and_grad(lambda x, y, w: dense(x @ W, y, w, 0.4, TEACHER, LossConfig())))(X, wrong, weights),
      jax.jit(jax.value_and_grad(lambda x, y, w: fused(x, W, y, w, 0.4, LogitTargets(TEACHER), LossConfig())))(
        X, wrong, weights
      ),
    ]
    for value, grad in results:
      assert np.isfinite(value) == finite and np.isfinite(grad).all() == finite
  values = jax.jit(lambda y: token_losses(X, W, y, (1.0, 2.0)))(LABELS.at[1, 2].set(V))
  for name in ('ce', 'nll_at'):
    assert np.isnan(values[name][1, 2]).all() and np.isfinite(values[name][0]).all()


@pytest.mark.parametrize('dtype', [jnp.int8, jnp.uint8, jnp.int16, np.int64])
def test_labels_may_be_integers_of_any_width(dtype):
  arrays = reference.problem(1, 4, 4, 4, 512)
  narrow = np.asarray(arrays[4] % 100, dtype)
  weights = jnp.full((1, 4), 0.25)
  for f in (
    lambda y: fused_loss(arrays[0], arrays[1], y, weights)[0],
    lambda y: dense_loss(arrays[0] @ arrays[1], y, weights)[0],
  ):
    assert f(narrow) == f(narrow.astype(np.int32))


def test_a_mask_may_be_the_weights():
  mask = np.asarray([[True, False, True]] * B)
  for call in ('dense', 'fused'):
    as_is, as_floats = (CALLS[call](**GOOD[call] | {'weights': w}) for w in (mask, mask.astype(np.float32)))
    assert as_is == as_floats
