"""Numbers that carry something: a unit, a percent sign, a base, a modulus; ratios and times."""

import dataclasses
import re
from fractions import Fraction

_LENGTHS = {
    **{"mm": "1/1000", "millimeter": "1/1000", "cm": "1/100", "centimeter": "1/100", "m": "1"},
    **{"meter": "1", "km": "1000", "kilometer": "1000", "in": "0.0254", "inch": "0.0254"},
    **{"ft": "0.3048", "foot": "0.3048", "yd": "0.9144", "yard": "0.9144"},
    **{"mi": "1609.344", "mile": "1609.344"},
}
_TIMES = {
    **{"ms": "1/1000", "s": "1", "sec": "1", "second": "1", "min": "60", "minute": "60"},
    **{"h": "3600", "hr": "3600", "hour": "3600", "day": "86400", "week": "604800"},
}
_MASSES = {
    **{"mg": "1/1000000", "g": "1/1000", "gram": "1/1000", "kg": "1", "kilogram": "1"},
    **{"lb": "0.45359237", "pound": "0.45359237", "oz": "0.028349523125"},
    **{"ounce": "0.028349523125"},
}
_SYMBOLS = {"N": "1", "J": "1", "W": "1", "Pa": "1", "Hz": "1", "V": "1", "mol": "1"}
_MONEY = {"dollar": "1", "usd": "1", "cent": "1/100"}
# Unit → (dimension, factor to the dimension's base unit).
UNITS = {
    name: (dimension, Fraction(factor))
    for dimension, table in (
        ("length", _LENGTHS),
        ("time", _TIMES),
        ("mass", _MASSES),
        ("money", _MONEY),
    )
    for name, factor in table.items()
} | {name: (name, Fraction(factor)) for name, factor in _SYMBOLS.items()}
_IRREGULAR = {"feet": "foot", "inches": "inch", "metre": "meter", "kilometre": "kilometer"}
_COMPOUND = {"mph": "mi/h", "kmh": "km/h", "kph": "km/h", "kmph": "km/h"}
_MULTIPLIERS = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_PREFIXED = re.compile(r"(square|sq\.?|cubic|cu\.?)\s+(.*)|(.*?)\s+(squared|cubed)", re.IGNORECASE)
_POWER = re.compile(r"(.*?)\s*(?:\^\s*\{?\s*(-?\d)\s*\}?)?")

# A unit after a value: in a text command, or known words and symbols.
_IN_TEXT = re.compile(
    r"(?P<value>.*[\d})!a-z])\s*\\(?:text|mbox|hbox|textnormal)\s*\{\s*(?P<unit>[^{}]+?)\s*\}"
    r"\s*(?P<power>\^\s*(?:\{\s*-?\d\s*\}|\d))?",
    re.DOTALL,
)
_WORD = r"[A-Za-z]{1,12}(?:\^\{?-?\d\}?)?"
_PLAIN = re.compile(
    rf"(?P<value>.*[\d}})])(?P<space>\s*)(?P<unit>{_WORD}(?:(?:\s*[/*]\s*|\s){_WORD})*)", re.DOTALL
)
_DEGREES = re.compile(r"(?P<value>.*[\d})])\s*\^\s*(?P<unit>\{?\s*\\circ\s*\}?)\s*", re.DOTALL)
# Of a plain number, any words are the unit.
_COUNTED = re.compile(r"(?P<value>[+-]?[\d.,]*\d)\s+(?P<unit>[a-zA-Z]{3,}(?:\s+[a-zA-Z]+)*)\s*")
_MONEY_SIGN = re.compile(r"(-?)\s*\\?\$\s*(?=[\d.,]+|\\frac)")
_NO_UNIT = re.compile(
    r"\b(?:and|or|to|if|where|when|for|mod|base|not|is|are|pi|sqrt|sin|cos|tan|cot|sec|csc|log|ln|exp|infty|infinity)\b"
)


@dataclasses.dataclass(frozen=True)
class Quantity:
    """A value as it was written, and its unit.

    Attributes:
      value: what stands before the unit.
      unit: (dimension, power) pairs; None for a unit that is not in the table.
      factor: the unit in base units of its dimensions.
      certain: whether it can be nothing else; `2 mg` may be a mass or 2·m·g.
    """

    value: str
    unit: tuple[tuple[str, int], ...] | None
    factor: Fraction = Fraction(1)
    certain: bool = True


def _single(unit: str) -> tuple[str, Fraction] | None:
    if unit in UNITS:
        return UNITS[unit]
    unit = unit.casefold()
    unit = _IRREGULAR.get(unit, unit)
    for name in (unit, unit.removesuffix("s"), unit.removesuffix("es")):
        name = _IRREGULAR.get(name, name)
        if name in UNITS and len(name) > 1:
            return UNITS[name]
    return None


def read_unit(text: str) -> tuple[tuple[tuple[str, int], ...], Fraction] | None:
    """((dimension, power), …) and factor of a unit such as `cm^2`, `square feet` or `km/h`."""
    text = _COMPOUND.get(text.strip().casefold(), text.strip())
    text = re.sub(r"\s+per\s+", "/", text)
    powers: dict[str, int] = {}
    total = Fraction(1)
    for place, part in enumerate(text.split("/")):
        for piece in re.split(r"\s*[*·]\s*|\\cdot", part.strip()):
            found = _powered(piece)
            if found is None:
                return None
            (dimension, factor), power = found
            power = -power if place else power
            powers[dimension] = powers.get(dimension, 0) + power
            total *= factor**power
    return tuple(sorted(powers.items())), total


def _powered(piece: str) -> tuple[tuple[str, Fraction], int] | None:
    named = _PREFIXED.fullmatch(piece)
    power = 1
    if named:
        power = 2 if (named[1] or named[4]).casefold().startswith("sq") else 3
        piece = named[2] or named[3]
    match = _POWER.fullmatch(piece)
    unit = _single(match[1])
    return (unit, power * int(match[2] or 1)) if unit else None


def quantity(answer: str) -> Quantity | None:
    """The value and the unit of an answer that ends on one, or begins with a dollar sign."""
    match = _IN_TEXT.fullmatch(answer)
    if match and not _NO_UNIT.search(match["unit"]):
        return _quantity(match["value"], match["unit"], match["power"] or "")
    match = _DEGREES.fullmatch(answer) or _COUNTED.fullmatch(answer)
    if match and not _NO_UNIT.search(match["unit"]):
        return _quantity(match["value"], match["unit"], "")
    match = _PLAIN.fullmatch(answer)
    if match and _is_unit(match["unit"], bool(match["space"])):
        return dataclasses.replace(_quantity(match["value"], match["unit"], ""), certain=False)
    money = _MONEY_SIGN.match(answer)
    if money:
        return Quantity(money[1] + answer[money.end() :], (("money", 1),))
    return None


def _is_unit(text: str, spaced: bool) -> bool:
    # A letter by itself is a variable.
    return len(text) > 1 and spaced and read_unit(text) is not None


def _quantity(value: str, unit: str, power: str) -> Quantity:
    value = _MONEY_SIGN.sub(r"\1", value.strip().rstrip("\\").strip(), count=1)
    words = unit.casefold().split()
    if words and words[0] in _MULTIPLIERS:
        value = rf"{value} \times 10^{{{_MULTIPLIERS[words[0]]}}}"
        unit = " ".join(words[1:])
    found = read_unit(unit + power) if unit else None
    return Quantity(value, *found) if found else Quantity(value, None)


def times_of_day_agree(gold: str, prediction: str) -> bool | None:
    """Whether two times such as `3:30 PM` agree; morning or afternoon may go unsaid in one."""
    times = [_time(answer) for answer in (gold, prediction)]
    if None in times:
        return None
    (hour, half), (other, other_half) = times
    if not half and not other_half:
        return None  # it may be a ratio
    return hour == other and (half == other_half or not half or not other_half)


_TIME = re.compile(
    r"(?i)(\d{1,2})(?:\s*:\s*(\d{2}))?\s*(?:\\text\s*\{\s*)?(?:([ap])\.?\s*m\.?)?\s*\}?"
)


def _time(answer: str) -> tuple[tuple[int, int], str] | None:
    match = _TIME.fullmatch(answer.strip())
    if match is None or not (match[2] or match[3]):
        return None
    return (int(match[1]), int(match[2] or 0)), (match[3] or "").casefold()


def ratio(answer: str) -> list[str] | None:
    """The terms of `a : b : c` or `a to b`; None for anything else."""
    answer = re.sub(r"\\text\s*\{\s*to\s*\}|(?<=\d)\s+to\s+(?=\d)|\\colon(?![a-z])", ":", answer)
    terms = [term.strip() for term in answer.split(":")]
    if len(terms) < 2 or not all(re.fullmatch(r"[\w\s.\\{}^()+*/-]+", term) for term in terms):
        return None
    return terms


def clock(answer: str) -> bool:
    """Whether a ratio can only be a time of day, as 12:00 or 09:30."""
    return re.fullmatch(r"\d{1,2}:0\d|0\d:\d{2}", answer.strip()) is not None


_BASES = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8}
_BASES |= {"nine": 9, "ten": 10, "eleven": 11, "twelve": 12, "sixteen": 16}
_WITH_BASE = re.compile(
    r"\(?\s*([0-9A-Za-z]+)\s*\)?\s*(?:_\s*\{?\s*|(?:\\text\s*\{)?\s*(?:in\s+)?base[\s-]+)"
    r"(?:\\text\s*\{\s*|\\text)?(\d{1,2}|[a-z]+)\s*\}*"
)


def in_base(answer: str) -> tuple[int, int] | None:
    """(value, base) of a number with its base, as 2516_{8}; None for anything else."""
    match = _WITH_BASE.fullmatch(answer.strip())
    if match is None or not any(c.isdigit() for c in match[1] + match[2]):
        return None
    base = int(match[2]) if match[2].isdigit() else _BASES.get(match[2], 0)
    try:
        return int(match[1], base), base
    except ValueError:  # no such digit in that base, or no such base
        return None


_MODULUS = re.compile(
    r"(?:[a-zA-Z]\s*\\equiv\s*)?(-?\d{1,30})\s*"
    r"(?:\(\s*(?:\\text\s*\{)?\s*mod\s*\}?\s*(?:\\)?\s*(\d{1,30})\s*\)"
    r"|\\pmod\s*\{?\s*(\d{1,30})\s*\}?|\\[bp]?mod\s*\{?\s*(\d{1,30})\s*\}?)"
)


def residue(answer: str) -> tuple[int, int] | None:
    """(value, modulus) of `7 \\pmod{10}`; None for anything else."""
    match = _MODULUS.fullmatch(answer.strip())
    if match is None:
        return None
    modulus = int(next(group for group in match.groups()[1:] if group))
    return (int(match[1]), modulus) if modulus else None


def proportional(gold: list[Fraction], prediction: list[Fraction]) -> bool:
    """Whether two ratios of numbers are the same ratio."""
    if 0 in gold or 0 in prediction:
        return gold == prediction
    return len({a / b for a, b in zip(gold, prediction, strict=True)}) == 1


_PERCENT = re.compile(
    r"(?i)(.*\S)\s*(?:\\?%|(?:\\text\s*\{\s*)?(?:per\s?cent(?:age)?|pct|\\?%)\s*\}?)\s*", re.DOTALL
)


def percent(answer: str) -> str | None:
    """What stands before a percent sign or the word; None without one."""
    match = _PERCENT.fullmatch(answer)
    if match is None:
        return None
    return re.sub(r"\\text\s*\{\s*$|\\$", "", match[1]).strip().rstrip("$").strip()
