"""Advantages of responses, computed from their rewards over a whole rollout batch.

Each function is `f(rewards_B, lengths_B, group_ids_B, *, hyperparameters) -> advantages_B`; no
gradient flows through it. It may also take, by name, the parts of the rewards (`parts_BM`,
`part_weights_M`), or `response_mask_BT`, `logprobs_BT`, `collision_BT` and `weight_BT` of the
tokens, and then returns an advantage of each token [B, T] (`TOKEN_ADVANTAGES`). A row of length 0
is absent: its advantage is 0, and every mean and standard deviation leaves it out. A group whose
present rewards are all equal has advantage exactly 0 (before any whitening), not the rounding error
of R − mean. R_i is the reward; m and σ are the mean and unbiased standard deviation of its group.
"""

import jax
import jax.numpy as jnp

from luspo_jax.objectives.groups import (
    group_is_constant,
    group_mean,
    group_sum,
    group_token_sum,
)


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


def gdpo(
    rewards_B: jax.Array,
    lengths_B: jax.Array,
    group_ids_B: jax.Array,
    parts_BM: jax.Array,
    part_weights_M: jax.Array,
    *,
    advantage_epsilon: float,
) -> jax.Array:
    """A = (s − mean s)/(σ(s) + ε), s = Σ_m λ_m (r^m − μ^m)/(σ^m + ε): each part by itself.

    μ^m and σ^m are of the group, mean and σ of s of the batch; λ_m are the parts' weights. GDPO,
    arXiv 2601.05242; as in TRL's "normalize_then_sum" (ε 1e-4 there). In a sum of rewards a part
    with small variance, often length, vanishes, and one with large variance drowns the rest.
    """
    present_B = lengths_B > 0
    standard = [
        group_std(parts_BM[:, m], lengths_B, group_ids_B, advantage_epsilon=advantage_epsilon)
        for m in range(parts_BM.shape[1])
    ]
    score_B = jnp.stack(standard, axis=1) @ part_weights_M
    count = present_B.astype(score_B.dtype).sum()
    mean = jnp.where(present_B, score_B, 0).sum() / jnp.maximum(count, 1)
    squares = jnp.where(present_B, (score_B - mean) ** 2, 0).sum()
    deviation = jnp.sqrt(squares / jnp.maximum(count - 1, 1))
    return jnp.where(present_B, (score_B - mean) / (deviation + advantage_epsilon), 0)


def otb(
    rewards_B: jax.Array,
    lengths_B: jax.Array,
    group_ids_B: jax.Array,
    response_mask_BT: jax.Array,
    logprobs_BT: jax.Array,
    collision_BT: jax.Array,
    weight_BT: jax.Array,
    *,
    otb_zero_tail: bool,
) -> jax.Array:
    """A_t = R − B_t [B, T], B = Σ_i R_i W_i / Σ_i W_i, W_t = Σ_{j≤t} ρ_j² (1 − 2π_j + Σ_v π_v²).

    The optimal token baseline (arXiv 2602.07078; verl's core_algos). 1 − 2π + Σπ² stands for the
    squared norm of a token's score, so W is the variance gathered so far, and sums run over the
    responses of the group that are still going on at t; OPO is W = L. ρ is the weight of a token
    under truncated importance sampling, 1 without. Where only the longest response is left, B is
    its own reward and A is 0; with `otb_zero_tail` B is 0 there and A is R, also in a group whose
    rewards are all equal: it lengthens what is right (verl has had both as its default).
    """
    pi_BT = jnp.exp(logprobs_BT)
    energy_BT = (1 - 2 * pi_BT + collision_BT) * weight_BT**2
    total_BT = jnp.cumsum(jnp.where(response_mask_BT, energy_BT, 0), axis=1)
    place = group_ids_B, response_mask_BT
    # Centred on the group's mean first, so that equal rewards leave exactly 0.
    centred_B = none(rewards_B, lengths_B, group_ids_B)
    above_BT = group_token_sum(total_BT * centred_B[:, None], *place)
    below_BT = group_token_sum(total_BT, *place)
    alone_BT = group_token_sum(jnp.ones_like(total_BT), *place) < 2
    baseline_BT = above_BT / jnp.where(below_BT > 0, below_BT, 1)
    tail_B = rewards_B if otb_zero_tail else jnp.zeros_like(rewards_B)
    result_BT = jnp.where(alone_BT, tail_B[:, None], centred_B[:, None] - baseline_BT)
    return jnp.where(response_mask_BT, result_BT, 0)


ADVANTAGES = {
    "none": none,
    "group-std": group_std,
    "batch-std": batch_std,
    "rloo": rloo,
    "maxrl": maxrl,
    "opo": opo,
    "reinforce-pp-baseline": reinforce_pp_baseline,
    "gdpo": gdpo,
    "otb": otb,
}
TOKEN_ADVANTAGES = ("otb",)
