"""Identities between objectives, over random ragged batches, in float64."""

import dataclasses

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from luspo_jax.objectives import PRESETS, preset
from tests.objectives.objective_cases import case, lengths, whole_step

pytestmark = pytest.mark.usefixtures("strict_dtypes", "x64")

# Derandomised: a red run can be repeated. The fixtures only switch flags, for all examples alike.
properties = settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
cases = st.builds(case, st.integers(0, 10**6), drift=st.sampled_from([1e-4, 1e-3, 0.05, 0.5]))
WIDE = {"clip_low": 2e-3, "clip_high": 2.5e-3}


def equal(left, right, factor: float = 1.0):
    for a, b in zip(left, right, strict=True):
        np.testing.assert_allclose(a, factor * b, rtol=1e-11, atol=1e-13 * max(1.0, factor))


@properties
@given(cases)
def test_gspo_is_gspo_token(arrays):
    equal(whole_step(PRESETS["gspo"], arrays), whole_step(PRESETS["gspo_token"], arrays))


@properties
@given(cases)
def test_on_policy_gspo_and_grpo_have_one_gradient(arrays):
    arrays["old_logprobs_BT"] = arrays["logprobs_BT"]
    left, right = whole_step(PRESETS["gspo"], arrays), whole_step(PRESETS["grpo"], arrays)
    np.testing.assert_allclose(left[1], right[1], rtol=1e-11, atol=1e-13)


@properties
@given(cases)
def test_luspo_is_mean_length_times_token_mean(arrays):
    mean = lengths(arrays).mean()
    equal(
        whole_step(PRESETS["luspo"], arrays), whole_step(PRESETS["gspo_token_mean"], arrays), mean
    )


@properties
@given(cases)
def test_luspo_is_longest_times_dr_grpo_constant(arrays):
    longest = int(lengths(arrays).max())  # `case` makes it the same in every example
    constant = preset("gspo_dr_grpo_constant", max_response_length=longest)
    equal(whole_step(PRESETS["luspo"], arrays), whole_step(constant, arrays), longest)


@properties
@given(cases, st.integers(1, 8))
def test_luspo_is_length_times_gspo_where_lengths_agree(arrays, length):
    position_T = np.arange(arrays["response_mask_BT"].shape[1])
    arrays["response_mask_BT"][:] = (position_T >= 1) & (position_T <= length)
    equal(whole_step(PRESETS["luspo"], arrays), whole_step(preset("gspo", **WIDE), arrays), length)


@properties
@given(cases)
def test_on_policy_luspo_weighs_every_token_of_a_response_alike(arrays):
    arrays["old_logprobs_BT"] = arrays["logprobs_BT"]
    advantages_B = np.array([1.0, -2.0, 0.5, 3.0, -1.0, 0.25])
    _, grad_BT = whole_step(PRESETS["luspo"], arrays, advantages_B=advantages_B)
    expected_BT = np.where(arrays["response_mask_BT"], -advantages_B[:, None] / 6, 0)
    np.testing.assert_allclose(grad_BT, expected_BT, rtol=1e-12, atol=1e-14)


@properties
@given(cases)
def test_power_scale_runs_from_gspo_to_luspo(arrays):
    power = dataclasses.replace(PRESETS["luspo"], length_scale="power", reference_length=1.0)
    flat = dataclasses.replace(power, length_alpha=0.0)
    equal(whole_step(power, arrays), whole_step(PRESETS["luspo"], arrays))
    equal(whole_step(flat, arrays), whole_step(preset("gspo", **WIDE), arrays))


@properties
@given(cases)
def test_relative_scale_is_luspo_over_mean_length(arrays):
    relative = dataclasses.replace(PRESETS["luspo"], length_scale="relative-batch")
    equal(
        whole_step(PRESETS["luspo"], arrays), whole_step(relative, arrays), lengths(arrays).mean()
    )


@properties
@given(cases)
def test_normalised_luspo_is_luspo_over_the_reference_length(arrays):
    scaled = preset("luspo", loss_scale=1e-3)
    equal(whole_step(PRESETS["luspo_normalized"], arrays), whole_step(scaled, arrays))
    equal(whole_step(PRESETS["luspo"], arrays), whole_step(scaled, arrays), 1000.0)


@properties
@given(cases)
def test_two_sided_clipping_is_dual_clip(arrays):
    delta, dual = preset("grpo", delta=1.3), preset("grpo", dual_clip=1.3)
    equal(whole_step(delta, arrays), whole_step(dual, arrays))


@properties
@given(cases)
def test_minirl_has_the_gradient_of_clipping(arrays):
    clip = preset("minirl", surrogate="clip")
    left, right = whole_step(PRESETS["minirl"], arrays), whole_step(clip, arrays)
    np.testing.assert_allclose(left[1], right[1], rtol=1e-11, atol=1e-13)


@properties
@given(cases)
def test_missing_old_logprobs_mean_the_policy_itself(arrays):
    on_policy = {**arrays, "old_logprobs_BT": arrays["logprobs_BT"]}
    absent = {**arrays, "old_logprobs_BT": None}
    equal(whole_step(PRESETS["luspo"], on_policy), whole_step(PRESETS["luspo"], absent))
