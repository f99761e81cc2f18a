"""Corrections for a mismatch between sampler and trainer, and masks for stale sequences.

ρ_t = π_old(y_t) / π_sampler(y_t), with π_old from the trainer's own forward pass; of tokens that
an earlier policy sampled, `Objective.old_policy` says what π_old is. A correction takes those it
needs of `log_rho_BT`, `response_mask_BT`, `old_logprobs_BT`, `sampler_logprobs_BT` and the scalar
`m2po_threshold` (by these names), and its hyperparameters after `*`. It returns `weight_BU`, which
multiplies the policy loss of each token (U = T) or sequence (U = 1) and carries no gradient; weight
0 drops the unit. Dropped units stay in every denominator. Corrections joined with "+" multiply:
"geometric-mask+tis".

LUSPO's own ratio is a geometric mean of π/π_old. The sequence corrections here use products of
π_old/π_sampler, a different quantity.
"""

import jax
import jax.numpy as jnp

from luspo_jax.objectives.kl import bernoulli_kl
from luspo_jax.objectives.ratios import bounded, row_mean


def _product(log_rho_BT: jax.Array, response_mask_BT: jax.Array) -> jax.Array:
    """Returns Π_t ρ_t [B, 1], its logarithm clipped to ±20."""
    log_rho_B1 = jnp.where(response_mask_BT, log_rho_BT, 0).sum(axis=1, keepdims=True)
    return jnp.exp(bounded(log_rho_B1))


def none(log_rho_BT: jax.Array) -> jax.Array:
    """1: measures the mismatch without correcting it."""
    return jnp.ones_like(log_rho_BT)


def tis(log_rho_BT: jax.Array, *, tis_max: float) -> jax.Array:
    """min(ρ_t, C) [B, T]: truncated importance sampling, C 2 (Yao et al. 2025; verl)."""
    return jnp.minimum(jnp.exp(bounded(log_rho_BT)), tis_max)


def icepop(log_rho_BT: jax.Array, *, icepop_low: float, icepop_high: float) -> jax.Array:
    """ρ_t if inside [low, high], else 0 [B, T]: IcePop, token-level MIS; [0.5, 5] or [0.5, 2]."""
    rho_BT = jnp.exp(bounded(log_rho_BT))
    return jnp.where((rho_BT >= icepop_low) & (rho_BT <= icepop_high), rho_BT, 0)


def sequence_tis(
    log_rho_BT: jax.Array, response_mask_BT: jax.Array, *, sequence_tis_max: float
) -> jax.Array:
    """min(Π_t ρ_t, C) [B, 1]. The product collapses beyond about 9k tokens."""
    return jnp.minimum(_product(log_rho_BT, response_mask_BT), sequence_tis_max)


def sequence_mis(
    log_rho_BT: jax.Array,
    response_mask_BT: jax.Array,
    *,
    sequence_mis_low: float,
    sequence_mis_high: float,
) -> jax.Array:
    """Π_t ρ_t if inside [low, high], else 0 [B, 1]; default [0.5, 2] as in IcePop, unconfirmed."""
    rho_B1 = _product(log_rho_BT, response_mask_BT)
    return jnp.where((rho_B1 >= sequence_mis_low) & (rho_B1 <= sequence_mis_high), rho_B1, 0)


def geometric_mask(
    log_rho_BT: jax.Array,
    response_mask_BT: jax.Array,
    *,
    geometric_low: float,
    geometric_high: float,
) -> jax.Array:
    """1 if exp(mean_t log ρ_t) is inside [0.99, 1.01], else 0 [B, 1]: the choice for 32k tokens."""
    rho_B1 = jnp.exp(bounded(row_mean(log_rho_BT, response_mask_BT)))
    keep_B1 = (rho_B1 >= geometric_low) & (rho_B1 <= geometric_high)
    return keep_B1.astype(log_rho_BT.dtype)


def k3_mask(log_rho_BT: jax.Array, response_mask_BT: jax.Array, *, k3_max: float) -> jax.Array:
    """1 if mean_t (ρ_t − log ρ_t − 1) ≤ max, else 0 [B, 1].

    Unlike the geometric mean, k3 does not cancel between tokens. Bounds in use are 1e-3 … 1e-2; the
    best is unconfirmed, so the default is the mildest, 1e-2.
    """
    log_rho_BT = bounded(log_rho_BT)
    k3_B1 = row_mean(jnp.expm1(log_rho_BT) - log_rho_BT, response_mask_BT)
    return (k3_B1 <= k3_max).astype(log_rho_BT.dtype)


def binary_kl(
    old_logprobs_BT: jax.Array, sampler_logprobs_BT: jax.Array, *, binary_kl_max: float
) -> jax.Array:
    """1 if KL_b(π_old ‖ π_sampler) and KL_b(π_sampler ‖ π_old) are both ≤ φ, else 0 [B, T].

    KL_b(p ‖ q) = p·log(p/q) + (1−p)·log((1−p)/(1−q)), in nats: unlike ρ, it tells 0.9 against 0.45
    from 0.002 against 0.001. KPop (ringtech.notion.site/kpop; AReaL); Intern-S2, Eq 12–13. φ is 2
    in AReaL's example and unconfirmed elsewhere. AReaL and Intern-S2 weigh the tokens kept by a
    ratio, too: "binary-kl+tis". 1 − p is at least 1e-8.
    """
    forward_BT = bernoulli_kl(old_logprobs_BT, sampler_logprobs_BT)
    backward_BT = bernoulli_kl(sampler_logprobs_BT, old_logprobs_BT)
    keep_BT = (forward_BT <= binary_kl_max) & (backward_BT <= binary_kl_max)
    return keep_BT.astype(old_logprobs_BT.dtype)


def m2po(log_rho_BT: jax.Array, m2po_threshold: jax.Array, *, m2po_max: float) -> jax.Array:
    """0 for the largest (log ρ_t)² of the step, so that the mean of the others is ≤ τ, else 1.

    Second-moment trust policy optimisation (arXiv 2510.01161, τ 0.04), [B, T]. All response tokens
    of the optimizer step compete, whatever the micro-batches; equal ones are dropped together, so
    that the mean is never above τ and order does not matter. As in AReaL, ρ is of the policy that
    starts the step; the paper has the ratio π/π_sampler of each update, and in its last version
    (openreview IIgl5MWelz) only tokens whose ratio has moved with their advantage compete.
    """
    # None within τ is ever among the dropped, whatever rounding does to a mean close to τ.
    keep_BT = (jnp.abs(log_rho_BT) <= m2po_threshold) | (log_rho_BT**2 <= m2po_max)
    return keep_BT.astype(log_rho_BT.dtype)


CORRECTIONS = {
    "none": none,
    "tis": tis,
    "icepop": icepop,
    "sequence-tis": sequence_tis,
    "sequence-mis": sequence_mis,
    "geometric-mask": geometric_mask,
    "k3-mask": k3_mask,
    "binary-kl": binary_kl,
    "m2po": m2po,
}


def m2po_threshold(
    log_rho_BT: jax.Array, response_mask_BT: jax.Array, *, m2po_max: float
) -> jax.Array:
    """Returns the |log ρ| above which `m2po` drops a token, over all response tokens passed in.

    It is the number just below the smallest that goes; the largest number if all stay.
    """
    size_N = jnp.where(response_mask_BT, jnp.abs(log_rho_BT), jnp.inf).reshape(-1)
    size_N = jnp.sort(size_N)
    counts_N = jnp.arange(1, size_N.size + 1, dtype=size_N.dtype)
    too_far_N = jnp.cumsum(size_N**2) / counts_N > m2po_max
    smallest = jnp.where(too_far_N, size_N, jnp.inf).min(initial=jnp.inf)
    # Not the largest that stays: it may be larger by its rounding where the loss is in float64.
    return jnp.nextafter(smallest, jnp.zeros_like(smallest))


def off_policy_keep(
    logprobs_BT: jax.Array,
    behaviour_logprobs_BT: jax.Array,
    advantages_B1: jax.Array,
    response_mask_BT: jax.Array,
    *,
    off_policy_max: float,
) -> jax.Array:
    """False [B, 1] if A < 0 and mean_t(log π_old − log π) > δ: drops stale negatives.

    Off-policy sequence mask (DeepSeek-V3.2, arXiv 2512.02556), δ 0.5.
    """
    drift_B1 = row_mean(behaviour_logprobs_BT - logprobs_BT, response_mask_BT)
    return (advantages_B1 >= 0) | (drift_B1 <= off_policy_max)


def entropy_threshold(
    entropy_BT: jax.Array, response_mask_BT: jax.Array, *, top_entropy_quantile: float
) -> jax.Array:
    """Returns the entropy threshold of the top share ρ of response tokens.


    It is the (1 − ρ) quantile, linearly interpolated, over all response tokens passed in; −inf if
    there are none (arXiv 2506.01939, ρ 0.2).
    """
    entropy_N = jnp.where(response_mask_BT, entropy_BT, jnp.nan).reshape(-1)
    threshold = jnp.nanquantile(entropy_N, 1 - top_entropy_quantile)
    return jnp.where(jnp.isnan(threshold), -jnp.inf, threshold)
