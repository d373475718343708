"""A finished grid's two tables, made up: 4 teachers x 2 budgets x 4 alphas, validated alphas, every control; the same on every call."""

import zlib

import numpy as np
import pandas as pd
from scipy import stats

PARAMS = {'tiny-0.1m': 98_304, 'tiny-0.3m': 331_776, 'tiny-1m': 1_048_576, 'tiny-3m': 2_949_120}
BUDGETS = (102_400, 512_000)
ALPHAS = (0.2, 0.4, 0.6, 0.8)
OOD = ('dialogue', 'reference', 'code')
TASK = 'minimal pairs'
OOD_MEAN = 'OOD mean'
BASE = {'in-domain': 1.71, 'dialogue': 2.43, 'reference': 2.61, 'code': 4.18}  # bits per byte of the LM-only student
DOCUMENTS = {'in-domain': 96, 'dialogue': 120, 'reference': 120, 'code': 60, TASK: 400, OOD_MEAN: 300}
DIFFICULTY = tuple(f'difficulty_{i}' for i in range(1, 6))
SCENARIOS = ('logits', 'logits+pretraining')
SETTINGS = (('tiny-0.3m', 512_000, 0), ('tiny-1m', 512_000, 120_000))
SCALE = {'in-domain': 1.0, 'dialogue': 3.0, 'reference': 2.2, 'code': 7.0}  # gains out of domain are larger
PRIMARY = ('weak_helps', 'size_reverses', 'ood_more', 'more_than_calibration')
QUESTIONS = {
  'weak_helps': 'Does a weak teacher help?',
  'size_reverses': 'Does more teacher size saturate or reverse the gain?',
  'budget_reverses': 'Does more teacher budget saturate or reverse the gain?',
  'ood_more': 'Does distillation help out of domain more than in domain?',
  'reversal_at_equal_flops': 'Is the largest teacher worse at equal total FLOPs?',
  'more_than_calibration': 'Is the OOD gain of a weak teacher more than calibration?',
  'beats_tuned': 'Does a weak teacher beat a tuned baseline?',
}


def tables(n_settings: int = 1) -> tuple[pd.DataFrame, pd.DataFrame]:
  """(effects, contrasts) of one or two student settings."""
  effects = [row for setting in SETTINGS[:n_settings] for arm in _arms(setting) for row in _rows(arm)]
  contrasts = [row for setting in SETTINGS[:n_settings] for row in _contrasts(setting)]
  return pd.DataFrame(effects), pd.DataFrame(contrasts)


def _arms(setting):
  """Every arm's identity, with `gain` (bits per byte in-domain) and `calibration` (of the OOD gain, what a fitted temperature takes)."""
  best = {}
  for teacher, tokens in _sources():
    strength = np.log10(PARAMS[teacher] / PARAMS[setting[0]]) + 0.7 * np.log10(tokens / 512_000)
    best[teacher, tokens] = ALPHAS[int(np.clip(round(1.6 + 1.4 * strength), 0, 3))]
    for alpha in ALPHAS:
      yield _arm(setting, 'distilled', alpha, _gain(strength, alpha), 0.5, teacher, tokens)
    yield _arm(
      setting,
      'distilled',
      best[teacher, tokens],
      _gain(strength, best[teacher, tokens]),
      0.5,
      teacher,
      tokens,
      validated=True,
    )
  for alpha in ALPHAS:
    yield _arm(setting, 'unigram', alpha, 0.03 + 0.1 * alpha, 0.8)
  yield _arm(setting, 'unigram', ALPHAS[0], 0.03 + 0.1 * ALPHAS[0], 0.8, validated=True)
  yield _arm(setting, 'tuned', 0.0, -0.011, 0.9, validated=True)
  for (teacher, tokens), alpha in best.items():
    strength = np.log10(PARAMS[teacher] / PARAMS[setting[0]]) + 0.7 * np.log10(tokens / 512_000)
    for scenario in SCENARIOS:
      share = _flops(setting, teacher, tokens, scenario) / _student_flops(setting)
      bought = -0.05 * np.log2(1 + share)
      yield _arm(
        setting, 'flop_matched', 0.0, bought, 0.1, teacher, tokens, validated=True, scenario=scenario, share=share
      )
      gain = _gain(strength, alpha) - bought
      yield _arm(setting, 'distilled', alpha, gain, 0.5, teacher, tokens, validated=True, scenario=scenario)


def _sources():
  return [(teacher, tokens) for teacher in PARAMS for tokens in BUDGETS]


def _gain(strength: float, alpha: float) -> float:
  """A parabola in alpha whose best place rises with the teacher's strength, and whose depth reverses for the strongest."""
  depth = 0.05 * np.exp(-((strength - 0.4) ** 2))
  place = 0.45 + 0.25 * strength
  return float(depth * (((alpha - place) / 0.4) ** 2 - 1))


def _arm(setting, kind, alpha, gain, calibration, teacher='', tokens=0, validated=False, scenario='', share=0.0):
  seeds = (46, 47, 48, 49, 50) if validated else (43, 44, 45)
  name = f'{setting[0]}-512k_{teacher or "lm"}-{tokens // 1000}k_a{alpha:g}'
  identity = {
    'student': setting[0], 'student_tokens': setting[1], 'distinct_tokens': setting[2],
    'teacher': teacher, 'teacher_tokens': tokens, 'budget': 'annealed' if teacher else '', 'teacher_data': 'iso' if teacher else '',
    'temperature': 1.0, 'top_k': 0.0, 'mixing': 'normalised', 'alpha': alpha, 'arm': kind, 'scenario': scenario,
    'draw': 'stop0.75-lr1-wd5' if kind == 'tuned' else '', 'validated': validated, 'seeds': ' '.join(map(str, seeds)),
    'cells': ' '.join(f'{name}_s{seed}-{zlib.crc32(f"{name}{kind}{scenario}{seed}".encode()):08x}' for seed in seeds),
    'student_params': float(PARAMS[setting[0]]), 'teacher_params': float(PARAMS[teacher]) if teacher else np.nan,
    'student_flops': _student_flops(setting) * (1 + share),
    'logits_flops': _flops(setting, teacher, tokens, 'logits') if kind == 'distilled' else 0.0,
    'pretraining_flops': _flops(setting, teacher, tokens, 'pretraining') if kind == 'distilled' else 0.0,
  }  # fmt: skip
  return identity, gain, calibration, len(seeds)


def _student_flops(setting) -> float:
  return 6.0 * 1.2 * PARAMS[setting[0]] * setting[1]


def _flops(setting, teacher: str, tokens: int, scenario: str) -> float:
  logits, pretraining = 2.0 * 1.2 * PARAMS[teacher] * setting[1], 6.0 * 1.2 * PARAMS[teacher] * tokens
  return logits * ('logits' in scenario) + pretraining * ('pretraining' in scenario)


def _rows(arm):
  identity, gain, calibration, n_seeds = arm
  kinds = {'in-domain': 'in-domain', **dict.fromkeys(OOD, 'OOD')}
  rng = np.random.default_rng(zlib.crc32(repr(sorted(identity.items(), key=lambda item: item[0])).encode()))
  out = []
  for measure in ('bits_per_byte', 'bits_per_byte_fitted', 'entropy', 'top1', 'ece', *DIFFICULTY):
    found = {}
    for name, kind in kinds.items():
      effect = _true(measure, name, gain, calibration, identity)
      error = {'bits_per_byte': 0.008, 'bits_per_byte_fitted': 0.008, 'entropy': 0.02, 'top1': 0.004, 'ece': 0.003}.get(
        measure, 0.012
      )
      error *= SCALE[name] ** 0.7 * rng.uniform(0.7, 1.3)
      found[name] = (effect + error * rng.normal(), error)
      out.append(_row(identity, measure, name, kind, *found[name], n_seeds))
    if measure != 'ece':
      mean = np.mean([found[name][0] for name in OOD]), np.linalg.norm([found[name][1] for name in OOD]) / len(OOD)
      out.append(_row(identity, measure, OOD_MEAN, OOD_MEAN, *mean, n_seeds))
  for measure in ('accuracy', 'accuracy_norm'):
    estimate = -0.4 * gain + 0.012 * rng.normal()
    out.append(_row(identity, measure, TASK, 'downstream', estimate, 0.012 * rng.uniform(0.8, 1.2), n_seeds))
  return out


def _true(measure: str, name: str, gain: float, calibration: float, identity) -> float:
  likelihood = (
    gain * SCALE[name] if name == 'in-domain' else -0.04 * SCALE[name] * calibration + gain * SCALE[name] * 0.6
  )
  return {
    'bits_per_byte': likelihood,
    'bits_per_byte_fitted': likelihood if name == 'in-domain' else likelihood + 0.04 * SCALE[name] * calibration,
    'entropy': 0.35 * identity['alpha'] * SCALE[name] ** 0.3 - 0.3 * gain,
    'top1': -0.1 * gain,
    'ece': -0.02 * calibration,
    **{name: likelihood * (0.4 + 0.5 * i) for i, name in enumerate(DIFFICULTY)},
  }[measure]


def _row(identity, measure, name, kind, estimate, error, n_seeds):
  df = n_seeds + 4.7
  half = stats.t.ppf(0.975, df) * error
  baseline = {'entropy': 3.1, 'top1': 0.41, 'ece': 0.03, 'accuracy': 0.62, 'accuracy_norm': 0.6}.get(measure)
  if baseline is None:
    baseline = np.mean([BASE[each] for each in OOD]) if name == OOD_MEAN else BASE[name]
  return identity | {
    'set': name, 'group': kind, 'measure': measure, 'estimate': estimate, 'low': estimate - half, 'high': estimate + half,
    'error': error, 'df': df, 'n_seeds': n_seeds, 'n_documents': 0 if measure == 'ece' else DOCUMENTS[name],
    'over': 'seeds' if measure == 'ece' else 'seeds and documents', 'p': 2 * stats.t.sf(abs(estimate) / error, df),
    'value': baseline + estimate, 'baseline': baseline,
  }  # fmt: skip


def _contrasts(setting):
  rng = np.random.default_rng(len(setting[0]) + setting[2])
  for contrast, question in QUESTIONS.items():
    sets = {'ood_more': ('OOD mean less in-domain',), 'more_than_calibration': (OOD_MEAN,)}.get(
      contrast, ('in-domain', OOD_MEAN)
    )
    for name in sets:
      place = {
        'contrast': contrast,
        'question': question,
        'student': setting[0],
        'student_tokens': setting[1],
        'distinct_tokens': setting[2],
      }
      primary = contrast in PRIMARY and (name != OOD_MEAN or contrast == 'more_than_calibration')
      yield (
        place
        | {'detail': '', 'validated': True, 'set': name, 'primary': primary}
        | _tested(contrast, name, primary, rng)
      )
    if contrast == 'weak_helps':
      detail = {'detail': 'tiny-0.1m-512k', 'validated': True, 'set': 'in-domain', 'primary': False}
      yield place | detail | _tested(contrast, 'in-domain', False, rng)


def _tested(contrast: str, name: str, primary: bool, rng) -> dict[str, object]:
  if contrast == 'budget_reverses' and name == OOD_MEAN:
    numbers = ('estimate', 'low', 'high', 'error', 'df', 'p', 'level', 'p_adjusted', 'mde', 'mde_low', 'mde_high')
    words = {'left': '', 'right': '', 'over': '', 'verdict': 'not tested', 'unit': '', 'cells': ''}
    answer = {'n_seeds': 0, 'n_documents': 0, 'answer': 'not tested: the teacher of 512k tokens has not been run'}
    return dict.fromkeys(numbers, np.nan) | words | answer
  error, level = 0.01 if name == 'in-domain' else 0.03, 1 - 0.05 / len(PRIMARY) if primary else 0.95
  estimate = error * rng.normal(-2, 2)
  half, p = stats.t.ppf((1 + level) / 2, 6) * error, 2 * stats.t.sf(abs(estimate) / error, 6)
  verdict = (
    'exploratory' if not primary else 'unresolved' if abs(estimate) < half else 'better' if estimate < 0 else 'worse'
  )
  return {
    'left': 'tiny-0.1m-102k, tiny-0.1m-512k', 'right': 'LM-only, equal student tokens', 'estimate': estimate, 'low': estimate - half,
    'high': estimate + half, 'error': error, 'df': 6.0, 'p': p, 'level': level, 'p_adjusted': min(1.0, 4 * p) if primary else np.nan,
    'mde': 3.1 * error, 'mde_low': 2.1 * error, 'mde_high': 6.4 * error, 'n_seeds': 5,
    'n_documents': DOCUMENTS.get(name, 396), 'over': 'seeds and documents', 'verdict': verdict, 'unit': 'bits per byte',
    'cells': 'tiny-0.3m-512k_tiny-0.1m-102k_a0.2_s46-0a1b2c3d', 'answer': f'{contrast}, {name}: {verdict}',
  }  # fmt: skip
