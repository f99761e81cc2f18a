"""Estimators of KL(π ‖ π_ref) from the sampled tokens, the KL as a reward, and KLs of one token.

d = log π_ref − log π at the sampled token, clipped to ±20 (verl's bound).
"""

import jax
import jax.numpy as jnp

from luspo_jax.objectives.ratios import bounded

_LEAST_REST = 1e-8  # of 1 − p; float32 tells no p from 1 that is nearer


def k1(log_ratio_BT: jax.Array) -> jax.Array:
    """−d: unbiased, often negative. As a loss its expected gradient is 0: use k2 or k3."""
    return -log_ratio_BT


def k2(log_ratio_BT: jax.Array) -> jax.Array:
    """d²/2: its value is biased; on-policy its gradient is the KL's."""
    return log_ratio_BT**2 / 2


def k3(log_ratio_BT: jax.Array) -> jax.Array:
    """exp(d) − d − 1: its value is unbiased and never negative (Schulman 2020; GRPO Eq 4)."""
    return jnp.expm1(log_ratio_BT) - log_ratio_BT


KL_ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}


def token_kl(logprobs_BT: jax.Array, ref_logprobs_BT: jax.Array, *, kl_estimator: str) -> jax.Array:
    """Returns the estimate at every token [B, T]; inputs must be finite on masked positions."""
    return KL_ESTIMATORS[kl_estimator](bounded(ref_logprobs_BT - logprobs_BT))


def bernoulli_kl(logprobs_BT: jax.Array, other_logprobs_BT: jax.Array) -> jax.Array:
    """Returns p·log(p/q) + (1−p)·log((1−p)/(1−q)) of two log-probs of each token [B, T], in nats.

    KL(p ‖ q) of two Bernoulli distributions: the sampled token, or any other. 1 − p and 1 − q are
    at least 1e-8, so that it is finite where a float32 log-prob is 0.
    """
    rest_BT = jnp.maximum(-jnp.expm1(logprobs_BT), _LEAST_REST)
    other_rest_BT = jnp.maximum(-jnp.expm1(other_logprobs_BT), _LEAST_REST)
    kl_BT = jnp.exp(logprobs_BT) * (logprobs_BT - other_logprobs_BT)
    return kl_BT + rest_BT * jnp.log(rest_BT / other_rest_BT)


def reward_adjustment(
    old_logprobs_BT: jax.Array,
    ref_logprobs_BT: jax.Array,
    response_mask_BT: jax.Array,
    *,
    kl_coef: float,
    kl_estimator: str = "k1",
) -> jax.Array:
    """Returns −β Σ_t kl_t [B], to add to rewards before computing advantages ("KL in the reward").

    The KL is that of the old policy over response tokens; values elsewhere are ignored. It is a sum
    over tokens as in verl, so a long response pays more.
    """
    logprobs_BT = jnp.where(response_mask_BT, old_logprobs_BT, 0)
    ref_BT = jnp.where(response_mask_BT, ref_logprobs_BT, 0)
    kl_BT = token_kl(logprobs_BT, ref_BT, kl_estimator=kl_estimator)
    return -kl_coef * jnp.where(response_mask_BT, kl_BT, 0).sum(axis=1)
