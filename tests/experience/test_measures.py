"""Metrics and records of a step, by hand, where some responses have no verdict."""

import dataclasses
import math

import numpy as np
import pytest

from luspo_jax.experience import measures
from luspo_jax.experience.groups import Rollouts
from luspo_jax.metrics import declared
from luspo_jax.rewards import Reward
from tests.experience.experience_cases import FAILED, LATE
from tests.experience.experience_cases import group as _group

# Rewards 2, 1 and none; 0, none and none; 3, 3, 3: six judged of nine, two groups to compare.
GROUPS = [
    _group(0, [2, 1, FAILED], [2, 4, 100]),
    _group(1, [0, LATE, FAILED], [8, 100, 100]),
    _group(2, [3] * 3, [1, 3, 5]),
]
ADVANTAGES = [1.0, -1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]


def _metrics(groups, advantages=None):
    count = sum(len(group.responses) for group in groups)
    rollouts = Rollouts(groups, 0).enriched(advantage=advantages or [0.0] * count)
    return measures.metrics(rollouts, correct="right")


def test_metrics_of_rewards_are_over_judged_responses_and_compared_groups():
    got = _metrics(GROUPS, ADVANTAGES)
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
        # Of judged responses the first and last groups are all right, and the other not at all.
        "length/solved_mean": (2 + 4 + 1 + 3 + 5) / 5,
        "length/by_pass_rate/q4": (2 + 4 + 1 + 3 + 5) / 5,
        "critic/advantages/min": -1.0,
        # Within groups of judged ones: advantages ±1 at −1, +1 tokens; others have no spread in A.
        "length/advantage_corr": -2 / math.sqrt(2 * (2 + 8)),
        "response_length/max": 100.0,  # lengths are of all
    }
    assert {name: got[name] for name in expected} == pytest.approx(expected)
    assert all(declared(name) for name in got)
    assert all(math.isnan(got[f"length/by_pass_rate/q{q}"]) for q in (1, 2, 3))


def test_lengths_by_pass_rate_are_of_the_groups_that_have_it():
    """One, two, three and four right of four, and none."""
    groups = [_group(n, [1] * n + [0] * (4 - n), [n, n, n, n + 4]) for n in range(5)]
    got = _metrics(groups)
    assert [got[f"length/by_pass_rate/q{q}"] for q in (1, 2, 3, 4)] == [2.0, 3.0, 4.0, 5.0]
    assert got["length/solved_mean"] == 5.0
    assert {declared(f"length/by_pass_rate/q{q}").unit for q in (1, 2, 3, 4)} == {"tokens"}


def test_a_verifier_that_always_pays_one_or_fails_shows_a_reward_of_one():
    one = Reward(1.0, "ok", {"right": 1.0})
    groups = [_group(0, [one, one, FAILED, one], [1] * 4), _group(1, [one] * 4, [1] * 4)]
    got = _metrics(groups)
    assert (got["reward"], got["reward_std"], got["frac_reward_zero_std"]) == (1.0, 0.0, 1.0)


def test_where_nothing_is_judged_there_is_no_reward():
    got = _metrics([_group(0, [FAILED, LATE], [1, 2])])
    names = (
        "reward",
        "reward_std",
        "frac_reward_zero_std",
        "critic/score/max",
        "reward/part/right",
    )
    assert all(math.isnan(got[name]) for name in names)
    assert (got["reward/unjudged"], got["reward/groups_not_compared"]) == (2, 1)


def test_responses_count_as_trained_by_their_tokens_and_group_sizes_may_differ():
    """One token that carries gradient is enough; a group of two beside one of three."""
    some, none = np.array([False, True, False]), np.zeros(3, bool)
    groups = [_group(0, [1, 0, 1], trained=[some, none, some]), _group(1, [2, 0])]
    got = _metrics(groups, [1.0, -2.0, 1.0, 3.0, -3.0])
    assert got["shaping/trained_responses"] == 4
    assert got["critic/advantages/max"] == 3.0
    assert got["frac_reward_zero_std"] == 0.0
    expected = (np.std([1, 0, 1], ddof=1) + np.std([2, 0], ddof=1)) / 2
    assert got["reward_std"] == pytest.approx(expected)


def test_a_record_holds_all_that_is_read_of_a_response():
    groups = [_group(4, [2, FAILED], [2, 3], stopped=[True, False]), _group(6, [0], [1])]
    found = list(measures.records(Rollouts(groups, 0).enriched(advantage=[0.5, 0.0, -1.0])))
    assert [(r.prompt_id, r.sample_id) for r in found] == [(4, 0), (4, 1), (6, 0)]
    assert [r.length for r in found] == [2, 3, 1]
    assert [r.tokens for r in found] == [[0, 1], [0, 1, 2], [0]]
    assert [r.truncated for r in found] == [False, True, False]
    assert [r.reward for r in found] == [2.0, 0.0, 0.0]
    assert [r.status for r in found] == ["ok", "error", "ok"]
    assert [r.parts["right"] for r in found] == [1.0, 0.0, 0.0]
    assert [r.advantage for r in found] == [0.5, 0.0, -1.0]
    assert [r.response for r in found] == ["xx", "xxx", "x"]
    assert {(r.prompt, r.answer) for r in found} == {("?", "!")}


def test_records_name_the_images_that_the_model_saw():
    references = [{"row": 4, "path": "figures/a.png"}, {"row": 4, "column": "image.1"}]
    group = _group(5, [1, 0])
    example = dataclasses.replace(group.prompt.example, meta={"images": references})
    blind = dataclasses.replace(group.prompt, example=example)
    seen = dataclasses.replace(blind, images=(object(), object()))
    for prompt, names in ((seen, ["figures/a.png", "image.1, row 4"]), (blind, [])):
        rollouts = Rollouts([dataclasses.replace(group, prompt=prompt)], 0)
        records = list(measures.records(rollouts.enriched(advantage=[0.7, -0.7])))
        assert [record.images for record in records] == [names, names]
        assert [record.advantage for record in records] == [0.7, -0.7]
