"""03: a checkpoint goes to the harness and to transformers."""

import os
import re

import pytest

from tests import notebooks

if os.environ.get('KDJAX_REQUIRE_PARITY') != '1':
  pytest.importorskip('lm_eval', reason='the harness is not installed (the [parity] extra)')
  pytest.importorskip('transformers', reason='transformers is not installed (the [parity] extra)')


def test_03_evaluates_and_exports(tmp_path, monkeypatch):
  text = notebooks.printed(notebooks.execute('03_evaluate_and_export.ipynb', tmp_path, monkeypatch))
  assert 'lm-eval-speech_endings' in text
  assert "['config.json', 'kdjax.json', 'model.safetensors', 'tokenizer.json', 'tokenizer_config.json']" in text
  found = re.search(r'largest difference (\S+), logits up to (\S+)', text)
  assert found and float(found[1]) < 1e-4 < 1 < float(found[2])
