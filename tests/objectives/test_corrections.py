"""The masks of tokens far from what sampled them, on random tokens, against NumPy."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from luspo_jax import objectives
from luspo_jax.objectives import corrections, preset
from luspo_jax.objectives.kl import bernoulli_kl
from tests.objectives.numpy_objectives import binary_kl, m2po_kept, within_binary_kl
from tests.objectives.objective_cases import batch_of, case, denominators_of, loss_grad_metrics

pytestmark = pytest.mark.usefixtures("strict_dtypes")

# 1 − p from 1 to what float32 can tell from 0 near a log-prob of 0.
REST = np.array([1 - 1e-6, 0.99, 0.5, 0.1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6])


def _grid():
    """Every pair of log-probs (p, q), float32; and p and q themselves, float64."""
    logprobs = np.log1p(-REST).astype(np.float32)
    one, other = (x.ravel()[None] for x in np.meshgrid(logprobs, logprobs))
    return one, other, np.exp(one.astype(np.float64)), np.exp(other.astype(np.float64))


def test_the_binary_kl_of_float32_logprobs_is_exact_up_to_rounding():
    one, other, p, q = _grid()
    kl_BT = np.asarray(bernoulli_kl(one, other))
    assert kl_BT.dtype == np.float32
    np.testing.assert_allclose(kl_BT, binary_kl(p, q), rtol=2e-6, atol=3e-7)
    assert kl_BT.max() > 10


@pytest.mark.parametrize("close", [0.0, -1e-30, -1e-9, -6e-8, -1e-7, -1e-6])
def test_certain_tokens_are_kept_where_both_are_certain(close):
    """A log-prob of 0 says 1 − p < 1e-7 or so, not that any other p is infinitely far."""
    certain = np.float32([[0.0, -1e-30, -1e-9, -6e-8, -1e-7, -1e-6, 1e-7]])
    other = np.full_like(certain, close)
    for pair in ((certain, other), (other, certain)):
        assert np.all(np.abs(np.asarray(bernoulli_kl(*pair))) < 2e-5)
        assert np.all(np.asarray(corrections.binary_kl(*pair, binary_kl_max=1e-4)) == 1)


def test_certain_tokens_are_dropped_where_the_other_is_not():
    certain, unlikely = np.zeros((1, 3), np.float32), np.float32([[-3, -30, -300]])
    for pair in ((certain, unlikely), (unlikely, certain)):
        assert np.all(np.isfinite(np.asarray(bernoulli_kl(*pair))))
        assert np.all(np.asarray(corrections.binary_kl(*pair, binary_kl_max=2.0)) == 0)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("most", [0.02, 0.3, 2.0])
def test_binary_kl_drops_what_is_far_either_way(seed, most):
    rng = np.random.default_rng(seed)
    old, sampler = (-rng.gamma(0.5, 2.0, (20, 50)).astype(np.float32) - 1e-4 for _ in range(2))
    wide = old.astype(np.float64), sampler.astype(np.float64)
    p, q = np.exp(wide[0]), np.exp(wide[1])
    expected = within_binary_kl(*wide, most)
    got = np.asarray(corrections.binary_kl(old, sampler, binary_kl_max=most))
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, expected)
    # Both ways decide, each by itself somewhere.
    assert ((binary_kl(p, q) > most) & (binary_kl(q, p) <= most)).any()
    assert ((binary_kl(p, q) <= most) & (binary_kl(q, p) > most)).any()
    assert 0.05 < expected.mean() < 0.99


def _m2po(log_rho_BT, mask_BT, most):
    threshold = corrections.m2po_threshold(jnp.asarray(log_rho_BT), mask_BT, m2po_max=most)
    return np.asarray(corrections.m2po(jnp.asarray(log_rho_BT), threshold, m2po_max=most))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("most", [1e-3, 0.04, 0.4, 1e3])
@pytest.mark.parametrize("seed", range(3))
def test_m2po_drops_the_largest_until_the_rest_are_close(seed, most, dtype, x64):
    rng = np.random.default_rng(seed)
    log_rho_BT = (rng.standard_t(3, (11, 23)) * 0.5).astype(dtype)
    mask_BT = rng.random(log_rho_BT.shape) < 0.7
    got_BT = _m2po(np.where(mask_BT, log_rho_BT, np.nan).astype(dtype), mask_BT, most)
    assert got_BT.dtype == dtype
    kept = m2po_kept(log_rho_BT[mask_BT].astype(np.float64), most)
    np.testing.assert_array_equal(got_BT[mask_BT], kept)
    assert kept.all() == (most == 1e3)
    assert kept.any()


@pytest.mark.parametrize("seed", range(20))
def test_of_equal_tokens_all_stay_or_all_go(seed):
    """Log ratios on a coarse grid, so that the mean is often crossed among equal ones."""
    rng = np.random.default_rng(seed)
    log_rho_BT = np.float32(rng.integers(-4, 5, (4, 8)) / 8)
    mask_BT = np.ones(log_rho_BT.shape, bool)
    got_BT = _m2po(log_rho_BT, mask_BT, 0.04)
    expected = m2po_kept(log_rho_BT.astype(np.float64).ravel(), 0.04)
    np.testing.assert_array_equal(got_BT.ravel(), expected)
    assert np.mean(log_rho_BT[got_BT == 1] ** 2) <= 0.04
    order = rng.permutation(log_rho_BT.size)
    shuffled = _m2po(log_rho_BT.ravel()[order].reshape(8, 4), mask_BT.reshape(8, 4), 0.04)
    np.testing.assert_array_equal(shuffled.ravel(), got_BT.ravel()[order])


@pytest.mark.parametrize(
    ("log_rho", "kept"),
    [
        ([0.3, -0.3, 0.3], [0, 0, 0]),  # none may stay
        ([0.1, -0.1, 0.1], [1, 1, 1]),
        ([0.2, -0.2, 0.2], [1, 1, 1]),  # at the bound, whatever rounding makes of the mean
        ([0.0, 0.5], [1, 0]),
        ([0.0] * 9 + [0.5], [1] * 10),  # as many as are close may carry one that is not
    ],
)
def test_m2po_by_hand(log_rho, kept):
    values_BT = np.float32([log_rho])
    most = float(values_BT[0, 0] ** 2) if abs(log_rho[0]) == 0.2 else 0.04
    got_BT = _m2po(values_BT, np.ones(values_BT.shape, bool), most)
    np.testing.assert_array_equal(got_BT[0], kept)


def test_neighbouring_numbers_are_told_apart():
    """No float32 lies between the largest that stays and the smallest that goes."""
    low = np.float32(0.25)
    values_BT = np.float32([[0.0, low, np.nextafter(low, np.float32(1))]])
    most = float(low) ** 2 * 0.6  # between the mean square of two and that of all three
    got_BT = _m2po(values_BT, np.ones((1, 3), bool), most)
    np.testing.assert_array_equal(got_BT, [[1, 1, 0]])


@pytest.mark.parametrize("seed", range(4))
def test_tokens_within_the_bound_stay_whatever_their_running_mean_is_rounded_to(seed):
    size = np.random.default_rng(seed).uniform(0.1, 0.3, 1).astype(np.float32)
    values_BT = np.repeat(size[None], 3000, axis=1)
    got_BT = _m2po(values_BT, np.ones(values_BT.shape, bool), float((size**2)[0]))
    assert np.all(got_BT == 1)


def _dropped(objective, batch, denominators):
    """(share of tokens that a correction drops, gradient)."""
    _, grad_BT, metrics = loss_grad_metrics(objective, batch, denominators)
    dropped, count = metrics["rollout_corr/masked_fraction"]
    return float(dropped) / float(count), np.asarray(grad_BT)


def test_the_threshold_is_not_that_of_a_micro_batch():
    """Of a step whose halves differ, each half would drop other tokens alone."""
    objective = preset("grpo_unclipped", correction="m2po")
    arrays = case(4, dtype=np.float32, drift=0.1)
    arrays["sampler_logprobs_BT"][3:] -= np.float32(0.4)
    batch = batch_of(objective, arrays)
    whole = denominators_of(objective, batch)
    halves = [
        batch_of(objective, {k: x[rows] for k, x in arrays.items()})
        for rows in (slice(3), slice(3, 6))
    ]
    shares = [_dropped(objective, half, whole)[0] for half in halves]
    alone = [_dropped(objective, half, denominators_of(objective, half))[0] for half in halves]
    assert max(np.abs(np.subtract(shares, alone))) > 0.1
    weights = [half.response_mask_BT.sum() for half in halves]
    together = _dropped(objective, batch, whole)[0]
    assert together == pytest.approx(np.average(shares, weights=weights))
    assert 0.1 < together < 0.9


@pytest.mark.parametrize("seed", range(8))
def test_wider_logprobs_of_the_policy_drop_the_same_tokens(seed, x64):
    """The threshold comes from log-probs of float32, and the loss then computes in float64."""
    objective = preset("grpo_unclipped", correction="m2po")
    arrays = case(seed, dtype=np.float32, drift=0.3)
    narrow = batch_of(objective, arrays)
    wide = dataclasses.replace(narrow, logprobs_BT=narrow.logprobs_BT.astype(np.float64))
    denominators = denominators_of(objective, narrow)
    dropped, grad_BT = _dropped(objective, narrow, denominators)
    assert dropped > 0
    also, wide_BT = _dropped(objective, wide, denominators)
    assert also == pytest.approx(dropped)
    np.testing.assert_array_equal(wide_BT == 0, grad_BT == 0)


@pytest.mark.parametrize("name", ["binary-kl", "m2po"])
def test_masks_carry_no_gradient_and_stay_in_the_denominator(name, x64):
    """The gradient is that of the uncorrected loss on the tokens kept, and 0 on the others."""
    arrays = case(3, drift=0.4)
    plain = preset("grpo_unclipped", aggregation="token-mean")
    bounds = {"binary-kl": {"binary_kl_max": 0.1}, "m2po": {"m2po_max": 0.1}}[name]
    masked = dataclasses.replace(plain, correction=name, **bounds)
    batch = batch_of(plain, arrays)
    mask_BT = arrays["response_mask_BT"]
    old, sampler = (arrays[f"{k}_logprobs_BT"][mask_BT] for k in ("old", "sampler"))
    kept_BT = np.zeros(mask_BT.shape)
    kept_BT[mask_BT] = (
        m2po_kept(old - sampler, 0.1) if name == "m2po" else within_binary_kl(old, sampler, 0.1)
    )
    assert 0.2 < kept_BT[mask_BT].mean() < 0.9
    full_BT = loss_grad_metrics(plain, batch, denominators_of(plain, batch))[1]
    share, grad_BT = _dropped(masked, batch, denominators_of(masked, batch))
    np.testing.assert_allclose(grad_BT, full_BT * kept_BT, rtol=1e-12)
    assert share == pytest.approx(1 - kept_BT[mask_BT].mean())


def test_a_step_without_tokens_has_a_threshold():
    mask_BT, log_BT = np.zeros((2, 3), bool), np.full((2, 3), np.nan, np.float32)
    objective = preset("luspo", correction="m2po")
    found = objectives.denominators(objective, mask_BT, None, log_BT, log_BT)
    assert np.isfinite(found.m2po_threshold)
