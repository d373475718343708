"""Begin, end and padding tokens against transformers and lm-eval's hf model, on folders shaped like published models."""

import json
import os
import pathlib

import jax
import numpy as np
import pytest

from kdjax import convert, generate, harness
from kdjax.config import MeshConfig
from kdjax.models.sampling import Sampling
from kdjax.runtime import sharding
from kdjax.teachers import by_name, huggingface
from kdjax.teachers.huggingface import Source
from tests.teachers.huggingface import shapes

if os.environ.get('KDJAX_REQUIRE_PARITY') == '1':
  import lm_eval
  import torch
  import transformers
  from lm_eval.api.instance import Instance
  from lm_eval.models.huggingface import HFLM
else:
  reason = 'the reference implementations are not installed (the [parity] extra)'
  lm_eval = pytest.importorskip('lm_eval', reason=reason)
  torch = pytest.importorskip('torch', reason=reason)
  transformers = pytest.importorskip('transformers', reason=reason)
  from lm_eval.api.instance import Instance
  from lm_eval.models.huggingface import HFLM

CASES = pathlib.Path(__file__).parents[2].parent / 'shared/cases/hf'
PROMPT = 'Once upon a time'
TEXTS = ['', 'a', 'Once upon a time, there was ü 😀.', 'long ' * 80, '</s> and <eos> and <s>']


def one_device():
  return sharding.make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])


def their_model(folder):
  return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def continued(folder, n: int = 40, **options) -> list[int]:
  """Generate greedily with transformers. Returns the ids after the prompt, including an end token."""
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  ids = tokenizer(PROMPT, return_tensors='pt').input_ids
  first = by_name.open_model(str(folder), one_device()).tokenizer.separator_id
  if ids[0, 0] != first:  # kdjax starts every document with it
    ids = torch.cat([torch.tensor([[first]]), ids], dim=1)
  seen = torch.ones_like(ids)  # otherwise transformers masks a first token that equals its padding token
  out = their_model(folder).generate(
    ids, attention_mask=seen, max_new_tokens=n, do_sample=False, pad_token_id=0, **options
  )
  return out[0, ids.shape[1] :].tolist()


def make_end_likely(folder: pathlib.Path, end: int) -> pathlib.Path:
  """Change the folder's head so that the model generates `end` a few tokens after the prompt, and not before."""
  shapes.change_tensors(folder, lambda tensors: tensors['lm_head.weight'][end].fill(0))
  free = continued(folder, eos_token_id=None)
  at = next(k for k in range(4, len(free)) if free[k] not in free[:k])
  assert end not in free

  def swap(tensors):
    head = tensors['lm_head.weight']
    head[[free[at], end]] = head[[end, free[at]]]

  shapes.change_tensors(folder, swap)
  return folder


@pytest.fixture(scope='module', params=shapes.SHAPES)
def folder(request, tmp_path_factory) -> pathlib.Path:
  made = shapes.make(tmp_path_factory.mktemp('shape') / 'model', request.param)
  end = transformers.AutoTokenizer.from_pretrained(made).eos_token_id
  return make_end_likely(made, end)


@pytest.fixture(scope='module')
def models(folder):
  """Return the harness's models (ours, theirs)."""
  mesh = one_device()
  with jax.set_mesh(mesh):
    return harness.Model(by_name.open_model(str(folder), mesh), mesh, max_length=64), HFLM(
      pretrained=str(folder), device='cpu', dtype='float32', batch_size=1, max_length=64
    )


def asked(kind: str, *args) -> Instance:
  return Instance(request_type=kind, doc={}, arguments=args, idx=0)


def test_the_roles_are_theirs(folder, models):
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  found = Source(folder).tokenizer
  assert found.end_id == tokenizer.eos_token_id and found.begin_id == tokenizer.bos_token_id
  assert found.padding_id == tokenizer.pad_token_id
  ours, hf = models
  assert (ours.eot_token_id, ours.prefix_token_id) == (hf.eot_token_id, hf.prefix_token_id)
  stops = their_model(folder).generation_config.eos_token_id
  assert set(found.stop_ids) == {tokenizer.eos_token_id, *(stops if isinstance(stops, list) else [stops])}
  assert [ours.tok_encode(text) for text in TEXTS] == [hf.tok_encode(text) for text in TEXTS]


def test_generation_stops_at_the_end_token(folder):
  ids = continued(folder)
  opened = by_name.open_model(str(folder), one_device())
  assert ids[-1] in opened.tokenizer.stop_ids and 4 < len(ids) < 40
  text = ''.join(generate.texts(opened, PROMPT, 40, Sampling(0.0), 0))
  assert text == PROMPT + opened.tokenizer.decode(ids[:-1])


def test_each_of_several_end_tokens_stops(tmp_path):
  for k, end in enumerate((257, 259)):
    made = make_end_likely(shapes.make(tmp_path / f'{k}', 'Llama 3'), end)
    ids = continued(made)
    assert ids[-1] == end and len(ids) < 40
    opened = by_name.open_model(str(made), one_device())
    text = ''.join(generate.texts(opened, PROMPT, 40, Sampling(0.0), 0))
    assert text == PROMPT + opened.tokenizer.decode(ids[:-1])


def test_the_harness_generates_their_texts(models):
  ours, hf = models
  requests = [
    asked('generate_until', prompt, {'until': ['zzz'], 'do_sample': False, 'max_gen_toks': 30})
    for prompt in (PROMPT, 'another', 'of several words')
  ]
  with jax.set_mesh(one_device()):
    found = ours.generate_until(requests)
  assert found == hf.generate_until(requests)
  assert len(set(found)) > 1


def test_whole_texts_and_empty_contexts_have_their_likelihood(models):
  ours, hf = models
  rolling = [asked('loglikelihood_rolling', text) for text in TEXTS[1:]]
  pairs = [
    asked('loglikelihood', *pair) for pair in (('', 'a tail'), ('', ' b'), ('a context', ' and more'), ('c ', 'd'))
  ]
  with jax.set_mesh(one_device()):
    np.testing.assert_allclose(ours.loglikelihood_rolling(rolling), hf.loglikelihood_rolling(rolling), rtol=1e-4)
    found, theirs = ours.loglikelihood(pairs), hf.loglikelihood(pairs)
  np.testing.assert_allclose([a for a, _ in found], [b for b, _ in theirs], rtol=1e-4)
  assert [a for _, a in found] == [b for _, b in theirs]


def test_there_and_back_keeps_the_roles_and_the_post_processor(folder, tmp_path, capsys):
  convert.main(['from-hf', str(folder), str(tmp_path / 'run')])
  said = capsys.readouterr().out
  convert.main(['to-hf', str(tmp_path / 'run'), str(tmp_path / 'back')])
  before, after = (transformers.AutoTokenizer.from_pretrained(path) for path in (folder, tmp_path / 'back'))
  for role in ('bos_token_id', 'eos_token_id', 'pad_token_id'):
    assert getattr(before, role) == getattr(after, role), role
  assert before.eos_token in said
  for text in TEXTS:
    assert before(text).input_ids == after(text).input_ids
  processors = [
    json.loads((path / 'tokenizer.json').read_text())['post_processor'] for path in (folder, tmp_path / 'back')
  ]
  assert processors[0] == processors[1]
  stops = [their_model(path).generation_config.eos_token_id for path in (folder, tmp_path / 'back')]
  assert {*np.atleast_1d(stops[0])} | {before.eos_token_id} == {*np.atleast_1d(stops[1])}
  assert continued(tmp_path / 'back') == continued(folder)
  again = Source(tmp_path / 'back').tokenizer
  assert again.roles == Source(folder).tokenizer.roles and again.fingerprint == Source(folder).tokenizer.fingerprint


@pytest.mark.parametrize('name', ['Llama 2', 'SmolLM2 Instruct', 'Qwen2.5 Instruct'])
def test_an_exported_student_is_scored_as_the_student(name, tmp_path):
  """A model trained by kdjax on documents with these tokens around them, and its export."""
  source, mesh = Source(shapes.make(tmp_path / 'x', name)), one_device()
  params = source.load(mesh)
  huggingface.export(source.model, params, source.tokenizer, tmp_path / 'out', max_positions=64, trained_here=True)
  opened = by_name.OpenModel(source.model, params, source.tokenizer, 'student', trained_window=64)
  with jax.set_mesh(mesh):
    ours = harness.Model(opened, mesh)
    hf = HFLM(pretrained=str(tmp_path / 'out'), device='cpu', dtype='float32', batch_size=1)
    assert (ours.eot_token_id, ours.prefix_token_id) == (hf.eot_token_id, hf.prefix_token_id)
    assert ours.prefix_token_id == source.tokenizer.separator_id
    assert [ours.tok_encode(text) for text in TEXTS] == [hf.tok_encode(text) for text in TEXTS]
    assert ours.tok_encode('a')[0] == source.tokenizer.separator_id
    rolling = [asked('loglikelihood_rolling', text) for text in TEXTS[1:]]
    np.testing.assert_allclose(ours.loglikelihood_rolling(rolling), hf.loglikelihood_rolling(rolling), rtol=1e-4)
  assert Source(tmp_path / 'out').tokenizer.fingerprint == source.tokenizer.fingerprint


@pytest.mark.skipif(not CASES.exists(), reason=f'there is no {CASES}')
@pytest.mark.parametrize(
  'name', ['gemma3', 'gemma3soft', 'llama2pad', 'llama_eos', 'qwen_big', 'qwen_small', 'staleidx']
)
def test_the_cases_give_their_logits(name):
  source = Source(CASES / name)
  assert source.tokenizer.vocab_size  # of one model
  n = min(source.model.config.vocab_size, source.tokenizer.vocab_size)
  tokens = np.random.default_rng(0).integers(0, n, (2, 90))
  with torch.no_grad():
    theirs = their_model(CASES / name)(torch.tensor(tokens)).logits.numpy()
  ours = source.model.hidden(params := source.load(one_device()), tokens) @ source.model.head(params)
  assert theirs.std() > 0.01
  np.testing.assert_allclose(np.asarray(ours)[..., :n], theirs[..., :n], atol=1e-4)
