"""A weak teacher and a stronger student: does the student gain?

    python -m kdjax.train --config=configs/weak2strong.py                 laptop, two CPU cores
    python -m kdjax.train --config=configs/weak2strong.py:scale=colab     one accelerator, about 15 minutes
    python -m kdjax.train --config=configs/weak2strong.py:scale=paper     a pod; text and tokenizer to be named, see below
"""

from configs import common


def get_config(arg=None):
  return common.config('weak2strong', arg, teacher={'laptop': 'tiny-0.1m', 'colab': 'tiny-3m', 'paper': 'llama3-0.5b'}, alpha=0.4)
