"""Advantages of responses, computed from their rewards over a whole rollout batch.

Each function is `f(rewards_B, lengths_B, group_ids_B, *, hyperparameters) -> advantages_B`; no
gradient flows through it. A row of length 0 is absent: its advantage is 0, and every mean and
standard deviation leaves it out. A group whose present rewards are all equal has advantage exactly
0 (before any whitening), not the rounding error of R − mean. R_i is the reward; m and σ are the
mean and unbiased standard deviation of its group.
"""

import jax
import jax.numpy as jnp

from luspo_jax.objectives.groups import group_is_constant, group_mean, group_sum


def _centred(
    rewards_B: jax.Array, baseline_B: jax.Array, group_ids_B: jax.Array, present_B: jax.Array
) -> jax.Array:
    flat_B = group_is_constant(rewards_B, group_ids_B, present_B) | ~present_B
    return jnp.where(flat_B, 0, rewards_B - baseline_B)


def none(rewards_B: jax.Array, lengths_B: jax.Array, group_ids_B: jax.Array) -> jax.Array:
    """A = R − m: group mean, no scaling (Dr.GRPO, arXiv 2503.20783; MiniRL, 2512.01374)."""
    present_B = lengths_B > 0
    mean_B = group_mean(rewards_B, group_ids_B, present_B)
    return _centred(rewards_B, mean_B, group_ids_B, present_B)


def group_std(
    rewards_B: jax.Array,
    lengths_B: jax.Array,
    group_ids_B: jax.Array,
    *,
    advantage_epsilon: float,
) -> jax.Array:
    """A = (R − m)/(σ + ε), σ over the group with ddof 1 (GRPO, arXiv 2402.03300).

    ε is 1e-6 in verl and 1e-4 in TRL.
    """
    present_B = lengths_B > 0
    centred_B = none(rewards_B, lengths_B, group_ids_B)
    count_B = group_sum(jnp.ones_like(rewards_B), group_ids_B, present_B)
    variance_B = group_sum(centred_B**2, group_ids_B, present_B) / jnp.maximum(count_B - 1, 1)
    return centred_B / (jnp.sqrt(variance_B) + advantage_epsilon)


def batch_std(
    rewards_B: jax.Array,
    lengths_B: jax.Array,
    group_ids_B: jax.Array,
    *,
    advantage_epsilon: float,
) -> jax.Array:
    """A = (R − m)/(σ_batch + ε), the unbiased σ of all rewards in the batch (TRL, "batch")."""
    present_B = lengths_B > 0
    count = present_B.astype(rewards_B.dtype).sum()
    mean = jnp.where(present_B, rewards_B, 0).sum() / jnp.maximum(count, 1)
    squares = jnp.where(present_B, (rewards_B - mean) ** 2, 0).sum()
    deviation = jnp.sqrt(squares / jnp.maximum(count - 1, 1))
    return none(rewards_B, lengths_B, group_ids_B) / (deviation + advantage_epsilon)


def rloo(rewards_B: jax.Array, lengths_B: jax.Array, group_ids_B: jax.Array) -> jax.Array:
    """A = G/(G−1) · (R − m): each response against the mean of the others (arXiv 2402.14740)."""
    count_B = group_sum(jnp.ones_like(rewards_B), group_ids_B, lengths_B > 0)
    scale_B = count_B / jnp.maximum(count_B - 1, 1)
    return scale_B * none(rewards_B, lengths_B, group_ids_B)


def maxrl(
    rewards_B: jax.Array,
    lengths_B: jax.Array,
    group_ids_B: jax.Array,
    *,
    advantage_epsilon: float,
) -> jax.Array:
    """A = (R − m)/(m + ε): the gradient of log success rate (tajwarfahim/maxrl, ε 1e-6).

    For rewards ≥ 0. A group whose mean is not positive gets 0, so that a negative reward cannot
    flip the sign of the update.
    """
    mean_B = group_mean(rewards_B, group_ids_B, lengths_B > 0)
    centred_B = none(rewards_B, lengths_B, group_ids_B)
    positive_B = mean_B > 0
    return jnp.where(
        positive_B, centred_B / jnp.where(positive_B, mean_B + advantage_epsilon, 1), 0
    )


def opo(rewards_B: jax.Array, lengths_B: jax.Array, group_ids_B: jax.Array) -> jax.Array:
    """A = R − ΣL_jR_j/ΣL_j: the best baseline for a token-sum loss (OPO, arXiv 2505.23585)."""
    present_B = lengths_B > 0
    weighted_B = group_sum(lengths_B * rewards_B, group_ids_B, present_B)
    tokens_B = group_sum(lengths_B, group_ids_B, present_B)
    return _centred(rewards_B, weighted_B / jnp.maximum(tokens_B, 1), group_ids_B, present_B)


def reinforce_pp_baseline(
    rewards_B: jax.Array, lengths_B: jax.Array, group_ids_B: jax.Array
) -> jax.Array:
    """A = (R − m), whitened over the tokens of the batch (REINFORCE++-baseline, arXiv 2501.03262).

    Whitening is verl's: token-weighted mean and unbiased variance, 1e-8 under the root.
    """
    centred_B = none(rewards_B, lengths_B, group_ids_B)
    tokens = lengths_B.sum()
    mean = (lengths_B * centred_B).sum() / jnp.maximum(tokens, 1)
    variance = (lengths_B * (centred_B - mean) ** 2).sum() / jnp.maximum(tokens - 1, 1)
    whitened_B = (centred_B - mean) * jax.lax.rsqrt(variance + 1e-8)
    return jnp.where(lengths_B > 0, whitened_B, 0)


ADVANTAGES = {
    "none": none,
    "group-std": group_std,
    "batch-std": batch_std,
    "rloo": rloo,
    "maxrl": maxrl,
    "opo": opo,
    "reinforce-pp-baseline": reinforce_pp_baseline,
}
