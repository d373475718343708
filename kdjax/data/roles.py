"""Roles of a tokenizer's special tokens: beginning, end, separator, padding.

They are four roles, and a tokenizer may give them to one token or to four. Each is read from the first of these that names it: what the
tokenizer's post-processor puts around a text, tokenizer_config.json (and special_tokens_map.json, its older form), config.json,
generation_config.json, and last the usual names.
"""

import dataclasses
import functools
import itertools
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import tokenizers

from kdjax import paths
from kdjax.errors import UserError

log = logging.getLogger('kdjax')

POST_PROCESSOR, TOKENIZER_CONFIG, MODEL_CONFIG, GENERATION_CONFIG = (
  'the post-processor', 'tokenizer_config.json', 'config.json', 'generation_config.json'
)  # fmt: skip
# Which field of each file names a role's token, in the order in which the files are asked.
FIELDS = {
  TOKENIZER_CONFIG: '{}_token',
  'special_tokens_map.json': '{}_token',
  MODEL_CONFIG: '{}_token_id',
  GENERATION_CONFIG: '{}_token_id',
}
_SHORT = {'begin': 'bos', 'end': 'eos', 'padding': 'pad'}
_SHARED = '<|endoftext|>'
# (begin, end) by name, the likeliest first; the one that is shared ends a document by starting the next.
_PAIRS = (
  (_SHARED, _SHARED),
  ('<|begin_of_text|>', '<|end_of_text|>'),
  ('<s>', '</s>'),
  ('<bos>', '<eos>'),
  ('<|bos|>', '<|eos|>'),
  ('[BOS]', '[EOS]'),
  ('<BOS>', '<EOS>'),
  ('<|startoftext|>', _SHARED),
  ('<｜begin▁of▁sentence｜>', '<｜end▁of▁sentence｜>'),
)
_ENDS = (
  '<|end_of_text|>',
  '</s>',
  '<eos>',
  '<|eos|>',
  '<|im_end|>',
  '[EOS]',
  '[SEP]',
  '<EOS>',
  '<｜end▁of▁sentence｜>',
)
_PADDINGS = ('<pad>', '[PAD]', '<|pad|>', '<|padding|>', '<PAD>', '<|finetune_right_pad_id|>')
USUAL = tuple(dict.fromkeys([*(begin for begin, _ in _PAIRS), *_ENDS]))
_PROBES = ('a', '0', 'A', ' a', '一', '!')


@dataclasses.dataclass(frozen=True)
class Roles:
  """The token of each role; '' where there is none.

  Attributes:
    separator: starts each document in a store: `begin`, or where there is none the token that separates documents.
    end: ends a text. Where it is the separator too, the next document's start is the end of the one before.
    begin: begins a text.
    padding: fills up a batch.
    stops: the tokens at which generation stops, `end` first.
  """

  separator: str
  end: str
  begin: str = ''
  padding: str = ''
  stops: tuple[str, ...] = ()

  def __post_init__(self):
    object.__setattr__(self, 'stops', tuple(dict.fromkeys((self.end, *self.stops))))

  @property
  def closes(self) -> bool:
    """Whether a document in a store ends with a token of its own."""
    return self.end != self.separator

  @property
  def tokens(self) -> tuple[str, ...]:
    """Every token that has a role."""
    return tuple(t for t in dict.fromkeys((self.separator, self.begin, self.padding, *self.stops)) if t)

  def as_dict(self) -> dict[str, Any]:
    return dataclasses.asdict(self) | {'stops': list(self.stops)}

  def __str__(self) -> str:
    if self.closes:
      told = f'documents start with {self.separator} and end with {self.end}'
    else:
      told = f'documents start and end with {self.separator}'
    told += '' if self.begin else ', no beginning token'
    told += f', generation stops at {" ".join(self.stops)}' if len(self.stops) > 1 else ''
    return f'{told}, padding {self.padding or "none"}'


def one_for_all(token: str, found: Roles | None = None, unmarked: Sequence[str] = ()) -> Roles:
  """The roles where one token starts and ends documents. Padding and further stops are those `found`, less the `unmarked`."""
  if found is None:
    return Roles(token, token, token)
  padding = '' if found.padding in unmarked else found.padding
  return Roles(token, token, token, padding, tuple(stop for stop in found.stops if stop not in unmarked))


def read(model: tokenizers.Tokenizer, files: Mapping[str, Mapping[str, Any]], name: str) -> Roles | None:
  """Reads the roles of a tokenizer; None where nothing names a token that begins or ends a text.

  Args:
    model: without truncation and padding.
    files: those of FIELDS that are beside the tokenizer.
    name: what the log calls the tokenizer.
  """
  said = {role: list(_statements(role, model, files)) for role in _SHORT}
  for note in _missing(model, files):
    _log_once(f'{name}: {note}')
  names = _Names(model)
  has_none = _denies_begin(files) and not said['begin']
  begin, end = _first(said['begin']), _first(said['end'])
  begin, end = names.complete(begin, end, has_none)
  separator = begin or _first(_by_files('begin', model, files)) or names.shared or end
  if not separator:
    return None
  end = end or separator
  for role in ('begin', 'end'):
    for note in _disagreements(role, said[role]):
      _log_once(f'{name}: {note}')
  return Roles(separator, end, begin, _first(said['padding']) or names.padding, _stops(model, files))


def beside(folder: str | paths.Path | None) -> dict[str, dict[str, Any]]:
  """The files of a tokenizer's folder that may name roles. Raises UserError for one that is not a JSON object."""
  return {} if folder is None else {name: value for name in FIELDS if (value := _json(paths.Path(folder) / name))}


def _json(file: paths.Path) -> dict[str, Any] | None:
  try:
    value = json.loads(paths.read_bytes(file))
  except (FileNotFoundError, NotADirectoryError):
    return None
  except (ValueError, RecursionError) as e:
    raise UserError(f'{file}: not JSON ({e}); fetch it again') from None
  if not isinstance(value, dict):
    raise UserError(f'{file}: a {type(value).__name__}, not an object with fields; fetch it again')
  return value


def _statements(
  role: str, model: tokenizers.Tokenizer, files: Mapping[str, Mapping[str, Any]]
) -> Iterator[tuple[str, tuple[str, ...]]]:
  """(who says it, the tokens) for each source that names the role's token, in their order."""
  before, after = _around(model)
  around = {'begin': before, 'end': after}.get(role)
  if around:
    yield POST_PROCESSOR, around[:1]
  if not (role == 'begin' and _denies_begin(files)):
    yield from _by_files(role, model, files)


def _by_files(
  role: str, model: tokenizers.Tokenizer, files: Mapping[str, Mapping[str, Any]]
) -> Iterator[tuple[str, tuple[str, ...]]]:
  for file, field in FIELDS.items():
    if tokens := _tokens(files.get(file, {}).get(field.format(_SHORT[role])), model):
      yield file, tokens


def _denies_begin(files: Mapping[str, Mapping[str, Any]]) -> bool:
  """Whether tokenizer_config.json says that there is no beginning token (Qwen), and not merely nothing."""
  return files.get(TOKENIZER_CONFIG, {}).get('bos_token', '') is None


def _around(model: tokenizers.Tokenizer) -> tuple[tuple[str, ...], tuple[str, ...]]:
  """The tokens that the post-processor puts before and after a text. Asked of the tokenizer itself: it knows every kind."""
  for probe in itertools.chain(_PROBES, _words(model)):
    plain, whole = (_encode(model, probe, special) for special in (False, True))
    at = next((i for i in range(len(whole) - len(plain) + 1) if whole[i : i + len(plain)] == plain), None)
    if plain and at is not None:
      named = lambda ids: tuple(t for t in map(model.id_to_token, ids) if t)
      return named(whole[:at]), named(whole[at + len(plain) :])
  return (), ()


def _words(model: tokenizers.Tokenizer) -> Iterator[str]:
  """A few entries of the vocabulary, for models that can encode nothing else."""
  yield from itertools.islice(model.get_vocab(with_added_tokens=False), 8)


def _encode(model: tokenizers.Tokenizer, text: str, special: bool) -> list[int]:
  try:
    return model.encode(text, add_special_tokens=special).ids
  except Exception:  # the class that `tokenizers` raises where a model without an unknown token meets an unknown word
    return []


def _tokens(value: Any, model: tokenizers.Tokenizer) -> tuple[str, ...]:
  """The tokens of the vocabulary that a field names: by content, by id, as an AddedToken's fields, or a list of these."""
  if isinstance(value, Mapping):
    value = value.get('content')
  if isinstance(value, list):
    return tuple(dict.fromkeys(token for one in value for token in _tokens(one, model)))
  if type(value) is int:
    token = model.id_to_token(value) if 0 <= value < 1 << 32 else None
    # An id that config.json has kept of another tokenizer is a piece of text in this one.
    token = token if token in USUAL or token in _PADDINGS or token in _added(model) else None
  else:
    token = value if isinstance(value, str) and model.token_to_id(value) is not None else None
  return (token,) if token else ()


def _added(model: tokenizers.Tokenizer) -> set[str]:
  return {token.content for token in model.get_added_tokens_decoder().values()}


def _stops(model: tokenizers.Tokenizer, files: Mapping[str, Mapping[str, Any]]) -> tuple[str, ...]:
  """Where transformers stops: generation_config.json's end tokens, or without them config.json's; and the tokenizer's own."""
  known = dict(_by_files('end', model, files))
  return (*known.get(TOKENIZER_CONFIG, ()), *(known.get(GENERATION_CONFIG) or known.get(MODEL_CONFIG, ())))


def _missing(model: tokenizers.Tokenizer, files: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
  """A line for each token that tokenizer_config.json names and the vocabulary lacks."""
  for short in ('bos', 'eos'):
    value = files.get(TOKENIZER_CONFIG, {}).get(f'{short}_token')
    if value and not _tokens(value, model):
      yield f'{TOKENIZER_CONFIG} names the {short}_token {value!r}, which is not in the vocabulary; that is ignored'


def _disagreements(role: str, said: Sequence[tuple[str, tuple[str, ...]]]) -> Iterator[str]:
  """A line for each source that names another token than the first source does, which is used."""
  # transformers stops at generation_config.json's end tokens, and looks at config.json's only where there are none.
  ignored = {MODEL_CONFIG} if role == 'end' and any(who == GENERATION_CONFIG for who, _ in said) else set()
  for who, tokens in said[1:]:
    if said[0][1][0] not in tokens and who not in ignored:
      used = said[0][1][0]
      yield f'{said[0][0]} names {used} as the {role} token, {who} names {" ".join(tokens)}; {used} is used'


def _first(said: Any) -> str:
  return next((tokens[0] for _, tokens in said), '')


class _Names:
  """The usual names that a vocabulary holds: those of special tokens count first."""

  def __init__(self, model: tokenizers.Tokenizer):
    added = model.get_added_tokens_decoder().values()
    self._special = {token.content for token in added if token.special}
    self._model = model

  @property
  def shared(self) -> str:
    return _SHARED if _SHARED in self._special else ''

  @property
  def padding(self) -> str:
    return next((name for name in _PADDINGS if name in self._special), '')

  def complete(self, begin: str, end: str, has_no_begin: bool) -> tuple[str, str]:
    """(begin, end), with what is missing filled in by name: first the partner of the one that is known."""
    if not begin and not end:
      return self._guess(has_no_begin)
    if not end:
      return begin, self._pick([e for b, e in _PAIRS if b == begin] + [*_ENDS, _SHARED]) or begin
    if not begin and not has_no_begin:
      begin = self._pick([b for b, e in _PAIRS if e == end], [b for b, e in _PAIRS if b != e])
    return begin, end

  def _guess(self, has_no_begin: bool) -> tuple[str, str]:
    for there in (self._is_special, self._exists):
      for begin, end in _PAIRS:
        if there(begin):
          found = end if self._exists(end) else self._pick(_ENDS)
          return ('' if has_no_begin else begin), found or begin
      if end := next(filter(there, _ENDS), ''):
        return '', end
    return '', ''

  def _pick(self, names: Sequence[str], special: Sequence[str] = ()) -> str:
    """The first name of the special tokens, else of the vocabulary; those of `special` only where they are special."""
    found = next(filter(self._is_special, (*names, *special)), '')
    return found or next(filter(self._exists, names), '')

  def _is_special(self, name: str) -> bool:
    return name in self._special

  def _exists(self, name: str) -> bool:
    return self._model.token_to_id(name) is not None


@functools.cache
def _log_once(line: str) -> None:
  log.warning('%s', line)
