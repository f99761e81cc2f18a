"""Accuracy on held-out problems, with the prompt format, sampler and rewards of training.

Training summarizes the result of `ask`; `python -m experiments.evaluate` stores every response.
Statistics come from `luspo_jax.benchmarks`.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from luspo_jax.benchmarks import Record
from luspo_jax.benchmarks.budgets import Judged, curve, right_under, tokens_per_right
from luspo_jax.benchmarks.intervals import accuracy_interval
from luspo_jax.experience.groups import Group, judged
from luspo_jax.hosts import processes
from luspo_jax.length.coupling import accuracy_by_length_third
from luspo_jax.prompts import PromptRecord
from luspo_jax.rewards import Scorer
from luspo_jax.rewards.record import FAILURES
from luspo_jax.rewards.samples import sample_of
from luspo_jax.rollout import Engine, Request, Response


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Statistics of a policy on a set of problems, `num_samples` responses each.

    Attributes:
      accuracy: mean@n, in [0, 1]: the mean over problems of the share of judged responses that are
        right.
      accuracy_ci95: (low, high) of the 95 % interval for problems like these,
        `luspo_jax.benchmarks.intervals.accuracy_interval`.
      mean_length: tokens per response, stop token included.
      truncated: share of responses that reached the length limit.
      accuracy_by_third: of the shortest, middle and longest third of each problem's responses.
      statuses: number of rewards with each status.
      num_problems, num_samples: size of the evaluation.
      completed: as `accuracy`, of responses that are right and ended by themselves; NaN if stored
        before it was measured.
      tokens_per_right: tokens of judged responses over the number of right ones; ∞ if none is.
      under_budgets: last part of a metric's name → value; empty unless asked for.
    """

    accuracy: float
    accuracy_ci95: tuple[float, float]
    mean_length: float
    truncated: float
    accuracy_by_third: tuple[float, float, float]
    statuses: dict[str, int]
    num_problems: int
    num_samples: int
    completed: float = math.nan
    tokens_per_right: float = math.nan
    under_budgets: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def unjudged(self) -> int:
        """Number of responses whose verifier failed or timed out; no accuracy counts them."""
        return sum(self.statuses.get(status, 0) for status in FAILURES)

    @property
    def metrics(self) -> dict[str, float]:
        """Values by the last part of their metric names."""
        low, high = self.accuracy_ci95
        return {
            f"acc/mean@{self.num_samples}": self.accuracy,
            "acc/ci95_low": low,
            "acc/ci95_high": high,
            "response_length/mean": self.mean_length,
            "response_length/clip_ratio": self.truncated,
            "unjudged": self.unjudged,
            "completed": self.completed,
            "tokens_per_right": self.tokens_per_right,
            **self.under_budgets,
        }

    def __str__(self) -> str:
        low, high = self.accuracy_ci95
        return (
            f"accuracy {100 * self.accuracy:.1f} % (95 %: {100 * low:.1f} … {100 * high:.1f}; "
            f"mean@{self.num_samples} of {self.num_problems} problems), "
            f"mean length {self.mean_length:.1f} tokens, truncated {100 * self.truncated:.1f} %"
            + (f", {self.unjudged} responses without a verdict" if self.unjudged else "")
        )


def ask(
    engine: Engine,
    params: Any,
    prompts: Sequence[PromptRecord],
    scorer: Scorer,
    *,
    decode: Callable[[np.ndarray], str],
    num_samples: int,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[Group]:
    """Samples and rewards `num_samples` responses to each prompt; each process takes its share.

    The noise depends only on `seed`, the prompt and the sample, so two policies evaluated with one
    seed get the same draws and their difference is paired.

    Args:
      engine: the sampler.
      params: the policy's weights.
      prompts: of the problems.
      scorer: the reward.
      decode: tokens → text.
      num_samples: responses per problem.
      seed: of the sampling noise.
      progress: called with (finished, total) responses of this process's share.
    """
    own = prompts[processes.share(len(prompts))]
    requests = [Request(p.prompt_id, p.tokens, p.images) for p in own]
    responses = []
    if requests:
        noise = {"group_size": num_samples, "seed": seed, "step": 0, "progress": progress}
        responses, _ = engine.generate(params, requests, **noise)
    limit = engine.sampling.max_response_length
    groups = judged(own, responses, scorer=scorer, decode=decode, max_length=limit)
    found = processes.gathered([group.responses for group in groups])
    return [Group(*pair) for pair in zip(prompts, found, strict=True)]


def kept(groups: Sequence[Group], benchmark: str, scorers: Sequence[str]) -> list[Record]:
    """Returns a record of every response and its verdict, prompt by prompt.

    Args:
      groups: from `ask`.
      benchmark: the benchmark of the problems.
      scorers: labels of the verifiers.
    """
    return [
        Record(
            benchmark=benchmark,
            problem_id=group.prompt.prompt_id,
            sample_id=response.sample_id,
            prompt=group.prompt.text,
            response=response.text,
            answer=group.prompt.example.answer,
            tokens=response.tokens.tolist(),
            length=len(response.tokens),
            truncated=not response.stopped,
            meta=group.prompt.example.meta,
            verdict=response.reward,
            scorers=scorers,
            problem=group.prompt.example.problem,
        )
        for group in groups
        for response in group.responses
    ]


def summarize(groups: Sequence[Group], *, metric: str) -> Evaluation:
    """Computes statistics of responses; accuracies cover those with a verdict.

    Args:
      groups: with the same number of responses to each prompt.
      metric: the reward part that counts as accuracy (right if its value is > 0.5).
    """
    responses = [response for group in groups for response in group.responses]
    num_samples = len(responses) // len(groups)
    rewards = [response.reward for response in responses]
    lengths_B = np.array([len(r.tokens) for r in responses])
    judged_B = np.array([r.judged for r in rewards])
    correct_B = np.array([r.judged and r.parts[metric] > 0.5 for r in rewards])
    groups_B = np.arange(len(responses)) // num_samples
    total_P, right_P = (x.reshape(-1, num_samples).sum(axis=1) for x in (judged_B, correct_B))
    some_P = total_P > 0
    whole_P = (correct_B & [r.stopped for r in responses]).reshape(-1, num_samples).sum(axis=1)
    statuses, counts = np.unique([r.status for r in rewards], return_counts=True)
    thirds = accuracy_by_length_third(lengths_B[judged_B], correct_B[judged_B], groups_B[judged_B])
    return Evaluation(
        accuracy=float(np.mean(right_P[some_P] / total_P[some_P])) if some_P.any() else np.nan,
        accuracy_ci95=accuracy_interval(right_P[some_P], total_P[some_P])
        if some_P.any()
        else (np.nan, np.nan),
        mean_length=float(lengths_B.mean()),
        truncated=float(np.mean([not r.stopped for r in responses])),
        accuracy_by_third=tuple(float(x) for x in thirds),
        statuses=dict(zip(statuses.tolist(), counts.tolist(), strict=True)),
        num_problems=len(total_P),
        num_samples=num_samples,
        completed=float(np.mean(whole_P[some_P] / total_P[some_P])) if some_P.any() else np.nan,
        tokens_per_right=tokens_per_right(lengths_B[judged_B], correct_B[judged_B]),
    )


def under_budgets(
    groups: Sequence[Group],
    budgets: Sequence[int],
    scorer: Scorer,
    *,
    decode: Callable[[np.ndarray], str],
    max_length: int,
    metric: str,
) -> dict[str, float]:
    """Returns accuracies of the same responses cut at each budget; each process judges its share.

    As in `summarize`, a cut without a verdict does not count.

    Args:
      groups: from `ask`.
      budgets: tokens, ascending.
      scorer: the reward.
      decode: tokens → text.
      max_length: the sampler's limit on response length, in tokens.
      metric: the reward part that counts as accuracy.

    Returns:
      Last part of a metric's name → value.
    """
    if not budgets:
        return {}
    known = [
        _whole(group.prompt, response, max_length)
        for group in groups[processes.share(len(groups))]
        for response in group.responses
    ]
    right_BK, _ = right_under(known, budgets, scorer, decode, metric)
    size = len(groups[0].responses)
    found = processes.gathered(list(right_BK.reshape(-1, size, len(budgets))))
    measured = curve(np.stack(found), budgets)
    cuts = zip(budgets, measured.accuracy, strict=True)
    return {f"budget/{b}/acc": right for b, right in cuts} | {"budget/area": measured.area}


def _whole(prompt: PromptRecord, response: Response, max_length: int) -> Judged:
    sample = sample_of(prompt, response.text, len(response.tokens), max_length)
    return Judged(prompt.text, response.tokens, sample, response.reward)
