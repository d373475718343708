"""Roles of a tokenizer's special tokens: begin, end, separator, padding.

One token may have all four roles, or each role its own token. A role is read from the first of these sources that names it: the tokens that
the tokenizer's post-processor puts around a text, tokenizer_config.json (and its older form, special_tokens_map.json), config.json,
generation_config.json, and finally a list of common token names.
"""

import dataclasses
import functools
import itertools
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import tokenizers

from kdjax.errors import UserError
from kdjax.storage import paths

log = logging.getLogger('kdjax')

POST_PROCESSOR, TOKENIZER_CONFIG, MODEL_CONFIG, GENERATION_CONFIG = (
  'the post-processor', 'tokenizer_config.json', 'config.json', 'generation_config.json'
)  # fmt: skip
# The field of each file that names a role's token, in order of precedence.
FIELDS = {
  TOKENIZER_CONFIG: '{}_token',
  'special_tokens_map.json': '{}_token',
  MODEL_CONFIG: '{}_token_id',
  GENERATION_CONFIG: '{}_token_id',
}
_SHORT = {'begin': 'bos', 'end': 'eos', 'padding': 'pad'}
_SHARED = '<|endoftext|>'
# Common (begin, end) names, the likeliest first. A shared token ends a document by starting the next one.
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
  """The token of each role; '' if there is none.

  Attributes:
    separator: starts each document in a store: `begin`, or without one the token that separates documents.
    end: ends a text. If it equals the separator, the start of the next document ends a document.
    begin: begins a text.
    padding: pads a batch.
    stops: the tokens that stop generation, `end` first.
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
    """Return whether documents in a store have their own end token."""
    return self.end != self.separator

  @property
  def tokens(self) -> tuple[str, ...]:
    """All tokens that have a role."""
    return tuple(t for t in dict.fromkeys((self.separator, self.begin, self.padding, *self.stops)) if t)

  def as_dict(self) -> dict[str, Any]:
    return dataclasses.asdict(self) | {'stops': list(self.stops)}

  def __str__(self) -> str:
    if self.closes:
      line = f'documents start with {self.separator} and end with {self.end}'
    else:
      line = f'documents start and end with {self.separator}'
    line += '' if self.begin else ', no begin token'
    line += f', generation stops at {" ".join(self.stops)}' if len(self.stops) > 1 else ''
    return f'{line}, padding {self.padding or "none"}'


def share_token(token: str, found: Roles | None = None, unmarked: Sequence[str] = ()) -> Roles:
  """Return roles with one token that starts and ends documents. Take padding and further stops from `found`, except `unmarked` tokens."""
  if found is None:
    return Roles(token, token, token)
  padding = '' if found.padding in unmarked else found.padding
  return Roles(token, token, token, padding, tuple(stop for stop in found.stops if stop not in unmarked))


def read_roles(model: tokenizers.Tokenizer, files: Mapping[str, Mapping[str, Any]], name: str) -> Roles | None:
  """Read the roles of a tokenizer; None if no source names a token that begins or ends a text.

  Args:
    model: without truncation and padding.
    files: the files of FIELDS in the tokenizer's folder.
    name: the tokenizer's name in log messages.
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


def read_files(folder: str | paths.Path | None) -> dict[str, dict[str, Any]]:
  """Read the files of a tokenizer's folder that may name roles. Raises UserError if one is not a JSON object."""
  return {} if folder is None else {name: value for name in FIELDS if (value := _json(paths.Path(folder) / name))}


def _json(file: paths.Path) -> dict[str, Any] | None:
  try:
    value = paths.parse_json(paths.read_bytes(file))
  except (FileNotFoundError, NotADirectoryError):
    return None
  except ValueError as e:
    raise UserError(f'{file}: not JSON ({e}); fetch it again') from None
  if not isinstance(value, dict):
    raise UserError(f'{file}: not a JSON object but a {type(value).__name__}; fetch it again')
  return value


def _statements(
  role: str, model: tokenizers.Tokenizer, files: Mapping[str, Mapping[str, Any]]
) -> Iterator[tuple[str, tuple[str, ...]]]:
  """Yield (source, its tokens) for each source that names the role's token, in order of precedence."""
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
  """Return whether tokenizer_config.json sets the begin token to null (Qwen), rather than omitting it."""
  return files.get(TOKENIZER_CONFIG, {}).get('bos_token', '') is None


def _around(model: tokenizers.Tokenizer) -> tuple[tuple[str, ...], tuple[str, ...]]:
  """Find the tokens that the post-processor puts before and after a text, by encoding a probe: this works for every type of post-processor."""
  for probe in itertools.chain(_PROBES, _words(model)):
    plain, whole = (_encode(model, probe, special) for special in (False, True))
    at = next((i for i in range(len(whole) - len(plain) + 1) if whole[i : i + len(plain)] == plain), None)
    if plain and at is not None:
      named = lambda ids: tuple(t for t in map(model.id_to_token, ids) if t)
      return named(whole[:at]), named(whole[at + len(plain) :])
  return (), ()


def _words(model: tokenizers.Tokenizer) -> Iterator[str]:
  """Yield a few entries of the vocabulary, for models that cannot encode the probes."""
  yield from itertools.islice(model.get_vocab(with_added_tokens=False), 8)


def _encode(model: tokenizers.Tokenizer, text: str, special: bool) -> list[int]:
  try:
    return model.encode(text, add_special_tokens=special).ids
  except Exception:  # the class that `tokenizers` raises for an unknown word, if the model has no unknown token
    return []


def _tokens(value: Any, model: tokenizers.Tokenizer) -> tuple[str, ...]:
  """Return the tokens of the vocabulary that a field names: by content, by id, as the fields of an AddedToken, or a list of these."""
  if isinstance(value, Mapping):
    value = value.get('content')
  if isinstance(value, list):
    return tuple(dict.fromkeys(token for one in value for token in _tokens(one, model)))
  if type(value) is int:
    token = model.id_to_token(value) if 0 <= value < 1 << 32 else None
    # config.json may have kept the id of another tokenizer, where this one has a piece of text.
    token = token if token in USUAL or token in _PADDINGS or token in _added(model) else None
  else:
    is_text = isinstance(value, str) and not re.search('[\ud800-\udfff]', value)  # JSON can hold half a surrogate pair
    token = value if is_text and model.token_to_id(value) is not None else None
  return (token,) if token else ()


def _added(model: tokenizers.Tokenizer) -> set[str]:
  return {token.content for token in model.get_added_tokens_decoder().values()}


def _stops(model: tokenizers.Tokenizer, files: Mapping[str, Mapping[str, Any]]) -> tuple[str, ...]:
  """Return the tokens at which transformers stops: the tokenizer's, and those of generation_config.json or else config.json."""
  known = dict(_by_files('end', model, files))
  return (*known.get(TOKENIZER_CONFIG, ()), *(known.get(GENERATION_CONFIG) or known.get(MODEL_CONFIG, ())))


def _missing(model: tokenizers.Tokenizer, files: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
  """Yield a log line for each token that tokenizer_config.json names and the vocabulary lacks."""
  for short in ('bos', 'eos'):
    value = files.get(TOKENIZER_CONFIG, {}).get(f'{short}_token')
    if value and not _tokens(value, model):
      yield f'{TOKENIZER_CONFIG} names the {short}_token {value!r}, which is not in the vocabulary; ignoring it'


def _disagreements(role: str, said: Sequence[tuple[str, tuple[str, ...]]]) -> Iterator[str]:
  """Yield a log line for each source that disagrees with the first source, which wins."""
  # transformers stops at generation_config.json's end tokens, and reads config.json's only if there are none.
  ignored = {MODEL_CONFIG} if role == 'end' and any(who == GENERATION_CONFIG for who, _ in said) else set()
  for who, tokens in said[1:]:
    if said[0][1][0] not in tokens and who not in ignored:
      used = said[0][1][0]
      yield f'{said[0][0]} names {used} as the {role} token, {who} names {" ".join(tokens)}; using {used}'


def _first(said: Any) -> str:
  return next((tokens[0] for _, tokens in said), '')


class _Names:
  """Finds common token names in a vocabulary, special tokens first."""

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
    """Return (begin, end) with a missing one filled in by name: preferably the usual partner of the known one."""
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
    """Return the first of `names` that is a special token, else the first in the vocabulary. Names in `special` count only as special tokens."""
    found = next(filter(self._is_special, (*names, *special)), '')
    return found or next(filter(self._exists, names), '')

  def _is_special(self, name: str) -> bool:
    return name in self._special

  def _exists(self, name: str) -> bool:
    return self._model.token_to_id(name) is not None


@functools.cache
def _log_once(line: str) -> None:
  log.warning('%s', line)
