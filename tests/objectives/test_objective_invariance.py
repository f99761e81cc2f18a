"""Nothing depends on padding, row order, micro-batches, or what stands on masked positions."""

import dataclasses

import jax
import numpy as np
import pytest

from luspo_jax import objectives
from tests.objectives.objective_cases import (
    ALL,
    B,
    T,
    batch_of,
    case,
    denominators_of,
    loss_grad,
    loss_grad_metrics,
    whole_step,
)

pytestmark = pytest.mark.usefixtures("strict_dtypes")


def float_case(seed: int = 4, **changes) -> dict[str, np.ndarray]:
    return case(seed, dtype=np.float32, drift=0.3, **changes)


def widened(batch, width: int):
    """The batch with garbage columns on its right, masked."""

    def pad(x):
        if x is None or x.ndim == 1:
            return x
        fill = False if x.dtype == bool else -1e4
        return np.pad(np.asarray(x), ((0, 0), (0, width - x.shape[1])), constant_values=fill)

    return jax.tree.map(pad, batch)


def rows(batch, index):
    return jax.tree.map(lambda x: np.asarray(x)[index], batch)


def close(actual, expected, tolerance: float = 1e-6):
    """max|Δ| / max|reference|, the measure that a gradient is used by."""
    scale = np.abs(expected).max()
    assert np.abs(np.asarray(actual) - expected).max() <= tolerance * max(scale, 1e-30)


@pytest.mark.parametrize("name", ALL)
def test_padding_order_and_micro_batches_together(name):
    """Three shuffled micro-batches of two rows, padded to almost twice the width."""
    objective, arrays = ALL[name], float_case()
    batch = batch_of(objective, arrays)
    denominators = denominators_of(objective, batch)
    value, grad_BT, metrics = loss_grad_metrics(objective, batch, denominators)
    order = np.array([4, 1, 5, 0, 3, 2])
    total, parts_BT = 0.0, np.zeros((B, T), np.float32)
    for index in order.reshape(3, 2):
        part = widened(rows(batch, index), 16)
        part_value, part_grad_BT = loss_grad(objective, part, denominators)
        total += np.asarray(part_value, np.float64)
        parts_BT[index] = part_grad_BT[:, :T]
        assert np.all(np.asarray(part_grad_BT)[:, T:] == 0)
    # The value is a difference of positive and negative parts: measure it against their size.
    size = np.abs(np.asarray(grad_BT) * np.asarray(arrays["logprobs_BT"])).sum()
    assert abs(total - float(value)) <= 1e-6 * max(abs(float(value)), size)
    close(parts_BT, np.asarray(grad_BT))
    assert all(np.isfinite(x) for pair in metrics.values() for x in pair)


@pytest.mark.parametrize("name", ["luspo", "luspo+terms"])
@pytest.mark.parametrize("change", ["padding", "order", "micro-batches"])
def test_one_change_at_a_time(name, change):
    objective = ALL[name]
    batch = batch_of(objective, float_case())
    denominators = denominators_of(objective, batch)
    value, grad_BT, metrics = jax.tree.map(
        np.asarray, loss_grad_metrics(objective, batch, denominators)
    )
    order = np.arange(B)
    if change == "padding":
        parts = [widened(batch, 40)]
    elif change == "order":
        order = np.array([4, 1, 5, 0, 3, 2])
        parts = [rows(batch, order)]
    else:
        parts = [rows(batch, slice(i, i + 2)) for i in range(0, B, 2)]
    results = [loss_grad_metrics(objective, part, denominators) for part in parts]
    close(sum(np.asarray(r[0]) for r in results), value)
    close(np.concatenate([r[1][:, :T] for r in results]), grad_BT[order])
    sums = jax.tree.map(lambda *x: np.sum(x), *[r[2] for r in results])
    means, expected = objectives.metric_means(sums), objectives.metric_means(metrics)
    for key in expected:
        np.testing.assert_allclose(means[key], expected[key], rtol=1e-5, atol=1e-6, err_msg=key)


def test_denominators_do_not_depend_on_padding():
    for objective in ALL.values():
        batch = batch_of(objective, float_case())
        narrow = denominators_of(objective, batch)
        wide = denominators_of(objective, widened(batch, 16))
        assert jax.tree.map(float, narrow) == jax.tree.map(float, wide)


def planted(batch, value: float):
    """The batch with `value` wherever the mask says that nothing stands."""
    mask_BT = np.asarray(batch.response_mask_BT)

    def plant(x):
        if x is None or x.dtype == bool:
            return x
        keep = mask_BT if x.ndim == 2 else mask_BT.any(axis=1)
        return np.where(keep, x, np.float32(value))

    return jax.tree.map(plant, batch)


@pytest.mark.parametrize("name", ALL)
def test_masked_positions_reach_nothing(name):
    """NaN and infinities there, in every input, leave every bit of every result as it was."""
    objective, arrays = ALL[name], float_case()
    arrays["response_mask_BT"][3] = False  # a row without a response, which has neither A nor w
    arrays["entropy_BT"] = np.where(arrays["response_mask_BT"], arrays["entropy_BT"], 0)
    clean = batch_of(objective, arrays)
    denominators = denominators_of(objective, clean)
    expected = jax.tree.map(np.asarray, loss_grad_metrics(objective, clean, denominators))
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(expected))
    for value in (np.nan, np.inf, -np.inf):
        batch = planted(clean, value)
        actual = loss_grad_metrics(objective, batch, denominators_of(objective, batch))
        jax.tree.map(np.testing.assert_array_equal, actual, expected)
    assert np.all(np.asarray(expected[1])[~arrays["response_mask_BT"]] == 0)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("empty", ["group", "batch"])
def test_fully_masked(name, empty):
    """No response, no update; and the rows that remain are treated as if they were alone."""
    objective, arrays = ALL[name], float_case()
    arrays["response_mask_BT"][3 if empty == "group" else 0 :] = False
    batch = planted(batch_of(objective, arrays), np.nan)
    denominators = denominators_of(objective, batch)
    value, grad_BT, metrics = loss_grad_metrics(objective, batch, denominators)
    means = objectives.metric_means(metrics)
    assert all(np.isfinite(mean) for mean in means.values())
    assert np.isfinite(value)
    if empty == "batch":
        assert float(value) == 0
        assert np.all(np.asarray(grad_BT) == 0)
        assert all(float(mean) == 0 for mean in means.values())
        return
    assert np.all(np.asarray(grad_BT)[3:] == 0)
    assert float(denominators.sequences) == 3


@pytest.mark.parametrize("name", ["grpo", "luspo", "dapo"])
def test_empty_rows_do_not_count(name):
    objective, arrays = ALL[name], float_case()
    arrays["response_mask_BT"][3:] = False
    alone = {key: x[:3] for key, x in arrays.items()}
    with_empty, without = whole_step(objective, arrays), whole_step(objective, alone)
    close(with_empty[0], without[0])
    close(with_empty[1][:3], without[1])


@pytest.mark.parametrize(
    ("term", "width"),
    [
        ("kl", 16),
        ("correction", 16),
        ("entropy mask", 16),
        ("off-policy mask", 16),
        ("all of them", T),
        ("all of them", 16),
        ("all of them", 40),
    ],
)
def test_luspo_with_a_per_token_term_is_a_plain_token_sum(term, width):
    """The L²/T bug: scaling by L and then taking a mean weighs rows by L²/T and counts padding."""
    changes = {
        "kl": {"kl_coef": 0.5},
        "correction": {"correction": "tis"},
        "entropy mask": {"top_entropy_quantile": 0.5},
        "off-policy mask": {"off_policy_max": 0.05},
    }
    changes["all of them"] = {k: v for change in changes.values() for k, v in change.items()}
    objective = dataclasses.replace(ALL["luspo"], **changes[term])
    arrays = float_case()
    batch = widened(batch_of(objective, arrays), width)
    value, _ = loss_grad(objective, batch, denominators_of(objective, batch))

    token_losses = []
    entropy = arrays["entropy_BT"][arrays["response_mask_BT"]]
    threshold = np.quantile(entropy, 1 - objective.top_entropy_quantile)
    for i, mask_T in enumerate(arrays["response_mask_BT"]):
        new, old, ref, sampler, entropy = (
            arrays[f"{key}_BT"][i][mask_T].astype(np.float64)
            for key in ("logprobs", "old_logprobs", "ref_logprobs", "sampler_logprobs", "entropy")
        )
        advantage = float(batch.advantages_B[i])
        s = np.exp(np.mean(new - old))
        loss_t = np.full(new.shape, -min(s * advantage, np.clip(s, 0.998, 1.0025) * advantage))
        if objective.correction == "tis":
            loss_t = loss_t * np.minimum(np.exp(old - sampler), 2)
        if objective.top_entropy_quantile < 1:
            loss_t = loss_t * (entropy >= threshold)
        if objective.off_policy_max is not None and advantage < 0:
            loss_t = loss_t * (np.mean(old - new) <= objective.off_policy_max)
        loss_t = loss_t + objective.kl_coef * (np.exp(ref - new) - (ref - new) - 1)
        token_losses.append(loss_t.sum())
    size = np.mean(np.abs(token_losses))
    assert abs(float(value) - np.mean(token_losses)) <= 1e-6 * size


def test_sequence_ratio_is_exact_enough_over_long_responses():
    """32,768 tokens in float32: the mean log ratio keeps four digits more than ε = 3e-4 needs."""
    rng = np.random.default_rng(0)
    mask_BT = np.ones((1, 32768), bool)
    old_BT = -rng.gamma(1.0, 0.5, (1, 32768)).astype(np.float32)
    logprobs_BT = (old_BT + 0.02 * rng.standard_normal((1, 32768)) + 1e-3).astype(np.float32)
    ratio = objectives.PRESETS["luspo_unclipped"]
    batch = objectives.PolicyBatch(
        logprobs_BT, old_BT, np.ones(1, np.float32), mask_BT, np.ones(1, np.float32)
    )
    value, _ = loss_grad(ratio, batch, denominators_of(ratio, batch))
    exact = np.exp((logprobs_BT.astype(np.float64) - old_BT).mean())
    assert abs(-float(value) - exact) < 3e-8 * 10
