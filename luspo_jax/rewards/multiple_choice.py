"""Multiple choice: the letter that a response ends on must be the reference letter."""

import re

from luspo_jax.rewards.extraction import final_answer
from luspo_jax.rewards.record import Sample, Verdict, Verifier

VERSION = "1"
_LETTER = re.compile(
    r"(?:\\(?:text|textbf|mathrm|mathbf)\s*\{)?\s*\(?\s*([A-Za-z])\s*(?:[).:}\s].*)?", re.S
)


def choice(text: str) -> str | None:
    """The letter of an answer such as `B`, `(B)`, `\\text{(B)}` or `B. a circle`, in upper case."""
    match = _LETTER.fullmatch(text.strip().strip("$").strip())
    return match[1].upper() if match else None


def check(sample: Sample) -> Verdict:
    """1 where the letters are equal, else 0; unparsed where the response ends on no letter."""
    gold = choice(sample.answer)
    if gold is None:
        return Verdict(0.0, "error", detail=f"the reference {sample.answer[:80]!r} is no letter")
    prediction = choice(final_answer(sample.response) or sample.response)
    if prediction is None:
        return Verdict(0.0, "unparsed", detail="the response ends on no letter")
    return Verdict(float(prediction == gold), prediction=prediction)


def multiple_choice() -> Verifier:
    """The verifier, ready for use."""
    return Verifier("multiple_choice", VERSION, check)
