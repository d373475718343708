"""Count how often a job's runner was killed in the middle of it: a job that kills its runners must not starve the others.

A runner that is out of memory is killed without a word, restarted by its launcher, and would take the same job again.
"""

import contextlib
from collections.abc import Callable, Iterator

from kdjax.errors import TrainingError
from kdjax.runs.folder import RunFolder
from kdjax.runtime import distributed
from kdjax.storage import paths

FILE = 'attempts.json'
MOST = 3


@contextlib.contextmanager
def count_attempt(here: RunFolder, progress: Callable[[], int]) -> Iterator[None]:
  """Count the block as an attempt that is unfinished until the block ends, in whatever way.

  Args:
    here: the job's folder, which this runner owns.
    progress: steps that are saved; an attempt that saved any is no failure, as on machines that are often preempted.

  Raises TrainingError, without running the block, after MOST unfinished attempts in a row.
  """
  file, step = here.path / FILE, progress()
  known = (paths.read_json(file) or {}) if here.writes else {}
  before = known.get('unfinished', 0) if known.get('progress', 0) >= step else 0
  (before,) = distributed.of_first_process([before])
  if before >= MOST:
    raise TrainingError(
      f'{here.path}: its runner was killed {before} times in a row before it saved anything (is the machine out of memory?); make the '
      f'job smaller, or delete {FILE} in this folder to try it again'
    )
  if here.writes:
    paths.write_json(file, {'unfinished': before + 1, 'progress': step})
  lost = False
  try:
    yield
  except Exception as e:
    lost = distributed.is_lost(e)  # another process of this runner may have been killed
    raise
  finally:
    if here.writes and not lost:
      file.unlink(missing_ok=True)
