"""Length scales: factors on each response's sequence-mean loss.

A scale is `w(lengths_B, group_ids_B, *, hyperparameters) -> scale_B` on floats; no gradient flows
through it. It may also take `alpha_shift`, which a run steers. It is computed over a whole rollout
or optimizer step, because some scales use mean lengths. A row of length 0 is left out of every mean
and gets a finite scale. The loss of row i becomes w_i · (1/L_i) Σ_t l_it, so w = L gives a plain
sum over tokens (LUSPO).
"""

import jax
import jax.numpy as jnp

from luspo_jax.objectives.groups import group_extremes, group_mean, group_sum


def _batch_mean(values_B: jax.Array, lengths_B: jax.Array) -> jax.Array:
    present_B = lengths_B > 0
    count = jnp.maximum(present_B.astype(values_B.dtype).sum(), 1)
    return jnp.where(present_B, values_B, 0).sum() / count


def none(lengths_B: jax.Array) -> jax.Array:
    """w = 1: every response has weight 1, each of its tokens 1/L (GRPO, GSPO)."""
    return jnp.ones_like(lengths_B)


def length(lengths_B: jax.Array) -> jax.Array:
    """w = L: every token has the same weight (LUSPO, arXiv 2602.05261, Eq 7)."""
    return lengths_B


def power(lengths_B: jax.Array, *, length_alpha: float, reference_length: float) -> jax.Array:
    """w = (L/L_ref)^α: α 0 is GSPO's weighting, α 1 with L_ref 1 is LUSPO's (ours)."""
    return (jnp.maximum(lengths_B, 1) / reference_length) ** length_alpha


def adaptive(
    lengths_B: jax.Array, alpha_shift: jax.Array, *, length_alpha: float, reference_length: float
) -> jax.Array:
    """w = (L/L_ref)^(α + shift): `power` with an exponent steered during the run (ours).

    The shift is an array, so that changing it triggers no compilation; see
    `luspo_jax.length.steering`.
    """
    return (jnp.maximum(lengths_B, 1) / reference_length) ** (length_alpha + alpha_shift)


def log(lengths_B: jax.Array, *, reference_length: float) -> jax.Array:
    """w = L_ref · log(1 + L/L_ref): about L for short responses, flatter beyond L_ref (ours)."""
    return reference_length * jnp.log1p(lengths_B / reference_length)


def capped(lengths_B: jax.Array, *, length_cap: float) -> jax.Array:
    """w = min(L, L_cap): LUSPO's weighting up to L_cap, GSPO's beyond it (ours)."""
    return jnp.minimum(lengths_B, length_cap)


def relative_group(lengths_B: jax.Array, group_ids_B: jax.Array) -> jax.Array:
    """w = L / mean of L over the prompt's responses: LUSPO within a group, mean 1 (ours)."""
    mean_B = group_mean(lengths_B, group_ids_B, lengths_B > 0)
    return lengths_B / jnp.maximum(mean_B, 1)


def relative_batch(lengths_B: jax.Array) -> jax.Array:
    """w = L / mean of L over the batch: LUSPO's direction at GSPO's magnitude (ours)."""
    return lengths_B / jnp.maximum(_batch_mean(lengths_B, lengths_B), 1)


def vl_norm(lengths_B: jax.Array, *, length_alpha: float) -> jax.Array:
    """w = L·u / mean(u), u = (L / mean L)^−α: minimum-variance weighting of token sums.

    VL-Norm (ΔL normalisation), arXiv 2509.07558; its runs use α 1 (CountDown) and 0.75 (math).
    """
    mean = jnp.maximum(_batch_mean(lengths_B, lengths_B), 1)
    u_B = (jnp.maximum(lengths_B, 1) / mean) ** -length_alpha
    mean_u = _batch_mean(u_B, lengths_B)
    # If no row is present, the mean is 0 and so is every scale.
    return lengths_B * u_B / jnp.where(mean_u > 0, mean_u, 1)


def lambda_grpo(
    lengths_B: jax.Array,
    group_ids_B: jax.Array,
    alpha_shift: jax.Array,
    *,
    length_lambda: float,
    length_lambda_spread: float,
) -> jax.Array:
    """w = G·softmax over the group of h^λ, h = 1 + r·(L − mean L)/σ_L; h at least 0.001.

    λ-GRPO, arXiv 2510.06870, where λ is learnt with the policy: λ = `length_lambda` + shift, and a
    run moves the shift along the loss (`length.lambda_rate`). λ 0 gives weights of 1; the mean over
    a group is always 1. r is not known; σ_L is the unbiased deviation of the group.
    """
    present_B = lengths_B > 0
    ones_B = jnp.ones_like(lengths_B)
    count_B = group_sum(ones_B, group_ids_B, present_B)
    gap_B = lengths_B - group_mean(lengths_B, group_ids_B, present_B)
    variance_B = group_sum(gap_B**2, group_ids_B, present_B) / jnp.maximum(count_B - 1, 1)
    spread_B = jnp.sqrt(jnp.where(variance_B > 0, variance_B, 1))
    h_B = jnp.maximum(1 + length_lambda_spread * gap_B / spread_B, 1e-3)
    score_B = h_B ** (length_lambda + alpha_shift)
    # The greatest of the group is taken off, as in any softmax: h^λ may be large.
    _, top_B = group_extremes(score_B, group_ids_B, present_B)
    mass_B = jnp.exp(score_B - jnp.where(present_B, top_B, score_B))
    total_B = group_sum(mass_B, group_ids_B, present_B)
    return count_B * mass_B / jnp.where(total_B > 0, total_B, 1)


LENGTH_SCALES = {
    "none": none,
    "length": length,
    "power": power,
    "adaptive": adaptive,
    "log": log,
    "capped": capped,
    "relative-group": relative_group,
    "relative-batch": relative_batch,
    "vl-norm": vl_norm,
    "lambda-grpo": lambda_grpo,
}
