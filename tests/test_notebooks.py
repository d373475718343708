"""The notebooks that need nothing but kdjax, from top to bottom. (03 has transformers and the harness: tests/parity/test_notebooks.py.)"""

import json

import pytest

from tests import notebooks


def test_01_trains_shows_and_compares(tmp_path, monkeypatch):
  done = notebooks.execute('01_weak_teacher.ipynb', tmp_path, monkeypatch)
  text = notebooks.printed(done)
  assert notebooks.pictures(done) == 1
  assert 'Paired by document; negative is better' in text
  for arm in ('baseline', 'distilled', 'unigram'):
    assert f'--- {arm}\n' in text
  assert text.count('The people of the United States') == 3
  assert 'WARNING' not in text


def test_02_reads_the_committed_grid(tmp_path, monkeypatch):
  done = notebooks.execute('02_read_a_grid.ipynb', tmp_path, monkeypatch)
  text = notebooks.printed(done)
  assert notebooks.pictures(done) == 3
  assert 'No teacher: train the LM-only student on' in text and 'Does a weak teacher help?' in text


@pytest.mark.parametrize('path', sorted(notebooks.FOLDER.glob('*.ipynb')), ids=lambda path: path.stem)
def test_a_notebook_is_small_and_says_where_it_opens(path):
  assert path.stat().st_size < 1_000_000
  cells = json.loads(path.read_text())['cells']
  first = ''.join(cells[0]['source'])
  assert f'colab.research.google.com/github/kdjax/kdjax/blob/main/notebooks/{path.name}' in first
  code = [''.join(cell['source']) for cell in cells if cell['cell_type'] == 'code']
  assert 'pip install' in code[0] and not any('pip install' in cell for cell in code[1:])
