"""Which backend a program is made for: the one that runs here, or the one that it is only compiled for (kdjax/aot.py).

Whatever is 'auto' in a config (dtypes, attention, chunks) is settled by it.
"""

import contextlib
import contextvars
from collections.abc import Iterator

import jax

_COMPILED_FOR: contextvars.ContextVar[str] = contextvars.ContextVar('compiled_for', default='')


def name() -> str:
  """'cpu', 'gpu' or 'tpu'."""
  return _COMPILED_FOR.get() or jax.default_backend()


@contextlib.contextmanager
def compiling_for(platform: str) -> Iterator[None]:
  """Inside, programs are made for `platform`, whatever runs here."""
  token = _COMPILED_FOR.set(platform)
  try:
    yield
  finally:
    _COMPILED_FOR.reset(token)
