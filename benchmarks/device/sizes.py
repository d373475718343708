"""Sizes of the measurements: the paper's shapes where the memory allows them, tiny ones for a dry run."""

import dataclasses
import functools

import jax


@dataclasses.dataclass(frozen=True)
class Size:
  """The device is asked for its memory only by a size that depends on it: a part that starts kdjax.train must leave the device free."""

  tiny: bool

  @functools.cached_property
  def memory_gib(self) -> float:
    """Of one device; 0: unknown."""
    return (jax.local_devices()[0].memory_stats() or {}).get('bytes_limit', 0) / 2**30

  @property
  def loss(self) -> tuple[int, int, int]:
    """Tokens, width of student and teacher, vocabulary."""
    if self.tiny:
      return 64, 16, 256
    return (8192, 2048, 128_256) if self.memory_gib >= 30 else (4096, 1024, 32_768)

  @property
  def checked(self) -> tuple[int, int, int]:
    """The same where the host computes a float64 reference."""
    return (32, 16, 128) if self.tiny else (512, 512, 32_768)

  @property
  def attention(self) -> tuple[int, int, int, int, int]:
    """Rows, tokens, query heads, key heads, head_dim."""
    return (2, 32, 4, 2, 16) if self.tiny else (2, 1024, 16, 4, 128)

  @property
  def models(self) -> tuple[str, str, int]:
    """Student, teacher, and how many layers of each; 0: all."""
    if self.tiny:
      return 'tiny-1m', 'tiny-0.1m', 1
    return 'llama3-1.7b', 'llama3-0.5b', 0 if self.memory_gib >= 40 else 4

  @property
  def window(self) -> tuple[int, int]:
    """Rows and tokens of a step. A 1.7B student with its moments and gradients takes 27 GB."""
    return (2, 32) if self.tiny else (4 if self.memory_gib >= 60 else 1, 8192)

  @property
  def calls(self) -> int:
    """Timed repetitions."""
    return 2 if self.tiny else 10
