"""Rewards beside a limit or a target, with numbers worked out by hand."""

import itertools

import numpy as np
import pytest

from luspo_jax.rewards.group import Dual, GroupRewardError, group_reward
from luspo_jax.rewards.group.limits import distinct_share
from luspo_jax.rewards.overlong import penalty
from tests.rewards.group.group_cases import peers

# Of a limit of 300 tokens: cos(0) = 1, cos(π/3) = ½, cos(π/2) = 0, cos(2π/3) = −½, cos(π) = −1.
COSINE = [
    # (tokens, right, wrong)
    (0, 1.0, -1.0),
    (100, 0.5 + 0.25 * 1.5, -0.5 - 0.25 * 1.5),
    (150, 0.75, -0.75),
    (200, 0.5 + 0.25 * 0.5, -0.5 - 0.25 * 0.5),
    (300, 0.5, -0.5),
    (900, 0.5, -0.5),
]


@pytest.mark.parametrize(("length", "right", "wrong"), COSINE)
def test_cosine_by_hand(length, right, wrong):
    found = group_reward("cosine").score(peers((length, length), (1, 0), max_length=300))
    np.testing.assert_allclose(found, [right, wrong], rtol=0, atol=1e-12)
    found = group_reward("cosine", {"max_length": 300}).score(peers((length, length), (1, 0)))
    np.testing.assert_allclose(found, [right, wrong], rtol=0, atol=1e-12)


@pytest.mark.slow
def test_cosine_and_overlong_are_those_of_trl(monkeypatch):
    """Which responses are right is told: TRL would need Math-Verify to find out."""
    theirs = pytest.importorskip("trl.rewards.accuracy_rewards", reason="live parity needs TRL")
    overlong = pytest.importorskip("trl.rewards.other_rewards")
    lengths = [n for n in range(0, 131, 3) for _ in range(2)]
    ids = [[1] * n for n in lengths]
    group = peers(lengths, [1, 0] * (len(lengths) // 2))
    right = [float(each) for each in group.right]
    monkeypatch.setattr(theirs, "accuracy_reward", lambda completions, solution: right)
    settings = {"min_value_wrong": -0.7, "max_value_wrong": -0.2}
    settings |= {"min_value_correct": 0.3, "max_value_correct": 0.9}
    options = {"wrong_short": -0.7, "wrong_long": -0.2, "right_long": 0.3, "right_short": 0.9}
    for theirs_with, ours_with in (({}, {}), (settings, options)):
        judge = theirs.get_cosine_scaled_reward(100, **theirs_with)
        found = group_reward("cosine", ours_with).score(group)
        expected = judge([[]] * len(ids), [""] * len(ids), ids)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9)
    found = [penalty(n, max_length=100, buffer=30) for n in lengths]
    expected = overlong.get_soft_overlong_punishment(100, 30)(ids)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9)


def test_l1_pays_for_the_length_that_was_asked_for():
    """n* = 1000. Exact: 3e-4 · 400, 3e-4 · 1500. Max: clip(0.12 + 0.5) − 1 = −0.38; of 2500 tokens,
    −0.45 + 0.5 = 0.05; of 4000, −0.4 is clipped to 0; wrong ones have no reward to lose."""
    group = peers((600, 2500, 4000, 2500), (1, 1, 1, 0), target=1000, max_length=5000)
    found = group_reward("l1_exact").score(group)
    np.testing.assert_allclose(found, [-0.12, -0.45, -0.9, -0.45], rtol=0, atol=1e-12)
    found = group_reward("l1_max").score(group)
    np.testing.assert_allclose(found, [-0.38, -0.95, -1.0, 0.0], rtol=0, atol=1e-12)
    generous = group_reward("l1_max", {"delta": 1.0}).score(group)
    assert generous[0] == 0  # clip(1.12) = 1


def test_laser_pays_right_responses_up_to_the_target():
    group = peers((20, 21, 20), (1, 1, 0))
    assert group_reward("laser", {"target": 20}).score(group) == [0.5, 0.0, 0.0]


@pytest.mark.parametrize(
    ("right", "target"),
    [((1, 1, 1), 10), ((1, 1, 0), 20), ((1, 0, 0), 30), ((0, 0, 0), 30)],
)
def test_laser_d_gives_hard_prompts_more_tokens(right, target):
    """⅔ is not above ⅔, and ⅓ not above ⅓."""
    made = group_reward("laser_d", {"easy": 10, "medium": 20, "hard": 30, "alpha": 0.25})
    for longest, expected in ((target, 0.25), (target + 1, 0.0)):
        found = made.score(peers((longest,) * 3, right))
        assert found == [expected * each for each in right]


def test_leash_takes_from_long_responses_alone():
    """λ = 0.4, L_T = 50: excess 0, 0, 0.2 and 1."""
    made = group_reward("leash", {"target": 50})
    values = [1.0, 0.0, 1.0, -0.8]
    group = peers((20, 50, 60, 100), (1, 0, 1, 0), values, duals={"leash": 0.4})
    # The last would be −1.2 and is bounded by −1.
    np.testing.assert_allclose(made.score(group), [0, 0, -0.08, -0.2], rtol=0, atol=1e-12)
    below = peers((100,), (0,), [-3.0], duals={"leash": 0.4})
    assert made.score(below) == [0.0]


def test_a_dual_variable_follows_the_mean_length():
    """0.2 + 0.5 · (60 / 50 − 1) = 0.3; then down by 0.5 · 0.4 = 0.2; it stays within 0 … 0.35."""
    dual = Dual(initial=0.2, rate=0.5, target=50, most=0.35)
    assert dual.stepped(0.2, [40, 80]) == pytest.approx(0.3, abs=1e-12)
    assert dual.stepped(0.3, [30, 30]) == pytest.approx(0.1, abs=1e-12)
    assert dual.stepped(0.1, [30, 30]) == 0
    assert dual.stepped(0.3, [60, 80]) == 0.35


def test_lie_asks_wrong_responses_for_more():
    """n* = 9500, slack 500: missing 9000 and 4500 tokens, α = 0.3 / 9000."""
    group = peers((0, 4500, 9000, 0), (0, 0, 0, 1), target=9500)
    found = group_reward("lie").score(group)
    np.testing.assert_allclose(found, [-0.3, -0.15, 0, 0], rtol=0, atol=1e-12)
    capped = group_reward("lie", {"most": 0.1}).score(group)
    np.testing.assert_allclose(capped, [-0.1, -0.1, 0, 0], rtol=0, atol=1e-12)


def test_lie_takes_from_those_that_repeat_themselves():
    """Nine tokens in a circle have nine different runs of ten: of 19 tokens' ten runs, 0.9."""
    circle = list(itertools.islice(itertools.cycle(range(9)), 19))
    assert distinct_share(circle) == 0.9
    assert distinct_share(circle[:9]) == 1.0
    more = list(itertools.islice(itertools.cycle(range(9)), 20))
    group = peers((19, 20, 9), (1, 1, 1), tokens=[circle, more, circle[:9]], target=10)
    assert group_reward("lie").score(group) == [0.0, -0.6, 0.0]


@pytest.mark.parametrize("name", ["l1_exact", "l1_max", "lie"])
def test_a_prompt_without_a_target_is_refused(name):
    made = group_reward(name)
    assert made.targeted
    with pytest.raises(GroupRewardError, match=r"data\.length_target_low .*\{target_length\}"):
        made.score(peers((5,), (0,)) if name == "lie" else peers((5,), (1,)))
