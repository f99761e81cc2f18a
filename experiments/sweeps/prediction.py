"""Does the length pressure of a run's updates predict the change of its held-out length?"""

import dataclasses
import math

import numpy as np

from experiments.sweeps.report import series

WINDOW = 5  # rollout steps between two held-out lengths
LENGTH = "val-aux/*/response_length/mean"


@dataclasses.dataclass(frozen=True)
class Fit:
    """A line through pairs, with 95 % intervals by bootstrap over runs."""

    correlation: tuple[float, float, float]
    slope: tuple[float, float, float]
    rank_correlation: tuple[float, float, float]
    count: int

    def __str__(self) -> str:
        (r, r_low, r_high), (b, b_low, b_high) = self.correlation, self.slope
        rank, rank_low, rank_high = self.rank_correlation
        return (
            f"{r:.3f} [{r_low:.3f}, {r_high:.3f}] | {b:.2f} [{b_low:.2f}, {b_high:.2f}] "
            f"| {rank:.3f} [{rank_low:.3f}, {rank_high:.3f}] | {self.count}"
        )


def windows(rows: list[dict]) -> list[tuple[float, float, float, float]]:
    """Returns (predicted, measured, next measured, previous measured) length changes per window.

    The rollout of step s + 1 measures the update of step s, so its pressure is logged at s + 1; the
    last update of a run is never measured. Windows do not overlap.
    """
    steps, lengths = series(rows, LENGTH)
    at = dict(zip(steps, lengths, strict=True))
    taken = dict(zip(*series(rows, "length/pressure/taken"), strict=True))
    found = []
    for start in sorted(at):
        end = start + WINDOW
        scored = [taken.get(start + k + 2) for k in range(WINDOW)]
        if end not in at or any(x is None for x in scored):
            continue
        following = at[end + WINDOW] - at[end] if end + WINDOW in at else math.nan
        before = at[start] - at[start - WINDOW] if start - WINDOW in at else math.nan
        found.append((sum(scored), at[end] - at[start], following, before))
    return found


def fit(runs: list[list[tuple[float, float]]], *, resamples: int = 2000) -> Fit:
    """Returns correlation of y with x, slope of y on x, and rank correlation, over windows of runs.

    The bootstrap draws whole runs, because the windows of one run are not independent.
    """
    arrays = [np.array(run, np.float64) for run in runs if len(run)]
    everything = np.concatenate(arrays)
    rng = np.random.default_rng(0)
    drawn = [
        _line(np.concatenate([arrays[k] for k in rng.integers(len(arrays), size=len(arrays))]))
        for _ in range(resamples)
    ]
    low, high = np.percentile(drawn, (2.5, 97.5), axis=0)
    found = zip(_line(everything), low, high, strict=True)
    return Fit(*(tuple(map(float, ends)) for ends in found), len(everything))


def _line(points):
    x, y = points.T
    covariance = np.cov(x, y)
    r = covariance[0, 1] / math.sqrt(covariance[0, 0] * covariance[1, 1])
    # Ranks show whether a few extreme windows or all of them spoil a correlation.
    rank = np.corrcoef(_ranks(x), _ranks(y))[0, 1]
    return r, covariance[0, 1] / covariance[0, 0], rank


def _ranks(values):
    """Returns ranks from 0; ties share their mean."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[place]
