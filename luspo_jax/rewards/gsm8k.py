"""GSM8K's rule: the number after the last `####` must equal the reference's."""

import functools
import re
from fractions import Fraction

from luspo_jax.rewards.answers.extraction import after_reasoning, plain_signs
from luspo_jax.rewards.answers.plain_numbers import exact_number
from luspo_jax.rewards.record import Sample, Verdict, Verifier

VERSION = "2"
LONGEST = 1_000  # characters read after the mark

_NUMERAL = re.compile(
    r"""(?x)
    (?: (?<![\w)\]}.])[-+] | \A\s*[-+]\s? )?
    (?: (?: \d{1,3}(?:[ ]\d{3})+(?!\d) | \d+(?:,\d{2,3})*,\d{3}(?!\d) | \d+ ) (?:\.\d+)? | \.\d+ )
    (?: [eE][-+]?\d{1,3}(?!\d) | [ ]?/[ ]?\d+(?![\d.]) )?
    """
)
_DECORATION = re.compile(
    r"\\[(),;!\[\]$]|\$|(?<![\w)])\*+|\*++(?!\s*[\d(])|\\(?:boxed|text\w*)\s{0,4}\{|\}"
)
# Text that makes a number part of a calculation, a ratio, a date or a formula.
_GOES_ON = re.compile(
    r"\s*[-+*/^×·÷:=]+\s*[\d(.]|\s+\.?\d|[.,]\d|\(|[eE][-+]?\d|\s*\\[a-zA-Z]"
    r"|\s*(?i:hundred|thousand|[mb]illion)"
)
_GOES_BEFORE = re.compile(r"(?:[+*/^×·÷]\s*|\w-)\Z")
_UNIT = re.compile(r"\s*(?:\\?%|[A-Za-z][A-Za-z ]*)?\.?\s*")


def number(text: str, *, alone: bool = False) -> tuple[str, Fraction] | None:
    """Returns (as written, value) of the first number in a text, or after its last "=".

    Returns None if there is none, or if it is part of a calculation or of LaTeX. Commas, spaces
    between thousands, currency signs, boxes and emphasis are ignored.

    Args:
      text: a line.
      alone: whether nothing but the number and its unit may occur.
    """
    text = _DECORATION.sub("", plain_signs(text[:LONGEST])).rpartition("=")[2].strip()
    match = _NUMERAL.search(text)
    if match is None:
        return None
    before, after = text[: match.start()], text[match.end() :]
    if "\\" in before or _GOES_BEFORE.search(before[-20:]) or _GOES_ON.match(after):
        return None
    if alone and (before or not _UNIT.fullmatch(after)):
        return None
    numeral = match.group().replace(",", "").replace(" ", "").lstrip("+")
    value = exact_number(numeral)
    return None if value is None else (numeral, value)


def final_number(text: str, mark: str, **how) -> tuple[str, Fraction] | None:
    """Returns the number after the last mark, on the same line; None if either is missing."""
    _, found, tail = text.rpartition(mark)
    return number(tail[: 2 * LONGEST].strip().partition("\n")[0], **how) if found else None


def check(sample: Sample, *, mark: str) -> Verdict:
    """1 if both numbers are equal, else 0. The reference may be a number or a full solution."""
    read = functools.partial(final_number, mark=mark) if mark in sample.answer else number
    gold = read(sample.answer, alone=True)
    if gold is None:
        return Verdict(0.0, "error", detail=f"the reference {sample.answer[-80:]!r} is no number")
    prediction = final_number(after_reasoning(sample.response), mark)
    if prediction is None:
        return Verdict(0.0, "unparsed", detail=f"no '{mark} number' in the response")
    return Verdict(float(prediction[1] == gold[1]), prediction=prediction[0])


def gsm8k(mark: str = "####") -> Verifier:
    """Returns the verifier for answers announced by `mark`.

    Raises:
      ValueError: the mark is not a text, or is empty.
    """
    if not isinstance(mark, str) or not mark:
        raise ValueError(f"mark must be the text before the number, not {mark!r}")
    name = "gsm8k" if mark == "####" else f"gsm8k[{mark}]"
    return Verifier(name, VERSION, functools.partial(check, mark=mark))
