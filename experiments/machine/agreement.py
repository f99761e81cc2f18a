"""Compares log-probs of sampled tokens, sampler against trainer, by the code that a run takes."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from experiments.machine import shapes
from experiments.machine.records import Check, Gap
from experiments.machine.running import Known
from experiments.machine.shapes import Sizes
from luspo_jax.learner.policies import laid, policy_logprobs
from luspo_jax.learner.state import initial_state
from luspo_jax.rollout import Request
from luspo_jax.rollout.handover import rollout_params

# As `rollout.mismatch_limit` says: more is a fault in float32, and in bfloat16 no longer rounding.
LIMITS = {"float32": 0.05, "bfloat16": 1.0}
_GROUP = 4  # responses to a prompt


def checks(device: jax.Device) -> Iterator[Check]:
    """Yields a check for each type and model."""
    for dtype in LIMITS:
        run = functools.partial(embedded, dtype)
        yield Check("agreement", f"quickstart's model, {dtype}", 20.0, run)
    if device.platform != "cpu":
        yield Check("agreement", f"{shapes.SMALL}, random weights, bfloat16", 40.0, random_weights)


def embedded(dtype: str, known: Known) -> list[Gap]:
    """Compares on the quickstart's trained model and its own prompts."""
    from configs import quickstart
    from luspo_jax.run.build import build

    config = quickstart.get_config()
    config.model.dtype = config.model.rollout_dtype = dtype
    # All responses are one micro-batch.
    config.eval.num_problems = config.rollout.prompts_per_step = 4 if known.tiny else 32
    config.rollout.group_size, config.train.num_minibatches = _GROUP, 1
    if known.tiny:
        config.rollout.max_response_length = config.rollout.chunk_length = 16
    run = build(config, [known.device])
    state = initial_state(run.initial_params(), run.rule)
    one = run.programs.passes(check=True)["old"]
    weights = run.rollout_params(run.policy(state))
    found = compared(run.sampler, weights, run.data.held_out, state, (one, run.planner))
    return [_gap("quickstart's model", dtype, found)]


def random_weights(known: Known) -> list[Gap]:
    """Compares on a shape whose heads are as wide as kernels of accelerators want them."""
    made = shapes.case(known, shapes.SMALL, Sizes(16, 256, 256))
    state = shapes.random_state(made)
    dtype = made.config.model.rollout_dtype
    weights = rollout_params(state.params, config=made.model, layout=None, dtype=dtype)
    rng = np.random.default_rng(9)
    prompts = [
        _Prompt(i, rng.integers(1, made.model.vocab_size, 200 + 7 * i).astype(np.int32))
        for i in range(8)
    ]
    one = made.programs.passes(check=True)["old"]
    found = compared(made.engine, weights, prompts, state, (one, made.planner), group_size=2)
    return [_gap(f"{shapes.SMALL}, random weights", str(dtype), found)]


@dataclasses.dataclass(frozen=True)
class _Prompt:
    prompt_id: int
    tokens: np.ndarray
    images: tuple[Any, ...] = ()


def compared(
    engine: Any,
    weights: Any,
    prompts: Sequence[Any],
    state: Any,
    how: tuple[Any, Any],
    group_size: int = _GROUP,
) -> np.ndarray:
    """Samples, computes the same tokens' log-probs by the trainer; returns |differences|.

    Args:
      engine: the sampler.
      weights: that it reads.
      prompts: to answer.
      state: the trainer's.
      how: the trainer's pass, and the planner of its rows.
      group_size: responses to each prompt.
    """
    one, planner = how
    requests = [Request(p.prompt_id, p.tokens) for p in prompts]
    responses, _ = engine.generate(weights, requests, group_size=group_size, seed=0)
    responses = [dataclasses.replace(r, trained=np.ones(len(r.tokens), bool)) for r in responses]
    each = [p for p in prompts for _ in range(group_size)]
    found = policy_logprobs(state, one, laid(planner, each, responses), planner)
    return np.concatenate(
        [np.abs(a - r.logprobs) for a, r in zip(found.logprobs, responses, strict=True)]
    )


def _gap(model, dtype, gaps):
    return Gap(model, dtype, len(gaps), float(np.max(gaps)), float(np.mean(gaps)), LIMITS[dtype])
