"""Exact match: the response, or what a pattern finds last in it, must be the reference string."""

import functools
import re

from luspo_jax.rewards.record import Sample, Verdict, Verifier

VERSION = "1"


def check(sample: Sample, *, pattern: re.Pattern | None) -> Verdict:
    """1 where the stripped strings are equal, else 0; unparsed where the pattern finds nothing."""
    found = sample.response
    if pattern is not None:
        matches = list(pattern.finditer(sample.response))
        if not matches:
            return Verdict(0.0, "unparsed", detail=f"nothing matches {pattern.pattern!r}")
        found = matches[-1].group(1 if pattern.groups else 0) or ""
    prediction = found.strip()
    return Verdict(float(prediction == sample.answer.strip()), prediction=prediction[:500])


def exact(pattern: str | None = None) -> Verifier:
    """The verifier; the answer is the last match's first group (or the match) of `pattern`."""
    compiled = re.compile(pattern) if pattern is not None else None
    name = "exact" if pattern is None else f"exact[{pattern}]"
    return Verifier(name, VERSION, functools.partial(check, pattern=compiled))
