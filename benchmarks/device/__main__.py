"""Measure kdjax on the accelerator of this machine and write docs/DEVICE.md.

    python -m benchmarks.device                 all parts, within eight minutes on an H100 or better; no network
    python -m benchmarks.device --only loss     one part
    python -m benchmarks.device --report        only write the page from the results that exist

Results: docs/results/device.jsonl, one line a case. A rerun replaces the lines of the parts that it runs.
"""

import argparse
import importlib
import json
import os
import pathlib
import subprocess
import sys
import time
import traceback

from benchmarks.device import page
from benchmarks.device.results import PARTS, read

DOCS = pathlib.Path(__file__).parents[2] / 'docs'
RESULTS = DOCS / 'results' / 'device.jsonl'
ALL = 470  # seconds
# How much memory JAX takes of a GPU at the start of a part: nearly all, or only what it uses where other processes use the GPU too.
NEARLY_ALL, AS_USED = {'XLA_PYTHON_CLIENT_MEM_FRACTION': '.92'}, {'XLA_PYTHON_CLIENT_PREALLOCATE': 'false'}
MEMORY = {'loss': NEARLY_ALL, 'throughput': NEARLY_ALL}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--only', nargs='+', choices=PARTS, default=list(PARTS), metavar='PART', help=', '.join(PARTS))
  parser.add_argument('--results', type=pathlib.Path, default=RESULTS)
  parser.add_argument('--seconds', type=float, default=ALL, help='stop starting and end parts after this time')
  parser.add_argument('--tiny', action='store_true', help='tiny sizes, for a dry run on any machine')
  parser.add_argument('--report', action='store_true', help='write docs/DEVICE.md from the results and exit')
  parser.add_argument('--part', choices=PARTS, help=argparse.SUPPRESS)  # the child process of one part
  args = parser.parse_args()
  if args.part:
    run_part(args.part, args.results, args.tiny)
    return
  if not args.report:
    run(args)
  if args.results == RESULTS:
    print(page.write(args.results))


def run(args: argparse.Namespace) -> None:
  """Run the parts one after the other, each within its time and the whole within `--seconds`."""
  end = time.monotonic() + args.seconds
  kept = [row for row in read(args.results) if row['part'] not in args.only]
  args.results.parent.mkdir(parents=True, exist_ok=True)
  args.results.write_text(''.join(f'{json.dumps(row)}\n' for row in kept))
  for part in args.only:
    limit = end - time.monotonic()
    if part != args.only[-1] and not args.tiny:
      limit = min(limit, PARTS[part])
    if limit < 10:
      record(args.results, part, 'time', {'error': 'not started: no time left'}, 0)
      continue
    command = [sys.executable, '-m', 'benchmarks.device', f'--part={part}', f'--results={args.results}']
    start = time.monotonic()
    child = subprocess.Popen(
      command + ['--tiny'] * args.tiny, start_new_session=True, env=MEMORY.get(part, AS_USED) | os.environ
    )
    try:
      code = child.wait(limit)
    except subprocess.TimeoutExpired:
      os.killpg(child.pid, 9)
      code = child.wait()
    seconds = time.monotonic() - start
    if code:
      record(args.results, part, 'process', {'error': f'ended with code {code} after {seconds:.0f} s'}, seconds)


def run_part(part: str, results: pathlib.Path, tiny: bool) -> None:
  """Measure the cases of one part; an error becomes the result of its case."""
  from benchmarks.device.sizes import Size

  for name, measure in importlib.import_module(f'benchmarks.device.{part}').cases(Size(tiny)).items():
    start = time.monotonic()
    try:
      result = measure()
    except Exception as e:
      traceback.print_exc()
      result = {'error': f'{type(e).__name__}: {str(e).splitlines()[0][:300] if str(e) else ""}'}
    record(results, part, name, result, time.monotonic() - start)


def record(results: pathlib.Path, part: str, case: str, result: dict, seconds: float) -> None:
  row = {'part': part, 'case': case, **result, 'seconds': round(seconds, 2)}
  with results.open('a') as file:
    file.write(f'{json.dumps(row)}\n')
  print(json.dumps(row), flush=True)


if __name__ == '__main__':
  main()
