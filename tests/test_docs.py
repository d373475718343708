"""What README and docs say: links lead somewhere, commands and their flags exist, fields exist, Python blocks run."""

import concurrent.futures
import functools
import importlib
import pathlib
import re
import subprocess
import sys

import pytest

from kdjax.config import Config, leaves
from kdjax.sweeps.config import GridConfig

ROOT = pathlib.Path(__file__).parents[1]
PAGES = sorted([ROOT / 'README.md', *ROOT.glob('docs/*.md'), *ROOT.glob('docs/guides/*.md')])
MAPPINGS = ('eval.ood.', 'eval.tasks.')


def blocks(page: pathlib.Path, language: str) -> list[str]:
  return re.findall(rf'^ *```{language}\n(.*?)^ *```$', page.read_text(), re.M | re.S)


def commands(page: pathlib.Path) -> list[tuple[str, list[str]]]:
  """(module, flags) of each `python -m kdjax...` in the page, in a block or in a line."""
  text = page.read_text().replace('\\\n', ' ')
  found = re.findall(r'python -m (kdjax[\w.]*)([^`\n]*)', text)
  return [(module, re.findall(r'(?<=\s)--[\w.-]+', rest.partition(' -- ')[0])) for module, rest in found]


@functools.cache
def help_of(module: str) -> str:
  done = subprocess.run([sys.executable, '-m', module, '--help'], capture_output=True, text=True, cwd=ROOT, check=False)
  text = done.stdout
  for sub in set(re.findall(r'[{ ](from-hf|to-hf|plan|run|status)\b', text)):
    text += subprocess.run(
      [sys.executable, '-m', module, sub, '--help'], capture_output=True, text=True, cwd=ROOT, check=False
    ).stdout
  return text


@pytest.mark.parametrize('page', PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_that_are_there(page):
  links = re.findall(r'\]\(([^)#\s]+)(?:#[^)]*)?\)', page.read_text())
  missing = [link for link in links if not link.startswith('http') and not (page.parent / link).exists()]
  assert not missing
  named = re.findall(r'`((?:kdjax|configs|tests|launch|benchmarks|notebooks)/[\w./-]+\.\w+)`', page.read_text())
  assert not [name for name in named if not (ROOT / name).exists()]


@pytest.fixture(scope='module', autouse=True)
def helps():
  """All of them, asked two at a time."""
  modules = {module for page in PAGES for module, flags in commands(page) if set(flags) - {'--config'}}
  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    list(pool.map(help_of, modules))


@pytest.mark.parametrize('page', PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_flags_and_fields_exist(page):
  known = {name for kind in (Config, GridConfig) for name, _ in leaves(kind, '')}
  for module, flags in commands(page):
    assert importlib.util.find_spec(module), module
    for flag in flags:
      if flag == '--config':
        continue
      if flag.startswith('--config.'):
        field = flag.removeprefix('--config.')
        assert field in known or field.startswith(MAPPINGS), f'{page.name}: {flag}'
      else:
        assert flag in help_of(module), f'{page.name}: {module} {flag}'
  for field in re.findall(r'`--config\.([\w.]+\w)[=`]', page.read_text()):
    assert field in known or field.startswith(MAPPINGS) or any(name.startswith(f'{field}.') for name in known), field


@pytest.mark.parametrize('page', PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_blocks_run(page):
  for block in blocks(page, 'python'):
    exec(compile(block, str(page), 'exec'), {})


def test_the_checks_see_something():
  assert sum(len(commands(page)) for page in PAGES) > 30
  assert sum(len(blocks(page, 'python')) for page in PAGES) >= 2
  assert '--topology' in help_of('kdjax.aot') and '--shard-size' in help_of('kdjax.convert')


def test_the_site_is_built_without_a_warning(tmp_path):
  pytest.importorskip('sphinx', reason='sphinx is in the [dev] extra')
  done = subprocess.run(
    [sys.executable, '-m', 'sphinx', '-q', '-W', '--keep-going', 'docs', tmp_path],
    capture_output=True,
    text=True,
    cwd=ROOT,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  assert 'Checkpoints' in (tmp_path / 'api.html').read_text()


def test_the_page_of_the_config_is_what_the_fields_declare():
  done = subprocess.run(
    [sys.executable, '-c', "import sys; sys.path.insert(0, 'docs'); import generate; sys.stdout.write(generate.page())"],
    cwd=ROOT, capture_output=True, text=True, check=True,
  )  # fmt: skip
  assert done.stdout == (ROOT / 'docs' / 'config.md').read_text(), 'run python docs/generate.py'
