"""GSM8K's rule: the number after the last `####` must equal the reference's."""

import decimal
import functools
import re

from luspo_jax.rewards.record import Sample, Verdict, Verifier

VERSION = "1"
_NUMBER = re.compile(r"-?(?:\d[\d,]*)?\.?\d+")


def number(text: str) -> decimal.Decimal | None:
    """The first number in a text, commas and currency signs ignored; None where there is none."""
    match = _NUMBER.search(text.replace("$", ""))
    return decimal.Decimal(match.group().replace(",", "")) if match else None


def final_number(text: str, mark: str) -> decimal.Decimal | None:
    """The number after the last mark, in the same line; None without a mark or a number there."""
    _, found, tail = text.rpartition(mark)
    return number(tail.strip().partition("\n")[0]) if found else None


def check(sample: Sample, *, mark: str) -> Verdict:
    """1 where both numbers are equal, else 0. The reference may be a number or a full solution."""
    has_mark = mark in sample.answer
    gold = final_number(sample.answer, mark) if has_mark else number(sample.answer)
    if gold is None:
        return Verdict(0.0, "error", detail=f"the reference {sample.answer[-80:]!r} has no number")
    prediction = final_number(sample.response, mark)
    if prediction is None:
        return Verdict(0.0, "unparsed", detail=f"no '{mark} number' in the response")
    return Verdict(float(prediction == gold), prediction=f"{prediction:f}")


def gsm8k(mark: str = "####") -> Verifier:
    """The verifier, for answers announced by `mark`."""
    name = "gsm8k" if mark == "####" else f"gsm8k[{mark}]"
    return Verifier(name, VERSION, functools.partial(check, mark=mark))
