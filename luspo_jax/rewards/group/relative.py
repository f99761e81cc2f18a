"""Rewards by a response's length beside the others to its prompt: the shortest, the longest, the
mean.

Sums are exact, so that the order of the responses changes no bit.
"""

import functools
import math

from luspo_jax.rewards.group.record import GroupReward, Peers, check_numbers

VERSION = "1"


def _shortness(lengths: list[int]) -> list[float]:
    """1 for the shortest, 0 for the longest, linear between; all 0 if all are equal."""
    low, high = min(lengths), max(lengths)
    return [(high - n) / (high - low) if high > low else 0.0 for n in lengths]


def kimi_values(peers: Peers) -> list[float]:
    """λ if right, min(0, λ) if wrong, with λ = ½ − (L − L_min) / (L_max − L_min); 0 if all L are
    equal.

    Kimi k1.5, arXiv:2501.12599 §2.3.3.
    """
    if len(set(peers.lengths)) == 1:
        return [0.0] * len(peers.lengths)
    edges = [shortness - 0.5 for shortness in _shortness(peers.lengths)]
    return [
        edge if right else min(0.0, edge) for edge, right in zip(edges, peers.right, strict=True)
    ]


def kimi() -> GroupReward:
    """Returns the length reward of Kimi k1.5."""
    return GroupReward("kimi", VERSION, kimi_values)


def alp_values(peers: Peers, *, beta: float, floor: bool) -> list[float]:
    """−β · max(s, 1/K) · L / L_max, s being the share of the K responses that are right.

    ALP, arXiv:2506.05256, which pays right and wrong alike. Without `floor`, −β · s · L / L_max.
    """
    rate = max(peers.pass_rate, 1 / len(peers.right)) if floor else peers.pass_rate
    return [-beta * rate * n / peers.max_length for n in peers.lengths]


def alp(beta: float = 0.1, floor: bool = True) -> GroupReward:
    """Returns the adaptive length penalty; β is of lengths as a share of the limit.

    The paper's 1e-7 is of other units, so the default is ours.
    """
    check_numbers(beta=beta)
    return GroupReward("alp", VERSION, functools.partial(alp_values, beta=beta, floor=floor))


def linear_values(peers: Peers, *, coef: float) -> list[float]:
    """−coef · pass rate · L / longest L of the group; prime-rl's, with 0.25."""
    longest = max(peers.lengths)
    return [-coef * peers.pass_rate * n / longest for n in peers.lengths]


def linear(coef: float = 0.25) -> GroupReward:
    """Returns the linear penalty of prime-rl."""
    check_numbers(coef=coef)
    return GroupReward("linear", VERSION, functools.partial(linear_values, coef=coef))


def gr3_values(peers: Peers, *, alpha: float, calibrate: bool) -> list[float]:
    """R' − R with R' = R / (1 + α · L / mean L), R being the reward without those of the group.

    GR³, arXiv:2603.10535. It shortens where R > 0 and lengthens where R < 0. With `calibrate`, α is
    halved in a group of unequal rewards until a best response of mean length has an R' of at least
    the mean.
    """
    shares = [n / peers.mean_length for n in peers.lengths]
    if calibrate and len(set(peers.values)) > 1:
        alpha = _calibrated(alpha, peers.values, shares)
    return [
        value / (1 + alpha * share) - value
        for value, share in zip(peers.values, shares, strict=True)
    ]


def _calibrated(alpha, values, shares):
    best = max(values)
    for halvings in range(_HALVINGS):
        tried = alpha / 2**halvings
        scaled = [v / (1 + tried * share) for v, share in zip(values, shares, strict=True)]
        if best / (1 + tried) >= math.fsum(scaled) / len(scaled):
            return tried
    return 0.0


_HALVINGS = 10  # below a thousandth of α there is no length control left


def gr3(alpha: float = 0.3, calibrate: bool = False) -> GroupReward:
    """Returns the multiplicative rescaling of GR³.

    Its paper sets one α for a run by the rule that `calibrate` applies to each group; 0.3 is what
    later comparisons take.
    """
    check_numbers(alpha=alpha)
    return GroupReward(
        "gr3", VERSION, functools.partial(gr3_values, alpha=alpha, calibrate=calibrate)
    )


def grlc_values(peers: Peers, *, coef: float, bonus: float, top: float) -> list[float]:
    """coef · (w − mean w) + bonus · 1[shortest and among the best], with
    w = 1 − (L − L_min) / (L_max − L_min), or 0 if all L are equal.

    GRLC of Nemotron 3 Nano, as NeMo Gym's genrm_compare computes it, there for reasoning and answer
    apart and in characters. The best are those with at least the reward of number ⌊top · K⌋ of K.
    """
    weights, values, shortest = _shortness(peers.lengths), peers.values, min(peers.lengths)
    mean = math.fsum(weights) / len(weights)
    gate = sorted(values, reverse=True)[max(0, int(len(values) * top) - 1)]
    return [
        coef * (weight - mean) + bonus * (n == shortest and value >= gate)
        for weight, n, value in zip(weights, peers.lengths, values, strict=True)
    ]


def grlc(coef: float = 0.1, bonus: float = 0.1, top: float = 0.2) -> GroupReward:
    """Returns the group-relative length control, whose bonus is gated by quality.

    Published coefficients go from 0.08 to 0.35, for rewards of other scales; responses that share
    the smallest length share its rank.
    """
    check_numbers(coef=coef, bonus=bonus)
    check_numbers(high=1.0, top=top)
    return GroupReward(
        "grlc", VERSION, functools.partial(grlc_values, coef=coef, bonus=bonus, top=top)
    )
