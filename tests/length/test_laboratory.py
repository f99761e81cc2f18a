"""Which responses a run measures, and what it makes of the measurements."""

import dataclasses
import math

import numpy as np
import pytest

from luspo_jax import objectives, packing
from luspo_jax.length import laboratory
from luspo_jax.length.laboratory import Laboratory, Sampled
from luspo_jax.length.pressure import Pressure
from luspo_jax.length.settings import LengthSettings
from luspo_jax.logprobs import LogprobRule
from luspo_jax.metrics import declared
from luspo_jax.models.forward import Forward


def _sampled(num_groups=4, group_size=4):
    num = num_groups * group_size
    rows = packing.padded_rows(
        [np.array([1])] * num, [np.arange(1, 3 + i % 3) for i in range(num)], length=8, pad_id=0
    )
    return Sampled(
        rows=rows,
        rewards_B=np.arange(num, dtype=np.float32),
        group_ids_B=np.repeat(np.arange(num_groups, dtype=np.int32), group_size),
        counted_B=np.ones(num, bool),
        trained_B=np.ones(num, bool),
        fresh_B=np.ones(num, bool),
    )


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
    found = laboratory.chosen(_sampled(), share=share, num_groups=4)
    assert list(found.group_ids_B) == list(np.repeat(groups, 4))
    np.testing.assert_array_equal(found.rewards_B, np.arange(4 * len(groups)))
    assert found.rows.tokens_BT.shape == (4 * len(groups), 8)


def test_groups_of_another_policy_or_without_gradient_are_passed_over():
    sampled = _sampled()
    sampled.fresh_B[5] = False  # one carried response spoils its group
    sampled.trained_B[8:12] = False
    found = laboratory.chosen(sampled, share=0.5, num_groups=4)
    assert sorted({*found.group_ids_B.tolist()}) == [0, 3]
    assert laboratory.chosen(sampled, share=0.75, num_groups=4) is None


def test_the_runs_own_objective_comes_first_then_the_presets():
    own = objectives.preset("luspo", clip_high=0.01)
    lab = _laboratory(own, LengthSettings(objectives="grpo, dr_grpo"))
    assert [name for name, _ in lab.objectives] == ["own", "grpo", "dr_grpo"]
    assert dict(lab.objectives)["own"] is own
    assert dict(lab.objectives)["dr_grpo"].max_response_length == 32
    assert lab.bin_edges == (4, 8, 16)


@pytest.mark.parametrize(("alpha", "raised"), [(1.0, 1.25), (1.9, 1.65)])
def test_an_adaptive_scale_is_also_measured_at_another_exponent(alpha, raised):
    own = objectives.preset(
        "luspo", length_scale="adaptive", length_alpha=alpha, reference_length=10.0
    )
    lab = _laboratory(own)
    assert dict(lab.objectives)["own_raised"].length_alpha == pytest.approx(raised)
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
    sampled = _sampled()
    sampled = dataclasses.replace(sampled, counted_B=np.arange(16) != 3)
    lab = _laboratory(objectives.preset("luspo"))
    lab = dataclasses.replace(lab, rule=LogprobRule(Forward(model=None)))
    half = laboratory._half(sampled, lab)
    assert not half.response_mask_BT[3].any()
    assert half.response_mask_BT[2].any()
