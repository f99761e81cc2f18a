"""Length pressure against the change of length that followed."""

from collections.abc import Sequence

import numpy as np

from experiments.drawing.reading import series
from luspo_jax.hosts import figure_style

TAKEN, MEASURED = "length/pressure/taken", "response_length/mean"
LEAST = 5  # steps on each side of an update whose lengths are compared


def followed(rows: Sequence[dict], every: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns (steps, predicted, measured) changes of mean length around scored updates, in tokens.

    The rollout of step s scores the update before it, and that update stands for w = max(every, 5)
    of them: predicted is w · (mean of `length/pressure/taken` within w/2 steps of s), measured is
    the mean length of the steps s … s + w − 1 minus that of the w steps before. Windows of
    predictions do not overlap.

    Args:
      rows: metrics of a run.
      every: `length.every`.
    """
    width = max(every, LEAST)
    scored, taken = series(rows, TAKEN)
    at, lengths = series(rows, MEASURED)
    found, last = [], -np.inf
    for step in scored:
        after = lengths[(at >= step) & (at < step + width)]
        before = lengths[(at < step) & (at >= step - width)]
        if step - last < width or not len(before) or len(after) < min(width, LEAST):
            continue
        last = step
        near = taken[np.abs(scored - step) <= width / 2]
        # The first steps of a run have fewer before them: the change is that between centres.
        reach = (len(after) + len(before)) / 2
        found.append((step, reach * near.mean(), after.mean() - before.mean()))
    return tuple(np.array(x, np.float64) for x in zip(*found, strict=True)) if found else (
        np.zeros(0), np.zeros(0), np.zeros(0)
    )  # fmt: skip


def objectives(rows: Sequence[dict]) -> list[str]:
    """Returns the objectives whose pressure a run measured, its own (`own`) left out."""
    head = "length/pressure/"
    names = {k.removeprefix(head).split("/")[0] for row in rows for k in row if k.startswith(head)}
    return sorted(names - {"taken", "own"})


def draw(rows: Sequence[dict], every: int):
    """Draws pressure by objective, predicted against measured change, and both summed.

    Args:
      rows: metrics of a run.
      every: `length.every` of its configuration.

    Returns:
      the figure.
    """
    plt = figure_style.pyplot()
    figure, axes = plt.subplots(
        1, 3, figsize=(13, 4.2), layout="constrained", width_ratios=(1.1, 1, 1.1)
    )
    by_objective(axes[0], rows)
    came_true(axes[1], *followed(rows, every), max(every, LEAST))
    summed(axes[2], rows, every)
    return figure


def by_objective(axis, rows: Sequence[dict]) -> None:
    """Draws the pressure of every measured objective, each divided by its largest."""
    names = objectives(rows)
    names = names or ["own"]
    for index, (name, line) in enumerate(zip(names, figure_style.looks(names), strict=True)):
        steps, values = series(rows, f"length/pressure/{name}")
        if len(steps):
            largest = np.abs(values).max() or 1.0
            # Some lie on each other (GRPO and GSPO do while ratios are 1): the later are thinner.
            axis.plot(
                steps, values / largest, label=name, marker=figure_style.MARKERS[index % 7],
                ms=4, lw=max(3.6 - 1.1 * index, 1.2), **line,
            )  # fmt: skip
    axis.axhline(0, color=figure_style.EDGE, lw=0.8)
    axis.set(
        title="Pressure of objectives on the same responses", xlabel="rollout step",
        ylabel="∂ mean length / ∂ learning rate,\nshare of its largest",
    )  # fmt: skip
    axis.legend()


def came_true(axis, steps, predicted, measured, width: int) -> None:
    """Draws measured against predicted changes; the later a step, the darker."""
    dots = axis.scatter(predicted, measured, c=figure_style.shades(len(steps)), s=30, zorder=3)
    dots.set_label("_dots")
    both = np.concatenate([predicted, measured, [0.0]])
    low, high = both.min(), both.max()
    edge = 0.06 * (high - low or 1.0)
    axis.axline(
        (0, 0), slope=1, color=figure_style.EDGE, lw=1, ls=(0, (4, 3)), label="as predicted"
    )
    axis.set(
        title="Did it come true?", xlabel=f"predicted change in {width} steps, tokens",
        ylabel="change that followed, tokens",
        xlim=(low - edge, high + edge), ylim=(low - edge, high + edge),
    )  # fmt: skip
    if len(steps) > 2 and np.ptp(predicted) and np.ptp(measured):
        r = np.corrcoef(predicted, measured)[0, 1]
        axis.set_title(f"{len(steps)} updates, r = {r:.2f}", loc="right", fontsize=8.5,
                       color=figure_style.SOFT_INK, fontweight="normal")  # fmt: skip
    if len(steps):
        for which, ha in ((0, "first"), (-1, "last")):
            axis.annotate(
                f"{ha}: step {steps[which]:g}", (predicted[which], measured[which]),
                xytext=(7, -9), textcoords="offset points", fontsize=8, color=figure_style.SOFT_INK,
                path_effects=figure_style.halo(),
            )  # fmt: skip
    axis.legend(loc="upper left")


def summed(axis, rows: Sequence[dict], every: int) -> None:
    """Draws the measured mean length and the first one plus the sum of what was predicted."""
    at, lengths = series(rows, MEASURED)
    steps, taken = series(rows, TAKEN)
    axis.plot(at, lengths, color=figure_style.INK, lw=1.4, label="measured, training")
    # A scored update stands for `every` of them, half of which are before it.
    axis.plot(
        steps, lengths[0] + every * (np.cumsum(taken) - taken / 2), color=figure_style.LINES[0],
        marker="o", label="first length + summed prediction",
    )  # fmt: skip
    axis.set(title="Summed over the run", xlabel="rollout step", ylabel="mean length, tokens")
    axis.legend(loc="lower right")
