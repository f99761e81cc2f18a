"""Length statistics against computations by hand."""

import fractions

import numpy as np
import pytest

from luspo_jax.length import coupling


def test_correlation_is_within_groups():
    # Between groups length and advantage go together; within each they are opposed.
    advantages = np.array([1.0, -1.0, 11.0, 9.0])
    lengths = np.array([1, 3, 101, 103])
    groups = np.array([0, 0, 1, 1])
    assert coupling.advantage_length_correlation(advantages, lengths, groups) == pytest.approx(-1)
    assert np.isnan(coupling.advantage_length_correlation(advantages, np.ones(4), groups))


def test_length_by_correctness():
    assert coupling.length_by_correctness(np.array([2, 4, 9]), [True, True, False]) == (3.0, 9.0)
    assert np.isnan(coupling.length_by_correctness(np.array([2]), [True])[1])


def test_accuracy_by_length_third_ranks_inside_each_problem():
    lengths = np.array([1, 2, 3, 30, 20, 10])
    correct = np.array([False, False, True, True, True, False])
    groups = np.array([0, 0, 0, 1, 1, 1])
    np.testing.assert_allclose(
        coupling.accuracy_by_length_third(lengths, correct, groups), [0.0, 0.5, 1.0]
    )


def test_accuracy_by_length_third_ignores_row_order_under_ties():
    lengths, groups = np.array([5, 5, 5]), np.zeros(3, int)
    first = coupling.accuracy_by_length_third(lengths, np.array([True, False, False]), groups)
    last = coupling.accuracy_by_length_third(lengths, np.array([False, False, True]), groups)
    np.testing.assert_allclose(first, last)


def test_length_by_pass_rate_against_its_transcription():
    rng = np.random.default_rng(3)
    for _ in range(50):
        sizes = rng.integers(1, 9, 12)
        groups = rng.permutation(np.repeat(np.arange(12) * 7, sizes))
        lengths = rng.integers(1, 100, len(groups))
        correct = rng.random(len(groups)) < rng.choice([0.0, 0.2, 0.5, 1.0], 84)[groups]
        found = {q: [] for q in range(5)}
        for group in np.unique(groups):
            own = groups == group
            rate = fractions.Fraction(int(correct[own].sum()), int(own.sum()))
            if rate == 1:
                found[0].extend(lengths[own])
            for q in range(1, 5):
                if fractions.Fraction(q - 1, 4) < rate <= fractions.Fraction(q, 4):
                    found[q].extend(lengths[own])
        solved, quartiles = coupling.length_by_pass_rate(lengths, correct, groups)
        expected = [np.mean(found[q]) if found[q] else np.nan for q in range(5)]
        np.testing.assert_allclose([solved, *quartiles], expected)


def test_repetition_and_compression():
    assert coupling.repetition(np.arange(50)) == 0
    assert coupling.repetition(np.zeros(50, int)) == pytest.approx(1 - 1 / 47)
    assert coupling.repetition(np.arange(3)) == 0
    assert coupling.compress_ratio("ab" * 500) > 20 > coupling.compress_ratio("The quick brown fox")
    assert coupling.compress_ratio("") == 1.0
