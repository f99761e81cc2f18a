"""Responses laid into rows, as the tests of training need them."""

import dataclasses

import numpy as np

from luspo_jax.learner.plan import one_a_row, packed
from luspo_jax.learner.rows import Planner, prompt_trunks, token_rows
from luspo_jax.types import ResponseRows, TrainBatch


@dataclasses.dataclass(frozen=True, eq=False)
class Prompt:
    """What rows read of a prompt."""

    tokens: np.ndarray
    images: tuple = ()


def lengths_of(prompts, responses):
    """Tokens of each sequence."""
    return np.array([len(p) + len(r) for p, r in zip(prompts, responses, strict=True)])


def plan_of(prompts, responses, *, width, microbatches=1, pack=0, rows_at_once=1, share=False):
    """One response a row in so many micro-batches, or dense rows of `pack` tokens.

    With `share`, these hold equal prompts once.
    """
    lengths_B = lengths_of(prompts, responses)
    if pack:
        trunks = prompt_trunks([Prompt(np.asarray(p)) for p in prompts]) if share else None
        sizes = {"width": width, "row_length": pack, "rows_per_microbatch": rows_at_once}
        return packed(lengths_B, trunks=trunks, **sizes)
    at_once = len(lengths_B) // microbatches
    return one_a_row(lengths_B, width=width, rows_per_microbatch=at_once)


def rows_of(model, plan, prompts, responses, *, masks=None, expert_ids=None, **of_planner):
    """TokenRows of prompts and responses, arrays of tokens; every response token is masked in."""
    masks = [np.ones(len(r), bool) for r in responses] if masks is None else masks
    fields = {"pack_length": plan.row_length} | of_planner
    planner = Planner(model, plan.width, 1, plan.rows_per_microbatch, **fields)
    return token_rows(
        planner,
        plan,
        [Prompt(np.asarray(p)) for p in prompts],
        [np.asarray(r) for r in responses],
        masks,
        expert_ids,
    )


def batch_of(model, plan, prompts, responses, *, advantages, groups, masks=None, **known):
    """TrainBatch; `known` has log-probs or entropies, an array a response, by their names.

    With `gathers`, attention gathers the sequences of its rows.
    """
    masks = [np.ones(len(r), bool) for r in responses] if masks is None else masks
    expert_ids = known.pop("expert_ids", None)
    gathers = known.pop("gathers", False)
    known.setdefault("sampler_logprobs", [np.zeros(len(r), np.float32) for r in responses])
    return TrainBatch(
        rows=rows_of(
            model, plan, prompts, responses, masks=masks, expert_ids=expert_ids, gathers=gathers
        ),
        responses=ResponseRows(
            starts_B=plan.place_one(plan.firsts_B),
            response_mask_BT=plan.place(masks),
            advantages_B=plan.place_one(np.asarray(advantages, np.float32)),
            group_ids_B=plan.place_one(np.asarray(groups, np.int32)),
            **{f"{name}_BT": plan.place(values) for name, values in known.items()},
        ),
    )
