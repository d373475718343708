"""Datasets by name: TFDS without TensorFlow. (`datasets` is not in this environment: tests/parity/test_datasets.py.)"""

import pathlib
import subprocess
import sys

import pytest

from kdjax.data import hubs
from kdjax.data.sources import documents, signature
from kdjax.errors import UserError

TEXTS = [f'document {i}: ' + 'word ' * (i % 7) for i in range(300)]
BUILD = """
import sys
import numpy as np
import tensorflow_datasets as tfds

class Poems(tfds.core.GeneratorBasedBuilder):
  VERSION = tfds.core.Version('1.2.0')
  BUILDER_CONFIGS = [tfds.core.BuilderConfig(name='short')]

  def _info(self):
    features = {'text': tfds.features.Text(), 'title': tfds.features.Text(), 'n': np.int32}
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

  def _split_generators(self, downloads):
    return {'train': self._generate_examples(300), 'test': self._generate_examples(5)}

  def _generate_examples(self, n):
    for i in range(n):
      yield i, {'text': f'document {i}: ' + 'word ' * (i % 7), 'title': f'title {i}', 'n': i}

Poems(data_dir=sys.argv[1], file_format=sys.argv[2], config='short').download_and_prepare()
"""


@pytest.fixture(scope='module')
def prepared(tmp_path_factory) -> pathlib.Path:
  """A dataset that TFDS's own builder has made, in a process of its own: its class is not known here, as in a user's."""
  folder = tmp_path_factory.mktemp('tfds')
  script = folder / 'poems.py'
  script.write_text(BUILD)
  done = subprocess.run([sys.executable, script, folder, 'array_record'], capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  return folder


@pytest.fixture(autouse=True)
def data_dir(prepared, monkeypatch):
  monkeypatch.setenv('TFDS_DATA_DIR', str(prepared))


@pytest.mark.parametrize(
  'name',
  ['tfds:poems/short', 'tfds:poems/short:train', 'tfds:poems/short:1.2.0:train', 'tfds:{dir}/poems/short/1.2.0:train'],
)
def test_a_prepared_dataset_is_read_by_name_or_folder_without_tensorflow(name, prepared):
  assert sorted(documents(name.format(dir=prepared))) == sorted(TEXTS)
  assert 'tensorflow' not in sys.modules


def test_splits_slices_and_fields():
  assert len(list(documents('tfds:poems/short:test'))) == 5
  slice_ = list(documents('tfds:poems/short:train[10%:20%]'))
  assert len(slice_) == 30 and set(slice_) < set(TEXTS)
  assert next(documents('tfds:poems/short:test', 'title')).startswith('title ')
  assert list(documents('tfds:poems/short:test')) == list(documents('tfds:poems/short:test'))


def test_the_signature_tells_splits_and_versions_apart():
  assert signature('tfds:poems/short:train') == signature('tfds:poems/short:train')
  assert signature('tfds:poems/short:train') != signature('tfds:poems/short:test')


@pytest.mark.parametrize(
  ('name', 'field', 'said'),
  [
    ('tfds:poems/short:dev', 'text', r"Unknown split 'dev'.*splits: train, test|splits: test, train"),
    ('tfds:poems/long', 'text', r'tfds:poems/long: .*give NAME/config:split of a dataset that is prepared in'),
    ('tfds:poems/short:9.9.9', 'text', r'tfds:poems/short:9\.9\.9: '),
    ('tfds:no_such_dataset', 'text', r'no_such_dataset not found'),
    ('tfds:ag_news_subset', 'text', r'is not prepared in .*download_and_prepare\(\)'),
    ('tfds:poems/short', 'body', r"example 0: no field 'body'; it has \['n', 'text', 'title'\]; set data\.text_field"),
    ('tfds:poems/short', 'n', r"field 'n' holds a int, not a string"),
  ],
)
def test_what_is_not_there_is_one_line_and_lists_what_is(name, field, said):
  with pytest.raises(UserError, match=said) as e:
    list(documents(name, field))
  assert '\n' not in str(e.value) and len(str(e.value)) < 600


def test_a_missing_package_says_how_to_install_it(monkeypatch):
  monkeypatch.setitem(sys.modules, 'datasets', None)
  monkeypatch.setattr(hubs, '_hub_answers', lambda: True)
  with pytest.raises(UserError, match=r"pip install 'kdjax\[hf\]'"):
    list(documents('hf:somebody/something'))


def test_a_hub_that_does_not_answer_is_not_waited_for(monkeypatch):
  monkeypatch.setenv('HF_ENDPOINT', 'http://127.0.0.1:9')
  monkeypatch.delenv('HTTPS_PROXY', raising=False)
  monkeypatch.delenv('https_proxy', raising=False)
  assert not hubs._hub_answers()
