"""Which documents go where: by hashes of their content, so that it depends on their text and the seed alone."""

import hashlib

from kdjax.config import EvalConfig
from kdjax.storage import files


def split_documents(found: dict[str, int], shares: dict[str, float], rest: str, seed: int) -> dict[str, dict[str, int]]:
  """Split documents by a hash: each named share of them, and the rest; each split in the order of a second hash."""
  splits: dict[str, dict[str, int]] = {name: {} for name in (*shares, rest)}
  for doc in sorted(found, key=lambda doc: (_uniform(doc, seed, 'order'), doc)):
    u = _uniform(doc, seed, 'split')
    for name, share in (*shares.items(), (rest, 1.0)):
      if u < share or name == rest:
        splits[name][doc] = found[doc]
        break
      u -= share
  return splits


def mix(parts: list[dict[str, int]], weights: list[float]) -> dict[str, int]:
  """The parts' documents in one order, such that any stretch of it has the weights' shares of bytes; it ends with the first part that runs out.

  So nothing is seen twice, a slice of the mixture is such a mixture, and a run that reads it resumes like any other.
  """
  if len(parts) == 1:
    return parts[0]
  mixed: dict[str, int] = {}
  left, taken = [iter(part.items()) for part in parts], [0.0] * len(parts)
  while True:
    behind = min(range(len(parts)), key=lambda k: taken[k] / weights[k])
    doc, n_bytes = next(left[behind], ('', 0))
    if not doc:
      return mixed
    mixed[doc] = n_bytes
    taken[behind] += n_bytes


def cap(docs: dict[str, int], split: str, evals: EvalConfig) -> dict[str, int]:
  """The first documents that fit into the split's bytes (0: all), each cut to `max_document_bytes`, and at least one."""
  most = (evals.max_validation_bytes if split == 'validation' else 0) or evals.max_bytes
  kept: dict[str, int] = {}
  total = 0
  for doc, n_bytes in docs.items():
    n_bytes = min(n_bytes, evals.max_document_bytes or n_bytes)
    total += n_bytes
    if kept and most and total > most:
      break
    kept[doc] = n_bytes
  return kept


def content_hash(text: str) -> str:
  """What a document is known by."""
  return identify(text)[0]


def identify(text: str) -> tuple[str, int]:
  """Return (content hash, number of bytes) of a document's text in UTF-8."""
  data = text.encode()
  return files.digest(data), len(data)


def _uniform(doc: str, seed: int, purpose: str) -> float:
  """A number in [0, 1) that depends on the document, the seed and the purpose."""
  return int.from_bytes(hashlib.blake2b(f'{purpose}:{seed}:{doc}'.encode(), digest_size=8).digest()) / 2**64
