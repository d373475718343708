"""The house: imports run downward, rooms say what they are for, and CONTRIBUTING.md shows all of them."""

import ast
import pathlib
import re

import pytest

from tests.commands import REPO

FLOORS = (  # from the ground up; a room imports from its own floor and from those below
  {'errors', 'machine'},
  {'config', 'storage'},
  {'runtime', 'data'},
  {'models', 'losses'},
  {'runs'},
  {'teachers'},
  {'trainer', 'scoring'},
  {'sweeps', 'programs'},
  {'analysis'},
  {'cli'},
  {'train', 'evaluate', 'grid', 'report', 'prepare', 'generate', 'convert', 'harness', 'aot', '__main__'},
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
FILES = sorted(path for path in (REPO / 'kdjax').rglob('*.py') if path != REPO / 'kdjax' / '__init__.py')
ROOMS = sorted(path.parent for path in FILES if path.name == '__init__.py')
GUIDE = REPO / 'CONTRIBUTING.md'


def room(module: str) -> str:
  return module.split('.')[1] if '.' in module else '__main__'


def imported(path: pathlib.Path) -> set[str]:
  """The modules and packages of kdjax that a file imports."""
  found = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom) and (node.module or '').startswith('kdjax'):
      found |= {f'kdjax.{each.name}' for each in node.names} if node.module == 'kdjax' else {node.module}
    elif isinstance(node, ast.Import):
      found |= {each.name for each in node.names if each.name.startswith('kdjax.')}
  return found


@pytest.mark.parametrize('path', FILES, ids=lambda path: str(path.relative_to(REPO / 'kdjax')))
def test_imports_run_downward(path):
  own = path.relative_to(REPO / 'kdjax').parts[0].removesuffix('.py')
  assert own in FLOOR, f'{own} has no floor; add it to FLOORS and to {GUIDE.name}'
  upward = sorted(module for module in imported(path) if FLOOR[room(module)] > FLOOR[own])
  assert not upward


def test_no_two_rooms_of_one_floor_import_each_other():
  arrows = {
    (path.relative_to(REPO / 'kdjax').parts[0].removesuffix('.py'), room(module))
    for path in FILES
    for module in imported(path)
  }
  assert not [(a, b) for a, b in arrows if a < b and (b, a) in arrows]


@pytest.mark.parametrize('folder', ROOMS, ids=lambda path: path.name)
def test_a_room_says_what_it_is_for(folder):
  text = ast.get_docstring(ast.parse((folder / '__init__.py').read_text())) or ''
  assert len(text) > 40
  if folder.parent == REPO / 'kdjax':
    assert 'Nothing here' in text or 'nothing here' in text, 'say what must never be in it'


def test_the_guide_shows_every_room_and_every_file_that_it_names_exists():
  text = GUIDE.read_text()
  picture = text.partition('```')[2].partition('```')[0]
  shown = set(re.findall(r'[a-z_]+', picture))
  assert not {folder.name for folder in ROOMS} - shown
  named = re.findall(r'`((?:kdjax|configs|tests|launch|docs|benchmarks|notebooks)/[\w./-]*)`', text)
  assert len(named) > 20
  assert not [name for name in named if not (REPO / name).exists()]


def test_tests_mirror_the_rooms():
  rooms = {str(folder.relative_to(REPO / 'kdjax')) for folder in ROOMS}
  others = {'parity', 'launch', 'benchmarks'}  # against other projects; shell scripts; benchmarks
  folders = {str(path.parent.relative_to(REPO / 'tests')) for path in (REPO / 'tests').rglob('test_*.py')} - {'.'}
  assert folders - others <= rooms
  assert rooms <= folders


def test_the_hooks_are_the_checks_of_ci():
  hooks = re.findall(r'entry: (.+)', (REPO / '.pre-commit-config.yaml').read_text())
  ci = (REPO / '.ci' / 'run').read_text()
  stage = ci.partition("stage 'lint, format, types'")[2].partition('deactivate')[0]
  assert hooks == stage.strip().splitlines()
