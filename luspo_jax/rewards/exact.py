"""Exact match: the response, or the last match of a pattern in it, must equal the reference."""

import functools
import re

from luspo_jax.rewards.answers.extraction import after_reasoning
from luspo_jax.rewards.record import Sample, Verdict, Verifier

VERSION = "2"


def compiled(option: str, pattern: str) -> re.Pattern:
    """Compiles a user's regular expression.

    Raises:
      ValueError: an invalid expression; the message names the option.
    """
    try:
        return re.compile(pattern, re.DOTALL if option == "fullmatch" else 0)
    except (re.error, TypeError) as error:
        raise ValueError(f"{option}={pattern!r} is no regular expression: {error}") from error


def check(sample: Sample, *, pattern: re.Pattern | None) -> Verdict:
    """1 if the stripped strings are equal, else 0; unparsed if the pattern does not match."""
    found = after_reasoning(sample.response)
    if not found and sample.response:
        return Verdict(0.0, "unparsed", detail="nothing follows the reasoning")
    if pattern is not None:
        matches = list(pattern.finditer(found))
        if not matches:
            return Verdict(0.0, "unparsed", detail=f"nothing matches {pattern.pattern!r}")
        found = matches[-1].group(1 if pattern.groups else 0) or ""
    prediction = found.strip()
    return Verdict(float(prediction == sample.answer.strip()), prediction=prediction[:500])


def exact(pattern: str | None = None) -> Verifier:
    """Returns the verifier; the answer is the last match's first group (or the match) of `pattern`.

    With a pattern it is isolated, because a user's pattern may backtrack for ever.

    Raises:
      ValueError: the pattern is not a regular expression.
    """
    known = None if pattern is None else compiled("pattern", pattern)
    name = "exact" if pattern is None else f"exact[{pattern}]"
    bound = functools.partial(check, pattern=known)
    return Verifier(name, VERSION, bound, isolated=pattern is not None)
