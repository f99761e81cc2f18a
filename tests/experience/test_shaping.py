"""Data shaping: full batches, carried surplus, and what each filter leaves out."""

import numpy as np
import pytest

from luspo_jax.experience import shaping
from luspo_jax.experience.shaping import Shaping
from tests.experience.experience_cases import group as _group

MIXED, EASY, HARD = [1, 0], [1, 1], [0, 0]


def _collect(rounds, surplus=(), num_groups=2, **fields):
    return shaping.collect(
        rounds, surplus, shaping=Shaping(**fields), num_groups=num_groups, part="right"
    )


def _ids(groups):
    return [group.prompt.prompt_id for group in groups]


def _versions(group):
    return {version for versions in group.column("versions") for version in versions.tolist()}


def _trained(group):
    """Whether each response carries gradient: on all its tokens, or on none."""
    assert all(mask.all() or not mask.any() for mask in group.column("trained"))
    return [mask.any() for mask in group.column("trained")]


def test_off_takes_what_comes():
    got = _collect([[_group(0, EASY), _group(1, MIXED)]])
    assert _ids(got.groups) == [0, 1]
    assert got.surplus == []
    assert all(all(_trained(group)) for group in got.groups)


def test_dynamic_sampling_fills_the_batch_and_carries_the_rest_over():
    rounds = [[_group(0, EASY), _group(1, MIXED)], [_group(2, MIXED), _group(3, HARD)]]
    got = _collect(rounds, dynamic_sampling=True)
    assert _ids(got.groups) == [1, 2]
    rounds = [[_group(4, MIXED, version=3), _group(5, MIXED, version=3)]]
    surplus = [_group(9, MIXED, version=2)]
    got = _collect(rounds, surplus, dynamic_sampling=True)
    assert _ids(got.groups) == [9, 4]
    assert _ids(got.surplus) == [5]
    # Who sampled what goes with it, from which the next step sees that it is not its own.
    assert [_versions(group) for group in got.groups] == [{2}, {3}]
    assert _versions(got.surplus[0]) == {3}
    assert got.counts["shaping/groups_carried_in"] == 1


def test_surplus_never_exceeds_what_the_next_step_uses():
    rounds = [[_group(i, MIXED) for i in range(6)]]
    got = _collect(rounds, dynamic_sampling=True)
    assert _ids(got.surplus) == [2]
    assert got.counts["shaping/groups_given_up"] == 3


def test_batch_that_cannot_fill_keeps_its_size_and_says_so():
    calls = []

    def sampled():
        while True:
            calls.append(1)
            yield [_group(2 * len(calls), HARD), _group(2 * len(calls) + 1, EASY)]

    with pytest.warns(UserWarning, match="only 0 of 2 groups"):
        got = _collect(sampled(), dynamic_sampling=True, max_tries=3)
    assert len(calls) == 3
    assert len(got.groups) == 2
    assert not any(any(_trained(group)) or group.counted.any() for group in got.groups)
    assert got.counts["shaping/groups_missing"] == 2


def test_responses_without_a_verdict_do_not_make_a_group_informative():
    with pytest.warns(UserWarning, match="only 1 of 2"):
        got = _collect(
            [[_group(0, [1, 1, 0], judged=[True, True, False]), _group(1, [1, 0, 0])]],
            dynamic_sampling=True,
            max_tries=1,
        )
    assert _ids(got.groups)[0] == 1


def test_overlong_filter_leaves_the_loss_but_not_the_statistics():
    group = shaping.keeps(_group(0, MIXED, stopped=[True, False]), 0, Shaping(overlong_filter=True))
    np.testing.assert_array_equal(_trained(group), [True, False])
    np.testing.assert_array_equal(group.counted, [True, True])


@pytest.mark.parametrize(
    ("by", "expected"),
    [("length", [True, False, True, False]), ("reward_per_token", [False, True, True, False])],
)
def test_gfpo_keeps_k_of_each_group(by, expected):
    group = _group(0, [0, 1, 1, 0], lengths=[2, 9, 4, 8])
    kept = shaping.keeps(group, 2, Shaping(gfpo_keep=2, gfpo_by=by))
    np.testing.assert_array_equal(_trained(kept), expected)
    np.testing.assert_array_equal(kept.counted, expected)


def test_gfpo_prefers_responses_with_a_verdict():
    group = _group(0, [1, 0, 1], lengths=[1, 5, 9], judged=[False, True, True])
    kept = shaping.keeps(group, 2, Shaping(gfpo_keep=2))
    np.testing.assert_array_equal(_trained(kept), [False, True, True])


def test_lspo_keeps_the_shortest_and_longest_prompts():
    groups = [_group(i, MIXED, lengths=[10 * (i + 1)] * 2) for i in range(5)]
    passes = shaping.group_filter(groups, Shaping(lspo_low=0.2, lspo_high=0.2), part="right")
    np.testing.assert_array_equal(passes, [True, False, False, False, True])
    passes = shaping.group_filter(groups, Shaping(lspo_high=0.5), part="right")
    np.testing.assert_array_equal(passes, [False, False, True, True, True])


def test_no_more_rounds_are_taken_than_a_batch_needs():
    """A round costs a rollout: a batch that the surplus fills takes none."""
    rounds = iter([[_group(0, MIXED), _group(1, MIXED)], [_group(2, MIXED)]])
    got = _collect(rounds, [_group(8, MIXED), _group(9, MIXED)], dynamic_sampling=True)
    assert (_ids(got.groups), got.counts["shaping/tries"]) == ([8, 9], 0)
    assert "shaping/sampled_reward" not in got.counts
    assert _ids(_collect(rounds, dynamic_sampling=True).groups) == [0, 1]
    assert _ids(next(rounds)) == [2]


def test_filters_take_groups_of_unequal_size():
    """Whatever a group holds, a filter is of its own responses."""
    groups = [_group(0, [1, 0, 0], lengths=[5, 3, 4]), _group(1, [1, 0], lengths=[9, 8])]
    kept = _collect([groups], gfpo_keep=2).groups
    assert [_trained(group) for group in kept] == [[False, True, True], [True, True]]
    passes = shaping.group_filter(groups, Shaping(lspo_low=0.5), part="right")
    np.testing.assert_array_equal(passes, [True, False])


def test_a_filter_gives_no_token_gradient_that_had_none():
    """Tokens that were not trained on before a filter are not trained on behind it."""
    group = _group(0, MIXED)
    masks = [np.array([True, False, True]), np.array([False, True, True])]
    kept = shaping.keeps(group.enriched(trained=masks), 2, Shaping(gfpo_keep=2))
    for mask, before in zip(kept.column("trained"), masks, strict=True):
        np.testing.assert_array_equal(mask, before)
    with pytest.warns(UserWarning, match="only 0 of 1 groups"):
        got = _collect([[_group(0, HARD)]], num_groups=1, dynamic_sampling=True, max_tries=1)
    for response in got.groups[0].responses:
        assert response.trained.shape == response.tokens.shape
        assert response.trained.dtype == bool


@pytest.mark.parametrize(
    ("fields", "chooses"),
    [
        ({}, False),
        ({"max_tries": 3, "gfpo_by": "reward_per_token"}, False),
        ({"dynamic_sampling": True}, True),
        ({"overlong_filter": True}, True),
        ({"gfpo_keep": 2}, True),
        ({"lspo_low": 0.2}, True),
        ({"lspo_high": 0.2}, True),
    ],
)
def test_whether_anything_chooses(fields, chooses):
    assert Shaping(**fields).chooses is chooses


def test_what_was_sampled_before_filters_is_a_mean_of_judged_rewards():
    # Rewards 2, 1 and none; 0, none and none; 3, 3, 3.
    groups = [
        _group(0, [2, 1, 0], judged=[True, True, False]),
        _group(1, [0, 0, 0], judged=[True, False, False]),
        _group(2, [3, 3, 3]),
    ]
    collected = _collect([groups], num_groups=3)
    assert collected.counts["shaping/sampled_reward"] == pytest.approx(2.0)
    assert collected.counts["shaping/groups_sampled"] == 3


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


def test_gfpo_by_difficulty_keeps_more_of_hard_prompts():
    """Pass rates 0, ¼, ½, ¾, 1: quartiles ¼, ½, ¾, and what lies on one belongs below it."""
    kept = {}
    groups = [_group(i, [1] * i + [0] * (4 - i), lengths=[4, 3, 2, 1]) for i in range(5)]
    groups.append(_group(5, [0] * 4, judged=[False] * 4))  # as hard as can be
    settings = Shaping(gfpo_adaptive="4,3,3,2")
    assert settings.kept_by_quarter == (4, 3, 3, 2)
    assert settings.chooses
    numbers = shaping.kept_numbers(groups[:5], settings, part="right")
    assert numbers == [4, 4, 3, 3, 2]
    assert shaping.kept_numbers(groups, settings, part="right")[-1] == 4
    assert shaping.kept_numbers(groups[2:3], settings, part="right") == [4]
    for group in _collect([groups[:5]], num_groups=5, gfpo_adaptive="4,3,3,2").groups:
        kept[group.prompt.prompt_id] = _trained(group)
    assert [sum(kept[i]) for i in range(5)] == [4, 4, 3, 3, 2]
    assert kept[4] == [False, False, True, True]
    order = [3, 0, 4, 1, 2]
    moved = shaping.kept_numbers([groups[i] for i in order], settings, part="right")
    assert moved == [numbers[i] for i in order]


@pytest.mark.parametrize("value", ["8,8,6", "8,8,6,1", "8, 8, 6, 4", "8,8,6,4,2", "a", "8,8,6,-4"])
def test_numbers_by_difficulty_are_four(value):
    with pytest.raises(ValueError, match=r"^gfpo_adaptive='.*must be four whole numbers"):
        Shaping(gfpo_adaptive=value)


def test_both_numbers_of_gfpo_are_refused():
    with pytest.raises(ValueError, match=r"with shaping\.gfpo_keep=0"):
        Shaping(gfpo_adaptive="8,8,6,4", gfpo_keep=4)


def test_lengths_are_accounted_for_whenever_responses_are_chosen_or_cut():
    assert not Shaping().chooses
    dropping = ({"gfpo_keep": 2}, {"gfpo_adaptive": "8,8,6,4"}, {"overlong_filter": True})
    for fields in ({"dot": True}, {"dynamic_sampling": True}, {"lspo_low": 0.5}, *dropping):
        assert Shaping(**fields).chooses
