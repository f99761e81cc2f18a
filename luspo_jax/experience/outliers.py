"""Cuts the longest responses of groups that are all right, and scores them again.

Dynamic outlier truncation (DOT), arXiv:2601.03969: where every response is right, reward says
nothing, and a response that is much longer than the others repeats itself. Cut, most of them lose
their answer, and the group prefers the others.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

from luspo_jax.experience.groups import Group
from luspo_jax.rollout import Response

# Fields with one entry per response token that a sampled response may have.
_PER_TOKEN = ("tokens", "logprobs", "versions", "expert_ids", "trained")


def limit(group: Group, *, deviations: float, part: str) -> int | None:
    """Returns ⌊mean L + deviations · std L⌋ tokens; None unless all responses are judged right.

    The standard deviation is of the group itself (ddof 0), so no response of K is more than
    (K − 1) / √K of them above the mean.

    Args:
      group: with verdicts.
      deviations: 3 in the paper.
      part: the reward part that counts as accuracy; right is more than ½.
    """
    if not (group.judged.all() and (group.values(part) > 0.5).all()):
        return None
    lengths = group.lengths.astype(np.float64)
    return math.floor(lengths.mean() + deviations * lengths.std())


def cut(response: Response, length: int) -> Response:
    """Returns the first `length` tokens of a response, as one that the limit cut."""
    own = {name: getattr(response, name) for name in _PER_TOKEN}
    return dataclasses.replace(
        response,
        stopped=False,
        **{name: None if array is None else array[:length] for name, array in own.items()},
    )


def without_outliers(
    groups: Sequence[Group],
    judge: Callable[[Sequence[Group]], Sequence[Group]],
    *,
    margin: int,
    deviations: float,
    part: str,
) -> tuple[list[Group], int]:
    """Returns the groups with outliers cut and scored again, and the number of tokens cut off.

    Args:
      groups: with verdicts.
      judge: groups → with new verdicts.
      margin: least tokens by which a response must exceed the limit to be cut; 32 in the paper.
      deviations: see `limit`.
      part: see `limit`.
    """
    changed, tokens = {}, 0
    for place, group in enumerate(groups):
        longest = limit(group, deviations=deviations, part=part)
        if longest is None or group.lengths.max() - longest < margin:
            continue
        outliers = group.lengths - longest >= margin
        tokens += int((group.lengths[outliers] - longest).sum())
        changed[place] = Group(
            group.prompt,
            [
                cut(response, longest) if out else response
                for response, out in zip(group.responses, outliers, strict=True)
            ],
        )
    found = dict(zip(changed, judge(list(changed.values())) if changed else (), strict=True))
    return [found.get(place, group) for place, group in enumerate(groups)], tokens
