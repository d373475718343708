"""What results mean: paired statistics, the table of an experiment, its figures. Statistics and figures of a grid are in `grid`.

Nothing here trains or scores: it reads results that exist.
"""

from kdjax.runtime.environment import import_matplotlib

import_matplotlib()  # before any module here does
