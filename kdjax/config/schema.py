"""The fields of a config: frozen dataclasses with their defaults, and what each field means (see `fields`)."""

import dataclasses
import hashlib
import json
from typing import Any

from kdjax.config import bounds
from kdjax.config.fields import field
from kdjax.errors import ConfigError

SEED: dict[str, Any] = {'at_least': 0, 'below': 2**32}


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """Stretch rotary frequencies for longer windows: the low ones (Llama 3.1), or all. Factor 1 changes nothing."""

  factor: float = field(1.0, 'how much longer the wavelengths become', above=0)
  low_freq_factor: float = field(1.0, 'llama3: wavelengths above original_max_len / this are stretched fully', above=0)
  high_freq_factor: float = field(4.0, 'llama3: wavelengths below original_max_len / this are not stretched', above=0)
  original_max_len: int = field(8192, 'the window that the model was first trained with', unit='tokens')
  method: str = field(
    'llama3', 'which frequencies are stretched', choices=('llama3', 'linear'), implied='llama3', since='0.2'
  )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A decoder. Sizes are counts; `vocab_size` counts the tokens that exist, `padded_vocab_size` the rows of the weights."""

  vocab_size: int = field(0, "0: the tokenizer's", unit='tokens', at_least=0)
  pad_vocab_to: int = field(128, 'the table has a multiple of this many rows', above=0)
  d_model: int = field(128, 'width of the hidden states', above=0)
  n_layers: int = field(5, above=0)
  d_ff: int = field(384, 'width of the MLP', above=0)
  n_heads: int = field(4, above=0)
  n_kv_heads: int = field(4, 'heads of keys and values; must divide n_heads', above=0)
  head_dim: int = field(32, 'width of a head; even', above=0)
  max_seq_len: int = field(8192, 'the longest window that the model runs', unit='tokens', result=False)
  tied: bool = field(True, 'the head is the transposed embedding')
  norms: str = field(
    'before',
    'RMSNorms of attention and MLP (Llama, OLMo-2, Gemma)',
    choices=('before', 'after', 'both'),
    implied='before',
    since='0.2',
  )
  norm_offset: bool = field(False, 'weights of the norms are stored less one (Gemma)', implied=False, since='0.2')
  qk_norm: bool = field(False, "an RMSNorm of each head's queries and keys (Qwen3)")
  qk_norm_whole: bool = field(
    False, 'an RMSNorm of the queries and keys of all heads together (OLMo-2)', implied=False, since='0.2'
  )
  qkv_bias: bool = field(False, 'biases of queries, keys and values (Qwen2.5)', implied=False, since='0.2')
  activation: str = field('silu', "of the MLP's gate", choices=('silu', 'gelu_tanh'), implied='silu', since='0.2')
  embed_scale: float = field(1.0, 'factor of the embedding (Gemma: sqrt(d_model))', above=0, implied=1.0, since='0.2')
  attn_scale: float = field(
    0.0, 'factor of the attention scores; 0: 1 / sqrt(head_dim)', at_least=0, implied=0.0, since='0.2'
  )
  local_window: int = field(
    0,
    'how far back a token of a local layer sees, itself included (Gemma 3); 0: no layer is local',
    unit='tokens',
    at_least=0,
    implied=0,
    since='0.2',
  )
  global_every: int = field(
    6, 'with a local window: every n-th layer, counted from 1, is global', above=0, implied=6, since='0.2'
  )
  local_rope_theta: float = field(
    10_000.0, 'rope_theta of the local layers, which are not stretched', above=0, implied=10_000.0, since='0.2'
  )
  rope_theta: float = field(500_000.0, 'base of the rotary wavelengths', above=0)
  rope_scaling: RopeScaling = RopeScaling()
  norm_eps: float = field(1e-5, above=0)
  dtype: str = field(
    'auto',
    'of the computation; auto: bfloat16 on accelerators, float32 on CPU',
    choices=('auto', 'float32', 'bfloat16'),
    precision=True,
  )
  param_dtype: str = field('float32', 'of the weights', choices=('float32', 'bfloat16'), precision=True)
  attention: str = field('auto', 'the implementation', choices=('auto', 'xla', 'cudnn', 'splash'), result=False)
  remat: str = field(
    'none',
    'what the backward pass computes again: nothing, every layer, or all but the matrix products',
    choices=('none', 'full', 'dots'),
    result=False,
  )
  scan_unroll: int = field(1, 'layers in one iteration of the scan', above=0, result=False)

  @property
  def padded_vocab_size(self) -> int:
    return -(-self.vocab_size // self.pad_vocab_to) * self.pad_vocab_to


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """AdamW with decoupled decay, global-norm clipping, and warm-up into a cosine or a WSD schedule."""

  learning_rate: float = field(3e-4, 'the peak', above=0)
  schedule: str = field('cosine', 'after the warm-up', choices=('cosine', 'wsd'))
  warmup_fraction: float = field(0.05, 'of the steps', at_least=0, at_most=1)
  decay_fraction: float = field(0.2, 'wsd: share of the steps in the final decay', at_least=0, at_most=1)
  final_fraction: float = field(0.1, 'learning rate of the last step, as a share of the peak', at_least=0, at_most=1)
  b1: float = field(0.9, at_least=0, below=1)
  b2: float = field(0.95, at_least=0, below=1)
  eps: float = field(1e-8, above=0)
  weight_decay: float = field(0.1, at_least=0)
  clip_norm: float = field(1.0, 'of the global gradient norm', above=0)


@dataclasses.dataclass(frozen=True)
class AlphaSchedule:
  """How the KD share moves from `student.alpha` to `final` over the steps [begin, end), as fractions of the run."""

  kind: str = field(
    'constant', "lr: with the shape of the learning rate's schedule", choices=('constant', 'linear', 'cosine', 'lr')
  )
  final: float = field(0.0, 'the KD share at `end`', at_least=0, at_most=1)
  begin: float = field(0.0, 'share of the run')
  end: float = field(1.0, 'share of the run')


@dataclasses.dataclass(frozen=True)
class LossConfig:
  """`L = (1 - alpha) * CE + alpha * T^2 * KL(teacher_T || student_T)` and the paper's variants of it.

  Top-k and top-p truncate the teacher's distribution at the temperature T. Together they intersect: each set is cut from the whole
  distribution, and a token is kept if it is in both. Ties are never cut: all tokens with the k-th largest probability stay, and all
  tokens with the probability of the nucleus's last token. (The code of the paper's authors rejects top-k with top-p, and cuts ties by
  their index in the vocabulary.)

  Raises ConfigError for a field out of range.
  """

  divergence: str = field(
    'forward_kl',
    'between the distributions of teacher and student',
    choices=('forward_kl', 'hard_label'),
    formerly='kd',
  )
  temperature: float = field(1.0, 'T, of the teacher and the student in the KD term', above=0)
  mixing: str = field(
    'normalised',
    'weights of CE and KD: (1 - alpha, alpha), (1, alpha) or (1 - alpha, 1)',
    choices=('normalised', 'ce_plus_alpha_kd', 'one_minus_alpha_ce_plus_kd'),
  )
  teacher_top_k: float = field(0.0, '0: all; 1 or more: that many tokens; in (0, 1): that share of the vocabulary')
  teacher_top_p: float = field(1.0, 'the smallest set of tokens with at least this mass; 1: all', above=0, at_most=1)
  rest: str = field(
    'renormalise',
    "the teacher's mass outside top-k and top-p; other: one bucket",
    choices=('renormalise', 'other'),
  )
  z_loss: float = field(0.0, 'weight of the squared log-partition', at_least=0)
  chunk_tokens: int = field(0, '0: from chunk_megabytes', unit='tokens', at_least=0, result=False)
  chunk_megabytes: int = field(0, '0: 256 on CPU, 4096 on accelerators', unit='MB', at_least=0, result=False)

  def __post_init__(self):
    if problems := list(bounds.loss_problems(self)):
      raise ConfigError([f'LossConfig.{problem}' for problem in problems])


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
  """How a model is trained: what the teacher's section and the student's have in common."""

  model: ModelConfig = ModelConfig()
  seed: int = field(42, 'of the weights and the order of the batches', **SEED)
  tokens: int = field(1_000_000, 'training tokens', unit='tokens')
  batch_size: int = field(8, 'a step, over all devices', unit='sequences', above=0)
  microbatches: int = field(1, 'parts of a batch whose gradients are summed', above=0, result=False)
  slice: tuple[float, float] = field((0.0, 1.0), 'share of the training documents, from and to')
  optimizer: OptimizerConfig = OptimizerConfig()


@dataclasses.dataclass(frozen=True)
class TeacherConfig(TrainingConfig):
  """The teacher: trained here from this section, or read from `run`."""

  run: str = field('', 'folder of a finished run or of a Hugging Face model, which then decides the model')
  step: int = field(0, 'which checkpoint of `run`; 0: the last', unit='steps', at_least=0)
  trunk: tuple[int, ...] = field(
    (), 'token budgets of one longer run of which `tokens` is a checkpoint, un-annealed; (): a run of its own'
  )
  dtype: str = field(
    'auto',
    "of its weights in the student's step; auto: bfloat16 on accelerators, float32 on CPU",
    choices=('auto', 'float32', 'bfloat16', 'int8'),
  )
  layout: str = field(
    'student',
    'how its weights and rows are sharded inside the step (kdjax/runtime/sharding.py)',
    choices=('student', 'fsdp', 'replicated'),
    result=False,
  )
  forward_microbatch: int = field(
    0,
    "rows of one teacher forward pass inside the step; 0: the student's microbatch",
    unit='sequences',
    at_least=0,
    result=False,
  )


@dataclasses.dataclass(frozen=True)
class StudentConfig(TrainingConfig):
  """The student: the baseline (alpha = 0), the distilled one and the controls differ in nothing but their targets."""

  seed: int = field(43, 'of the weights and the order of the batches', **SEED)
  init: str = field(
    '', 'start from the weights of this run or Hugging Face folder; empty: fresh ones', implied='', since='0.2'
  )
  alpha: float = field(0.4, 'share of KD in the loss', at_least=0, at_most=1)
  alpha_schedule: AlphaSchedule = AlphaSchedule()
  arms: tuple[str, ...] = field(
    ('baseline', 'distilled', 'unigram'), 'students of a run', choices=('baseline', 'distilled', 'unigram')
  )


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Text -> documents -> splits -> tokens on disk -> windows."""

  source: str = field(
    'embedded:speeches', 'or a path or glob: .txt, .jsonl, .parquet, each also .gz, .xz, .zst', corpus='documents'
  )
  text_field: str = field('text', 'of a record', corpus='documents')
  nulls: str = field(
    'refuse',
    'records whose text is null or missing, in every source; skip: omit and count them',
    choices=('refuse', 'skip'),
    implied='refuse',
    since='0.2',
  )
  tokenizer: str = field(
    'bpe', 'bpe (trained on the training split), bytes, or the path of a tokenizer', corpus='tokenizer'
  )
  vocab_size: int = field(2048, 'of the bpe that is trained', unit='tokens', above=0, corpus='tokenizer')
  separator: str = field(
    '',
    "one token that starts and ends documents; empty: the tokens with these roles in the tokenizer's files",
    corpus='documents',
  )
  validation_fraction: float = field(0.08, 'of the documents', above=0, below=1, corpus='documents')
  test_fraction: float = field(0.16, 'of the documents', above=0, below=1, corpus='documents')
  split_seed: int = field(0, corpus='documents', **SEED)
  seq_len: int = field(128, 'a window', unit='tokens', above=0)
  mask_documents: bool = field(True, 'no token sees another document')
  distinct_tokens: int = field(0, '0: all of the slice', unit='tokens', at_least=0)
  cache: str = field('', 'folder of the token stores; empty: stores in `runs`', result=False)
  prefetch: int = field(4, 'batches read ahead', at_least=0, result=False)
  threads: int = field(2, 'that read batches', above=0, result=False)


@dataclasses.dataclass(frozen=True)
class EvalConfig:
  """What the eval job scores."""

  ood: dict[str, str] = field(
    {
      'dialogue': 'embedded:dialogue',
      'code': 'embedded:code',
      'reference': 'embedded:reference',
    },
    'out-of-domain sets: NAME=SOURCE',
    corpus='sets',
  )
  ood_text_field: str = field('text', 'of their records', corpus='sets')
  tasks: dict[str, str] = field({}, 'downstream multiple choice: NAME=PATH of JSON lines')
  max_items: int = field(0, 'of a task, in the order of a content hash; 0: all', at_least=0)
  ood_validation_fraction: float = field(
    0.25, "of a set's documents, where its evaluation temperature is fitted", above=0, below=1, corpus='sets'
  )
  max_bytes: int = field(400_000, 'of a set; 0: all', unit='bytes', at_least=0, corpus='caps')
  max_validation_bytes: int = field(
    0,
    'of the documents where a temperature is fitted; 0: as max_bytes',
    unit='bytes',
    at_least=0,
    corpus='caps',
  )
  max_document_bytes: int = field(0, 'longer documents are cut; 0: never', unit='bytes', at_least=0, corpus='caps')
  window: int = field(0, 'context; 0: data.seq_len', unit='tokens', at_least=0)
  stride: int = field(0, 'scored by a window after the first; 0: half the window', unit='tokens', at_least=0)
  batch_size: int = field(32, unit='windows', above=0)
  every: int = field(0, 'between validation passes in a run; 0: ten in a run', unit='steps', at_least=0)
  every_batches: int = field(8, 'of a validation pass in a run', above=0)


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  """When checkpoints are saved, and which are kept."""

  every: int = field(0, '0: ten in a run', unit='steps', at_least=0, result=False)
  keep: int = field(2, 'the newest', above=0, result=False)
  keep_period: int = field(
    0, 'each multiple is saved too and never deleted; 0: only the last', unit='steps', at_least=0, result=False
  )
  keep_minutes: float = field(
    0.0, 'one is never deleted each time so long has passed; 0: none', unit='minutes', at_least=0, result=False
  )
  local: str = field(
    '',
    "a folder of each host's own disk or memory (/dev/shm/kdjax) for checkpoints between these; empty: none",
    result=False,
  )
  local_every: int = field(0, 'between local checkpoints', unit='steps', at_least=0, result=False)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Devices along each axis; one of them may be -1: what is left."""

  replica: int = field(1, 'data parallel, weights replicated', result=False)
  fsdp: int = field(-1, 'data parallel, weights sharded', result=False)
  tensor: int = field(1, 'heads, MLP and vocabulary sharded', result=False)


@dataclasses.dataclass(frozen=True)
class Config:
  """An experiment: a teacher, students that differ in their targets, their data and their evaluation."""

  name: str = field('weak2strong', 'of the folder in `runs`', result=False)
  scale: str = field('laptop', choices=('laptop', 'colab', 'paper'), result=False)
  runs: str = field('runs', 'where run folders, teachers and token stores are', result=False)
  data: DataConfig = DataConfig()
  teacher: TeacherConfig = TeacherConfig()
  student: StudentConfig = StudentConfig()
  loss: LossConfig = LossConfig()
  eval: EvalConfig = EvalConfig()
  checkpoint: CheckpointConfig = CheckpointConfig()
  mesh: MeshConfig = MeshConfig()
  trackers: tuple[str, ...] = field(
    ('tensorboard',), 'of the metrics, beside metrics.jsonl', choices=('tensorboard', 'csv', 'wandb'), result=False
  )
  steps_per_call: int = field(1, 'steps of one dispatched program', above=0, result=False)
  max_skipped: int = field(20, 'non-finite steps in a row before the run stops', above=0, result=False)
  deterministic: bool = field(
    True,
    "on GPU: XLA's deterministic operations; attention is then XLA's, for at most 2,048 tokens",
    result=False,
  )
  heartbeat_timeout: int = field(
    30,
    'after which a silent owner of a folder, or a silent process of several, counts as gone',
    unit='seconds',
    above=0,
    result=False,
  )


def as_dict(config: Any) -> dict[str, Any]:
  """A (nested) config dataclass as plain dicts; tuples stay."""
  return dataclasses.asdict(config)


def fingerprint(value: Any, length: int = 12) -> str:
  """Hex hash of a JSON-able value (dataclasses welcome); the same everywhere."""
  if dataclasses.is_dataclass(value) and not isinstance(value, type):
    value = as_dict(value)
  text = json.dumps(value, sort_keys=True, separators=(',', ':'))
  return hashlib.sha256(text.encode()).hexdigest()[:length]


def n_steps(section: TrainingConfig, data: DataConfig) -> int:
  """Optimizer steps that spend `section.tokens`."""
  return max(1, round(section.tokens / (section.batch_size * data.seq_len)))
