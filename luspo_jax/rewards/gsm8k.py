"""GSM8K's rule: the number after the last `####` must equal the reference's."""

import decimal
import re

from luspo_jax.rewards.record import Sample, Verdict, Verifier

VERSION = "1"
_NUMBER = re.compile(r"-?(?:\d[\d,]*)?\.?\d+")


def number(text: str) -> decimal.Decimal | None:
    """The first number in a text, commas and currency signs ignored; None where there is none."""
    match = _NUMBER.search(text.replace("$", ""))
    return decimal.Decimal(match.group().replace(",", "")) if match else None


def final_number(text: str) -> decimal.Decimal | None:
    """The number after the last `####`; None where there is no such mark or no number after it."""
    _, mark, tail = text.rpartition("####")
    return number(tail.strip().partition("\n")[0]) if mark else None


def check(sample: Sample) -> Verdict:
    """1 where both numbers are equal, else 0. The reference may be a number or a full solution."""
    gold = final_number(sample.answer) if "####" in sample.answer else number(sample.answer)
    if gold is None:
        return Verdict(0.0, "error", detail=f"the reference {sample.answer[-80:]!r} has no number")
    prediction = final_number(sample.response)
    if prediction is None:
        return Verdict(0.0, "unparsed", detail="no '#### number' in the response")
    return Verdict(float(prediction == gold), prediction=f"{prediction:f}")


def gsm8k() -> Verifier:
    """The verifier, ready for use."""
    return Verifier("gsm8k", VERSION, check)
