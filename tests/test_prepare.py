import json

import pytest

from kdjax import prepare, train
from kdjax.data import corpus
from tests import tiny


def test_the_corpus_of_a_config_is_built_told_and_then_used(tmp_path, capsys, monkeypatch):
  text = tiny.write_text(tmp_path)
  lines = (tmp_path / 'home.jsonl').read_text().splitlines(keepends=True)
  (tmp_path / 'home.jsonl').write_text(''.join([*lines, lines[0], '{"text": " "}\n']))
  file = tiny.write_config(tmp_path, **text)
  prepare.main([f'--config={file}'])
  out = capsys.readouterr().out
  assert '62 documents read; 1 were exact duplicates and 1 empty' in out
  assert 'train' in out and 'far (out of domain)' in out and 'near-duplicates in the training split: ' in out
  (folder,) = (tmp_path / 'runs/stores').iterdir()
  found = json.loads((folder / 'report.json').read_text())
  assert set(found['overlap']) == {'test', 'validation', 'far', 'further'}
  monkeypatch.setattr(corpus, '_build', lambda *args: 1 / 0)  # it is there
  train.run(tiny.config(tmp_path, **text | {'student.arms': ('baseline',)}), progress=False)


def test_mistakes_are_one_line(tmp_path, capsys):
  file = tiny.write_config(tmp_path)
  for argv, line in (
    ([f'--config={file}', '--config.data.source=none.txt'], 'matches no file'),
    ([], '--config=FILE is missing'),
  ):
    with pytest.raises(SystemExit) as e:
      prepare.main(argv)
    assert e.value.code == 2
    assert line in capsys.readouterr().err.splitlines()[-1]
