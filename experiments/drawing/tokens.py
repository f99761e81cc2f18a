"""Accuracy against tokens: of an answer, and sampled in training; of a run or of variants."""

import json
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from experiments.drawing.reading import ACCURACY, LENGTH, run_rows, series
from luspo_jax.hosts import figure_style

MOST = 10  # variants in one figure

Path = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def path(rows: Sequence[dict]) -> Path:
    """Returns (steps, tokens of a held-out answer, tokens sampled until then, accuracy)."""
    steps, accuracy = series(rows, ACCURACY)
    own, lengths = series(rows, LENGTH)
    sampled_at, sampled = series(rows, "rollout/generated_tokens")
    steps, here, there = np.intersect1d(steps, own, return_indices=True)
    total = np.array([sampled[sampled_at <= step].sum() for step in steps])
    return steps, lengths[there], total, accuracy[here]


def mean(paths: Sequence[Path]) -> Path:
    """Returns the mean over runs at the steps that all have."""
    steps = paths[0][0]
    for other, *_ in paths[1:]:
        steps = np.intersect1d(steps, other)
    kept = [[values[np.isin(p[0], steps)] for values in p] for p in paths]
    return tuple(np.mean(values, axis=0) for values in zip(*kept, strict=True))


def read(workdir: pathlib.Path) -> dict[str, list[Path]]:
    """Returns variant → paths of its runs: of the finished members of a sweep, or of one run.

    Raises:
      FileNotFoundError: the folder holds neither, or no run has two held-out measurements.
    """
    if (workdir / "sweep.json").is_file():
        from experiments.sweeps.spec import slug

        known = json.loads((workdir / "sweep.json").read_text(encoding="utf-8"))["members"]
        folders: dict[str, list[pathlib.Path]] = {}
        for member in known:  # variant/seed_N
            variant, _, seed = member.rpartition("/")
            folder = workdir / "members" / slug(variant) / seed
            if (folder / "finished.json").is_file():
                folders.setdefault(variant, []).append(folder)
    else:
        folders = {workdir.name: [workdir]}
    found = {name: [path(run_rows(run)) for run in runs] for name, runs in folders.items()}
    found = {name: [p for p in paths if len(p[0]) > 1] for name, paths in found.items()}
    found = {name: paths for name, paths in found.items() if paths}
    if not found:
        raise FileNotFoundError(
            f"{workdir} holds no run with two held-out measurements (eval.every, sweeps: finished)"
        )
    return found


def draw(variants: Mapping[str, Sequence[Path]]):
    """Draws accuracy against tokens of an answer and against tokens sampled in training.

    A line goes from the first measurement (hollow) to the last; thin lines are single runs.

    Args:
      variants: name → paths of its runs.

    Returns:
      the figure.
    """
    plt = figure_style.pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.4), layout="constrained", sharey=True)
    shown = dict(list(variants.items())[:MOST])
    for axis, column in zip(axes, (1, 2), strict=True):
        for index, ((name, paths), line) in enumerate(
            zip(shown.items(), figure_style.looks(list(shown)), strict=True)
        ):
            if len(paths) > 1:
                for one in paths:
                    axis.plot(one[column], one[3], lw=0.6, alpha=0.35, label="_one", **line)
            middle = mean(paths)
            axis.plot(
                middle[column], middle[3], marker=figure_style.MARKERS[index % 7], ms=4,
                markevery=slice(1, None), label=name, **line,
            )  # fmt: skip
            axis.plot(
                middle[column][0], middle[3][0], marker=figure_style.MARKERS[index % 7],
                color=line["color"], mfc=figure_style.CARD, ms=6, label="_start",
            )  # fmt: skip
    axes[0].set(
        title="Accuracy and the length it takes", ylabel="held-out accuracy",
        xlabel="tokens of a held-out answer",
    )  # fmt: skip
    axes[1].set(title="Accuracy and the tokens it cost", xlabel="tokens sampled in training")
    axes[1].xaxis.set_major_formatter(_thousands)
    if len(shown) == 1:
        _steps(axes[0], mean(next(iter(shown.values()))))
    else:
        figure_style.label_ends(axes[1])
    if len(variants) > len(shown):
        figure.suptitle(f"the first {len(shown)} of {len(variants)} variants", fontsize=9)
    return figure


def _steps(axis, middle: Path) -> None:
    """Writes the steps at measurements that are far enough from the label before."""
    x, y = middle[1], middle[3]
    span = np.array([np.ptp(x) or 1.0, np.ptp(y) or 1.0])
    before = None
    for step, *place in zip(middle[0], x, y, strict=True):
        scaled = np.array(place) / span
        if before is None or np.linalg.norm(scaled - before) > 0.12:
            axis.annotate(
                f"step {step:g}", place, xytext=(7, -9), textcoords="offset points", fontsize=8,
                color=figure_style.SOFT_INK, annotation_clip=False,
            )  # fmt: skip
            before = scaled


def _thousands(value, _):
    return f"{value / 1e6:g} M" if abs(value) >= 1e6 else f"{value / 1e3:g} k" if value else "0"
