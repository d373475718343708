"""What the tests of several processes share: starting them, waiting for all, comparing what they left."""

import numpy as np

from kdjax.runs.folder import RunFolder
from kdjax.scoring import results
from kdjax.storage.paths import read_json
from tests import commands, tiny

ARMS = ('baseline', 'distilled', 'unigram')
LONG = {
  'student.arms': ('baseline', 'unigram'),
  'student.tokens': 200 * 8 * 16,
  'checkpoint.every': 50,
  'eval.every': 10,
}


def start(n, config, workdir, *arguments, devices=1, each=(), module='kdjax.train'):
  """So many processes over loopback; `each`: arguments of each alone."""
  port = commands.free_port()
  flags = (f'--coordinator=127.0.0.1:{port}', f'--processes={n}')
  own = each or [()] * n
  return [
    commands.start(config, workdir, *flags, f'--process={i}', *arguments, *own[i], devices=devices, module=module)
    for i in range(n)
  ]


def done(*processes, timeout=400):
  codes = commands.finish(*processes, timeout=timeout)
  assert codes == [0] * len(codes), '\n'.join(commands.errors(p)[-3000:] for p in processes)


def trained(workdir, arms=ARMS):
  teacher = read_json(workdir / 'experiment.json')['teacher']
  return [workdir / 'students' / arm for arm in arms] + ([workdir / teacher] if teacher else [])


def assert_close(workdir, expected, arms=ARMS, rtol=1e-4, only_scored=False):
  """Bit-identical data, losses and scores equal to float tolerance."""
  for one, other in zip(trained(workdir, arms), trained(expected, arms), strict=True):
    known, like = (RunFolder(folder).read_record()['fingerprints'] for folder in (one, other))
    assert {k: known[k] for k in ('data', 'tokenizer')} == {k: like[k] for k in ('data', 'tokenizer')}
    assert known.get('init') == like.get('init')
    got, wanted = commands.metrics(one), commands.metrics(other)
    assert [r['step'] for r in got] == [r['step'] for r in wanted]
    assert [r['tokens'] for r in got] == [r['tokens'] for r in wanted]
    for name in ('loss', 'ce', 'grad_norm'):
      np.testing.assert_allclose([r[name] for r in got], [r[name] for r in wanted], rtol=rtol, err_msg=f'{one} {name}')
    files = [sorted((folder / 'results').glob('*.parquet')) for folder in (one, other)]
    assert [f.name.partition('-step')[0] for f in files[0]] == [f.name.partition('-step')[0] for f in files[1]]
    for file, like in zip(*files, strict=True):
      table, wanted_table = results.read_result(file)[0], results.read_result(like)[0]
      assert list(table['doc']) == list(wanted_table['doc'])
      np.testing.assert_allclose(table['nll'], wanted_table['nll'], rtol=rtol)


def experiment(home, folder, **fields):
  """(config file, workdir) of an experiment with teachers of its own."""
  folder.mkdir(exist_ok=True)
  config = tiny.write_config(folder, **{'data.cache': str(home / 'runs' / 'stores'), **tiny.write_text(home), **fields})
  return config, folder / 'run'


def lines(workdir) -> int:
  path = workdir / 'students' / 'baseline' / 'metrics.jsonl'
  return path.read_bytes().count(b'\n') if path.exists() else 0
