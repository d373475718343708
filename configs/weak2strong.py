"""A weak teacher, smaller than the student and trained on three fifths of its tokens: does the student gain?

    python -m kdjax.train --config=configs/weak2strong.py                 two CPU cores, within ten minutes
    python -m kdjax.train --config=configs/weak2strong.py:scale=colab     one accelerator
    python -m kdjax.train --config=configs/weak2strong.py:scale=paper     a pod: 0.5B teacher, 1.7B student

Ends with a table and a figure. The outcome is printed as it comes.
"""

from kdjax.config import scales


def get_config(arg=None):
  return scales.get_config('weak2strong', arg, alpha=0.2, teacher_tokens=0.6)
