"""LIE's incentive without a length in the prompt, which the base policies have never seen."""

from collections.abc import Sequence

# The method's constants are for 9,000 tokens; these are for a limit of 40: 0.3 / 40 a token, and
# 500 · 40 / 9,000 tokens of slack.
MOST, SLACK = 0.3, 2


def longer_if_wrong(
    responses: Sequence[str],
    lengths: Sequence[int],
    rewards: Sequence[float],
    right: Sequence[bool],
    max_length: int,
) -> list[float]:
    """−1[wrong] · min(c, c/n* · max(0, n* − slack − L)), n* the limit; LIE, arXiv:2602.11748.

    Its penalty on repetition is left out: a right answer to one of these tasks repeats itself.
    """
    return [
        0.0 if ok else -min(MOST, MOST / max_length * max(0, max_length - SLACK - length))
        for length, ok in zip(lengths, right, strict=True)
    ]
