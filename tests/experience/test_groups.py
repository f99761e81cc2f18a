"""Metrics of a step and of an evaluation, by hand, where some responses have no verdict."""

import math

import numpy as np
import pytest
from luspo_jax.shaping import Shaping

from luspo_jax import evaluate, experience, shaping
from luspo_jax.datasets import Example
from luspo_jax.experience import Group, Rollouts
from luspo_jax.metrics import declared
from luspo_jax.prompts import PromptRecord
from luspo_jax.rewards import Reward
from luspo_jax.rollout import Response

FAILED = Reward(0.0, "error", {"right": 0.0}, detail="right: TypeError")
LATE = Reward(0.0, "timeout", {"right": 0.0})


def _reward(value):
    return Reward(float(value), "ok", {"right": float(value > 0)})


def _group(prompt_id, rewards, lengths):
    judged = np.array([reward.judged for reward in rewards])
    responses = [
        Response(prompt_id, i, np.arange(n, dtype=np.int32), np.zeros(n, np.float32), True)
        for i, n in enumerate(lengths)
    ]
    record = PromptRecord(prompt_id, np.array([1]), "?", Example(prompt_id, "?", "!"))
    return Group(record, responses, ["x"] * len(rewards), rewards, judged, judged)


# Rewards 2, 1 and none; 0, none and none; 3, 3, 3: six judged of nine, two groups to compare.
GROUPS = [
    _group(0, [_reward(2), _reward(1), FAILED], [2, 4, 100]),
    _group(1, [_reward(0), LATE, FAILED], [8, 100, 100]),
    _group(2, [_reward(3)] * 3, [1, 3, 5]),
]
ADVANTAGES = np.array([1, -1, 0, 0, 0, 0, 0, 0, 0], np.float32)


def test_metrics_of_rewards_are_over_judged_responses_and_compared_groups():
    got = experience.metrics(Rollouts(GROUPS), ADVANTAGES, correct="right")
    expected = {
        "reward": (2 + 1 + 0 + 9) / 6,
        "reward_std": (math.sqrt(0.5) + 0) / 2,  # of {2, 1} and {3, 3, 3}
        "frac_reward_zero_std": 1 / 2,
        "critic/score/mean": 2.0,
        "critic/score/max": 3.0,
        "critic/score/min": 0.0,
        "reward/part/right": 5 / 6,
        "reward/unjudged": 3,
        "reward/groups_not_compared": 1,
        "reward/status/ok": 6,
        "reward/status/error": 2,
        "reward/status/timeout": 1,
        "length/correct_mean": (2 + 4 + 1 + 3 + 5) / 5,
        "length/incorrect_mean": 8.0,
        "critic/advantages/min": -1.0,
        # Within groups of judged ones: advantages ±1 at −1, +1 tokens; others have no spread in A.
        "length/advantage_corr": -2 / math.sqrt(2 * (2 + 8)),
        "response_length/max": 100.0,  # lengths are of all
    }
    assert {name: got[name] for name in expected} == pytest.approx(expected)
    assert all(declared(name) for name in got)


def test_a_verifier_that_always_pays_one_or_fails_shows_a_reward_of_one():
    one = Reward(1.0, "ok", {"right": 1.0})
    groups = [_group(0, [one, one, FAILED, one], [1] * 4), _group(1, [one] * 4, [1] * 4)]
    got = experience.metrics(Rollouts(groups), np.zeros(8, np.float32), correct="right")
    assert (got["reward"], got["reward_std"], got["frac_reward_zero_std"]) == (1.0, 0.0, 1.0)


def test_where_nothing_is_judged_there_is_no_reward():
    groups = [_group(0, [FAILED, LATE], [1, 2])]
    got = experience.metrics(Rollouts(groups), np.zeros(2, np.float32), correct="right")
    names = (
        "reward",
        "reward_std",
        "frac_reward_zero_std",
        "critic/score/max",
        "reward/part/right",
    )
    assert all(math.isnan(got[name]) for name in names)
    assert (got["reward/unjudged"], got["reward/groups_not_compared"]) == (2, 1)


def test_what_was_sampled_before_filters_is_a_mean_of_judged_rewards():
    collected = shaping.collect(lambda: GROUPS, (), shaping=Shaping(), num_groups=3, part="right")
    assert collected.counts["shaping/sampled_reward"] == pytest.approx(2.0)
    assert collected.counts["shaping/groups_sampled"] == 3


def test_accuracy_is_the_mean_over_problems_of_the_judged_share():
    responses = [response for group in GROUPS for response in group.responses]
    rewards = [reward for group in GROUPS for reward in group.rewards]
    measured = evaluate.summarize(responses, rewards, metric="right", num_samples=3)
    assert measured.accuracy == pytest.approx((2 / 2 + 0 / 1 + 3 / 3) / 3)
    assert measured.accuracy_ci95[0] < measured.accuracy <= measured.accuracy_ci95[1]
    assert (measured.unjudged, measured.num_problems) == (3, 3)
    assert "3 responses without a verdict" in str(measured)
    # Judged ones by length: {2, 4}, {8} and {1, 3, 5}: shortest 2, 8, 1; middle 4, 3; longest 5.
    assert measured.accuracy_by_third == pytest.approx((2 / 3, 1.0, 1.0))


def test_a_problem_without_any_verdict_is_left_out_of_the_accuracy():
    groups = [GROUPS[0], _group(1, [FAILED] * 3, [1] * 3)]
    responses = [response for group in groups for response in group.responses]
    rewards = [reward for group in groups for reward in group.rewards]
    assert evaluate.summarize(responses, rewards, metric="right", num_samples=3).accuracy == 1.0
    nothing = evaluate.summarize(responses[3:], rewards[3:], metric="right", num_samples=3)
    assert math.isnan(nothing.accuracy)
    assert nothing.unjudged == 3
