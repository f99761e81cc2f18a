"""Length pressure: which way an objective pushes the mean response length, before it moves.

To first order, a change Δθ of the policy changes the mean of x over its own responses by

    dE[x] = ⟨∇E[x], Δθ⟩ = Cov(x_i, ∂ log π(y_i)/∂θ · Δθ),

where x is the length for length pressure and the reward for reward pressure. Estimating both the
covariance and Δθ from one set of responses inflates the result, so the responses to each prompt are
split into halves:

    half A   v = Σ_i a_i ∇ log π(y_i),  a_i = (x_i − mean of i's half-group)/(n − 1) · n/N
    half B   δ_it = ∂ log π(y_it)/∂θ · v
    any objective's pressure = −Σ_{it ∈ B} (∂loss/∂log π_it) · δ_it

and the halves are swapped. v is an unbiased estimate of ∇E[x] over these prompts, and the halves
are independent given the prompts. So each pressure is an unbiased estimate of the change of E[x]
per unit of learning rate of plain gradient descent on that objective. v and δ do not depend on the
objective: one gradient and one directional derivative serve all. A pressure is a sum over
responses, so it splits by length and by the sign of the advantage.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from luspo_jax import objectives
from luspo_jax.objectives import Objective
from luspo_jax.objectives.groups import group_mean, group_sum

# (params, rows) → logprobs_BT of the response tokens
Logprobs = Callable[[Any, Any], jax.Array]


class Candidate(NamedTuple):
    """An objective whose pressure is measured.

    Attributes:
      name: of the measurement.
      objective: the objective.
      reward: key of `Half.other_rewards`, for other rewards than the run's; empty for those.
    """

    name: str
    objective: Objective
    reward: str = ""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Half:
    """Half of the responses to each prompt.

    Attributes:
      rows: the input of `compute(params, rows)`, each leaf with B leading.
      response_mask_BT: bool, true on response tokens.
      rewards_B: rewards.
      group_ids_B: integers, equal for responses to one prompt.
      trained_B: bool, whether the response carries gradient; None for all. The others still count
        in the gradients of mean length and reward.
      end_logprobs_BT: log-probs of the policy at the end of the step; if given, every objective is
        also measured with the ratios of the step's last updates, so that clipping shows.
      other_rewards: name → rewards [B] in place of `rewards_B`. A reward that compares responses
        must compare those of this half alone, or the halves are not independent.
      parts: the parts of the rewards by the same names, "" for those of `rewards_B`; for the
        advantage "gdpo".
      collision_BT: Σ_v π_v² of the policy that sampled; for the advantage "otb".
      segment_starts_BT: bool, for the ratio "segment".
    """

    rows: Any
    response_mask_BT: jax.Array
    rewards_B: jax.Array
    group_ids_B: jax.Array
    trained_B: jax.Array | None = None
    end_logprobs_BT: jax.Array | None = None
    other_rewards: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
    parts: dict[str, objectives.RewardParts] = dataclasses.field(default_factory=dict)
    collision_BT: jax.Array | None = None
    segment_starts_BT: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pressure:
    """First-order effect of one unit of learning rate of gradient descent on an objective.

    Attributes:
      length: change of the mean response length, tokens.
      reward: change of the mean reward.
      length_pos: the part of `length` from responses (tokens) with A > 0.
      length_neg: the part from responses (tokens) with A < 0.
      length_bins: the part from each length bin [bins].
      gradient_share: each length bin's share of Σ|∂loss/∂log π_it| [bins].
      mass: Σ|∂loss/∂log π_it|; `length / mass` does not change with the size of the loss.
    """

    length: jax.Array
    reward: jax.Array
    length_pos: jax.Array
    length_neg: jax.Array
    length_bins: jax.Array
    gradient_share: jax.Array
    mass: jax.Array


def halves(group_ids_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the rows of halves A and B: a group's responses alternate, less an odd last one.

    Raises:
      ValueError: a group has fewer than four responses, so its halves cannot be compared.
    """
    first, second = [], []
    for group in np.unique(group_ids_B):
        rows = np.flatnonzero(group_ids_B == group)
        if len(rows) < 4:
            raise ValueError(
                f"length pressure halves each group and compares inside each half: a group of "
                f"{len(rows)} responses is too small, 4 is the least"
            )
        even = len(rows) // 2 * 2
        first.append(rows[:even:2])
        second.append(rows[1:even:2])
    return np.concatenate(first), np.concatenate(second)


def cross_fitted(
    compute: Logprobs,
    params: Any,
    half_a: Half,
    half_b: Half,
    *,
    objectives: Sequence[tuple],
    bin_edges: tuple[int, ...] = (),
    num_parts: int = 1,
    alpha_shift: jax.Array | float = 0.0,
) -> dict[str, Pressure]:
    """Returns the length and reward pressure of each objective, averaged over both swaps of halves.

    Only the policy term of an objective counts: KL, entropy and corrections are left out.

    Args:
      compute: log-probs of a half's rows, differentiable in the parameters.
      params: the policy that sampled.
      half_a: half of each group.
      half_b: the other half, of equal size.
      objectives: `Candidate`s, or (name, objective) pairs.
      bin_edges: ascending lengths in tokens; bin k holds lengths above edge k−1 up to edge k.
      num_parts: pieces of a half, computed one after another to bound memory.
      alpha_shift: for objectives whose length scale is adaptive.

    Returns:
      name → Pressure with all ratios 1, and name/end if the halves have `end_logprobs_BT`.
    """
    seen = [_derivatives(compute, params, half, num_parts) for half in (half_a, half_b)]
    results = []
    for (_, direction), (logprobs_BT, _), half in (
        (seen[0], seen[1], half_b),
        (seen[1], seen[0], half_a),
    ):
        delta = _along(compute, params, direction, half, num_parts)
        found = {}
        for candidate in objectives:
            name, objective, reward = Candidate(*candidate)
            ends = {name: logprobs_BT}
            if half.end_logprobs_BT is not None:
                ends[f"{name}/end"] = half.end_logprobs_BT
            for label, at_BT in ends.items():
                slope_BT, advantages_BU = coefficients(
                    objective, half, at_BT, logprobs_BT, alpha_shift, reward=reward
                )
                found[label] = of_half(half, slope_BT, advantages_BU, *delta, bin_edges)
        results.append(found)
    return jax.tree.map(lambda a, b: (a + b) / 2, *results)


def half_logprobs(compute: Logprobs, params: Any, half: Half, *, num_parts: int = 1) -> jax.Array:
    """Computes log-probs of a half's rows [B, T], without gradients."""
    parts = _split(half.rows, num_parts)
    _, logprobs = jax.lax.scan(lambda _, rows: (None, compute(params, rows)), None, parts)
    return logprobs.reshape(-1, *logprobs.shape[2:])


def taken(
    compute: Logprobs, params: Any, change: Any, half: Half, *, num_parts: int = 1
) -> tuple[jax.Array, jax.Array]:
    """Returns ⟨∇E[L], Δθ⟩ and ⟨∇E[R], Δθ⟩ of a past change, in tokens and in reward.

    Σ_i a_i ⟨∇ log π(y_i), Δθ⟩: one directional derivative gives both.

    Args:
      compute: log-probs of rows.
      params: the policy after the change, which sampled `half`: the estimate is then independent
        of the samples that made the change.
      change: Δθ, as `params`.
      half: whole groups.
      num_parts: pieces of the rows, computed one after another.
    """
    (delta_BT,) = _along(compute, params, (change,), half, num_parts)
    delta_B = jnp.where(half.response_mask_BT, delta_BT, 0).sum(axis=1)
    return tuple(jnp.vdot(weights_B, delta_B) for weights_B in length_and_reward_weights(half))


def coefficients(
    objective: Objective,
    half: Half,
    logprobs_BT: jax.Array,
    old_logprobs_BT: jax.Array,
    alpha_shift: jax.Array | float = 0.0,
    *,
    reward: str = "",
) -> tuple[jax.Array, jax.Array]:
    """Returns (∂loss/∂log π_it [B, T] at `logprobs_BT`, advantages) of an objective.

    Advantages ([B, 1], or [B, T] of tokens), length scales and denominators are computed on these
    rows alone; only the policy term counts. `reward` is a key of `half.other_rewards`.
    """
    policy = dataclasses.replace(
        objective,
        kl_coef=0.0,
        kl_importance_weight=False,
        entropy_coef=0.0,
        top_entropy_quantile=1.0,
        correction="none",
        off_policy_max=None,
    )
    mask_BT = half.response_mask_BT
    lengths_B = jnp.sum(mask_BT, axis=1, dtype=jnp.int32)
    tokens = None
    if policy.token_advantages:
        tokens = objectives.TokenStatistics(mask_BT, old_logprobs_BT, half.collision_BT)
    advantages = objectives.advantages(
        policy,
        half.other_rewards[reward] if reward else half.rewards_B,
        half.group_ids_B,
        lengths_B,
        parts=half.parts.get(reward),
        tokens=tokens,
    )
    advantages_BU = advantages if policy.token_advantages else advantages[:, None]
    if half.trained_B is not None:
        mask_BT = mask_BT & half.trained_B[:, None]
        lengths_B = jnp.where(half.trained_B, lengths_B, 0)
    scale_B = objectives.length_scales(policy, lengths_B, half.group_ids_B, alpha_shift)
    denominators = objectives.denominators(policy, mask_BT)

    def loss(logprobs_BT):
        batch = objectives.PolicyBatch(
            logprobs_BT=logprobs_BT,
            old_logprobs_BT=old_logprobs_BT,
            advantages_B=advantages_BU[:, 0],
            response_mask_BT=mask_BT,
            length_scale_B=scale_B,
            token_advantages_BT=advantages_BU if policy.token_advantages else None,
            segment_starts_BT=half.segment_starts_BT,
        )
        return objectives.loss(policy, batch, denominators)[0]

    return jax.grad(loss)(logprobs_BT), advantages_BU


def of_half(
    half: Half,
    coefficient_BT: jax.Array,
    advantages_BU: jax.Array,
    length_delta_BT: jax.Array,
    reward_delta_BT: jax.Array,
    bin_edges: tuple[int, ...] = (),
) -> Pressure:
    """Returns −Σ_it (∂loss/∂log π_it) · δ_it of a half, total and split; δ along ∇E[L], ∇E[R]."""
    mask_BT = half.response_mask_BT
    length_BT, reward_BT = (
        -jnp.where(mask_BT, coefficient_BT * delta_BT, 0)
        for delta_BT in (length_delta_BT, reward_delta_BT)
    )
    length_B = length_BT.sum(axis=1)
    weight_B = jnp.where(mask_BT, jnp.abs(coefficient_BT), 0).sum(axis=1)
    in_bin_BK = objectives.in_length_bin(mask_BT.sum(axis=1), bin_edges)
    mass = weight_B.sum()
    return Pressure(
        length=length_B.sum(),
        reward=reward_BT.sum(),
        length_pos=jnp.where(advantages_BU > 0, length_BT, 0).sum(),
        length_neg=jnp.where(advantages_BU < 0, length_BT, 0).sum(),
        length_bins=jnp.where(in_bin_BK, length_B[:, None], 0).sum(axis=0),
        gradient_share=jnp.where(in_bin_BK, weight_B[:, None], 0).sum(axis=0)
        / jnp.where(mass > 0, mass, 1),
        mass=mass,
    )


def length_and_reward_weights(half: Half) -> tuple[jax.Array, jax.Array]:
    """Returns a_i of both means: (x_i − group mean) · n/(n − 1) / N, so E[Σ a_i ∇log π] = ∇E[x]."""
    lengths_B = half.response_mask_BT.sum(axis=1)
    present_B = lengths_B > 0
    dtype = jnp.result_type(float)
    count_B = group_sum(jnp.ones(lengths_B.shape, dtype), half.group_ids_B, present_B)
    correction_B = count_B / jnp.maximum(count_B - 1, 1)
    total = jnp.maximum(present_B.astype(dtype).sum(), 1)

    def weights(values_B):
        values_B = values_B.astype(dtype)
        centred_B = values_B - group_mean(values_B, half.group_ids_B, present_B)
        return jnp.where(present_B, centred_B * correction_B / total, 0)

    return weights(lengths_B), weights(half.rewards_B)


def _derivatives(compute, params, half, num_parts):
    """Returns (logprobs_BT, (v of the length, v of the reward))."""

    def accumulate(directions, part):
        rows, mask_BT, *weights_B = part
        logprobs_BT, pull = jax.vjp(lambda p: compute(p, rows), params)
        # One by one: under vmap, with jax 0.10 on CPU, the pullback of the scanned decoder is
        # wrong for all but the first.
        pulled = [
            pull(jnp.where(mask_BT, w_B[:, None], 0).astype(logprobs_BT.dtype))[0]
            for w_B in weights_B
        ]
        return jax.tree.map(jnp.add, directions, tuple(pulled)), logprobs_BT

    zeros = jax.tree.map(jnp.zeros_like, params)
    parts = (half.rows, half.response_mask_BT, *length_and_reward_weights(half))
    directions, logprobs = jax.lax.scan(accumulate, (zeros, zeros), _split(parts, num_parts))
    return jax.lax.stop_gradient(logprobs.reshape(-1, *logprobs.shape[2:])), directions


def _along(compute, params, directions, half, num_parts):
    """Returns δ_BT of each direction: directional derivatives of the log-probs.

    The model's custom backward passes have no forward mode. A backward pass is linear in the
    cotangent, so its transpose (a backward pass through the backward pass) is the forward
    derivative.
    """

    def along(_, rows):
        logprobs_BT, pull = jax.vjp(lambda p: compute(p, rows), params)
        _, forward = jax.vjp(lambda u: pull(u)[0], jnp.zeros_like(logprobs_BT))
        return None, [forward(direction)[0] for direction in directions]

    _, deltas = jax.lax.scan(along, None, _split(half.rows, num_parts))
    return [delta.reshape(-1, *delta.shape[2:]) for delta in deltas]


def _split(tree, num_parts):
    return jax.tree.map(lambda x: x.reshape(num_parts, x.shape[0] // num_parts, *x.shape[1:]), tree)
