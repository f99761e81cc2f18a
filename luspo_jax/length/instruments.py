"""The length instruments of a step: degeneration, length pressure, and a steered length scale."""

from collections.abc import Sequence

import numpy as np

from luspo_jax.learner.state import mark_params
from luspo_jax.length import laboratory, steering
from luspo_jax.length.laboratory import Laboratory, Sampled
from luspo_jax.length.learnt import lambda_gradient, learnt
from luspo_jax.length.settings import LengthSettings
from luspo_jax.length.steering import LengthState
from luspo_jax.metrics import StepMetrics
from luspo_jax.objectives import Objective
from luspo_jax.rollout import Response
from luspo_jax.types import TrainState


def observe(
    length: LengthState,
    settings: LengthSettings,
    objective: Objective,
    responses: Sequence[Response],
    metric: str,
    metrics: StepMetrics,
) -> tuple[LengthState, int]:
    """Adds the step's lengths to the running statistics, moves α, and checks for degeneration.

    Args:
      length: the running statistics.
      settings: of the run.
      objective: its α is moved if its length scale is adaptive.
      responses: of the step; only those that count are used.
      metric: the reward part that counts as accuracy.
      metrics: receives the findings.

    Returns:
      The new statistics, and where length degenerates to: 1 = longer, −1 = shorter, 0 = it does
      not.
    """
    counted = [response for response in responses if response.counted]
    if counted:
        length = steering.observed(
            length,
            settings,
            mean_length=np.mean([len(r.tokens) for r in counted]),
            accuracy=np.mean([r.reward.parts[metric] > 0.5 for r in counted]),
        )
    found = steering.degeneration(length, settings)
    metrics.update(
        {
            "length/degeneration/growth": found.growth,
            "length/degeneration/accuracy_gain": found.gain,
            "length/degeneration/flag": float(found.flagged),
            "length/degeneration/collapse": float(found.collapsed),
        }
    )
    if objective.length_scale == "adaptive":
        start = objective.length_alpha
        length = steering.steered(length, settings, start=start, direction=found.direction)
        metrics.add("length/scale_alpha", start + length.alpha_shift)
    return length, found.direction


def learn(
    length: LengthState,
    settings: LengthSettings,
    objective: Objective,
    responses: Sequence[Response],
    group_ids_B: np.ndarray,
    metrics: StepMetrics,
) -> LengthState:
    """Moves λ after a step that trained with it, if the objective has one; `length/lambda` is what
    the step had."""
    if objective.length_scale != "lambda-grpo":
        return length
    metrics.add("length/lambda", objective.length_lambda + length.alpha_shift)
    if not settings.lambda_rate:
        return length
    gradient = lambda_gradient(
        objective,
        np.array([r.advantage for r in responses], np.float32),
        np.array([len(r.tokens) if r.trained.any() else 0 for r in responses], np.int32),
        group_ids_B,
        length.alpha_shift,
    )
    return learnt(length, objective, gradient, settings.lambda_rate)


def penalty(
    settings: LengthSettings, lengths_B: np.ndarray, max_length: int, *, direction: int
) -> np.ndarray | float:
    """Returns the reward penalty while length degenerates, in proportion to length; else 0.

    `direction` · penalty · L / max_length: a bonus for length while it collapses (−1).
    """
    if not (direction and settings.mitigation == "penalty"):
        return 0.0
    return np.float32(direction * settings.penalty) * (lengths_B / max_length).astype(np.float32)


def sample(
    settings: LengthSettings, sampled: Sampled, *, step: int, version: int
) -> Sampled | None:
    """Returns the responses on which pressure is measured; None in a step without measurement.

    Also None if too few groups are fresh and carry gradient.

    Args:
      settings: of the run.
      sampled: all responses of the step.
      step: rollout steps taken before this one.
      version: of the policy that starts the step.
    """
    if not (_due(settings, step) or _due(settings, step - 1)):
        return None
    groups = len(np.unique(sampled.group_ids_B))
    return laboratory.chosen(sampled, version=version, share=settings.share, num_groups=groups)


def before_update(
    lab: Laboratory,
    settings: LengthSettings,
    state: TrainState,
    sampled: Sampled | None,
    step: int,
    metrics: StepMetrics,
) -> TrainState:
    """Measures the previous step's update on responses new to it, and marks this step's start."""
    if sampled is not None and _due(settings, step - 1):
        base = getattr(state, "base", None)
        length, reward = laboratory.taken(lab, state.params, state.marked_params, sampled, base)
        metrics.add("length/pressure/taken", length)
        metrics.add("length/reward_pressure/taken", reward)
    return mark_params(state) if _due(settings, step) else state


def after_update(
    lab: Laboratory,
    settings: LengthSettings,
    state: TrainState,
    length: LengthState,
    sampled: Sampled | None,
    step: int,
    metrics: StepMetrics,
) -> LengthState:
    """Measures each objective's push on length in this step, for the metrics and for steering."""
    if sampled is None or not _due(settings, step):
        return length
    policies, base = (state.marked_params, state.params), getattr(state, "base", None)
    found = laboratory.measure(lab, *policies, sampled, length.alpha_shift, base)
    metrics.update(laboratory.metrics(found))
    pressure, slope = laboratory.own_slope(lab, found)
    return steering.measured(length, settings, pressure=pressure, slope=slope)


def _due(settings, step):
    return settings.every > 0 and step >= 0 and step % settings.every == 0
