"""The parts of the measurement, and the results that exist."""

import json
import pathlib

# part -> most seconds that it may take; the most valuable first. The last one has what the others leave of ALL.
PARTS = {'correctness': 120, 'loss': 60, 'throughput': 150, 'resume': 80, 'liger': 30, 'main_job': 150}


def read(results: pathlib.Path) -> list[dict]:
  return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
