"""Responses, groups and rollouts by hand, as the tests of each stage need them."""

import numpy as np

from luspo_jax.datasets import Example
from luspo_jax.experience.groups import Group
from luspo_jax.prompts import PromptRecord
from luspo_jax.rewards import Reward
from luspo_jax.rollout import Response

FAILED = Reward(0.0, "error", {"right": 0.0}, detail="right: TypeError")
LATE = Reward(0.0, "timeout", {"right": 0.0})


def reward(value):
    """A verdict; what pays is right."""
    return Reward(float(value), "ok", {"right": float(value > 0)})


def prompt(prompt_id, tokens=(1,), text="?"):
    return PromptRecord(
        prompt_id, np.array(tokens, np.int32), text, Example(prompt_id, "?", "!", {"level": 3})
    )


def group(prompt_id, values, lengths=None, stopped=None, judged=None, version=0, **columns):
    """A group of responses with these rewards, numbers or verdicts.

    Where `judged` says no, the verifier failed. `columns` are other fields of each response.
    """
    size = len(values)
    lengths = lengths or [3] * size
    stopped = stopped or [True] * size
    judged = judged or [True] * size
    verdicts = [
        (value if isinstance(value, Reward) else reward(value)) if known else FAILED
        for value, known in zip(values, judged, strict=True)
    ]
    rng = np.random.default_rng(prompt_id)
    responses = [
        Response(
            prompt_id=prompt_id,
            sample_id=i,
            tokens=np.arange(n, dtype=np.int32),
            logprobs=-rng.random(n).astype(np.float32),
            stopped=stop,
            versions=np.full(n, version, np.uint32),
            text="x" * n,
            reward=verdict,
            counted=verdict.judged,
            trained=np.full(n, verdict.judged),
        )
        for i, (n, stop, verdict) in enumerate(zip(lengths, stopped, verdicts, strict=True))
    ]
    return Group(prompt(prompt_id), responses).enriched(**columns)
