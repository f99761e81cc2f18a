"""The loss of an optimizer step that is held whole, for trainers other than ours, in one call.

A step that is cut into micro-batches takes what this calls: `advantages`, `length_scales` and
`denominators` over the whole step, then `loss` on each part.
"""

import jax
import jax.numpy as jnp

from luspo_jax.objectives import corrections
from luspo_jax.objectives.kl import reward_adjustment
from luspo_jax.objectives.objective import Objective, require_name
from luspo_jax.objectives.policy_loss import PolicyBatch, denominators, loss, require_mask
from luspo_jax.objectives.policy_metrics import Metrics
from luspo_jax.objectives.whole_batch import (
    RewardParts,
    TokenStatistics,
    advantages,
    length_scales,
    real,
    wide,
)

# Arguments that `PolicyBatch` takes as they are.
_OF_TOKENS = (
    "ref_logprobs_BT",
    "sampler_logprobs_BT",
    "entropy_BT",
    "token_weights_BT",
    "ages_BT",
    "segment_starts_BT",
)
OPTIONAL = (*_OF_TOKENS, "old_entropy_BT", "collision_BT", "parts_BM", "part_weights_M")


def step_loss(
    objective: Objective,
    logprobs_BT: jax.Array,
    response_mask_BT: jax.Array,
    rewards_B: jax.Array,
    group_ids_B: jax.Array,
    old_logprobs_BT: jax.Array | None = None,
    **optional: jax.Array | None,
) -> tuple[jax.Array, Metrics]:
    """Returns the loss of a whole optimizer step, and metrics as (sum, count) pairs.

    Under jit the objective is static. A gradient flows through `logprobs_BT` and `entropy_BT` only.
    Values on masked positions have no effect.

    Args:
      objective: from `preset`, or made by hand.
      logprobs_BT: log-probs of the tokens under the policy that is trained, at the temperature of
        sampling; [b, t] belongs to token t of row b.
      response_mask_BT: bool, true on the tokens to train on; a row without any is absent.
      rewards_B: one a response.
      group_ids_B: integers, equal for responses to one prompt, in any order.
      old_logprobs_BT: log-probs under the policy that starts the step; None if that is the policy
        trained, as in the first update on a batch.
      **optional: `ref_logprobs_BT`, `sampler_logprobs_BT`, `entropy_BT`, `token_weights_BT`,
        `ages_BT` and `segment_starts_BT` as in `PolicyBatch`; `old_entropy_BT`, the entropy of
        each token under the old policy, for an entropy quantile (`entropy_BT` if it is missing);
        `collision_BT`, Σ_v π_old², for the advantage "otb"; `parts_BM` and `part_weights_M` as in
        `RewardParts`, for the advantage "gdpo".

    Raises:
      ValueError: an unknown name, shapes that differ, a mask that is not bool, or a missing
        argument; the message names it.
    """
    for name in optional:
        require_name("step_loss", name, OPTIONAL)
    given = {name: optional.get(name) for name in OPTIONAL}
    require_mask(response_mask_BT)
    own = {"logprobs_BT": logprobs_BT, "old_logprobs_BT": old_logprobs_BT}
    _require_shapes(own | given, response_mask_BT.shape)
    dtype = wide(logprobs_BT.dtype)
    sg, lengths_B = jax.lax.stop_gradient, response_mask_BT.sum(axis=1, dtype=jnp.int32)
    old_BT = sg(logprobs_BT if old_logprobs_BT is None else old_logprobs_BT).astype(dtype)
    batch = (rewards_B, group_ids_B, lengths_B)
    of_rows = _advantages_of_rows(objective, batch, response_mask_BT, old_BT, given)
    old_entropy_BT = given["old_entropy_BT"]
    if old_entropy_BT is None:
        old_entropy_BT = given["entropy_BT"]
    return loss(
        objective,
        PolicyBatch(
            logprobs_BT=logprobs_BT,
            old_logprobs_BT=old_logprobs_BT,
            response_mask_BT=response_mask_BT,
            length_scale_B=length_scales(objective, lengths_B, group_ids_B),
            **of_rows,
            **{name: given[name] for name in _OF_TOKENS},
        ),
        denominators(
            objective, response_mask_BT, old_entropy_BT, old_BT, given["sampler_logprobs_BT"]
        ),
    )


def _advantages_of_rows(objective, batch, response_mask_BT, old_BT, given):
    """Returns the fields of `PolicyBatch` that hold advantages; `batch` is rewards, groups, L."""
    rewards_B, group_ids_B, lengths_B = batch
    if objective.kl_in_reward:
        _require(given, "ref_logprobs_BT", "kl_placement = 'reward'")
        paid_B = reward_adjustment(
            old_BT,
            given["ref_logprobs_BT"].astype(old_BT.dtype),
            response_mask_BT,
            kl_coef=objective.kl_coef,
            kl_estimator=objective.kl_estimator,
        )
        rewards_B = real(rewards_B).astype(old_BT.dtype) + paid_B
    parts = tokens = None
    if objective.advantage == "gdpo":
        _require(given, "parts_BM", "advantage = 'gdpo'")
        _require(given, "part_weights_M", "advantage = 'gdpo'")
        parts = RewardParts(jnp.asarray(given["parts_BM"]), jnp.asarray(given["part_weights_M"]))
    if objective.token_advantages:
        _require(given, "collision_BT", f"advantage = {objective.advantage!r}")
        weight_BT = _truncated(objective, old_BT, given["sampler_logprobs_BT"])
        tokens = TokenStatistics(response_mask_BT, old_BT, given["collision_BT"], weight_BT)
    found = advantages(objective, rewards_B, group_ids_B, lengths_B, parts=parts, tokens=tokens)
    if not objective.token_advantages:
        return {"advantages_B": found}
    mean_B = found.sum(axis=1) / jnp.maximum(lengths_B, 1).astype(found.dtype)
    return {"advantages_B": mean_B, "token_advantages_BT": found}


def _truncated(objective, old_logprobs_BT, sampler_logprobs_BT):
    """Returns ρ of truncated importance sampling [B, T], or None for 1."""
    if "tis" not in objective.corrections or sampler_logprobs_BT is None:
        return None
    log_rho_BT = old_logprobs_BT - sampler_logprobs_BT.astype(old_logprobs_BT.dtype)
    return corrections.tis(log_rho_BT, tis_max=objective.tis_max)


def _require(given, name, setting):
    if given[name] is None:
        raise ValueError(f"{name} is missing: Objective.{setting} needs it.")


def _require_shapes(arrays, shape):
    for name, values in arrays.items():
        if name.endswith("_BT") and values is not None and jnp.shape(values) != shape:
            raise ValueError(
                f"{name} has shape {jnp.shape(values)}; {shape} is that of response_mask_BT."
            )
