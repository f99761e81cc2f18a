"""Length scales by hand; absent rows; a new entry works without further edits."""

import numpy as np
import pytest

from luspo_jax import objectives
from luspo_jax.objectives import Objective
from luspo_jax.objectives.length_scales import LENGTH_SCALES
from tests.objectives.objective_cases import case, whole_step

pytestmark = pytest.mark.usefixtures("strict_dtypes")

LENGTHS = np.array([2, 4, 6, 8, 10], np.int32)
GROUPS = np.array([3, 3, 1, 1, 1], np.int32)
SETTINGS = {"length_cap": 6.0, "reference_length": 4.0, "length_alpha": 0.5}


def scales(name, lengths=LENGTHS, groups=GROUPS, **changes):
    objective = Objective(ratio="sequence", length_scale=name, **(SETTINGS | changes))
    return np.asarray(objectives.length_scales(objective, lengths, groups))


def vl_norm(alpha):
    u = (LENGTHS / LENGTHS.mean()) ** -alpha
    return LENGTHS * u / u.mean()


def softmax(values):
    mass = np.exp(values)
    return len(values) * mass / mass.sum()


HAND = {
    "none": np.ones(5),
    "length": LENGTHS,
    "power": np.sqrt(LENGTHS / 4),
    "adaptive": np.sqrt(LENGTHS / 4),
    "log": 4 * np.log(1 + LENGTHS / 4),
    "capped": [2, 4, 6, 6, 6],
    "relative-group": LENGTHS / np.array([3, 3, 8, 8, 8]),
    "relative-batch": LENGTHS / 6,
    "vl-norm": vl_norm(0.5),
    # z = ±1/√2 of two, −1, 0, 1 of three; λ 1, r 0.1.
    "lambda-grpo": [*softmax([1 - 0.1 / 2**0.5, 1 + 0.1 / 2**0.5]), *softmax([0.9, 1, 1.1])],
}


def test_lambda_moves_by_the_shift_and_0_is_no_scale():
    objective = Objective(ratio="sequence", length_scale="lambda-grpo")
    flat = objectives.length_scales(objective, LENGTHS, GROUPS, np.float32(-1))
    np.testing.assert_allclose(flat, np.ones(5), rtol=1e-6)
    steep = objectives.length_scales(objective, LENGTHS, GROUPS, np.float32(1))
    np.testing.assert_allclose(steep[2:], softmax([0.81, 1, 1.21]), rtol=1e-6)


def test_adaptive_scale_is_the_power_scale_of_its_shifted_exponent():
    objective = Objective(ratio="sequence", length_scale="adaptive", **SETTINGS)
    shifted = objectives.length_scales(objective, LENGTHS, GROUPS, np.float32(0.25))
    np.testing.assert_allclose(shifted, (LENGTHS / 4) ** 0.75, rtol=1e-6)


@pytest.mark.parametrize("name", LENGTH_SCALES)
def test_by_hand(name):
    np.testing.assert_allclose(scales(name), HAND[name], rtol=1e-6)


@pytest.mark.parametrize("name", LENGTH_SCALES)
def test_absent_rows_change_nothing(name):
    lengths = np.concatenate([LENGTHS, np.zeros(2, np.int32)])
    groups = np.concatenate([GROUPS, np.array([3, 8], np.int32)])
    actual = scales(name, lengths, groups)
    np.testing.assert_allclose(actual[:5], scales(name), rtol=1e-6)
    assert np.all(np.isfinite(actual))
    assert np.all(np.isfinite(scales(name, np.zeros(5, np.int32))))


@pytest.mark.parametrize("name", LENGTH_SCALES)
def test_is_positive_and_keeps_the_order_of_lengths_or_is_flat(name):
    scale = scales(name, groups=np.zeros(5, np.int32))
    assert np.all(scale > 0)
    assert np.all(np.diff(scale) >= 0)


def test_ends_of_vl_norm():
    """α 0 is LUSPO's scale; α 1 gives every response the same weight, as GSPO does."""
    np.testing.assert_allclose(scales("vl-norm", length_alpha=0.0), LENGTHS, rtol=1e-6)
    flat = scales("vl-norm", length_alpha=1.0)
    np.testing.assert_allclose(flat, np.full(5, flat[0]), rtol=1e-6)


def test_a_new_scale_is_one_function_and_one_line(monkeypatch):
    def root(lengths_B, *, root_offset: float = 1.0):
        return (lengths_B + root_offset) ** 0.5

    monkeypatch.setitem(LENGTH_SCALES, "root", root)
    np.testing.assert_allclose(scales("root"), np.sqrt(LENGTHS + 1), rtol=1e-6)
    objective = Objective(ratio="sequence", length_scale="root", clip_low=0.01, clip_high=0.01)
    value, _ = whole_step(objective, case(dtype=np.float32))
    assert np.isfinite(value)
