"""Math-Verify by itself as a reward, as in its README, without any of our rules.

The gold is put in a box, as reward functions of the field do; formulas and plain expressions are
searched for in both; the worker's limit replaces its own.
"""

import logging

import math_verify

for _part in ("math_verify.parser", "math_verify.grader", "math_verify.utils"):
    logging.getLogger(_part).setLevel(logging.CRITICAL)


def _agree(gold: str, response: str) -> float:
    wanted = math_verify.parse(gold, parsing_timeout=None)
    found = math_verify.parse(response, parsing_timeout=None)
    return float(math_verify.verify(wanted, found, timeout_seconds=None))


def _in_box(text: str) -> str:
    marked = any(mark in text for mark in ("$", r"\boxed", r"\(", r"\["))
    return text if marked else rf"\boxed{{{text}}}"


def response(response: str, answer: str) -> float:
    """Returns 1 if the answer that Math-Verify finds in a response equals the gold."""
    return _agree(_in_box(answer), response)


def whole(response: str, answer: str) -> float:
    """Returns 1 if a response that consists of an answer equals the gold."""
    return _agree(_in_box(answer), _in_box(response))
