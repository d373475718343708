"""The classic: a teacher larger than the student, on as many tokens.

python -m kdjax.train --config=configs/strong2weak.py                 two CPU cores
python -m kdjax.train --config=configs/strong2weak.py:scale=colab     one accelerator
python -m kdjax.train --config=configs/strong2weak.py:scale=paper     a pod: 8B teacher, 1.7B student
"""

from kdjax.config import scales


def get_config(arg=None):
  return scales.get_config('strong2weak', arg, alpha=0.6)
