"""Supervised steps: demonstrations laid into rows, their losses, and the update on them.

A demonstration is anything with `tokens`, `trained`, `weights` and `images`
(`prompts.Demonstration`). The update is that of RL with A = 1 for every demonstration: the same
rows, objective, micro-batches and optimizer.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from luspo_jax.learner import routers
from luspo_jax.learner.plan import Plan
from luspo_jax.learner.programs import LogprobPass, StepPrograms
from luspo_jax.learner.rows import Planner, put, token_rows
from luspo_jax.learner.updates import optimize
from luspo_jax.objectives import Objective
from luspo_jax.types import ExpertIds, ResponseRows, TokenRows, TrainBatch, TrainState

# How the losses of tokens become one number. A length is the number of trained tokens.
AGGREGATIONS = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum")

# Name of the RL step → name of the supervised step; what measures ratios or clipping is left out.
_KEPT = {
    "actor/pg_loss": "sft/loss",
    **{
        name: name
        for name in (
            "actor/entropy", "actor/grad_norm", "actor/grad_clip_rate", "actor/lr",
            "actor/skipped_updates",
        )
    },
}  # fmt: skip


def nll_objective(aggregation: str = "token-mean") -> Objective:
    """Returns the objective of supervised steps: −log p of the trained tokens, aggregated.

    Args:
      aggregation: one of AGGREGATIONS: a token mean counts long demonstrations by their tokens, a
        sequence mean of token means counts all alike.
    """
    return Objective(surrogate="nll", aggregation=aggregation, advantage="none")


@dataclasses.dataclass(frozen=True)
class _Given:
    """What rows read of a prompt: the tokens before the first trained one."""

    tokens: np.ndarray
    images: tuple = ()


def train_batch(
    planner: Planner, demonstrations: Sequence[Any]
) -> tuple[TrainBatch, Plan, dict[str, float]]:
    """Returns the batch of one step in NumPy, its plan, and metrics of it.

    Weights, if any demonstration has them, are divided by their mean over the trained tokens, so
    that a token mean is Σ w·(−log p) / Σ w.
    """
    rows, plan, masks = _laid(planner, demonstrations)
    count = sum(int(mask.sum()) for mask in masks)
    responses = ResponseRows(
        starts_B=plan.place_one(plan.firsts_B),
        response_mask_BT=plan.place(masks),
        advantages_B=plan.place_one(np.ones(len(masks), np.float32)),
        group_ids_B=plan.place_one(np.arange(len(masks), dtype=np.int32)),
        sampler_logprobs_BT=None,
        token_weights_BT=_weights(plan, demonstrations, masks),
    )
    tokens = int(plan.lengths_B.sum())
    metrics = {"sft/trained_tokens": count, "sft/tokens": tokens, **plan.metrics}
    return TrainBatch(rows, responses), plan, metrics


def _weights(plan, demonstrations, masks):
    if all(d.weights is None for d in demonstrations):
        return None
    weights = [
        np.where(mask, 1.0 if d.weights is None else d.weights[len(d.tokens) - len(mask) :], 0.0)
        for d, mask in zip(demonstrations, masks, strict=True)
    ]
    mean = sum(w.sum() for w in weights) / sum(mask.sum() for mask in masks)
    return plan.place([(w / mean).astype(np.float32) for w in weights])


def _laid(planner, demonstrations, num_blank=0) -> tuple[TokenRows, Plan, list[np.ndarray]]:
    """Lays demonstrations into rows; of the last `num_blank`, no token is trained."""
    plan_lengths_B = np.array([len(d.tokens) for d in demonstrations])
    plan = planner.plan(plan_lengths_B, planner.width(plan_lengths_B))
    # Token 0 is predicted by nothing. Images stand in the part that is given.
    firsts = [max(1, int(np.argmax(d.trained))) for d in demonstrations]
    pairs = list(zip(demonstrations, firsts, strict=True))
    masks = [d.trained[first:] for d, first in pairs]
    for i in range(len(masks) - num_blank, len(masks)):
        masks[i] = np.zeros_like(masks[i])
    given = [_Given(d.tokens[:first], d.images) for d, first in pairs]
    return token_rows(planner, plan, given, [d.tokens[k:] for d, k in pairs], masks), plan, masks


def update(
    programs: StepPrograms,
    planner: Planner,
    state: TrainState,
    demonstrations: Sequence[Any],
    *,
    rate: float,
) -> tuple[TrainState, dict[str, float]]:
    """Takes one optimizer step on demonstrations, the same on all processes.

    With `router_aux_coef`, a pass before it records the experts of each token: their load is then
    that of the whole batch, however it is cut into micro-batches.

    Args:
      programs: with `nll_objective`.
      planner: of the rows.
      state: donated.
      demonstrations: of the step.
      rate: the learning rate.

    Returns:
      The new state and the step's metrics.
    """
    batch, plan, metrics = train_batch(planner, demonstrations)
    if programs.rule.router_aux_coef:
        batch = dataclasses.replace(batch, rows=_routed(batch.rows, plan, state, programs, planner))
    state, measured = optimize(programs, state, [batch], rate=rate)
    metrics |= {_KEPT[name]: value for name, value in measured.items() if name in _KEPT}
    metrics |= {name: value for name, value in measured.items() if name.startswith("router/")}
    return state, metrics


def _routed(rows, plan, state, programs, planner):
    """Returns the rows with the expert ids that the policy's routers choose."""
    one = LogprobPass("params", programs.rule.logprobs, record_experts=True)
    found = one(state, put(rows, planner.layout))
    ids = routers.sequence_ids(found.router, plan, planner.layout)
    return dataclasses.replace(rows, expert_ids=ExpertIds(old=plan.lay(ids)))


def losses(
    one: LogprobPass,
    planner: Planner,
    state: TrainState,
    demonstrations: Sequence[Any],
    *,
    at_once: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Computes each demonstration's summed −log p in nats, and its number of trained tokens.

    Args:
      one: the pass.
      planner: of the rows.
      state: contains the policy.
      demonstrations: any number.
      at_once: how many are laid out at a time, as many as an update's.
    """
    sums, counts = [], []
    for part in _parts(demonstrations, at_once):
        num_blank = at_once - len(part)
        rows, plan, masks = _laid(planner, [*part, *[part[0]] * num_blank], num_blank)
        found = one(state, put(rows, planner.layout))
        values = plan.take(np.asarray(jax.device_get(found.logprobs_RT), np.float64))
        sums += [-x.sum() for x in values[: len(part)]]
        counts += [int(mask.sum()) for mask in masks[: len(part)]]
    return np.array(sums), np.array(counts)


def _parts(demonstrations, at_once) -> Iterator[Sequence[Any]]:
    for start in range(0, len(demonstrations), at_once):
        yield demonstrations[start : start + at_once]
