"""Models as values: `build(config)` returns a `Model`, with its parameters, hidden states and head; their FLOPs; sampling from them.

Nothing here knows a loss, an optimizer or a file.
"""

from kdjax.models.decoder import Model, build

__all__ = ['Model', 'build']
