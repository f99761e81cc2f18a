"""Rewards beside the others of a group, with numbers worked out by hand."""

import numpy as np
import pytest

from luspo_jax.rewards.group import group_reward
from tests.rewards.group.group_cases import peers

LENGTHS, RIGHT = (10, 20, 50, 40), (1, 0, 1, 0)  # mean 30, from 10 to 50; half are right


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        # λ = ½ − (L − 10) / 40: ½, ¼, −½, −¼; a wrong one keeps the negative alone.
        ("kimi", {}, [0.5, 0.0, -0.5, -0.25]),
        # 0.1 · ½ · L / 100
        ("alp", {}, [-0.005, -0.01, -0.025, -0.02]),
        # 0.25 · ½ · L / 50
        ("linear", {}, [-0.025, -0.05, -0.125, -0.1]),
        # 1 / (1 + 0.3 · 10 / 30) − 1 = −1/11; 1 / (1 + 0.3 · 50 / 30) − 1 = −1/3; 0 stays 0.
        ("gr3", {}, [-1 / 11, 0.0, -1 / 3, 0.0]),
        # w = 1, ¾, 0, ¼ with mean ½; the first is shortest, and of the best: those of rank 0.
        ("grlc", {}, [0.1 * 0.5 + 0.1, 0.1 * 0.25, -0.1 * 0.5, -0.1 * 0.25]),
        ("grlc", {"coef": 0.35, "bonus": 0}, [0.175, 0.0875, -0.175, -0.0875]),
    ],
)
def test_by_hand(name, options, expected):
    found = group_reward(name, options).score(peers(LENGTHS, RIGHT))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def test_an_unsolved_prompt_pays_the_least_share_under_alp():
    """max(0, 1/4) · 0.4 · L / 100."""
    unsolved = peers(LENGTHS, (0, 0, 0, 0))
    np.testing.assert_allclose(
        group_reward("alp", {"beta": 0.4}).score(unsolved), [-0.01, -0.02, -0.05, -0.04]
    )
    assert not any(group_reward("alp", {"floor": False}).score(unsolved))


def test_the_shortest_gets_a_bonus_only_among_the_best():
    """Of five, the best fifth is one: the bonus goes to the shortest only if it is that one."""
    lengths = (10, 20, 30, 40, 50)
    for best in range(5):
        values = [float(i == best) for i in range(5)]
        found = group_reward("grlc", {"coef": 0}).score(peers(lengths, values))
        assert found == [0.1 * (i == best == 0) for i in range(5)]


def test_gr3_is_calibrated_so_that_a_best_response_of_mean_length_gains():
    """Rewards 1, 0.9, 0.9 of lengths 30, 10, 50. Uncalibrated, α = 1: R' = 1/2, 0.9 / (4/3),
    0.9 / (8/3), mean (0.5 + 0.675 + 0.3375) / 3 = 0.504 > 0.5. Halved: 1/1.5 = 0.667 against
    (0.667 + 0.771 + 0.491) / 3 = 0.643."""
    group = peers((30, 10, 50), (1, 0, 0), [1.0, 0.9, 0.9])
    plain = group_reward("gr3", {"alpha": 1.0}).score(group)
    assert 1 + plain[0] < np.mean(np.array(group.values) + plain)
    found = group_reward("gr3", {"alpha": 1.0, "calibrate": True}).score(group)
    halved = group_reward("gr3", {"alpha": 0.5}).score(group)
    assert found == halved
    equal = peers((30, 10, 50), (1, 1, 1))
    assert group_reward("gr3", {"calibrate": True}).score(equal) == group_reward("gr3").score(equal)


def test_gr3_turns_around_where_rewards_are_negative():
    found = group_reward("gr3").score(peers((10, 50), (0, 0), [-1.0, -1.0]))
    assert 0 < found[0] < found[1]


@pytest.mark.parametrize("name", ["kimi", "grlc"])
def test_equal_lengths_say_nothing(name):
    options = {"bonus": 0} if name == "grlc" else {}
    assert not any(group_reward(name, options).score(peers((7, 7, 7), (1, 0, 1))))
