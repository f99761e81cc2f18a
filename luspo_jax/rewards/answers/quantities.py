"""Numbers with a unit, percent sign, base or modulus; ratios and times."""

import dataclasses
import re
from fractions import Fraction

# Unit → factor to the base unit of its dimension.
_TABLES = {
    "length": {"m": "1", "meter": "1", "in": "0.0254", "inch": "0.0254", "ft": "0.3048"}
    | {"foot": "0.3048", "yd": "0.9144", "yard": "0.9144", "mi": "1609.344", "mile": "1609.344"},
    "time": {"s": "1", "sec": "1", "second": "1", "min": "60", "minute": "60", "h": "3600"}
    | {"hr": "3600", "hour": "3600", "day": "86400", "week": "604800"},
    "mass": {"g": "1/1000", "gram": "1/1000", "lb": "0.45359237", "pound": "0.45359237"}
    | {"oz": "0.028349523125", "ounce": "0.028349523125"},
    "money": {"dollar": "1", "usd": "1", "cent": "1/100"},
    "volume": {"L": "1", "l": "1", "liter": "1", "litre": "1"},
    "angle": {r"\circ": "1", "degree": "1", "deg": "1"},
    "radians": {"rad": "1", "radian": "1"},
    "resistance": {r"\Omega": "1", "ohm": "1"},
    "frequency": {"Hz": "1", "hertz": "1"},
    "force": {"N": "1", "newton": "1"},
    "energy": {"J": "1", "joule": "1"},
    "power": {"W": "1", "watt": "1"},
    "pressure": {"Pa": "1", "pascal": "1"},
    "voltage": {"V": "1", "volt": "1"},
    "current": {"A": "1", "amp": "1", "ampere": "1"},
    "charge": {"C": "1", "coulomb": "1"},
    "temperature": {"K": "1", "kelvin": "1"},
    "electron volts": {"eV": "1"},
    "amount": {"mol": "1", "mole": "1"},
}
UNITS = {
    name: (dimension, Fraction(factor))
    for dimension, table in _TABLES.items()
    for name, factor in table.items()
}
_SYMBOL_PREFIXES = {"T": 12, "G": 9, "M": 6, "k": 3, "d": -1, "c": -2, "m": -3, r"\mu ": -6}
_SYMBOL_PREFIXES |= {r"\mu": -6, "u": -6, "n": -9, "p": -12}
_WORD_PREFIXES = {"tera": 12, "giga": 9, "mega": 6, "kilo": 3, "deci": -1, "centi": -2, "milli": -3}
_WORD_PREFIXES |= {"micro": -6, "nano": -9, "pico": -12}
_SYMBOLS = {"m", "g", "s", "L", "l", "Hz", "N", "J", "W", "Pa", "V", "A", "C", "eV", "mol"}
_SYMBOLS |= {r"\Omega"}
_WORDS = {"meter", "metre", "gram", "second", "liter", "litre", "hertz", "newton", "joule", "watt"}
_WORDS |= {"pascal", "volt", "amp", "ampere", "ohm", "mole"}
_IRREGULAR = {"feet": "foot", "inches": "inch", "metre": "meter"}
_COMPOUND = {"mph": "mi/h", "kmh": "km/h", "kph": "km/h", "kmph": "km/h"}
_MULTIPLIERS = {"dozen": "12", "hundred": "10^{2}", "thousand": "10^{3}", "million": "10^{6}"}
_MULTIPLIERS |= {"billion": "10^{9}", "trillion": "10^{12}"}
_PREFIXED = re.compile(r"(square|sq\.?|cubic|cu\.?)\s+(.*)|(.*?)\s+(squared|cubed)", re.IGNORECASE)
_POWER = re.compile(r"(.*?)\s*(?:\^\s*\{?\s*(-?\d)\s*\}?)?")

# A unit after a value: in a text command, or known words and symbols.
_IN_TEXT = re.compile(
    r"(?P<value>.*[\d})!a-z])\s*\\(?:text|mbox|hbox|textnormal)\s*\{\s*(?P<unit>[^{}]+?)\s*\}"
    r"\s*(?P<power>\^\s*(?:\{\s*-?\d\s*\}|\d))?",
    re.DOTALL,
)
_WORD = r"(?:\\(?:mu|Omega)\s?)?[A-Za-z]{1,12}(?:\^\{?-?\d\}?)?|[kM]?\\Omega"
_PLAIN = re.compile(
    rf"(?P<value>.*[\d}})])(?P<space>\s*)(?P<unit>(?:{_WORD})(?:(?:\s*[/*]\s*|\s)(?:{_WORD}))*)",
    re.DOTALL,
)
_DEGREES = re.compile(r"(?P<value>.*[\d})])\s*\^\s*\{?\s*(?P<unit>\\circ)\s*\}?\s*", re.DOTALL)
# Any words after a plain number are its unit.
_COUNTED = re.compile(r"(?P<value>[+-]?[\d.,]*\d)\s+(?P<unit>[a-zA-Z]{3,}(?:\s+[a-zA-Z]+)*)\s*")
_MONEY_SIGN = re.compile(r"(-?)\s*\\?\$\s*(?=[\d.,]+|\\frac)")
_MEASURE = re.compile(
    r"(\d+(?:\.\d+)?)\s*(?:\\text\s*\{\s*)?([A-Za-z]+)\s*(?:\})?\s*(?:,|and|\\text\s*\{\s*and\s*\})?\s*"
)
_SEVERAL = re.compile(rf"(?:{_MEASURE.pattern}){{2,4}}")
_LONGEST = 80  # characters of a sum of measures
_MERE_UNITS = re.compile(
    r"(?i)^(?:(?:square|sq\.?|cubic|cu\.?)\s+)?units?(?:\s+(?:squared|cubed))?$"
)
_HALF_DAY = 12 * 60
_NO_UNIT = re.compile(
    r"\b(?:and|or|to|if|where|when|for|mod|base|not|is|are|pi|sqrt|sin|cos|tan|cot|sec|csc|log|ln|exp|infty|infinity)\b"
)


@dataclasses.dataclass(frozen=True)
class Quantity:
    """A value as written, and its unit.

    Attributes:
      value: the text before the unit.
      unit: (dimension, power) pairs; None for a unit that is not in the table.
      words: the words of the unit, each in the singular.
      factor: the unit in base units of its dimensions.
      certain: false if there is another reading; `2 mg` may be a mass or 2·m·g.
    """

    value: str
    unit: tuple[tuple[str, int], ...] | None
    words: frozenset[str] = frozenset()
    factor: Fraction = Fraction(1)
    certain: bool = True

    def measures_as(self, other: "Quantity") -> bool:
        """Whether both units are of one kind; one not in the table may be more specific."""
        if self.unit is not None and other.unit is not None:
            return self.unit == other.unit
        return self.words <= other.words or other.words <= self.words


def _single(unit: str) -> tuple[str, Fraction] | None:
    if unit in UNITS:
        return UNITS[unit]
    for prefix, power in _SYMBOL_PREFIXES.items():
        if unit.startswith(prefix) and unit.removeprefix(prefix) in _SYMBOLS:
            return _scaled(unit.removeprefix(prefix), power)
    unit = _singular(unit)
    for prefix, power in _WORD_PREFIXES.items():
        if unit.startswith(prefix) and unit.removeprefix(prefix) in _WORDS:
            return _scaled(_singular(unit.removeprefix(prefix)), power)
    return UNITS[unit] if unit in UNITS and len(unit) > 1 else None


def _scaled(unit: str, power: int) -> tuple[str, Fraction]:
    dimension, factor = UNITS[unit]
    return dimension, factor * Fraction(10) ** power


def _singular(word: str) -> str:
    word = word.casefold()
    word = _IRREGULAR.get(word, word)
    known = (word, word.removesuffix("s"), word.removesuffix("es"))
    return next((_IRREGULAR.get(w, w) for w in known if w in UNITS), word.removesuffix("s"))


def read_unit(text: str) -> tuple[tuple[tuple[str, int], ...], Fraction] | None:
    """Returns ((dimension, power), …) and factor of a unit: `cm^2`, `square feet`, `km/h`."""
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


def quantity(answer: str, *, letters: bool = False) -> Quantity | None:
    """Reads the value and unit of an answer that ends on a unit or begins with a dollar sign.

    Args:
      answer: the answer.
      letters: whether a single letter is a unit, as the `g` of `5 g`; else it is a variable.
    """
    several = _several(answer)
    if several is not None:
        return several
    match = _IN_TEXT.fullmatch(answer)
    if match and not _NO_UNIT.search(match["unit"]):
        return _quantity(match["value"], match["unit"], match["power"] or "")
    match = _DEGREES.fullmatch(answer) or _COUNTED.fullmatch(answer)
    if match and not _NO_UNIT.search(match["unit"]):
        return _quantity(match["value"], match["unit"], "")
    match = _PLAIN.fullmatch(answer)
    if (
        match
        and match["space"]
        and (letters or len(match["unit"]) > 1)
        and read_unit(match["unit"])
    ):
        return dataclasses.replace(_quantity(match["value"], match["unit"], ""), certain=False)
    money = _MONEY_SIGN.match(answer)
    if money:
        return _quantity(money[1] + answer[money.end() :], "dollar", "")
    return None


def _several(answer: str) -> Quantity | None:
    """Reads 1 h 30 min as 5400 seconds."""
    if len(answer) > _LONGEST or not _SEVERAL.fullmatch(answer):
        return None
    pieces = [(Fraction(value), read_unit(unit)) for value, unit in _MEASURE.findall(answer)]
    units = {unit[0] for _, unit in pieces if unit}
    if len(units) != 1 or not all(unit for _, unit in pieces):
        return None
    total = sum(value * unit[1] for value, unit in pieces)
    return Quantity(rf"\frac{{{total.numerator}}}{{{total.denominator}}}", units.pop())


def _quantity(value: str, unit: str, power: str) -> Quantity:
    value = _MONEY_SIGN.sub(r"\1", value.strip().rstrip("\\").strip(), count=1)
    words = unit.casefold().split()
    if words and words[0] in _MULTIPLIERS:
        value = rf"{value} \times {_MULTIPLIERS[words[0]]}"
        unit = " ".join(unit.split()[1:])
    unit = _MERE_UNITS.sub("", unit)
    words = frozenset(map(_singular, re.findall(r"\\?[A-Za-z]+", unit)))
    dimensions, factor = (read_unit(unit + power) if unit else None) or (None, Fraction(1))
    return Quantity(value, dimensions, words, factor)


def times_of_day_agree(gold: str, prediction: str) -> bool | None:
    """Whether two times such as `3:30 PM` agree; one may leave out AM or PM."""
    times = [_minutes(answer) for answer in (gold, prediction)]
    if None in times or all(len(minutes) > 1 for minutes in times):
        return None  # without AM or PM it may be a ratio
    return bool(times[0] & times[1])


_TIME = re.compile(
    r"(?i)(\d{1,2})(?:\s*:\s*(\d{2}))?\s*(?:\\text\s*\{\s*)?(?:([ap])\.?\s*m\.?)?\s*\}?"
)


def _minutes(answer: str) -> set[int] | None:
    """Returns possible minutes since midnight: two for 7:00, one for 7:00 PM and 19:00."""
    match = _TIME.fullmatch(answer.strip())
    if match is None or not (match[2] or match[3]):
        return None
    hour, minute, half = int(match[1]), int(match[2] or 0), (match[3] or "").casefold()
    if not 1 <= hour <= 12:
        return {hour * 60 + minute}
    morning = hour % 12 * 60 + minute
    halves = {"a": {morning}, "p": {morning + _HALF_DAY}}
    return halves[half] if half else halves["a"] | halves["p"]


def ratio(answer: str) -> list[str] | None:
    """Returns the terms of `a : b : c` or `a to b`; None for anything else."""
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
    """Returns (value, base) of a number with its base, as 2516_{8}; None for anything else."""
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
    """Returns (value, modulus) of `7 \\pmod{10}`; None for anything else."""
    match = _MODULUS.fullmatch(answer.strip())
    if match is None:
        return None
    modulus = int(next(group for group in match.groups()[1:] if group))
    return (int(match[1]), modulus) if modulus else None


def proportional(gold: list[Fraction], prediction: list[Fraction]) -> bool:
    """Whether two ratios of numbers are equal."""
    if 0 in gold or 0 in prediction:
        return gold == prediction
    return len({a / b for a, b in zip(gold, prediction, strict=True)}) == 1


_PERCENT = re.compile(
    r"(?i)(.*\S)\s*(?:\\?%|(?:\\text\s*\{\s*)?(?:per\s?cent(?:age)?|pct|\\?%)\s*\}?)\s*", re.DOTALL
)


def percent(answer: str) -> str | None:
    """Returns the text before a percent sign or the word; None without one."""
    match = _PERCENT.fullmatch(answer)
    if match is None:
        return None
    return re.sub(r"\\text\s*\{\s*$|\\$", "", match[1]).strip().rstrip("$").strip()
