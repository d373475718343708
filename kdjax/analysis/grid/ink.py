"""Ink of a grid's figures: panels, forests, points with intervals, legends, colours; saved as the same bytes for the same numbers."""

import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib
import matplotlib.colors
import matplotlib.figure
import matplotlib.lines
import numpy as np
import pandas as pd
from scipy import optimize

from kdjax.analysis.grid import table_rows
from kdjax.storage import paths


def axis(measure: str, per: str = '') -> str:
  """What an axis of differences says: unit, baseline and direction."""
  return f'{table_rows.UNITS[measure]}{per}, less the LM-only student’s\n{table_rows.SENSE.get(measure, " (below 0: better)").strip()}'.strip()


def panels(rows: pd.DataFrame, height: float):
  """The figure, and the (axes, set) of a panel for each set that was scored; the other's panel says that it was not."""
  figure = matplotlib.figure.Figure(figsize=(6 * len(table_rows.SETS) + 1.8, height + 1.4), layout='constrained')
  panels = list(zip(figure.subplots(1, len(table_rows.SETS)), table_rows.SETS, strict=True))
  return figure, scored(rows, panels)


def scored(rows: pd.DataFrame, panels: Iterable[tuple[Any, str]]) -> list[tuple[Any, str]]:
  kept = []
  for axes, name in panels:
    if (rows['set'] == name).any():
      kept.append((axes, name))
    else:
      say(axes, f'{name}: not scored')
  return kept


def forests(n: int, n_labels: int, row: float, columns: int = 3, wide: float = 4.4):
  lines = -(-n // columns)
  figure = matplotlib.figure.Figure(
    figsize=(wide * min(n, columns) + 2.4, lines * (row * n_labels + 1.1) + 1.6), layout='constrained'
  )
  grid = figure.subplots(lines, min(n, columns), squeeze=False, sharey=True)
  for axes in grid.flat[n:]:
    axes.set_visible(False)
  return figure, grid.flat[:n]


def forest(axes, rows: pd.DataFrame, labels: list[str], n_slots: int) -> None:
  """Rows at their labels' heights; within a row the slots one below the other."""
  rows = rows.assign(height=rows['at'].map(labels.index) + (rows['slot'] - (n_slots - 1) / 2) * 0.7 / n_slots)
  for (colour, marker, hollow), part in rows.groupby(['colour', 'marker', 'hollow'], sort=False):
    face = 'white' if hollow else colour
    errorbars(axes, part['height'], part, sideways=True, color=colour, marker=marker, markersize=5, mfc=face)
  axes.set_yticks(range(len(labels)), labels, fontsize=8.5)
  axes.set_ylim(len(labels) - 0.4, -0.6)
  for place in range(1, len(labels)):
    axes.axhline(place - 0.5, color='#dddddd', linewidth=0.6, zorder=0)
  axes.locator_params(axis='x', nbins=6)
  zero(axes, 'x')


def errorbars(axes, at, rows: pd.DataFrame, sideways: bool = False, **style: Any) -> None:
  """Points with their intervals; a whisker that has no end is not drawn."""
  style = {'capsize': 2, 'elinewidth': 0.9, 'linestyle': 'none'} | style
  if sideways:
    axes.errorbar(rows['drawn'], at, xerr=whiskers(rows, 'drawn'), **style)
  else:
    axes.errorbar(at, rows['drawn'], yerr=whiskers(rows, 'drawn'), **style)


def whiskers(rows: pd.DataFrame, name: str) -> np.ndarray:
  lengths = np.stack([rows[name] - rows[f'{name}_low'], rows[f'{name}_high'] - rows[name]]).astype(float)
  return np.where(np.isfinite(lengths), lengths, np.nan)


def handle(text: str, **style) -> matplotlib.lines.Line2D:
  return matplotlib.lines.Line2D([], [], label=text, **style)


def legend(figure: matplotlib.figure.Figure, handles: list, title: str | None = None) -> matplotlib.figure.Figure:
  legend = figure.legend(handles=handles, loc='outside right upper', frameon=False, fontsize=9, title=title)
  legend.set_alignment('left')
  return figure


def zero(axes, which: str) -> None:
  line = axes.axhline if which == 'y' else axes.axvline
  line(0, color=table_rows.COLOURS['tuned'], linewidth=1, zorder=1)
  axes.grid(alpha=0.25, axis=which)


def spread(places: Sequence[float], gap: float) -> np.ndarray:
  """Sorted places in [0, 1] moved, as little as least squares can, until neighbours are `gap` apart; kept in [0, 1] where they fit."""
  steps = gap * np.arange(len(places))
  if not len(steps):
    return steps
  return np.clip(optimize.isotonic_regression(np.asarray(places, float) - steps).x, 0, max(0.0, 1 - steps[-1])) + steps


def shade(colour: str, i: int, n: int) -> tuple[float, float, float]:
  """A teacher's colour, paler for the smaller of its n budgets."""
  white = 0.45 * (n - 1 - i) / max(n - 1, 1)
  return tuple(white + (1 - white) * x for x in matplotlib.colors.to_rgb(colour))  # type: ignore[return-value]


def dark(colour: str) -> tuple[float, float, float]:
  """For small text: pale colours are hard to read on white."""
  return tuple(0.65 * x for x in matplotlib.colors.to_rgb(colour))  # type: ignore[return-value]


def text_colour(colour) -> str:
  """The text colour that is read best on a background (WCAG's relative luminance)."""
  linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in colour[:3]]
  return 'black' if float(np.dot(linear, (0.2126, 0.7152, 0.0722))) > 0.18 else 'white'


def say(axes, text: str) -> None:
  axes.tick_params(bottom=False, left=False, labelbottom=False, labelleft=False)
  axes.text(
    0.5, 0.5, '\n'.join(textwrap.wrap(text, 44)), ha='center', va='center', transform=axes.transAxes, color='#555555'
  )


def empty(text: str) -> matplotlib.figure.Figure:
  figure = matplotlib.figure.Figure(figsize=(7, 2.2), layout='constrained')
  axes = figure.subplots()
  axes.set_axis_off()
  axes.text(0.5, 0.5, '\n'.join(textwrap.wrap(text, 80)), ha='center', va='center', color='#333333')
  return figure


def save(figure: matplotlib.figure.Figure, path: paths.Path) -> paths.Path:
  """The same bytes for the same numbers: no date, no random ids."""
  with paths.replacing(path) as temporary, matplotlib.rc_context({'svg.hashsalt': 'kdjax'}):
    figure.savefig(temporary, dpi=130, metadata={'Date': None} if path.suffix == '.svg' else {'Software': None})
  return path
