"""Records of a reward that compares the responses to one prompt."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence

from luspo_jax.hosts.values import Number, refusal
from luspo_jax.rewards.record import Reward, Sample


class GroupRewardError(ValueError):
    """A reward of a group cannot be computed; the message names it and the remedy."""


@dataclasses.dataclass(frozen=True)
class Peers:
    """The judged responses to one prompt.

    Attributes:
      samples: what was judged; lengths and their limit are in tokens.
      rewards: of each, without any reward of the group.
      right: whether each is right, by the part that counts as accuracy.
      tokens: ids of each.
      duals: dual variables by the name of their part.
    """

    samples: Sequence[Sample]
    rewards: Sequence[Reward]
    right: Sequence[bool]
    tokens: Sequence[Sequence[int]]
    duals: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def lengths(self) -> list[int]:
        """Tokens of each response."""
        return [sample.length for sample in self.samples]

    @property
    def values(self) -> list[float]:
        """The reward of each, without any reward of the group."""
        return [reward.value for reward in self.rewards]

    @property
    def max_length(self) -> int:
        """The sampler's limit, in tokens."""
        return self.samples[0].max_length

    @property
    def pass_rate(self) -> float:
        """The share that is right."""
        return sum(self.right) / len(self.right)

    @property
    def mean_length(self) -> float:
        """Tokens, the mean."""
        return sum(self.lengths) / len(self.lengths)

    @property
    def target(self) -> int:
        """The length n* that the prompt asks for, in tokens.

        Raises:
          GroupRewardError: the prompt asks for none.
        """
        target = self.samples[0].meta.get(TARGET)
        if target is None:
            raise GroupRewardError(
                "the prompt asks for no length: set data.length_target_low and _high, and a "
                f"template with {{{TARGET}}}"
            )
        return target


TARGET = "target_length"  # in the meta of a problem whose prompt asks for a length


@dataclasses.dataclass(frozen=True)
class Dual:
    """A dual variable, stepped once for each batch: λ ← clip(λ + rate · (mean L / target − 1), 0,
    most).

    Attributes:
      initial: where it starts.
      rate: of its steps.
      target: tokens of a response, on average.
      most: its largest value.
    """

    initial: float
    rate: float
    target: float
    most: float

    def stepped(self, value: float, lengths: Sequence[int]) -> float:
        """Returns the next value, after a batch with these lengths."""
        excess = math.fsum(lengths) / len(lengths) / self.target - 1
        return min(self.most, max(0.0, value + self.rate * excess))


@dataclasses.dataclass(frozen=True)
class GroupReward:
    """A named, versioned rule that rewards the responses to one prompt together.

    Attributes:
      id: name of the rule.
      version: changes whenever any number can change.
      score: judged responses → a finite number for each, which is added to its reward.
      targeted: whether it reads the length that the prompt asks for.
      dual: its dual variable, which `Peers.duals` has under the name of the part.
      compares: whether a response's number depends on the other responses.
    """

    id: str
    version: str
    score: Callable[[Peers], Sequence[float]]
    targeted: bool = False
    dual: Dual | None = None
    compares: bool = True

    @property
    def label(self) -> str:
        """Name and version, to store with results."""
        return f"{self.id}@{self.version}"


def check_numbers(low: float = 0.0, high: float = 1e15, **options: float) -> None:
    """Checks that options are numbers within bounds.

    Raises:
      ValueError: naming the first that is not.
    """
    for name, value in options.items():
        problem = refusal(name, value, float, Number(low, high))
        if problem:
            raise ValueError(problem)
