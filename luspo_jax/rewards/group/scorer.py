"""Adds the rewards of groups to those of their responses."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from luspo_jax.rewards.group.record import GroupReward, GroupRewardError, Peers
from luspo_jax.rewards.group.registry import group_reward
from luspo_jax.rewards.record import Reward, Sample


class GroupScorer:
    """Adds a weighted sum of group rewards; none leaves every reward as it is.

    Args:
      parts: name → weight.
      options: name → that reward's options.
      metric: the part of a response's own reward that counts as accuracy; right is more than ½.

    Attributes:
      weights: name → weight.
      rewards: name → group reward.
      labels: "group/name" → `id@version` of each, to store with every result.
    """

    def __init__(
        self,
        parts: Mapping[str, float] | None = None,
        options: Mapping[str, Mapping[str, Any]] | None = None,
        *,
        metric: str = "",
    ):
        self.weights, self._metric = dict(parts or {}), metric
        self.rewards: dict[str, GroupReward] = {
            name: group_reward(name, (options or {}).get(name)) for name in self.weights
        }
        self.labels = {f"group/{name}": made.label for name, made in self.rewards.items()}

    def __bool__(self) -> bool:
        """Whether there is any."""
        return bool(self.weights)

    @property
    def compares(self) -> bool:
        """Whether a response's reward depends on the other responses."""
        return any(made.compares for made in self.rewards.values())

    def mixed(self, new: Reward, old: Reward) -> Reward:
        """Returns `new` with the parts of `old` that depend on the response alone.

        What depends on a dual variable is among them, so its value of then is kept.
        """
        parts = {
            name: (new if self.rewards[name].compares else old).parts[name] for name in self.weights
        }
        length = math.fsum(weight * parts[name] for name, weight in self.weights.items())
        own = new.value - new.length
        return dataclasses.replace(
            new, value=own + length, parts={**new.parts, **parts}, length=length
        )

    @property
    def duals(self) -> dict[str, float]:
        """Dual variables by name, where they start."""
        return {name: made.dual.initial for name, made in self.rewards.items() if made.dual}

    def stepped(self, duals: Mapping[str, float], lengths: Sequence[int]) -> dict[str, float]:
        """Returns the dual variables after a batch whose responses had these lengths, in tokens."""
        return {
            name: self.rewards[name].dual.stepped(value, lengths) for name, value in duals.items()
        }

    def add(
        self,
        samples: Sequence[Sample],
        rewards: Sequence[Reward],
        tokens: Sequence[Sequence[int]],
        duals: Mapping[str, float],
    ) -> list[Reward]:
        """Returns the rewards of the responses to one prompt with those of their group added.

        A response without a verdict takes no part: its own are 0, and no other's depend on it.

        Args:
          samples, rewards, tokens: of each response.
          duals: dual variables by name.

        Raises:
          GroupRewardError: a number that is not finite, or not one for each response.
        """
        judged = [place for place, reward in enumerate(rewards) if reward.judged]
        added = {name: [0.0] * len(rewards) for name in self.weights}
        if judged:
            peers = Peers(
                samples=[samples[i] for i in judged],
                rewards=[rewards[i] for i in judged],
                right=[rewards[i].parts[self._metric] > 0.5 for i in judged],
                tokens=[tokens[i] for i in judged],
                duals=duals,
            )
            for name, made in self.rewards.items():
                for place, value in zip(judged, _scored(name, made, peers), strict=True):
                    added[name][place] = value
        return [self._with(reward, added, place) for place, reward in enumerate(rewards)]

    def _with(self, reward, added, place):
        own = {name: values[place] for name, values in added.items()}
        length = math.fsum(weight * own[name] for name, weight in self.weights.items())
        return dataclasses.replace(
            reward, value=reward.value + length, parts={**reward.parts, **own}, length=length
        )


def _scored(name, made, peers):
    values = [float(value) + 0.0 for value in made.score(peers)]  # no −0
    if len(values) != len(peers.samples):
        raise GroupRewardError(
            f"group reward {name!r} ({made.label}) gives {len(values)} numbers for "
            f"{len(peers.samples)} judged responses: it must give one for each"
        )
    odd = [value for value in values if not math.isfinite(value)]
    if odd:
        raise GroupRewardError(
            f"group reward {name!r} ({made.label}) gives {odd[0]}, which is not finite"
        )
    return values
