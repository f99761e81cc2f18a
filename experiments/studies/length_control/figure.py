"""The figure of the study: held-out accuracy against tokens of an answer, a point a control."""

import itertools
import math
import pathlib

import numpy as np

from experiments.studies.length_control import design
from experiments.studies.quickstart_runs import TASKS
from experiments.sweeps import report

TOKENS, ACCURACY = "length area", "accuracy area"  # means over the run
BASE = "base policy"
KINDS = {
    "reference": ("k", "s", "as published"),
    "reward": ("C2", "o", f"{design.REFERENCE} with a reward of length"),
    "samples": ("C4", "D", f"{design.REFERENCE} with a choice of samples, or overlong"),
    "objective": ("C1", "^", "another objective or advantage"),
}
_FAMILIES = dict(zip(design.FAMILIES, ("C0", "C3"), strict=True))
_SIZE = 8.0  # of labels, points
_REACH = 0.12  # of the range of the points: how far an interval may widen the frame


def draw(values, target: pathlib.Path) -> None:
    """Draws a panel a task, with 95 % intervals both ways.

    Args:
      values: `tables.Values` of the finished runs.
      target: file of the figure.
    """
    plt = report.pyplot()
    figure, axes = plt.subplots(len(TASKS), 1, figsize=(11, 8 * len(TASKS)), layout="constrained")
    for axis, task in zip(axes, TASKS, strict=True):
        place(figure, axis, of_task(axis, values, task))
    if axes[0].get_legend_handles_labels()[0]:
        figure.legend(
            *axes[0].get_legend_handles_labels(), fontsize=9, loc="outside upper center", ncols=3
        )
    figure.savefig(target, dpi=100)
    plt.close(figure)


def of_task(axis, values, task: str) -> list[tuple[float, float, str, str]]:
    """Draws the points of a task; returns (x, y, label, colour) of each."""
    axis.set(
        title=task,
        xlabel="tokens of a held-out answer, mean over the run",
        ylabel="held-out accuracy, mean over the run",
    )
    axis.grid(alpha=0.25)
    names = [name for name in design.cells(task) if _point(values, task, name)[0].count]
    _frame(axis, [_point(values, task, name) for name in names])
    return [*_grid(axis, values, task), *_others(axis, values, task), *_base(axis, values, task)]


def _frame(axis, points):
    """Sets limits that hold all points, and intervals unless they are much wider than the rest."""
    for kind, setter in enumerate((axis.set_xlim, axis.set_ylim)):
        if points:
            means = [point[kind].mean for point in points]
            most = _REACH * (max(means) - min(means)) or 1.0
            low = min(p[kind].mean - min(_width(p[kind]), most) for p in points)
            high = max(p[kind].mean + min(_width(p[kind]), most) for p in points)
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
            labels.append((*place, name, color))
    return labels


def _base(axis, values, task):
    """Marks the policy before training, the same for every control, or where it lies beyond."""
    x, y = (
        report.estimate(list(values.of(name, task, design.REFERENCE).values()))
        for name in ("base length", "base accuracy")
    )
    if not x.count:
        return []
    place, label = [], f"{BASE}: {x.mean:.1f} tokens, {y.mean:.2f}"
    for mean, (low, high) in ((x.mean, axis.get_xlim()), (y.mean, axis.get_ylim())):
        inset = 0.012 * (high - low)
        place.append(min(max(mean, low + inset), high - inset))
    if place != [x.mean, y.mean]:
        label += " (beyond this corner)"
    axis.plot(*place, "*", color="0.4", ms=13, ls="", clip_on=False)
    return [(*place, label, "0.3")]


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
    from matplotlib import patheffects

    if not labels:
        return
    figure.draw_without_rendering()
    points = axis.transData.transform([label[:2] for label in labels])
    boxes = [_box(point, (9, 9)) for point in points]
    inside = axis.get_window_extent()
    scale = figure.dpi / 72
    halo = [patheffects.withStroke(linewidth=2, foreground="w")]
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
            color=color, ha="center", va="center", path_effects=halo,
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
