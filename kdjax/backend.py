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
  """All devices of all processes. Raises UserError where JAX finds none that it may use: JAX_PLATFORMS names others, or XLA_FLAGS is wrong."""
  environment.check_xla_flags()
  try:
    return jax.devices()
  except (RuntimeError, AssertionError) as e:
    # JAX_PLATFORMS=cuda without a GPU is an AssertionError without a word.
    reason = (str(e).splitlines() or ['this machine has none'])[0].partition(' (set JAX_PLATFORMS')[0][:200]
    asked = jax.config.jax_platforms  # type: ignore[attr-defined]
    if not asked:
      raise UserError(f'JAX finds no device ({reason}); JAX_PLATFORMS=cpu uses the CPU') from None
    raise UserError(
      f'JAX_PLATFORMS={asked}: JAX cannot use such a device here ({reason}); unset it, or name one that is here, as JAX_PLATFORMS=cpu'
    ) from None


@contextlib.contextmanager
def compiling_for(platform: str) -> Iterator[None]:
  """Inside, programs are made for `platform`, whatever runs here."""
  token = _COMPILED_FOR.set(platform)
  try:
    yield
  finally:
    _COMPILED_FOR.reset(token)
