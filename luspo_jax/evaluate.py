"""Accuracy of a policy on held-out problems: the same prompts, sampler and rewards as training.

Training validates with `evaluate`; `python -m experiments.evaluate` keeps what `respond` gives.
Both ask and score by the same code, and their numbers come from `luspo_jax.benchmarks`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from luspo_jax.benchmarks import Record
from luspo_jax.benchmarks.intervals import accuracy_interval
from luspo_jax.hosts import processes
from luspo_jax.length.coupling import accuracy_by_length_third
from luspo_jax.prompts import PromptRecord
from luspo_jax.rewards import Reward, Sample, Scorer
from luspo_jax.rewards.extraction import with_opening
from luspo_jax.rewards.record import FAILURES
from luspo_jax.rollout import Engine, Request, Response


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What a policy does on a set of problems, `num_samples` responses each.

    Attributes:
      accuracy: mean@n, in [0, 1]: the mean over problems of the right share of judged responses.
      accuracy_ci95: (low, high) of the 95 % interval for problems like these,
        `luspo_jax.benchmarks.intervals.accuracy_interval`.
      mean_length: tokens a response, stop token included.
      truncated: share of responses that reached the length limit.
      accuracy_by_third: of the shortest, middle and longest third of each problem's responses.
      statuses: how many rewards had each status.
      num_problems, num_samples: the size of it.
    """

    accuracy: float
    accuracy_ci95: tuple[float, float]
    mean_length: float
    truncated: float
    accuracy_by_third: tuple[float, float, float]
    statuses: dict[str, int]
    num_problems: int
    num_samples: int

    @property
    def unjudged(self) -> int:
        """Responses whose verifier failed or timed out; no accuracy counts them."""
        return sum(self.statuses.get(status, 0) for status in FAILURES)

    def __str__(self) -> str:
        low, high = self.accuracy_ci95
        return (
            f"accuracy {100 * self.accuracy:.1f} % (95 %: {100 * low:.1f} … {100 * high:.1f}; "
            f"mean@{self.num_samples} of {self.num_problems} problems), "
            f"mean length {self.mean_length:.1f} tokens, truncated {100 * self.truncated:.1f} %"
            + (f", {self.unjudged} responses without a verdict" if self.unjudged else "")
        )


def evaluate(
    engine: Engine,
    params: Any,
    prompts: Sequence[PromptRecord],
    scorer: Scorer,
    *,
    decode: Callable[[np.ndarray], str],
    metric: str,
    num_samples: int,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Samples and scores `num_samples` responses to each prompt.

    The noise depends on `seed`, the prompt and the sample only, so two policies evaluated with
    one seed face the same draws and their difference is paired.

    Args:
      engine: the sampler.
      params: the policy's weights.
      prompts: what to ask.
      scorer: the reward, of which part `metric` is taken as being right (value > 0.5).
      decode: tokens → text.
      metric: a part of the reward.
      num_samples: responses a problem.
      seed: of the sampling noise.
      progress: called with (finished, total) responses, of this process's share.
    """
    responses, _, rewards = _ask(
        engine,
        params,
        prompts,
        scorer,
        decode=decode,
        noise={"group_size": num_samples, "seed": seed, "progress": progress},
    )
    return summarize(responses, rewards, metric=metric, num_samples=num_samples)


def respond(
    engine: Engine,
    params: Any,
    prompts: Sequence[PromptRecord],
    scorer: Scorer,
    *,
    decode: Callable[[np.ndarray], str],
    benchmark: str,
    num_samples: int,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[Record]:
    """As `evaluate`, but every response with its verdict, prompt by prompt, for keeping."""
    responses, texts, rewards = _ask(
        engine,
        params,
        prompts,
        scorer,
        decode=decode,
        noise={"group_size": num_samples, "seed": seed, "progress": progress},
    )
    asked = [prompt for prompt in prompts for _ in range(num_samples)]
    rows = zip(asked, responses, texts, rewards, strict=True)
    return [
        Record(
            benchmark=benchmark,
            problem_id=prompt.prompt_id,
            sample_id=response.sample_id,
            prompt=prompt.text,
            response=text,
            answer=prompt.example.answer,
            tokens=response.tokens.tolist(),
            length=len(response.tokens),
            truncated=not response.stopped,
            meta=prompt.example.meta,
            verdict=verdict,
            scorers=scorer.labels,
            problem=prompt.example.problem,
        )
        for prompt, response, text, verdict in rows
    ]


def _ask(engine, params, prompts, scorer, *, decode, noise):
    """(responses, their texts, their rewards), prompt by prompt; each process asks its share."""
    prompts = prompts[processes.share(len(prompts))]
    requests = [Request(p.prompt_id, p.tokens, p.images) for p in prompts]
    responses, _ = engine.generate(params, requests, step=0, **noise) if requests else ([], None)
    texts = [decode(response.tokens) for response in responses]
    limit = engine.sampling.max_response_length
    rewards = score(scorer, prompts, responses, texts=texts, max_length=limit)
    parts = processes.gather((responses, texts, rewards))
    return [[row for part in parts for row in part[column]] for column in range(3)]


def score(
    scorer: Scorer,
    prompts: Sequence[PromptRecord],
    responses: Sequence[Response],
    *,
    texts: Sequence[str],
    max_length: int,
) -> list[Reward]:
    """Rewards of responses and their texts, which come prompt by prompt in equal numbers.

    A `<think>` on which the prompt ends belongs to the response.
    """
    group_size = len(responses) // max(1, len(prompts))
    return scorer.score_batch(
        [
            Sample(
                response=with_opening(prompts[row // group_size].text, texts[row]),
                answer=prompts[row // group_size].example.answer,
                length=len(response.tokens),
                max_length=max_length,
                meta=prompts[row // group_size].example.meta,
                problem=prompts[row // group_size].example.problem,
            )
            for row, response in enumerate(responses)
        ]
    )


def summarize(
    responses: Sequence[Response], rewards: Sequence[Reward], *, metric: str, num_samples: int
) -> Evaluation:
    """Statistics of scored responses; accuracies are over those that have a verdict."""
    lengths_B = np.array([len(r.tokens) for r in responses])
    judged_B = np.array([r.judged for r in rewards])
    correct_B = np.array([r.judged and r.parts[metric] > 0.5 for r in rewards])
    groups_B = np.arange(len(responses)) // num_samples
    total_P, right_P = (x.reshape(-1, num_samples).sum(axis=1) for x in (judged_B, correct_B))
    some_P = total_P > 0
    statuses, counts = np.unique([r.status for r in rewards], return_counts=True)
    return Evaluation(
        accuracy=float(np.mean(right_P[some_P] / total_P[some_P])) if some_P.any() else np.nan,
        accuracy_ci95=accuracy_interval(right_P[some_P], total_P[some_P])
        if some_P.any()
        else (np.nan, np.nan),
        mean_length=float(lengths_B.mean()),
        truncated=float(np.mean([not r.stopped for r in responses])),
        accuracy_by_third=tuple(
            float(x)
            for x in accuracy_by_length_third(
                lengths_B[judged_B], correct_B[judged_B], groups_B[judged_B]
            )
        ),
        statuses=dict(zip(statuses.tolist(), counts.tolist(), strict=True)),
        num_problems=len(total_P),
        num_samples=num_samples,
    )
