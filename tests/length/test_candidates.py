"""Names of what is measured, and rewards of half groups as if there were no other half."""

import dataclasses
import types

import numpy as np
import pytest

from luspo_jax.length.candidates import Rescorer, candidate
from luspo_jax.length.pressure import halves
from luspo_jax.objectives import preset
from luspo_jax.rewards import Reward
from luspo_jax.rewards.group import GroupScorer
from luspo_jax.rollout import Response

LONGEST = 100


@pytest.mark.parametrize(
    ("name", "changes", "reward"),
    [
        ("luspo", {}, ""),
        ("luspo+kimi", {}, "kimi"),
        ("grpo + qglas", {"advantage_shaping": "qglas"}, ""),
        ("luspo+otb+gr3", {"advantage": "otb"}, "gr3"),
        ("grpo+none", {"advantage": "none"}, ""),
    ],
)
def test_a_name_is_a_preset_and_what_is_added(name, changes, reward):
    found = candidate(name, max_response_length=LONGEST)
    base = preset(name.split("+")[0].strip(), max_response_length=LONGEST)
    assert found == (name, dataclasses.replace(base, **changes), reward)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("luspoo", "'luspoo' names no preset: did you mean 'luspo'"),
        (
            "luspo+kimmi",
            "'kimmi' is no shaping, advantage or reward of a group: did you mean 'kimi'",
        ),
        ("luspo+kimi+gr3", "two of a kind: kimi and gr3"),
        ("luspo+qglas+otb", "advantage_shaping = 'qglas' .* 'otb' has one for each token"),
    ],
)
def test_what_does_not_exist_is_named(name, message):
    with pytest.raises(ValueError, match=message):
        candidate(name, max_response_length=LONGEST)


PROMPT = types.SimpleNamespace(
    text="", example=types.SimpleNamespace(answer="", meta={}, problem="")
)
# Two groups of four; halves are rows 0, 2 and 1, 3 of each.
LENGTHS = (10, 20, 30, 40, 50, 50, 70, 90)
RIGHT = (1, 1, 1, 0, 0, 1, 0, 1)
GROUPS = np.repeat(np.arange(2), 4)


OPTIONS = {"leash": {"target": 30}}


def _responses(group_weights, *, failed=(), lengths=LENGTHS):
    """Responses with the verdicts of a run that rewards whole groups."""
    scorer = GroupScorer(group_weights, _options(group_weights), metric="right")
    responses = [
        Response(
            prompt_id=0,
            sample_id=i,
            tokens=np.zeros(length, np.int32),
            logprobs=np.zeros(length, np.float32),
            stopped=True,
            text="",
            reward=Reward(float(right), "error" if i in failed else "ok", {"right": float(right)}),
        )
        for i, (length, right) in enumerate(zip(lengths, RIGHT, strict=True))
    ]
    rescorer = Rescorer({"right": 1.0}, scorer, metric="right", max_length=LONGEST)
    for group in range(2):
        rows = np.flatnonzero(group == GROUPS)
        of_group = [responses[i] for i in rows]
        found = rescorer._scored(scorer, [PROMPT] * 8, responses, rows, own=False)
        for i, response, reward in zip(rows, of_group, found, strict=True):
            responses[i] = dataclasses.replace(response, reward=reward)
    return responses


def _options(names):
    return {name: OPTIONS[name] for name in names if name in OPTIONS}


def _rescored(responses, own, rows, name="", names=()):
    rescorer = Rescorer(
        {"right": 1.0},
        GroupScorer(own, _options(own), metric="right"),
        names=names,
        metric="right",
        max_length=LONGEST,
    )
    found = rescorer.of(
        [PROMPT] * len(rows), [responses[i] for i in rows], GROUPS[list(rows)], name
    )
    return found, rescorer.weights(name)


def test_another_reward_is_of_the_half_alone():
    responses = _responses({})
    rows, _ = halves(GROUPS)
    assert list(rows) == [0, 2, 4, 6]
    found, weights = _rescored(responses, {}, rows, "kimi", names=("kimi",))
    # Of 10 and 30, both right: +1/2 and −1/2; of 50 and 70, both wrong: min(0, ±1/2).
    np.testing.assert_allclose(found.values_B, [1.5, 0.5, 0.0, -0.5])
    np.testing.assert_allclose(found.parts_BM @ weights, found.values_B)
    plain, _ = _rescored(responses, {}, rows)
    np.testing.assert_allclose(plain.values_B, [1, 1, 0, 0])


def test_the_runs_own_rewards_are_compared_within_the_half():
    """Their whole-group values stay where nothing is compared, here of the length target."""
    own = {"kimi": 2.0, "leash": 1.0}
    responses = _responses(own)
    _, rows = halves(GROUPS)
    found, weights = _rescored(responses, own, rows)
    # Of 20, right, and 40, wrong: ±1/2, and −1/2; of 50 and 90, both right: ±1/2.
    kimi = np.array([0.5, -0.5, 0.5, -0.5])
    leash = np.array([responses[i].reward.parts["leash"] for i in rows])
    right = np.array(RIGHT)[rows]
    np.testing.assert_allclose(found.values_B, right + 2 * kimi + leash, rtol=1e-6)
    np.testing.assert_allclose(found.parts_BM @ weights, found.values_B, rtol=1e-6)
    whole = np.array([responses[i].reward.parts["kimi"] for i in rows])
    assert not np.allclose(whole, kimi)


def test_a_half_says_nothing_of_the_other():
    """Other responses in the other half change nothing; without rescoring they would."""
    own = {"kimi": 1.0}
    responses = _responses(own)
    rows, _ = halves(GROUPS)
    before, _ = _rescored(responses, own, rows)
    others = _responses(own, lengths=(10, 99, 30, 1, 50, 2, 70, 98))
    after, _ = _rescored(others, own, rows)
    np.testing.assert_array_equal(before.values_B, after.values_B)
    assert any(responses[i].reward.value != others[i].reward.value for i in rows)


def test_a_response_without_a_verdict_takes_no_part():
    responses = _responses({}, failed=(2,))
    rows, _ = halves(GROUPS)
    found, _ = _rescored(responses, {}, rows, "kimi", names=("kimi",))
    np.testing.assert_allclose(found.values_B, [1.0, 1.0, 0.0, -0.5])  # of one alone: 0
