"""Which backend a program is made for: the one that runs here, or the one that it is only compiled for (kdjax/aot.py).

Whatever is 'auto' in a config (dtypes, attention, chunks) is settled by it.
"""

import contextlib
import contextvars
from collections.abc import Iterator

import jax

from kdjax.errors import UserError
from kdjax.runtime import environment

_COMPILED_FOR: contextvars.ContextVar[str] = contextvars.ContextVar('compiled_for', default='')


def name() -> str:
  """'cpu', 'gpu' or 'tpu'."""
  return _COMPILED_FOR.get() or jax.default_backend()


def devices() -> list[jax.Device]:
  """Return all devices of all processes. Raises UserError if JAX finds none: JAX_PLATFORMS names a missing platform, or XLA_FLAGS is wrong."""
  environment.check_xla_flags()
  try:
    return jax.devices()
  except (RuntimeError, AssertionError) as e:
    # JAX_PLATFORMS=cuda without a GPU raises an AssertionError without a message.
    reason = (str(e).splitlines() or ['this machine has none'])[0].partition(' (set JAX_PLATFORMS')[0][:200]
    asked = jax.config.jax_platforms  # type: ignore[attr-defined]
    if not asked:
      raise UserError(f'JAX finds no device ({reason}); set JAX_PLATFORMS=cpu to use the CPU') from None
    raise UserError(
      f'JAX_PLATFORMS={asked}: JAX cannot use this platform here ({reason}); unset it, or name an available platform, e.g. JAX_PLATFORMS=cpu'
    ) from None


@contextlib.contextmanager
def compiling_for(platform: str) -> Iterator[None]:
  """Inside, programs are made for `platform`, whatever runs here."""
  token = _COMPILED_FOR.set(platform)
  try:
    yield
  finally:
    _COMPILED_FOR.reset(token)
