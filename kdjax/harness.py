"""Evaluate models with EleutherAI's lm-evaluation-harness.

    python -m kdjax.harness runs/weak2strong-... --tasks arc_easy,hellaswag --limit 500        all its models
    python -m kdjax.harness runs/weak2strong-.../students/distilled --tasks my_task --include-path my_tasks/
    python -m kdjax.harness ~/models/SmolLM2-135M --tasks gsm8k                                  a Hugging Face folder

The harness is an extra: pip install 'kdjax[lm-eval]'. Results of an experiment's models are added to its table: one column for each task and
filter, with each item paired with the baseline's. The teacher is scored at the step that the students learned from, the students at --step, by
default the newest that all of them have.
"""

import argparse
import collections
import itertools
import json
import logging
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import tokenizers
from jax.sharding import Mesh

from kdjax import cli
from kdjax.analysis import table
from kdjax.config import MeshConfig
from kdjax.errors import UserError
from kdjax.models.sampling import Sampling, generate
from kdjax.runs.folder import RunFolder
from kdjax.runtime import options, sharding
from kdjax.scoring import harness_results, harness_tasks, likelihood
from kdjax.scoring import job as jobs
from kdjax.scoring.text import Scored
from kdjax.storage import paths
from kdjax.storage.files import canonical_json, digest
from kdjax.teachers import by_name
from kdjax.teachers.huggingface.exporting import tokenizer_file

try:
  import lm_eval
  from lm_eval import utils as lm_eval_utils
  from lm_eval.api.model import TemplateLM
  from lm_eval.models.utils import normalize_gen_kwargs
except ImportError:  # reported by main
  lm_eval, TemplateLM = None, object

log = logging.getLogger('kdjax')
MAX_TOKENS = 256  # of a generation, if the task sets no limit
# Generation settings that are not supported, each with the value that has no effect.
UNSUPPORTED = {
  'num_beams': 1,
  'num_return_sequences': 1,
  'repetition_penalty': 1,
  'no_repeat_ngram_size': 0,
  'min_p': 0,
  'typical_p': 1,
  'epsilon_cutoff': 0,
  'eta_cutoff': 0,
  'penalty_alpha': 0,
  'presence_penalty': 0,
  'frequency_penalty': 0,
}


class Model(TemplateLM):
  """Answer the harness's three kinds of request with a kdjax model, in batches of a few fixed lengths.

  Args:
    opened: the model.
    mesh: its data axes hold the rows.
    batch_size: rows at the longest window; shorter windows have more rows.
    max_length: the longest context in tokens; 0: the training window, else the model's own limit.
    seed: of sampled answers. The same seed, prompt and settings give the same answers, whatever the batch size and order.

  Raises:
    UserError: max_length exceeds the model's limit.
  """

  def __init__(self, opened: by_name.OpenModel, mesh: Mesh, batch_size: int = 16, max_length: int = 0, seed: int = 0):
    super().__init__()
    self._opened, self._mesh, self._batch_size, self._seed = opened, mesh, batch_size, seed
    longest = opened.model.config.max_seq_len
    if not 0 <= max_length <= longest:
      raise UserError(f"--max-length {max_length}: must be from 0 to the model's limit of {longest} tokens")
    self.max_length = max_length or opened.trained_window or opened.model.config.max_seq_len
    # Like transformers with an exported model: parse special tokens in text, and put the first token before the text.
    self._tokenizer = tokenizers.Tokenizer.from_str(tokenizer_file(opened.tokenizer, not opened.imported))
    self._tokenizer.no_truncation()
    self._tokenizer.no_padding()
    added = self._tokenizer.get_added_tokens_decoder()
    self._special = {i: token.content for i, token in added.items() if token.special}

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
    """Score (texts, context's tokens, continuation's tokens); a text that is too long is truncated at its beginning."""
    for texts, _, continuation in requests:
      if not continuation:
        raise UserError(f'the continuation {texts and texts[1]!r} has no tokens; correct that item')
    asked = [(np.asarray(context + continuation, np.int32), len(context) - 1) for _, context, continuation in requests]
    if not asked:
      return []
    scored = Scored(self._opened.model, self._opened.params)
    logprob_Q, _, greedy_Q = likelihood.score_requests(scored, asked, self.max_length, self._batch_size, self._mesh)
    found = [(float(logprob), bool(greedy)) for logprob, greedy in zip(logprob_Q, greedy_Q, strict=True)]
    for (texts, *_), answer in zip(requests, found, strict=True):
      if texts is not None:
        self.cache_hook.add_partial('loglikelihood', texts, answer)
    return found

  def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
    """Score whole texts in windows that do not overlap; each window's context is the last token of the previous one."""
    windows, owner = [], []
    for number, request in enumerate(requests):
      ids = self.tok_encode(request.args[0])  # the token before the text is scored too, as in the harness's own models
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
    """Answer requests with the same settings in batches of similar length."""
    repeats: collections.Counter[bytes] = collections.Counter()
    groups: dict[str, list[_Draw]] = {}
    for place, request in enumerate(requests):
      settings = json.dumps(request.args[1], sort_keys=True, default=str)
      asked = canonical_json([settings, request.args[0]])
      number = int(digest(asked + b'%d' % repeats[asked], 4), 16)
      groups.setdefault(settings, []).append(_Draw(place, number))
      repeats[asked] += 1
    out = [''] * len(requests)
    for group in groups.values():
      self._generate(requests, group, out)
    for request, text in zip(requests, out, strict=True):
      self.cache_hook.add_partial('generate_until', request.args, text)
    return out

  def _generate(self, requests, group: Sequence['_Draw'], out: list[str]) -> None:
    asked = _read_settings(requests[group[0].place].args[1], self._opened.tokenizer.roles.end)
    if asked.max_tokens >= self.max_length:
      raise UserError(
        f'the task asks for {asked.max_tokens} tokens, but the context holds {self.max_length}; set a lower limit with --gen-kwargs max_gen_toks=N'
      )
    room = self.max_length - asked.max_tokens
    prompts = {
      draw.place: self.tok_encode(requests[draw.place].args[0])[-room:] or [self.prefix_token_id] for draw in group
    }
    order = sorted(group, key=lambda draw: -len(prompts[draw.place]))
    for at in range(0, len(order), self._batch_size):
      picked = order[at : at + self._batch_size]
      batch = picked + picked[-1:] * (-len(picked) % self._rows())
      model, params = self._opened.model, self._opened.params
      texts = generate(
        model, params, [prompts[draw.place] for draw in batch], asked.max_tokens, asked.sampling, seed=self._seed,
        numbers=[draw.number for draw in batch], stop_id=self._opened.tokenizer.stop_ids, stopped=lambda ids: self._has_stopped(ids, asked.stops),
      )  # fmt: skip
      for draw, ids in zip(picked, texts, strict=False):
        out[draw.place] = _cut(self._decode(ids, asked.stops), asked.stops)

  def _has_stopped(self, ids: Sequence[int], stops: Sequence[str]) -> bool:
    text = self._decode(ids, stops)
    return len(ids) > len(self._before_special(ids, stops)) or any(stop in text for stop in stops)

  def _decode(self, ids: Sequence[int], stops: Sequence[str]) -> str:
    return self._tokenizer.decode(self._before_special(ids, stops), skip_special_tokens=True)

  def _before_special(self, ids: Sequence[int], stops: Sequence[str]) -> list[int]:
    """Return the tokens before the first special token among the stops. Decoding drops special tokens, so the text cannot show them."""
    return list(itertools.takewhile(lambda i: self._special.get(i) not in stops, ids))

  def _rows(self) -> int:
    return sharding.n_row_shards(self._mesh)


class _Draw(NamedTuple):
  """A request's place in the list, and the number that seeds its random numbers."""

  place: int
  number: int


class _Settings(NamedTuple):
  """A task's generation settings: an answer ends at the first of the stops or after max_tokens."""

  sampling: Sampling
  max_tokens: int
  stops: list[str]


def _read_settings(asked: dict[str, Any], end: str) -> _Settings:
  """Read a request's settings like the harness's own models; the tokenizer's `end` token stops too.

  Raises UserError for a setting that cannot be read or is not supported.
  """
  given = {name: value for name, value in asked.items() if value is not None}
  try:
    settings = normalize_gen_kwargs(given, MAX_TOKENS)
    temperature = float(settings.get('temperature', 0.0)) if settings['do_sample'] else 0.0
    sampling = Sampling(temperature, int(settings.get('top_k', 0)), float(settings.get('top_p', 1.0) or 1.0))
    stops = [stop for stop in map(str, [*settings['until'], end]) if stop]
    refused = [name for name in UNSUPPORTED if float(settings.get(name, UNSUPPORTED[name])) != UNSUPPORTED[name]]
  except (TypeError, ValueError) as e:
    raise UserError(f'the generation settings {asked} cannot be read ({e}); correct the task or --gen-kwargs') from e
  if refused or settings['max_gen_toks'] < 1:
    name = next(iter(refused), 'max_gen_toks')
    raise UserError(
      f'the task asks for {name}={settings[name]}, which is not supported; give --gen-kwargs {name}={UNSUPPORTED.get(name, "N")}'
    )
  return _Settings(sampling, settings['max_gen_toks'], stops)


def _cut(text: str, stops: Sequence[str]) -> str:
  """Cut the text at the first of the stops."""
  for stop in stops:
    text = text.split(stop)[0]
  return text


def main(argv: Sequence[str] | None = None) -> None:
  with cli.user_errors():
    # Intermixed, or argparse treats RUN as missing if an option precedes it.
    args = _parser().parse_intermixed_args(sys.argv[1:] if argv is None else argv)
    if lm_eval is None:
      raise UserError("the package lm_eval is not installed; run: pip install 'kdjax[lm-eval]'")
    mesh = sharding.make_mesh(MeshConfig(args.replica, args.fsdp, args.tensor), flags='--replica, --fsdp, --tensor')
    with jax.set_mesh(mesh):
      run(args, mesh)


def run(args: argparse.Namespace, mesh: Mesh) -> None:
  names, model = _split_model(args)
  selection = harness_tasks.find_tasks(names, args.include_path, not args.no_defaults, args.confirm_run_unsafe_code)
  folder = paths.runs_path(model)
  job = jobs.find_job(folder) if (folder / 'experiment.json').exists() else None
  chosen = [(folder.name, model, args.step)]
  if job:
    chosen = [(job.arm(run), str(run.path), step) for run, step in jobs.list_checkpoints(job, args.step)]
  answers: dict[str, Any] = {}
  files: dict[str, dict[str, paths.Path]] = {}
  for arm, path, step in chosen:
    opened = by_name.open_model(path, mesh, step, args.separator)
    log.info('%s: %s, step %d', arm, path, opened.step)
    answer = _evaluate(opened, selection, args, mesh)
    answers[arm] = answer['results']
    if job:
      settings = {'max_length': args.max_length, 'gen_kwargs': args.gen_kwargs, 'seed': args.seed}
      settings |= {'harness': lm_eval.__version__}
      files[arm] = {
        items.name: harness_results.write_items(RunFolder(path), opened.step, items, settings)
        for items in harness_results.read_items(answer)
      }
  if args.output:
    paths.write_json(args.output, answers)
  if job:
    harness_results.add_to_experiment(job, args.step, {arm: step for arm, _, step in chosen}, files)
    print(table.write_table(job.folder, args.step))


def _evaluate(
  opened: by_name.OpenModel, selection: harness_tasks.Selection, args: argparse.Namespace, mesh: Mesh
) -> dict[str, Any]:
  """Evaluate one model and print the harness's own tables."""
  answer = lm_eval.simple_evaluate(
    Model(opened, mesh, args.batch_size, args.max_length, args.seed), tasks=list(selection.specs), num_fewshot=args.num_fewshot,
    limit=args.limit, gen_kwargs=args.gen_kwargs, task_manager=selection.manager, bootstrap_iters=0, log_samples=True,
    confirm_run_unsafe_code=args.confirm_run_unsafe_code,
  )  # fmt: skip
  print(lm_eval_utils.make_table(answer))
  if 'groups' in answer:
    print(lm_eval_utils.make_table(answer, 'groups'))
  return answer


def _split_model(args: argparse.Namespace) -> tuple[list[str], str]:
  """Return (task names, the model). If RUN follows --tasks, argparse parses it as the last task."""
  tasks, model = list(args.tasks), args.model
  if model is None and len(tasks) > 1:
    model = tasks.pop()
  if model is None:
    raise UserError("RUN is missing: name an experiment's folder, a run's, or a Hugging Face folder")
  return harness_tasks.parse_names(tasks), model


def _parser() -> argparse.ArgumentParser:
  parser = cli.Parser(
    prog='python -m kdjax.harness', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    'model', metavar='RUN', nargs='?', help="an experiment's folder, a run's, or a Hugging Face folder"
  )
  parser.add_argument(
    '--tasks',
    required=True,
    nargs='+',
    metavar='A,B',
    help='names of tasks, groups and tags, or patterns such as "arc_*"; YAML files',
  )
  parser.add_argument(
    '--include-path', type=options.path, metavar='FOLDER', help='a folder of tasks of your own (YAML)'
  )
  parser.add_argument(
    '--no-defaults',
    action='store_true',
    help="use only your own tasks, which is faster than reading the harness's thousands",
  )
  parser.add_argument('--num-fewshot', type=cli.count, help="examples in the prompt; default: the task's")
  parser.add_argument(
    '--limit',
    type=harness_tasks.parse_limit,
    help='the first items of each task: their number, or below 1 their share; default: all',
  )
  parser.add_argument('--batch-size', type=cli.positive, default=16, help='rows of the longest window; default: 16')
  parser.add_argument('--gen-kwargs', metavar='K=V,...', help='of generations, e.g. max_gen_toks=64')
  parser.add_argument('--seed', type=cli.seed, default=0, help='of sampled answers (do_sample); default: 0')
  parser.add_argument(
    '--step', type=cli.count, default=0, help="the students' checkpoint, or the run's; default: the newest"
  )
  parser.add_argument(
    '--max-length', type=cli.count, default=0, help='context length in tokens; default: the training window'
  )
  parser.add_argument(
    '--separator',
    default='',
    metavar='TOKEN',
    help='of a Hugging Face folder: one token that starts and ends documents',
  )
  parser.add_argument(
    '--output', type=options.path, metavar='FILE', help='also write the results to this file, as JSON'
  )
  parser.add_argument(
    '--confirm-run-unsafe-code',
    action='store_true',
    help='run the code that the model writes, for tasks that test code',
  )
  for axis in sharding.AXES:
    parser.add_argument(f'--{axis}', type=cli.axis, default=-1 if axis == 'fsdp' else 1, help=f'devices along {axis}')
  return parser


if __name__ == '__main__':
  main()
