"""The summary says each contrast and each validated arm, with the table's numbers."""

import re

import pandas as pd

from kdjax.analysis.grid import summary
from tests.analysis.grid import grid_example


def lines_of(text: str, heading: str) -> list[list[str]]:
  part = text.split(f'## {heading}')[1].split('##')[0]
  return [
    [cell.strip() for cell in line.strip()[1:-1].split(' | ')] for line in part.splitlines() if line.startswith('|')
  ]


def test_every_contrast_has_its_line_and_only_primary_ones_a_verdict():
  effects, contrasts = grid_example.tables()
  text = summary.markdown(effects, contrasts, [])
  for heading, primary in (('Primary contrasts', True), ('Exploratory contrasts', False)):
    head, _, *lines = lines_of(text, heading)
    rows = contrasts[contrasts['primary'] == primary].to_dict('records')
    assert len(lines) == len(rows) > 0 and ('verdict' in head) == primary
    for line, row in zip(lines, rows, strict=True):
      said = dict(zip(head, line, strict=True))
      assert (
        said['question'].startswith(row['question']) and row['detail'] in said['question'] and said['on'] == row['set']
      )
      if row['verdict'] == 'not tested':
        assert 'not tested' in ' '.join(line)
      else:
        assert said['estimate'] == f'{row["estimate"]:+.4f}' and said['MDE'].startswith(f'{row["mde"]:.4f} [')
        assert said['interval'] == f'[{row["low"]:+.4f}, {row["high"]:+.4f}] at {row["level"]:.4g}'
        assert not primary or said['verdict'] == row['verdict']
    assert primary or not any(
      word in ' | '.join(line) for line in lines for word in ('| better', '| worse', '| unresolved')
    )


def test_every_validated_arm_has_its_line_and_each_set_its_columns():
  effects, contrasts = grid_example.tables()
  head, _, *lines = lines_of(summary.markdown(effects, contrasts, []), 'Arms of the student tiny-0.3m, 512k tokens')
  kept = effects.query("validated and (scenario == '' or arm == 'flop_matched')")
  assert len(lines) == len(kept.groupby(['arm', 'teacher', 'teacher_tokens', 'alpha', 'cells']))
  assert head[3:5] == ['in-domain', 'in-domain (fitted T)'] and head[-2:] == [
    'minimal pairs',
    'minimal pairs (per byte)',
  ]
  row = kept.query("arm == 'tuned' and set == 'OOD mean' and measure == 'bits_per_byte_fitted'").iloc[0]
  (line,) = [line for line in lines if line[0] == 'tuned']
  assert line[head.index('OOD mean (fitted T)')] == f'{row["estimate"]:+.3f} [{row["low"]:+.3f}, {row["high"]:+.3f}]'


def test_arms_have_no_verdicts():
  effects, contrasts = grid_example.tables(2)
  *_, first, second = summary.markdown(effects, contrasts, []).removesuffix(f'{summary.LEGEND}\n').split('## Arms of')
  for section in (first, second):
    assert section.count('\n|') > 10
    assert not re.search('better|worse|unresolved|verdict', section)


def test_warnings_come_first_and_an_empty_table_is_told():
  effects, _ = grid_example.tables()
  text = summary.markdown(effects, pd.DataFrame(), ['alpha not validated'])
  assert text.startswith('**alpha not validated**') and 'None were declared' in text
