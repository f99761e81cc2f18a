"""Surrogates: map a ratio and an advantage to a loss whose gradient is the update.

A surrogate takes those it needs of `log_ratio_BU`, `advantages_B1`, `logprobs_BT`,
`old_logprobs_BT` and `response_mask_BT` (by these names; U is T or 1), and its hyperparameters
after `*`. It returns a `Surrogate`. Losses are minimised; sg[·] stops the gradient; r is the ratio,
A the advantage.

Surrogates that weight log π by a constant (CISPO, VESPO, DPPO, MiniRL) have a meaningful gradient;
their value means little.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from luspo_jax.objectives.kl import bernoulli_kl
from luspo_jax.objectives.ratios import bounded, row_mean

sg = jax.lax.stop_gradient


class Surrogate(NamedTuple):
    """A loss per token or sequence, and where it is clipped.

    Attributes:
      loss_BU: the loss of each token [B, T] or sequence [B, 1].
      high_BU: bool, clipped because the ratio has risen too far (A > 0).
      low_BU: bool, clipped because the ratio has fallen too far (A < 0).
      lower_BU: bool, clipped by a second, outer bound (dual-clip's c, a cap on the weight).
    """

    loss_BU: jax.Array
    high_BU: jax.Array
    low_BU: jax.Array
    lower_BU: jax.Array


def _never(like: jax.Array) -> jax.Array:
    return jnp.zeros(like.shape, bool)


def unclipped(log_ratio_BU: jax.Array, advantages_B1: jax.Array) -> Surrogate:
    """−r·A: importance weighting alone, without clipping; the control for all clipping."""
    loss_BU = -jnp.exp(bounded(log_ratio_BU)) * advantages_B1
    return Surrogate(loss_BU, _never(loss_BU), _never(loss_BU), _never(loss_BU))


def clip(
    log_ratio_BU: jax.Array,
    advantages_B1: jax.Array,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
    delta: float | None = None,
) -> Surrogate:
    """−min(r·A, clip(r, 1−ε_low, 1+ε_high)·A) (PPO; ε_high > ε_low is DAPO's clip-higher).

    Computed as the selected branch: where min picks the clipped side, the loss is constant.
    `dual_clip` c: for A < 0 the loss is at most −c·A (Ye et al. 2019; verl, c 3, and 10 in its DAPO
    script). `delta` δ: min(min(r, δ)·A, clip(r)·A) (two-sided clipping; TRL). With δ > 1+ε_high,
    the only sensible range, it equals dual-clip with c = δ, so only one may be set.
    """
    ratio_BU = jnp.exp(bounded(log_ratio_BU))
    high_BU = (advantages_B1 > 0) & (ratio_BU > 1 + clip_high)
    low_BU = (advantages_B1 < 0) & (ratio_BU < 1 - clip_low)
    held_BU = jnp.where(high_BU, 1 + clip_high, jnp.where(low_BU, 1 - clip_low, ratio_BU))
    bound = dual_clip if delta is None else delta
    lower_BU = _never(ratio_BU)
    if bound is not None:
        lower_BU = (advantages_B1 < 0) & (ratio_BU > bound)
        held_BU = jnp.where(lower_BU, bound, held_BU)
    return Surrogate(-held_BU * advantages_B1, high_BU, low_BU, lower_BU)


def sapo(
    log_ratio_BU: jax.Array,
    advantages_B1: jax.Array,
    *,
    sapo_temperature_pos: float,
    sapo_temperature_neg: float,
) -> Surrogate:
    """−f(r)·A, f(r) = σ(τ(r−1))·4/τ: a soft gate whose slope is 1 at r = 1 (arXiv 2511.20347).

    τ is 1.0 for A > 0 and 1.05 otherwise. No token is clipped.
    """
    ratio_BU = jnp.exp(bounded(log_ratio_BU))
    dtype = ratio_BU.dtype
    tau_B1 = jnp.where(
        advantages_B1 > 0,
        jnp.asarray(sapo_temperature_pos, dtype),
        jnp.asarray(sapo_temperature_neg, dtype),
    )
    loss_BU = -jax.nn.sigmoid(tau_B1 * (ratio_BU - 1)) * (4 / tau_B1) * advantages_B1
    return Surrogate(loss_BU, _never(loss_BU), _never(loss_BU), _never(loss_BU))


def cispo(
    log_ratio_BU: jax.Array,
    advantages_B1: jax.Array,
    logprobs_BT: jax.Array,
    *,
    cispo_min_ratio: float,
    cispo_max_ratio: float,
) -> Surrogate:
    """−sg[clip(r, r_min, r_max)]·A·log π: every token keeps a gradient (arXiv 2506.13585).

    The bounds are ratios, not distances from 1: TRL's ε_high is r_max (5.0), verl's is r_max − 1.
    The paper leaves the lower side open: r_min 0.
    """
    ratio_BU = sg(jnp.exp(bounded(log_ratio_BU)))
    weight_BU = jnp.clip(ratio_BU, cispo_min_ratio, cispo_max_ratio)
    high_BU = (ratio_BU > cispo_max_ratio) & (advantages_B1 > 0)
    low_BU = (ratio_BU < cispo_min_ratio) & (advantages_B1 < 0)
    lower_BU = (weight_BU != ratio_BU) & ~high_BU & ~low_BU
    return Surrogate(-weight_BU * advantages_B1 * logprobs_BT, high_BU, low_BU, lower_BU)


def gmpo(
    log_ratio_BU: jax.Array,
    advantages_B1: jax.Array,
    response_mask_BT: jax.Array,
    *,
    gmpo_log_low: float,
    gmpo_log_high: float,
) -> Surrogate:
    """−A·exp((1/L) Σ_t d̃_t), d̃ = sgn(A)·min(sgn(A)·d, sgn(A)·clip(d, −low, high)), d = log r.

    Each token is clipped in log space, then the geometric mean is taken [B, 1] (arXiv 2507.20673;
    callsys/GMPO, 0.4 on both sides).
    """
    high_BT = (advantages_B1 > 0) & (log_ratio_BU > gmpo_log_high)
    low_BT = (advantages_B1 < 0) & (log_ratio_BU < -gmpo_log_low)
    held_BT = jnp.where(high_BT, gmpo_log_high, jnp.where(low_BT, -gmpo_log_low, log_ratio_BU))
    ratio_B1 = jnp.exp(bounded(row_mean(held_BT, response_mask_BT)))
    return Surrogate(-ratio_B1 * advantages_B1, high_BT, low_BT, _never(low_BT))


def vespo(
    log_ratio_BU: jax.Array,
    advantages_B1: jax.Array,
    logprobs_BT: jax.Array,
    *,
    vespo_k_pos: float,
    vespo_lambda_pos: float,
    vespo_k_neg: float,
    vespo_lambda_neg: float,
) -> Surrogate:
    """−sg[φ(W)]·A·log π, log φ = λ + k·log W − λ·W: a soft window on the sequence ratio W.

    φ(1) = 1. (k, λ) = (2, 3) for A ≥ 0 and (3, 2) for A < 0 (arXiv 2602.10693). Logarithms are
    clipped to ±20; TRL's floor is log 1e-8 ≈ −18.4, where φ is below 1e-14 too.
    """
    log_weight_B1 = sg(bounded(log_ratio_BU))
    dtype = log_weight_B1.dtype
    positive_B1 = advantages_B1 >= 0
    k_B1 = jnp.where(positive_B1, jnp.asarray(vespo_k_pos, dtype), jnp.asarray(vespo_k_neg, dtype))
    lambda_B1 = jnp.where(
        positive_B1, jnp.asarray(vespo_lambda_pos, dtype), jnp.asarray(vespo_lambda_neg, dtype)
    )
    phi_B1 = jnp.exp(lambda_B1 + k_B1 * log_weight_B1 - lambda_B1 * jnp.exp(log_weight_B1))
    loss_BT = -phi_B1 * advantages_B1 * logprobs_BT
    return Surrogate(loss_BT, _never(phi_B1), _never(phi_B1), _never(phi_B1))


def _trust_region(
    log_ratio_BU: jax.Array,
    advantages_B1: jax.Array,
    logprobs_BT: jax.Array,
    outside_BT: jax.Array,
    *,
    dppo_max_ratio: float,
) -> Surrogate:
    """−A·sg[min(r, C)]·log π on tokens inside the region or moving back into it."""
    ratio_BU = sg(jnp.exp(bounded(log_ratio_BU)))
    # A = 0 is treated as A < 0, as in verl; its loss is 0 either way.
    positive_B1 = advantages_B1 > 0
    high_BT = outside_BT & positive_B1 & (ratio_BU > 1)
    low_BT = outside_BT & ~positive_B1 & (ratio_BU < 1)
    lower_BT = (ratio_BU > dppo_max_ratio) & ~high_BT & ~low_BT
    weight_BT = jnp.where(high_BT | low_BT, 0, jnp.minimum(ratio_BU, dppo_max_ratio))
    return Surrogate(-weight_BT * advantages_B1 * logprobs_BT, high_BT, low_BT, lower_BT)


def dppo_tv(
    log_ratio_BU: jax.Array,
    advantages_B1: jax.Array,
    logprobs_BT: jax.Array,
    old_logprobs_BT: jax.Array,
    *,
    dppo_tv_max: float,
    dppo_max_ratio: float,
) -> Surrogate:
    """−A·sg[min(r, C)]·log π where π − π_old ≤ δ (A > 0) or ≥ −δ (otherwise), else 0.

    DPPO with the binary total variation as its trust region (arXiv 2602.04879; verl): δ 0.15, C 20.
    """
    outside_BT = jnp.abs(jnp.exp(sg(logprobs_BT)) - jnp.exp(old_logprobs_BT)) > dppo_tv_max
    return _trust_region(
        log_ratio_BU, advantages_B1, logprobs_BT, outside_BT, dppo_max_ratio=dppo_max_ratio
    )


def dppo_kl(
    log_ratio_BU: jax.Array,
    advantages_B1: jax.Array,
    logprobs_BT: jax.Array,
    old_logprobs_BT: jax.Array,
    *,
    dppo_kl_max: float,
    dppo_max_ratio: float,
) -> Surrogate:
    """As `dppo_tv`, outside where π_old·log(π_old/π) + (1−π_old)·log((1−π_old)/(1−π)) > δ.

    DPPO with the binary KL (arXiv 2602.04879; verl): δ 0.05, C 20. Only a token that has moved in
    the direction of its advantage is clipped. 1 − p is clipped at 1e-8.
    """
    outside_BT = bernoulli_kl(old_logprobs_BT, sg(logprobs_BT)) > dppo_kl_max
    return _trust_region(
        log_ratio_BU, advantages_B1, logprobs_BT, outside_BT, dppo_max_ratio=dppo_max_ratio
    )


def minirl(
    log_ratio_BU: jax.Array,
    advantages_B1: jax.Array,
    logprobs_BT: jax.Array,
    *,
    clip_low: float,
    clip_high: float,
) -> Surrogate:
    """−sg[r]·A·log π; 0 where A > 0 and r > 1+ε_high or A < 0 and r < 1−ε_low.

    MiniRL (arXiv 2512.01374), ε_high 0.27, ε_low 0.2. Its gradient is that of `clip`.
    """
    ratio_BU = sg(jnp.exp(bounded(log_ratio_BU)))
    high_BU = (advantages_B1 > 0) & (ratio_BU > 1 + clip_high)
    low_BU = (advantages_B1 < 0) & (ratio_BU < 1 - clip_low)
    weight_BU = jnp.where(high_BU | low_BU, 0, ratio_BU)
    loss_BT = -weight_BU * advantages_B1 * logprobs_BT
    return Surrogate(loss_BT, high_BU, low_BU, _never(low_BU))


def nll(advantages_B1: jax.Array, logprobs_BT: jax.Array) -> Surrogate:
    """−A·log π: with A = 1 the negative log-likelihood of demonstrations (supervised fine-tuning).

    No ratio enters and nothing is clipped: with A from rewards it is REINFORCE, right only on
    responses that the policy itself sampled.
    """
    loss_BT = -advantages_B1 * logprobs_BT
    return Surrogate(loss_BT, _never(loss_BT), _never(loss_BT), _never(loss_BT))


SURROGATES = {
    "unclipped": unclipped,
    "clip": clip,
    "sapo": sapo,
    "cispo": cispo,
    "gmpo": gmpo,
    "vespo": vespo,
    "dppo-tv": dppo_tv,
    "dppo-kl": dppo_kl,
    "minirl": minirl,
    "nll": nll,
}

# The ratios that a surrogate allows, if not all of them, and why.
SURROGATE_RATIOS = {
    "gmpo": (("token",), "it clips each token and takes the geometric mean itself"),
    "vespo": (("sequence-product",), "its weight is a function of the product of token ratios"),
    "dppo-tv": (("token",), "its trust region compares probabilities of single tokens"),
    "dppo-kl": (("token",), "its trust region compares probabilities of single tokens"),
    "cispo": (
        ("token", "sequence"),
        "the ratio's gradient is stopped, so sequence-token would be sequence, and a product of "
        "ratios is past any bound",
    ),
    "minirl": (("token", "sequence"), "the ratio's gradient is stopped"),
    "nll": (("token",), "it has no ratio; metrics are those of single tokens"),
}
