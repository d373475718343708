"""What the results say: paired statistics, tables, figures."""

from kdjax.runtime.environment import import_matplotlib

import_matplotlib()  # before any module here does
