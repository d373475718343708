"""The grid behind docs/RESULTS.md: configs/grid.py at laptop scale, of fewer tokens, scored on two more sets and one downstream task.

    python -m kdjax.grid run --config=configs/evidence.py
    python -m kdjax.report --grid=runs/evidence-0123456789ab

The sets are public, but do not come with the package: JSON lines under data/, named below, from the sources that docs/RESULTS.md lists.
Many short documents, as documents and not bytes are what an interval counts.
"""

from kdjax.sweeps import studies

OOD = {
  'web': 'data/ood/web_c4.jsonl.xz',  # C4
  'genres': 'data/ood/genres_gum.jsonl.xz',  # GUM
}


def get_config(arg=None):
  config = studies.get_config(arg)
  config.name = 'evidence'
  config.base.eval.ood.update(OOD)
  config.base.eval.tasks.blimp = 'data/tasks/blimp.jsonl.xz'
  # A model of this size is above chance by so little that a thousand pairs do not show it.
  config.base.eval.max_items = 6000
  config.base.eval.max_document_bytes = 600
  config.base.eval.max_bytes = 24_000
  config.base.eval.max_validation_bytes = 40_000
  config.student_tokens = (204_800,)
  config.teacher_tokens = (102_400, 409_600)  # half of the student's, and twice as many
  config.pilot.alpha = (0.0, 0.2, 0.4, 0.6, 0.8)
  config.controls.flop_matched = ('logits+pretraining',)
  return config
