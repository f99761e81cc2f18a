"""The distribution of response lengths over the steps of a run, and what length is worth."""

from collections.abc import Sequence

import numpy as np

from experiments.drawing.reading import Responses
from luspo_jax.hosts import figure_style

RIDGES = 7  # steps of which the distribution is drawn apart
_BINS = 24  # of lengths, at most
_FEW, _LEAST = 4, 8  # responses of which a mean length, and an accuracy, are told


def draw(steps: Sequence[Responses]):
    """Draws lengths over steps, their distribution in some steps, and accuracy by length.

    A response is right here if its reward is above half of the largest.

    Args:
      steps: stored responses, oldest first.

    Returns:
      the figure.
    """
    plt = figure_style.pyplot()
    figure, axes = plt.subplots(
        1, 3, figsize=(13, 4.2), layout="constrained", width_ratios=(1.25, 1, 0.9)
    )
    edges = bins(np.concatenate([step.lengths_B for step in steps]))
    half = max(float(step.rewards_B.max()) for step in steps) / 2
    heat_map(axes[0], steps, edges, half)
    ridges(axes[1], steps, edges, half)
    worth(axes[2], steps, edges, half)
    return figure


def bins(lengths_B: np.ndarray) -> np.ndarray:
    """Returns edges of at most `_BINS` bins of whole tokens over all lengths."""
    low, high = int(lengths_B.min()), int(lengths_B.max())
    width = max(1, -(-(high - low + 1) // _BINS))
    return np.arange(low, high + width + 1, width) - 0.5


def shares(steps: Sequence[Responses], edges: np.ndarray) -> np.ndarray:
    """Returns [steps, bins]: the share of each step's responses in each bin."""
    return np.stack([np.histogram(s.lengths_B, edges)[0] / len(s.lengths_B) for s in steps])


def heat_map(axis, steps: Sequence[Responses], edges: np.ndarray, half: float) -> None:
    """Draws the share of responses by step and length, and mean lengths of right and wrong ones."""
    found = shares(steps, edges)
    numbers = np.array([step.step for step in steps], np.float64)
    between = (numbers[1:] + numbers[:-1]) / 2
    first = between[0] - numbers[0] if len(between) else 0.5
    last = numbers[-1] - between[-1] if len(between) else 0.5
    columns = np.concatenate([[numbers[0] - first], between, [numbers[-1] + last]])
    mesh = axis.pcolormesh(columns, edges, np.sqrt(found.T), vmin=0, rasterized=True)
    for right, color, label in ((True, "white", "right"), (False, figure_style.WRONG, "wrong")):
        means = mean_lengths(steps, right, half)
        axis.plot(
            numbers, means, color=color, lw=1.3, label=f"mean of {label}",
            path_effects=figure_style.halo(figure_style.INK, 2.4),
        )  # fmt: skip
    axis.set(title="Lengths over steps", xlabel="rollout step", ylabel="tokens of a response")
    axis.grid(False)
    bar = axis.figure.colorbar(mesh, ax=axis, pad=0.02, aspect=30)
    ticks = [t for t in (0, 0.05, 0.2, 0.5, 1) if t <= found.max()]
    bar.set_ticks(np.sqrt(ticks), labels=[f"{100 * t:g} %" for t in ticks])
    bar.outline.set_visible(False)
    bar.set_label("share of a step's responses (√ scale)")
    axis.legend(loc="lower right", labelcolor=figure_style.INK, frameon=True, framealpha=0.9,
                facecolor=figure_style.CARD, edgecolor="none")  # fmt: skip


def mean_lengths(steps: Sequence[Responses], right: bool, half: float) -> np.ndarray:
    """Returns each step's mean length of right or wrong responses; NaN where they are few."""
    of = [step.lengths_B[(step.rewards_B > half) == right] for step in steps]
    return np.array([x.mean() if len(x) >= _FEW else np.nan for x in of])


def ridges(axis, steps: Sequence[Responses], edges: np.ndarray, half: float) -> None:
    """Draws the distribution of some steps above each other, right responses on wrong ones."""
    chosen = [
        steps[k] for k in np.unique(np.linspace(0, len(steps) - 1, RIDGES).round().astype(int))
    ]
    tallest = shares(chosen, edges).max()
    for place, step in enumerate(chosen):
        base = -float(place)
        is_right = step.rewards_B > half
        floor = np.full(len(edges) - 1, base)
        for right, color in ((False, figure_style.WRONG), (True, figure_style.RIGHT)):
            count, _ = np.histogram(step.lengths_B[is_right == right], edges)
            # The root keeps a few responses visible beside a step where all have one length.
            height = np.sqrt(count / len(step.lengths_B) / tallest) / 2
            label = ("right" if right else "wrong") if place == 0 else None
            axis.stairs(floor + height, edges, baseline=floor, fill=True, color=color, alpha=0.85,
                        label=label, zorder=place + 2)  # fmt: skip
            floor = floor + height
        axis.axhline(base, color=figure_style.EDGE, lw=0.6, zorder=place + 2)
    axis.set_yticks(
        [-float(k) for k in range(len(chosen))], [f"step {step.step}" for step in chosen]
    )
    axis.tick_params(axis="y", length=0)
    axis.spines["left"].set_visible(False)
    axis.grid(False, axis="y")
    axis.set(title="Distribution", xlabel="tokens of a response")
    axis.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0.3)


def worth(axis, steps: Sequence[Responses], edges: np.ndarray, half: float) -> None:
    """Draws accuracy by length in the first and the last third of the steps."""
    third = max(1, len(steps) // 3)
    for part, label, color in (
        (steps[:third], "first third of steps", figure_style.LINES[4]),
        (steps[-third:], "last third", figure_style.LINES[3]),
    ):
        tokens, accuracy, error = by_length(part, edges, half)
        axis.errorbar(tokens, accuracy, yerr=error, color=color, marker="o", ms=4, lw=1.5,
                      elinewidth=0.8, label=label)  # fmt: skip
    axis.set(
        title="Does length pay?", xlabel="tokens of a response", ylabel="share right",
        ylim=(-0.03, 1.03),
    )  # fmt: skip
    axis.legend()


def by_length(
    steps: Sequence[Responses], edges: np.ndarray, half: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns mean tokens, share right and its standard error of the bins with enough responses."""
    lengths_B = np.concatenate([step.lengths_B for step in steps])
    right_B = np.concatenate([step.rewards_B for step in steps]) > half
    count, total, good = (
        np.histogram(lengths_B, edges, weights=weights)[0]
        for weights in (None, lengths_B, right_B.astype(np.float64))
    )
    kept = count >= _LEAST
    count, share = count[kept], good[kept] / count[kept]
    return total[kept] / count, share, np.sqrt(share * (1 - share) / count)
