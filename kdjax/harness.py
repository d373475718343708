"""EleutherAI's lm-evaluation-harness on kdjax's models (pip install 'kdjax[lm-eval]').

    python -m kdjax.harness runs/weak2strong-... --tasks arc_easy,hellaswag --limit 500        all its models
    python -m kdjax.harness runs/weak2strong-.../students/distilled --tasks my_task --include-path my_tasks/
    python -m kdjax.harness ~/models/SmolLM2-135M --tasks gsm8k                                  a Hugging Face folder

Results of an experiment's models land in its table, beside those of the eval job, each item paired with the same one of the baseline.
"""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import pandas as pd
import tokenizers
from jax.sharding import Mesh

from kdjax import cli, paths, pretrained, sharding
from kdjax import config as config_lib
from kdjax.analysis import table
from kdjax.config import MeshConfig
from kdjax.data.files import canonical, digest
from kdjax.errors import UserError
from kdjax.evals import job as jobs
from kdjax.evals import likelihood, results
from kdjax.evals.score import Scored
from kdjax.huggingface.exporting import tokenizer_file
from kdjax.run import RunFolder
from kdjax.sampling import Sampling, generate

try:
  import lm_eval
  from lm_eval import utils as lm_eval_utils
  from lm_eval.api.model import TemplateLM
  from lm_eval.tasks import TaskManager
except ImportError:  # said when it is needed
  lm_eval, TemplateLM = None, object

log = logging.getLogger('kdjax')
MAX_TOKENS = 256  # of a generation, where a task does not say
ACCURACY = ('acc', 'exact_match')  # a task's first of these is its accuracy, and acc_norm the normalised one


class Model(TemplateLM):
  """A model of kdjax as the harness sees it: its three kinds of request, in batches, with one program for each of a few lengths.

  Args:
    opened: the model.
    mesh: rows lie over its data axes.
    batch_size: rows of the longest window; of shorter ones there are more.
    max_length: the most tokens that it sees at once; 0: the window that it was trained with, else the model's own limit.
  """

  def __init__(self, opened: pretrained.Opened, mesh: Mesh, batch_size: int = 16, max_length: int = 0):
    super().__init__()
    self._opened, self._mesh, self._batch_size = opened, mesh, batch_size
    self.max_length = max_length or opened.trained_window or opened.model.config.max_seq_len
    # As transformers reads an exported model's tokenizer: special tokens in text count, and what a text begins with is put before it.
    self._tokenizer = tokenizers.Tokenizer.from_str(tokenizer_file(opened.tokenizer, not opened.imported))
    self._tokenizer.no_truncation()
    self._tokenizer.no_padding()

  @property
  def eot_token_id(self) -> int:
    return self._opened.tokenizer.end_id

  @property
  def prefix_token_id(self) -> int:
    return self._opened.prefix_id

  @property
  def tokenizer_name(self) -> str:
    return f'{self._opened.name}:{self._opened.tokenizer.fingerprint}'

  def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
    begins = string.startswith(self._opened.tokenizer.decode([self.prefix_token_id]))
    add = not begins if add_special_tokens is None else add_special_tokens
    ids = self._tokenizer.encode(string, add_special_tokens=add).ids
    self._opened.check_ids(ids)
    return ids

  def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **kwargs) -> list[tuple[float, bool]]:
    """Of (texts, context's tokens, continuation's tokens); a text that is too long loses its beginning."""
    asked = [(np.asarray(context + continuation, np.int32), len(context) - 1) for _, context, continuation in requests]
    if not asked:
      return []
    scored = Scored(self._opened.model, self._opened.params)
    logprob_Q, _, greedy_Q = likelihood.score(scored, asked, self.max_length, self._batch_size, self._mesh)
    found = [(float(logprob), bool(greedy)) for logprob, greedy in zip(logprob_Q, greedy_Q, strict=True)]
    for (texts, *_), answer in zip(requests, found, strict=True):
      if texts is not None:
        self.cache_hook.add_partial('loglikelihood', texts, answer)
    return found

  def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
    """Of whole texts: windows that do not overlap, but that each begins with the last token of the one before."""
    windows, owner = [], []
    for number, request in enumerate(requests):
      ids = self.tok_encode(request.args[0])  # what it puts before a text is scored too, as the harness's own models do
      pairs = lm_eval_utils.get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1)
      for context, continuation in map(lm_eval_utils.make_disjoint_window, pairs):
        windows.append((None, context, continuation))
        owner.append(number)
    totals = np.zeros(len(requests))
    np.add.at(totals, owner, [logprob for logprob, _ in self._loglikelihood_tokens(windows)])
    for request, total in zip(requests, totals.tolist(), strict=True):
      self.cache_hook.add_partial('loglikelihood_rolling', request.args, total)
    return totals.tolist()

  def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
    """Requests of the same settings in batches of like length."""
    groups: dict[str, list[int]] = {}
    for number, request in enumerate(requests):
      groups.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(number)
    out = [''] * len(requests)
    for numbers in groups.values():
      self._generate(requests, numbers, out)
    for request, text in zip(requests, out, strict=True):
      self.cache_hook.add_partial('generate_until', request.args, text)
    return out

  def _generate(self, requests, numbers: list[int], out: list[str]) -> None:
    settings = dict(requests[numbers[0]].args[1])
    stops = settings.get('until') or []
    stops = [stops] if isinstance(stops, str) else list(stops)
    stops.append(self._opened.tokenizer.roles.end)  # as the harness's own models do
    n = int(settings.get('max_gen_toks', MAX_TOKENS))
    if n >= self.max_length:
      raise UserError(
        f'the task asks for {n} tokens, and the model sees {self.max_length} at once; give --gen-kwargs max_gen_toks=N'
      )
    temperature = float(settings.get('temperature', 0.0) or 0.0) if settings.get('do_sample') else 0.0
    sampling = Sampling(temperature, int(settings.get('top_k', 0) or 0), float(settings.get('top_p', 1.0) or 1.0))
    prompts = {
      k: self.tok_encode(requests[k].args[0])[-(self.max_length - n) :] or [self.prefix_token_id] for k in numbers
    }
    order = sorted(numbers, key=lambda k: -len(prompts[k]))
    for at in range(0, len(order), self._batch_size):
      picked = order[at : at + self._batch_size]
      batch = [prompts[k] for k in picked]
      batch += [batch[-1]] * (-len(batch) % self._rows())
      model, params = self._opened.model, self._opened.params
      texts = generate(
        model,
        params,
        batch,
        n,
        sampling,
        stop_id=self._opened.tokenizer.stop_ids,
        stopped=lambda ids: self._has_stopped(ids, stops),
      )
      for k, ids in zip(picked, texts, strict=False):
        out[k] = _cut(self._tokenizer.decode(ids, skip_special_tokens=True), stops)

  def _has_stopped(self, ids: Sequence[int], stops: list[str]) -> bool:
    text = self._tokenizer.decode(ids, skip_special_tokens=True)
    return any(stop and stop in text for stop in stops)

  def _rows(self) -> int:
    return self._mesh.shape['replica'] * self._mesh.shape['fsdp']


def _cut(text: str, stops: list[str]) -> str:
  """The text up to the first of the stops."""
  for stop in filter(None, stops):
    text = text.split(stop)[0]
  return text


def main(argv: Sequence[str] | None = None) -> None:
  with cli.user_errors():
    args = _parser().parse_args(sys.argv[1:] if argv is None else argv)
    if lm_eval is None:
      raise UserError("the package lm_eval is not installed; run: pip install 'kdjax[lm-eval]'")
    mesh = sharding.make_mesh(MeshConfig(args.replica, args.fsdp, args.tensor), flags='--replica, --fsdp, --tensor')
    with jax.set_mesh(mesh):
      run(args, mesh)


def run(args: argparse.Namespace, mesh: Mesh) -> None:
  folder = paths.of_runs(args.model)
  job = jobs.find(folder) if (folder / 'experiment.json').exists() else None
  chosen = [(job.arm(run), str(run.path)) for run in job.runs] if job else [(folder.name, args.model)]
  tasks = [name.strip() for name in args.tasks.split(',') if name.strip()]
  manager = _manager(tasks, args)
  found = {}
  for arm, path in chosen:
    opened = pretrained.opened(path, mesh, 0 if job and arm == 'teacher' else args.step, args.separator)
    log.info('%s: %s, step %d', arm, path, opened.step)
    answer = lm_eval.simple_evaluate(
      Model(opened, mesh, args.batch_size, args.max_length), tasks=tasks, num_fewshot=args.num_fewshot, limit=args.limit,
      gen_kwargs=args.gen_kwargs, task_manager=manager, bootstrap_iters=0, log_samples=True,
    )  # fmt: skip
    print(lm_eval_utils.make_table(answer))
    found[arm] = answer['results']
    if job:
      keep(job, arm, RunFolder(path), opened, answer)
  if args.output:
    paths.write_json(args.output, found)
  if job:
    print(table.write(job.folder))


def _manager(tasks: Sequence[str], args: argparse.Namespace) -> 'TaskManager':
  """The harness's tasks. Raises UserError where one is not known or cannot be loaded: before any model is."""
  own = args.include_path
  if own and not paths.Path(own).is_dir():
    raise UserError(f'--include-path {own}: no such folder')
  manager = TaskManager(include_path=own, include_defaults=not args.no_defaults)
  if unknown := [name for name in tasks if name not in manager.all_tasks]:
    there = 'lm-eval ls tasks lists them, --include-path adds a folder of your own'
    if own and args.no_defaults:
      there = f'the YAML files that can be read in {own} hold {", ".join(manager.all_tasks) or "none"}'
    raise UserError(f'unknown tasks: {", ".join(unknown)}; {there}')
  if not tasks:
    raise UserError('--tasks names none')
  for name in tasks:
    try:
      manager.load_task_or_group(name)
    except Exception as e:  # whatever a task's own code, its file or the library that fetches its data raises
      what = (str(e).splitlines() or [''])[0][:300]
      raise UserError(
        f'the task {name} cannot be loaded ({type(e).__name__}: {what}); mend its file or its data'
      ) from e
  return manager


def keep(job: jobs.Job, arm: str, run: RunFolder, opened: pretrained.Opened, answer: dict[str, Any]) -> None:
  """Puts the tasks that have an accuracy into the experiment's results, item by item."""
  file = job.folder / jobs.file_name()
  files = paths.read_json(file) or {}
  for name, samples in answer['samples'].items():
    found = _items(samples)
    if found is None:
      log.info('%s: no accuracy for each item; it is in the table above and not in the experiment', name)
      continue
    set_name = f'{jobs.HARNESS}{name}'
    key = {
      'task': name,
      'version': answer['versions'].get(name),
      'few_shot': answer['n-shot'].get(name),
      'items': len(found),
    }
    meta = key | {
      'kind': 'task', 'run': run.name, 'step': opened.step, 'set': set_name, 'accuracy': float(found['correct'].mean()),
      'accuracy_norm': float(found['correct_norm'].mean()), 'chance': float(found['chance'].mean()), 'harness': lm_eval.__version__,
    }  # fmt: skip
    target = results.path(run.results, opened.step, set_name, config_lib.fingerprint(key))
    results.write(target, found, meta)
    files.setdefault(arm, {})[set_name] = paths.relative(target, job.folder)
  paths.write_json(file, files)


def _items(samples: list[dict[str, Any]]) -> pd.DataFrame | None:
  """One row an item; None where items have no accuracy. Items with the same text are told apart by their number."""
  name = next((name for name in ACCURACY if all(np.isscalar(sample.get(name)) for sample in samples)), None)
  if name is None or not samples:
    return None
  norm = 'acc_norm' if all(np.isscalar(sample.get('acc_norm')) for sample in samples) else name
  choices = [len(sample['resps']) if name == 'acc' else 0 for sample in samples]
  return pd.DataFrame({
    'doc': [digest(canonical([sample['doc_id'], str(sample['doc'])])).encode() for sample in samples],
    'group': '',
    'correct': [float(sample[name]) for sample in samples],
    'correct_norm': [float(sample[norm]) for sample in samples],
    'bytes': [[len(str(sample['target']).encode())] for sample in samples],
    'tokens': [[0] for _ in samples],
    'chance': [1 / n if n > 1 else 0.0 for n in choices],
  })  # fmt: skip


def _parser() -> argparse.ArgumentParser:
  parser = cli.Parser(
    prog='python -m kdjax.harness', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('model', metavar='RUN', help="an experiment's folder, a run's, or a Hugging Face folder")
  parser.add_argument('--tasks', required=True, metavar='A,B', help='names of tasks or groups')
  parser.add_argument(
    '--include-path', type=paths.expand, metavar='FOLDER', help='a folder of tasks of your own (YAML)'
  )
  parser.add_argument(
    '--no-defaults', action='store_true', help="know those alone: quicker than reading the harness's thousands"
  )
  parser.add_argument('--num-fewshot', type=cli.count, help="examples in the prompt; default: the task's")
  parser.add_argument('--limit', type=cli.positive, help='items of each task, from its front; default: all')
  parser.add_argument('--batch-size', type=cli.positive, default=16, help='rows of the longest window; default: 16')
  parser.add_argument(
    '--max-length', type=cli.count, default=0, help='tokens seen at once; default: the window of training'
  )
  parser.add_argument('--gen-kwargs', metavar='K=V,...', help='of generations, e.g. max_gen_toks=64')
  parser.add_argument('--step', type=cli.count, default=0, help='which checkpoint; default: the newest')
  parser.add_argument(
    '--separator',
    default='',
    metavar='TOKEN',
    help='of a Hugging Face folder: one token that starts and ends documents',
  )
  parser.add_argument('--output', type=paths.expand, metavar='FILE', help='write the results there too, as JSON')
  for axis in sharding.AXES:
    parser.add_argument(f'--{axis}', type=cli.axis, default=-1 if axis == 'fsdp' else 1, help=f'devices along {axis}')
  return parser


if __name__ == '__main__':
  main()
