"""The studies of Lu & Liu 2026, each at the paper's scale, with a twin of the same shape for one accelerator and for a laptop."""

import dataclasses

import ml_collections

from kdjax import config as config_lib
from kdjax.config import scales
from kdjax.sweeps.config import SCENARIOS, GridConfig, HardwareConfig
from kdjax.sweeps.names import format_exact

STUDIES = (
  'main',
  'size_alpha',
  'student_size',
  'horizon',
  'teacher_budget',
  'second_family',
  'temperature',
  'top_k',
  'unnormalised',
  'mechanism',
)
# What the paper calls 0.5B, 1.7B, 3.8B and 8B, and its second family's 0.15B, 0.3B, 0.6B and 1B.
SIZES = {
  'laptop': ('tiny-0.1m', 'tiny-0.3m', 'tiny-1m', 'tiny-3m'),
  'colab': ('tiny-1m', 'tiny-3m', 'tiny-10m', 'tiny-30m'),
  'paper': ('llama3-0.5b', 'llama3-1.7b', 'llama3-3.8b', 'llama3-8b'),
}
FAMILY = {
  'laptop': ('tiny-qwen-0.1m', 'tiny-qwen-0.3m', 'tiny-qwen-1m', 'tiny-qwen-3m'),
  'colab': ('tiny-qwen-0.3m', 'tiny-qwen-1m', 'tiny-qwen-3m', 'tiny-qwen-10m'),
  'paper': ('qwen3-0.15b', 'qwen3-0.3b', 'qwen3-0.6b', 'qwen3-1b'),
}
BILLION = {
  'laptop': 10_240,
  'colab': 327_680,
  'paper': 1_000_000_000,
}  # tokens that stand for one of the paper's billions
HARDWARE = {
  'laptop': HardwareConfig(),
  'colab': HardwareConfig('A100', 1, 40.0, 0.25),
  'paper': HardwareConfig('TPU v5p', 64, 95.0, 0.4),
}
ALPHAS = (0.0, 0.2, 0.4, 0.5, 0.6, 0.8, 1.0)
SCAN = {'laptop': (43, 44, 45), 'colab': (43, 44, 45), 'paper': (43,)}  # seeds of a scan over alpha, without tests
TESTED = (
  43,
  44,
  45,
  46,
  47,
)  # seeds of tested arms without a pilot: fewer than five hardly resolve anything
FRESH = (46, 47, 48, 49, 50)  # seeds of the alphas that a pilot chose
# The best alpha of each of the four sizes in the paper's own 50B grid (Lu & Liu 2026): declared for studies without a pilot.
PUBLISHED_ALPHAS = (0.2, 0.4, 0.6, 0.6)
REVERSAL = ('weak_helps:in-domain', 'size_reverses:in-domain', 'size_reverses:OOD mean', 'ood_more')


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """The grid that `study=NAME,scale=NAME` names; by default the laptop's main one."""
  known = config_lib.parse_arg(arg, study=STUDIES, scale=scales.SCALES)
  study, scale = known['study'], known['scale']
  base = scales.base(scale)
  # The main grid holds all the controls; a study of the paper has its axes, the baseline and what the pilot needs.
  grid = GridConfig(name=study if study != 'main' else 'grid', scale=scale, study=study)
  piloted = study in ('main', 'mechanism')
  seeds = SCAN[scale] if piloted else TESTED
  grid = dataclasses.replace(grid, seed=seeds, validated_seed=FRESH if piloted else (), hardware=HARDWARE[scale])
  config = config_lib.default(grid)
  config.base = base
  for name, value in (_main(scale) if study == 'main' else _study(study, scale)).items():
    node, _, leaf = config, *name.rpartition('.')[1:]
    for part in name.split('.')[:-1]:
      node = node[part]
    with node.ignore_type():
      node[leaf] = value
  if not piloted:
    config.include = _seed_filters(config, SCAN[scale])
  if study == 'second_family' and scale == 'paper':
    for section in (config.base.teacher, config.base.student):
      section.optimizer.learning_rate = 5e-4
  return config


def _seed_filters(config: ml_collections.ConfigDict, scan: tuple[int, ...]) -> tuple[str, ...]:
  """Return filters that keep the whole product with the seeds of a scan, and the tested arms with all seeds."""
  plain = '&temperature=1&top_k=0&mixing=normalised'
  declared = zip(config.teacher, config.declared_alpha, strict=True)
  return (
    f'seed={"|".join(map(str, scan))}',
    *(f'teacher={name}&alpha={format_exact(alpha)}{plain}' for name, alpha in declared),
  )


def _main(scale: str) -> dict[str, object]:
  """Weak to strong by size and by budget, every control, five fresh seeds for the declared contrasts."""
  weak, own, strong, strongest = SIZES[scale]
  billions = lambda *n: tuple(BILLION[scale] * i for i in n)
  return {
    'student': (own,),
    'student_tokens': billions(50),
    'teacher': (weak, own, strong) if scale == 'laptop' else (weak, own, strong, strongest),
    'teacher_tokens': billions(10, 50) if scale == 'laptop' else billions(10, 50, 100),
    'alpha': (0.0, 0.2, 0.4, 0.6, 0.8),
    'pilot.alpha': tuple(i / 10 for i in range(0, 11, 2 if scale == 'laptop' else 1)),
    'controls.flop_matched': SCENARIOS if scale == 'paper' else ('logits', 'logits+pretraining'),
  }


def _study(study: str, scale: str) -> dict[str, object]:
  sizes = FAMILY[scale] if study == 'second_family' else SIZES[scale]
  billions = lambda *n: tuple(BILLION[scale] * i for i in n)
  common: dict[str, object] = {
    'student': (sizes[1],),
    'student_tokens': billions(50),
    'teacher': sizes,
    'teacher_tokens': (0,),
    'alpha': ALPHAS,
    'controls.flop_matched': (),
    'controls.tuned.enabled': False,
    'contrasts': ('weak_helps', 'size_reverses', 'ood_more', 'more_than_calibration'),
    'primary': REVERSAL,
  }
  if study != 'mechanism':  # its alphas are the pilot's; the others scan alpha themselves, as the paper does
    common |= {'pilot.skip': True, 'declared_alpha': PUBLISHED_ALPHAS}
  two = (0.0, 0.2, 1.0)
  low = {'alpha': two, 'declared_alpha': (0.2,) * 4}
  return common | {
    'size_alpha': {},
    'second_family': {},
    # Several settings are one family of tests, so only the study's own question is primary in each.
    'student_size': {'student': (sizes[0], sizes[2], sizes[3]), 'primary': ('size_reverses:in-domain',)},
    'horizon': {
      'student_tokens': billions(100, 300),
      'primary': ('size_reverses:in-domain', 'size_reverses:OOD mean'),
    },
    'teacher_budget': {
      'teacher_tokens': billions(5, 10, 30, 50, 80, 100, 300),
      'contrasts': ('weak_helps', 'size_reverses', 'budget_reverses', 'ood_more', 'more_than_calibration'),
      'primary': (*(f'{axis}_reverses:{on}' for axis in ('size', 'budget') for on in ('in-domain', 'OOD mean')),),
    },
    'temperature': low | {'temperature': (0.5, 1.0, 2.0, 4.0)},
    'top_k': low | {'top_k': (0.0, 0.01, 0.05, 0.2, 0.5)},
    'unnormalised': {
      'teacher': (sizes[1],),
      'alpha': (0.0, 0.2, 0.8, 1.0),
      'declared_alpha': (0.2,),
      'mixing': ('normalised', 'ce_plus_alpha_kd', 'one_minus_alpha_ce_plus_kd'),
      'contrasts': ('weak_helps', 'ood_more', 'more_than_calibration'),
      'primary': ('ood_more',),
    },
    'mechanism': {'alpha': (0.0, 1.0)},
  }[study]  # fmt: skip
