"""Import models from Hugging Face folders and export models to them.

    python -m kdjax.convert from-hf ~/models/SmolLM2-135M runs/imported/smollm2
    python -m kdjax.convert to-hf runs/weak2strong-.../students/distilled exported

Families: Llama, Qwen2.5, Qwen3, OLMo-2, Gemma 2 and 3 (text), in safetensors files. An imported model is a run folder: it can be a teacher
(--config.teacher.run), a student's initial weights (--config.student.init), or be exported again. A config may also name a Hugging Face folder
itself. An exported model loads with transformers' AutoModelForCausalLM.
"""

import argparse
import logging
import re
import sys
from collections.abc import Sequence

import jax

from kdjax import cli
from kdjax.data.tokenizer import Tokenizer
from kdjax.errors import UserError
from kdjax.runs.folder import RunFolder
from kdjax.runtime import sharding
from kdjax.storage import paths
from kdjax.teachers import frozen, huggingface

log = logging.getLogger('kdjax')
UNITS = {'': 1, 'KB': 10**3, 'MB': 10**6, 'GB': 10**9}
DTYPES = ('float32', 'bfloat16', 'float16')


def main(argv: Sequence[str] | None = None) -> None:
  with cli.user_errors():
    args = _parser().parse_args(sys.argv[1:] if argv is None else argv)
    jax.config.update('jax_platforms', 'cpu')  # the host's memory holds what a device may not
    args.command(args)


def from_hf(args: argparse.Namespace) -> None:
  source = huggingface.Source(args.path, args.separator, args.tokenizer)
  out = RunFolder(paths.absolute(args.out))
  with jax.set_mesh(mesh := sharding.one_device()):
    source.import_into(out, mesh)
  model, tokenizer = source.model, source.tokenizer
  print(
    f'{args.path} ({source.family.name}) -> {args.out}: {model.n_params:,} parameters in {model.config.param_dtype}, '
    f'{tokenizer.vocab_size:,} tokens; {tokenizer.roles}'
  )


def to_hf(args: argparse.Namespace) -> None:
  if args.separator and not args.tokenizer:
    raise UserError('--separator goes with --tokenizer: a run keeps both')
  huggingface.check_new(args.out)
  run = RunFolder(paths.absolute(args.run))
  identity = run.read_record()
  if identity is None:
    raise UserError(f'{args.run} is no run folder: it has no run.json; an experiment keeps its runs in students/')
  tokenizer = Tokenizer.from_file(args.tokenizer, args.separator) if args.tokenizer else run.tokenizer()
  known = identity['fingerprints'].get('tokenizer')
  if known != tokenizer.fingerprint:
    raise UserError(f'--tokenizer {args.tokenizer} is not the one that {args.run} learned with; name that one')
  with jax.set_mesh(mesh := sharding.one_device()):
    model, params, step = frozen.load_saved(run, mesh, args.step)
  # How far a model was trained to look, not how far it could: that is what others take it to be good for.
  seen = identity['config'].get('data', {}).get('seq_len') or model.config.max_seq_len
  origin = {
    'run': run.name,
    'step': step,
    **{key: identity.get(key) for key in ('config', 'fingerprints', 'versions', 'git')},
  }
  dtype = args.dtype or model.config.param_dtype
  family = huggingface.export(
    model, params, tokenizer, args.out, dtype, args.shard_size, args.max_positions or seen, origin,
    trained_here='imported' not in identity['config'],
  )  # fmt: skip
  print(
    f'{args.run}, step {step} -> {args.out}: {family.name}, {model.n_params:,} parameters in {dtype}; {tokenizer.roles}'
  )


def _parser() -> argparse.ArgumentParser:
  parser = cli.Parser(
    prog='python -m kdjax.convert', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  commands = parser.add_subparsers(required=True, metavar='from-hf | to-hf')
  commands.type = str  # the subcommand's own options have types
  tokenizer = cli.Parser(add_help=False)
  tokenizer.add_argument(
    '--tokenizer', default='', metavar='PATH', help="another tokenizer's file or folder; default: the model's own"
  )
  tokenizer.add_argument(
    '--separator',
    default='',
    metavar='TOKEN',
    help="one token that starts and ends documents; default: the tokens with these roles in the tokenizer's files",
  )

  into = commands.add_parser('from-hf', parents=[tokenizer], help='a Hugging Face folder -> a run')
  into.add_argument('path', metavar='PATH', help='with config.json, safetensors files and tokenizer.json')
  into.add_argument('out', metavar='OUT', help="the run's folder")
  into.set_defaults(command=from_hf)

  out = commands.add_parser('to-hf', parents=[tokenizer], help='a run -> a Hugging Face folder')
  out.add_argument('run', metavar='RUN', help='a folder with run.json')
  out.add_argument('out', metavar='OUT', help='a new folder')
  out.add_argument('--step', type=cli.count, default=0, help='which checkpoint; default: the newest')
  out.add_argument('--dtype', choices=DTYPES, help='of the weights in the files; default: as they are')
  out.add_argument('--shard-size', type=_size, default='5GB', help='of one file, at most; default: 5GB')
  out.add_argument(
    '--max-positions',
    type=cli.positive,
    default=0,
    help='max_position_embeddings; default: the window it was trained with',
  )
  out.set_defaults(command=to_hf)
  return parser


def _size(text: str) -> int:
  """'500MB' in bytes."""
  found = re.fullmatch(r'(\d+) ?([KMG]B)?', text.upper())
  if not found or not int(found[1]):
    raise argparse.ArgumentTypeError(f'{text!r} is no size such as 500MB or 5GB')
  return int(found[1]) * UNITS[found[2] or '']


if __name__ == '__main__':
  main()
