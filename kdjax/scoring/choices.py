"""Downstream multiple choice: the likelihood that a model gives to each answer's text, from JSON lines.

An item is one of four kinds, told apart by its fields (others, an `id` for one, are passed over):

    {"context": "He sat", "choices": [" down.", " blue."], "answer": 0}               choices: which text goes on
    {"contexts": ["... so Sarah", "... so Maria"], "continuation": " won.", "answer": 1}   partial: after which context
    {"good": "Cats sleep.", "bad": "Cats sleeps.", "paradigm": "agreement"}           pair: which whole sentence
    {"text": "... and sat on his chair"}                                              last_word: would it be written

Texts are joined as they stand, so a continuation carries its leading space. An item's context starts with the separator, as a document
does. Context and continuation are tokenised together, and the continuation's tokens are those after as many as the context has alone;
white space at the context's end goes to the continuation (lm-evaluation-harness's convention).

Where both do not fit into the window the context loses its oldest tokens. A continuation that is longer than the window by itself is
scored in strided windows, each token once, as a document is (kdjax/scoring/windows.py).
"""

import dataclasses
import functools
import logging
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from jax.sharding import Mesh

from kdjax.data.sources import mixture, records, seen_from, signature
from kdjax.data.text import without_surrogates
from kdjax.data.tokenizer import Tokenizer
from kdjax.errors import SourceGone, UserError
from kdjax.runs.metrics import Progress
from kdjax.scoring import likelihood
from kdjax.scoring.text import Scored
from kdjax.storage import paths
from kdjax.storage.files import canonical_json, digest

log = logging.getLogger('kdjax')

FIELDS = {
  'choices': ('context', 'choices', 'answer'),
  'partial': ('contexts', 'continuation', 'answer'),
  'pair': ('good', 'bad'),
  'last_word': ('text',),
}


class Item(NamedTuple):
  """A question: continuation i stands after context i, and number `answer` is the right one. `id` is a hash of all but the group."""

  id: str
  group: str
  contexts: tuple[str, ...]
  continuations: tuple[str, ...]
  answer: int
  kind: str


@dataclasses.dataclass(frozen=True)
class ChoiceSet:
  """A task's items, and the tokenizer of the models that answer them."""

  items: list[Item]
  tokenizer: Tokenizer

  @functools.cached_property
  def fingerprint(self) -> str:
    return digest(canonical_json([[item.id, item.group] for item in self.items]))

  @functools.cached_property
  def n_tokens(self) -> int:
    """Tokens of all continuations: those that are scored."""
    return sum(len(tokens) - 1 - first for tokens, first in _encode(self.items, self.tokenizer))


def read_choices(source: str) -> list[Item]:
  """Read the items of JSON lines (a path, a glob or several; also .gz, .xz, .zst), each distinct one once, in order.

  Raises UserError, with file and line, for a record of none of the four kinds, and for weights, because a task uses all of its items.
  """
  if mixture(source) != [(source, 1.0)]:
    raise UserError(f'{source}: a task uses all items of its files; remove the weights (@0.3)')
  return list(_read(source, signature(source)))


@functools.lru_cache(maxsize=32)  # a grid scores hundreds of models on the same tasks
def _read(source: str, signature: str) -> tuple[Item, ...]:
  items: dict[str, Item] = {}
  for where, record in records(source):
    item = _item(record, where)
    items.setdefault(item.id, item)
  if not items:
    raise UserError(f'{source}: there is no item in it')
  return tuple(items.values())


def read_tasks(
  tasks: Mapping[str, str], max_items: int = 0, folder: str = '', kept: pathlib.Path | None = None
) -> dict[str, list[Item]]:
  """Read the items of eval.tasks, by name.

  Args:
    max_items: the most items of each task (0: all). They are the first by hash, so the order of lines does not matter.
    folder: the base of relative paths; '': the current one.
    kept: a folder that keeps a copy of each task's items, used if its file is gone.
  """
  found = {}
  for name, source in tasks.items():
    try:
      items = _read_or_recall(source, folder, kept / f'{digest(source.encode())}.json' if kept else None)
    except UserError as e:
      raise UserError(f'eval.tasks.{name}: {e}') from e
    found[name] = sorted(items, key=lambda item: item.id)[:max_items] if max_items else items
  return found


def _read_or_recall(source: str, folder: str, copy: pathlib.Path | None) -> list[Item]:
  try:
    items = read_choices(seen_from(folder, source))
  except SourceGone:
    known = paths.read_json(copy) if copy else None
    if known is None:
      raise
    log.warning('the file of the task %r is gone; using the copy of its items in %s', source, copy)
    return [Item(id_, group, tuple(one), tuple(two), *rest) for id_, group, one, two, *rest in known['items']]
  if copy:
    paths.write_json(copy, {'source': source, 'items': items})
  return items


def score_choices(
  model: Scored,
  items: Sequence[Item],
  tokenizer: Tokenizer,
  window: int,
  batch_size: int,
  mesh: Mesh,
  progress: Progress | None = None,
) -> pd.DataFrame:
  """One row an item, in their order.

  Args:
    window: the most tokens that the model sees at once.
    batch_size: rows of `window` tokens on all devices together; of shorter rows there are more.

  Returns:
    Columns: doc (the item's id), group, answer, n_choices; logprob (nats), bytes and tokens of each continuation, as lists over the choices
    (if items differ in the number of choices, the shorter lists end in -inf, 0 and 0); predicted (the greatest logprob; on a tie in a
    pair, the bad sentence), predicted_norm (by logprob / bytes), correct and correct_norm (0 or 1); margin (nats: the answer's logprob
    minus the best other's), chance (1 / n_choices).
    The kind last_word has one choice, which is predicted where each of its tokens is the model's first (else -1), no margin (nan) and chance 0.

  Raises:
    UserError: a continuation has no tokens of its own.
  """
  requests = list(_encode(items, tokenizer))
  return _table(items, *likelihood.score_requests(model, requests, window, batch_size, mesh, progress))


def summarize(table: pd.DataFrame) -> dict[str, float]:
  """Return means over a task's items; `accuracy_norm` divides log-likelihoods by bytes."""
  return {
    'accuracy': float(table['correct'].mean()),
    'accuracy_norm': float(table['correct_norm'].mean()),
    'chance': float(table['chance'].mean()),
  }


# Reading.


def _item(record: dict[str, Any], where: str) -> Item:
  kind = next((kind for kind, fields in FIELDS.items() if all(field in record for field in fields)), '')
  group = ''
  match kind:
    case 'choices':
      continuations = _texts(record, 'choices', where, needed=True)
      contexts = (_text(record, 'context', where),) * len(continuations)
    case 'partial':
      contexts = _texts(record, 'contexts', where)
      continuations = (_text(record, 'continuation', where, needed=True),) * len(contexts)
    case 'pair':
      continuations = tuple(_text(record, field, where, needed=True) for field in ('good', 'bad'))
      contexts = ('', '')
      group = next((_text(record, field, where) for field in ('paradigm', 'field') if field in record), '')
    case 'last_word':
      context, _, word = _text(record, 'text', where).rstrip().rpartition(' ')
      if not context.strip():
        raise UserError(f"{where}: field 'text' has no last word after a context; give at least two words")
      contexts, continuations = (context,), (f' {word}',)
    case _:
      kinds = ' | '.join(', '.join(fields) for fields in FIELDS.values())
      raise UserError(f'{where}: it has the fields {sorted(record)}; an item has {kinds}')
  answer = record['answer'] if 'answer' in FIELDS[kind] else 0
  if type(answer) is not int or not 0 <= answer < len(continuations):
    raise UserError(
      f"{where}: field 'answer' must be the index of a choice, 0 to {len(continuations) - 1}, got {answer!r}"
    )
  id_ = digest(canonical_json([kind, contexts, continuations, answer]))
  return Item(id_, group, contexts, continuations, answer, kind)


def _texts(record: dict[str, Any], field: str, where: str, needed: bool = False) -> tuple[str, ...]:
  values = record[field]
  if not isinstance(values, list) or len(values) < 2:
    raise UserError(f'{where}: field {field!r} must be a list of at least two texts, got {_shown(values)}')
  return tuple(_checked(value, f'{field}[{i}]', where, needed) for i, value in enumerate(values))


def _text(record: dict[str, Any], field: str, where: str, needed: bool = False) -> str:
  return _checked(record[field], field, where, needed)


def _checked(value: Any, field: str, where: str, needed: bool) -> str:
  if not isinstance(value, str):
    raise UserError(f'{where}: field {field!r} must be text, got {_shown(value)}')
  if needed and not value.strip():
    raise UserError(f'{where}: field {field!r} is empty; mend or delete that line')
  return without_surrogates(value, where)


def _shown(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= 60 else f'{text[:57]}...'


# Tokens.


def _encode(items: Sequence[Item], tokenizer: Tokenizer) -> Iterator[tuple[np.ndarray, int]]:
  """(tokens [n + 1], first) of each continuation in turn: the separator, the context and it; prediction `first` is of its first token."""
  pairs = [_split(*pair) for item in items for pair in zip(item.contexts, item.continuations, strict=True)]
  texts = list(dict.fromkeys(text for context, continuation in pairs for text in (context, context + continuation)))
  ids = dict(zip(texts, tokenizer.encode_batch(texts), strict=True))
  for context, continuation in pairs:
    before, whole = ids[context], ids[context + continuation]
    # No longer than the context alone: the tokenizer merged across the seam. What differs is the continuation's.
    first = len(before) if len(before) < len(whole) else _common(before, whole)
    if first == len(whole):
      raise UserError(
        f'the tokenizer makes no token of {_shown(continuation)} after {_shown(context[-40:])}; mend that item'
      )
    yield np.concatenate([[tokenizer.separator_id], whole]).astype(np.int32), first


def _split(context: str, continuation: str) -> tuple[str, str]:
  kept = context.rstrip()
  return kept, context[len(kept) :] + continuation


def _common(a: np.ndarray, b: np.ndarray) -> int:
  n = min(len(a), len(b))
  return int(np.append(a[:n] == b[:n], False).argmin())


# The table.


def _table(items: Sequence[Item], logprob_Q, tokens_Q, greedy_Q) -> pd.DataFrame:
  n_N = np.asarray([len(item.continuations) for item in items])
  is_NxC = np.arange(n_N.max()) < n_N[:, None]

  def by_item(values_Q, missing):
    out_NxC = np.full(is_NxC.shape, missing, np.asarray(values_Q).dtype)
    out_NxC[is_NxC] = values_Q  # requests are in the order of items and of their choices
    return out_NxC

  bytes_Q = np.asarray([len(text.encode()) for item in items for text in item.continuations])
  logprob_NxC = by_item(logprob_Q, -np.inf)
  answer_N, at = np.asarray([item.answer for item in items]), np.arange(len(items))
  others_NxC = logprob_NxC.copy()
  others_NxC[at, answer_N] = -np.inf
  last_word_N, pair_N = (np.asarray([item.kind == kind for item in items]) for kind in ('last_word', 'pair'))
  greedy_N = np.where(by_item(greedy_Q, False)[:, 0], 0, -1)

  def best(values_NxC):
    """Return the index of the greatest value. On a tie it is the first, but in a pair the second (bad) one."""
    first_N = values_NxC.argmax(1)
    tie_N = pair_N & ((values_NxC == values_NxC.max(1, keepdims=True)).sum(1) > 1)
    return np.where(last_word_N, greedy_N, np.where(tie_N, 1, first_N))

  predicted_N, predicted_norm_N = best(logprob_NxC), best(by_item(logprob_Q / bytes_Q, -np.inf))
  return pd.DataFrame({
    'doc': [item.id.encode() for item in items],
    'group': [item.group for item in items],
    'answer': answer_N,
    'n_choices': n_N,
    'logprob': list(logprob_NxC),
    'bytes': list(by_item(bytes_Q, 0)),
    'tokens': list(by_item(tokens_Q, 0)),
    'predicted': predicted_N,
    'predicted_norm': predicted_norm_N,
    'correct': (predicted_N == answer_N).astype(float),
    'correct_norm': (predicted_norm_N == answer_N).astype(float),
    'margin': np.where(last_word_N, np.nan, logprob_NxC[at, answer_N] - others_NxC.max(1)),
    'chance': np.where(last_word_N, 0.0, 1 / n_N),
  })  # fmt: skip
