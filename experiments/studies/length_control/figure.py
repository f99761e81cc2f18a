"""The figure of the study: held-out accuracy against tokens of an answer, a point a control."""

import itertools
import json
import math
import pathlib
from collections.abc import Mapping

import numpy as np

from experiments.studies.length_control import design
from experiments.studies.quickstart_runs import TASKS
from experiments.sweeps import report
from luspo_jax.hosts import figure_style, files

TOKENS, ACCURACY = "length area", "accuracy area"  # means over the run
BASE = "base policy"
_BASE = ("base length", "base accuracy")  # outcomes: before training
_LINES = figure_style.LINES
KINDS = {
    "reference": (_LINES[3], "s", "as published"),
    "reward": (_LINES[2], "o", f"{design.REFERENCE} with a reward of length"),
    "samples": (_LINES[6], "D", f"{design.REFERENCE} with a choice of samples, or overlong"),
    "objective": (_LINES[5], "^", "another objective or advantage"),
}
_FAMILIES = dict(zip(design.FAMILIES, (_LINES[1], _LINES[0]), strict=True))
_SIZE = 8.0  # of labels, points
_REACH = 0.12  # of the range of the points: how far an interval may widen the frame
_FAR = 3.0  # interquartile ranges beyond the quartiles


class Recorded:
    """What the figure shows, as it is kept beside it: seed → value, by outcome, task and cell.

    Args:
      values: outcome → task → cell → seed → value.
    """

    def __init__(self, values: Mapping[str, Mapping[str, Mapping[str, Mapping[str, float]]]]):
        self.values = values

    def of(self, outcome: str, task: str, cell: str) -> Mapping[str, float]:
        """Returns seed → value."""
        return self.values[outcome][task].get(cell, {})


def recorded(values) -> Recorded:
    """Returns what the figure shows of `tables.Values`, to five digits."""
    names = {name: design.cells for name in (TOKENS, ACCURACY)}
    names |= {name: lambda task: [design.REFERENCE] for name in _BASE}
    return Recorded(
        {
            name: {
                task: {
                    cell: {str(seed): float(f"{value:.5g}") for seed, value in found.items()}
                    for cell in cells(task)
                    if (found := values.of(name, task, cell))
                }
                for task in TASKS
            }
            for name, cells in names.items()
        }
    )


def write(values, target: pathlib.Path) -> None:
    """Draws the finished runs to a file, and keeps the numbers beside it as JSON.

    Args:
      values: `tables.Values`.
      target: file of the figure.
    """
    kept = recorded(values)
    files.write_text(target.with_suffix(".json"), json.dumps(kept.values, indent=1) + "\n")
    figure_style.save(draw(kept), target)


def draw(values):
    """Returns the figure, a panel a task, with 95 % intervals both ways.

    Args:
      values: `Recorded`, or `tables.Values`.
    """
    plt = figure_style.pyplot()
    figure, axes = plt.subplots(len(TASKS), 1, figsize=(11, 8 * len(TASKS)), layout="constrained")
    for axis, task in zip(axes, TASKS, strict=True):
        place(figure, axis, of_task(axis, values, task))
    if axes[0].get_legend_handles_labels()[0]:
        figure.legend(
            *axes[0].get_legend_handles_labels(), fontsize=9, loc="outside upper center", ncols=3
        )
    return figure


def of_task(axis, values, task: str) -> list[tuple[float, float, str, str]]:
    """Draws the points of a task; returns (x, y, label, colour) of each."""
    axis.set(
        title=task,
        xlabel="tokens of a held-out answer, mean over the run",
        ylabel="held-out accuracy, mean over the run",
    )
    names = [name for name in design.cells(task) if _point(values, task, name)[0].count]
    _frame(axis, [_point(values, task, name) for name in names])
    return [*_grid(axis, values, task), *_others(axis, values, task), *_base(axis, values, task)]


def _frame(axis, points):
    """Sets limits that hold all points but those far out, and intervals that are no wider than
    the rest.
    """
    for kind, setter in enumerate((axis.set_xlim, axis.set_ylim)):
        if points:
            means = [point[kind].mean for point in points]
            first, third = np.quantile(means, (0.25, 0.75))
            fence = _FAR * (third - first)
            near = [p[kind] for p in points if first - fence <= p[kind].mean <= third + fence]
            most = _REACH * (max(e.mean for e in near) - min(e.mean for e in near)) or 1.0
            low = min(each.mean - min(_width(each), most) for each in near)
            high = max(each.mean + min(_width(each), most) for each in near)
            edge = 0.05 * (high - low) or 1.0
            setter(low - edge, high + edge)


def _point(values, task, cell):
    return [
        report.estimate(list(values.of(name, task, cell).values())) for name in (TOKENS, ACCURACY)
    ]


def _grid(axis, values, task):
    """Draws the grid, a line a family; returns labels as `of_task`."""
    labels = []
    for family, color in _FAMILIES.items():
        points = {
            beta: point
            for beta in design.BETAS
            if (point := _point(values, task, design.grid_cell(family, beta)))[0].count
        }
        if points:
            x, y = ([p[k].mean for p in points.values()] for k in (0, 1))
            axis.plot(x, y, color=color, lw=1, alpha=0.6)
        for index, (beta, point) in enumerate(points.items()):
            name = f"{family}, one clip range" if index == 0 else None
            labels.append((*_cross(axis, point, color, "o", name), f"β={beta}", color))
    return labels


def _others(axis, values, task):
    labels, told = [], set()
    for name, cell in design.cells(task).items():
        point = _point(values, task, name)
        if cell.kind in KINDS and point[0].count:
            color, marker, kind = KINDS[cell.kind]
            place = _cross(axis, point, color, marker, None if kind in told else kind)
            told.add(kind)
            labels.append((*place, _told(name, point, place), color))
    return labels


def _base(axis, values, task):
    """Marks the policy before training, the same for every control."""
    point = [
        report.estimate(list(values.of(name, task, design.REFERENCE).values())) for name in _BASE
    ]
    if not point[0].count:
        return []
    place = _clamped(axis, point)
    axis.plot(*place, "*", color=figure_style.SOFT_INK, ms=13, ls="", clip_on=False)
    return [(*place, _told(BASE, point, place), figure_style.SOFT_INK)]


def _clamped(axis, point):
    """Returns the place of a point, or the nearest one inside the frame."""
    place = []
    for each, (low, high) in zip(point, (axis.get_xlim(), axis.get_ylim()), strict=True):
        inset = 0.012 * (high - low)
        place.append(min(max(each.mean, low + inset), high - inset))
    return tuple(place)


def _told(name, point, place):
    """Adds its numbers to the label of a point that is not where it is drawn."""
    x, y = (each.mean for each in point)
    return name if place == (x, y) else f"{name} is outside: {x:.1f} tokens, {y:.2f}"


def _cross(axis, point, color, marker, label):
    """Draws a point with its intervals, or one outside at the frame; returns where."""
    place = _clamped(axis, point)
    outside = place != tuple(each.mean for each in point)
    x, y = (0 if outside else _width(each) for each in point)
    axis.errorbar(
        *place, xerr=x, yerr=y, color=color, marker=marker, ms=5, lw=0.7, alpha=0.75, label=label
    )
    return place


def _width(estimate):
    return 0 if math.isnan(estimate.half_width) else estimate.half_width


def place(figure, axis, labels):
    """Writes each label at the nearest place where it covers no point and no other label."""
    if not labels:
        return
    figure.draw_without_rendering()
    points = axis.transData.transform([label[:2] for label in labels])
    boxes = [_box(point, (9, 9)) for point in points]
    inside = axis.get_window_extent()
    scale = figure.dpi / 72
    halo = figure_style.halo(width=2)
    for (x, y, text, color), point in zip(labels, points, strict=True):
        size = np.array([0.62 * len(text) * _SIZE, 1.35 * _SIZE]) * scale
        shift = next(
            (
                shift
                for shift in _shifts(size)
                if _within(box := _box(point + shift, size), inside)
                and not any(_overlap(box, other) for other in boxes)
            ),
            np.zeros(2),
        )
        boxes.append(_box(point + shift, size))
        axis.annotate(
            text, (x, y), xytext=shift / scale, textcoords="offset points", fontsize=_SIZE,
            color=figure_style.text_color(color), ha="center", va="center", path_effects=halo,
            arrowprops={"arrowstyle": "-", "lw": 0.4, "color": color, "alpha": 0.6},
        )  # fmt: skip


def _shifts(size):
    """Yields offsets from a point in pixels, near ones first."""
    for radius, angle in itertools.product(range(8, 260, 6), np.linspace(0, 2 * np.pi, 24, False)):
        direction = np.array([np.cos(angle), np.sin(angle)])
        yield direction * (radius + size / 2)


def _box(centre, size):
    half = np.array(size) / 2
    return np.array([centre - half, centre + half])


def _overlap(a, b):
    return bool(np.all(a[0] < b[1]) and np.all(b[0] < a[1]))


def _within(box, frame):
    return frame.x0 < box[0][0] and box[1][0] < frame.x1 and (
        frame.y0 < box[0][1] and box[1][1] < frame.y1
    )  # fmt: skip
