"""One step's responses with their rewards, and what is measured of them."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from luspo_jax import evaluate
from luspo_jax.length import coupling
from luspo_jax.metrics import RolloutRecord
from luspo_jax.prompts import PromptRecord
from luspo_jax.rewards import Reward, Scorer
from luspo_jax.rollout import Response


@dataclasses.dataclass(frozen=True)
class Rollouts:
    """Responses group by group, and what is known of each.

    Attributes:
      prompts: one a response.
      responses: tokens and the sampler's log-probs.
      texts: the decoded responses.
      rewards: the verdicts.
      group_ids_B: int32, 0 … P−1.
      kept_B: bool, false for responses that leave the loss and every group statistic.
    """

    prompts: Sequence[PromptRecord]
    responses: Sequence[Response]
    texts: Sequence[str]
    rewards: Sequence[Reward]
    group_ids_B: np.ndarray
    kept_B: np.ndarray

    @property
    def rewards_B(self) -> np.ndarray:
        return np.array([reward.value for reward in self.rewards], np.float32)

    @property
    def lengths_B(self) -> np.ndarray:
        return np.array([len(response.tokens) for response in self.responses], np.int32)


def scored(
    prompts: Sequence[PromptRecord],
    responses: Sequence[Response],
    *,
    scorer: Scorer,
    decode: Callable[[np.ndarray], str],
    max_length: int,
) -> Rollouts:
    """Scores responses that come prompt by prompt, equally many to each.

    One whose verifier failed or timed out has no verdict: it is counted and leaves the loss,
    instead of passing for a wrong answer.
    """
    group_size = len(responses) // len(prompts)
    texts = [decode(response.tokens) for response in responses]
    rewards = evaluate.score(scorer, prompts, responses, texts=texts, max_length=max_length)
    return Rollouts(
        prompts=[prompt for prompt in prompts for _ in range(group_size)],
        responses=responses,
        texts=texts,
        rewards=rewards,
        group_ids_B=np.repeat(np.arange(len(prompts), dtype=np.int32), group_size),
        kept_B=np.array([r.status not in ("timeout", "error") for r in rewards]),
    )


def records(rollouts: Rollouts, advantages_B: np.ndarray) -> Iterator[RolloutRecord]:
    """Every response, for reading."""
    for row, response in enumerate(rollouts.responses):
        prompt, verdict = rollouts.prompts[row], rollouts.rewards[row]
        yield RolloutRecord(
            prompt_id=prompt.prompt_id,
            sample_id=response.sample_id,
            prompt=prompt.text,
            response=rollouts.texts[row],
            answer=prompt.example.answer,
            tokens=response.tokens.tolist(),
            reward=verdict.value,
            parts=verdict.parts,
            status=verdict.status,
            prediction=verdict.prediction,
            advantage=float(advantages_B[row]),
            length=len(response.tokens),
            truncated=not response.stopped,
        )


def metrics(rollouts: Rollouts, advantages_B: np.ndarray, *, correct: str) -> dict[str, float]:
    """Rewards, lengths, and how the two go together; the reward part `correct` is being right."""
    rewards_B, lengths_B = rollouts.rewards_B, rollouts.lengths_B
    by_group = rewards_B.reshape(len(np.unique(rollouts.group_ids_B)), -1)
    correct_B = np.array([r.parts[correct] > 0.5 for r in rollouts.rewards])
    right, wrong = coupling.length_by_correctness(lengths_B, correct_B)
    clipped = np.mean([not response.stopped for response in rollouts.responses])
    values = {
        "reward": rewards_B.mean(),
        "reward_std": by_group.std(axis=1, ddof=1).mean(),
        "frac_reward_zero_std": (np.ptp(by_group, axis=1) == 0).mean(),
        **_spread("critic/score", rewards_B),
        **_spread("critic/advantages", advantages_B),
        **_spread("response_length", lengths_B),
        **_spread("prompt_length", [len(prompt.tokens) for prompt in rollouts.prompts]),
        "response_length/clip_ratio": clipped,
        "completions/clipped_ratio": clipped,
        "length/advantage_corr": coupling.advantage_length_correlation(
            advantages_B, lengths_B, rollouts.group_ids_B
        ),
        "length/correct_mean": right,
        "length/incorrect_mean": wrong,
        "response/repetition": np.mean([coupling.repetition(r.tokens) for r in rollouts.responses]),
        "response/compress_ratio": np.mean([coupling.compress_ratio(t) for t in rollouts.texts]),
    }
    for part in rollouts.rewards[0].parts:
        values[f"reward/part/{part}"] = np.mean([r.parts[part] for r in rollouts.rewards])
    statuses, counts = np.unique([r.status for r in rollouts.rewards], return_counts=True)
    values |= {f"reward/status/{s}": c for s, c in zip(statuses, counts, strict=True)}
    return {name: float(value) for name, value in values.items()}


def _spread(name, values):
    return {f"{name}/{f}": getattr(np, f)(values) for f in ("mean", "max", "min")}
