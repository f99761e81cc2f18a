"""Rewards by a response's length beside a limit or a target that is no other response's."""

import functools
import math

from luspo_jax.rewards.group.record import Dual, GroupReward, Peers, check_numbers

VERSION = "1"


def cosine_value(
    length: int,
    right: bool,
    *,
    max_length: float,
    right_range: tuple[float, float] = (1.0, 0.5),
    wrong_range: tuple[float, float] = (-1.0, -0.5),
) -> float:
    """long + ½ (short − long) (1 + cos(π · min(1, L / L_max))), (short, long) of right or wrong.

    arXiv:2502.03373, appendix C.1; TRL's `get_cosine_scaled_reward`.

    Args:
      length: tokens.
      right: of the response.
      max_length: tokens at which the reward of `long` is reached.
      right_range: (short, long): reward of a right response of no length, and of the longest.
      wrong_range: the same of a wrong one.
    """
    short, long = right_range if right else wrong_range
    return long + 0.5 * (short - long) * (1 + math.cos(math.pi * min(1.0, length / max_length)))


def cosine(
    right_short: float = 1.0,
    right_long: float = 0.5,
    wrong_short: float = -1.0,
    wrong_long: float = -0.5,
    max_length: int = 0,
) -> GroupReward:
    """Returns the cosine reward; max_length 0 is the sampler's limit.

    It says right from wrong itself: the part that counts as accuracy may have weight 0 beside it.
    """
    check_numbers(low=-1e15, right_short=right_short, right_long=right_long)
    check_numbers(low=-1e15, wrong_short=wrong_short, wrong_long=wrong_long)
    check_numbers(max_length=max_length)
    ranges = {"right_range": (right_short, right_long), "wrong_range": (wrong_short, wrong_long)}

    def values(peers: Peers) -> list[float]:
        longest = max_length or peers.max_length
        return [
            cosine_value(n, right, max_length=longest, **ranges)
            for n, right in zip(peers.lengths, peers.right, strict=True)
        ]

    return GroupReward("cosine", VERSION, values, compares=False)


def l1_exact_values(peers: Peers, *, alpha: float) -> list[float]:
    """−α · |n* − L|; LCPO-exact of L1, arXiv:2503.04697, without its 1[right]."""
    return [-alpha * abs(peers.target - n) for n in peers.lengths]


def l1_exact(alpha: float = 3e-4) -> GroupReward:
    """Returns the part of LCPO-exact that is added to 1[right]; n* stands in the prompt."""
    check_numbers(alpha=alpha)
    score = functools.partial(l1_exact_values, alpha=alpha)
    return GroupReward("l1_exact", VERSION, score, targeted=True, compares=False)


def l1_max_values(peers: Peers, *, alpha: float, delta: float) -> list[float]:
    """1[right] · (clip(α (n* − L) + δ, 0, 1) − 1); with 1[right], LCPO-max of L1, arXiv:2503.04697.

    The factor is of the accuracy alone; other parts of the reward stay as they are.
    """
    return [
        right * (min(1.0, max(0.0, alpha * (peers.target - n) + delta)) - 1)
        for n, right in zip(peers.lengths, peers.right, strict=True)
    ]


def l1_max(alpha: float = 3e-4, delta: float = 0.5) -> GroupReward:
    """Returns the part of LCPO-max that is added to 1[right]; n* stands in the prompt."""
    check_numbers(alpha=alpha, delta=delta)
    score = functools.partial(l1_max_values, alpha=alpha, delta=delta)
    return GroupReward("l1_max", VERSION, score, targeted=True, compares=False)


def laser_values(peers: Peers, *, target: float, alpha: float) -> list[float]:
    """α · 1[right] · 1[L ≤ L_T]; LASER, arXiv:2505.15612."""
    return [
        alpha * (right and n <= target) for n, right in zip(peers.lengths, peers.right, strict=True)
    ]


def laser(target: int, alpha: float = 0.5) -> GroupReward:
    """Returns the step reward for a target length L_T in tokens."""
    check_numbers(low=1, target=target)
    check_numbers(alpha=alpha)
    score = functools.partial(laser_values, target=target, alpha=alpha)
    return GroupReward("laser", VERSION, score, compares=False)


def laser_d(easy: int, medium: int, hard: int, alpha: float = 0.5) -> GroupReward:
    """Returns LASER with L_T by difficulty: pass rate above ⅔ is easy, above ⅓ medium, else hard.

    LASER-D, arXiv:2505.15612, moves the three lengths during the run by measuring a set of
    problems; here they stay as given. The bounds of difficulty are unconfirmed.
    """
    check_numbers(low=1, easy=easy, medium=medium, hard=hard)
    check_numbers(alpha=alpha)

    def values(peers: Peers) -> list[float]:
        solved, size = 3 * sum(peers.right), len(peers.right)
        target = easy if solved > 2 * size else medium if solved > size else hard
        return laser_values(peers, target=target, alpha=alpha)

    return GroupReward("laser_d", VERSION, values)


def leash_values(peers: Peers, *, target: float, bound: float) -> list[float]:
    """R' − R with R' = max(−bound, R − λ · max(0, L / L_T − 1)), and never more than 0.

    LEASH, arXiv:2512.21540, which clips to [−1, 1]; here no reward is cut that has no penalty.
    """
    return [
        min(0.0, max(-bound, value - peers.duals["leash"] * max(0.0, n / target - 1)) - value)
        for n, value in zip(peers.lengths, peers.values, strict=True)
    ]


def leash(
    target: int, rate: float = 0.05, initial: float = 0.2, most: float = 1.0, bound: float = 1.0
) -> GroupReward:
    """Returns the one-sided penalty with a dual variable λ: see `record.Dual`.

    Rate, start and largest value of λ are unconfirmed.
    """
    check_numbers(low=1, target=target)
    check_numbers(rate=rate, initial=initial, most=most, bound=bound)
    if initial > most:
        raise ValueError(f"initial={initial} is more than most={most}")
    score = functools.partial(leash_values, target=target, bound=bound)
    dual = Dual(initial, rate, target, most)
    return GroupReward("leash", VERSION, score, dual=dual, compares=False)


def lie_values(
    peers: Peers,
    *,
    alpha: float,
    slack: float,
    most: float,
    redundancy: float,
    distinct: tuple[float, float],
) -> list[float]:
    """−1[wrong] · min(most, α · max(0, n* − slack − L)) − redundancy · 1[|d − a| > b], d being the
    share of distinct runs of ten tokens and (a, b) `distinct`.

    LIE, arXiv:2602.11748, which lengthens wrong responses and punishes repetition.
    """
    middle, width = distinct
    values = []
    for n, right, tokens in zip(peers.lengths, peers.right, peers.tokens, strict=True):
        short = 0.0 if right else min(most, alpha * max(0.0, peers.target - slack - n))
        # The bounds themselves are within, whatever the rounding of a − b.
        outside = abs(distinct_share(tokens) - middle) > width + 1e-9
        values.append(-short - redundancy * outside)
    return values


def distinct_share(tokens, size: int = 10) -> float:
    """Returns the share of runs of `size` tokens that differ; 1 if there are fewer than two."""
    runs = [tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1)]
    return len(set(runs)) / len(runs) if runs else 1.0


def lie(
    alpha: float = 0.3 / 9000,
    slack: int = 500,
    most: float = 0.3,
    redundancy: float = 0.6,
    distinct_mean: float = 0.95,
    distinct_width: float = 0.05,
) -> GroupReward:
    """Returns the length incentive of LIE; n* stands in the prompt."""
    check_numbers(alpha=alpha, slack=slack, most=most, redundancy=redundancy)
    check_numbers(high=1.0, distinct_mean=distinct_mean, distinct_width=distinct_width)
    options = {"alpha": alpha, "slack": slack, "most": most, "redundancy": redundancy}
    score = functools.partial(lie_values, **options, distinct=(distinct_mean, distinct_width))
    return GroupReward("lie", VERSION, score, targeted=True, compares=False)
