"""Shapes of training rows for passes over responses, at the assumed lengths."""

import math

import jax
import jax.numpy as jnp

from experiments.rehearsal import case as cases
from experiments.rehearsal import costs, tower
from experiments.rehearsal.case import Case
from experiments.rehearsal.costs import Rows
from luspo_jax.models.experts import id_type
from luspo_jax.types import Experts, PackedRows, TokenBatch


def abstract_rows(case: Case, responses: int, *recorded: str) -> tuple[TokenBatch, int, Rows]:
    """Returns (TokenBatch of shapes, micro-batches computed, Rows of one) for the responses.

    `recorded` names the passes whose expert ids come with the rows of a mixture of experts.
    """
    pictures, vision = case.lengths.images, case.model.vision
    T = cases.row_length(case)
    lengths = case.response_lengths[:responses]
    packed = None
    if case.config.train.packing:
        plan = cases.plan(case, responses)
        B = plan.num_microbatches * plan.responses_per_microbatch
        R, long = plan.num_microbatches * plan.rows_per_microbatch, plan.row_length
        ints = jax.ShapeDtypeStruct((R, long), jnp.int32)
        packed = PackedRows(
            ints, _positions(case, R, long), ints, jax.ShapeDtypeStruct((R, long), bool),
            jax.ShapeDtypeStruct((B,), jnp.int32), plan.rows_per_microbatch,
            _experts(case.model, (R, long), recorded), ints if pictures else None,
        )  # fmt: skip
        used, at_once = plan.used_microbatches, plan.rows_per_microbatch
    else:
        B, long = responses, T
        at_once = case.sizes.responses_per_microbatch
        used = responses // at_once
    ints = jax.ShapeDtypeStruct((B, T), jnp.int32)
    experts = _experts(case.model, (B, T), recorded) if packed is None else None
    images = microbatches(case, responses) * cases.images_at_once(case, responses)
    rows = TokenBatch(
        ints, _positions(case, B, T), ints, jax.ShapeDtypeStruct((B, T), bool), packed, experts,
        units_BT=ints if pictures and packed is None else None,
        images=tower.shapes(images, pictures, vision) if pictures else None,
    )  # fmt: skip
    scored = math.ceil(sum(lengths) / used)
    return rows, used, Rows(at_once * long, costs.causal_pairs(at_once, long), scored)


def microbatches(case: Case, responses: int) -> int:
    """Counts the micro-batches of the first `responses` of a step, including empty ones."""
    if case.config.train.packing:
        return cases.plan(case, responses).num_microbatches
    return responses // case.sizes.responses_per_microbatch


def _positions(case, rows, length):
    """Returns rotary positions: three per token if the model reads images."""
    shape = (rows, length, 3) if case.model.vision else (rows, length)
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def _experts(model, rows, recorded):
    """Returns recorded expert ids of rows [R, T]; None without experts."""
    if not model.num_experts:
        return None
    shape = (*rows, model.num_expert_layers, model.experts_per_token)
    ids = jax.ShapeDtypeStruct(shape, id_type(model.num_experts))
    return Experts(**dict.fromkeys(recorded, ids))
