"""launch/gke.sh: the JobSet is what JobSet's types allow, its slices are kdjax.programs.topology's, and what ends it, stops it and starts it again."""

import json
import os
import re
import shutil
import subprocess
from typing import Any

import pytest
import yaml

from kdjax.programs import topology
from tests.launch.test_launch import DRY, KEPT, PODS, RECORDED, REPO, TRAIN, launch

RENDERED = [name for name in DRY if name.startswith('gke_print')]


def rendered(name: str) -> dict[str, Any]:
  return yaml.safe_load((RECORDED / f'{name}.txt').read_text())


def job(jobset: dict[str, Any]) -> dict[str, Any]:
  (replicated,) = jobset['spec']['replicatedJobs']
  return replicated['template']['spec']


def pod(jobset: dict[str, Any]) -> dict[str, Any]:
  return job(jobset)['template']['spec']


@pytest.mark.parametrize('name', RENDERED)
def test_every_field_is_one_of_jobsets_types(name):
  """The types drop what they do not know and refuse what has another type: what comes back must be what went in."""
  models = pytest.importorskip('kubeflow_trainer_api.models')
  jobset = rendered(name)
  assert models.JobsetV1alpha2JobSet.from_dict(jobset).to_dict() == jobset
  pod(jobset)['nodeSelektor'] = {}
  assert models.JobsetV1alpha2JobSet.from_dict(jobset).to_dict() != jobset


@pytest.mark.parametrize('name', RENDERED)
def test_what_the_types_do_not_say_holds_too(name):
  jobset = rendered(name)
  (container,) = pod(jobset)['containers']
  policy, rules = jobset['spec']['failurePolicy'], job(jobset)['podFailurePolicy']['rules']
  assert policy['restartStrategy'] in ('Recreate', 'BlockingRecreate')
  assert {rule['action'] for rule in policy['rules']} <= {
    'FailJobSet',
    'RestartJobSet',
    'RestartJobSetAndIgnoreMaxRestarts',
  }
  assert all(re.fullmatch(r'[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?', rule['name']) for rule in policy['rules'])
  assert {rule['onExitCodes']['containerName'] for rule in rules} == {container['name']}
  assert pod(jobset)['restartPolicy'] == 'Never'  # a podFailurePolicy asks for it
  volumes = {volume['name'] for volume in pod(jobset).get('volumes', [])}
  assert {mount['name'] for mount in container.get('volumeMounts', [])} == volumes


@pytest.mark.parametrize(
  ('code', 'ends'), [(1, True), (2, True), (75, False), (134, False), (137, False), (143, False)]
)
def test_what_is_wrong_fails_the_jobset_and_anything_else_starts_it_again(code, ends):
  """As the two controllers read it: the Job fails with its first failed pod, for one of two reasons; the JobSet's first rule for it counts."""
  jobset = rendered('gke_print')
  assert job(jobset)['backoffLimit'] == 0
  (rule,) = job(jobset)['podFailurePolicy']['rules']
  matches = (
    rule['action'] == 'FailJob' and rule['onExitCodes']['operator'] == 'In' and code in rule['onExitCodes']['values']
  )
  reason = 'PodFailurePolicy' if matches else 'BackoffLimitExceeded'
  actions = [r['action'] for r in jobset['spec']['failurePolicy']['rules'] if reason in r['onJobFailureReasons']]
  assert [*actions, 'RestartJobSet'][0] == ('FailJobSet' if ends else 'RestartJobSet')
  environment = {entry['name']: entry['value'] for entry in pod(jobset)['containers'][0]['env']}
  assert environment == {'RESTARTS': '0'}


def test_the_pods_run_what_was_given():
  (container,) = pod(rendered('gke_print_slices'))['containers']
  words = [word.replace('$$', '$') for word in container['command']]  # as Kubernetes reads them
  given = DRY['gke_print_slices']
  assert words[:6] == ['bash', 'launch/supervise.sh', 'python', '-m', 'kdjax.train', '--distributed']
  assert words[6:] == given[given.index('--') + 1 :]


def test_names_with_quotes_are_strings_and_line_breaks_are_refused():
  odd = [
    "--name=it's",
    '--image=a: "b" #c',
    '--accelerator=v6e-8',
    "--local=/l'x}",
    '--bucket=b, c: d',
    "--service-account=k'd",
  ]
  done = launch('gke.sh', 'print', *odd, *TRAIN, '--config.runs=/mnt/bucket/x', "--config.name=it's: {a}")
  assert done.returncode == 0, done.stderr
  jobset = yaml.safe_load(done.stdout)
  (container,), volumes = pod(jobset)['containers'], {v['name']: v for v in pod(jobset)['volumes']}
  assert jobset['metadata']['name'] == "it's" and container['image'] == 'a: "b" #c'
  assert container['command'][-1] == "--config.name=it's: {a}" and pod(jobset)['serviceAccountName'] == "k'd"
  assert volumes['local']['hostPath']['path'] == "/l'x}"
  assert volumes['bucket']['csi']['volumeAttributes']['bucketName'] == 'b, c: d'
  for arguments in ([*PODS, *KEPT, '--config.name=a\nb'], ['--name=a\nb', PODS[1], *KEPT]):
    wrong = launch('gke.sh', 'print', '--accelerator=v6e-8', *arguments)
    assert wrong.returncode == 2 and 'holds a control character' in wrong.stderr
  wrong = launch('gke.sh', 'print', '--accelerator=v6e-8', *PODS, *KEPT, RESTARTS='many')
  assert wrong.returncode == 2 and wrong.stderr == 'error: RESTARTS=many: must be a whole number\n'


ACCELERATORS = [
  f'{kind}-{count}'
  for kind, least, most in (('v4', 8, 8192), ('v5p', 8, 8192), ('v5litepod', 4, 256), ('v6e', 4, 256))
  for count in (1 << n for n in range(14))
  if least <= count <= most
]


@pytest.mark.parametrize('accelerator', ACCELERATORS)
def test_a_slice_is_the_one_that_kdjax_topology_knows(accelerator):
  done = launch('gke.sh', 'print', *PODS, f'--accelerator={accelerator}', *KEPT)
  jobset, known = yaml.safe_load(done.stdout), topology.parse_slice(accelerator)
  selector, (container,) = pod(jobset)['nodeSelector'], pod(jobset)['containers']
  assert selector['cloud.google.com/gke-tpu-topology'] == 'x'.join(map(str, known.shape))
  assert {'v5e': 'v5-lite'}.get(known.chip.name, known.chip.name) in selector['cloud.google.com/gke-tpu-accelerator']
  assert job(jobset)['parallelism'] == job(jobset)['completions']
  assert job(jobset)['parallelism'] * container['resources']['limits']['google.com/tpu'] == known.n_chips


@pytest.fixture
def cluster(tmp_path):
  """A working tree of its own with a kubectl that writes down its arguments; returns the script and what was asked of kubectl."""
  shutil.copytree(REPO / 'launch', tmp_path / 'launch')
  (tmp_path / 'kubectl').write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$*" >>"$CALLS"\n')
  (tmp_path / 'kubectl').chmod(0o755)
  for command in (['init', '-q'], ['commit', '-q', '--allow-empty', '-m', 'x']):
    subprocess.run(['git', '-c', 'user.name=x', '-c', 'user.email=x@y', *command], cwd=tmp_path, check=True)
  environment = {'PATH': f'{tmp_path}:{os.environ["PATH"]}', 'CALLS': str(tmp_path / 'calls')}

  def run(*arguments: str) -> list[str]:
    (tmp_path / 'calls').unlink(missing_ok=True)
    done = launch('gke.sh', *arguments, root=tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    return (tmp_path / 'calls').read_text().splitlines()

  return run


def test_what_was_created_is_recorded_and_created_again(cluster, tmp_path):
  arguments = DRY['gke_print_slices'][2:]
  assert cluster('run', *arguments) == ['create --filename=launched/kd/jobset.yaml']
  file = tmp_path / 'launched' / 'kd' / 'jobset.yaml'
  assert file.read_text() == (RECORDED / 'gke_print_slices.txt').read_text()
  assert {path.name for path in file.parent.iterdir()} == {'commit', 'uncommitted.diff', 'command', 'jobset.yaml'}
  assert cluster('resume', '--name=kd') == [
    'delete jobset kd --cascade=foreground --ignore-not-found',
    'create --filename=launched/kd/jobset.yaml',
  ]


def test_a_stop_suspends(cluster):
  (call,) = cluster('stop', '--name=kd')
  assert json.loads(call.partition('--patch=')[2]) == {'spec': {'suspend': True}}
