"""Policy objectives as choices on four axes: ratio, surrogate, length scale, aggregation.

    scale_B = objectives.length_scales(objective, lengths_B, group_ids_B)
    advantages_B = objectives.advantages(objective, rewards_B, group_ids_B, lengths_B)
    denominators = objectives.denominators(objective, response_mask_BT)      # the optimizer step
    value, metrics = objectives.loss(objective, batch, denominators)         # each micro-batch

`step_loss` is the four for a step that is held whole.

Two functions (`advantages`, `length_scales`) have the name of the module that holds their formulas.
This package exports the functions; import the formulas from the module:
`from luspo_jax.objectives.advantages import ADVANTAGES`.
"""

from luspo_jax.objectives.kl import reward_adjustment
from luspo_jax.objectives.objective import Objective
from luspo_jax.objectives.policy_loss import (
    Denominators,
    PolicyBatch,
    denominators,
    loss,
)
from luspo_jax.objectives.policy_metrics import in_length_bin, metric_means
from luspo_jax.objectives.presets import PRESETS, preset
from luspo_jax.objectives.whole_batch import (
    RewardParts,
    TokenStatistics,
    advantages,
    length_scales,
    validate_group_size,
)
from luspo_jax.objectives.whole_step import step_loss

__all__ = [
    "PRESETS",
    "Denominators",
    "Objective",
    "PolicyBatch",
    "RewardParts",
    "TokenStatistics",
    "advantages",
    "denominators",
    "in_length_bin",
    "length_scales",
    "loss",
    "metric_means",
    "preset",
    "reward_adjustment",
    "step_loss",
    "validate_group_size",
]
