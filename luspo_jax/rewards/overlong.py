"""The penalty on responses that approach or reach the length limit."""

import functools

from luspo_jax.rewards.record import Sample, Verdict, Verifier

VERSION = "1"


def penalty(length: int, *, max_length: int, buffer: int, factor: float = 1.0) -> float:
    """factor · clip((max_length − buffer − length) / buffer, −1, 0).

    DAPO, arXiv:2503.14476 eq. 13 (factor 1); LUSPO, arXiv:2602.05261 eq. 10–11 (factor 0.3).

    Raises:
      ValueError: the buffer is outside (0, max_length].
    """
    if not 0 < buffer <= max_length:
        raise ValueError(f"overlong buffer {buffer} is not within 1 … max length {max_length}")
    return factor * min(0.0, max(-1.0, (max_length - buffer - length) / buffer))


def check(sample: Sample, *, buffer: int, factor: float) -> Verdict:
    """Returns the penalty of a sample, whose length and limit must be known."""
    if sample.length is None or sample.max_length is None:
        raise ValueError("the overlong penalty needs the response's length and max_length")
    value = penalty(sample.length, max_length=sample.max_length, buffer=buffer, factor=factor)
    return Verdict(value)


def overlong(buffer: int, factor: float = 1.0) -> Verifier:
    """Returns the verifier for a buffer in tokens below the sampler's limit."""
    return Verifier("overlong", VERSION, functools.partial(check, buffer=buffer, factor=factor))
