"""What a pass over responses reads, at the assumed lengths: shapes of images, and work."""

import math

from experiments.rehearsal import case as cases
from experiments.rehearsal import costs, counted, tower
from experiments.rehearsal.case import Case
from experiments.rehearsal.costs import Rows
from luspo_jax.learner.plan import Plan
from luspo_jax.learner.rows import gathered
from luspo_jax.types import Images


def microbatch(case: Case, plan: Plan) -> tuple[Rows, int]:
    """(Rows of one micro-batch, micro-batches that are computed) of a plan."""
    used, at_once, long = plan.used_microbatches, plan.rows_per_microbatch, plan.row_length
    tokens = int(plan.lengths_B.sum()) - case.lengths.prompt * len(plan.lengths_B)
    counted = math.ceil(tokens / used)
    return Rows(at_once * long, _pairs(case, plan), counted), used


def taken(case: Case, plan: Plan) -> counted.Taken:
    """Returns how often a pass computes a micro-batch of a plan, and a chunk of the head in it."""
    micro, used = microbatch(case, plan)
    chunk, parts = case.rule.logprobs.head_chunk_tokens, case.train_parts
    whole = math.ceil(micro.tokens / parts.tokens / chunk)
    scored = min(whole, math.ceil(micro.scored / parts.tokens / chunk))
    return counted.Taken((used / plan.num_microbatches, scored / whole), (float(scored),))


def _pairs(case, plan):
    """Returns pairs of a query and a key in one micro-batch of a plan."""
    found = gathered(case.planner, plan)
    if found is None:
        return costs.causal_pairs(plan.rows_per_microbatch, plan.row_length)
    B, C = (len(x) // plan.num_microbatches for x in (found.starts_B, found.trunk_starts_C))
    own = costs.causal_pairs(B, found.width) + B * found.width * found.trunk_width
    return own + costs.causal_pairs(C, found.trunk_width)


def images(case: Case, plan: Plan) -> Images | None:
    """Shapes of the images of all micro-batches of a plan; None without any."""
    pictures, responses = case.lengths.images, len(plan.lengths_B)
    if pictures is None:
        return None
    count = plan.num_microbatches * cases.images_at_once(case, responses)
    return tower.shapes(count, pictures, case.model.vision)
