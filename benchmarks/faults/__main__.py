"""Faults against tiny runs: each is followed by what a launcher does, and every bit of the result is compared with an undisturbed run.

    python -m benchmarks.faults --n=200      until 200 faults are done; results are kept, so it can be stopped and resumed
    python -m benchmarks.faults --report     write docs/FAULTS.md from the results

A fault ends well if the run finishes with the bits of an undisturbed run, or if it stops with one line that names a file or folder and says what to
do, where the launcher (launch/supervise.sh) does not restart it. Anything else is a failure: other bits, a restart that cannot help, a final stop
where a restart would have helped, a traceback, or a hang.
"""

import argparse
import collections
import concurrent.futures
import json
import logging
import os
import pathlib
import random
import re
import shutil
import tempfile
import time
import traceback
from typing import Any

from benchmarks.faults import damage, kills, surroundings
from benchmarks.faults.case import SAME, STOPS, Base, Case, Failure
from kdjax import machine

FILE = pathlib.Path(__file__).parents[2] / 'docs' / 'results' / 'faults.jsonl'
PAGE = FILE.parents[1] / 'FAULTS.md'
# A seed draws its kind from these in this order, with their weights.
KINDS = {
  kind.__name__: kind
  for kind in (
    kills.killed_in_training,
    kills.killed_in_building,
    kills.killed_in_evaluation,
    kills.one_of_two_killed,
    damage.store_damaged,
    damage.checkpoint_damaged,
    damage.weights_damaged,
    damage.checkpoint_copied,
    damage.result_damaged,
    damage.emptied_by_a_crash,
    surroundings.disk_failing,
    surroundings.store_unavailable,
    surroundings.clocks_apart,
    surroundings.started_at_once,
    surroundings.grid_killed,
  )
}


def one(base: Base, seed: int) -> dict[str, Any]:
  """Run the fault of a seed."""
  names = list(KINDS)
  kind = random.Random(seed).choices(names, [KINDS[name].weight for name in names])[0]
  folder = pathlib.Path(tempfile.mkdtemp(prefix=f'{seed}-', dir=base.home))
  case, began = Case(base, folder, seed), time.monotonic()
  try:
    outcome = KINDS[kind](case)
  except Failure as e:
    outcome = f'FAILURE: {e}'
  except Exception:
    outcome = f'FAILURE: of the campaign itself: {traceback.format_exc()[-1500:]}'
  if not outcome.startswith('FAILURE'):
    shutil.rmtree(folder, ignore_errors=True)
  record = {'seed': seed, 'kind': kind, 'detail': case.detail.strip(' ;'), 'outcome': outcome, 'starts': case.starts}
  return record | {'seconds': round(time.monotonic() - began, 1)}


def known() -> list[dict[str, Any]]:
  return [json.loads(line) for line in FILE.read_text().splitlines()] if FILE.exists() else []


def report() -> str:
  """The table of docs/FAULTS.md."""
  counts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
  for record in known():
    counts[record['kind']][re.sub(r'^FAILURE.*', 'failures', record['outcome'], flags=re.S)] += 1
  columns = (SAME, STOPS, 'failures')
  rows = [
    [kind.replace('_', ' '), str(sum(counts[kind].values())), *(str(counts[kind][c]) for c in columns)]
    for kind in KINDS
    if kind in counts
  ]
  total = [sum(counts[kind][c] for kind in counts) for c in columns]
  rows.append(['**all**', str(sum(total)), *map(str, total)])
  head = ['fault', 'times', *columns]
  return '\n'.join('| ' + ' | '.join(row) + ' |' for row in (head, ['---'] * len(head), *rows))


def write_page() -> None:
  text = PAGE.read_text()
  head, tail = text.split('<!-- faults -->')[0], text.split('<!-- /faults -->')[1]
  PAGE.write_text(f'{head}<!-- faults -->\n{report()}\n<!-- /faults -->{tail}')


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--n', type=int, default=200, help='faults in all, those of earlier starts included')
  parser.add_argument('--first', type=int, default=0, help='the first seed')
  parser.add_argument('--only', choices=list(KINDS), help='this kind alone; its results are printed and not kept')
  parser.add_argument('--jobs', type=int, default=2, help='faults at once')
  parser.add_argument('--work', type=pathlib.Path, default=pathlib.Path(tempfile.gettempdir()) / 'kdjax-faults')
  parser.add_argument('--report', action='store_true', help='write docs/FAULTS.md from the results and run nothing')
  args = parser.parse_args()
  if args.report:
    write_page()
    return
  if args.only:
    for name in set(KINDS) - {args.only}:
      del KINDS[name]
  for name in ('absl', 'gcsfs'):  # they warn at each read-only manager, and at each file read without credentials
    logging.getLogger(name).setLevel(logging.ERROR)
  os.environ['KDJAX_TEST_CACHE'] = str(args.work / 'compiled')  # half of a tiny run's time
  base = Base(args.work)
  done = set() if args.only else {record['seed'] for record in known()}
  seeds = [seed for seed in range(args.first, args.first + args.n) if seed not in done]
  print(f'{len(seeds)} faults; jax {machine.versions()["jax"]}', flush=True)
  with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
    for finished in concurrent.futures.as_completed([pool.submit(one, base, seed) for seed in seeds]):
      record = finished.result()
      print(
        f'{record["seed"]:5d} {record["kind"]:22s} {record["seconds"]:6.1f} s  {record["outcome"][:100]}', flush=True
      )
      if not args.only:
        with FILE.open('a') as file:
          file.write(json.dumps(record) + '\n')
  if not args.only:
    write_page()


if __name__ == '__main__':
  main()
