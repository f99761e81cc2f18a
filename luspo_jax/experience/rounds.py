"""Rounds of sampling: new prompts, responses of the policy, rewards."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from luspo_jax.experience import shaping
from luspo_jax.experience.groups import Group, Rollouts, judged
from luspo_jax.experience.shaping import Shaping
from luspo_jax.hosts import processes
from luspo_jax.metrics import StepMetrics, timed
from luspo_jax.prompts import PromptStream
from luspo_jax.rewards import Scorer
from luspo_jax.rollout import Engine, Request, RolloutStats


@dataclasses.dataclass(frozen=True)
class Asker:
    """What samples responses and judges them.

    Attributes:
      stream: of the prompts.
      sampler: of the responses.
      scorer: of the rewards.
      decode: tokens → text.
      num_prompts: prompts of a round.
      group_size: responses to each.
      seed: of the sampling noise.
      shaping: which of the responses a step trains on.
      metric: the part of the reward that tells right from wrong.
    """

    stream: PromptStream
    sampler: Engine
    scorer: Scorer
    decode: Callable[[np.ndarray], str]
    num_prompts: int
    group_size: int
    seed: int
    shaping: Shaping
    metric: str


def collect(
    asker: Asker, weights: Any, surplus: Sequence[Group], step: int, metrics: StepMetrics
) -> tuple[Rollouts, list[Group]]:
    """A full batch of judged groups, and what is carried over to the next step.

    Args:
      asker: what asks.
      weights: of the policy, as the sampler reads them.
      surplus: groups carried over from the step before.
      step: rollout steps that the policy has taken.
      metrics: receives times, what sampling cost, and what was left out.
    """
    found = shaping.collect(
        rounds(asker, weights, step, metrics),
        surplus,
        shaping=asker.shaping,
        num_groups=asker.num_prompts,
        part=asker.metric,
    )
    metrics.update(found.counts)
    metrics.update(asker.stream.metrics)
    return Rollouts(found.groups, version=step), found.surplus


def rounds(asker: Asker, weights: Any, step: int, metrics: StepMetrics) -> Iterator[list[Group]]:
    """Samples and judges a round of groups whenever one is asked for, each with new prompts.

    All processes see the same prompts, of which each samples and judges its own share.

    Args:
      asker: what asks.
      weights: of the policy, as the sampler reads them.
      step: rollout steps that the policy has taken.
      metrics: receives times and what sampling cost.
    """
    used: list[int] = []
    while True:
        asked = asker.stream.next_prompts(asker.num_prompts)
        used.extend(prompt.prompt_id for prompt in asked)
        own = processes.share(len(asked))
        prompts = asked[own]
        noise = zip(_noise_ids(used)[-len(asked) :][own], prompts, strict=True)
        with timed(metrics, "gen"):
            responses, stats = asker.sampler.generate(
                weights,
                [Request(i, prompt.tokens, prompt.images) for i, prompt in noise],
                group_size=asker.group_size,
                seed=asker.seed,
                step=step,
            )
        with timed(metrics, "reward"):
            groups = judged(
                prompts,
                responses,
                scorer=asker.scorer,
                decode=asker.decode,
                max_length=asker.sampler.sampling.max_response_length,
                version=step,
            )
        with timed(metrics, "gather"):
            # Every process has the prompts, and their images are large.
            parts = processes.gather(([group.responses for group in groups], stats))
        metrics.update(_metrics([stats for _, stats in parts]))
        found = [responses for part, _ in parts for responses in part]
        yield [Group(*pair) for pair in zip(asked, found, strict=True)]


def _metrics(stats: Sequence[RolloutStats]) -> dict[str, float]:
    """Sums over the processes' samplers; the mean of how well they were used."""
    names = ("decode_steps", "prefill_tokens", "prefill_calls", "generated_tokens")
    return {
        **{f"rollout/{name}": sum(getattr(s, name) for s in stats) for name in names},
        "rollout/slot_utilisation": sum(s.slot_utilisation for s in stats) / len(stats),
    }


def _noise_ids(prompt_ids: Sequence[int]) -> list[int]:
    """Ids that key the sampling noise: the prompt's own, or another one where a small dataset
    brings a prompt twice in one step, so that its groups differ."""
    seen: dict[int, int] = {}
    stride = max(prompt_ids) + 1
    ids = []
    for prompt_id in prompt_ids:
        occurrence = seen.get(prompt_id, 0)
        seen[prompt_id] = occurrence + 1
        ids.append(prompt_id + occurrence * stride)
    return ids
