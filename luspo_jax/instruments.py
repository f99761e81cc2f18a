"""What a step learns about its own length: degeneration, length pressure, and a steered scale."""

import dataclasses

import numpy as np

from luspo_jax import packing
from luspo_jax.experience import Rollouts
from luspo_jax.length import laboratory, steering
from luspo_jax.length.laboratory import Sampled
from luspo_jax.length.steering import LengthState
from luspo_jax.metrics import StepMetrics
from luspo_jax.run.build import Run
from luspo_jax.types import TrainBatch, TrainState
from luspo_jax.update import mark_params


def observe(
    run: Run, length: LengthState, rollouts: Rollouts, metrics: StepMetrics
) -> tuple[LengthState, bool]:
    """Adds the step's lengths to what is known, moves α, and says whether length degenerates."""
    counted_B, objective = rollouts.counted_B, run.rule.objective
    right_B = np.array([r.parts[run.metric] > 0.5 for r in rollouts.rewards])
    if counted_B.any():
        length = steering.observed(
            length,
            run.length,
            mean_length=rollouts.lengths_B[counted_B].mean(),
            accuracy=right_B[counted_B].mean(),
        )
    found = steering.degeneration(length, run.length)
    metrics.update(
        {
            "length/degeneration/growth": found.growth,
            "length/degeneration/accuracy_gain": found.gain,
            "length/degeneration/flag": float(found.flagged),
        }
    )
    if objective.length_scale == "adaptive":
        start = objective.length_alpha
        length = steering.steered(length, run.length, start=start, flagged=found.flagged)
        metrics.add("length/scale_alpha", start + length.alpha_shift)
    return length, found.flagged


def sample(run: Run, rollouts: Rollouts, batch: TrainBatch, step: int) -> Sampled | None:
    """The responses by which pressure is measured; None in a step that measures none.

    Also None where too few groups of a step are fresh and carry gradient: programs are compiled
    for one size.
    """
    if not (_due(run, step) or _due(run, step - 1)):
        return None
    mask_BT = packing.response_mask(
        [prompt.tokens for prompt in rollouts.prompts],
        [response.tokens for response in rollouts.responses],
        length=batch.rows.tokens_BT.shape[1],
    )
    return laboratory.chosen(
        Sampled(
            rows=dataclasses.replace(batch.rows, response_mask_BT=mask_BT),
            rewards_B=rollouts.rewards_B,
            group_ids_B=rollouts.group_ids_B,
            counted_B=rollouts.counted_B,
            trained_B=rollouts.trained_B,
            fresh_B=~rollouts.carried_B,
            prompts_B=prompts_with_images(rollouts),
        ),
        share=run.length.share,
        num_groups=len(rollouts.groups),
    )


def prompts_with_images(rollouts: Rollouts) -> np.ndarray | None:
    """The prompt of each response as an array of objects; None where no prompt has an image."""
    if not any(prompt.images for prompt in rollouts.prompts):
        return None
    prompts_B = np.empty(len(rollouts.prompts), object)
    prompts_B[:] = rollouts.prompts
    return prompts_B


def before_update(
    run: Run, state: TrainState, sampled: Sampled | None, step: int, metrics: StepMetrics
) -> TrainState:
    """Scores the step before by responses that it has not seen, and marks where this one starts."""
    if sampled is not None and _due(run, step - 1):
        length, reward = laboratory.taken(
            run.laboratory, state.params, state.marked_params, sampled
        )
        metrics.add("length/pressure/taken", length)
        metrics.add("length/reward_pressure/taken", reward)
    return mark_params(state) if _due(run, step) else state


def after_update(
    run: Run,
    state: TrainState,
    length: LengthState,
    sampled: Sampled | None,
    step: int,
    metrics: StepMetrics,
) -> LengthState:
    """Which way each objective pushed length in this step, for the metrics and for steering."""
    if sampled is None or not _due(run, step):
        return length
    found = laboratory.measure(
        run.laboratory, state.marked_params, state.params, sampled, length.alpha_shift
    )
    metrics.update(laboratory.metrics(found))
    pressure, slope = laboratory.own_slope(run.laboratory, found)
    return steering.measured(length, run.length, pressure=pressure, slope=slope)


def _due(run, step):
    return run.length.every > 0 and step >= 0 and step % run.length.every == 0
