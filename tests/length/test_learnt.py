"""λ moves along the loss: by finite differences of the loss itself, and towards what is better."""

import dataclasses

import numpy as np
import pytest

from luspo_jax import objectives
from luspo_jax.length.learnt import lambda_gradient, learnt
from luspo_jax.length.steering import LengthState

OBJECTIVE = objectives.preset("lambda_grpo")
LENGTHS = np.array([2, 5, 8, 3, 3, 7], np.int32)
GROUPS = np.array([0, 0, 0, 1, 1, 1], np.int32)


def _loss(shift, advantages):
    """The whole loss of a step at ratio 1."""
    mask = np.arange(8) < LENGTHS[:, None]
    logprobs = np.full((6, 8), -1.0)
    batch = objectives.PolicyBatch(
        logprobs_BT=logprobs,
        old_logprobs_BT=None,
        advantages_B=advantages,
        response_mask_BT=mask,
        length_scale_B=objectives.length_scales(OBJECTIVE, LENGTHS, GROUPS, shift),
    )
    return float(objectives.loss(OBJECTIVE, batch, objectives.denominators(OBJECTIVE, mask))[0])


@pytest.mark.parametrize("shift", [-1.5, 0.0, 2.0])
def test_gradient_is_the_losss(x64, shift):
    advantages = np.random.default_rng(0).normal(size=6)
    slope = -(_loss(shift + 1e-4, advantages) - _loss(shift - 1e-4, advantages)) / 2e-4
    found = lambda_gradient(OBJECTIVE, advantages.astype(np.float32), LENGTHS, GROUPS, shift)
    assert found == pytest.approx(slope, rel=1e-3, abs=1e-6)


def test_absent_responses_say_nothing():
    advantages = np.array([1, 0, -1, 1, -1, 0], np.float32)
    lengths = np.where(np.arange(6) < 3, LENGTHS, 0)
    alone = lambda_gradient(OBJECTIVE, advantages[:3], LENGTHS[:3], GROUPS[:3], 0.5)
    assert lambda_gradient(OBJECTIVE, advantages, lengths, GROUPS, 0.5) == pytest.approx(alone)


def test_lambda_grows_where_longer_is_better_and_stays_in_its_range():
    up = lambda_gradient(OBJECTIVE, (LENGTHS - 5).astype(np.float32), LENGTHS, GROUPS, 0.0)
    assert up > 0
    assert learnt(LengthState(), OBJECTIVE, up, 0.5).alpha_shift == pytest.approx(0.5 * up)
    far = learnt(LengthState(alpha_shift=6.9), OBJECTIVE, up, 1e6)
    assert far.alpha_shift + OBJECTIVE.length_lambda == pytest.approx(8)
    steep = dataclasses.replace(OBJECTIVE, length_lambda=8.0)
    assert learnt(LengthState(), steep, 1.0, 1.0).alpha_shift == 0
