"""The documentation: sphinx-build -W docs docs/_build/html"""

import os
import re

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

project = 'kdjax'
extensions = ['myst_parser', 'sphinx.ext.autodoc', 'sphinx.ext.napoleon', 'sphinx.ext.viewcode']
html_theme = 'furo'
html_title = 'kdjax'
exclude_patterns = ['_build', 'scaling']
myst_enable_extensions = ['dollarmath']
myst_heading_anchors = 3
suppress_warnings = ['myst.header']
default_role = 'code'
autodoc_default_options = {'member-order': 'bysource', 'exclude-members': '__init__,__new__'}
autodoc_mock_imports = ['lm_eval']
smartquotes = False
copyright = 'the kdjax authors'
autodoc_typehints = 'signature'
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_use_rtype = False


def _escaped(app, what, name, obj, options, lines) -> None:
  """Docstrings are plain text: a star or a bar outside of backticks is one."""
  if lines and lines[0].startswith('Alias for field number'):  # a NamedTuple's own words for its fields
    lines.clear()
  for i, line in enumerate(lines):
    parts = re.split('(`[^`]*`)', line)
    lines[i] = ''.join(part if part.startswith('`') else re.sub(r'([*|])', r'\\\1', part) for part in parts)


def setup(app) -> None:
  app.connect('autodoc-process-docstring', _escaped, priority=100)  # before napoleon
