"""Language models pretrained with distillation, in JAX.

Importing the package imports no other library. `python -m kdjax.COMMAND` prepares its process here, before its imports, which take seconds.
"""

from kdjax.runtime import startup

if command := startup.command():
  startup.prepare(command)
