"""Surrogates: map a ratio and an advantage to a loss whose gradient is the update.

A surrogate takes those it needs of `log_ratio_BU`, `advantages_BU`, `logprobs_BT`,
`old_logprobs_BT`, `response_mask_BT` and `band_B1`, a factor on ε (by these names; U is T or 1, for
each by itself), and its hyperparameters after `*`. It returns a `Surrogate`. Losses are minimised;
sg[·] stops the gradient; r is the ratio, A the advantage.

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


def clip_band(
    response_mask_BT: jax.Array, dtype: jnp.dtype, *, exponent: float, reference_length: float
) -> jax.Array | float:
    """Returns (L_ref/L)^β [B, 1], the factor on ε; the number 1 for β 0, which costs nothing."""
    if exponent == 0:
        return 1.0
    length_B1 = response_mask_BT.sum(axis=1, keepdims=True, dtype=jnp.int32).astype(dtype)
    return (reference_length / jnp.maximum(length_B1, 1)) ** exponent


def _never(like: jax.Array) -> jax.Array:
    return jnp.zeros(like.shape, bool)


def unclipped(log_ratio_BU: jax.Array, advantages_BU: jax.Array) -> Surrogate:
    """−r·A: importance weighting alone, without clipping; the control for all clipping."""
    loss_BU = -jnp.exp(bounded(log_ratio_BU)) * advantages_BU
    return Surrogate(loss_BU, _never(loss_BU), _never(loss_BU), _never(loss_BU))


def clip(
    log_ratio_BU: jax.Array,
    advantages_BU: jax.Array,
    band_B1: jax.Array | float = 1.0,
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

    `clip_length_exponent` β makes ε depend on length: ε_L = ε·(L_ref/L)^β, with `reference_length`
    L_ref. β 0 is one band for the mean of a response's log ratios (GSPO, LUSPO), whatever its
    length; β ½ lets their sum move by c·√L (FSPO, arXiv 2509.09177, c = ε·√L_ref; its band is on
    the logarithm, which differs by ε²/2); β 1 is one band for their sum. Band and weight are two
    things: β does not change w.
    """
    ratio_BU = jnp.exp(bounded(log_ratio_BU))
    top_B1, bottom_B1 = 1 + clip_high * band_B1, 1 - clip_low * band_B1
    high_BU = (advantages_BU > 0) & (ratio_BU > top_B1)
    low_BU = (advantages_BU < 0) & (ratio_BU < bottom_B1)
    held_BU = jnp.where(high_BU, top_B1, jnp.where(low_BU, bottom_B1, ratio_BU))
    bound = dual_clip if delta is None else delta
    lower_BU = _never(ratio_BU)
    if bound is not None:
        lower_BU = (advantages_BU < 0) & (ratio_BU > bound)
        held_BU = jnp.where(lower_BU, bound, held_BU)
    return Surrogate(-held_BU * advantages_BU, high_BU, low_BU, lower_BU)


def sapo(
    log_ratio_BU: jax.Array,
    advantages_BU: jax.Array,
    *,
    sapo_temperature_pos: float,
    sapo_temperature_neg: float,
) -> Surrogate:
    """−f(r)·A, f(r) = σ(τ(r−1))·4/τ: a soft gate whose slope is 1 at r = 1 (arXiv 2511.20347).

    τ is 1.0 for A > 0 and 1.05 otherwise. No token is clipped.
    """
    ratio_BU = jnp.exp(bounded(log_ratio_BU))
    tau_BU = _temperature(advantages_BU, sapo_temperature_pos, sapo_temperature_neg)
    loss_BU = -jax.nn.sigmoid(tau_BU * (ratio_BU - 1)) * (4 / tau_BU) * advantages_BU
    return Surrogate(loss_BU, _never(loss_BU), _never(loss_BU), _never(loss_BU))


def soft_sequence(
    log_ratio_BU: jax.Array,
    advantages_BU: jax.Array,
    response_mask_BT: jax.Array,
    *,
    sapo_temperature_pos: float,
    sapo_temperature_neg: float,
) -> Surrogate:
    """−A·exp((1/L) Σ_t log f(r_t)), f SAPO's gate: the geometric mean of softly gated ratios.

    Soft sequence policy optimisation (arXiv 2602.19327 v3, read in its abstract only): between
    GMPO, which clips each token, and SAPO, which has no sequence weight. At r = 1 its gradient is
    GSPO's. No token is clipped.
    """
    tau_BU = _temperature(advantages_BU, sapo_temperature_pos, sapo_temperature_neg)
    ratio_BT = jnp.exp(bounded(log_ratio_BU))
    gate_BT = jax.nn.log_sigmoid(tau_BU * (ratio_BT - 1)) + jnp.log(4 / tau_BU)
    weight_B1 = jnp.exp(bounded(row_mean(gate_BT, response_mask_BT)))
    loss_BU = -weight_B1 * advantages_BU
    return Surrogate(loss_BU, _never(loss_BU), _never(loss_BU), _never(loss_BU))


def _temperature(advantages_BU, positive, negative):
    dtype = advantages_BU.dtype
    return jnp.where(advantages_BU > 0, jnp.asarray(positive, dtype), jnp.asarray(negative, dtype))


def dhpo(
    log_ratio_BU: jax.Array,
    advantages_BU: jax.Array,
    response_mask_BT: jax.Array,
    *,
    clip_low: float,
    clip_high: float,
    dhpo_alpha: float,
    dhpo_sequence_low: float,
    dhpo_sequence_high: float,
) -> Surrogate:
    """α·l_token + (1−α)·l_sequence: the clipped losses of token and sequence ratio, each its band.

    DHPO (arXiv 2601.05607, known from a summary; its α is not: ½ here). The token band is
    `clip_low`, `clip_high`, the sequence's has GSPO's ε. clip fractions are those of the token
    ratio; `actor/pg_clipfrac_lower` is the sequence ratio's.
    """
    token = clip(log_ratio_BU, advantages_BU, clip_low=clip_low, clip_high=clip_high)
    whole = clip(
        row_mean(log_ratio_BU, response_mask_BT),
        advantages_BU,
        clip_low=dhpo_sequence_low,
        clip_high=dhpo_sequence_high,
    )
    loss_BT = dhpo_alpha * token.loss_BU + (1 - dhpo_alpha) * whole.loss_BU
    clipped_BT = jnp.broadcast_to(whole.high_BU | whole.low_BU, loss_BT.shape)
    return Surrogate(loss_BT, token.high_BU, token.low_BU, clipped_BT)


def cispo(
    log_ratio_BU: jax.Array,
    advantages_BU: jax.Array,
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
    high_BU = (ratio_BU > cispo_max_ratio) & (advantages_BU > 0)
    low_BU = (ratio_BU < cispo_min_ratio) & (advantages_BU < 0)
    lower_BU = (weight_BU != ratio_BU) & ~high_BU & ~low_BU
    return Surrogate(-weight_BU * advantages_BU * logprobs_BT, high_BU, low_BU, lower_BU)


def gmpo(
    log_ratio_BU: jax.Array,
    advantages_BU: jax.Array,
    response_mask_BT: jax.Array,
    *,
    gmpo_log_low: float,
    gmpo_log_high: float,
) -> Surrogate:
    """−A·exp((1/L) Σ_t d̃_t), d̃ = sgn(A)·min(sgn(A)·d, sgn(A)·clip(d, −low, high)), d = log r.

    Each token is clipped in log space, then the geometric mean is taken [B, 1] (arXiv 2507.20673;
    callsys/GMPO, 0.4 on both sides).
    """
    high_BT = (advantages_BU > 0) & (log_ratio_BU > gmpo_log_high)
    low_BT = (advantages_BU < 0) & (log_ratio_BU < -gmpo_log_low)
    held_BT = jnp.where(high_BT, gmpo_log_high, jnp.where(low_BT, -gmpo_log_low, log_ratio_BU))
    ratio_B1 = jnp.exp(bounded(row_mean(held_BT, response_mask_BT)))
    return Surrogate(-ratio_B1 * advantages_BU, high_BT, low_BT, _never(low_BT))


def vespo(
    log_ratio_BU: jax.Array,
    advantages_BU: jax.Array,
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
    positive_BU = advantages_BU >= 0
    k_BU = jnp.where(positive_BU, jnp.asarray(vespo_k_pos, dtype), jnp.asarray(vespo_k_neg, dtype))
    lambda_BU = jnp.where(
        positive_BU, jnp.asarray(vespo_lambda_pos, dtype), jnp.asarray(vespo_lambda_neg, dtype)
    )
    phi_BU = jnp.exp(lambda_BU + k_BU * log_weight_B1 - lambda_BU * jnp.exp(log_weight_B1))
    loss_BT = -phi_BU * advantages_BU * logprobs_BT
    return Surrogate(loss_BT, _never(phi_BU), _never(phi_BU), _never(phi_BU))


def _trust_region(
    log_ratio_BU: jax.Array,
    advantages_BU: jax.Array,
    logprobs_BT: jax.Array,
    outside_BT: jax.Array,
    *,
    dppo_max_ratio: float,
) -> Surrogate:
    """−A·sg[min(r, C)]·log π on tokens inside the region or moving back into it."""
    ratio_BU = sg(jnp.exp(bounded(log_ratio_BU)))
    # A = 0 is treated as A < 0, as in verl; its loss is 0 either way.
    positive_BU = advantages_BU > 0
    high_BT = outside_BT & positive_BU & (ratio_BU > 1)
    low_BT = outside_BT & ~positive_BU & (ratio_BU < 1)
    lower_BT = (ratio_BU > dppo_max_ratio) & ~high_BT & ~low_BT
    weight_BT = jnp.where(high_BT | low_BT, 0, jnp.minimum(ratio_BU, dppo_max_ratio))
    return Surrogate(-weight_BT * advantages_BU * logprobs_BT, high_BT, low_BT, lower_BT)


def dppo_tv(
    log_ratio_BU: jax.Array,
    advantages_BU: jax.Array,
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
        log_ratio_BU, advantages_BU, logprobs_BT, outside_BT, dppo_max_ratio=dppo_max_ratio
    )


def dppo_kl(
    log_ratio_BU: jax.Array,
    advantages_BU: jax.Array,
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
        log_ratio_BU, advantages_BU, logprobs_BT, outside_BT, dppo_max_ratio=dppo_max_ratio
    )


def minirl(
    log_ratio_BU: jax.Array,
    advantages_BU: jax.Array,
    logprobs_BT: jax.Array,
    *,
    clip_low: float,
    clip_high: float,
) -> Surrogate:
    """−sg[r]·A·log π; 0 where A > 0 and r > 1+ε_high or A < 0 and r < 1−ε_low.

    MiniRL (arXiv 2512.01374), ε_high 0.27, ε_low 0.2. Its gradient is that of `clip`.
    """
    ratio_BU = sg(jnp.exp(bounded(log_ratio_BU)))
    high_BU = (advantages_BU > 0) & (ratio_BU > 1 + clip_high)
    low_BU = (advantages_BU < 0) & (ratio_BU < 1 - clip_low)
    weight_BU = jnp.where(high_BU | low_BU, 0, ratio_BU)
    loss_BT = -weight_BU * advantages_BU * logprobs_BT
    return Surrogate(loss_BT, high_BU, low_BU, _never(low_BU))


def nll(advantages_BU: jax.Array, logprobs_BT: jax.Array) -> Surrogate:
    """−A·log π: with A = 1 the negative log-likelihood of demonstrations (supervised fine-tuning).

    No ratio enters and nothing is clipped: with A from rewards it is REINFORCE, right only on
    responses that the policy itself sampled.
    """
    loss_BT = -advantages_BU * logprobs_BT
    return Surrogate(loss_BT, _never(loss_BT), _never(loss_BT), _never(loss_BT))


SURROGATES = {
    "unclipped": unclipped,
    "clip": clip,
    "sapo": sapo,
    "soft-sequence": soft_sequence,
    "dhpo": dhpo,
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
    "soft-sequence": (("token",), "it gates each token and takes the geometric mean itself"),
    "dhpo": (("token",), "it takes the sequence ratio from the token ratios itself"),
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
