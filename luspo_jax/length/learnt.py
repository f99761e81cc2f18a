"""λ of the length scale "lambda-grpo", learnt along the loss beside the policy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from luspo_jax.length.steering import LengthState
from luspo_jax.objectives import Objective
from luspo_jax.objectives.length_scales import lambda_grpo
from luspo_jax.objectives.objective import RANGES


def lambda_gradient(
    objective: Objective,
    advantages_B: np.ndarray,
    lengths_B: np.ndarray,
    group_ids_B: np.ndarray,
    shift: float,
) -> float:
    """Returns d/dλ of (1/N) Σ_i A_i w_i(λ): the surrogate, less its sign, where all ratios are 1.

    λ grows where longer responses have higher advantages (λ-GRPO, arXiv 2510.06870).

    Args:
      objective: gives λ's start and r.
      advantages_B: of the responses.
      lengths_B: tokens; 0 for a response that does not count.
      group_ids_B: equal for the responses to one prompt.
      shift: added to λ.
    """
    sizes_B = jnp.asarray(lengths_B, jnp.float32)
    count = max(1, int(np.count_nonzero(lengths_B)))

    def surrogate(shift):
        scale_B = lambda_grpo(
            sizes_B,
            jnp.asarray(group_ids_B),
            shift,
            length_lambda=objective.length_lambda,
            length_lambda_spread=objective.length_lambda_spread,
        )
        return jnp.where(sizes_B > 0, scale_B * jnp.asarray(advantages_B), 0).sum() / count

    return float(jax.grad(surrogate)(jnp.float32(shift)))


def learnt(state: LengthState, objective: Objective, gradient: float, rate: float) -> LengthState:
    """Moves λ by rate · gradient, within the range that the objective allows."""
    low, high = (bound - objective.length_lambda for bound in RANGES["length_lambda"][:2])
    moved = min(high, max(low, state.alpha_shift + rate * gradient))
    return dataclasses.replace(state, alpha_shift=moved)
