"""The figure of the study: held-out accuracy against tokens of an answer, a point a control."""

import itertools
import math
import pathlib

import numpy as np

from experiments.studies.length_control import design
from experiments.studies.quickstart_runs import TASKS
from experiments.sweeps import report

TOKENS, ACCURACY = "last length", "last accuracy"
BASE = "base policy"
KINDS = {
    "reference": ("k", "s", "as published"),
    "reward": ("C2", "o", f"{design.REFERENCE} with a reward of length"),
    "samples": ("C4", "D", f"{design.REFERENCE} with a choice of samples, or overlong"),
    "objective": ("C1", "^", "another objective or advantage"),
}
_FAMILIES = dict(zip(design.FAMILIES, ("C0", "C3"), strict=True))
_SIZE = 7.5  # of labels, points


def draw(values, target: pathlib.Path) -> None:
    """Draws a panel a task, with 95 % intervals both ways.

    Args:
      values: `tables.Values` of the finished runs.
      target: file of the figure.
    """
    plt = report.pyplot()
    figure, axes = plt.subplots(len(TASKS), 1, figsize=(11, 8.5 * len(TASKS)), layout="constrained")
    for axis, task in zip(axes, TASKS, strict=True):
        place(figure, axis, of_task(axis, values, task))
    if axes[0].get_legend_handles_labels()[0]:
        axes[0].legend(fontsize=8, loc="best")
    figure.savefig(target, dpi=80)
    plt.close(figure)


def of_task(axis, values, task: str) -> list[tuple[float, float, str, str]]:
    """Draws the points of a task; returns (x, y, label, colour) of each."""
    labels = [*_grid(axis, values, task), *_others(axis, values, task), *_base(axis, values, task)]
    axis.set(title=task, xlabel="tokens of a held-out answer, last", ylabel=ACCURACY)
    axis.margins(0.06)
    axis.grid(alpha=0.25)
    return labels


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
            labels.append((*place, name, color))
    return labels


def _base(axis, values, task):
    """Marks the policy before training, the same for every control."""
    first = [
        report.estimate(list(values.of(name, task, design.REFERENCE).values()))
        for name in ("base length", "base accuracy")
    ]
    if not first[0].count:
        return []
    axis.plot(*(each.mean for each in first), "*", color="0.4", ms=13, ls="")
    return [(first[0].mean, first[1].mean, BASE, "0.3")]


def _cross(axis, point, color, marker, label):
    """Draws a point with its intervals; returns its place."""
    x, y = point
    axis.errorbar(
        x.mean, y.mean, xerr=_width(x), yerr=_width(y), color=color, marker=marker, ms=5, lw=0.7,
        alpha=0.75, label=label,
    )  # fmt: skip
    return x.mean, y.mean


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
            color=color, ha="center", va="center",
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
