"""The grid behind docs/RESULTS.md: configs/grid.py at laptop scale, of fewer tokens, scored on four more sets and one downstream task.

    python -m kdjax.grid run --config=configs/evidence.py
    python -m kdjax.report --grid=runs/evidence-0123456789ab

The sets are public, but do not come with the package: JSON lines under data/, named below, from the sources that docs/RESULTS.md lists.
More and shorter documents than the laptop scale's default, as documents and not bytes are what an interval counts.
"""

from kdjax.grids import studies

OOD = {
  'web': 'data/ood/web_c4.jsonl.xz',  # C4
  'genres': 'data/ood/genres_gum.jsonl.xz',  # GUM
  'maths': 'data/ood/maths_gsm8k.jsonl.xz',  # GSM8K, questions with their worked answers
  'medical': 'data/ood/medical_pubmed.jsonl.xz',  # MEDLINE abstracts
}


def get_config(arg=None):
  config = studies.get_config(arg)
  config.name = 'evidence'
  config.base.eval.ood.update(OOD)
  config.base.eval.tasks.blimp = 'data/tasks/blimp.jsonl.xz'
  config.base.eval.max_items = 2000
  config.base.eval.max_document_bytes = 2_500
  config.base.eval.max_bytes = 100_000
  config.student_tokens = (307_200,)
  config.teacher_tokens = (102_400, 307_200, 512_000)  # a third of the student's, its own, and more
  config.include = ('teacher_tokens=102400|512000', 'teacher=tiny-0.3m')  # the student's own tokens only at its own size
  config.controls.flop_matched = ('logits+pretraining',)
  return config
