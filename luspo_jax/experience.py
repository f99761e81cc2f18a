"""One step's responses with their rewards, and what is measured of them."""

import base64
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from luspo_jax import evaluate
from luspo_jax.datasets import Example
from luspo_jax.length import coupling
from luspo_jax.metrics import RolloutRecord
from luspo_jax.prompts import PromptRecord
from luspo_jax.rewards import Reward, Scorer
from luspo_jax.rollout import Response


@dataclasses.dataclass(frozen=True)
class Group:
    """The responses to one prompt.

    Attributes:
      prompt: the prompt.
      responses: tokens and the sampler's log-probs.
      texts: the decoded responses.
      rewards: the verdicts.
      counted: whether each response counts in the group's statistics.
      trained: whether each carries gradient; never without being counted.
      carried: sampled in an earlier step, by the policy of that step.
    """

    prompt: PromptRecord
    responses: Sequence[Response]
    texts: Sequence[str]
    rewards: Sequence[Reward]
    counted: np.ndarray
    trained: np.ndarray
    carried: bool = False

    @property
    def judged(self) -> np.ndarray:
        """Whether each response has a verdict."""
        return np.array([reward.judged for reward in self.rewards])

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each response."""
        return np.array([len(response.tokens) for response in self.responses], np.int32)

    def values(self, part: str | None = None) -> np.ndarray:
        """The reward of each response, or one part of it."""
        return np.array(
            [r.value if part is None else r.parts[part] for r in self.rewards], np.float32
        )


@dataclasses.dataclass(frozen=True)
class Rollouts:
    """The groups that a step trains on, response by response."""

    groups: Sequence[Group]

    @property
    def responses(self) -> list[Response]:
        return [response for group in self.groups for response in group.responses]

    @property
    def prompts(self) -> list[PromptRecord]:
        """One a response."""
        return [group.prompt for group in self.groups for _ in group.responses]

    @property
    def rewards(self) -> list[Reward]:
        return [reward for group in self.groups for reward in group.rewards]

    @property
    def texts(self) -> list[str]:
        return [text for group in self.groups for text in group.texts]

    @property
    def rewards_B(self) -> np.ndarray:
        return np.concatenate([group.values() for group in self.groups])

    @property
    def lengths_B(self) -> np.ndarray:
        return np.concatenate([group.lengths for group in self.groups])

    @property
    def counted_B(self) -> np.ndarray:
        return np.concatenate([group.counted for group in self.groups])

    @property
    def trained_B(self) -> np.ndarray:
        return np.concatenate([group.trained for group in self.groups])

    @property
    def carried_B(self) -> np.ndarray:
        return np.repeat([group.carried for group in self.groups], self._sizes)

    @property
    def group_ids_B(self) -> np.ndarray:
        """int32, 0 … P−1."""
        return np.repeat(np.arange(len(self.groups), dtype=np.int32), self._sizes)

    @property
    def _sizes(self):
        return [len(group.responses) for group in self.groups]


def scored(
    prompts: Sequence[PromptRecord],
    responses: Sequence[Response],
    *,
    scorer: Scorer,
    decode: Callable[[np.ndarray], str],
    max_length: int,
) -> list[Group]:
    """Scores responses that come prompt by prompt, equally many to each.

    One whose verifier failed or timed out has no verdict: it is reported and neither counts nor
    carries gradient, instead of passing for a wrong answer.
    """
    size = len(responses) // len(prompts)
    texts = [decode(response.tokens) for response in responses]
    rewards = evaluate.score(scorer, prompts, responses, texts=texts, max_length=max_length)
    judged = np.array([reward.judged for reward in rewards])
    groups = []
    for index, prompt in enumerate(prompts):
        rows = slice(index * size, (index + 1) * size)
        groups.append(
            Group(prompt, responses[rows], texts[rows], rewards[rows], judged[rows], judged[rows])
        )
    return groups


def records(rollouts: Rollouts, advantages_B: np.ndarray) -> Iterator[RolloutRecord]:
    """Every response, for reading."""
    rows = zip(rollouts.prompts, rollouts.responses, rollouts.texts, rollouts.rewards, strict=True)
    for row, (prompt, response, text, verdict) in enumerate(rows):
        yield RolloutRecord(
            prompt_id=prompt.prompt_id,
            sample_id=response.sample_id,
            prompt=prompt.text,
            response=text,
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
    """Rewards, lengths, and how the two go together; the reward part `correct` is being right.

    Whatever reads a reward is over the responses that have one: a failed verifier's 0 is no score.
    """
    lengths_B = rollouts.lengths_B
    judged_B = np.concatenate([group.judged for group in rollouts.groups])
    verdicts = [reward for reward in rollouts.rewards if reward.judged]
    correct_J = np.array([reward.parts[correct] > 0.5 for reward in verdicts], bool)
    right, wrong = coupling.length_by_correctness(lengths_B[judged_B], correct_J)
    clipped = np.mean([not response.stopped for response in rollouts.responses])
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
        "response/repetition": np.mean([coupling.repetition(r.tokens) for r in rollouts.responses]),
        "response/compress_ratio": np.mean([coupling.compress_ratio(t) for t in rollouts.texts]),
        "shaping/trained_responses": rollouts.trained_B.sum(),
    }
    statuses, counts = np.unique([r.status for r in rollouts.rewards], return_counts=True)
    values |= {f"reward/status/{s}": c for s, c in zip(statuses, counts, strict=True)}
    return {name: float(value) for name, value in values.items()}


def _reward_metrics(rollouts: Rollouts, verdicts: Sequence[Reward]) -> dict[str, float]:
    """Means over judged responses, and spreads inside the groups that have two of them."""
    scores_J = np.array([reward.value for reward in verdicts], np.float32)
    compared = [v for g in rollouts.groups if len(v := g.values()[g.judged]) > 1]
    parts = rollouts.rewards[0].parts
    return {
        "reward": _mean(scores_J),
        "reward_std": _mean([values.std(ddof=1) for values in compared]),
        "frac_reward_zero_std": _mean([np.ptp(values) == 0 for values in compared]),
        "reward/unjudged": len(rollouts.rewards) - len(verdicts),
        "reward/groups_not_compared": len(rollouts.groups) - len(compared),
        **_spread("critic/score", scores_J),
        **{f"reward/part/{name}": _mean([r.parts[name] for r in verdicts]) for name in parts},
    }


def to_json(groups: Iterable[Group]) -> list[dict[str, Any]]:
    """Groups as JSON values, exactly: arrays as base64 of their bytes."""
    return [
        {
            "prompt": {
                "prompt_id": group.prompt.prompt_id,
                "tokens": _packed(group.prompt.tokens, "<i4"),
                "text": group.prompt.text,
                "example": dataclasses.asdict(group.prompt.example),
            },
            "responses": [
                {
                    "sample_id": r.sample_id,
                    "tokens": _packed(r.tokens, "<i4"),
                    "logprobs": _packed(r.logprobs, "<f4"),
                    "stopped": r.stopped,
                    **_experts_to_json(r),
                }
                for r in group.responses
            ],
            "texts": list(group.texts),
            "rewards": [dataclasses.asdict(reward) for reward in group.rewards],
            "counted": group.counted.tolist(),
            "trained": group.trained.tolist(),
        }
        for group in groups
    ]


def from_json(stored: Iterable[Mapping[str, Any]]) -> list[Group]:
    """The groups that `to_json` wrote, as carried over from an earlier step."""
    return [_group(values) for values in stored]


def _group(values):
    prompt = values["prompt"]
    example = Example(**prompt["example"])
    record = PromptRecord(
        prompt["prompt_id"], _unpacked(prompt["tokens"], "<i4"), prompt["text"], example
    )
    responses = [
        Response(
            prompt_id=record.prompt_id,
            sample_id=r["sample_id"],
            tokens=_unpacked(r["tokens"], "<i4"),
            logprobs=_unpacked(r["logprobs"], "<f4"),
            stopped=r["stopped"],
            **_experts_from_json(r),
        )
        for r in values["responses"]
    ]
    return Group(
        prompt=record,
        responses=responses,
        texts=values["texts"],
        rewards=[Reward(**reward) for reward in values["rewards"]],
        counted=np.array(values["counted"], bool),
        trained=np.array(values["trained"], bool),
        carried=True,
    )


# Name in a file, which carried responses of older runs have → field of a Response.
_EXPERT_IDS = {"experts": "expert_ids", "prompt_experts": "prompt_expert_ids"}


def _experts_to_json(response):
    if response.expert_ids is None:
        return {}
    found = {name: getattr(response, field) for name, field in _EXPERT_IDS.items()}
    return {
        name: {"shape": list(ids.shape), "type": ids.dtype.str, "ids": _packed(ids, ids.dtype)}
        for name, ids in found.items()
    }


def _experts_from_json(stored):
    return {
        field: _unpacked(stored[name]["ids"], stored[name]["type"]).reshape(stored[name]["shape"])
        for name, field in _EXPERT_IDS.items()
        if name in stored
    }


def _packed(array, dtype):
    return base64.b64encode(np.asarray(array).astype(dtype).tobytes()).decode()


def _unpacked(text, dtype):
    return np.frombuffer(base64.b64decode(text), dtype).astype(np.dtype(dtype).newbyteorder("="))


def _mean(values):
    return np.mean(values) if len(values) else np.nan


def _spread(name, values):
    return {
        f"{name}/{f}": getattr(np, f)(values) if len(values) else np.nan
        for f in ("mean", "max", "min")
    }
