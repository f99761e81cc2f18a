"""Metrics of the policy loss, as sums and counts that add up over micro-batches.

Each starts as a pair of vectors: a row's contribution to the sum and to the count. A per-token
quantity takes one pass over [B, T], a per-sequence one none: next to the model both cost nothing.
"""

import jax
import jax.numpy as jnp

from luspo_jax.objectives.ratios import bounded
from luspo_jax.objectives.surrogates import Surrogate

Metrics = dict[str, tuple[jax.Array, jax.Array]]

OLDEST = 4  # from this age on, tokens share a bin


def token_sums(values_BU: jax.Array, response_mask_BT: jax.Array) -> jax.Array:
    """Sums over the response tokens of each row [B]; a [B, 1] value counts once per token."""
    if values_BU.shape[1] == response_mask_BT.shape[1]:
        return jnp.where(response_mask_BT, values_BU, 0).sum(axis=1)
    length_B = response_mask_BT.sum(axis=1, dtype=jnp.int32).astype(values_BU.dtype)
    return values_BU[:, 0] * length_B


def unit_sums(
    values_BU: jax.Array, response_mask_BT: jax.Array, lengths_B: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns (sum, count) per row: over tokens for [B, T], sequences for [B, 1], as in TRL."""
    if values_BU.shape[1] == response_mask_BT.shape[1]:
        return token_sums(values_BU, response_mask_BT), lengths_B
    present_B = lengths_B > 0
    return jnp.where(present_B, values_BU[:, 0], 0), present_B.astype(lengths_B.dtype)


def in_length_bin(lengths_B: jax.Array, bin_edges: tuple[int, ...]) -> jax.Array:
    """Returns bool [B, bins]: bin k is (edge k−1, edge k]; the last bin is open."""
    edges = jnp.asarray(bin_edges, lengths_B.dtype)
    place_B = (lengths_B[:, None] > edges[None, :]).sum(axis=1)
    return place_B[:, None] == jnp.arange(len(bin_edges) + 1, dtype=place_B.dtype)[None, :]


def ratio_metrics(
    surrogate: Surrogate,
    log_ratio_BU: jax.Array,
    drift_BT: jax.Array,
    advantages_BU: jax.Array,
    response_mask_BT: jax.Array,
    bin_edges: tuple[int, ...] = (),
) -> Metrics:
    """Measures how far the policy has moved and how much is clipped; pairs of vectors [B].

    `drift_BT` is log π_old − log π; its square is reported for tokens and for sequences whatever
    the objective's ratios, so that objectives can be compared. pg_clipfrac is a share of tokens, as
    in verl; clip_ratio/* is a share of the objective's ratios (tokens or sequences), as in TRL.
    With `bin_edges` the clip fractions of positive and negative advantages are also reported by
    length bin.
    """
    dtype, mask_BT = drift_BT.dtype, response_mask_BT
    lengths_B = mask_BT.sum(axis=1, dtype=jnp.int32).astype(dtype)
    high_BU, low_BU, lower_BU = (x.astype(dtype) for x in surrogate[1:])
    high_B, low_B = token_sums(high_BU, mask_BT), token_sums(low_BU, mask_BT)
    units_high_B, units_B = unit_sums(high_BU, mask_BT, lengths_B)
    units_low_B, _ = unit_sums(low_BU, mask_BT, lengths_B)
    deviation_BU = jnp.abs(jnp.expm1(bounded(log_ratio_BU)))
    drift_BT = bounded(drift_BT)
    drift_B, present_B = token_sums(drift_BT, mask_BT), (lengths_B > 0).astype(dtype)
    # Only A > 0 is clipped on the high side and only A < 0 on the low side, by construction.
    positive_B = token_sums((advantages_BU > 0).astype(dtype), mask_BT)
    negative_B = token_sums((advantages_BU < 0).astype(dtype), mask_BT)
    binned = {}
    if bin_edges:
        in_bin_BK = in_length_bin(mask_BT.sum(axis=1, dtype=jnp.int32), bin_edges).astype(dtype)
        for k in range(len(bin_edges) + 1):
            in_bin_B = in_bin_BK[:, k]
            binned[f"actor/clipfrac/pos/bin_{k}"] = (high_B * in_bin_B, positive_B * in_bin_B)
            binned[f"actor/clipfrac/neg/bin_{k}"] = (low_B * in_bin_B, negative_B * in_bin_B)
    return {
        **binned,
        "actor/ppo_kl": (drift_B, lengths_B),
        "actor/log_ratio_squared/token": (token_sums(drift_BT**2, mask_BT), lengths_B),
        "actor/log_ratio_squared/sequence": (
            (drift_B / jnp.maximum(lengths_B, 1)) ** 2,
            present_B,
        ),
        "actor/ratio_deviation": unit_sums(deviation_BU, mask_BT, lengths_B),
        "actor/pg_clipfrac": (high_B + low_B, lengths_B),
        "actor/pg_clipfrac_lower": (token_sums(lower_BU, mask_BT), lengths_B),
        "actor/clipfrac/pos": (high_B, positive_B),
        "actor/clipfrac/neg": (low_B, negative_B),
        "clip_ratio/high_mean": (units_high_B, units_B),
        "clip_ratio/low_mean": (units_low_B, units_B),
        "clip_ratio/region_mean": (units_high_B + units_low_B, units_B),
    }


def mismatch_metrics(log_rho_BT: jax.Array, response_mask_BT: jax.Array) -> Metrics:
    """Measures how far the sampler is from the trainer, under verl's names; ρ = π_old/π_sampler."""
    log_rho_BT = bounded(log_rho_BT)
    lengths_B = response_mask_BT.sum(axis=1, dtype=jnp.int32).astype(log_rho_BT.dtype)
    log_rho_B = token_sums(log_rho_BT, response_mask_BT)
    k3_B = token_sums(jnp.expm1(log_rho_BT), response_mask_BT) - log_rho_B
    present_B = (lengths_B > 0).astype(log_rho_BT.dtype)
    return {
        "rollout_corr/kl": (-log_rho_B, lengths_B),
        "rollout_corr/k3_kl": (k3_B, lengths_B),
        "rollout_corr/log_ppl_abs_diff": (
            jnp.abs(log_rho_B) / jnp.maximum(lengths_B, 1),
            present_B,
        ),
    }


def weight_metrics(weight_BU: jax.Array, response_mask_BT: jax.Array) -> Metrics:
    """Reports a correction's weights and the share of tokens and sequences it drops."""
    lengths_B = response_mask_BT.sum(axis=1, dtype=jnp.int32).astype(weight_BU.dtype)
    dropped_B = token_sums((weight_BU == 0).astype(weight_BU.dtype), response_mask_BT)
    present_B = lengths_B > 0
    whole_B = (dropped_B == lengths_B) & present_B
    return {
        "rollout_corr/weight": (token_sums(weight_BU, response_mask_BT), lengths_B),
        "rollout_corr/weight_squared": (token_sums(weight_BU**2, response_mask_BT), lengths_B),
        "rollout_corr/masked_fraction": (dropped_B, lengths_B),
        "rollout_corr/masked_sequences": (
            whole_B.astype(weight_BU.dtype),
            present_B.astype(weight_BU.dtype),
        ),
    }


def staleness_metrics(
    ages_BT: jax.Array,
    log_ratio_BU: jax.Array,
    clipped_BU: jax.Array,
    log_rho_BT: jax.Array,
    log_weight_BT: jax.Array,
    response_mask_BT: jax.Array,
) -> Metrics:
    """Measures tokens by age; pairs of vectors [B].

    Bin k < `OLDEST` holds the tokens of age k, the last bin those of age `OLDEST` and more. All are
    means over the tokens of a bin; `metric_means` makes the effective sample size of the weights.

    Args:
      ages_BT: integer steps that the policy took between sampling a token and this step.
      log_ratio_BU: the objective's ratio, of tokens or sequences.
      clipped_BU: bool, where the surrogate is clipped.
      log_rho_BT: log π_old/π_sampler.
      log_weight_BT: log π/π_sampler, the whole ratio to the policy that sampled.
      response_mask_BT: bool.
    """
    dtype, shape = log_rho_BT.dtype, response_mask_BT.shape
    lengths_B = response_mask_BT.sum(axis=1, dtype=jnp.int32).astype(dtype)
    bins_BT = jnp.minimum(ages_BT, OLDEST)
    weight_BT = jnp.exp(bounded(log_weight_BT))
    means_BT = {
        "ratio": jnp.broadcast_to(jnp.exp(bounded(log_ratio_BU)), shape),
        "clipfrac": jnp.broadcast_to(clipped_BU.astype(dtype), shape),
        "kl": -bounded(log_rho_BT),
        "weight": weight_BT,
        "weight_squared": weight_BT**2,
    }
    pairs: Metrics = {}
    for age in range(OLDEST + 1):
        in_bin_BT = response_mask_BT & (bins_BT == age)
        count_B = in_bin_BT.sum(axis=1, dtype=jnp.int32).astype(dtype)
        pairs[f"staleness/share/age_{age}"] = count_B, lengths_B
        for name, values_BT in means_BT.items():
            pairs[f"staleness/{name}/age_{age}"] = token_sums(values_BT, in_bin_BT), count_B
    return pairs


def sum_rows(pairs: Metrics) -> Metrics:
    """Sums pairs of vectors over rows to (sum, count) scalars."""
    return {name: (total.sum(), count.sum()) for name, (total, count) in pairs.items()}


def metric_means(metrics: Metrics) -> dict[str, jax.Array]:
    """Returns means from summed (sum, count) pairs; 0 where the count is 0.

    Each mean square of weights is replaced by their effective sample size (Σw)²/(n Σw²) as a share
    of n tokens: `rollout_corr/ess`, and `staleness/ess/age_k` of each age. It is not a mean, so it
    is computed here, after all micro-batches are added up.
    """
    means = {
        name: jnp.where(count > 0, total / jnp.where(count > 0, count, 1), 0)
        for name, (total, count) in metrics.items()
    }
    for name in [name for name in means if "/weight_squared" in name]:
        square, weight = means.pop(name), means[name.replace("/weight_squared", "/weight")]
        positive = square > 0
        ess = weight**2 / jnp.where(positive, square, 1)
        means[name.replace("/weight_squared", "/ess")] = jnp.where(positive, ess, 0)
    return means
