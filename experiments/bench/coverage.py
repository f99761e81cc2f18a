"""Simulates the coverage of the accuracy's interval, beside the usual normal one.

    python -m experiments.bench.coverage --trials=4000

A problem's accuracy is drawn from a beta distribution with a given mean and concentration a + b
(small: problems are either solved or not; large: all are alike), then n responses to it. Prints a
table in Markdown: the share of intervals that contain the true mean, in percent.
"""

import numpy as np
from absl import app, flags

from luspo_jax.benchmarks.intervals import accuracy_interval

_TRIALS = flags.DEFINE_integer("trials", 4_000, "Simulated evaluations a cell.", 10)
_PROBLEMS = flags.DEFINE_integer("problems", 30, "Problems of each.", 2)
_SAMPLES = flags.DEFINE_integer("samples", 32, "Responses a problem.", 1)

MEANS = (0.02, 0.12, 0.5)
CONCENTRATIONS = (0.5, 1.0, 2.0, 4.0, 10.0, 50.0)


def shares(rng: np.random.Generator, mean: float, concentration: float) -> np.ndarray:
    """Draws right responses, [trials, problems]."""
    size = (_TRIALS.value, _PROBLEMS.value)
    accuracy = rng.beta(mean * concentration, (1 - mean) * concentration, size)
    return rng.binomial(_SAMPLES.value, accuracy)


def covered(right: np.ndarray, mean: float) -> tuple[float, float]:
    """Returns the shares of our intervals, and of normal ones, that contain the mean."""
    total = [_SAMPLES.value] * right.shape[1]
    ends = np.array([accuracy_interval(row, total) for row in right])
    ours = np.mean((ends[:, 0] <= mean) & (mean <= ends[:, 1]))
    each = right / _SAMPLES.value
    half = 1.96 * each.std(axis=1, ddof=1) / np.sqrt(right.shape[1])
    return float(ours), float(np.mean(np.abs(each.mean(axis=1) - mean) <= half))


def main(_) -> None:
    """Prints the table."""
    rng = np.random.default_rng(0)
    print("| true accuracy | a + b | ours | normal |\n|---|---|---|---|")
    for mean in MEANS:
        for concentration in CONCENTRATIONS:
            ours, normal = covered(shares(rng, mean, concentration), mean)
            print(f"| {mean} | {concentration:g} | {100 * ours:.1f} | {100 * normal:.1f} |")


if __name__ == "__main__":
    app.run(main)
