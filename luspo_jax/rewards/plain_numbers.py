"""Exact values of plain numbers, and when a decimal stands for a fraction."""

import re
from fractions import Fraction

LONGEST = 400  # digits

_DECIMAL = re.compile(
    r"([+-]?)\s*(?:\\?[$€£]\s*)?((?:[1-9]\d{0,2}(?:(?:,|\{,\}|\s)\d{3})+|\d+)?)((?:\.\d*)?)"
)
_RATIO = re.compile(r"([+-]?)\s*(?:\\frac\s*\{\s*(-?\d+)\s*\}\s*\{\s*(\d+)\s*\}|(\d+)\s*/\s*(\d+))")
_SIMPLE_DECIMAL = re.compile(r"[+-]?\d*\.(\d+)")
_WITH_BASE = re.compile(r"([0-9A-Za-z]+)_\{(\d{1,2})\}")
_COMMA_DECIMAL = re.compile(r"([+-]?\d+),(\d+)")


def exact_number(answer: str) -> Fraction | None:
    """The value of an integer, a decimal or a fraction of integers; None for anything else."""
    answer = answer.strip()
    if len(answer) > LONGEST:
        return None
    decimal = _DECIMAL.fullmatch(answer)
    if decimal and any(decimal.groups()[1:]) and any(c.isdigit() for c in answer):
        sign, whole, decimals = decimal.groups()
        digits = re.sub(r"\D", "", whole) or "0"
        return Fraction(sign + digits + (decimals if len(decimals) > 1 else ""))
    ratio = _RATIO.fullmatch(answer)
    if ratio is None:
        return None
    above, below = (int(part) for part in ratio.groups()[1:] if part is not None)
    if not below:
        return None
    return Fraction(-above if ratio[1] == "-" else above, below)


def numbers_equal(gold: str, prediction: str) -> bool:
    """Whether two plain numbers are equal, or one is a decimal that rounds the other.

    A decimal stands for a fraction that has none of its own, given four correct places or more:
    0.3333 for 1/3, but neither 0.33 for 1/3 nor 5.001 for 5.
    """
    a, b = exact_number(gold), exact_number(prediction)
    if a == b:
        return True
    if _terminates(a) == _terminates(b):
        return False
    decimal = prediction if _terminates(b) else gold
    places = decimal_places(decimal)
    return places >= 4 and abs(a - b) <= Fraction(1, 2 * 10**places)


def decimal_commas_agree(gold: str, prediction: str) -> bool:
    """Whether one answer writes the other's decimal point as a comma: 1,22 and 1.22."""
    for comma, point in ((gold, prediction), (prediction, gold)):
        match = _COMMA_DECIMAL.fullmatch(comma.strip())
        if match and exact_number(point) == Fraction(f"{match[1]}.{match[2]}"):
            return True
    return False


def decimal_places(answer: str) -> int:
    """Digits after the point of a plain decimal; 0 for anything else."""
    match = _SIMPLE_DECIMAL.fullmatch(answer.strip())
    return len(match[1]) if match else 0


def in_base(answer: str) -> int | None:
    """The value of a number with its base as a subscript, 2516_{8}; None for anything else."""
    match = _WITH_BASE.fullmatch(answer.strip())
    if match is None:
        return None
    try:
        return int(match[1], int(match[2]))
    except ValueError:  # no such digit in that base, or no such base
        return None


def _terminates(value: Fraction) -> bool:
    below = value.denominator
    for prime in (2, 5):
        while below % prime == 0:
            below //= prime
    return below == 1
