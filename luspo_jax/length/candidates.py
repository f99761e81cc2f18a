"""Objectives whose length pressure is measured, and the rewards that each of them reads.

A name is a preset, followed by any of: a shaping of the advantage, another advantage, a reward of
the group. "luspo+kimi" is LUSPO on the run's own rewards plus Kimi's. Pressure compares responses
inside each half of a group, so a reward that compares them is computed anew in each half: else one
half would say something of the other, and the estimate would be biased.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from luspo_jax import objectives
from luspo_jax.hosts.values import nearest
from luspo_jax.length.pressure import Candidate
from luspo_jax.objectives.advantages import ADVANTAGES
from luspo_jax.objectives.shapings import SHAPINGS
from luspo_jax.rewards import Reward
from luspo_jax.rewards.group import GROUP_REWARDS, GroupScorer
from luspo_jax.rewards.samples import sample_of
from luspo_jax.rollout import Response


def candidate(name: str, *, max_response_length: int) -> Candidate:
    """Returns the objective that a name stands for.

    Raises:
      ValueError: no such preset, shaping, advantage or reward of a group, two of a kind, or an
        objective that does not exist.
    """
    preset, *more = (part.strip() for part in name.split("+"))
    if preset not in objectives.PRESETS:
        raise ValueError(f"{preset!r} names no preset: {nearest(preset, objectives.PRESETS)}")
    changes: dict[str, str] = {}
    for part in more:
        kinds = {"advantage": ADVANTAGES, "advantage_shaping": SHAPINGS, "reward": GROUP_REWARDS}
        kind = next((kind for kind, table in kinds.items() if part in table), None)
        if kind is None:
            every = {*SHAPINGS, *ADVANTAGES, *GROUP_REWARDS}
            raise ValueError(
                f"{name!r}: {part!r} is no shaping, advantage or reward of a group: "
                f"{nearest(part, every)}"
            )
        if kind in changes:
            raise ValueError(f"{name!r} names two of a kind: {changes[kind]} and {part}")
        changes[kind] = part
    reward = changes.pop("reward", "")
    chosen = objectives.preset(preset, max_response_length=max_response_length)
    return Candidate(name, dataclasses.replace(chosen, **changes), reward)


class Rescored(NamedTuple):
    """The rewards of some responses.

    Attributes:
      values_B: float32 reward of each.
      parts_BM: float32 parts of each.
    """

    values_B: np.ndarray
    parts_BM: np.ndarray


class Rescorer:
    """Rewards the responses of half groups: those of the run, or with another reward of the group.

    Args:
      weights: the run's verifiers → their weights.
      own: the run's rewards of a group.
      names: other rewards of a group, each with weight 1 and a dual variable where it starts.
      options: reward of a group → its options.
      metric: the part that counts as accuracy.
      max_length: the sampler's limit, in tokens.
    """

    def __init__(
        self,
        weights: Mapping[str, float],
        own: GroupScorer,
        *,
        names: Sequence[str] = (),
        options: Mapping[str, Mapping[str, Any]] | None = None,
        metric: str,
        max_length: int,
    ):
        self._weights, self._own, self._max_length = dict(weights), own, max_length
        self._others = {name: GroupScorer({name: 1.0}, options, metric=metric) for name in names}

    def weights(self, name: str = "") -> np.ndarray:
        """Returns the weight of each part of `of(…, name)` [M]."""
        added = self._others[name].weights if name else self._own.weights
        return np.array([*self._weights.values(), *added.values()], np.float32)

    def of(
        self,
        prompts: Sequence[Any],
        responses: Sequence[Response],
        group_ids_B: np.ndarray,
        name: str = "",
    ) -> Rescored:
        """Returns rewards as if there were these responses alone.

        Args:
          prompts, responses: with their verdicts.
          group_ids_B: equal for the responses to one prompt.
          name: of the other reward; empty for the run's.
        """
        scorer = self._others[name] if name else self._own
        rewards = [r.reward for r in responses] if not name else list(map(self._alone, responses))
        if scorer and (name or scorer.compares):
            for group in np.unique(group_ids_B):
                rows = np.flatnonzero(group_ids_B == group)
                for row, reward in zip(
                    rows, self._scored(scorer, prompts, responses, rows, own=not name), strict=True
                ):
                    rewards[row] = reward
        names = [*self._weights, *scorer.weights]
        return Rescored(
            np.array([reward.value for reward in rewards], np.float32),
            np.array([[r.parts.get(n, 0.0) for n in names] for r in rewards], np.float32),
        )

    def _alone(self, response) -> Reward:
        """Returns a reward without those of the group."""
        reward = response.reward
        parts = {name: reward.parts[name] for name in self._weights if name in reward.parts}
        return dataclasses.replace(
            reward, value=reward.value - reward.length, parts=parts, length=0.0
        )

    def _scored(self, scorer, prompts, responses, rows, *, own):
        chosen = [responses[row] for row in rows]
        samples = [
            sample_of(prompts[row], r.text or "", len(r.tokens), self._max_length)
            for row, r in zip(rows, chosen, strict=True)
        ]
        tokens = [r.tokens.tolist() for r in chosen]
        fresh = scorer.add(samples, [self._alone(r) for r in chosen], tokens, scorer.duals)
        if not own:
            return fresh
        return [scorer.mixed(new, r.reward) for new, r in zip(fresh, chosen, strict=True)]
