"""Advantages by hand, against NumPy, and where groups are flat, absent or in any order."""

import jax
import numpy as np
import pytest

from luspo_jax import objectives
from luspo_jax.objectives import Objective, validate_group_size
from luspo_jax.objectives.advantages import ADVANTAGES
from tests.objectives import numpy_objectives

pytestmark = pytest.mark.usefixtures("strict_dtypes")

REWARDS = np.array([1.0, 0.0, 0.0, 0.5, 0.25, 0.0, 1.0, 1.0], np.float32)
GROUPS = np.array([40, 40, 40, 40, -1, -1, -1, -1], np.int32)
LENGTHS = np.array([2, 4, 6, 8, 1, 3, 5, 7], np.int32)


def advantages(name, rewards=REWARDS, groups=GROUPS, lengths=LENGTHS, **changes):
    """Advantages [B], or [B, T] of tokens whose probabilities follow from their row's reward."""
    objective = Objective(advantage=name, **changes)
    with np.errstate(invalid="ignore"):
        parts = np.stack([rewards, rewards**2], axis=1)
    mask = np.arange(8) < lengths[:, None]
    spread = (0.1 + np.arange(8) / 10)[None, :] * (1 + np.nan_to_num(rewards, posinf=1))[:, None]
    logprobs = -spread.astype(rewards.dtype)
    result = objectives.advantages(
        objective,
        rewards,
        groups,
        lengths,
        parts=objectives.RewardParts(parts, np.array([1, 0.5], rewards.dtype)),
        tokens=objectives.TokenStatistics(mask, logprobs, np.exp(2 * logprobs)),
    )
    return np.asarray(result)


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


# The others read more than rewards; test_numpy_transcription.py has them.
ONE_REWARD = sorted(set(ADVANTAGES) - {"gdpo", "otb"})


@pytest.mark.parametrize("name", ONE_REWARD)
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
    assert np.all(advantages(name, rewards, groups, lengths, otb_zero_tail=False) == 0)


def test_the_optimal_token_baseline_by_hand():
    """Two responses of 1 and 3 tokens, rewards 1 and 0; energies 0.5 each but the last's 1."""
    objective = Objective(advantage="otb")
    mask = np.array([[1, 0, 0], [1, 1, 1]], bool)
    pi = np.full((2, 3), 0.5, np.float32)
    collision = np.array([[0.5, 9, 9], [0.5, 0.5, 1]], np.float32)
    known = np.array([1, 0], np.float32), np.array([4, 4]), np.array([1, 3])

    def found(objective, **weights):
        tokens = objectives.TokenStatistics(mask, np.log(pi), collision, **weights)
        return np.asarray(objectives.advantages(objective, *known, tokens=tokens))

    # At the first token both go on, with equal W: B = 1/2. Then one is left.
    np.testing.assert_allclose(found(objective), [[0.5, 0, 0], [-0.5, 0, 0]], atol=1e-6)
    # Twice the weight of importance sampling is four times the energy: B = 1 · 4/(4 + 1).
    weights = np.array([[2, 1, 1], [1, 1, 1]], np.float32)
    np.testing.assert_allclose(
        found(objective, weight_BT=weights), [[0.2, 0, 0], [-0.8, 0, 0]], atol=1e-6
    )


@pytest.mark.parametrize(("zero", "tail"), [(True, 0.7), (False, 0.0)])
def test_the_longest_response_alone_has_no_baseline_or_its_own_reward(zero, tail):
    """Without a baseline it is lengthened where it is right, also if all are."""
    rewards, groups = np.full(3, 0.7, np.float32), np.zeros(3, np.int32)
    found = advantages("otb", rewards, groups, np.array([2, 3, 6]), otb_zero_tail=zero)
    assert np.all(found[:, :3] == 0)
    np.testing.assert_allclose(found[2, 3:6], tail)


def test_parts_are_normalised_one_by_one():
    """A part of tiny variance has as much say as one of large variance."""
    groups, lengths = np.zeros(4, np.int32), np.ones(4, np.int32)
    right, short = np.array([1, 1, 0, 0.0]), 1e-3 * np.array([1, 0, 1, 0.0])
    objective = Objective(advantage="gdpo")
    found = objectives.advantages(
        objective,
        (right + short).astype(np.float32),
        groups,
        lengths,
        parts=objectives.RewardParts(
            np.stack([right, short], axis=1).astype(np.float32), np.ones(2, np.float32)
        ),
    )
    np.testing.assert_allclose(found, np.array([1, 0, 0, -1]) * np.sqrt(3 / 2), atol=5e-3)


@pytest.mark.parametrize(("name", "missing"), [("gdpo", "parts"), ("otb", "tokens")])
def test_what_an_advantage_reads_and_lacks_is_named(name, missing):
    with pytest.raises(ValueError, match=f"{missing} are missing: advantage '{name}'"):
        objectives.advantages(Objective(advantage=name), REWARDS, GROUPS, LENGTHS)


def shaped(name, rewards, lengths, **changes):
    objective = Objective(advantage="none", advantage_shaping=name, **changes)
    groups = np.zeros(len(rewards), np.int32)
    return np.asarray(objectives.advantages(objective, rewards, groups, lengths))


def test_qglas_by_hand():
    """Right: 2, 4 and 6 tokens, mean 4; the first saves half of it, which earns all."""
    rewards = np.array([1, 1, 1, 0], np.float32)
    found = shaped("qglas", rewards, np.array([2, 4, 6, 1]))
    np.testing.assert_allclose(found, [0.25 + 0.5 * 0.5, 0.25, 0.25, -0.75], rtol=1e-5)


def test_intern_s2_by_hand():
    """w = 1, ¾ and ½ of equal advantages ¼: the sum ¾ is kept, divided by 9/16."""
    rewards = np.array([1, 1, 1, 0], np.float32)
    found = shaped("intern-s2", rewards, np.array([2, 4, 6, 1]))
    scale = 0.75 / (0.25 * 2.25)
    np.testing.assert_allclose(
        found, [scale * 0.25, scale * 0.1875, scale * 0.125, -0.75], rtol=1e-5
    )
    assert found[:3].sum() == pytest.approx(0.75)
    few = shaped("intern-s2", np.array([1, 0, 0, 0], np.float32), np.array([2, 4, 6, 1]))
    np.testing.assert_allclose(few, [0.75, -0.25, -0.25, -0.25])  # a hard group: as it was


@pytest.mark.parametrize("name", ["qglas", "intern-s2"])
def test_no_shaping_turns_a_sign_or_depends_on_order(name):
    rng = np.random.default_rng(5)
    for _ in range(50):
        rewards = rng.random(8).astype(np.float32).round(1)
        lengths = rng.integers(1, 100, 8)
        found, plain = (shaped(n, rewards, lengths) for n in (name, "none"))
        assert np.all(np.sign(found) == np.sign(plain))
        order = rng.permutation(8)
        np.testing.assert_allclose(
            shaped(name, rewards[order], lengths[order]), found[order], atol=1e-6
        )


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
