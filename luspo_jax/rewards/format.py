"""Format rewards: 1 if the response has the required form, right or wrong.

Forms of the answer are searched for after the reasoning (`after_reasoning`), like the answer
itself. `luspo_vl` and `fullmatch`, which describe the reasoning too, read the whole response.
"""

import functools
import re

from luspo_jax.rewards.answers.extraction import after_reasoning, boxed_contents
from luspo_jax.rewards.exact import compiled
from luspo_jax.rewards.record import Sample, Verdict, Verifier

VERSION = "2"

_ANSWER_LINE = re.compile(r"(?i)\banswer\s*:\s*(\S[^\n]*)")
_NUMBER_LINE = re.compile(r"####[ \t]*(-?\$?[\d,]*\.?\d+)")


def _ends_with_only(pattern: re.Pattern, text: str) -> bool:
    """Whether the pattern matches exactly once, followed only by white space."""
    text = after_reasoning(text)
    matches = list(pattern.finditer(text))
    return len(matches) == 1 and not text[matches[0].end() :].strip()


def answer_line(text: str) -> bool:
    """Whether there is one `Answer: …`, on the last line."""
    return _ends_with_only(_ANSWER_LINE, text)


def gsm8k_line(text: str) -> bool:
    """Whether there is one `#### number`, at the end."""
    return _ends_with_only(_NUMBER_LINE, text)


def one_box(text: str) -> bool:
    """Whether there is one `\\boxed{…}`, closed and not empty."""
    text = after_reasoning(text)
    boxes = boxed_contents(text)
    return len(boxes) == 1 == text.count("\\boxed") and bool(boxes[0].strip())


def luspo_vl(text: str) -> bool:
    """Whether it is `<think>…</think> <answer> The answer is $\\boxed{…}$ </answer>`, nothing else.

    arXiv:2602.05261 asks for this format in vision-language responses. White space between the
    pieces is free; each tag must occur once.
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
    """1 if the predicate holds for the response, else 0."""
    return Verdict(float(holds(sample.response)))


def text_format(
    name: str | None = None, *, fullmatch: str | None = None, final: str | None = None
) -> Verifier:
    """Returns the verifier; exactly one argument must define the form.

    Args:
      name: a key of FORMATS.
      fullmatch: a regular expression that the whole response must match ("." matches newlines).
      final: a regular expression of the final answer: one match, followed only by white space.

    Raises:
      ValueError: none or several arguments, an unknown name, or an invalid pattern.
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
    # A user's pattern may backtrack for ever, so it runs where it can be killed.
    isolated = name is None
    check_form = functools.partial(check, holds=holds)
    return Verifier(f"format[{given[0]}]", VERSION, check_form, isolated)


def _matches(pattern: re.Pattern, text: str) -> bool:
    return pattern.fullmatch(text) is not None
