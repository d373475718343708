"""The fields: frozen dataclasses with their defaults. A field's comment is its documentation."""

import dataclasses
import hashlib
import json
from typing import Any

from kdjax.config import bounds
from kdjax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """The stretching of rotary frequencies for longer windows: of the low ones (Llama 3.1), or of all. Factor 1 leaves them as they are."""

  factor: float = 1.0
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  original_max_len: int = 8192
  method: str = 'llama3'  # llama3 | linear


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A decoder. Sizes are counts; `vocab_size` counts the tokens that exist, `padded_vocab_size` the rows of the weights."""

  vocab_size: int = 0  # 0: the tokenizer's
  pad_vocab_to: int = 128
  d_model: int = 128
  n_layers: int = 5
  d_ff: int = 384
  n_heads: int = 4
  n_kv_heads: int = 4
  head_dim: int = 32
  max_seq_len: int = 8192
  tied: bool = True
  norms: str = 'before'  # RMSNorms of attention and MLP: before (Llama) | after (OLMo-2) | both (Gemma)
  norm_offset: bool = False  # the norms' weights are kept less one (Gemma)
  qk_norm: bool = False  # of each head's queries and keys (Qwen3)
  qk_norm_whole: bool = False  # of all heads together (OLMo-2)
  qkv_bias: bool = False  # Qwen2.5
  activation: str = 'silu'  # of the MLP's gate: silu | gelu_tanh (Gemma)
  embed_scale: float = 1.0  # the hidden states start as the embedding times this (Gemma: sqrt(d_model))
  attn_scale: float = 0.0  # of the scores; 0: 1 / sqrt(head_dim)
  local_window: int = 0  # how far back a local layer's tokens look, themselves included (Gemma 3); 0: no layer is local
  global_every: int = 6  # with a local window: the layers that see all, those numbered by multiples of this, from 1
  local_rope_theta: float = 10_000.0  # of the local layers, whose frequencies are not stretched
  rope_theta: float = 500_000.0
  rope_scaling: RopeScaling = RopeScaling()
  norm_eps: float = 1e-5
  dtype: str = 'auto'  # of the computation: bfloat16 on accelerators, float32 on CPU
  param_dtype: str = 'float32'
  attention: str = 'auto'  # xla | cudnn | splash
  remat: str = 'none'  # none | full | dots
  scan_unroll: int = 1

  @property
  def padded_vocab_size(self) -> int:
    return -(-self.vocab_size // self.pad_vocab_to) * self.pad_vocab_to


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """AdamW with decoupled decay, global-norm clipping, and warm-up into a cosine or a WSD schedule."""

  learning_rate: float = 3e-4
  schedule: str = 'cosine'  # cosine | wsd
  warmup_fraction: float = 0.05
  decay_fraction: float = 0.2  # wsd: the share of the steps in the final decay
  final_fraction: float = 0.1  # of the peak, at the last step
  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-8
  weight_decay: float = 0.1
  clip_norm: float = 1.0


@dataclasses.dataclass(frozen=True)
class AlphaSchedule:
  """How the KD share moves from `student.alpha` to `final` over the steps [begin, end), as fractions of the run."""

  kind: str = 'constant'  # constant | linear | cosine | lr (follows the learning rate's shape)
  final: float = 0.0
  begin: float = 0.0
  end: float = 1.0


@dataclasses.dataclass(frozen=True)
class LossConfig:
  """`L = (1 - alpha) * CE + alpha * T^2 * KL(teacher_T || student_T)` and the paper's variants of it.

  Top-k and top-p truncate the teacher's distribution at the temperature T. Together they intersect: each set is cut from the whole
  distribution, and a token is kept if it is in both. Ties are never cut: all tokens with the k-th largest probability stay, and all
  tokens with the probability of the nucleus's last token. (The code of the paper's authors rejects top-k with top-p, and cuts ties by
  their index in the vocabulary.)

  Raises ConfigError for a field out of range.
  """

  kd: str = 'forward_kl'  # forward_kl | hard_label
  temperature: float = 1.0  # T, of the teacher and the student in the KD term
  mixing: str = 'normalised'  # normalised | ce_plus_alpha_kd | one_minus_alpha_ce_plus_kd
  teacher_top_k: float = (
    0.0  # 0: all; >= 1: that many tokens; in (0, 1): that share of the vocabulary; ties at the k-th all stay
  )
  teacher_top_p: float = (
    1.0  # the smallest set of the most likely tokens with at least this mass of softmax(teacher / T); 1: all
  )
  rest: str = 'renormalise'  # of the teacher's mass outside top-k / top-p: renormalise | other (one bucket)
  z_loss: float = 0.0
  chunk_tokens: int = 0  # 0: from chunk_megabytes
  chunk_megabytes: int = 0  # 0: 256 on CPU, 4096 on accelerators

  def __post_init__(self):
    if problems := list(bounds.loss_problems(self)):
      raise ConfigError([f'LossConfig.{problem}' for problem in problems])


@dataclasses.dataclass(frozen=True)
class TeacherConfig:
  """The teacher: trained here from this section, or read from `run`."""

  model: ModelConfig = ModelConfig()
  run: str = ''  # the folder of a finished run, or of a Hugging Face model; the model is then the folder's, whatever `model` says
  step: int = 0  # of `run`: which checkpoint; 0: the last
  seed: int = 42
  tokens: int = 1_000_000
  trunk: tuple[
    int, ...
  ] = ()  # token budgets of one longer run of which `tokens` is a checkpoint, un-annealed; (): a run of its own
  batch_size: int = 8
  microbatches: int = 1
  slice: tuple[float, float] = (0.0, 1.0)  # of the training documents
  optimizer: OptimizerConfig = OptimizerConfig()
  dtype: str = 'auto'  # of its weights in the student's step: auto | float32 | bfloat16 | int8 (models/quantized.py)
  layout: str = 'student'  # how its weights and rows lie on the mesh inside the step: student | fsdp | replicated (kdjax/runtime/sharding.py)
  forward_microbatch: int = 0  # rows of one teacher forward pass inside the step; 0: the student's microbatch


@dataclasses.dataclass(frozen=True)
class StudentConfig:
  """The student: the baseline (alpha = 0), the distilled one and the controls differ in nothing but their targets."""

  model: ModelConfig = ModelConfig()
  init: str = ''  # start from these weights, of a run or a Hugging Face folder, whose model it then is; '': fresh ones
  alpha: float = 0.4
  alpha_schedule: AlphaSchedule = AlphaSchedule()
  arms: tuple[str, ...] = ('baseline', 'distilled', 'unigram')
  seed: int = 43
  tokens: int = 1_000_000
  batch_size: int = 8  # sequences a step, over all devices
  microbatches: int = 1
  slice: tuple[float, float] = (0.0, 1.0)
  optimizer: OptimizerConfig = OptimizerConfig()


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Text -> documents -> splits -> tokens on disk -> windows."""

  source: str = 'embedded:speeches'  # or a path or glob: .txt, .jsonl, each also .gz, .xz, .zst
  text_field: str = 'text'
  nulls: str = 'refuse'  # records whose text is null or missing, in every source: refuse | skip (omit and count)
  tokenizer: str = 'bpe'  # bpe (trained on the training split) | bytes | the path of a `tokenizers` JSON file
  vocab_size: int = 2048  # of the bpe that is trained
  separator: str = (
    ''  # one token that starts and ends documents; '': the tokens with these roles in the tokenizer's files
  )
  validation_fraction: float = 0.08
  test_fraction: float = 0.16
  split_seed: int = 0
  seq_len: int = 128
  mask_documents: bool = True
  distinct_tokens: int = 0  # 0: all of the slice
  cache: str = ''  # where token stores live; '': <runs>/stores
  prefetch: int = 4
  threads: int = 2


@dataclasses.dataclass(frozen=True)
class EvalConfig:
  """What the eval job scores."""

  ood: dict[str, str] = dataclasses.field(
    default_factory=lambda: {
      'dialogue': 'embedded:dialogue',
      'code': 'embedded:code',
      'reference': 'embedded:reference',
    }
  )
  ood_text_field: str = 'text'
  tasks: dict[str, str] = dataclasses.field(default_factory=dict)  # downstream multiple choice: NAME=PATH of JSON lines
  max_items: int = 0  # of a task, from the front of a content-hash order; 0: all
  ood_validation_fraction: float = 0.25  # of a set's documents: where its evaluation temperature is fitted
  max_bytes: int = 400_000  # of a set; 0: all
  max_validation_bytes: int = 0  # of the documents where a temperature is fitted; 0: as max_bytes
  max_document_bytes: int = 0  # longer ones are cut to their first bytes: more documents for the same work; 0: never
  window: int = 0  # tokens of context; 0: data.seq_len
  stride: int = 0  # tokens scored by a window after the first; 0: half the window
  batch_size: int = 32
  every: int = 0  # steps between in-run validation passes; 0: ten in a run
  every_batches: int = 8


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  every: int = 0  # steps; 0: ten in a run
  keep: int = 2  # the newest
  keep_period: int = 0  # steps; each multiple is saved too and kept for good; 0: only the last
  keep_minutes: float = 0.0  # and, for good, one each time that so many minutes have gone by; 0: none
  local: str = ''  # a folder of each host's own, on its disk or in memory (/dev/shm/kdjax), for checkpoints between these; '': none
  local_every: int = 0  # steps between them (kdjax/runs/local_checkpoint.py)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Devices along each axis; one of them may be -1: what is left."""

  replica: int = 1
  fsdp: int = -1
  tensor: int = 1


@dataclasses.dataclass(frozen=True)
class Config:
  name: str = 'weak2strong'
  scale: str = 'laptop'
  runs: str = 'runs'  # where run folders, teachers and token stores live
  data: DataConfig = DataConfig()
  teacher: TeacherConfig = TeacherConfig()
  student: StudentConfig = StudentConfig()
  loss: LossConfig = LossConfig()
  eval: EvalConfig = EvalConfig()
  checkpoint: CheckpointConfig = CheckpointConfig()
  mesh: MeshConfig = MeshConfig()
  trackers: tuple[str, ...] = ('tensorboard',)  # of the metrics, beside metrics.jsonl: tensorboard, csv, wandb
  steps_per_call: int = 1
  max_skipped: int = 20  # non-finite steps in a row before the run stops
  deterministic: bool = (
    True  # on GPU: XLA's deterministic operations; attention is then XLA's, for at most 2,048 tokens
  )
  heartbeat_timeout: int = (
    30  # seconds after which a silent owner of a folder, or a silent process of several, counts as gone
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


def n_steps(section: TeacherConfig | StudentConfig, data: DataConfig) -> int:
  """Optimizer steps that spend `section.tokens`."""
  return max(1, round(section.tokens / (section.batch_size * data.seq_len)))
