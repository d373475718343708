"""The three scales that the config files share. A config file names its models and alpha; what is common to a scale stands here."""

import ml_collections

from kdjax import config as config_lib
from kdjax.config.sizes import named

SCALES = ('laptop', 'colab', 'paper')
MODELS = {  # relationship of the teacher to the student -> by scale (teacher, student)
  'weak2strong': {
    'laptop': ('tiny-0.1m', 'tiny-1m'),
    'colab': ('tiny-1m', 'tiny-10m'),
    'paper': ('llama3-0.5b', 'llama3-1.7b'),
  },
  'same_level': {
    'laptop': ('tiny-1m', 'tiny-1m'),
    'colab': ('tiny-10m', 'tiny-10m'),
    'paper': ('llama3-1.7b', 'llama3-1.7b'),
  },
  'strong2weak': {
    'laptop': ('tiny-3m', 'tiny-1m'),
    'colab': ('tiny-10m', 'tiny-3m'),
    'paper': ('llama3-8b', 'llama3-1.7b'),
  },
}


def get_config(name: str, arg: str | None, alpha: float, teacher_tokens: float = 1.0) -> ml_collections.ConfigDict:
  """The config of a relationship at the scale that `arg` names ('scale=laptop' by default).

  Args:
    name: a key of MODELS.
    arg: what follows the config file's colon.
    alpha: the distilled student's.
    teacher_tokens: the teacher's training tokens as a share of the student's (below 1: undertrained).
  """
  scale = config_lib.parse_arg(arg, scale=SCALES)['scale']
  config = base(scale)
  config.name = name
  for section, model in zip((config.teacher, config.student), MODELS[name][scale], strict=True):
    run = {key: section.model[key] for key in ('remat', 'max_seq_len')}
    config_lib.set_model(section, named(model, **run))
  config.student.alpha = alpha
  config.teacher.tokens = int(teacher_tokens * config.student.tokens)
  return config


def base(scale: str) -> ml_collections.ConfigDict:
  """All of a scale but the models and alpha."""
  config = config_lib.default()
  config.scale = scale
  {'laptop': _laptop, 'colab': _colab, 'paper': _paper}[scale](config)
  for section in (config.teacher, config.student):
    section.model.remat = 'full' if scale == 'paper' else 'none'
    section.model.max_seq_len = max(config.data.seq_len, 1024)
  return config


def _laptop(config: ml_collections.ConfigDict) -> None:
  """Two CPU cores, minutes: State of the Union addresses, four epochs over few tokens, where a weak teacher has most to give."""
  config.data.seq_len = 128
  config.data.distinct_tokens = 256_000
  config.data.vocab_size = 2048
  for section in (config.teacher, config.student):
    section.batch_size = 8
    section.tokens = 1_024_000
    section.optimizer.learning_rate = 3e-3
  config.steps_per_call = 10
  config.eval.max_document_bytes = 8_000
  config.eval.max_bytes = 240_000
  config.eval.max_validation_bytes = 80_000
  config.eval.stride = 96


def _colab(config: ml_collections.ConfigDict) -> None:
  """One accelerator, minutes (128 s on an H200, docs/DEVICE.md); a few epochs over the same text."""
  config.data.seq_len = 256
  config.data.vocab_size = 4096
  for section in (config.teacher, config.student):
    section.batch_size = 32
    section.tokens = 16_384_000
    section.optimizer.learning_rate = 1e-3
  config.steps_per_call = 10
  config.eval.max_document_bytes = 20_000
  config.eval.max_bytes = 1_000_000


def _paper(config: ml_collections.ConfigDict) -> None:
  """Lu & Liu 2026: 50B tokens of FineWeb-Edu in windows of 8192 under Llama 3.1's tokenizer. Put both where the fields below say."""
  config.runs = 'runs'
  config.data.source = 'data/fineweb-edu/*.jsonl.zst'
  config.data.tokenizer = 'data/llama-3.1-tokenizer.json'
  config.data.seq_len = 8192
  config.data.mask_documents = False
  config.data.validation_fraction = 0.0005
  config.data.test_fraction = 0.0005
  for section in (config.teacher, config.student):
    section.batch_size = 256
    section.tokens = 50_000_000_000
    section.optimizer.learning_rate = 3e-4
  config.teacher.forward_microbatch = 0
  config.eval.max_bytes = 8_000_000
  config.checkpoint.every = 1000
  config.checkpoint.keep_period = 5000
