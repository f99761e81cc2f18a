"""Selects the sampled responses that a step trains on.

Group filters and response filters act between rewards and advantages. A batch keeps its size:
missing groups are replaced by groups without gradient, with a warning.
"""

import dataclasses
import warnings
from collections.abc import Iterable, Sequence

import numpy as np

from luspo_jax.experience.groups import Group
from luspo_jax.hosts.values import Number, OneOf, refusal

GFPO_KEYS = ("length", "reward_per_token")

# Field → rule for its value, besides its type.
RULES = {
    "max_tries": Number(1, 2**31 - 1),
    "gfpo_keep": Number(2, 2**16, also=(0,), why="0 keeps all; kept ones are compared"),
    "gfpo_by": OneOf(GFPO_KEYS),
    "lspo_low": Number(0, 1),
    "lspo_high": Number(0, 1),
}


@dataclasses.dataclass(frozen=True)
class Shaping:
    """Selection of the responses of a step; all filters are off by default.

    Attributes:
      dynamic_sampling: leave out groups that are all right or all wrong, and sample more prompts
        until the batch is full (DAPO, arXiv:2503.14476 §3.2).
      max_tries: most rounds of sampling in a step; 10 in DAPO's script.
      overlong_filter: responses cut at the length limit carry no gradient and leave the
        denominators; they count in their group's statistics (DAPO §3.4).
      gfpo_keep: responses that a group keeps, 0 for all; the others leave its statistics and the
        loss (GFPO, arXiv:2508.09726).
      gfpo_by: "length" keeps the shortest, "reward_per_token" those with the highest.
      lspo_low: share of prompts to keep, with the shortest mean responses (LSPO, arXiv:2510.01459;
        the share is unconfirmed).
      lspo_high: share of prompts to keep, with the longest; both 0 keep all.

    Raises:
      ValueError: naming the field.
    """

    dynamic_sampling: bool = False
    max_tries: int = 10
    overlong_filter: bool = False
    gfpo_keep: int = 0
    gfpo_by: str = "length"
    lspo_low: float = 0.0
    lspo_high: float = 0.0

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            problem = refusal(field.name, value, field.type, RULES.get(field.name))
            if problem:
                raise ValueError(problem)
        low, high = self.lspo_low, self.lspo_high
        if low + high > 1:
            raise ValueError(
                f"lspo_low={low} and shaping.lspo_high={high} must be shares with a sum ≤ 1"
            )

    @property
    def filters_groups(self) -> bool:
        """Whether some groups may be left out, so that a batch may need more rounds."""
        return self.dynamic_sampling or self.lspo_low + self.lspo_high > 0

    @property
    def chooses(self) -> bool:
        """Whether some sampled responses may not be trained on: lengths are then accounted for."""
        return self.filters_groups or self.overlong_filter or self.gfpo_keep > 0


@dataclasses.dataclass(frozen=True)
class Collected:
    """A full batch, the surplus for the next step, and counts for the metrics."""

    groups: list[Group]
    surplus: list[Group]
    counts: dict[str, float]


def collect(
    rounds: Iterable[list[Group]],
    surplus: Sequence[Group],
    *,
    shaping: Shaping,
    num_groups: int,
    part: str,
) -> Collected:
    """Takes rounds until `num_groups` groups pass the filters, or `max_tries` is reached.

    Groups that pass beyond a full batch are carried over and come first in the next step. The
    surplus is kept below one batch, so that all of it is used one step later and no group grows
    older; the excess is dropped and counted.

    Args:
      rounds: of rewarded groups, each from new prompts; no more are taken than needed.
      surplus: groups from the previous step.
      shaping: the filters.
      num_groups: groups of a batch.
      part: the reward part that counts as accuracy.
    """
    chosen, left_out, rewards, sampled, tries = list(surplus), [], [], 0, 0
    most = shaping.max_tries if shaping.filters_groups else 1
    rounds = iter(rounds)
    while tries < most and len(chosen) < num_groups:
        fresh = next(rounds)
        tries += 1
        sampled += len(fresh)
        rewards += [value for group in fresh for value in group.values()[group.judged]]
        kept = [keeps(group, shaping) for group in fresh]
        passed = group_filter(kept, shaping, part=part)
        chosen += [group for group, passes in zip(kept, passed, strict=True) if passes]
        left_out += [group for group, passes in zip(kept, passed, strict=True) if not passes]
    missing = max(0, num_groups - len(chosen))
    if missing:
        warnings.warn(
            f"only {num_groups - missing} of {num_groups} groups passed the filters in {tries} "
            "tries; the batch is filled with groups without gradient",
            stacklevel=2,
        )
    filling = [_without_gradient(group) for group in left_out[:missing]]
    spare = chosen[num_groups:]
    carried = spare[: num_groups - 1]
    return Collected(
        groups=[*chosen[:num_groups], *filling],
        surplus=carried,
        counts={
            "shaping/tries": tries,
            "shaping/groups_sampled": sampled,
            "shaping/groups_left_out": len(left_out),
            "shaping/groups_carried_in": len(surplus),
            "shaping/groups_carried_over": len(carried),
            "shaping/groups_given_up": len(spare) - len(carried),
            "shaping/groups_missing": missing,
            **({"shaping/sampled_reward": float(np.mean(rewards))} if rewards else {}),
        },
    )


def keeps(group: Group, shaping: Shaping) -> Group:
    """Returns the group with the response filters applied."""
    counted = group.counted
    if shaping.gfpo_keep:
        lengths = group.lengths
        order = lengths if shaping.gfpo_by == "length" else -group.values() / lengths
        # Responses without a verdict come last: they must not displace one with a verdict.
        ranked = np.lexsort((np.arange(len(order)), order, ~counted))
        chosen = np.zeros_like(counted)
        chosen[ranked[: shaping.gfpo_keep]] = True
        counted = counted & chosen
    trained = counted
    if shaping.overlong_filter:
        trained = trained & np.array(group.column("stopped"), bool)
    return _restricted(group, counted, trained)


def group_filter(groups: Sequence[Group], shaping: Shaping, *, part: str) -> np.ndarray:
    """Returns whether each group of one round passes."""
    passes = np.ones(len(groups), bool)
    if shaping.dynamic_sampling:
        passes &= [_informative(group, part) for group in groups]
    if shaping.lspo_low + shaping.lspo_high > 0:
        means = np.array([group.lengths.mean() for group in groups])
        short = means <= np.quantile(means, shaping.lspo_low) if shaping.lspo_low else False
        long = means >= np.quantile(means, 1 - shaping.lspo_high) if shaping.lspo_high else False
        passes &= short | long
    return passes


def _informative(group, part):
    values = group.values(part)[group.counted]
    return len(values) > 1 and np.ptp(values) > 0


def _without_gradient(group):
    nothing = np.zeros(len(group.responses), bool)
    return _restricted(group, nothing, nothing)


def _restricted(group, counted, trained):
    """Returns the group with fewer responses that count and carry gradient."""
    return group.enriched(
        counted=counted.tolist(),
        trained=[mask & keep for mask, keep in zip(group.column("trained"), trained, strict=True)],
    )
