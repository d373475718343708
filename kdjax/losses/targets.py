"""The teacher's side of the loss, as a value: where the target logits of a chunk of tokens come from.

A `Targets` is a pytree with two parts: `tokenwise`, arrays [B, T, ...] that are cut into chunks with the tokens, and `shared`, arrays that
each chunk uses whole. `chunk_logits` forms one chunk's logits from them. A new kind of teacher (cached, sampled, an ensemble) is a new
class here; neither the scan nor the step knows of it.
"""

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from kdjax.losses.rows import MASKED


class Targets(Protocol):
  """See the module's docstring. Specs are partition specs on a (replica, fsdp, tensor) mesh, of the same structure as the parts."""

  @property
  def tokenwise(self) -> Any: ...
  @property
  def shared(self) -> Any: ...
  @property
  def vocab_axis(self) -> tuple[Any, Any]:
    """Which axis of each array of (tokenwise, shared) is the vocabulary; -1 for none."""
    ...

  def specs(self, batch_axes: tuple[str, ...], vocab_axis: str) -> tuple[Any, Any]: ...
  @staticmethod
  def chunk_logits(tokenwise, shared) -> jax.Array: ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ModelTargets:
  """An on-line teacher: its hidden states [B, T, Dt] and its head [Dt, V]. The logits live for one chunk."""

  hidden_BxTxD: jax.Array
  head_DxV: jax.Array

  tokenwise = property(lambda self: self.hidden_BxTxD)
  shared = property(lambda self: self.head_DxV.astype(self.hidden_BxTxD.dtype))
  vocab_axis = property(lambda self: (-1, 1))

  def specs(self, batch_axes, vocab_axis):
    return P(batch_axes), P(None, vocab_axis)

  @staticmethod
  def chunk_logits(hidden_CxD, head_DxV):
    return jnp.dot(hidden_CxD, head_DxV, preferred_element_type=jnp.float32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class UnigramTargets:
  """No model at all: the training split's log token frequencies [V], the same for each token. The control that a gain must beat."""

  log_probs_V: jax.Array

  tokenwise = property(lambda self: ())
  shared = property(lambda self: self.log_probs_V)
  vocab_axis = property(lambda self: ((), 0))

  def specs(self, batch_axes, vocab_axis):
    return (), P(vocab_axis)

  @staticmethod
  def chunk_logits(_, log_probs_V):
    return jnp.maximum(log_probs_V[None].astype(jnp.float32), MASKED)  # -inf: a token that never occurred


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LogitTargets:
  """Logits [B, T, V] that exist already: small vocabularies and tests."""

  logits_BxTxV: jax.Array

  tokenwise = property(lambda self: self.logits_BxTxV)
  shared = property(lambda self: ())
  vocab_axis = property(lambda self: (2, ()))

  def specs(self, batch_axes, vocab_axis):
    return P(batch_axes, None, vocab_axis), ()

  @staticmethod
  def chunk_logits(logits_CxV, _):
    return jnp.maximum(logits_CxV.astype(jnp.float32), MASKED)
