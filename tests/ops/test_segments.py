"""Branches see their trunk and themselves, in every implementation that reads segment ids."""

import numpy as np
import pytest

from luspo_jax.ops import gpu_attention, segments, splash_attention
from luspo_jax.ops.attention import resolve
from tests.ops import attention_cases as cases

# Splash itself compares ids for equality, and is refused for branches.
IMPLEMENTATIONS = ("reference", "flash_gpu", "splash_branches")

pytestmark = pytest.mark.usefixtures("strict_dtypes")


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch):
    monkeypatch.setattr(gpu_attention, "_INTERPRET", True)
    monkeypatch.setattr(splash_attention, "_INTERPRET", True)


def test_ids_say_what_is_seen():
    first, second = segments.branch(7, 0), segments.branch(7, 1)
    ids = np.array([0, 3, 7, first, second])
    seen = segments.sees(ids[:, None], ids[None])
    np.testing.assert_array_equal(
        seen,
        np.array(
            [[1, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 1, 0, 1]],
            bool,
        ),
    )
    np.testing.assert_array_equal(segments.trunk(ids), [0, 3, 7, 7, 7])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_values_and_gradients_match_a_plain_computation(implementation):
    arrays = cases.branched(2, 150, 4, 2, 16)
    grad = cases.cotangent(arrays[0])
    got = cases.computed(arrays, grad, implementation)
    assert cases.error(got, cases.dense(*arrays, grad)) < 1e-6


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_ring_gives_values_and_gradients_of_one_device(implementation):
    """Trunk and branches lie on different devices."""
    arrays = cases.branched(1, 256, 2, 1, 16)
    grad = cases.cotangent(arrays[0])
    got = cases.computed(arrays, grad, implementation, cases.layout_of(context=2))
    assert cases.error(got, cases.dense(*arrays, grad)) < 1e-6


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_branch_gives_what_its_trunk_before_it_gives(implementation):
    """The same tokens in rows of their own, trunk and branch in one segment."""
    query, key, value, ids = cases.branched(1, 64, 2, 1, 16)
    grad = np.zeros_like(query)
    whole = cases.computed((query, key, value, ids), grad, implementation)[0]
    for own in (1 + 65536, 3 + 2 * 65536):
        at = np.flatnonzero((ids[0] == own) | (ids[0] == own % 65536))
        alone = tuple(x[:, at] for x in (query, key, value))
        one = np.ones((1, len(at)), np.int32)
        expected = cases.computed((*alone, one), grad[:, at], implementation)[0]
        here = ids[0, at] == own
        np.testing.assert_allclose(whole[:, at][:, here], expected[:, here], atol=2e-6)


def test_what_cannot_is_refused_and_another_is_chosen():
    needs = {"packed": True, "head_dim": 128, "branches": True}
    assert resolve("auto", platform="tpu", **needs) == "splash_branches"
    assert resolve("auto", platform="gpu", **needs) == "flash_gpu"
    assert resolve("auto", platform="cpu", **needs) == "reference"
    with pytest.raises(ValueError, match="share a prompt see two; here 'splash_branches' does"):
        resolve("splash", platform="tpu", **needs)
    assert resolve("auto", platform="tpu", packed=True, head_dim=128) == "splash"
