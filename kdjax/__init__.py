"""Language models pretrained with distillation, in JAX.

Importing the package imports no library. `python -m kdjax.COMMAND` prepares its process here, before the seconds of imports that follow.
"""

from kdjax.runtime import startup

if command := startup.command():
  startup.prepare(command)
