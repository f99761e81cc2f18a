"""Charts of lines with intervals, and of points, as plain data, which is kept beside the drawing.

What a study draws is in its repository as numbers: `python -m experiments.redraw` draws them again,
in the look of the day, where the runs are gone.
"""

import dataclasses
import json
import math
import pathlib
import re
import textwrap
from collections.abc import Mapping, Sequence

import numpy as np

from luspo_jax.hosts import figure_style, files

_MARKED = 25  # points of a line at most that have markers
_FEW = 100  # high : low of a logarithmic axis, below which 2 and 5 have room between powers of 10
_LETTERS = 9  # of a title, in an inch
_WHOLE = 1.02  # above a share of 1: intervals may reach beyond what a share can be


@dataclasses.dataclass(frozen=True)
class Line:
    """One line, in the order of the steps.

    Attributes:
      label: in the legend; equal labels of a chart are one line of it.
      x: positions.
      y: values.
      half: half-width of the interval of each value; empty without intervals.
      style: number of its colour and dashes (`figure_style.style`).
      thin: of one run among several, without a label.
      marks: "" for a line; else the points alone, as this marker of matplotlib.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    half: Sequence[float] = ()
    style: int = 0
    thin: bool = False
    marks: str = ""


@dataclasses.dataclass(frozen=True)
class Panel:
    """Axes with lines.

    Attributes:
      title: above.
      x: label with unit, below.
      y: label with unit, at the left.
      lines: of the panel.
      zero: whether a line marks 0.
      log: whether y is on a logarithmic scale.
      log_x: whether x is.
      diagonal: label of the line on which y is x; "" for none.
      names: of the whole numbers of y from 0, written instead of them, downwards.
    """

    title: str
    x: str
    y: str
    lines: Sequence[Line]
    zero: bool = False
    log: bool = False
    log_x: bool = False
    diagonal: str = ""
    names: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Chart:
    """Rows of panels.

    Attributes:
      rows: of panels, equally many in each.
      width, height: of a panel in inches.
      share_y: whether the panels of a row have one scale, with names written once.
      note: above the chart.
    """

    rows: Sequence[Sequence[Panel]]
    width: float = 4.3
    height: float = 3.5
    share_y: bool = False
    note: str = ""

    @property
    def is_empty(self) -> bool:
        """Whether there is no line at all."""
        return not any(panel.lines for row in self.rows for panel in row)


def draw(chart: Chart):
    """Returns the figure of a chart, with one legend on the right."""
    plt = figure_style.pyplot()
    columns = max(map(len, chart.rows))
    size = (chart.width * columns + 1.2, chart.height * len(chart.rows) + 0.3)
    figure, axes = plt.subplots(
        len(chart.rows), columns, figsize=size, layout="constrained", squeeze=False,
        sharey="row" if chart.share_y else False,
    )  # fmt: skip
    handles: dict[str, object] = {}
    for row, panels in zip(axes, chart.rows, strict=True):
        for place, (axis, panel) in enumerate(zip(row, panels, strict=True)):
            for label, handle in _draw(axis, panel).items():
                handles.setdefault(label, handle)
            axis.set_title(textwrap.fill(panel.title, round(chart.width * _LETTERS)))
            if chart.share_y and place:
                axis.set_ylabel("")
        for axis, panel in zip(row, panels, strict=True):  # now that a scale in common is known
            if "share" in panel.y and axis.get_ylim()[1] > _WHOLE:
                axis.set_ylim(top=_WHOLE)
    if len(handles) > 1:
        figure.legend(handles.values(), handles.keys(), loc="outside right upper")
    if chart.note:
        figure.suptitle(chart.note, fontsize=9, color=figure_style.SOFT_INK)
    return figure


def _draw(axis, panel) -> dict:
    handles = {}
    for line in panel.lines:
        drawn = _points(axis, line) if line.marks else _line(axis, line)
        if not line.thin:
            handles.setdefault(line.label, drawn)
    if panel.zero:
        axis.axhline(0, color=figure_style.EDGE, lw=0.8)
    if panel.diagonal:
        handles[panel.diagonal] = axis.axline(
            (0, 0), slope=1, color=figure_style.EDGE, lw=0.8, zorder=0
        )
    if panel.log:
        axis.set_yscale("log")
    if panel.log_x:
        _scale_log_x(axis)
    if len(panel.names):
        axis.set_yticks(range(len(panel.names)), panel.names)
        axis.set_ylim(len(panel.names) - 0.5, -0.5)
        axis.grid(False, axis="y")
    axis.set(xlabel=panel.x, ylabel=panel.y)
    return handles


def _line(axis, line):
    look = figure_style.style(line.style)
    if line.thin:
        return axis.plot(line.x, line.y, lw=0.6, alpha=0.5, label="_thin", **look)[0]
    marker = "" if len(line.x) > _MARKED else figure_style.MARKERS[line.style % 7]
    drawn = axis.plot(line.x, line.y, label=line.label, marker=marker, ms=3.5, **look)[0]
    if len(line.half):
        low, high = (np.add(line.y, sign * np.array(line.half)) for sign in (-1, 1))
        axis.fill_between(line.x, low, high, color=look["color"], alpha=0.14, lw=0)
    return drawn


def _points(axis, line):
    tall = line.marks == "|"  # a mean among the points of its runs
    look = {"ms": 12, "mew": 2.2} if tall else {"ms": 4, "mew": 0}
    return axis.plot(
        line.x, line.y, ls="", marker=line.marks, color=figure_style.style(line.style)["color"],
        alpha=0.5 if line.thin else 0.85, label="_thin" if line.thin else line.label, **look,
    )[0]  # fmt: skip


def _scale_log_x(axis) -> None:
    """Puts x on a logarithmic scale with few numbers, as people write them."""
    from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

    axis.set_xscale("log")
    low, high = axis.get_xlim()
    within = (1, 2, 5) if high < low * _FEW else (1,)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [n * 10.0**power for power in powers for n in within if low <= n * 10.0**power <= high]
    axis.xaxis.set_major_locator(FixedLocator(ticks) if len(ticks) > 1 else MaxNLocator(4))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter("{x:g}")


def write(chart: Chart, target: pathlib.Path) -> pathlib.Path:
    """Draws a chart to a PNG file, and keeps its numbers beside it as JSON; returns the path."""
    files.write_text(target.with_suffix(".json"), dumps(chart))
    return figure_style.save(draw(chart), target)


def dumps(chart: Chart) -> str:
    """Returns a chart as JSON: a line a line, numbers to five digits."""
    plain = {"chart": 1} | _plain(dataclasses.asdict(chart))
    text = json.dumps(plain, ensure_ascii=False, indent=1)
    return _join_numbers(text) + "\n"


def loads(text: str) -> Chart:
    """Returns the chart that `dumps` wrote.

    Raises:
      ValueError: the text is something else.
    """
    stored = json.loads(text)
    if not isinstance(stored, Mapping) or stored.pop("chart", None) != 1:
        raise ValueError("this JSON is no chart of experiments/drawing/chart.py")
    rows = [
        [Panel(**panel | {"lines": [_stored(line) for line in panel["lines"]]}) for panel in row]
        for row in stored.pop("rows")
    ]
    return Chart(rows, **stored)


def _stored(line):
    numbers = {name: np.array(line[name], np.float64) for name in ("x", "y", "half")}
    return Line(**line | numbers)


def _plain(value):
    match value:
        case dict():
            return {name: _plain(each) for name, each in value.items()}
        case list() | tuple() | np.ndarray():
            return [_plain(each) for each in value]
        case bool() | str():
            return value
        case _:
            short = None if math.isnan(value) else float(f"{value:.5g}")
            return int(short) if short is not None and short == int(short) else short


def _join_numbers(text: str) -> str:
    """Writes lists of numbers, which `indent` spreads over lines, on one line each."""
    return re.sub(r"\[[-\d\s.,enul+]*\]", lambda found: re.sub(r"\s+", " ", found[0]), text)
