"""The optimizer steps of a rollout step, batch by batch."""

from collections.abc import Iterable

import jax
import numpy as np

from luspo_jax import objectives
from luspo_jax.learner.programs import StepPrograms
from luspo_jax.learner.rows import put
from luspo_jax.objectives.clip_fairness import reweighting_error
from luspo_jax.types import TrainBatch, TrainState


def optimize(
    programs: StepPrograms,
    state: TrainState,
    batches: Iterable[TrainBatch],
    *,
    rate: float,
    alpha_shift: float = 0.0,
) -> tuple[TrainState, dict[str, float]]:
    """Takes one optimizer step on each batch.

    Args:
      programs: of the step.
      state: donated.
      batches: in NumPy, the same on all processes.
      rate: the learning rate.
      alpha_shift: added to the exponent of an adaptive length scale.

    Returns:
      The new state, and the metrics of all updates together.
    """
    taken = []
    for batch in batches:
        batch = put(batch, programs.rule.logprobs.how.layout)
        state, measured = programs.update(state, batch, rate, alpha_shift)
        taken.append(measured)
    # Summed over all updates before any division, so that ratios of sums stay correct.
    total = jax.tree.map(lambda *xs: np.sum(np.asarray(xs, np.float64)), *jax.device_get(taken))
    skipped = total.pop("actor/skipped_updates")[0]
    means = {name: float(x) for name, x in objectives.metric_means(total).items()}
    means |= reweighting_error(total)
    return state, {**means, "actor/lr": rate, "actor/skipped_updates": skipped}
