"""Advantages by hand, against NumPy, and where groups are flat, absent or in any order."""

import jax
import numpy as np
import numpy_objectives
import pytest

from luspo_jax import objectives
from luspo_jax.objectives import Objective, validate_group_size
from luspo_jax.objectives.advantages import ADVANTAGES

pytestmark = pytest.mark.usefixtures("strict_dtypes")

REWARDS = np.array([1.0, 0.0, 0.0, 0.5, 0.25, 0.0, 1.0, 1.0], np.float32)
GROUPS = np.array([40, 40, 40, 40, -1, -1, -1, -1], np.int32)
LENGTHS = np.array([2, 4, 6, 8, 1, 3, 5, 7], np.int32)


def advantages(name, rewards=REWARDS, groups=GROUPS, lengths=LENGTHS, **changes):
    objective = Objective(advantage=name, **changes)
    result_B = objectives.advantages(objective, rewards, groups, lengths)
    return np.asarray(result_B)


HAND = {
    "none": [0.625, -0.375, -0.375, 0.125],
    "rloo": [5 / 6, -0.5, -0.5, 1 / 6],
    "maxrl": [0.625 / 0.375, -1, -1, 0.125 / 0.375],
    # Length-weighted mean: (2·1 + 8·0.5) / 20 = 0.3.
    "opo": [0.7, -0.3, -0.3, 0.2],
    # Deviation: √((0.625² + 2·0.375² + 0.125²) / 3).
    "group-std": np.array([0.625, -0.375, -0.375, 0.125]) / 0.4787136,
}


@pytest.mark.parametrize("name", HAND)
def test_by_hand(name):
    np.testing.assert_allclose(advantages(name)[:4], HAND[name], rtol=1e-5)


@pytest.mark.parametrize("name", ADVANTAGES)
def test_against_numpy(name, x64):
    rng = np.random.default_rng(3)
    rewards, lengths = rng.random(12), rng.integers(1, 30, 12)
    groups = np.repeat(np.array([5, 2, 9], np.int32), 4)
    reference = {
        "none": numpy_objectives.group_mean,
        "group-std": numpy_objectives.group_std,
        "batch-std": numpy_objectives.batch_std,
        "rloo": numpy_objectives.rloo,
        "maxrl": numpy_objectives.maxrl,
        "opo": numpy_objectives.opo,
        "reinforce-pp-baseline": numpy_objectives.reinforce_pp_baseline,
    }[name]
    expected = reference(list(rewards), list(groups), list(lengths))
    np.testing.assert_allclose(advantages(name, rewards, groups, lengths), expected, rtol=1e-9)


@pytest.mark.parametrize("name", ADVANTAGES)
def test_row_order_does_not_matter(name):
    order = np.array([7, 0, 5, 2, 1, 6, 3, 4])
    shuffled = advantages(name, REWARDS[order], GROUPS[order], LENGTHS[order])
    np.testing.assert_allclose(shuffled, advantages(name)[order], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ADVANTAGES)
def test_absent_rows_change_nothing_and_get_nothing(name):
    expected = advantages(name)
    rewards = np.concatenate([REWARDS, np.array([np.nan, np.inf], np.float32)])
    groups = np.concatenate([GROUPS, np.array([40, 77], np.int32)])
    lengths = np.concatenate([LENGTHS, np.array([0, 0], np.int32)])
    actual = advantages(name, rewards, groups, lengths)
    np.testing.assert_allclose(actual[:8], expected, rtol=1e-5, atol=1e-6)
    assert np.all(actual[8:] == 0)
    assert np.all(advantages(name, lengths=np.zeros(8, np.int32)) == 0)


@pytest.mark.parametrize("name", sorted(set(ADVANTAGES) - {"reinforce-pp-baseline"}))
@pytest.mark.parametrize("reward", [0.0, 0.1, 1.1, -0.3])
def test_equal_rewards_have_no_advantage(name, reward):
    """Exactly none: the rounding of 0.1 − mean(0.1, …), over ε, would be an update."""
    rewards = np.full(7, reward, np.float32)
    groups, lengths = np.zeros(7, np.int32), np.arange(1, 8, dtype=np.int32)
    assert np.all(advantages(name, rewards, groups, lengths) == 0)


def test_maxrl_never_turns_the_sign():
    rewards = np.array([-0.3, 0.1, -0.3, 0.2], np.float32)
    result = advantages("maxrl", rewards, np.zeros(4, np.int32), LENGTHS[:4])
    assert np.all(result == 0)


def test_whitening_is_over_tokens():
    tokens = np.repeat(advantages("reinforce-pp-baseline"), LENGTHS)
    assert abs(tokens.mean()) < 1e-6
    assert tokens.std(ddof=1) == pytest.approx(1, abs=1e-6)


def test_is_jittable_and_has_no_gradient():
    objective = Objective(advantage="opo")

    @jax.jit
    def total(rewards_B):
        return objectives.advantages(objective, rewards_B, GROUPS, LENGTHS).sum()

    assert np.all(np.asarray(jax.grad(total)(REWARDS)) == 0)


@pytest.mark.parametrize("name", ADVANTAGES)
def test_groups_of_one_are_refused(name):
    objective = Objective(advantage=name)
    validate_group_size(objective, 2)
    with pytest.raises(ValueError, match="group_size = 1"):
        validate_group_size(objective, 1)


def test_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match=r"lengths_B \(7,\)"):
        advantages("none", lengths=LENGTHS[:7])
