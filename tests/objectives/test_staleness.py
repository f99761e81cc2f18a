"""Metrics by age, against NumPy token by token, and that they change nothing else."""

import dataclasses

import jax
import numpy as np
import pytest

from luspo_jax import objectives
from luspo_jax.metrics import declared
from luspo_jax.objectives import preset
from tests.objectives.objective_cases import (
    B,
    batch_of,
    case,
    denominators_of,
    lengths,
    loss_grad_metrics,
)

pytestmark = pytest.mark.usefixtures("strict_dtypes")

NAMES = ("share", "ratio", "clipfrac", "kl", "weight", "ess")
# Of tokens, of sequences, of tokens in a sequence loss, of products.
PRESETS = ("grpo", "luspo", "gmpo", "vespo")


def _aged(seed=4, *, oldest=7, **changes):
    """A step whose responses hold tokens of several ages each; (arrays, ages)."""
    arrays = case(seed, drift=0.5, **changes)
    rng = np.random.default_rng([seed, 1])
    return arrays, rng.integers(0, oldest, arrays["response_mask_BT"].shape).astype(np.int32)


def _by_hand(objective, arrays, batch, ages_BT):
    """The metrics as their names say, over the tokens of each age."""
    mask_BT = arrays["response_mask_BT"]
    new, old, sampler = (
        arrays[f"{name}logprobs_BT"].astype(np.float64) for name in ("", "old_", "sampler_")
    )
    drift_BT = np.where(mask_BT, new - old, 0)
    log_ratio_BT = drift_BT
    if objective.ratio != "token":
        total_B1 = drift_BT.sum(axis=1, keepdims=True)
        if objective.ratio == "sequence":
            total_B1 = total_B1 / lengths(arrays)[:, None]
        log_ratio_BT = np.broadcast_to(total_B1, mask_BT.shape)
    advantages_B1 = np.asarray(batch.advantages_B)[:, None]
    low, high = {
        "clip": (np.log(1 - objective.clip_low), np.log(1 + objective.clip_high)),
        "gmpo": (-objective.gmpo_log_low, objective.gmpo_log_high),
        "vespo": (-np.inf, np.inf),
    }[objective.surrogate]
    clipped_BT = (advantages_B1 > 0) & (log_ratio_BT > high)
    clipped_BT |= (advantages_B1 < 0) & (log_ratio_BT < low)
    found = {}
    for age in range(5):
        at = mask_BT & (ages_BT >= 4 if age == 4 else ages_BT == age)
        weight = np.exp(new - sampler)[at]
        values = {
            "share": at.sum() / mask_BT.sum(),
            "ratio": np.exp(log_ratio_BT)[at].mean() if at.any() else 0,
            "clipfrac": clipped_BT[at].mean() if at.any() else 0,
            "kl": (sampler - old)[at].mean() if at.any() else 0,
            "weight": weight.mean() if at.any() else 0,
            "ess": weight.sum() ** 2 / (at.sum() * (weight**2).sum()) if at.any() else 0,
        }
        found |= {f"staleness/{name}/age_{age}": value for name, value in values.items()}
    return found


def _means(objective, batch, denominators):
    metrics = loss_grad_metrics(objective, batch, denominators)[2]
    return {k: float(v) for k, v in objectives.metric_means(metrics).items()}


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("seed", [1, 4])
def test_metrics_by_age_against_numpy(name, seed, x64):
    objective = preset(name)
    arrays, ages_BT = _aged(seed, rows=12, width=30)
    batch = batch_of(objective, arrays, ages_BT=ages_BT)
    means = _means(objective, batch, denominators_of(objective, batch))
    expected = _by_hand(objective, arrays, batch, ages_BT)
    assert {k for k in means if k.startswith("staleness/")} == set(expected)
    for key, value in expected.items():
        assert means[key] == pytest.approx(value, rel=1e-9, abs=1e-12), key
        assert declared(key).reducer == "mean"
    # Ages differ in every measure, so that agreement means something.
    for which in set(NAMES) - ({"clipfrac"} if name == "vespo" else set()):
        assert len({expected[f"staleness/{which}/age_{k}"] for k in range(5)}) == 5, which


@pytest.mark.parametrize("name", ["grpo", "luspo"])
@pytest.mark.parametrize("change", ["padding", "order", "micro-batches"])
def test_sums_do_not_depend_on_padding_order_or_micro_batches(name, change):
    objective = preset(name)
    arrays, ages_BT = _aged(dtype=np.float32)
    batch = batch_of(objective, arrays, ages_BT=ages_BT)
    denominators = denominators_of(objective, batch)
    expected = loss_grad_metrics(objective, batch, denominators)[2]

    def taken(index):
        return jax.tree.map(lambda x: np.asarray(x)[index], batch)

    def widened(x):  # garbage of any age on the right
        x = np.asarray(x)
        fill = False if x.dtype == bool else 2
        return np.pad(x, ((0, 0), (0, 7)), constant_values=fill) if x.ndim == 2 else x

    parts = {
        "padding": [jax.tree.map(widened, batch)],
        "order": [taken(np.array([4, 1, 5, 0, 3, 2]))],
        "micro-batches": [taken(slice(i, i + 2)) for i in range(0, B, 2)],
    }[change]
    results = [loss_grad_metrics(objective, part, denominators)[2] for part in parts]
    sums = jax.tree.map(lambda *x: np.sum(x), *results)
    for key, pair in expected.items():
        np.testing.assert_allclose(sums[key], pair, rtol=1e-5, atol=1e-6, err_msg=key)
    got, wanted = (objectives.metric_means(x) for x in (sums, expected))
    for k in range(5):  # a ratio of sums, not a mean of the parts' ratios
        key = f"staleness/ess/age_{k}"
        np.testing.assert_allclose(got[key], wanted[key], rtol=1e-5)


@pytest.mark.parametrize("name", PRESETS)
def test_ages_change_no_other_result(name):
    """Bit by bit: they are metrics only, and a batch without them has none."""
    objective = preset(name)
    arrays, ages_BT = _aged(dtype=np.float32)
    batch = batch_of(objective, arrays)
    denominators = denominators_of(objective, batch)
    plain = loss_grad_metrics(objective, batch, denominators)
    aged = dataclasses.replace(batch, ages_BT=ages_BT)
    value, grad_BT, metrics = loss_grad_metrics(objective, aged, denominators)
    by_age = {k: v for k, v in metrics.items() if k.startswith("staleness/")}
    assert len(by_age) == 5 * len(NAMES)
    others = {k: v for k, v in metrics.items() if k not in by_age}
    jax.tree.map(np.testing.assert_array_equal, (value, grad_BT, others), plain)


@pytest.mark.parametrize("value", [np.nan, np.inf, -1e4])
def test_masked_positions_have_no_age(value):
    arrays, ages_BT = _aged(dtype=np.float32)
    arrays["response_mask_BT"][2] = False  # a row without a response
    objective = preset("grpo")
    batch = batch_of(objective, arrays, ages_BT=ages_BT)
    denominators = denominators_of(objective, batch)
    mask_BT = arrays["response_mask_BT"]
    planted = dataclasses.replace(
        batch,
        ages_BT=np.where(mask_BT, ages_BT, 3),
        **{
            name: np.where(mask_BT, arrays[name], np.float32(value))
            for name in ("logprobs_BT", "old_logprobs_BT", "sampler_logprobs_BT")
        },
    )
    results = [loss_grad_metrics(objective, x, denominators)[2] for x in (planted, batch)]
    jax.tree.map(np.testing.assert_array_equal, *results)
    shares = [float(results[0][f"staleness/share/age_{k}"][0]) for k in range(5)]
    assert sum(shares) == mask_BT.sum()


def test_an_age_without_tokens_reads_nothing():
    arrays, ages_BT = _aged(dtype=np.float32, oldest=2)
    objective = preset("luspo")
    batch = batch_of(objective, arrays, ages_BT=ages_BT)
    means = _means(objective, batch, denominators_of(objective, batch))
    assert means["staleness/share/age_0"] + means["staleness/share/age_1"] == pytest.approx(1)
    for age in (2, 3, 4):
        assert all(means[f"staleness/{name}/age_{age}"] == 0 for name in NAMES)
    assert 0 < means["staleness/ess/age_1"] < 1


def test_runaway_weights_stay_finite():
    arrays, ages_BT = _aged(dtype=np.float32)
    arrays["sampler_logprobs_BT"] = arrays["logprobs_BT"] - np.float32(500)
    objective = preset("grpo")
    batch = batch_of(objective, arrays, ages_BT=ages_BT)
    means = _means(objective, batch, denominators_of(objective, batch))
    assert all(np.isfinite(x) for x in means.values())
