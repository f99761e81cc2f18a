"""Selects the sampled responses that a step trains on.

Group filters and response filters act between rewards and advantages. A batch keeps its size:
missing groups are replaced by groups without gradient, with a warning.
"""

import dataclasses
import re
import warnings
from collections.abc import Iterable, Sequence

import numpy as np

from luspo_jax.experience.groups import Group
from luspo_jax.hosts.values import Number, OneOf, refusal

GFPO_KEYS = ("length", "reward_per_token")

_KEPT = re.compile(r"(?:[2-9]|[1-9]\d{1,4})(?:,(?:[2-9]|[1-9]\d{1,4})){3}")

# Field → rule for its value, besides its type.
RULES = {
    "max_tries": Number(1, 2**31 - 1),
    "gfpo_keep": Number(2, 2**16, also=(0,), why="0 keeps all; kept ones are compared"),
    "gfpo_by": OneOf(GFPO_KEYS),
    "dot_margin": Number(1, 2**24),
    "dot_deviations": Number(0, 1e3),
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
      gfpo_adaptive: the same by difficulty, in place of `gfpo_keep`: four numbers, from the quarter
        of the round's groups with the lowest pass rates to that with the highest, as "8,8,6,4", the
        paper's for 16 responses. Quartiles are of one round, where the paper's are of the run.
      gfpo_by: "length" keeps the shortest, "reward_per_token" those with the highest.
      dot: in groups that are all right, cut responses that are much longer than the others, and
        score them again (DOT, arXiv:2601.03969; `experience.outliers`).
      dot_margin: least tokens to cut off.
      dot_deviations: standard deviations of length above the group's mean at which to cut.
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
    gfpo_adaptive: str = ""
    gfpo_by: str = "length"
    dot: bool = False
    dot_margin: int = 32
    dot_deviations: float = 3.0
    lspo_low: float = 0.0
    lspo_high: float = 0.0

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            problem = refusal(field.name, value, field.type, RULES.get(field.name))
            if problem:
                raise ValueError(problem)
        if self.gfpo_adaptive and (self.gfpo_keep or not _KEPT.fullmatch(self.gfpo_adaptive)):
            raise ValueError(
                f"gfpo_adaptive={self.gfpo_adaptive!r} must be four whole numbers of at least 2, "
                "as 8,8,6,4, with shaping.gfpo_keep=0"
            )
        low, high = self.lspo_low, self.lspo_high
        if low + high > 1:
            raise ValueError(
                f"lspo_low={low} and shaping.lspo_high={high} must be shares with a sum ≤ 1"
            )

    @property
    def kept_by_quarter(self) -> tuple[int, ...]:
        """Responses that a group keeps, from the hardest quarter to the easiest; 0 for all."""
        if self.gfpo_adaptive:
            return tuple(int(part) for part in self.gfpo_adaptive.split(","))
        return (self.gfpo_keep,) * 4

    @property
    def filters_groups(self) -> bool:
        """Whether some groups may be left out, so that a batch may need more rounds."""
        return self.dynamic_sampling or self.lspo_low + self.lspo_high > 0

    @property
    def chooses(self) -> bool:
        """Whether some sampled responses may not be trained on: lengths are then accounted for."""
        drops = self.overlong_filter or max(self.kept_by_quarter) > 0
        return self.filters_groups or drops or self.dot


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
        numbers = kept_numbers(fresh, shaping, part=part)
        kept = [keeps(*pair, shaping) for pair in zip(fresh, numbers, strict=True)]
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


def kept_numbers(groups: Sequence[Group], shaping: Shaping, *, part: str) -> list[int]:
    """Returns how many responses each group of one round keeps, 0 for all: by the quarter of the
    round in which its pass rate is."""
    if not shaping.gfpo_adaptive:
        return [shaping.gfpo_keep] * len(groups)
    rates = [_pass_rate(group, part) for group in groups]
    bounds = np.quantile(rates, [0.25, 0.5, 0.75])
    return [shaping.kept_by_quarter[int(np.searchsorted(bounds, rate))] for rate in rates]


def _pass_rate(group, part):
    """Returns the mean of a part; 0, as hard as can be, for a group without a verdict."""
    values = group.values(part)[group.counted]
    return float(values.mean()) if len(values) else 0.0


def keeps(group: Group, number: int, shaping: Shaping) -> Group:
    """Returns the group with the response filters applied; `number` are kept, 0 for all."""
    counted = group.counted
    if number:
        lengths = group.lengths
        order = lengths if shaping.gfpo_by == "length" else -group.values() / lengths
        # Responses without a verdict come last: they must not displace one with a verdict.
        ranked = np.lexsort((np.arange(len(order)), order, ~counted))
        chosen = np.zeros_like(counted)
        chosen[ranked[:number]] = True
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
