"""Write a grid's tables, figures and HTML page, and advise on a teacher.

    python -m kdjax.report --grid=runs/grid-0123456789ab
    python -m kdjax.report --grid=runs/grid-0123456789ab --advise --student=tiny-1m --tokens=2M --budget-flops=2e13

Writes <grid>/report: effects.csv and .parquet (every arm against its baseline on every set), contrasts.csv and .parquet (what the config
declared, with verdicts on its primary tests), summary.md (a summary of both), figures/*.png and *.svg, report.html (one file, no network).
"""

import argparse
import logging
import sys
import time
from collections.abc import Sequence

import ml_collections
import pandas as pd

from kdjax import cli, machine
from kdjax import config as config_lib
from kdjax.analysis.grid import advice, advisor, effects, figures, page, summary, table_rows
from kdjax.analysis.grid.contrasts import NOT_TESTED
from kdjax.analysis.grid.effects import Tables
from kdjax.analysis.table import align
from kdjax.errors import UserError
from kdjax.storage import paths
from kdjax.storage.paths import read_json, write_text
from kdjax.sweeps import cells as cells_lib
from kdjax.sweeps import config as grid_config
from kdjax.sweeps import pilots, runner
from kdjax.sweeps.config import OOD_MEAN, GridConfig

log = logging.getLogger('kdjax')


def main(argv: Sequence[str] | None = None) -> None:
  with cli.user_errors():
    parser = cli.Parser(
      prog='python -m kdjax.report', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--grid', required=True, help="the grid's folder")
    parser.add_argument(
      '--advise', action='store_true', help='name the teacher for a student; with the three options below'
    )
    parser.add_argument('--student', help='a named model, or its non-embedding parameters: tiny-1m, 1.7B')
    parser.add_argument('--tokens', help="the student's training tokens: 50B")
    parser.add_argument('--budget-flops', help='for the student and its teacher: 1e21')
    parser.add_argument(
      '--margin',
      type=float,
      default=advisor.MARGIN,
      help=f"the expected loss that a cheaper option may have, as a share of the best one's gain; default: {advisor.MARGIN}",
    )
    parser.add_argument('--set', default='in-domain', choices=('in-domain', OOD_MEAN), help='what is to be gained')
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)
    paths.check_writable(args.grid)
    folder = paths.runs_path(args.grid)
    grid = load_grid(folder)
    tables = effects.build_tables(grid, folder)
    if args.advise:
      print(advise(grid, tables, args))
    else:
      print(write_report(grid, folder, tables))


def load_grid(folder: paths.Path) -> GridConfig:
  """The config that a grid's folder keeps. Raises UserError if it is no grid's."""
  known = read_json(folder / 'grid.json')
  if known is None:
    raise UserError(f'{folder} is no grid: it has no grid.json; python -m kdjax.grid run prints the folder of a grid')
  runs = str(paths.resolve(folder, known['resolved']['runs']))
  # A grid from before primary contrasts existed declared none, so all of its contrasts are exploratory.
  resolved = {'primary': ()} | known['resolved']
  plans = {
    'hardware': resolved['hardware'] | {'device': 'cpu'}
  }  # no result depends on it, and older grids accepted any name here
  values = ml_collections.ConfigDict(resolved | plans | {'runs': runs})
  return config_lib.resolve_as(GridConfig, grid_config.problems, values)


def write_report(grid: GridConfig, folder: paths.Path, tables: Tables) -> str:
  """Write the report; return what the terminal shows."""
  out = folder / 'report'
  out.mkdir(exist_ok=True)
  for name, table in (('effects', tables.effects), ('contrasts', tables.contrasts), ('teachers', tables.teachers)):
    paths.write_text(out / f'{name}.csv', table.to_csv(index=False))
    with paths.replacing(out / f'{name}.parquet') as temporary:
      table.to_parquet(temporary, index=False)
  write_text(out / 'summary.md', summary.markdown(tables.effects, tables.contrasts, tables.warnings))
  note = '; '.join(tables.warnings)
  figures.write_all(tables.effects, tables.contrasts, out / 'figures', note)
  page.write_page(tables.effects, tables.contrasts, note, facts(grid, folder, tables), out / 'report.html')
  return '\n'.join(
    [
      f'{grid.name} (study={grid.study}, scale={grid.scale}): {folder}',
      *(f'warning: {warning}' for warning in tables.warnings),
      '',
      contrast_table(tables.contrasts),
      '',
      f'page: {out / "report.html"}',
    ]
  )


def facts(grid: GridConfig, folder: paths.Path, tables: Tables) -> dict[str, object]:
  """Collect the page's facts about the grid itself."""
  known, pilot = read_json(folder / 'grid.json') or {}, pilots.read_outcome(folder, grid)
  jobs = runner.list_jobs(grid, folder)
  return {
    'name': grid.name,
    'study': grid.study,
    'scale': grid.scale,
    'data': grid.base.data.source,
    'commit': known.get('git', ''),
    'versions': machine.versions(),
    'started': time.strftime('%Y-%m-%d', time.gmtime(known.get('time', 0))),
    'teachers': sum(not job.cells for job in jobs),
    'students': sum(len(job.cells) for job in jobs),
    'pilot': f'alpha chosen {time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(pilot["time"]))}, hash {pilot["hash"][:12]}'
    if pilot
    else 'none',
    'warnings': tables.warnings,
  }


def contrast_table(contrasts: pd.DataFrame) -> str:
  """Format the declared contrasts, one line each, primary ones first."""
  if contrasts.empty:
    return 'no contrasts were declared'
  rows = [['contrast', 'set', 'verdict', 'estimate', 'interval', 'level', 'MDE [95% interval]', 'seeds']]
  for row in table_rows.each(contrasts.sort_values('primary', ascending=False, kind='stable')):
    place = [f'{row.contrast}{f" ({row.detail})" * bool(row.detail)}', row.set]
    if row.verdict == NOT_TESTED:
      rows.append([*place, row.answer, *[''] * 5])
    else:
      numbers = [f'{row.estimate:+.4f}', f'[{row.low:+.4f}, {row.high:+.4f}]', f'{row.level:.4g}', summary.mde(row)]
      rows.append([*place, row.verdict, *numbers, str(row.n_seeds)])
  legend = (
    'Bits per byte, left minus right; below 0: better. The column `over` of contrasts.csv says what the intervals are over. A verdict, its interval\n'
    'and its MDE (the true difference that is resolved 4 times in 5) share one level, corrected for the primary tests; the rest is exploratory.'
  )
  return f'{align(rows)}\n{legend}'


def advise(grid: GridConfig, tables: Tables, args: argparse.Namespace) -> str:
  missing = [f'--{name.replace("_", "-")}' for name in ('student', 'tokens', 'budget_flops') if not getattr(args, name)]
  if missing:
    raise UserError(f'--advise needs {", ".join(missing)} too, as in --student=tiny-1m --tokens=2M --budget-flops=2e13')
  teachers = tables.teachers[tables.teachers['set'] == args.set] if len(tables.teachers) else tables.teachers
  losses: dict[tuple[str, int], float] = {}
  if len(teachers):
    losses = teachers.groupby(['teacher', 'tokens'])['bits_per_byte'].mean().to_dict()  # type: ignore[assignment]
  surface = advisor.fit_surface(tables.effects, set_name=args.set, teacher_losses=losses)
  student = advice.parse_student(args.student, vocab_size=cells_lib.vocab_size(grid))
  tokens, budget = (
    advice.parse_count(args.tokens, '--tokens'),
    advice.parse_count(args.budget_flops, '--budget-flops'),
  )
  return advice.format_advice(advisor.advise(surface, student, tokens, budget, grid.base.data.seq_len, args.margin))


if __name__ == '__main__':
  main()
