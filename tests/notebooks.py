"""Executes a notebook from top to bottom, in a process and a folder of its own."""

import pathlib
from typing import Any

import nbclient
import nbformat
import pytest

FOLDER = pathlib.Path(__file__).parents[1] / 'notebooks'


def execute(name: str, folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Any:
  """The notebook with its outputs; an error in a cell is raised."""
  monkeypatch.setenv('PYTHONPATH', str(FOLDER.parent))
  monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
  monkeypatch.delenv('XLA_FLAGS', raising=False)  # one device, as its reader has
  notebook = nbformat.read(FOLDER / name, as_version=4)
  client = nbclient.NotebookClient(
    notebook, timeout=900, kernel_name='python3', resources={'metadata': {'path': str(folder)}}
  )
  return client.execute()


def printed(notebook: Any) -> str:
  """What the cells have printed or shown as text."""
  outputs = [output for cell in notebook.cells if cell.cell_type == 'code' for output in cell.outputs]
  return '\n'.join(str(output.get('text') or output.get('data', {}).get('text/plain', '')) for output in outputs)


def pictures(notebook: Any) -> int:
  outputs = [output for cell in notebook.cells if cell.cell_type == 'code' for output in cell.outputs]
  return sum('image/png' in output.get('data', {}) for output in outputs)
