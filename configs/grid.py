"""The four-axis grid: teacher size x teacher budget x student size x alpha, with the controls that a gain must stand beside.

    python -m kdjax.grid plan --config=configs/grid.py                                what it needs; runs nothing
    python -m kdjax.grid run --config=configs/grid.py                                 does what is missing; start it again at any time
    python -m kdjax.grid status --config=configs/grid.py
    python -m kdjax.grid plan --config=configs/grid.py:study=temperature,scale=paper  one of the paper's studies, at the paper's scale

Studies: main, size_alpha, student_size, horizon, teacher_budget, second_family, temperature, top_k, unnormalised, mechanism.
Scales: laptop (two CPU cores, hours), colab (one accelerator), paper (pods).
"""

from kdjax.sweeps import studies


def get_config(arg=None):
  return studies.get_config(arg)
