"""Coverage of the intervals by simulation, their edges, and what they refuse."""

import numpy as np
import pytest

from luspo_jax.benchmarks.intervals import accuracy_interval, paired_interval, t_quantile

PROBLEMS, SAMPLES = 30, 32


def coverage(mean, concentration, *, trials, seed=0):
    """Share of simulated evaluations whose interval holds the true accuracy.

    A problem's accuracy is drawn from the beta distribution with this mean and a + b =
    concentration.
    """
    rng = np.random.default_rng(seed)
    a, b = mean * concentration, (1 - mean) * concentration
    right = rng.binomial(SAMPLES, rng.beta(a, b, (trials, PROBLEMS)))
    ends = np.array([accuracy_interval(row, [SAMPLES] * PROBLEMS) for row in right])
    return np.mean((ends[:, 0] <= mean) & (mean <= ends[:, 1]))


@pytest.mark.parametrize("mean", [0.02, 0.12, 0.5])
def test_coverage(mean):
    """93 to 97 %, give or take two standard errors of 1,000 trials."""
    assert 0.93 - 0.0138 <= coverage(mean, 4.0, trials=1_000) <= 0.97 + 0.0138


@pytest.mark.slow
@pytest.mark.parametrize("concentration", [1.0, 2.0, 4.0, 10.0])
@pytest.mark.parametrize("mean", [0.02, 0.12, 0.5])
def test_coverage_whatever_the_spread_between_problems(mean, concentration):
    assert 0.93 <= coverage(mean, concentration, trials=4_000) <= 0.975


def test_a_normal_interval_would_not_hold():
    """The reason for all this: at 0.02 the usual interval covers far below its level."""
    rng = np.random.default_rng(0)
    shares = rng.binomial(SAMPLES, rng.beta(0.04, 1.96, (2_000, PROBLEMS))) / SAMPLES
    half = 1.96 * shares.std(axis=1, ddof=1) / np.sqrt(PROBLEMS)
    assert np.mean(np.abs(shares.mean(axis=1) - 0.02) <= half) < 0.85


def test_all_wrong_and_all_right_are_mirror_images():
    low, high = accuracy_interval([0] * 30, [32] * 30)
    assert low == 0
    assert 0.01 < high < 0.1
    mirrored = accuracy_interval([32] * 30, [32] * 30)
    np.testing.assert_allclose(mirrored, [1 - high, 1], atol=1e-9)


def test_more_problems_narrow_it_and_one_suffices():
    few = accuracy_interval([16] * 5 + [0] * 5, [32] * 10)
    many = accuracy_interval(([16] * 5 + [0] * 5) * 10, [32] * 100)
    assert many[1] - many[0] < few[1] - few[0]
    low, high = accuracy_interval([3], [4])
    assert 0 <= low < 0.75 < high <= 1


def test_unequal_numbers_of_responses():
    low, high = accuracy_interval([1, 10, 3], [2, 20, 4])
    assert low < np.mean([0.5, 0.5, 0.75]) < high


@pytest.mark.parametrize(
    ("right", "total"), [([], []), ([1], [2, 2]), ([3], [2]), ([-1], [2]), ([0], [0])]
)
def test_impossible_counts_are_refused(right, total):
    with pytest.raises(ValueError, match="count"):
        accuracy_interval(right, total)


def test_t_quantiles():
    """Student's t at 97.5 %, from tables."""
    for freedom, expected in ((1, 12.706), (3, 3.182), (4, 2.776), (9, 2.262), (29, 2.045)):
        assert t_quantile(freedom) == pytest.approx(expected, abs=0.01)


def test_paired_interval_gains_from_pairing():
    right = [0, 4, 8, 12, 16] * 4
    better = [0, 6, 10, 14, 16] * 4
    total = [16] * 20
    low, high = paired_interval((better, total), (right, total))
    assert low < np.mean(better) / 16 - np.mean(right) / 16 < high
    unpaired = paired_interval((better, total), (right[::-1], total))
    assert high - low < unpaired[1] - unpaired[0]


def test_paired_interval_is_not_empty_without_differences():
    total = [4] * 10
    low, high = paired_interval(([0] * 10, total), ([0] * 10, total))
    assert low < 0 < high
    assert low == pytest.approx(-high)
