"""Rounds of sampling: new prompts, the policy's responses, rewards."""

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
    """Samples and rewards responses.

    Attributes:
      stream: of the prompts.
      sampler: of the responses.
      scorer: of the rewards.
      decode: tokens → text.
      num_prompts: prompts per round.
      group_size: responses per prompt.
      seed: of the sampling noise.
      shaping: selects the responses that a step trains on.
      metric: the reward part that counts as accuracy.
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
    """Returns a full batch of rewarded groups, and the surplus for the next step.

    Args:
      asker: samples and rewards.
      weights: of the policy, as the sampler reads them.
      surplus: groups from the previous step.
      step: number of rollout steps that the policy has taken.
      metrics: receives times, costs of sampling, and what was left out.
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
    """Yields rounds of rewarded groups, each sampled on demand from new prompts.

    All processes see the same prompts; each samples and rewards its own share.

    Args:
      asker: samples and rewards.
      weights: of the policy, as the sampler reads them.
      step: number of rollout steps that the policy has taken.
      metrics: receives times and costs of sampling.
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
            # Prompts are not sent: every process has them, and their images are large.
            parts = processes.gather(([group.responses for group in groups], stats))
        metrics.update(_metrics([stats for _, stats in parts]))
        found = [responses for part, _ in parts for responses in part]
        yield [Group(*pair) for pair in zip(asked, found, strict=True)]


def _metrics(stats: Sequence[RolloutStats]) -> dict[str, float]:
    """Sums the statistics of the processes' samplers; averages shares."""
    names = ("decode_steps", "prefill_tokens", "prefill_calls", "generated_tokens",
             "recomputed_tokens", "preemptions")  # fmt: skip
    return {
        **{f"rollout/{name}": sum(getattr(s, name) for s in stats) for name in names},
        "rollout/pages_peak": sum(s.pages_peak / max(1, s.pages_total) for s in stats) / len(stats),
        "rollout/slot_utilisation": sum(s.slot_utilisation for s in stats) / len(stats),
    }


def _noise_ids(prompt_ids: Sequence[int]) -> list[int]:
    """Returns ids that key the sampling noise: the prompt's own, or another one if a small dataset
    repeats a prompt within a step, so that its groups differ."""
    seen: dict[int, int] = {}
    stride = max(prompt_ids) + 1
    ids = []
    for prompt_id in prompt_ids:
        occurrence = seen.get(prompt_id, 0)
        seen[prompt_id] = occurrence + 1
        ids.append(prompt_id + occurrence * stride)
    return ids
