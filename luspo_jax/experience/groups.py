"""The responses of a step in groups, to which every stage adds fields."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from luspo_jax.length.accounting import AccountState
from luspo_jax.prompts import PromptRecord
from luspo_jax.rewards import Scorer
from luspo_jax.rewards.group import GroupScorer
from luspo_jax.rewards.samples import sample_of
from luspo_jax.rollout import Response


@dataclasses.dataclass(frozen=True)
class Group:
    """A prompt and the responses to it."""

    prompt: PromptRecord
    responses: Sequence[Response]

    def column(self, name: str) -> list[Any]:
        """Returns a field of each response."""
        return [getattr(response, name) for response in self.responses]

    @property
    def counted(self) -> np.ndarray:
        """Whether each response counts in the group's statistics."""
        return np.array(self.column("counted"), bool)

    @property
    def judged(self) -> np.ndarray:
        """Whether each response has a verdict."""
        return np.array([reward.judged for reward in self.column("reward")], bool)

    @property
    def step(self) -> int:
        """The step that began it."""
        return self.responses[0].step

    @property
    def ended(self) -> bool:
        """Whether all its responses have ended."""
        return all(self.column("ended"))

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each response."""
        return np.array([len(tokens) for tokens in self.column("tokens")], np.int32)

    def values(self, part: str | None = None) -> np.ndarray:
        """Returns the reward of each response, or one part of it."""
        return np.array(
            [r.value if part is None else r.parts[part] for r in self.column("reward")], np.float32
        )

    def enriched(self, **columns: Sequence[Any]) -> "Group":
        """Returns the group with new values in some fields of its responses."""
        return Group(self.prompt, _enriched(self.responses, columns))


@dataclasses.dataclass(frozen=True)
class Waiting:
    """What a step leaves to the next.

    Attributes:
      surplus: rewarded groups beyond a full batch.
      begun: groups of which a response has not ended, or which no batch has taken yet.
      batch: the whole next batch, if it was sampled while this step trained.
      metrics: of sampling that batch, as `StepMetrics.values`.
      account: lengths sampled and trained on in the last steps.
      duals: dual variables of group rewards, by name.
    """

    surplus: Sequence[Group] = ()
    begun: Sequence[Group] = ()
    batch: Sequence[Group] = ()
    metrics: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    account: AccountState = dataclasses.field(default_factory=AccountState)
    duals: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def without_images(self) -> "Waiting":
        """Returns what waits without the images of its prompts, which are large."""
        return self.with_images(
            lambda prompts: [dataclasses.replace(prompt, images=()) for prompt in prompts]
        )

    def with_images(
        self, read: Callable[[Sequence[PromptRecord]], Sequence[PromptRecord]]
    ) -> "Waiting":
        """Returns what waits with the images of its prompts, as `read` restores them."""

        def seen(groups):
            prompts = read([group.prompt for group in groups])
            return [Group(p, group.responses) for p, group in zip(prompts, groups, strict=True)]

        parts = {name: seen(getattr(self, name)) for name in ("surplus", "begun", "batch")}
        return dataclasses.replace(self, **parts)


@dataclasses.dataclass(frozen=True)
class Rollouts:
    """The groups that a step trains on, with views of their responses.

    Attributes:
      groups: the groups.
      version: number of steps that the policy at the start of this step has taken.
    """

    groups: Sequence[Group]
    version: int

    def column(self, name: str) -> list[Any]:
        """Returns a field of each response."""
        return [value for group in self.groups for value in group.column(name)]

    @property
    def responses(self) -> list[Response]:
        """All responses, group by group."""
        return [response for group in self.groups for response in group.responses]

    @property
    def prompts(self) -> list[PromptRecord]:
        """The prompt of each response."""
        return [group.prompt for group in self.groups for _ in group.responses]

    @property
    def rewards_B(self) -> np.ndarray:
        """float32 reward of each response."""
        return np.concatenate([group.values() for group in self.groups])

    @property
    def lengths_B(self) -> np.ndarray:
        """int32 tokens of each response."""
        return np.concatenate([group.lengths for group in self.groups])

    @property
    def judged_B(self) -> np.ndarray:
        """Whether each response has a verdict."""
        return np.concatenate([group.judged for group in self.groups])

    @property
    def counted_B(self) -> np.ndarray:
        """Whether each response counts in its group's statistics."""
        return np.array(self.column("counted"), bool)

    @property
    def trained_B(self) -> np.ndarray:
        """Whether each response has a token that carries gradient."""
        return np.array([trained.any() for trained in self.column("trained")], bool)

    @property
    def fresh_B(self) -> np.ndarray:
        """Whether the policy that starts the step sampled every token of each response."""
        return np.array([(v == self.version).all() for v in self.column("versions")], bool)

    @property
    def advantages_B(self) -> np.ndarray:
        """float32 advantage of each response."""
        return np.array(self.column("advantage"), np.float32)

    @property
    def group_ids_B(self) -> np.ndarray:
        """int32 group of each response, 0 … P−1."""
        sizes = [len(group.responses) for group in self.groups]
        return np.repeat(np.arange(len(self.groups), dtype=np.int32), sizes)

    def enriched(self, **columns: Sequence[Any]) -> "Rollouts":
        """Returns the rollouts with new values, one per response, in some response fields."""
        responses = iter(_enriched(self.responses, columns))
        groups = [
            Group(group.prompt, [next(responses) for _ in group.responses]) for group in self.groups
        ]
        return Rollouts(groups, self.version)

    def parted(self, count: int) -> tuple["Rollouts", "Rollouts"]:
        """Returns the first `count` groups and the others."""
        return tuple(
            Rollouts(part, self.version) for part in (self.groups[:count], self.groups[count:])
        )


def _enriched(responses, columns):
    return [
        dataclasses.replace(response, **dict(zip(columns, values, strict=True)))
        for response, *values in zip(responses, *columns.values(), strict=True)
    ]


def judged(
    prompts: Sequence[PromptRecord],
    responses: Sequence[Response],
    *,
    scorer: Scorer,
    decode: Callable[[np.ndarray], str],
    max_length: int,
) -> list[Group]:
    """Rewards responses and groups them; they come prompt by prompt in equal numbers.

    A `<think>` at the end of the prompt belongs to the response. A response whose verifier failed
    or timed out has no verdict: it is reported, but neither counts nor carries gradient, so it does
    not pass for a wrong answer.

    Args:
      prompts: of the responses.
      responses: as sampled.
      scorer: the reward.
      decode: tokens → text.
      max_length: the sampler's limit on response length, in tokens.
    """
    size = len(responses) // max(1, len(prompts))
    asked = [prompt for prompt in prompts for _ in range(size)]
    texts = [decode(response.tokens) for response in responses]
    rewards = scorer.score_batch(
        [
            sample_of(prompt, text, len(response.tokens), max_length)
            for prompt, response, text in zip(asked, responses, texts, strict=True)
        ]
    )
    known = _enriched(
        responses,
        {
            "text": texts,
            "reward": rewards,
            "counted": [reward.judged for reward in rewards],
            "trained": [
                np.full(len(response.tokens), reward.judged)
                for response, reward in zip(responses, rewards, strict=True)
            ],
        },
    )
    return [
        Group(prompt, known[index * size : (index + 1) * size])
        for index, prompt in enumerate(prompts)
    ]


def compared(
    group: Group, scorer: GroupScorer, *, max_length: int, duals: Mapping[str, float]
) -> Group:
    """Adds the rewards of the group to those of its judged responses.

    Args:
      group: from `judged`.
      scorer: the rewards of a group.
      max_length: the sampler's limit on response length, in tokens.
      duals: dual variables of the rewards.
    """
    if not scorer:
        return group
    tokens, texts = group.column("tokens"), group.column("text")
    samples = [
        sample_of(group.prompt, text, len(ids), max_length)
        for text, ids in zip(texts, tokens, strict=True)
    ]
    ids = [each.tolist() for each in tokens]
    return group.enriched(reward=scorer.add(samples, group.column("reward"), ids, duals))
