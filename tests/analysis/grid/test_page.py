"""The page holds the whole table, loads nothing, and its filters and figures agree with the table and with gridfigures."""

import html.parser
import json
import re
import shutil
import subprocess

import numpy as np
import pandas as pd
import pytest

from kdjax.analysis.grid import figures as gridfigures
from kdjax.analysis.grid import page, table_rows
from tests.analysis.grid import grid_example

FACTS = {
  'name': 'grid-<1>',
  'scale': 'laptop',
  'data': 'sotu',
  'commit': '0123456789ab',
  'versions': {'jax': '0.10.2'},
  'students': 180,
  'warnings': ['alpha not validated', 'results of mixed code versions: a & b'],
}
CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
VERDICT = re.compile(r'better|worse|unresolved|verdict')
VOID = {'meta', 'link', 'br', 'input', 'img', 'hr'}


class Parser(html.parser.HTMLParser):
  """Tags in balance, attributes that load something, and the text of scripts and of the rest."""

  def __init__(self, text: str):
    super().__init__()
    self.open: list[tuple[str, dict]] = []
    self.loads: list[str] = []
    self.scripts: list[tuple[dict, str]] = []
    self.words: list[str] = []
    self.ids: list[str] = []
    self.feed(text)
    self.close()

  def handle_starttag(self, tag, attrs):
    values = dict(attrs)
    self.loads += [
      value or '' for name, value in attrs if name in ('src', 'href', 'srcset', 'action', 'data', 'poster')
    ]
    self.ids += [values['id']] if 'id' in values else []
    if tag not in VOID:
      self.open.append((tag, values))

  def handle_endtag(self, tag):
    assert self.open.pop()[0] == tag

  def handle_data(self, data):
    tag, values = self.open[-1] if self.open else ('', {})
    if tag == 'script':
      self.scripts.append((values, data))
    elif tag != 'style':
      self.words.append(data)


@pytest.fixture(scope='module')
def tables():
  effects, contrasts = grid_example.tables(2)
  effects.loc[effects.index[5], ['low', 'high']] = [-np.inf, np.inf]
  effects.loc[effects.index[6], ['p', 'df']] = np.nan
  return effects, contrasts


@pytest.fixture(scope='module')
def path(tables, tmp_path_factory):
  path = tmp_path_factory.mktemp('page') / 'report.html'
  page.write_page(*tables, 'made-up numbers', FACTS, path)
  return path


@pytest.fixture(scope='module')
def parsed(path):
  return Parser(path.read_text(encoding='utf-8'))


def embedded(parsed: Parser) -> dict:
  (text,) = [text for values, text in parsed.scripts if values.get('id') == 'data']
  return json.loads(text)


def unpacked(column: dict) -> list:
  values = [float(value) if value in ('inf', '-inf') else value for value in column['values']]
  return [values[i] for i in column['index']] if 'index' in column else values


def test_the_page_is_one_whole_file_of_bearable_size(path, parsed):
  assert not parsed.open
  assert len(set(parsed.ids)) == len(parsed.ids)
  assert path.stat().st_size < 7e6
  assert [each.name for each in path.parent.iterdir()] == ['report.html']


def test_it_loads_nothing(path, parsed):
  assert parsed.loads and all(value.startswith(('#', 'data:')) for value in parsed.loads)
  own = path.read_text(encoding='utf-8').replace(page.offline.get_plotlyjs(), '')
  assert 'http://' not in own and 'https://' not in own
  assert '@import' not in own and 'url(' not in own


def test_the_embedded_table_is_the_table(parsed, tables):
  effects, _ = tables
  data = embedded(parsed)
  assert [column for column in data['columns'] if column in effects] and set(effects) <= set(data['columns'])
  for name in effects:
    found = pd.Series(unpacked(data['effects'][name]))
    assert len(found) == len(effects)
    if effects[name].dtype.kind in 'fi':
      np.testing.assert_allclose(found.astype(float), effects[name], rtol=1e-8, err_msg=name)
    else:
      assert found.tolist() == effects[name].tolist(), name


def test_alphas_and_settings_that_differ_in_late_digits_are_told_apart(tables):
  """By the page's keys: the strings of JavaScript's `String`."""
  effects, contrasts = tables
  effects = effects.copy()
  first, second = sorted(set(effects['alpha']))[1:3]
  effects['alpha'] = effects['alpha'].replace({first: 0.123456789012, second: 0.123456789013})
  longer = effects.assign(student_tokens=effects['student_tokens'] + 1)
  data = page.payload(pd.concat([effects, longer], ignore_index=True), contrasts)
  assert {'0.123456789012', '0.123456789013'} <= set(data['options']['alpha']) & set(data['alphas'])
  assert {0.123456789012, 0.123456789013} <= set(data['effects']['alpha']['values'])
  assert (
    len(data['options']['student'])
    == 2 * effects[['student', 'student_tokens', 'distinct_tokens']].drop_duplicates().shape[0]
  )


def test_the_figures_words_are_there(parsed):
  figures = embedded(parsed)['figures']
  assert list(figures) == list(gridfigures.FIGURES)
  assert all(each['note'] == 'made-up numbers' and each['title'] and each['how'] for each in figures.values())


def test_a_note_of_its_own_for_a_figure(tables):
  figures = page.payload(*tables, {'alpha_curves': 'three alphas only'})['figures']
  assert figures['alpha_curves']['note'] == 'three alphas only' and figures['equal_flops']['note'] == ''


def test_the_contrasts_stand_first_with_their_verdicts_in_words(path, tables):
  text = path.read_text(encoding='utf-8')
  body = text[text.index('<section id="contrasts">') : text.index('<section id="figures">')]
  lines = re.findall(r'<tr>(.*?)</tr>', body)[1:]
  ordered = tables[1].sort_values('primary', ascending=False, kind='stable')
  for line, row in zip(lines, ordered.itertuples(), strict=True):
    assert row.question in line and f'>{row.verdict}</span>' in line and row.answer in line
    if row.verdict != 'not tested':
      assert f'>{row.estimate:+.4f}<' in line and f'[{row.low:+.4f}, {row.high:+.4f}]' in line
      assert f'>{row.mde:.4f}<br>[{row.mde_low:.4f}, {row.mde_high:.4f}]<' in line
      assert f'>{row.level:.4g}<' in line and f'{row.n_seeds} seed' in line and f'{row.n_documents} documents' in line
    else:
      assert 'nan' not in line


def test_arms_have_no_verdicts(path, parsed, tables):
  """Neither the table's frame, nor the columns that it is drawn from, nor the script that draws it has the words of one."""
  text, data = path.read_text(encoding='utf-8'), embedded(parsed)
  frame = text[text.index('<section id="table">') : text.index('<section id="legend">')]
  columns = {name: set(unpacked(data['effects'][name])) for name in data['effects']}
  assert set(columns) >= set(tables[0])
  said = [frame, *columns, *(value for values in columns.values() for value in values if isinstance(value, str))]
  assert not [each for each in said if VERDICT.search(each)]
  script = page._own('page.js').replace('(below 0: better)', '')  # of an axis
  assert not VERDICT.search(script)


def test_facts_and_warnings_are_shown_as_text(parsed, path):
  words = ' '.join(' '.join(parsed.words).split())
  for said in ('grid-<1>', 'laptop', 'jax 0.10.2', '0123456789ab', '180', *FACTS['warnings']):
    assert said in words
  text = path.read_text(encoding='utf-8')
  assert text.index('alpha not validated') < text.index('<section id="contrasts">')


def test_every_column_of_the_table_is_explained(tables):
  legend = ' '.join([*page.LEGEND, *page.LEGEND.values()])
  for name in (
    'alpha',
    'arm',
    'scenario',
    'validated',
    'OOD',
    'ECE',
    'MDE',
    'level',
    'exploratory',
    'unigram',
    'fitted T',
    'n_seeds',
    'iso',
    'annealed',
    'draw',
  ):
    assert name in legend


def test_text_cannot_end_its_script(tmp_path, tables):
  effects = tables[0][:50].assign(over='<!--<script></script><b>')
  page.write_page(effects, tables[1][:0], '', {'name': '</title>'}, tmp_path / 'p.html')
  parsed = Parser((tmp_path / 'p.html').read_text(encoding='utf-8'))
  assert not parsed.open and set(unpacked(embedded(parsed)['effects']['over'])) == {'<!--<script></script><b>'}
  text = (tmp_path / 'p.html').read_text(encoding='utf-8')
  assert '<' not in text.split('id="data">')[1].split('</script>')[0]


def test_nothing_at_all_is_still_a_page(tmp_path):
  page.write_page(pd.DataFrame(), pd.DataFrame(), '', {}, tmp_path / 'p.html')
  parsed = Parser((tmp_path / 'p.html').read_text(encoding='utf-8'))
  assert 'No contrasts were declared.' in ' '.join(parsed.words)


# In a browser


def dumped(path, fragment: str = '') -> tuple[str, list[str]]:
  """(the DOM after all scripts, what went to the console)."""
  command = [
    CHROMIUM,
    '--headless',
    '--no-sandbox',
    '--disable-gpu',
    '--enable-logging=stderr',
    f'--user-data-dir={path.parent / "chromium"}',
  ]
  command += ['--window-size=1280,2400', '--virtual-time-budget=60000', '--dump-dom', f'file://{path}{fragment}']
  done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
  return done.stdout, [line for line in done.stderr.splitlines() if 'CONSOLE' in line]


def counted(dom: str) -> tuple[int, int]:
  shown, of = re.search(r'id="count">(\d+) of (\d+) rows', dom).groups()
  return int(shown), int(of)


def drawn_in(dom: str) -> dict[str, tuple[int, float]]:
  found = re.findall(r'<article id="figure-(\w+)" data-points="(\d+)" data-sum="([^"]+)"', dom)
  return {name: (int(points), float(total)) for name, points, total in found}


needs_browser = pytest.mark.skipif(
  CHROMIUM is None, reason='no chromium, chromium-browser or google-chrome is installed'
)


@pytest.fixture(scope='module')
def opened(path):
  return dumped(path)


@needs_browser
def test_it_opens_without_a_word_on_the_console(opened):
  dom, console = opened
  assert console == []
  assert re.search(r'data-drawn="([1-9]\d*)"', dom)


@needs_browser
def test_the_table_that_is_drawn_has_no_verdicts(opened):
  dom = opened[0]
  drawn = dom[dom.index('<table id="effects"') : dom.index('<section id="legend">')]
  assert drawn.count('<tr') > 100 and not VERDICT.search(drawn)


@needs_browser
def test_its_figures_draw_what_the_png_figures_draw(opened, tables):
  found = drawn_in(opened[0])
  assert list(found) == list(gridfigures.FIGURES)
  for name, (points, total) in found.items():
    drawn = gridfigures.select_rows(name, tables[0])
    assert points == len(drawn), name
    assert total == pytest.approx(drawn['estimate'].sum(), abs=1e-5), name


@needs_browser
@pytest.mark.slow
def test_the_table_has_each_row(path, tables):
  """One student's on one set: the browser shows at most 3,000 rows at first."""
  effects = tables[0]
  setting = table_rows.labelled(effects)['setting']
  first = setting.iloc[0]
  mine = effects[(setting == first) & (effects['set'] == 'in-domain')]
  dom, console = dumped(path, '#set=in-domain&student=' + first.replace(' ', '%20'))
  assert console == [] and counted(dom) == (len(mine), len(effects))
  assert [int(i) for i in re.findall(r'<tr data-id="(\d+)"', dom)] == mine.index.tolist()


@needs_browser
@pytest.mark.parametrize(
  ('fragment', 'query'),
  [
    ('#teacher=tiny-0.1m', "teacher == 'tiny-0.1m'"),
    pytest.param('#teacher=none&measure=top1', "teacher == '' and measure == 'top1'", marks=pytest.mark.slow),
    pytest.param('#alpha=0.4&set=OOD%20mean', "alpha == 0.4 and set == 'OOD mean'", marks=pytest.mark.slow),
    pytest.param(
      '#budget=102.4k%20annealed&arm=distilled',
      "teacher_tokens == 102400 and arm == 'distilled'",
      marks=pytest.mark.slow,
    ),
    pytest.param('#set=minimal%20pairs&measure=accuracy', "measure == 'accuracy'", marks=pytest.mark.slow),
    pytest.param('#teacher=unheard-of', 'student_tokens > 0', marks=pytest.mark.slow),
  ],
)
def test_a_filter_in_the_address_changes_what_is_shown(path, tables, fragment, query):
  dom, console = dumped(path, fragment)
  assert console == []
  assert counted(dom) == (len(tables[0].query(query)), len(tables[0]))


@needs_browser
@pytest.mark.slow
def test_a_filter_acts_on_the_figures(path, tables):
  dom, _ = dumped(path, '#teacher=tiny-0.1m')
  kept = tables[0].query("teacher in ('tiny-0.1m', '')")
  for name, (points, total) in drawn_in(dom).items():
    drawn = gridfigures.select_rows(name, kept)
    assert points == len(drawn), name
    assert total == pytest.approx(drawn['estimate'].sum(), abs=1e-5), name


@needs_browser
def test_an_empty_page_opens_too(tmp_path):
  page.write_page(pd.DataFrame(), pd.DataFrame(), '', {}, tmp_path / 'p.html')
  dom, console = dumped(tmp_path / 'p.html')
  assert console == [] and counted(dom) == (0, 0)
  assert dom.count('Not drawn') >= len(gridfigures.FIGURES)
