"""Models as values: `build(config)` gives a `Model`, `named(name)` a known config."""

from kdjax.models.decoder import Model, build
from kdjax.models.named import NAMED, named

__all__ = ['NAMED', 'Model', 'build', 'named']
