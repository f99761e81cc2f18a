"""Which responses a run measures, and what it makes of the measurements."""

import dataclasses
import math
import types

import numpy as np
import pytest

from luspo_jax import objectives
from luspo_jax.learner.logprobs import LogprobRule
from luspo_jax.length import laboratory
from luspo_jax.length.laboratory import Laboratory, Sampled
from luspo_jax.length.pressure import Pressure
from luspo_jax.length.settings import LengthSettings
from luspo_jax.metrics import declared
from luspo_jax.models.forward import Forward
from luspo_jax.rewards import Reward
from luspo_jax.rollout import Response
from tests.row_cases import Prompt

VERSION = 7  # of the policy that starts the step


def _response(index, length):
    return Response(
        prompt_id=0,
        sample_id=index,
        tokens=np.arange(1, 1 + length, dtype=np.int32),
        logprobs=np.zeros(length, np.float32),
        stopped=True,
        versions=np.full(length, VERSION, np.uint32),
        reward=Reward(float(index), "ok", {}),
        counted=True,
        trained=np.ones(length, bool),
    )


def _sampled(num_groups=4, group_size=4):
    num = num_groups * group_size
    return Sampled(
        prompts=[Prompt(np.array([1]))] * num,
        responses=[_response(i, 2 + i % 3) for i in range(num)],
        group_ids_B=np.repeat(np.arange(num_groups, dtype=np.int32), group_size),
        width=8,
    )


def _chosen(sampled, **options):
    return laboratory.chosen(sampled, version=VERSION, num_groups=4, **options)


def _half(sampled):
    lab = _laboratory(objectives.preset("luspo"))
    how = Forward(model=types.SimpleNamespace(vision=None))
    return laboratory._half(sampled, dataclasses.replace(lab, rule=LogprobRule(how)))


def _with(sampled, index, **fields):
    """The same with another response there."""
    responses = list(sampled.responses)
    responses[index] = dataclasses.replace(responses[index], **fields)
    return dataclasses.replace(sampled, responses=responses)


def _laboratory(objective, settings=None, longest=32):
    return laboratory.laboratory(
        settings or LengthSettings(),
        None,
        objective,
        max_response_length=longest,
        rows_at_once=8,
    )


@pytest.mark.parametrize(("share", "groups"), [(0.25, [0]), (0.3, [0, 1]), (1.0, [0, 1, 2, 3])])
def test_a_share_of_the_groups_is_taken_whole(share, groups):
    found = _chosen(_sampled(), share=share)
    assert list(found.group_ids_B) == list(np.repeat(groups, 4))
    half = _half(found)
    np.testing.assert_array_equal(half.rewards_B, np.arange(4 * len(groups)))
    assert half.rows[0].tokens_RT.shape == (4 * len(groups), 8)


def test_groups_of_another_policy_or_without_gradient_are_passed_over():
    # One carried response spoils its group.
    sampled = _with(_sampled(), 5, versions=np.full(4, VERSION - 1, np.uint32))
    for i in range(8, 12):
        sampled = _with(sampled, i, trained=np.zeros(2 + i % 3, bool))
    found = _chosen(sampled, share=0.5)
    assert sorted({*found.group_ids_B.tolist()}) == [0, 3]
    assert _chosen(sampled, share=0.75) is None


def test_one_token_of_another_policy_spoils_its_group_and_one_that_is_trained_on_saves_it():
    sampled = _with(_sampled(), 5, versions=np.array([VERSION] * 3 + [VERSION - 1], np.uint32))
    for i in range(8, 12):
        sampled = _with(sampled, i, trained=np.zeros(2 + i % 3, bool))
    sampled = _with(sampled, 9, trained=np.array([False, True]))
    found = _chosen(sampled, share=0.75)
    assert sorted({*found.group_ids_B.tolist()}) == [0, 2, 3]
    np.testing.assert_array_equal(_half(found).trained_B[4:8], [False, True, False, False])


def test_the_runs_own_objective_comes_first_then_the_presets():
    own = objectives.preset("luspo", clip_high=0.01)
    lab = _laboratory(own, LengthSettings(objectives="grpo, dr_grpo"))
    assert [each.name for each in lab.objectives] == ["own", "grpo", "dr_grpo"]
    assert lab.by_name["own"] is own
    assert lab.by_name["dr_grpo"].max_response_length == 32
    assert lab.bin_edges == (4, 8, 16)


@pytest.mark.parametrize(("alpha", "raised"), [(1.0, 1.25), (1.9, 1.65)])
def test_an_adaptive_scale_is_also_measured_at_another_exponent(alpha, raised):
    own = objectives.preset(
        "luspo", length_scale="adaptive", length_alpha=alpha, reference_length=10.0
    )
    lab = _laboratory(own)
    assert lab.by_name["own_raised"].length_alpha == pytest.approx(raised)
    measured = {"own": _pressure(2.0, mass=4.0), "own_raised": _pressure(1.0, mass=4.0)}
    value, slope = laboratory.own_slope(lab, measured)
    assert value == 0.5
    assert slope == pytest.approx((0.25 - 0.5) / (raised - alpha))


def test_without_an_adaptive_scale_there_is_no_slope_and_without_gradient_no_value():
    lab = Laboratory(None, (("own", objectives.preset("gspo")),), (), 8)
    assert laboratory.own_slope(lab, {"own": _pressure(2.0, mass=4.0)}) == (0.5, 0.0)
    value, _ = laboratory.own_slope(lab, {"own": _pressure(0.0, mass=0.0)})
    assert math.isnan(value)


def test_every_metric_is_declared_and_the_helper_measurement_is_left_out():
    measured = {name: _pressure(1.0) for name in ("own", "own/end", "luspo", "own_raised")}
    values = laboratory.metrics(measured)
    for name in values:
        declared(name)
    assert not any("raised" in name for name in values)
    assert values["length/pressure/luspo/pos"] == 0.75
    assert values["length/gradient_share/bin_0"] == 0.5
    assert values["length/gradient_share/luspo/bin_1"] == 0.5


def _pressure(length, mass=1.0):
    return Pressure(
        length=length,
        reward=0.0,
        length_pos=0.75 * length,
        length_neg=0.25 * length,
        length_bins=np.array([length, 0.0]),
        gradient_share=np.array([0.5, 0.5]),
        mass=mass,
    )


def test_responses_without_a_verdict_are_masked_out():
    half = _half(_with(_sampled(), 3, counted=False))
    for mask in (half.response_mask_BT, half.rows[0].response_mask_RT):
        assert not mask[3].any()
        assert mask[2].any()


def test_every_token_of_a_response_is_looked_at_whatever_is_trained_on():
    half = _half(_with(_sampled(), 2, trained=np.array([True, False, False, True])))
    np.testing.assert_array_equal(half.response_mask_BT[2], [False] + [True] * 4 + [False] * 3)
    np.testing.assert_array_equal(half.rows[1], np.arange(16) % 8 * 8)  # eight at once
    assert half.rows[0].num_microbatches == 2
