"""What a teacher costs inside the step, and what a cohort saves.

    python -m benchmarks.step [--rounds 7] [--cohorts 2,4,8] [--only overhead|cohort]

`overhead`: the distillation step over (the LM-only step with the same fused loss + the teacher's forward pass with its logits). 1.00 means
that distilling costs the teacher's forward pass and nothing else.
`cohort`: K students in one step over K separate distillation steps; the ideal shares one teacher forward pass among K.
Ratios are measured side by side in one process: median and 95% interval over the rounds.
"""

import argparse
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from kdjax.config import AlphaSchedule, LossConfig, MeshConfig, ModelConfig, OptimizerConfig
from kdjax.config.sizes import named
from kdjax.losses import alpha_state
from kdjax.models import Model, build, flops
from kdjax.runtime.sharding import make_mesh
from kdjax.teachers import frozen
from kdjax.trainer.optimizer import adamw, learning_rate
from kdjax.trainer.step import Recipe, Teacher, init_state, make_step, state_shardings

ROWS, TOKENS = 8, 128
OPTIMIZER = OptimizerConfig(learning_rate=1e-3)


def models(vocab_size: int) -> dict[str, tuple[ModelConfig, ModelConfig]]:
  """(student, teacher) by the teacher's size relative to the student's."""
  small = named('tiny-1m', vocab_size=vocab_size)
  medium = named('tiny-3m', vocab_size=vocab_size)
  large = dataclasses.replace(small, d_model=512, n_layers=6, d_ff=1408, n_heads=8, n_kv_heads=8, head_dim=64)
  return {
    'smaller': (small, named('tiny-0.1m', vocab_size=vocab_size)),
    'equal': (medium, medium),
    '12x': (small, large),
  }


class Stepper:
  """A compiled step with its states, a teacher and a batch of random tokens, called again and again."""

  def __init__(
    self,
    student: Model,
    teacher: Model | None,
    alphas: list[float],
    mesh,
    rows: int = ROWS,
    tokens: int = TOKENS,
    mask_documents: bool = True,
  ):
    targets = tuple('teacher' if alpha else 'none' for alpha in alphas)
    recipe = Recipe(
      student, teacher, targets, adamw(OPTIMIZER), learning_rate(OPTIMIZER, 1000), 1e-3, LossConfig(), mask_documents
    )
    states, shardings = [], []
    for alpha in alphas:
      init = lambda key, alpha=alpha: init_state(recipe, alpha_state(alpha, AlphaSchedule(), 1000), key)
      shardings.append(state_shardings(recipe, jax.eval_shape(init, jax.random.key(0)), mesh))
      states.append(jax.jit(init, out_shardings=shardings[-1])(jax.random.key(0)))
    self.states = tuple(states)
    weights = jax.jit(lambda key: frozen.to_dtype(teacher.init(key), 'auto'))(jax.random.key(1)) if teacher else None
    self.teacher = Teacher(weights)
    self.step: Any = make_step(recipe, shardings)
    ids = np.random.default_rng(0).integers(0, student.config.vocab_size, (1, rows, tokens)).astype(np.int32)
    self.batch = {'tokens': ids, 'labels': np.roll(ids, -1, 2), 'segment_ids': np.ones_like(ids)}

  def __call__(self):
    self.states, metrics = self.step(self.states, self.teacher, self.batch, 1)
    return metrics


def teacher_forward(model: Model):
  """The teacher's hidden states and logits, reduced to one number a token so that nothing is left out."""
  params = model.init(jax.random.key(1))
  tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (ROWS, TOKENS)).astype(np.int32)

  @jax.jit
  def forward(params, tokens_BxT):
    hidden_BxTxD = model.hidden(params, tokens_BxT, jnp.ones_like(tokens_BxT))
    return jnp.dot(hidden_BxTxD, model.head(params), preferred_element_type=jnp.float32).max(-1)

  return lambda: forward(params, tokens)


def overhead(ratio: str, vocab_size: int, rounds: int, mesh) -> str:
  student, teacher = (build(config) for config in models(vocab_size)[ratio])
  runs = {
    'distil': Stepper(student, teacher, [0.4], mesh),
    'lm': Stepper(student, None, [0.0], mesh),
    'teacher': teacher_forward(teacher),
  }
  times = timing.seconds(runs, rounds)
  share = flops.forward_flops(teacher.config, TOKENS) / flops.training_flops(student.config, TOKENS)
  return (
    f'| {ratio} | {student.n_params / 1e6:.1f}M / {teacher.n_params / 1e6:.1f}M | {vocab_size} '
    f'| {timing.ratio(times["distil"], times["lm"] + times["teacher"])} '
    f'| {timing.ratio(times["distil"], times["lm"])} | {1 + share:.2f} |'
  )


def cohort(ratio: str, k: int, vocab_size: int, rounds: int, mesh) -> str:
  student, teacher = (build(config) for config in models(vocab_size)[ratio])
  alphas = list(np.linspace(0.1, 0.9, k))
  runs = {
    'cohort': Stepper(student, teacher, alphas, mesh),
    'single': Stepper(student, teacher, [0.4], mesh),
    'lm': Stepper(student, None, [0.0], mesh),
    'teacher': teacher_forward(teacher),
  }
  times = timing.seconds(runs, rounds)
  ideal = k * times['lm'] + times['teacher']
  return f'| {ratio} | {k} | {timing.ratio(times["cohort"], k * times["single"])} | {timing.ratio(ideal, k * times["single"])} |'


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--rounds', type=int, default=7)
  parser.add_argument('--vocab', type=int, default=4096)
  parser.add_argument('--cohorts', default='2,4,8')
  parser.add_argument('--only', choices=('overhead', 'cohort'))
  args = parser.parse_args()
  print(timing.environment())
  mesh = make_mesh(MeshConfig())
  with jax.set_mesh(mesh):
    if args.only != 'cohort':
      print('| teacher | student / teacher | V | distil / (LM + teacher forward) | distil / LM | by model FLOPs |')
      print('|---|---|---|---|---|---|')
      for ratio in ('smaller', 'equal', '12x'):
        print(overhead(ratio, args.vocab, args.rounds, mesh), flush=True)
    if args.only != 'overhead':
      print('| teacher | K | cohort / K separate | ideal: (K LM + teacher) / K separate |')
      print('|---|---|---|---|')
      for ratio in ('equal', '12x'):
        for k in map(int, args.cohorts.split(',')):
          print(cohort(ratio, k, args.vocab, args.rounds, mesh), flush=True)


if __name__ == '__main__':
  main()
