"""Multiple choice: the letter that a response states must equal the reference letter."""

from luspo_jax.rewards.answers.choices import chosen, option_meant
from luspo_jax.rewards.record import Sample, Verdict, Verifier

VERSION = "2"


def check(sample: Sample) -> Verdict:
    """1 if the letters are equal, else 0; unparsed if the response does not state exactly one."""
    gold = option_meant(sample.answer, {})
    if gold is None:
        return Verdict(0.0, "error", detail=f"the reference {sample.answer[:80]!r} is no letter")
    prediction = chosen(sample.response, {})
    if prediction is None:
        return Verdict(0.0, "unparsed", detail="the response states no letter, or several")
    return Verdict(float(prediction == gold), prediction=prediction)


def multiple_choice() -> Verifier:
    """Returns the verifier."""
    return Verifier("multiple_choice", VERSION, check)
