"""Pretrain language models with distillation, in JAX: sharded teacher and student in one compiled step.

`python -m kdjax` lists the commands; CONTRIBUTING.md maps the package.
Importing the package imports no other library.
"""

from kdjax.runtime import startup

__version__ = '0.2.0'

# `python -m kdjax.COMMAND`: prepare its process before its imports, which take seconds.
if command := startup.command():
  startup.prepare(command)
