"""Losses of pretraining with distillation: the dense reference, the fused loss, the teacher's targets, the schedules of alpha.

They are pure functions of hidden states, heads and targets: nothing here knows how a model or a teacher is made.
"""

from kdjax.losses.dense import dense_loss
from kdjax.losses.fused import Student, fused_loss, fused_losses, token_losses
from kdjax.losses.schedules import AlphaState, alpha_at, alpha_state
from kdjax.losses.targets import LogitTargets, ModelTargets, Targets, UnigramTargets

__all__ = [
  'AlphaState',
  'LogitTargets',
  'ModelTargets',
  'Student',
  'Targets',
  'UnigramTargets',
  'alpha_at',
  'alpha_state',
  'dense_loss',
  'fused_loss',
  'fused_losses',
  'token_losses',
]
