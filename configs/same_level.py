"""A teacher of the student's own size and budget, from another seed.

python -m kdjax.train --config=configs/same_level.py                 two CPU cores
python -m kdjax.train --config=configs/same_level.py:scale=colab     one accelerator
python -m kdjax.train --config=configs/same_level.py:scale=paper     a pod: 1.7B teacher and student
"""

from kdjax.config import scales


def get_config(arg=None):
  return scales.get_config('same_level', arg, alpha=0.4)
