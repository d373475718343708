"""What a run costs, by arithmetic: parameters, FLOPs a token, the distillation ledger, and the devices' peaks.

These are model FLOPs: two for each multiply-add of a matrix product, the backward pass twice the forward, nothing for
recomputation. The causal attention term counts the scores that the mask keeps: half of them, or in a local layer those
inside its window. The vocabulary is counted with its padding.
"""

import dataclasses
import re

from kdjax.config import ModelConfig

# Dense bf16 FLOP/s of one `jax.Device`. Names are matched word by word, so 'H1000' does not match 'H100'; the first match counts. A
# TPU7x chip (2,307e12) is two devices. Sources: docs.cloud.google.com/tpu/docs, the page of each generation; NVIDIA's data sheet of
# each card (figures with sparsity, halved); for GeForce cards the GA102 and Ada white papers (bf16 with fp32 accumulation).
# Cards without bf16 units (T4, V100) are not listed.
PEAKS = (
  ('TPU v4 lite', 138e12),
  ('TPU v4', 275e12),
  ('TPU v5 lite', 197e12),
  ('TPU v5litepod', 197e12),
  ('TPU v5e', 197e12),
  ('TPU v5p', 459e12),
  ('TPU v5', 459e12),  # JAX's name for a v5p
  ('TPU v6 lite', 918e12),
  ('TPU v6e', 918e12),
  ('TPU trillium', 918e12),
  ('TPU7x', 1153.5e12),
  ('TPU v7x', 1153.5e12),
  ('TPU ironwood', 1153.5e12),
  ('A10', 125e12),
  ('A30', 165e12),
  ('A40', 149.7e12),
  ('A100', 312e12),
  ('L4', 121e12),
  ('L40', 181e12),
  ('L40S', 362e12),
  ('H100 PCIe', 756e12),
  ('H100 NVL', 835e12),
  ('H100', 989e12),
  ('GH200', 989e12),
  ('H200 NVL', 835e12),
  ('H200', 989e12),
  ('B200', 2250e12),
  ('GB200', 2500e12),
  ('RTX 3090', 71e12),
  ('RTX 4090', 165.2e12),
)


@dataclasses.dataclass(frozen=True)
class Params:
  """How many parameters, and where. A tied head has none of its own."""

  non_embedding: int
  embedding: int
  head: int

  @property
  def total(self) -> int:
    return self.non_embedding + self.embedding + self.head


def count_params(config: ModelConfig) -> Params:
  c = config
  qk_norms = c.head_dim * (2 * c.qk_norm + (c.n_heads + c.n_kv_heads) * c.qk_norm_whole)
  norms = c.n_layers * (c.d_model * (4 if c.norms == 'both' else 2) + qk_norms) + c.d_model
  biases = c.n_layers * (c.n_heads + 2 * c.n_kv_heads) * c.head_dim * c.qkv_bias
  table = c.padded_vocab_size * c.d_model
  return Params(non_embedding=_block_matmul_params(c) + norms + biases, embedding=table, head=0 if c.tied else table)


def forward_flops(config: ModelConfig, seq_len: int, attention: bool = True) -> float:
  """FLOPs of one token's forward pass, on average in a window of `seq_len`; `attention`: with its causal term."""
  c = config
  matmul = 2.0 * (_block_matmul_params(c) + c.d_model * c.padded_vocab_size)
  return matmul + (4.0 * _attended(c, seq_len) * c.n_heads * c.head_dim if attention else 0.0)


def training_flops(config: ModelConfig, seq_len: int, attention: bool = True) -> float:
  """FLOPs of one token's forward and backward pass."""
  return 3 * forward_flops(config, seq_len, attention)


@dataclasses.dataclass(frozen=True)
class Ledger:
  """The FLOPs of one distilled student, by what they were spent on.

  `total` with its two switches is Eq. 9 of Busbridge et al. 2025, "Distillation Scaling Laws":
  `3 F(N_S) D_S + F(N_T) (d_logits D_S + d_pretraining 3 D_T)`. A teacher that exists anyway costs its logits only; one
  whose logits are stored already costs nothing.
  """

  student: float
  logits: float  # the teacher's forward passes over the student's tokens
  pretraining: float  # the teacher's own training

  def total(self, *, count_logits: bool, count_pretraining: bool) -> float:
    return self.student + count_logits * self.logits + count_pretraining * self.pretraining


def ledger(
  student: ModelConfig,
  teacher: ModelConfig,
  student_tokens: float,
  teacher_tokens: float,
  seq_len: int,
  attention: bool = True,
) -> Ledger:
  return Ledger(
    student=training_flops(student, seq_len, attention) * student_tokens,
    logits=forward_flops(teacher, seq_len, attention) * student_tokens,
    pretraining=training_flops(teacher, seq_len, attention) * teacher_tokens,
  )


def distillation_flops(
  student: ModelConfig,
  teacher: ModelConfig,
  student_tokens: float,
  teacher_tokens: float,
  seq_len: int,
  *,
  count_logits: bool,
  count_pretraining: bool,
  attention: bool = True,
) -> float:
  """The total of the ledger under one of its four scenarios."""
  entries = ledger(student, teacher, student_tokens, teacher_tokens, seq_len, attention)
  return entries.total(count_logits=count_logits, count_pretraining=count_pretraining)


def matched_tokens(
  student: ModelConfig,
  teacher: ModelConfig,
  student_tokens: float,
  teacher_tokens: float,
  seq_len: int,
  *,
  count_logits: bool,
  count_pretraining: bool,
  attention: bool = True,
) -> float:
  """Tokens on which an LM-only student spends the same FLOPs as the distilled one does in all."""
  entries = ledger(student, teacher, student_tokens, teacher_tokens, seq_len, attention)
  total = entries.total(count_logits=count_logits, count_pretraining=count_pretraining)
  return student_tokens * total / entries.student


def pair_tokens(
  student: ModelConfig,
  teacher: ModelConfig,
  teacher_tokens: float,
  total: float,
  seq_len: int,
  *,
  count_logits: bool,
  count_pretraining: bool,
) -> float:
  """Return the student tokens for which a teacher-student pair costs `total` FLOPs; 0 if the teacher alone costs more."""
  one = ledger(student, teacher, 1.0, teacher_tokens, seq_len)
  left = total - count_pretraining * one.pretraining
  return max(0.0, left / one.total(count_logits=count_logits, count_pretraining=False))


def peak_flops(device: str) -> float | None:
  """Return the dense bf16 FLOP/s of one device, by its `device_kind` or usual name (v5p, L4); None if unknown (e.g. a CPU)."""
  words = _words(device)
  return next((peak for name, peak in PEAKS if _within(_words(name), words)), None)


def _words(name: str) -> list[str]:
  """Split a name: 'NVIDIA A100-SXM4-80GB' -> ['nvidia', 'a100', 'sxm4', '80gb']. 'TPU' is dropped: 'v5p' implies it."""
  return [word for word in re.split(r'[^a-z0-9]+', name.lower()) if word not in ('', 'tpu')]


def _within(part: list[str], words: list[str]) -> bool:
  return any(words[i : i + len(part)] == part for i in range(len(words) - len(part) + 1))


def _attended(c: ModelConfig, seq_len: int) -> float:
  """Count the keys that a token attends to, averaged over a sequence and summed over the layers.

  A layer with full attention gives seq_len / 2. A local layer's mask is a band of width w below the diagonal: w n - w^2 / 2 of the n^2 scores.
  """
  window = min(c.local_window, seq_len) if c.local_window else seq_len
  n_local = c.n_layers - c.n_layers // c.global_every if c.local_window else 0
  return (c.n_layers - n_local) * seq_len / 2 + n_local * (window - window**2 / (2 * seq_len))


def _block_matmul_params(c: ModelConfig) -> int:
  attention = 2 * c.d_model * (c.n_heads + c.n_kv_heads) * c.head_dim
  return c.n_layers * (attention + 3 * c.d_model * c.d_ff)
