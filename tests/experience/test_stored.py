"""Groups that wait for a later step: what goes into a checkpoint comes back exactly."""

import dataclasses
import json

import numpy as np
import pytest

from luspo_jax.experience.groups import Group, Rollouts
from luspo_jax.experience.stored import from_stored, to_stored
from luspo_jax.rollout import Response
from tests.experience.experience_cases import FAILED, sampled
from tests.experience.experience_cases import group as _group

ARRAYS = (
    *("tokens", "logprobs", "expert_ids", "prompt_expert_ids", "versions", "trained"),
    *("old_logprobs", "old_entropy", "old_expert_ids", "ref_logprobs"),
)


def _there_and_back(groups):
    arrays, described = to_stored(groups)
    return from_stored(arrays, json.loads(json.dumps(described)))


def _assert_same(got, expected):
    """Every field of every response, by value, type and None."""
    for group, other in zip(got, expected, strict=True):
        for name in ("prompt_id", "text", "example"):
            assert getattr(group.prompt, name) == getattr(other.prompt, name)
        np.testing.assert_array_equal(group.prompt.tokens, other.prompt.tokens)
        assert group.prompt.tokens.dtype == other.prompt.tokens.dtype
        for a, b in zip(group.responses, other.responses, strict=True):
            for field in dataclasses.fields(Response):
                x, y = getattr(a, field.name), getattr(b, field.name)
                if y is None or field.name not in ARRAYS:
                    assert x == y, field.name
                    assert type(x) is type(y), field.name
                else:
                    np.testing.assert_array_equal(x, y, err_msg=field.name)
                    assert (x.dtype, x.shape) == (y.dtype, y.shape), field.name


def _groups():
    """Groups of two and three with responses of unequal lengths, as a step leaves them over."""
    return [
        _group(7, [1, 0], lengths=[3, 5], stopped=[True, False], version=2**31 + 3),
        _group(4, [0.1, FAILED, 2], lengths=[1, 2, 8], version=6),
    ]


def _with_experts(groups, kind=np.uint8):
    """The same with recorded experts: two layers, three a token."""
    rng = np.random.default_rng(0)

    def ids(count):
        return rng.integers(0, np.iinfo(kind).max, (count, 2, 3), dtype=kind, endpoint=True)

    found = []
    for group in groups:
        size = len(group.responses)
        prompt_ids = ids(len(group.prompt.tokens))
        found.append(
            group.enriched(
                expert_ids=[ids(n) for n in group.lengths],
                prompt_expert_ids=[prompt_ids] * size,
            )
        )
    return found


def test_surplus_survives_json_exactly():
    """Without experts, and with all that no stage has said yet as None."""
    groups = _groups()
    back = _there_and_back(groups)
    _assert_same(back, groups)
    assert all(r.old_logprobs is None and r.advantage is None for g in back for r in g.responses)
    assert {response.expert_ids is None for response in back[0].responses} == {True}
    assert not Rollouts(back, 7).fresh_B.any()


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_recorded_experts_come_back_and_a_prompts_are_stored_once(kind):
    groups = _with_experts(_groups(), kind)
    arrays, _ = to_stored(groups)
    assert arrays["prompt_expert_ids"].shape == (2, 2, 3)  # one token a prompt
    assert arrays["expert_ids"].shape == (3 + 5 + 1 + 2 + 8, 2, 3)
    back = _there_and_back(groups)
    _assert_same(back, groups)
    for group in back:
        assert len({id(ids) for ids in group.column("prompt_expert_ids")}) == 1


def test_experts_of_some_groups_only_come_back_to_these():
    first, second = _groups()
    groups = [first, *_with_experts([second]), _group(9, [1, 1])]
    _assert_same(_there_and_back(groups), groups)


def test_what_every_stage_has_added_comes_back():
    groups = _with_experts(_groups())
    rng = np.random.default_rng(1)
    rollouts = Rollouts(groups, 8)
    lengths = rollouts.lengths_B

    def floats():
        return [rng.normal(size=n).astype(np.float32) for n in lengths]

    full = rollouts.enriched(
        old_logprobs=floats(),
        old_entropy=floats(),
        ref_logprobs=floats(),
        old_expert_ids=[np.zeros((1 + n, 2, 3), np.uint8) for n in lengths],
        advantage=[0.1, -2.0, 1 / 3, 0.0, 5.0],
        trained=[rng.random(n) > 0.5 for n in lengths],
        versions=[rng.integers(0, 9, n).astype(np.uint32) for n in lengths],
    )
    _assert_same(_there_and_back(full.groups), full.groups)


def test_some_fields_of_some_responses_may_be_none():
    """What is missing of one response takes nothing from the next."""
    first, second = _groups()
    values = [np.float32([1, 2, 3]), None]
    first = first.enriched(ref_logprobs=values, reward=[None, first.responses[1].reward])
    second = second.enriched(ref_logprobs=[None, np.float32([4, 5]), None], text=["a", None, ""])
    _assert_same(_there_and_back([first, second]), [first, second])


@pytest.mark.parametrize("experts", [False, True])
def test_responses_in_flight_come_back(experts):
    """One that waits for a row, one with a single token, whose experts are not known yet, one that
    has ended; alone and beside others."""
    group = Group(
        _group(3, [0]).prompt,
        [
            sampled(3, 0, length=0, step=5, ended=False),
            sampled(3, 1, length=1, step=5, ended=False),
            sampled(3, 2, length=4, step=5),
        ],
    )
    unbegun = Group(_group(8, [0]).prompt, [sampled(8, 0, length=0, step=6, ended=False)])
    if experts:
        ids = np.ones((1, 2, 3), np.uint8)
        group = group.enriched(
            prompt_expert_ids=[None, ids, ids],
            expert_ids=[None, np.ones((0, 2, 3), np.uint8), np.ones((4, 2, 3), np.uint8)],
        )
    for groups in ([group], [unbegun], [unbegun, group, *_groups()]):
        _assert_same(_there_and_back(groups), groups)


def test_responses_that_other_policies_began_keep_their_own_experts_of_the_prompt():
    (group,) = _with_experts(_groups()[1:])
    first, last = (np.full((1, 2, 3), n, np.uint8) for n in (1, 2))
    group = group.enriched(prompt_expert_ids=[first, last, first])
    arrays, _ = to_stored([group])
    assert len(arrays["prompt_expert_ids"]) == 2
    _assert_same(_there_and_back([group]), [group])


def test_an_earlier_checkpoint_has_one_array_for_a_group():
    groups = _with_experts(_groups())
    arrays, described = to_stored(groups)
    for group in described:
        (group["prompt"]["expert_ids"],) = group["prompt"]["expert_ids"]
        for response in group["responses"]:
            del response["prompt_ids"], response["step"], response["ended"]
    _assert_same(from_stored(arrays, described), groups)


def test_nothing_waits():
    assert to_stored([]) == ({}, [])
    assert from_stored({}, []) == []


def test_what_comes_back_is_of_its_own():
    """A view would keep the arrays of a whole checkpoint in memory."""
    arrays, described = to_stored(_groups())
    back = from_stored(arrays, described)
    assert all(r.tokens.base is None for group in back for r in group.responses)
