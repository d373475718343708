"""launch/xpk.sh: xpk's own parser reads what it is given, and the command does under xpk's shell what it does elsewhere."""

import argparse
import os
import shlex
import signal
import subprocess

import pytest

from tests.launch.test_launch import DRY, KEPT, PODS, RECORDED, REPO, launch, wait_for


def words(name: str) -> list[str]:
  return shlex.split((RECORDED / f'{name}.txt').read_text().splitlines()[-1])


@pytest.mark.parametrize('name', [name for name in DRY if name.startswith('xpk_') and name != 'xpk_logs'])
def test_xpk_knows_every_option(name):
  core = pytest.importorskip('xpk.parser.core', reason='xpk is not installed')
  parser = argparse.ArgumentParser()
  core.set_parser(parser)
  args = parser.parse_args(words(name)[1:])
  assert (args.cluster, args.project, args.zone) == ('my-cluster', 'my-project', 'us-east5-b')
  if name.startswith('xpk_run'):
    assert args.workload == 'kd' and args.tpu_type in ('v6e-64', 'v5p-64')


def test_75_is_started_again_and_1_and_2_are_not():
  workload = pytest.importorskip('xpk.commands.workload', reason='xpk is not installed')
  option = '--restart-on-exit-codes='
  (codes,) = (word.removeprefix(option) for word in words('xpk_run') if word.startswith(option))
  again = workload.get_restart_exit_codes(argparse.Namespace(restart_on_exit_codes=codes))
  assert {75, 134, 137, 143} <= set(again) and not {0, 1, 2} & set(again)


@pytest.mark.parametrize(
  'accelerator', ['v4-128', 'v5litepod-16', 'v5litepod-256', 'v5p-8', 'v5p-64', 'v5p-512', 'v6e-8', 'v6e-256']
)
def test_xpk_and_gke_sh_mean_the_same_slice(accelerator):
  slices = pytest.importorskip('xpk.core.system_characteristics', reason='xpk is not installed')
  known = slices.UserFacingNameToSystemCharacteristics[accelerator]
  jobset = launch('gke.sh', 'print', *PODS, f'--accelerator={accelerator}', *KEPT).stdout
  assert (
    f'gke-tpu-accelerator: {known.gke_accelerator}\n' in jobset and f'gke-tpu-topology: {known.topology}\n' in jobset
  )
  assert f'parallelism: {known.vms_per_slice}\n' in jobset and f'google.com/tpu: {known.chips_per_vm}' in jobset


def test_a_sigterm_reaches_the_command_through_xpks_shell(tmp_path):
  """xpk runs `(COMMAND) & PID=$!`, tells that process, and ends with its code."""
  (command,) = (word.removeprefix('--command=') for word in words('xpk_run') if word.startswith('--command='))
  python = tmp_path / 'python'
  python.write_text("""#!/usr/bin/env bash
trap 'exit 75' TERM
printf '%s\\n' "$@" >"$OUT"
for ((i = 0; i < 300; i++)); do sleep 0.1; done
""")
  python.chmod(0o755)
  environment = {'PATH': f'{tmp_path}:{os.environ["PATH"]}', 'OUT': str(tmp_path / 'out')}
  shell = subprocess.Popen(
    ['bash', '-c', f'({command}) & echo $!; wait $!; echo $?'],
    env=os.environ | environment, cwd=REPO, stdout=subprocess.PIPE, text=True,
  )  # fmt: skip
  assert shell.stdout
  process = int(shell.stdout.readline())
  wait_for(tmp_path / 'out', '\n', times=6)
  os.kill(process, signal.SIGTERM)
  assert shell.communicate(timeout=60)[0] == '75\n'
  assert (tmp_path / 'out').read_text().splitlines()[-3:] == DRY['xpk_run'][-3:]
