"""Generate text from a checkpoint or a Hugging Face folder.

    python -m kdjax.generate runs/weak2strong-.../students/distilled "The state of the Union"
    python -m kdjax.generate runs/weak2strong-... "The state of the Union" --temperature 0.8 --samples 3    all its students, side by side
    python -m kdjax.generate ~/models/SmolLM2-135M "Once upon a time" --temperature 0                       a Hugging Face folder

A prompt is the beginning of a document: it is prefixed with the token that starts each document, unless it already begins with it. The text ends
at any of the model's end tokens. The name of a special token in a prompt is plain text unless --special is given.
"""

import argparse
import logging
import sys
from collections.abc import Iterator, Sequence

import jax

from kdjax import cli
from kdjax.data.tokenizer import Tokenizer
from kdjax.models.sampling import TEMPERATURES, Sampling, cut_at, is_temperature, stream
from kdjax.runtime import sharding
from kdjax.runtime.options import number
from kdjax.scoring import job as jobs
from kdjax.storage import paths
from kdjax.teachers import by_name

log = logging.getLogger('kdjax')
temperature = number(is_temperature, TEMPERATURES)


def main(argv: Sequence[str] | None = None) -> None:
  with cli.user_errors():
    args = _parser().parse_args(sys.argv[1:] if argv is None else argv)
    sampling = Sampling(args.temperature, args.top_k, args.top_p)
    with jax.set_mesh(mesh := sharding.one_device()):
      named = models(args.model)
      for name, path in named:
        opened = by_name.open_model(path, mesh, args.step, args.separator)
        _note(opened, args.max_tokens)
        for k in range(args.samples):
          title = ' '.join([name] * (len(named) > 1) + [f'{k + 1}'] * (args.samples > 1))
          if title:
            print(f'--- {title}')
          for piece in texts(opened, args.prompt, args.max_tokens, sampling, (args.seed + k) % 2**32, args.special):
            print(piece, end='', flush=True)
          print('\n' if title else '')


def models(path: str) -> list[tuple[str, str]]:
  """(name, folder) of the students of an experiment, or of the one model that a folder holds."""
  folder = paths.runs_path(path)
  if (folder / 'experiment.json').exists():
    return [(run.name, str(run.path)) for run in jobs.find_job(folder).students]
  return [(folder.name, path)]


def texts(
  opened: by_name.OpenModel, prompt: str, max_tokens: int, sampling: Sampling, seed: int, special: bool = False
) -> Iterator[str]:
  """Yield the prompt and then what follows it, piece by piece, as soon as a piece is whole characters."""
  tokenizer = opened.tokenizer
  ids = prompt_ids(opened, prompt, special)
  yield prompt
  said, shown = ids[1:], len(tokenizer.decode(ids[1:]))
  for tokens_1xN in stream(
    opened.model, opened.params, [ids], max_tokens, sampling, seed=seed, stop_id=tokenizer.stop_ids
  ):
    said += cut_at(tokens_1xN[0].tolist(), tokenizer.stop_ids)
    text = _whole(tokenizer, said)
    yield text[shown:]
    shown = max(shown, len(text))
  yield tokenizer.decode(said)[shown:]


def prompt_ids(opened: by_name.OpenModel, prompt: str, special: bool = False) -> list[int]:
  """Encode a prompt after the token that starts a document. Raises UserError for a special token without a row in the weights."""
  tokenizer = opened.tokenizer
  ids = tokenizer.encode_batch([prompt], special=special)[0].tolist()
  opened.check_ids(ids)
  return ids if ids[:1] == [tokenizer.separator_id] else [tokenizer.separator_id, *ids]


def _whole(tokenizer: Tokenizer, ids: list[int]) -> str:
  """The text, less a character at its end of which bytes are to come."""
  return tokenizer.decode(ids).rstrip('\ufffd')


def _note(opened: by_name.OpenModel, max_tokens: int) -> None:
  if opened.trained_window and max_tokens > opened.trained_window:
    log.info(
      'note: the model was trained on windows of %s tokens; what it says beyond them is a guess',
      f'{opened.trained_window:,}',
    )


def _parser() -> argparse.ArgumentParser:
  parser = cli.Parser(
    prog='python -m kdjax.generate', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('model', metavar='RUN', help="a run's folder, an experiment's, or a Hugging Face folder")
  parser.add_argument(
    'prompt', metavar='PROMPT', nargs='?', default='', help='default: empty, the beginning of a document'
  )
  parser.add_argument('--max-tokens', type=cli.positive, default=128, help='at most so many; default: 128')
  parser.add_argument(
    '--temperature', type=temperature, default=1.0, help='0: always the most likely token; default: 1'
  )
  parser.add_argument(
    '--top-k', type=cli.count, default=0, help='sample from this many of the most likely tokens; default: all'
  )
  parser.add_argument(
    '--top-p', type=cli.share, default=1.0, help='sample from the most likely tokens with this total probability'
  )
  parser.add_argument('--seed', type=cli.seed, default=0, help='the same seed gives the same text; default: 0')
  parser.add_argument('--samples', type=cli.positive, default=1, help='how many texts, of the seeds that follow')
  parser.add_argument('--step', type=cli.count, default=0, help='which checkpoint; default: the newest')
  parser.add_argument(
    '--separator',
    default='',
    metavar='TOKEN',
    help='of a Hugging Face folder: one token that starts and ends documents',
  )
  parser.add_argument(
    '--special', action='store_true', help='special tokens in the prompt count as such, as chats need them'
  )
  return parser


if __name__ == '__main__':
  main()
