"""Log-probs of a step's responses under policies: laid out once, for any number of passes.

A response is anything with `tokens`, `trained` and, for a mixture of experts, `expert_ids` and
`prompt_expert_ids` (`rollout.Response`); a prompt is anything with `tokens` and `images`.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from luspo_jax.learner import routers
from luspo_jax.learner.plan import Plan
from luspo_jax.learner.programs import LogprobPass
from luspo_jax.learner.rows import Planner, put, token_rows
from luspo_jax.types import ExpertIds, TokenRows, TrainState


@dataclasses.dataclass(frozen=True)
class Laid:
    """Responses and the plan of their rows, shared by all passes over them."""

    prompts: Sequence[Any]
    responses: Sequence[Any]
    plan: Plan


@dataclasses.dataclass(frozen=True)
class PolicyLogprobs:
    """The results of a pass, per response.

    Attributes:
      logprobs: float32 of each token, 0 where it is not trained on.
      entropies: float32, likewise.
      expert_ids: [prompt + n, L, K] that the routers chose; None if not recorded.
      agreement: share of expert ids that the pass and the sampler both chose; None without experts.
      collisions: float32 Σ_v π_v² at each token; None if not asked for.
    """

    logprobs: list[np.ndarray]
    entropies: list[np.ndarray]
    expert_ids: list[np.ndarray] | None
    agreement: float | None
    collisions: list[np.ndarray] | None = None

    def last(self, count: int) -> "PolicyLogprobs":
        """Returns the results of the last `count` responses."""
        lists = ("logprobs", "entropies", "expert_ids", "collisions")
        start = len(self.logprobs) - count
        known = {name: values for name in lists if (values := getattr(self, name)) is not None}
        return dataclasses.replace(self, **{name: x[start:] for name, x in known.items()})


def laid(
    planner: Planner,
    prompts: Sequence[Any],
    responses: Sequence[Any],
    width: int | None = None,
) -> list[Laid]:
    """Plans the rows of all responses; with images, in parts as large as an update's.

    Pixels take more memory than all else, and a micro-batch of few prompts encodes few images.

    Args:
      planner: of the run.
      prompts, responses: of each sequence.
      width: of arrays with one row per response; None is that of these responses.
    """
    lengths_B = sequence_lengths(prompts, responses)
    width = planner.width(lengths_B) if width is None else width
    size = planner.pictured_at_once if any(p.images for p in prompts) else len(prompts)
    parts = [slice(start, start + size) for start in range(0, len(prompts), size)]
    return [
        Laid(prompts[part], responses[part], planner.plan(lengths_B[part], width, prompts[part]))
        for part in parts
    ]


def sequence_lengths(prompts: Sequence[Any], responses: Sequence[Any]) -> np.ndarray:
    """Returns the tokens of each prompt plus its response."""
    return np.array(
        [len(p.tokens) + len(r.tokens) for p, r in zip(prompts, responses, strict=True)]
    )


def laid_rows(planner: Planner, laid: Laid, *, old_ids: bool = False) -> TokenRows:
    """Returns the rows of laid-out responses; `old_ids` adds the old policy's expert ids."""
    responses, ids = laid.responses, None
    if planner.model.num_experts:
        ids = ExpertIds(
            sampler=laid.plan.lay(
                [
                    _sampler_ids(p, r, planner.model)
                    for p, r in zip(laid.prompts, responses, strict=True)
                ]
            ),
            old=laid.plan.lay([r.old_expert_ids for r in responses]) if old_ids else None,
        )
    return token_rows(
        planner,
        laid.plan,
        laid.prompts,
        [response.tokens for response in responses],
        [response.trained for response in responses],
        ids,
    )


def policy_logprobs(
    state: TrainState, one: LogprobPass, laid: Sequence[Laid], planner: Planner
) -> PolicyLogprobs:
    """Runs a policy over laid-out responses, without gradients.

    Args:
      state: contains the policy.
      one: the pass; it records expert ids only if all responses were laid out at once.
      laid: the responses.
      planner: the one that laid them out.
    """
    logprobs, entropies, collisions, ids, agreement = [], [], [], None, None
    for part in laid:
        rows = put(laid_rows(planner, part), planner.layout)
        found = one(state, rows)
        logprobs += _of_responses(found.logprobs_RT, part)
        entropies += _of_responses(found.entropy_RT, part)
        if found.collision_RT is not None:
            collisions += _of_responses(found.collision_RT, part)
        if found.router is not None:
            router = jax.device_get(dataclasses.replace(found.router, expert_ids=None))
            agreement = float(router.agreement["sampler"] / router.tokens)
            if one.record_experts:
                ids = routers.sequence_ids(found.router, part.plan, planner.layout)
    return PolicyLogprobs(logprobs, entropies, ids, agreement, collisions or None)


def _of_responses(values_RT, laid):
    sequences = laid.plan.take(np.asarray(values_RT))
    return [x[len(x) - len(r.tokens) :] for x, r in zip(sequences, laid.responses, strict=True)]


def _sampler_ids(prompt, response, model):
    """Returns the sampler's expert ids for each token of a sequence [n, L, K]."""
    layers, count = model.num_expert_layers, model.experts_per_token
    pieces = []
    for name, tokens in (
        ("prompt_expert_ids", prompt.tokens), ("expert_ids", response.tokens)
    ):  # fmt: skip
        ids, shape = getattr(response, name), (len(tokens), layers, count)
        if ids is None or ids.shape != shape:
            raise ValueError(
                f"{name} of the response {response.sample_id} to prompt {response.prompt_id} must "
                f"be the sampler's, {list(shape)}, and is "
                f"{None if ids is None else list(ids.shape)}: sample with record_experts=True"
            )
        pieces.append(ids)
    return np.concatenate(pieces)
