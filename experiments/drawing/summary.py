"""A run at a glance: reward, length and held-out accuracy over steps; supervised, losses."""

from collections.abc import Sequence

from experiments.drawing.reading import ACCURACY, LENGTH, series
from luspo_jax.hosts import figure_style

_TRAINED = {"color": figure_style.LINES[2]}
_RIGHT, _WRONG = ({"color": c, "lw": 1.1} for c in (figure_style.RIGHT, figure_style.WRONG))
_HELD_OUT = {"color": figure_style.HELD_OUT, "marker": "o"}
_PANELS = (
    # Title, unit of the axis, (metric, label, style) of each line.
    ("Reward", "mean reward of a step", (("reward", "training responses", _TRAINED),)),
    (
        "Response length",
        "tokens, mean",
        (
            ("response_length/mean", "training, all", _TRAINED),
            ("length/correct_mean", "training, correct", _RIGHT),
            ("length/incorrect_mean", "training, incorrect", _WRONG),
            (LENGTH, "held out", _HELD_OUT),
        ),
    ),
    ("Held-out accuracy", "share right", ((ACCURACY, "held out", _HELD_OUT),)),
)
_SUPERVISED = (
    (
        "Loss",
        "nats a token",
        (("sft/loss", "training", _TRAINED), ("held_out/loss", "held out", _HELD_OUT)),
    ),
    (
        "Length of answers",
        "tokens, mean",
        (
            ("answers/length/mean", "held out", _HELD_OUT),
            ("answers/reference_length/mean", "demonstrated", {"color": figure_style.LINES[0]}),
        ),
    ),
    (
        "Answers equal to the demonstrated",
        "share",
        (("answers/exact", "held out", _HELD_OUT),),
    ),
)


def draw(rows: Sequence[dict], title: str):
    """Draws a run's metrics over its steps.

    Args:
      rows: metrics of a run, of reinforcement learning or supervised.
      title: of the figure.

    Returns:
      the figure.
    """
    plt = figure_style.pyplot()
    supervised = any("sft/loss" in row for row in rows)
    panels = _SUPERVISED if supervised else _PANELS
    figure, axes = plt.subplots(1, len(panels), figsize=(13, 3.9), layout="constrained")
    for axis, (name, unit, lines) in zip(axes, panels, strict=True):
        for metric, label, style in lines:
            steps, values = series(rows, metric)
            if len(steps):
                axis.plot(steps, values, label=label, **style)
        if name == "Held-out accuracy":
            _draw_budgets(axis, rows)
        axis.set(title=name, xlabel="step" if supervised else "rollout step", ylabel=unit)
        if len(axis.lines) > 1:
            # Below the axis: inside it, no place stays free in every run.
            axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
    _tell_interval(axes[-1], rows)
    axes[-1].set_ylim(0, 1)
    figure.suptitle(title, fontsize=9, color=figure_style.SOFT_INK, x=0.995, ha="right")
    return figure


def _draw_budgets(axis, rows):
    """Draws accuracy of the same responses cut at fewer tokens, the fewer the lighter."""
    found = {key for row in rows for key in row if "/budget/" in key and key.endswith("/acc")}
    budgets = sorted({int(key.split("/")[-2]) for key in found})
    for budget, shade in zip(budgets, figure_style.shades(len(budgets)), strict=True):
        steps, values = series(rows, f"val-aux/*/budget/{budget}/acc")
        axis.plot(steps, values, lw=1, color=shade, label=f"cut at {budget} tokens")


def _tell_interval(axis, rows):
    """Shades the 95 % interval of held-out accuracy, and writes its first and last value."""
    steps, values = series(rows, ACCURACY)
    low, high = (series(rows, f"val-aux/*/acc/ci95_{end}")[1] for end in ("low", "high"))
    if len(low) == len(high) == len(steps):
        axis.fill_between(steps, low, high, color=figure_style.HELD_OUT, alpha=0.13, lw=0)
    for place, shift in ((0, (8, -3)), (-1, (-2, -15))):
        if len(steps) > 1:
            axis.annotate(
                f"{100 * values[place]:.1f} %", (steps[place], values[place]), xytext=shift,
                textcoords="offset points", fontsize=8.5, ha="left" if place == 0 else "right",
            )  # fmt: skip
