"""Responses, groups and rollouts by hand, as the tests of each stage need them."""

import types

import numpy as np

from luspo_jax.datasets import Example
from luspo_jax.experience.groups import Group
from luspo_jax.prompts import PromptRecord
from luspo_jax.rewards import Reward
from luspo_jax.rollout import Response, RolloutStats

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


def sampled(prompt_id, sample_id, *, length, step=0, versions=None, ended=True):
    """A response as a sampler hands it over."""
    return Response(
        prompt_id,
        sample_id,
        np.arange(length, dtype=np.int32),
        np.full(length, -0.5, np.float32),
        stopped=ended,
        step=step,
        ended=ended,
        versions=np.full(length, step, np.uint32) if versions is None else versions,
    )


class Sampler:
    """In place of an engine: responses as long as `length(prompt_id, sample_id)` says.

    All are decoded together, and it asks after every token whether that is enough.
    """

    sampling = types.SimpleNamespace(max_response_length=12)

    def __init__(self, length):
        self.length, self.calls = length, []

    def generate(self, params, requests, *, group_size, seed, step, progress=None, until=None):
        call = {"params": params, "requests": requests, "group_size": group_size}
        self.calls.append(types.SimpleNamespace(**call, seed=seed, step=step))
        asked = [(r, s) for r in requests for s in range(group_size)]
        wanted = [self.length(r.prompt_id, s) for r, s in asked]
        begun = [len(r.begun[s].tokens) if r.begun else 0 for r, s in asked]
        steps = max((want - had for want, had in zip(wanted, begun, strict=True)), default=0)
        for more in range(1, steps + 1) if until else ():
            if until([had + more >= want for had, want in zip(begun, wanted, strict=True)]):
                steps = more
                break
        responses = []
        for (r, s), had, want in zip(asked, begun, wanted, strict=True):
            length = min(want, had + steps)
            before = r.begun[s].versions if r.begun else np.zeros(0, np.uint32)
            versions = np.concatenate([before, np.full(length - had, step, np.uint32)])
            own = {"length": length, "versions": versions, "ended": length == want}
            own["step"] = step if r.step is None else r.step
            responses.append(sampled(r.prompt_id, s, **own))
        if progress:
            progress(len(responses), len(responses))
        tokens = sum(len(response.tokens) for response in responses) - sum(begun)
        return responses, RolloutStats(10, len(requests), 1, tokens, 0.5, 0, 0.0, 1.0)


class Judge:
    """In place of a scorer: `verdict(sample)` is a reward or a number; keeps what it was shown."""

    def __init__(self, verdict):
        self.verdict, self.samples = verdict, []

    def score_batch(self, samples):
        found = []
        for sample in samples:
            self.samples.append(sample)
            value = self.verdict(sample)
            found.append(value if isinstance(value, Reward) else reward(value))
        return found
