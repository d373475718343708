"""How many tokens of logits exist at a time: a chunk of the loss's scan, and on CPU the rows of it that go through the cache together."""

from kdjax.config import LossConfig
from kdjax.runtime import backend

CACHE_BYTES = 1 << 20  # of one array of logits, of the handful that a row's sums and gradients are made of
SMALLEST_BLOCK = 2  # rows; below it the loop costs more than the cache gains
CPU_EVALUATION = 512  # tokens


def chunk_tokens(loss: LossConfig, n_tokens: int, columns: int, students: int = 1) -> int:
  """Tokens a chunk: as many as the memory budget allows, the chunks of about one size.

  A chunk of C tokens over V columns holds arrays of C x V float32. On CPU, where rows go through the cache in blocks, these are the models'
  logits and the gradients, 1 + 2 K with K students; elsewhere about 3 + 4 K at the peak. The budget is 256 MB on CPU and 4 GB on
  accelerators, whose matrix units want long chunks; without a budget of the user's no chunk is under 256 tokens, where adding to the
  head's gradient, once a chunk, would take a tenth of the time of the products.
  """
  if loss.chunk_tokens:
    return min(loss.chunk_tokens, n_tokens)
  cpu = backend.name() == 'cpu'
  megabytes, arrays, multiple = (256, 1 + 2 * students, 16) if cpu else (4096, 3 + 4 * students, 128)
  fits = (loss.chunk_megabytes or megabytes) * 2**20 // (4 * columns * arrays)
  n_chunks = -(-n_tokens // max(fits, multiple if loss.chunk_megabytes else 256))
  even = -(-n_tokens // n_chunks)
  return min(n_tokens, -(-even // multiple) * multiple)


def evaluation_tokens(loss: LossConfig, n_tokens: int, columns: int) -> int:
  """The same for an evaluation, where nothing is summed over chunks: on CPU small ones, whose pages are touched once and not anew for each batch."""
  chunk = chunk_tokens(loss, n_tokens, columns)
  return min(chunk, CPU_EVALUATION) if backend.name() == 'cpu' and not loss.chunk_tokens else chunk


def cache_rows(n_rows: int, width: int) -> int:
  """Rows of logits that fit the cache: a power of two that divides the chunk; all of it where there is none."""
  if backend.name() != 'cpu':
    return n_rows
  block = 1 << (CACHE_BYTES // (4 * width)).bit_length() - 1 if 4 * width <= CACHE_BYTES else 1
  while n_rows % block:
    block //= 2
  return block if block >= SMALLEST_BLOCK else n_rows
