"""Data shaping: full batches, carried surplus, and what each filter leaves out."""

import json

import numpy as np
import pytest
from luspo_jax.shaping import Shaping

from luspo_jax import experience, shaping
from luspo_jax.datasets import Example
from luspo_jax.experience import Group
from luspo_jax.prompts import PromptRecord
from luspo_jax.rewards import Reward
from luspo_jax.rollout import Response


def _group(prompt_id, correct, lengths=None, stopped=None, judged=None):
    size = len(correct)
    lengths = lengths or [3] * size
    stopped = stopped or [True] * size
    judged = np.array(judged or [True] * size)
    rng = np.random.default_rng(prompt_id)
    return Group(
        prompt=PromptRecord(prompt_id, np.array([1]), "?", Example(prompt_id, "?", "!")),
        responses=[
            Response(
                prompt_id, i, np.arange(n, dtype=np.int32), -rng.random(n).astype(np.float32), s
            )
            for i, (n, s) in enumerate(zip(lengths, stopped, strict=True))
        ],
        texts=["x" * n for n in lengths],
        rewards=[Reward(float(c), "ok", {"right": float(c)}) for c in correct],
        counted=judged,
        trained=judged,
    )


def _rounds(*rounds):
    calls = iter(rounds)
    return lambda: next(calls)


MIXED, EASY, HARD = [1, 0], [1, 1], [0, 0]


def _collect(sample, surplus=(), num_groups=2, **fields):
    return shaping.collect(
        sample, surplus, shaping=Shaping(**fields), num_groups=num_groups, part="right"
    )


def _ids(groups):
    return [group.prompt.prompt_id for group in groups]


def test_off_takes_what_comes():
    got = _collect(_rounds([_group(0, EASY), _group(1, MIXED)]))
    assert _ids(got.groups) == [0, 1]
    assert got.surplus == []
    assert all(group.trained.all() for group in got.groups)


def test_dynamic_sampling_fills_the_batch_and_carries_the_rest_over():
    rounds = _rounds(
        [_group(0, EASY), _group(1, MIXED)],
        [_group(2, MIXED), _group(3, HARD)],
    )
    got = _collect(rounds, dynamic_sampling=True)
    assert _ids(got.groups) == [1, 2]
    rounds = _rounds([_group(4, MIXED), _group(5, MIXED)])
    surplus = [_group(9, MIXED)]
    got = _collect(rounds, surplus, dynamic_sampling=True)
    assert _ids(got.groups) == [9, 4]
    assert _ids(got.surplus) == [5]
    assert got.surplus[0].carried
    assert got.counts["shaping/groups_carried_in"] == 1


def test_surplus_never_exceeds_what_the_next_step_uses():
    rounds = _rounds([_group(i, MIXED) for i in range(6)])
    got = _collect(rounds, dynamic_sampling=True)
    assert _ids(got.surplus) == [2]
    assert got.counts["shaping/groups_given_up"] == 3


def test_batch_that_cannot_fill_keeps_its_size_and_says_so():
    calls = []

    def sample():
        calls.append(1)
        return [_group(2 * len(calls), HARD), _group(2 * len(calls) + 1, EASY)]

    with pytest.warns(UserWarning, match="only 0 of 2 groups"):
        got = _collect(sample, dynamic_sampling=True, max_tries=3)
    assert len(calls) == 3
    assert len(got.groups) == 2
    assert not any(group.trained.any() or group.counted.any() for group in got.groups)
    assert got.counts["shaping/groups_missing"] == 2


def test_responses_without_a_verdict_do_not_make_a_group_informative():
    with pytest.warns(UserWarning, match="only 1 of 2"):
        got = _collect(
            lambda: [_group(0, [1, 1, 0], judged=[True, True, False]), _group(1, [1, 0, 0])],
            dynamic_sampling=True,
            max_tries=1,
        )
    assert _ids(got.groups)[0] == 1


def test_overlong_filter_leaves_the_loss_but_not_the_statistics():
    group = shaping.keeps(_group(0, MIXED, stopped=[True, False]), Shaping(overlong_filter=True))
    np.testing.assert_array_equal(group.trained, [True, False])
    np.testing.assert_array_equal(group.counted, [True, True])


@pytest.mark.parametrize(
    ("by", "expected"),
    [("length", [True, False, True, False]), ("reward_per_token", [False, True, True, False])],
)
def test_gfpo_keeps_k_of_each_group(by, expected):
    group = _group(0, [0, 1, 1, 0], lengths=[2, 9, 4, 8])
    kept = shaping.keeps(group, Shaping(gfpo_keep=2, gfpo_by=by))
    np.testing.assert_array_equal(kept.trained, expected)
    np.testing.assert_array_equal(kept.counted, expected)


def test_gfpo_prefers_responses_with_a_verdict():
    group = _group(0, [1, 0, 1], lengths=[1, 5, 9], judged=[False, True, True])
    kept = shaping.keeps(group, Shaping(gfpo_keep=2))
    np.testing.assert_array_equal(kept.trained, [False, True, True])


def test_lspo_keeps_the_shortest_and_longest_prompts():
    groups = [_group(i, MIXED, lengths=[10 * (i + 1)] * 2) for i in range(5)]
    passes = shaping.group_filter(groups, Shaping(lspo_low=0.2, lspo_high=0.2), part="right")
    np.testing.assert_array_equal(passes, [True, False, False, False, True])
    passes = shaping.group_filter(groups, Shaping(lspo_high=0.5), part="right")
    np.testing.assert_array_equal(passes, [False, False, True, True, True])


def test_surplus_survives_json_exactly():
    group = _group(7, MIXED, lengths=[3, 5], stopped=[True, False])
    text = json.dumps(experience.to_json([group]))
    [back] = experience.from_json(json.loads(text))
    assert back.carried
    assert back.rewards == group.rewards
    assert back.texts == group.texts
    assert back.prompt.example == group.prompt.example
    np.testing.assert_array_equal(back.prompt.tokens, group.prompt.tokens)
    for a, b in zip(back.responses, group.responses, strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_array_equal(a.logprobs, b.logprobs)
        assert (a.tokens.dtype, a.logprobs.dtype, a.stopped) == (np.int32, np.float32, b.stopped)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"max_tries": 0}, "max_tries"),
        ({"gfpo_keep": 1}, "gfpo_keep"),
        ({"gfpo_by": "size"}, "gfpo_by"),
        ({"lspo_low": 0.7, "lspo_high": 0.7}, "lspo_low"),
    ],
)
def test_bad_settings_are_named(fields, name):
    with pytest.raises(ValueError, match=name):
        Shaping(**fields)
