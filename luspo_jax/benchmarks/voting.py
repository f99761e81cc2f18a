"""Majority voting: the expected maj@k over which k of a problem's n responses vote."""

import collections
import dataclasses
import math
import re
from collections.abc import Sequence

import numpy as np

from luspo_jax.rewards.answers.latex import squeeze, tidy
from luspo_jax.rewards.answers.plain_numbers import exact_number

_SHORT_FRACTION = re.compile(r"\\frac\s*(\w)\s*(\w)")


def ballot(prediction: str | None) -> str | None:
    """Returns the vote of an extracted answer: 0.5 and 1/2 are one vote; None abstains.

    The reference answer is not used: wrong answers in different spellings are joined by the same
    rule as right ones.
    """
    if prediction is None or not prediction.strip():
        return None
    plain = _SHORT_FRACTION.sub(r"\\frac{\1}{\2}", tidy(prediction[:2_000]))
    number = exact_number(plain)
    return str(number) if number is not None else squeeze(plain)


def majority_at_k(
    predictions: Sequence[str | None], right: Sequence[bool], ks: Sequence[int]
) -> list[float]:
    """Returns maj@k of one problem for each k: the probability that a vote of k responses is right.

    maj@k = Σ_S score(winner of S) / C(n, k) over all subsets S of k of the n responses, exactly.
    Answers that tie for most votes share the win evenly. An abstention votes for nothing; a vote in
    which all abstain is wrong. The score of an answer is the share of its responses that were
    judged right (all or none, unless a verifier failed on some).

    Args:
      predictions: the n extracted answers.
      right: the n verdicts.
      ks: numbers of voters, each from 1 to n ≤ 1000.

    Returns:
      A probability for each k.
    """
    n = len(predictions)
    if not 1 <= min(ks) <= max(ks) <= n <= 1000:
        raise ValueError(f"ks {list(ks)} must lie in 1 … n = {n}, and n at most 1000")
    ballots = [ballot(prediction) for prediction in predictions]
    sizes = collections.Counter(ballots)
    abstaining = sizes.pop(None, 0)
    hits = collections.Counter()
    for vote, is_right in zip(ballots, right, strict=True):
        hits[vote] += bool(is_right)
    ways = np.zeros(n + 1)
    for vote, size in sizes.items():
        if hits[vote]:
            others = [count for other, count in sizes.items() if other != vote]
            ways += hits[vote] / size * _winning_ways(size, others, abstaining)
    return [float(ways[k] / math.comb(n, k)) for k in ks]


@dataclasses.dataclass(frozen=True)
class Mode:
    """The most frequent answer among responses to one problem, and how far they scatter.

    Attributes:
      accuracy: whether it is right, in [0, 1]; answers that tie share evenly, and it is 0 if no
        response has an answer. Equals maj@k of all responses.
      distinct: distinct answers over answers; None with fewer than two answers.
      differ: probability that two of the answers differ. Unlike `distinct` it does not fall with
        their number. None with fewer than two answers.
    """

    accuracy: float
    distinct: float | None
    differ: float | None


def mode(predictions: Sequence[str | None], right: Sequence[bool]) -> Mode:
    """Returns the mode of one problem's extracted answers; arguments as for `majority_at_k`."""
    ballots = [ballot(prediction) for prediction in predictions]
    sizes = collections.Counter(vote for vote in ballots if vote is not None)
    hits = collections.Counter()
    for vote, is_right in zip(ballots, right, strict=True):
        hits[vote] += bool(is_right)
    n, most = sizes.total(), max(sizes.values(), default=0)
    winners = [hits[vote] / size for vote, size in sizes.items() if size == most]
    pairs = n * (n - 1)
    return Mode(
        accuracy=float(np.mean(winners)) if winners else 0.0,
        distinct=len(sizes) / n if pairs else None,
        differ=1 - sum(s * (s - 1) for s in sizes.values()) / pairs if pairs else None,
    )


def _winning_ways(size: int, others: Sequence[int], abstaining: int) -> np.ndarray:
    """Counts, per k, the subsets of k voters that an answer wins; a tie of s + 1 counts 1/(s + 1).

    With t votes for the answer, the others' votes are the coefficients of a product of truncated
    binomial polynomials in x; y marks those that reach t. Rivals with fewer than t responses in all
    cannot reach it; they multiply to (1 + x)^(their sum). All terms are positive, so float64 loses
    no digits to cancellation.
    """
    n = size + sum(others) + abstaining
    ways = np.zeros(n + 1)
    for votes in range(1, size + 1):
        rivals = [count for count in others if count >= votes]
        free = abstaining + sum(count for count in others if count < votes)
        product = np.zeros((len(rivals) + 1, n + 1))  # [ties, voters]
        product[0, : free + 1] = [math.comb(free, u) for u in range(free + 1)]
        for count in rivals:
            product = _times_truncated(product, count, votes)
        shares = (product / np.arange(1, len(rivals) + 2)[:, None]).sum(axis=0)
        ways[votes:] += math.comb(size, votes) * shares[: n + 1 - votes]
    return ways


def _times_truncated(product: np.ndarray, count: int, votes: int) -> np.ndarray:
    """Returns product · (Σ_{u < votes} C(count, u) x^u + y C(count, votes) x^votes)."""
    result = np.zeros_like(product)
    width = product.shape[1]
    for u in range(min(votes, width)):
        result[:, u:] += math.comb(count, u) * product[:, : width - u]
    if votes < width:
        result[1:, votes:] += math.comb(count, votes) * product[:-1, : width - votes]
    return result
