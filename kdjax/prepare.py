"""Build the corpus of a config and report what is in it.

    python -m kdjax.prepare --config=configs/weak2strong.py --config.data.source='texts/*.jsonl.zst'

The text is tokenised on all cores, split by document and packed into checksummed token stores, which every training run of the same data opens.
A build that was killed is resumed by the same command. The report counts exact and near duplicates and the share of each test set that is also in
the training split. It is printed and saved as report.json in the corpus's folder.
"""

import argparse
import dataclasses
import logging
import sys
import time
from collections.abc import Sequence
from typing import Any

from kdjax import cli
from kdjax.data import fidelity, overlap
from kdjax.data.corpus import Corpus, prepare
from kdjax.runtime.progress import bar
from kdjax.storage import paths

log = logging.getLogger('kdjax')


def main(argv: Sequence[str] | None = None) -> None:
  with cli.user_errors(resumable=True):
    parser = cli.Parser(
      prog='python -m kdjax.prepare', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--no-report', action='store_true', help='build alone: the report reads all tokens again')
    config, args = cli.parse(parser, sys.argv[1:] if argv is None else argv, cli.load_config)
    paths.check_writable(config.runs)
    begin = time.monotonic()
    corpus = prepare(config.data, config.eval, config.runs)
    seconds = time.monotonic() - begin
    print(describe(corpus, seconds))
    if not args.no_report:
      found = report(corpus)
      paths.write_json(corpus.folder / 'report.json', found)
      print(format_report(found))


def describe(corpus: Corpus, seconds: float) -> str:
  """The corpus for people: splits, tokens and where it is."""
  lines = [f'{corpus.folder}, in {seconds:.0f} s', '']
  sets = {'train': corpus.train, 'validation': corpus.validation, 'test': corpus.test}
  sets |= {f'{name} (out of domain)': one.test for name, one in corpus.ood.items()}
  lines.append(f'{"":<28}{"documents":>12}{"bytes":>16}{"tokens":>16}{"bytes/token":>13}')
  for name, store in sets.items():
    n_bytes = int(store.n_bytes.sum())
    lines.append(f'{name:<28}{store.n_docs:>12,}{n_bytes:>16,}{store.n_tokens:>16,}{n_bytes / store.n_tokens:>13.2f}')
  if corpus.losses:
    lines += ['', fidelity.describe(corpus.losses)]
  counts = corpus.meta['counts']['in-domain']
  lines += [
    '',
    f'{counts["read"]:,} documents read; {counts["duplicates"]:,} were exact duplicates and {counts["empty"]:,} empty',
  ]
  used = sum(counts[f'{split}_documents'] for split in ('train', 'validation', 'test'))
  if rest := counts['read'] - counts['duplicates'] - counts['empty'] - used:
    lines.append(
      f'{rest:,} stand in no split: held out beyond eval.max_bytes and eval.max_validation_bytes, or left over of a mixture'
    )
  return '\n'.join(lines)


def report(corpus: Corpus, progress: bool = True) -> dict[str, Any]:
  """Near-duplicates in the training split, and each test set's overlap with it."""
  sets = {'test': corpus.test, 'validation': corpus.validation} | {name: one.test for name, one in corpus.ood.items()}
  total = 2 * corpus.train.n_tokens
  with bar('report', total, unit='token', unit_scale=True, enabled=progress, leave=False) as tokens:
    near = overlap.duplicates(corpus.train, tokens.update)
    found = overlap.overlaps(corpus.train, sets, tokens.update)
  return {'near_duplicates': near, 'overlap': {name: dataclasses.asdict(one) for name, one in found.items()}}


def format_report(found: dict[str, Any]) -> str:
  near = found['near_duplicates']
  lines = [
    '',
    f'near-duplicates in the training split: {near["in_clusters"]:,} of {near["documents"]:,} documents, in {near["clusters"]:,} clusters '
    f'(the largest {near["largest"]:,}); {near["left_without"]:,} documents with one of each',
    '',
    f'{f"stretches of {overlap.STRETCH} tokens that are in the training split too":<60}{"documents":>10}{"touched":>9}{"mostly":>8}{"share":>9}',
  ]
  for name, one in found['overlap'].items():
    lines.append(f'  {name:<58}{one["documents"]:>10,}{one["touched"]:>9,}{one["mostly"]:>8,}{one["share"]:>9.2%}')
  return '\n'.join(lines)


if __name__ == '__main__':
  main()
