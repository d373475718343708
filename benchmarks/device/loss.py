"""The fused loss over its four products and over dense optax, value and gradient: the student's update of one chunk of a large vocabulary."""

from collections.abc import Callable

import jax.numpy as jnp

from benchmarks.device.sizes import Size
from benchmarks.loss import Case, compare


def cases(size: Size) -> dict[str, Callable[[], dict]]:
  n, d, v = size.loss
  chunks = (None, n // 2, n)
  found = {
    f'bfloat16 T={t:g} chunk {c or "auto"}': Case(n, d, v, jnp.bfloat16, t, c)
    for t, cs in ((1.0, chunks), (2.0, chunks[:1]))
    for c in cs
  }
  return {name: lambda case=case: compare(case, size.calls) for name, case in found.items()}
