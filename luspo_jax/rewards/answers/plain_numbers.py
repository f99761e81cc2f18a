"""Exact values of plain numbers, and decimals that stand for fractions."""

import re
from fractions import Fraction

LONGEST = 400  # digits

_DECIMAL = re.compile(
    r"([+-]?)\s*(?:\\?[$€£]\s*)?((?:[1-9]\d{0,2}(?:(?:,|\{,\}|\s)\d{3})+|\d+)?)((?:\.\d*)?)(?:\s*\\?[$€£])?"
)
_RATIO = re.compile(r"([+-]?)\s*(?:\\frac\s*\{\s*(-?\d+)\s*\}\s*\{\s*(\d+)\s*\}|(\d+)\s*/\s*(\d+))")
_MIXED = re.compile(
    r"([+-]?)\s*(\d{1,9})(?:\s*\\frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}|\s+(\d+)\s*/\s*(\d+))"
)
_SCIENTIFIC = re.compile(
    r"([+-]?\d+(?:\.\d+)?|\.\d+)\s*"
    r"(?:[eE]\s*([+-]?\d{1,3})|\\(?:times|cdot)\s*10\s*\^\s*(?:\{\s*([+-]?\d{1,3})\s*\}|(\d)))"
)
_REPEATING = re.compile(
    r"([+-]?)(\d*)\.(\d*)(?:\\(?:overline|bar|dot)\s*\{?\s*(\d+)\s*\}?|\((\d+)\))(?:\s*\\ldots)?"
)
_CUT_OFF = re.compile(r"([+-]?\d*\.\d{3,})\s*\\ldots")
_SIMPLE_DECIMAL = re.compile(r"[+-]?\d*\.(\d+)")
_COMMA_DECIMAL = re.compile(r"([+-]?\d+),(\d+)")


def exact_number(answer: str) -> Fraction | None:
    """Returns the value of an integer, decimal or fraction of integers; None for anything else."""
    answer = answer.strip()
    if len(answer) > LONGEST:
        return None
    decimal = _DECIMAL.fullmatch(answer)
    if decimal and any(decimal.groups()[1:]) and any(c.isdigit() for c in answer):
        sign, whole, decimals = decimal.groups()
        digits = re.sub(r"\D", "", whole) or "0"
        return Fraction(sign + digits + (decimals if len(decimals) > 1 else ""))
    return next((value for read in _READERS if (value := read(answer)) is not None), None)


def _ratio(answer: str) -> Fraction | None:
    match = _RATIO.fullmatch(answer)
    if match is None:
        return None
    above, below = (int(part) for part in match.groups()[1:] if part is not None)
    return (Fraction(-above if match[1] == "-" else above, below)) if below else None


def _mixed(answer: str) -> Fraction | None:
    """Reads 3\\frac{1}{2} and 3 1/2."""
    match = _MIXED.fullmatch(answer)
    if match is None:
        return None
    whole, above, below = (int(part) for part in match.groups()[1:] if part is not None)
    if not below:
        return None
    return (-1 if match[1] == "-" else 1) * (whole + Fraction(above, below))


def _scientific(answer: str) -> Fraction | None:
    """Reads 1.6e-19 and 1.6 \\times 10^{-19}."""
    match = _SCIENTIFIC.fullmatch(answer)
    if match is None:
        return None
    return Fraction(match[1]) * Fraction(10) ** int(match[2] or match[3] or match[4])


def _repeating(answer: str) -> Fraction | None:
    """Reads 0.1\\overline{6} and 0.1(6)."""
    match = _REPEATING.fullmatch(answer)
    if match is None:
        return None
    sign, whole, steady, *periods = match.groups()
    period = periods[0] or periods[1]
    tail = Fraction(int(period), 10 ** len(period) - 1) / 10 ** len(steady)
    value = Fraction(f"{whole or 0}.{steady or 0}") + tail
    return -value if sign == "-" else value


_READERS = (_ratio, _mixed, _scientific, _repeating)


def numbers_equal(gold: str, prediction: str) -> bool:
    """Whether two plain numbers are equal, or one is a decimal that rounds the other.

    A decimal with at least four correct places stands for a fraction without a finite decimal:
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
    """Whether one answer writes the other's decimal point as a comma: 1,22 and 1.22.

    A gold of 1,2 is read as two answers rather than 1.2.
    """
    for comma, point in ((gold, prediction), (prediction, gold)):
        match = _COMMA_DECIMAL.fullmatch(comma.strip())
        if match is None or (comma is gold and len(match[2]) == 1):
            continue
        if "." in point and exact_number(point) == Fraction(f"{match[1]}.{match[2]}"):
            return True
    return False


def decimal_places(answer: str) -> int:
    """Counts the digits after the point of a plain decimal; 0 for anything else."""
    match = _SIMPLE_DECIMAL.fullmatch(answer.strip())
    return len(match[1]) if match else 0


def cut_off_agrees(gold: str, prediction: str) -> bool:
    """Whether one answer is the other's truncated decimal expansion: 0.333… and 1/3."""
    for cut, other in ((gold, prediction), (prediction, gold)):
        match, value = _CUT_OFF.fullmatch(cut.strip()), exact_number(other)
        if match and value is not None and not _terminates(value):
            digits = len(match[1].partition(".")[2])
            if abs(value) * 10**digits // 1 == abs(Fraction(match[1])) * 10**digits:
                return (value < 0) == match[1].startswith("-")
    return False


def _terminates(value: Fraction) -> bool:
    below = value.denominator
    for prime in (2, 5):
        while below % prime == 0:
            below //= prime
    return below == 1
