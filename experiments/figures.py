"""Figures of a run."""

import pathlib

import numpy as np

_PANELS = (
    # Title, unit of the axis, (metric, label) of each line.
    ("Reward", "mean reward", (("reward", "training responses"),)),
    (
        "Response length",
        "tokens",
        (
            ("response_length/mean", "training, all"),
            ("length/correct_mean", "training, correct"),
            ("length/incorrect_mean", "training, incorrect"),
            ("val-aux/*/response_length/mean", "held out"),
        ),
    ),
    ("Held-out accuracy", "accuracy", (("val-core/*", "held out"),)),
)
_SUPERVISED = (
    ("Loss", "nats", (("sft/loss", "training"), ("held_out/loss", "held out"))),
    (
        "Length of answers",
        "tokens",
        (("answers/length/mean", "held out"), ("answers/reference_length/mean", "demonstrated")),
    ),
    ("Answers equal to the demonstrated", "share", (("answers/exact", "held out"),)),
)


def run_figure(workdir: pathlib.Path) -> pathlib.Path:
    """Draws reward, length and held-out accuracy over steps to `summary.png` in the workdir.

    Of a supervised run: losses, the length of answers, and how many are the demonstrated ones.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from luspo_jax.hosts import files
    from luspo_jax.metrics import read_metrics

    workdir = pathlib.Path(workdir)
    source = workdir / "metrics.jsonl"
    if not source.is_file() or not (workdir / "run.json").exists():
        raise FileNotFoundError(f"no metrics at {source}: is {workdir} the --workdir of a run?")
    rows = list(read_metrics(source))
    supervised = any("sft/loss" in row for row in rows)
    panels = _SUPERVISED if supervised else _PANELS
    figure, axes = plt.subplots(1, len(panels), figsize=(13, 3.6), layout="constrained")
    for axis, (title, unit, lines) in zip(axes, panels, strict=True):
        for name, label in lines:
            steps, values = _series(rows, name)
            if len(steps):
                sparse = "*" in name or name.startswith(("held_out/", "answers/"))
                axis.plot(steps, values, marker="o" if sparse else None, ms=4, lw=1.5, label=label)
        if title == "Held-out accuracy":
            _draw_budgets(axis, rows)
        axis.set(title=title, xlabel="step" if supervised else "rollout step", ylabel=unit)
        axis.grid(alpha=0.3)
        if len(axis.lines) > 1:
            axis.legend(frameon=False, fontsize=8)
    axes[-1].set_ylim(0, 1)
    figure.suptitle(workdir.name, fontsize=10)
    target = workdir / "summary.png"
    with files.replacing(target) as scratch:
        figure.savefig(scratch, dpi=120)
    plt.close(figure)
    return target


def _draw_budgets(axis, rows):
    """Draws accuracy of the same responses cut at fewer tokens, the fewer the lighter."""
    import matplotlib

    found = {key for row in rows for key in row if "/budget/" in key and key.endswith("/acc")}
    budgets = sorted({int(key.split("/")[-2]) for key in found})
    shades = matplotlib.colormaps["Blues"](np.linspace(0.35, 0.8, len(budgets)))
    for budget, shade in zip(budgets, shades, strict=True):
        steps, values = _series(rows, f"val-aux/*/budget/{budget}/acc")
        axis.plot(steps, values, lw=1, color=shade, label=f"cut at {budget} tokens")


def _series(rows, name):
    """Returns steps and finite values of a metric, or of the first that a pattern matches."""
    head, star, tail = name.partition("*")
    steps, values = [], []
    for row in rows:
        if star:
            key = next((k for k in row if k.startswith(head) and k.endswith(tail)), None)
        else:
            key = name
        if key in row and np.isfinite(row[key]):
            steps.append(row["step"])
            values.append(row[key])
    return steps, values
