"""Importance ratios π/π_old, always as logarithms.

Every ratio reads inputs that are 0 on masked positions and returns `log_ratio_BU`: U is T for a
ratio per token, 1 for a ratio per sequence. d_it = log π(y_it) − log π_old(y_it).
"""

import jax
import jax.numpy as jnp

from luspo_jax.objectives.groups import run_totals

# Ratios are exp of a logarithm clipped to ±20 (verl's bound): e^20 ≈ 4.9e8 is far past any clip,
# and nothing overflows in float32.
LOG_RATIO_BOUND = 20.0


def bounded(log_ratio_BU: jax.Array) -> jax.Array:
    """Clips the logarithm to ±`LOG_RATIO_BOUND`, with no gradient beyond."""
    return jnp.clip(log_ratio_BU, -LOG_RATIO_BOUND, LOG_RATIO_BOUND)


def row_mean(values_BT: jax.Array, response_mask_BT: jax.Array) -> jax.Array:
    """Averages over the response tokens of each row [B, 1]; 0 for a row without any."""
    length_B1 = response_mask_BT.sum(axis=1, keepdims=True).astype(values_BT.dtype)
    total_B1 = jnp.where(response_mask_BT, values_BT, 0).sum(axis=1, keepdims=True)
    return total_B1 / jnp.maximum(length_B1, 1)


def token(logprobs_BT: jax.Array, old_logprobs_BT: jax.Array) -> jax.Array:
    """log r_it = d_it [B, T] (PPO, arXiv 1707.06347; GRPO, arXiv 2402.03300)."""
    return logprobs_BT - old_logprobs_BT


def sequence(
    logprobs_BT: jax.Array, old_logprobs_BT: jax.Array, response_mask_BT: jax.Array
) -> jax.Array:
    """log s_i = (1/L_i) Σ_t d_it [B, 1]: the geometric mean of the token ratios.

    GSPO, arXiv 2507.18071, Eq 7. Its gradient carries the factor 1/L_i that LUSPO's length scale
    cancels.
    """
    return row_mean(logprobs_BT - old_logprobs_BT, response_mask_BT)


def sequence_token(
    logprobs_BT: jax.Array, old_logprobs_BT: jax.Array, response_mask_BT: jax.Array
) -> jax.Array:
    """log s_it = sg[log s_i] + log π_it − sg[log π_it] [B, T].

    The sequence ratio in value, with the gradient of each token's own log-prob (GSPO-token, arXiv
    2507.18071, Eq 13–17).
    """
    log_ratio_B1 = sequence(logprobs_BT, old_logprobs_BT, response_mask_BT)
    return jax.lax.stop_gradient(log_ratio_B1) + (logprobs_BT - jax.lax.stop_gradient(logprobs_BT))


def sequence_product(
    logprobs_BT: jax.Array, old_logprobs_BT: jax.Array, response_mask_BT: jax.Array
) -> jax.Array:
    """log W_i = Σ_t d_it [B, 1]: the true ratio of the two sequence probabilities.

    VESPO, arXiv 2602.10693. It grows with length; the sequence ratio does not.
    """
    log_ratio_BT = bounded(logprobs_BT - old_logprobs_BT)
    return jnp.where(response_mask_BT, log_ratio_BT, 0).sum(axis=1, keepdims=True)


def segment(
    logprobs_BT: jax.Array,
    old_logprobs_BT: jax.Array,
    response_mask_BT: jax.Array,
    segment_starts_BT: jax.Array,
) -> jax.Array:
    """log r_it = mean of d over the segment of token t [B, T]: between token and sequence.

    A segment goes from one token where `segment_starts_BT` holds up to the next, or from the
    first response token. HISPO cuts where the old policy's entropy is high (KAIST 2026, Eq 11–15),
    SSPO (arXiv 2511.04256) at the ends of sentences. With no starts it is the sequence ratio's
    value, with every token a start the token ratio.
    """
    d_BT = jnp.where(response_mask_BT, logprobs_BT - old_logprobs_BT, 0)
    ones_BT = response_mask_BT.astype(d_BT.dtype)
    starts_BT = segment_starts_BT & response_mask_BT
    count_BT = run_totals(ones_BT, starts_BT, axis=1)
    return run_totals(d_BT, starts_BT, axis=1) / jnp.maximum(count_BT, 1)


RATIOS = {
    "token": token,
    "sequence": sequence,
    "sequence-token": sequence_token,
    "sequence-product": sequence_product,
    "segment": segment,
}
