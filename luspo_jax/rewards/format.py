"""Format rewards: 1 where the response has the required form, whatever its answer.

Forms of the answer are looked for after the reasoning (`after_reasoning`), like the answer itself;
`luspo_vl` and `fullmatch`, which describe the reasoning too, in the whole response.
"""

import functools
import re

from luspo_jax.rewards.exact import compiled
from luspo_jax.rewards.extraction import after_reasoning, boxed_contents
from luspo_jax.rewards.record import Sample, Verdict, Verifier

VERSION = "2"

_ANSWER_LINE = re.compile(r"(?i)\banswer\s*:\s*(\S[^\n]*)")
_NUMBER_LINE = re.compile(r"####[ \t]*(-?\$?[\d,]*\.?\d+)")


def _ends_with_only(pattern: re.Pattern, text: str) -> bool:
    """Whether the pattern matches exactly once, and nothing but white space follows the match."""
    text = after_reasoning(text)
    matches = list(pattern.finditer(text))
    return len(matches) == 1 and not text[matches[0].end() :].strip()


def answer_line(text: str) -> bool:
    """One `Answer: …`, and it is the last line."""
    return _ends_with_only(_ANSWER_LINE, text)


def gsm8k_line(text: str) -> bool:
    """One `#### number`, at the end."""
    return _ends_with_only(_NUMBER_LINE, text)


def one_box(text: str) -> bool:
    """One `\\boxed{…}` that is closed and not empty."""
    text = after_reasoning(text)
    boxes = boxed_contents(text)
    return len(boxes) == 1 == text.count("\\boxed") and bool(boxes[0].strip())


def luspo_vl(text: str) -> bool:
    """`<think>…</think> <answer> The answer is $\\boxed{…}$ </answer>` and nothing else.

    The format that arXiv:2602.05261 asks of vision-language responses; white space between its
    pieces is free, each tag must occur once.
    """
    if any(text.count(tag) != 1 for tag in ("<think>", "</think>", "<answer>", "</answer>")):
        return False
    text = text.strip()
    thought, _, tail = text.partition("</think>")
    opened, _, closing = tail.strip().partition("<answer>")
    answer = closing.removesuffix("</answer>").strip()
    head, foot = "The answer is $\\boxed{", "}$"
    return (
        thought.startswith("<think>")
        and bool(thought.removeprefix("<think>").strip())
        and not opened
        and text.endswith("</answer>")
        and answer.startswith(head)
        and answer.endswith(foot)
        and one_box(answer)
        and boxed_contents(answer)[0] == answer[len(head) : -len(foot)]
    )


FORMATS = {
    "answer_line": answer_line,
    "gsm8k_line": gsm8k_line,
    "boxed": one_box,
    "luspo_vl": luspo_vl,
}


def _named(name: str):
    if not isinstance(name, str) or name not in FORMATS:
        raise ValueError(f"unknown format {name!r}; known: {', '.join(FORMATS)}")
    return FORMATS[name]


def check(sample: Sample, *, holds) -> Verdict:
    """1 where the predicate holds of the response, else 0."""
    return Verdict(float(holds(sample.response)))


def text_format(
    name: str | None = None, *, fullmatch: str | None = None, final: str | None = None
) -> Verifier:
    """The verifier, for exactly one of three ways to say what the form is.

    Args:
      name: one of FORMATS.
      fullmatch: a regular expression that the whole response must match ("." matches newlines).
      final: a regular expression of the final answer: one match, and only white space after it.

    Raises:
      ValueError: none or several of them are given, the name is unknown, or a pattern is none.
    """
    given = [way for way in (name, fullmatch, final) if way is not None]
    if len(given) != 1:
        raise ValueError("a format is given by exactly one of name, fullmatch, final")
    if name is not None:
        holds = _named(name)
    elif fullmatch is not None:
        holds = functools.partial(_matches, compiled("fullmatch", fullmatch))
    else:
        holds = functools.partial(_ends_with_only, compiled("final", final))
    # A pattern of the user's may backtrack for ever: it runs where it can be killed.
    isolated = name is None
    check_form = functools.partial(check, holds=holds)
    return Verifier(f"format[{given[0]}]", VERSION, check_form, isolated)


def _matches(pattern: re.Pattern, text: str) -> bool:
    return pattern.fullmatch(text) is not None
