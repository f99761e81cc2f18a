"""Metrics of the responses of a step, and their records for reading."""

from collections.abc import Iterator, Sequence

import numpy as np

from luspo_jax.datasets.images import image_name
from luspo_jax.experience.groups import Rollouts
from luspo_jax.length import coupling
from luspo_jax.metrics import RolloutRecord
from luspo_jax.prompts import PromptRecord
from luspo_jax.rewards import Reward


def records(rollouts: Rollouts) -> Iterator[RolloutRecord]:
    """Yields the record of every response."""
    for prompt, response in zip(rollouts.prompts, rollouts.responses, strict=True):
        verdict = response.reward
        yield RolloutRecord(
            prompt_id=prompt.prompt_id,
            sample_id=response.sample_id,
            prompt=prompt.text,
            response=response.text,
            answer=prompt.example.answer,
            tokens=response.tokens.tolist(),
            reward=verdict.value,
            parts=verdict.parts,
            status=verdict.status,
            prediction=verdict.prediction,
            advantage=float(response.advantage),
            length=len(response.tokens),
            truncated=not response.stopped,
            images=_image_names(prompt),
        )


def _image_names(prompt: PromptRecord) -> list[str]:
    """Names the images that the model saw: none for a model that reads text."""
    return [image_name(each) for each in prompt.example.meta["images"]] if prompt.images else []


def metrics(rollouts: Rollouts, *, correct: str) -> dict[str, float]:
    """Returns metrics of rewards, lengths and their relation; the part `correct` is accuracy.

    Reward metrics cover responses with a verdict: a failed verifier's 0 is no reward.
    """
    lengths_B, judged_B = rollouts.lengths_B, rollouts.judged_B
    rewards, advantages_B = rollouts.column("reward"), rollouts.advantages_B
    verdicts = [reward for reward in rewards if reward.judged]
    correct_J = np.array([reward.parts[correct] > 0.5 for reward in verdicts], bool)
    right, wrong = coupling.length_by_correctness(lengths_B[judged_B], correct_J)
    solved, quartiles = coupling.length_by_pass_rate(
        lengths_B[judged_B], correct_J, rollouts.group_ids_B[judged_B]
    )
    clipped = np.mean([not stopped for stopped in rollouts.column("stopped")])
    values = {
        **_reward_metrics(rollouts, verdicts),
        **_spread("critic/advantages", advantages_B[judged_B]),
        **_spread("response_length", lengths_B),
        **_spread("prompt_length", [len(group.prompt.tokens) for group in rollouts.groups]),
        "response_length/clip_ratio": clipped,
        "completions/clipped_ratio": clipped,
        "length/advantage_corr": coupling.advantage_length_correlation(
            advantages_B[judged_B], lengths_B[judged_B], rollouts.group_ids_B[judged_B]
        ),
        "length/correct_mean": right,
        "length/incorrect_mean": wrong,
        "length/solved_mean": solved,
        **{f"length/by_pass_rate/q{q}": mean for q, mean in enumerate(quartiles, start=1)},
        "response/repetition": np.mean([coupling.repetition(t) for t in rollouts.column("tokens")]),
        "response/compress_ratio": np.mean(
            [coupling.compress_ratio(t) for t in rollouts.column("text")]
        ),
        "shaping/trained_responses": rollouts.trained_B.sum(),
    }
    statuses, counts = np.unique([r.status for r in rewards], return_counts=True)
    values |= {f"reward/status/{s}": c for s, c in zip(statuses, counts, strict=True)}
    return {name: float(value) for name, value in values.items()}


def _reward_metrics(rollouts: Rollouts, verdicts: Sequence[Reward]) -> dict[str, float]:
    """Returns means over judged responses, and spreads in groups with at least two of them."""
    scores_J = np.array([reward.value for reward in verdicts], np.float32)
    compared = [v for g in rollouts.groups if len(v := g.values()[g.judged]) > 1]
    parts = rollouts.responses[0].reward.parts
    return {
        "reward": _mean(scores_J),
        "reward_std": _mean([values.std(ddof=1) for values in compared]),
        "frac_reward_zero_std": _mean([np.ptp(values) == 0 for values in compared]),
        "reward/unjudged": len(rollouts.responses) - len(verdicts),
        "reward/groups_not_compared": len(rollouts.groups) - len(compared),
        **_spread("critic/score", scores_J),
        **{f"reward/part/{name}": _mean([r.parts[name] for r in verdicts]) for name in parts},
    }


def _mean(values):
    return np.mean(values) if len(values) else np.nan


def _spread(name, values):
    return {
        f"{name}/{f}": getattr(np, f)(values) if len(values) else np.nan
        for f in ("mean", "max", "min")
    }
