"""Write docs/config.md from the declarations of the config's fields: python docs/generate.py"""

import pathlib

from kdjax.config import Config, describe
from kdjax.sweeps.config import GridConfig

PAGE = pathlib.Path(__file__).with_name('config.md')
HEAD = """# Config

Every field can be set on the command line: `--config.student.alpha=0.4`. A config file starts from `kdjax.config.default()`.
`python -m kdjax.train --help-config student` prints the same. A field that "changes no result" is not part of what identifies a run.

"""
GRID = """
# Grid

The config of `python -m kdjax.grid`. Everything that an axis does not vary is in `base`, an ordinary config:
`--config.base.student.optimizer.learning_rate=1e-3`.

"""


def page() -> str:
  grid = describe.markdown(GridConfig, without=('base',))
  return HEAD + describe.markdown(Config) + GRID + grid


if __name__ == '__main__':
  PAGE.write_text(page(), encoding='utf-8')
