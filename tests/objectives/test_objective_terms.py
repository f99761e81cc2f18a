"""What joins the policy loss: KL, entropy, corrections, masks, and the metrics of all of it."""

import dataclasses

import jax
import numpy as np
import pytest

from luspo_jax import objectives
from luspo_jax.objectives import PRESETS, Objective, PolicyBatch, preset, reward_adjustment
from luspo_jax.objectives.corrections import CORRECTIONS
from luspo_jax.objectives.kl import KL_ESTIMATORS
from tests.objectives.objective_cases import (
    LOADED,
    batch_of,
    case,
    denominators_of,
    lengths,
    loss_grad,
    loss_grad_metrics,
    step_with_means,
    whole_step,
)

pytestmark = pytest.mark.usefixtures("strict_dtypes")

RHO = np.array([[0.4, 1.0, 3.0, 6.0], [1.02, 1.0, 0.99, 1.01], [0.9, 0.9, 0.9, 0.9]])


def mismatched(correction: str, **changes):
    """A step whose sampler and trainer differ by `RHO`, on-policy, advantages of 1."""
    objective = preset("luspo_unclipped", correction=correction, **changes)
    batch = PolicyBatch(
        logprobs_BT=np.full((3, 4), -1.0),
        old_logprobs_BT=np.full((3, 4), -1.0),
        advantages_B=np.ones(3),
        response_mask_BT=np.ones((3, 4), bool),
        length_scale_B=np.full(3, 4.0),
        sampler_logprobs_BT=-1.0 - np.log(RHO),
    )
    denominators = denominators_of(objective, batch)
    value, grad_BT, metrics = loss_grad_metrics(objective, batch, denominators)
    means = {k: float(v) for k, v in objectives.metric_means(metrics).items()}
    # The loss of a token is −w, and LUSPO's gradient spreads a row's mean weight over its tokens.
    np.testing.assert_allclose(np.asarray(grad_BT).sum(), value, rtol=1e-6)
    return -float(value), means


WEIGHTS = {
    "none": np.ones((3, 4)),
    "tis": np.minimum(RHO, 2),
    "icepop": np.where((RHO >= 0.5) & (RHO <= 5), RHO, 0),
    # Products 7.2, 1.0298…, 0.6561.
    "sequence-tis": np.repeat(np.minimum(RHO.prod(axis=1, keepdims=True), 2), 4, axis=1),
    "sequence-mis": np.repeat([[0], [1.02 * 0.99 * 1.01], [0.6561]], 4, axis=1),
    # Geometric means 1.638, 1.0049, 0.9.
    "geometric-mask": np.repeat([[0], [1], [0]], 4, axis=1),
    # Means of ρ − log ρ − 1: 1.11, 1.5e-4, 5.4e-3.
    "k3-mask": np.repeat([[0], [1], [1]], 4, axis=1),
    # p 0.37 against q 0.92: 0.97 nats one way, 0.68 the other; the next is 0.41.
    "binary-kl": np.where(RHO == 0.4, 0, 1),
    # Means of the least nine squares 0.005, of ten 0.088.
    "m2po": np.where((RHO == 0.4) | (RHO >= 3), 0, 1),
}
SETTINGS = {"binary-kl": {"binary_kl_max": 0.8}}


@pytest.mark.parametrize("name", CORRECTIONS)
def test_corrections_by_hand(name, x64):
    value, means = mismatched(name, **SETTINGS.get(name, {}))
    weight = WEIGHTS[name].astype(float)
    # Mean over rows of token sums: what is dropped stays in the denominator.
    assert value == pytest.approx(weight.sum() / 3, rel=1e-12)
    assert means["rollout_corr/kl"] == pytest.approx(-np.log(RHO).mean())
    assert means["rollout_corr/k3_kl"] == pytest.approx((RHO - 1 - np.log(RHO)).mean())
    per_row = np.abs(np.log(RHO).mean(axis=1)).mean()
    assert means["rollout_corr/log_ppl_abs_diff"] == pytest.approx(per_row)
    if name == "none":
        assert "rollout_corr/ess" not in means
        return
    assert means["rollout_corr/weight"] == pytest.approx(weight.mean())
    ess = weight.sum() ** 2 / (weight**2).sum() / weight.size
    assert means["rollout_corr/ess"] == pytest.approx(ess)
    assert means["rollout_corr/masked_fraction"] == pytest.approx((weight == 0).mean())
    masked_rows = (weight == 0).all(axis=1).mean()
    assert means["rollout_corr/masked_sequences"] == pytest.approx(masked_rows)


def test_corrections_multiply(x64):
    value, _ = mismatched("k3-mask+tis")
    assert value == pytest.approx((WEIGHTS["k3-mask"] * WEIGHTS["tis"]).sum() / 3, rel=1e-12)


def test_everything_dropped_is_a_zero_update(x64):
    value, means = mismatched("geometric-mask", geometric_low=0.999, geometric_high=1.0)
    assert value == 0
    assert means["rollout_corr/ess"] == 0
    assert means["rollout_corr/masked_sequences"] == 1


@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
def test_kl_estimators(estimator, x64):
    arrays = case(2)
    mask_BT, d_BT = arrays["response_mask_BT"], arrays["ref_logprobs_BT"] - arrays["logprobs_BT"]
    expected_BT = {"k1": -d_BT, "k2": d_BT**2 / 2, "k3": np.exp(d_BT) - d_BT - 1}[estimator]
    with_kl = preset("dapo", kl_coef=0.3, kl_estimator=estimator)
    value, _, means = step_with_means(with_kl, arrays)
    without, _ = whole_step(PRESETS["dapo"], arrays)
    assert value - without == pytest.approx(0.3 * expected_BT[mask_BT].mean(), rel=1e-9)
    assert means["actor/kl_loss"] == pytest.approx(expected_BT[mask_BT].mean(), rel=1e-9)


def test_kl_in_the_reward(x64):
    arrays = case(2)
    in_reward = preset("luspo", kl_coef=0.3, kl_placement="reward")
    np.testing.assert_array_equal(
        whole_step(in_reward, {**arrays, "ref_logprobs_BT": None})[1],
        whole_step(PRESETS["luspo"], arrays)[1],
    )
    mask_BT = arrays["response_mask_BT"]
    poisoned = {
        name: np.where(mask_BT, arrays[name], np.nan)
        for name in ("old_logprobs_BT", "ref_logprobs_BT")
    }
    adjustment_B = reward_adjustment(*poisoned.values(), mask_BT, kl_coef=0.3)
    difference_BT = arrays["old_logprobs_BT"] - arrays["ref_logprobs_BT"]
    expected_B = -0.3 * np.where(mask_BT, difference_BT, 0).sum(axis=1)
    np.testing.assert_allclose(adjustment_B, expected_B, rtol=1e-12)


@pytest.mark.parametrize("name", ["grpo", "luspo", "minirl"])
def test_entropy_bonus_means_the_same_under_every_aggregation(name, x64):
    """A token mean over the step, beside a loss that is scaled by anything."""
    arrays = case(2)
    bonus = preset(name, entropy_coef=0.2, loss_scale=0.5)
    plain = preset(name, loss_scale=0.5)
    entropy = arrays["entropy_BT"][arrays["response_mask_BT"]].mean()
    value, _, means = step_with_means(bonus, arrays)
    assert value - whole_step(plain, arrays)[0] == pytest.approx(-0.2 * entropy, rel=1e-9)
    assert means["actor/entropy"] == pytest.approx(entropy)


def test_entropy_quantile_keeps_the_uncertain_tokens(x64):
    arrays = case(2)
    quantile = preset("grpo_unclipped", top_entropy_quantile=0.4)
    _, grad_BT = whole_step(quantile, arrays)
    _, full_BT = whole_step(PRESETS["grpo_unclipped"], arrays)
    mask_BT, entropy_BT = arrays["response_mask_BT"], arrays["entropy_BT"]
    keep_BT = mask_BT & (entropy_BT >= np.quantile(entropy_BT[mask_BT], 0.6))
    np.testing.assert_allclose(grad_BT, np.where(keep_BT, full_BT, 0), rtol=1e-12)
    assert 0.3 < keep_BT.sum() / mask_BT.sum() < 0.5


@pytest.mark.parametrize("against", ["old", "sampler"])
def test_off_policy_mask_drops_stale_negatives(against, x64):
    arrays = case(3, drift=0.5)
    objective = preset("grpo_unclipped", off_policy_max=0.1, off_policy_against=against)
    batch = batch_of(objective, arrays)
    _, grad_BT, means = step_with_means(objective, arrays)
    dropped = 0
    for i, mask_T in enumerate(arrays["response_mask_BT"]):
        drift = np.mean(
            arrays[f"{against}_logprobs_BT"][i] - arrays["logprobs_BT"][i], where=mask_T
        )
        drop = float(batch.advantages_B[i]) < 0 and drift > 0.1
        dropped += drop
        assert np.all(grad_BT[i] == 0) == drop
    assert 0 < dropped < 3
    assert means["rollout_corr/off_policy_masked"] == pytest.approx(dropped / 6)


@pytest.mark.parametrize("name", ["grpo", "luspo", "gmpo", "dppo_tv", "dppo_kl", "minirl"])
def test_the_transcribed_cases_clip_on_both_sides(name):
    """Agreement with NumPy there would mean little if nothing were clipped, or everything."""
    arrays = [case(seed, drift=0.5, dtype=np.float32) for seed in (1, 4)]
    means = [step_with_means(PRESETS[name], x)[2] for x in arrays]
    assert 0 < sum(mean["clip_ratio/high_mean"] for mean in means) < 1
    assert 0 < sum(mean["clip_ratio/low_mean"] for mean in means) < 1


@pytest.mark.parametrize("correction", ["tis", "binary-kl", "m2po"])
def test_every_correction_of_the_transcribed_cases_changes_some_tokens(correction):
    """And not all: likewise."""
    loaded = next(x for x in LOADED.values() if correction in x.corrections)
    alone = dataclasses.replace(loaded, correction=correction)
    for seed in (1, 4):
        means = step_with_means(alone, case(seed, drift=0.5, dtype=np.float32))[2]
        if correction == "tis":
            assert 0 < means["rollout_corr/ess"] < 1
        else:
            assert 0 < means["rollout_corr/masked_fraction"] < 1


def test_clip_metrics_by_hand(x64):
    """Six tokens of positive and four of negative advantage, ratios chosen one by one."""
    ratio_BT = np.array([[1.5, 1.1, 1.0, 0.5, 1.3, 1.0], [0.5, 1.0, 4.0, 1.5, 1.0, 1.0]])
    mask_BT = np.array([[True] * 6, [True] * 4 + [False] * 2])
    objective = preset("grpo", dual_clip=3.0)
    batch = PolicyBatch(
        logprobs_BT=np.log(ratio_BT) - 2,
        old_logprobs_BT=np.full((2, 6), -2.0),
        advantages_B=np.array([1.0, -1.0]),
        response_mask_BT=mask_BT,
        length_scale_B=np.ones(2),
    )
    value, _, metrics = loss_grad_metrics(objective, batch, denominators_of(objective, batch))
    means = objectives.metric_means(metrics)
    expected = {
        "actor/pg_clipfrac": 3 / 10,
        "actor/pg_clipfrac_lower": 1 / 10,
        "actor/clipfrac/pos": 2 / 6,
        "actor/clipfrac/neg": 1 / 4,
        "clip_ratio/high_mean": 2 / 10,
        "clip_ratio/low_mean": 1 / 10,
        "clip_ratio/region_mean": 3 / 10,
        "actor/ratio_deviation": np.abs(ratio_BT - 1)[mask_BT].mean(),
        "actor/ppo_kl": -np.log(ratio_BT[mask_BT]).mean(),
        "actor/log_ratio_squared/token": (np.log(ratio_BT[mask_BT]) ** 2).mean(),
        "actor/log_ratio_squared/sequence": np.mean(
            [np.log(row[mask]).mean() ** 2 for row, mask in zip(ratio_BT, mask_BT, strict=True)]
        ),
        "actor/pg_loss": float(value),
    }
    assert set(means) == set(expected)
    for name, mean in expected.items():
        assert float(means[name]) == pytest.approx(mean), name
    rows = [-np.mean([1.2, 1.1, 1.0, 0.5, 1.2, 1.0]), np.mean([0.8, 1.0, 3.0, 1.5])]
    assert float(value) == pytest.approx(np.mean(rows))


@pytest.mark.parametrize("name", ["grpo", "luspo"])
def test_clipped_shares_by_length_bin(name, x64):
    """Against a count in NumPy, for ratios of tokens and of sequences; bins add up to the whole."""
    objective, edges = PRESETS[name], (2, 5, 7)
    seen = set()
    for seed in (1, 4):
        arrays = case(seed, drift=0.5)
        batch = batch_of(objective, arrays)
        denominators = denominators_of(objective, batch)
        _, sums = objectives.loss(objective, batch, denominators, bin_edges=edges)
        mask_BT, length_B = arrays["response_mask_BT"], lengths(arrays)
        log_ratio_BT = arrays["logprobs_BT"] - arrays["old_logprobs_BT"]
        if objective.ratio == "sequence":
            mean_B = np.mean(log_ratio_BT, axis=1, where=mask_BT)
            log_ratio_BT = np.broadcast_to(mean_B[:, None], mask_BT.shape)
        ratio_BT, advantage_B = np.exp(log_ratio_BT), np.asarray(batch.advantages_B)
        for sign, held_BT, rows_B in (
            ("pos", ratio_BT > 1 + objective.clip_high, advantage_B > 0),
            ("neg", ratio_BT < 1 - objective.clip_low, advantage_B < 0),
        ):
            bins = []
            for k, (low, high) in enumerate(zip((0, *edges), (*edges, np.inf), strict=True)):
                in_bin_B = rows_B & (length_B > low) & (length_B <= high)
                expected = (held_BT & mask_BT)[in_bin_B].sum(), length_B[in_bin_B].sum()
                got = tuple(map(float, sums[f"actor/clipfrac/{sign}/bin_{k}"]))
                assert got == expected
                bins.append(got)
                seen.add((sign, k, got[0] > 0))
            whole = tuple(map(float, sums[f"actor/clipfrac/{sign}"]))
            assert tuple(np.sum(bins, axis=0)) == whole
            means = objectives.metric_means(sums)
            shares = [float(means[f"actor/clipfrac/{sign}/bin_{k}"]) for k in range(4)]
            weights = [count for _, count in bins]
            mean = np.average(shares, weights=weights)
            assert float(means[f"actor/clipfrac/{sign}"]) == pytest.approx(mean)
    # Both signs are held back in more than one bin, so that agreement means something.
    for sign in ("pos", "neg"):
        assert len([k for s, k, held in seen if s == sign and held]) > 1


def test_an_edge_belongs_to_the_bin_below_it():
    bins_BK = np.asarray(objectives.in_length_bin(np.array([1, 2, 3, 5, 6, 99], np.int32), (2, 5)))
    assert bins_BK.sum(axis=1).tolist() == [1] * 6
    assert bins_BK.argmax(axis=1).tolist() == [0, 0, 1, 1, 2, 2]
    assert np.asarray(objectives.in_length_bin(np.array([3], np.int32), ())).all()


def test_sequence_ratios_are_counted_by_sequence_and_by_token(x64):
    arrays = case(4, drift=0.5)
    *_, means = step_with_means(PRESETS["luspo"], arrays)
    length_B = lengths(arrays)
    difference_BT = arrays["logprobs_BT"] - arrays["old_logprobs_BT"]
    ratio_B = np.exp(np.mean(difference_BT, axis=1, where=arrays["response_mask_BT"]))
    advantage_B = np.asarray(batch_of(PRESETS["luspo"], arrays).advantages_B)
    clipped_B = ((advantage_B > 0) & (ratio_B > 1.0025)) | ((advantage_B < 0) & (ratio_B < 0.998))
    assert 0 < clipped_B.sum() < 6
    assert means["clip_ratio/region_mean"] == pytest.approx(clipped_B.mean())
    by_token = (clipped_B * length_B).sum() / length_B.sum()
    assert means["actor/pg_clipfrac"] == pytest.approx(by_token)


def test_loss_scale_scales_policy_and_kl(x64):
    arrays = case(2)
    base = preset("luspo", kl_coef=0.1)
    scaled = dataclasses.replace(base, loss_scale=0.25)
    for one, other in zip(whole_step(base, arrays), whole_step(scaled, arrays), strict=True):
        np.testing.assert_allclose(0.25 * one, other, rtol=1e-12)


@pytest.mark.parametrize("name", ["grpo", "gspo_unclipped", "gmpo", "vespo", "cispo", "dppo_kl"])
def test_runaway_ratios_stay_finite(name):
    """±500 nats apart: loss, gradient and metrics stay finite in float32."""
    arrays = case(4, dtype=np.float32, drift=0.3)
    apart_B = np.float32(500) * np.sign(arrays["rewards_B"] - np.float32(0.5))
    arrays["old_logprobs_BT"] = arrays["logprobs_BT"] + apart_B[:, None]
    batch = batch_of(PRESETS[name], arrays)
    results = loss_grad_metrics(PRESETS[name], batch, denominators_of(PRESETS[name], batch))
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(results))


def test_half_precision_inputs_are_computed_in_float32():
    arrays = case(2, dtype=np.float32)
    batch = batch_of(PRESETS["luspo"], arrays)
    half = dataclasses.replace(batch, logprobs_BT=batch.logprobs_BT.astype("bfloat16"))
    value, grad_BT = loss_grad(PRESETS["luspo"], half, denominators_of(PRESETS["luspo"], half))
    assert (value.dtype, grad_BT.dtype) == (np.float32, "bfloat16")


def test_objective_is_hashable_and_static():
    assert hash(Objective()) == hash(Objective())
    assert Objective() == PRESETS["grpo"]
