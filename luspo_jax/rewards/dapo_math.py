"""DAPO's rule for `Answer: …`: the last such line, normalised, must equal the gold string.

Verdicts follow verl's `math_dapo` (Apache-2.0), which normalises as in Minerva, arXiv:2206.14858,
appendix D.1. It compares strings, without algebra: `0.5` is not `\\frac12`. There are two
differences. Reasoning holds no answer: `Answer: …` counts only after the last `</think>`, and never
if a `<think>` is not closed. Unicode minus signs and fullwidth forms are read as ASCII.
"""

import re

from luspo_jax.rewards.answers.extraction import after_reasoning, plain_signs
from luspo_jax.rewards.record import Sample, Verdict, Verifier

VERSION = "2"
WINDOW = 300  # characters read at the end of the response

_ANSWER = re.compile(r"(?i)Answer\s*:\s*([^\n]+)")

# Replaced one after another, in this order: later entries act on the output of earlier ones.
_REPLACED = (
    ("an ", ""),
    ("a ", ""),
    (".$", "$"),
    (r"\$", ""),
    ("\\ ", ""),
    (" ", ""),
    ("mbox", "text"),
    (r",\text{and}", ","),
    (r"\text{and}", ","),
    (r"\text{m}", r"\text{}"),
)
_UNITS = (
    *("square", "ways", "integers", "dollars", "mph", "inches", "hours", "km", "units", r"\ldots"),
    *("sue", "points", "feet", "minutes", "digits", "cents", "degrees", "cm", "gm", "pounds"),
    *("meters", "meals", "edges", "students", "childrentickets", "multiples"),
)
_MARKUP = (
    *(r"\text{s}", r"\text{.}", "\\text{\ns}", r"\text{}^2", r"\text{}^3", "\\text{\n}"),
    *(r"\text{}", r"\mathrm{th}", r"^\circ", r"^{\circ}", r"\;", r",\!", "{,}", '"', r"\dots"),
)
_WRAPPERS = (
    re.compile(r"\\text\{(.*?)\}"),
    re.compile(r"\\textbf\{(.*?)\}"),
    re.compile(r"\\overline\{(.*?)\}"),
    re.compile(r"\\boxed\{(.*)\}"),
)
_INLINE_MATH = re.compile(r".*?\$(.*?)\$.*")
_SHORT_FRACTION = re.compile(r"frac([^{])(.)")
_SHORT_ROOT = re.compile(r"sqrt([^{])")


def normalise(answer: str) -> str:
    """Returns the text after the last "=", without units, markup, spaces and thousands commas."""
    answer = answer.rpartition("=")[2]
    for old, new in _REPLACED:
        answer = answer.replace(old, new)
    for removed in (*_UNITS, *_MARKUP):
        answer = answer.replace(removed, "")
    answer = _INLINE_MATH.sub(r"$\1$", answer)
    for wrapper in _WRAPPERS:
        answer = wrapper.sub(r"\1", answer)
    answer = _SHORT_FRACTION.sub(r"frac{\1}{\2}", answer)
    answer = _SHORT_ROOT.sub(r"sqrt{\1}", answer).replace("$", "")
    digits = answer.replace(",", "")
    return digits if digits.isdigit() else answer.strip()


def gold(answer: str) -> str:
    """Returns the reference answer in comparable form: `033`, as AIME files write it, is 33."""
    stripped = answer.strip()
    if re.fullmatch(r"[+-]?[0-9]+", stripped):
        return str(int(stripped))
    return normalise(plain_signs(answer))


def check(sample: Sample) -> Verdict:
    """1 if the last `Answer:` line is the gold answer, else 0; unparsed without such a line."""
    answers = _ANSWER.findall(plain_signs(after_reasoning(sample.response)[-WINDOW:]))
    if not answers:
        return Verdict(0.0, "unparsed", detail=f"no 'Answer:' in the last {WINDOW} characters")
    prediction = normalise(answers[-1])
    return Verdict(float(prediction == gold(sample.answer)), prediction=prediction)


def dapo_math() -> Verifier:
    """Returns the verifier."""
    return Verifier("dapo_math", VERSION, check)
