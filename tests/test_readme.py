"""The README's commands are run: by .ci/run as they stand, or here at a tiny scale; its code runs; its links lead somewhere."""

import pathlib
import re
import shlex
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / 'README.md').read_text()
TINY = [
  '--config.data.vocab_size=300',
  '--config.student.tokens=4096',
  '--config.teacher.tokens=4096',
  '--config.eval.max_bytes=4000',
  '--config.eval.max_validation_bytes=4000',
]


def blocks(language: str) -> list[str]:
  return re.findall(rf'```{language}\n(.*?)```', README, flags=re.DOTALL)


def commands() -> list[str]:
  return [line for block in blocks('bash') for line in block.strip().splitlines()]


def in_ci(command: str) -> bool:
  return command in (ROOT / '.ci' / 'run').read_text()


def test_the_readme_has_the_commands_that_these_tests_look_for():
  assert len(commands()) >= 5
  assert any(in_ci(command) for command in commands())


@pytest.mark.slow
def test_every_command_that_ci_does_not_run_runs_at_a_tiny_scale(tmp_path):
  for command in commands():
    if in_ci(command) or command == 'pytest -m slow':  # the command that runs this test
      continue
    words = shlex.split(command.replace('runs/mine', str(tmp_path / 'mine')))
    assert words[:2] == ['python', '-m'], f'nothing runs {command!r}'
    plans = words[2] == 'kdjax.grid'  # runs nothing: as it stands
    if '--config' in command and not plans:
      words += [*TINY, f'--config.runs={tmp_path / "runs"}']
    done = subprocess.run(
      [sys.executable, *words[1:]], cwd=ROOT, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, f'{command}\n{done.stderr[-2000:]}'
    shown = {'kdjax.grid': 'students in', 'kdjax.generate': '--- distilled'}.get(words[2], 'in-domain')
    assert shown in done.stdout


def test_its_python_runs():
  for block in blocks('python'):
    exec(compile(block, 'README.md', 'exec'), {})


def test_its_files_and_pictures_exist():
  for target in re.findall(r'\]\((?!http)([^)#]+)\)', README):
    assert (ROOT / target).exists(), target
  for name in re.findall(r'`((?:kdjax|configs)/[\w/.]+)`', README):
    assert (ROOT / name).exists(), name
