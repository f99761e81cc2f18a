"""Length reweighting error of clipping, by hand and against its definition."""

import math

import numpy as np
import pytest

from luspo_jax.metrics import declared
from luspo_jax.objectives.clip_fairness import reweighting_error


def _sums(pos, neg, **others):
    """Pairs (clipped, tokens) by bin."""
    pairs = {"pos": pos, "neg": neg}
    return {
        f"actor/clipfrac/{sign}/bin_{k}": pair
        for sign, bins in pairs.items()
        for k, pair in enumerate(bins)
    } | others


def _error(pos, neg, **others):
    found = reweighting_error(_sums(pos, neg, **others))
    assert list(found) == ["actor/clip_lre"]
    assert declared("actor/clip_lre").reducer == "mean"
    return found["actor/clip_lre"]


def test_by_hand():
    # 40 tokens in bin 0, of which 10 are clipped, and 60 in bin 1, none: c = 0.1.
    got = _error([(10, 30), (0, 20)], [(0, 10), (0, 40)], loss=(5.0, 1.0))
    assert got == pytest.approx(0.4 * abs(0.75 / 0.9 - 1) + 0.6 * abs(1 / 0.9 - 1))


def test_clipping_all_lengths_alike_is_even():
    assert _error([(3, 30), (2, 20)], [(1, 10), (4, 40)]) == pytest.approx(0, abs=1e-12)
    assert _error([(0, 30), (0, 20)], [(0, 10), (0, 40)]) == 0


def test_clipping_all_of_a_bin_but_little_of_another_nears_two():
    assert _error([(1000, 1000), (0, 1)], [(0, 0), (0, 0)]) == pytest.approx(2, abs=0.01)


def test_without_tokens_bins_or_unclipped_tokens():
    assert _error([(0, 0), (0, 0)], [(0, 0), (0, 0)]) == 0
    assert math.isnan(_error([(4, 4), (1, 1)], [(0, 0), (2, 2)]))
    assert reweighting_error({"actor/clipfrac/pos": (1.0, 2.0)}) == {}


def test_against_the_definition_on_random_counts():
    rng = np.random.default_rng(0)
    for _ in range(50):
        tokens = rng.integers(0, 50, (2, 4))
        clipped = rng.binomial(tokens, 0.4)
        n, c = (
            tokens.sum(axis=0) / tokens.sum(),
            clipped.sum(axis=0) / np.maximum(tokens.sum(axis=0), 1),
        )
        expected = np.sum(n * np.abs((1 - c) / (1 - n @ c) - 1))
        pos, neg = (list(zip(*pair, strict=True)) for pair in zip(clipped, tokens, strict=True))
        assert _error(pos, neg) == pytest.approx(expected, abs=1e-12)
