"""Formulas as sympy expressions, compared at sample points and, where that decides nothing, by
Math-Verify. Both can hang or fill memory on hostile input: call this where it can be killed.
"""

import dataclasses
import functools
import logging
import random
import re

from luspo_jax.rewards.latex import is_prose, is_running_text

_DIGITS = 50  # of an evaluation
_EXACT = 10.0**-40  # relative difference of equal values without decimals
_ROUNDED = 10.0**-12  # and with decimals, which carry 15 digits
_LARGEST = 10.0**38  # beyond, whole numbers may differ by less than what is compared
_POINTS = 10
_FEWEST_POINTS = 2
# What may stand around a formula without being part of it.
_TRIMMINGS = re.compile(
    r"^\s*(?:=|\\approx|\\sim)|\\(?:text|mbox|[hv]space\*?)\s*\{[^{}]*\}\s*$|\s+[a-z]{3,}\s*$|\\+\s*$"
)


@functools.cache
def _library():
    import math_verify

    for part in ("math_verify.parser", "math_verify.grader", "math_verify.utils"):
        logging.getLogger(part).setLevel(logging.ERROR)
    return math_verify


@functools.cache
def _formula_reader(units: bool):
    """(normalise, read): as Math-Verify reads a formula, but R and r stay two variables."""
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy, normalize_latex

    library = _library()
    from math_verify.parser import LatexExtractionConfig, get_last_eq, should_treat_as_complex

    # Without a sentence around it, 6m is six times a variable: `quantities` knows what a unit is.
    rules = dataclasses.replace(LatexExtractionConfig().normalization_config, units=units)
    conversion = ConversionConfig(lowercase_symbols=False)

    def read(latex: str):
        return latex2sympy(
            latex,
            is_real=not should_treat_as_complex(latex),
            convert_degrees=False,
            normalization_config=None,
            conversion_config=conversion,
        )

    return functools.partial(normalize_latex, config=rules), read, get_last_eq, library


def _formula(answer: str, *, units: bool = False) -> list:
    normalise, read, last_equation, _ = _formula_reader(units)
    latex = normalise(answer)
    for candidate in dict.fromkeys((latex, last_equation(latex))):
        try:
            return [read(candidate), latex]
        except Exception:  # the parser raises whatever its grammar meets
            continue
    return []


@functools.lru_cache(maxsize=4096)
def parse(answer: str) -> list:
    """Math-Verify's reading: of the formulas in a text, or of the answer as one formula."""
    is_text = "$" in answer.replace(r"\$", "") or r"\(" in answer or r"\[" in answer
    if is_text or is_prose(answer) or is_running_text(answer):
        parsed = (
            [] if is_text or is_prose(answer) else _formula(answer, units=True)
        ) or _library().parse(
            answer if is_text or is_prose(answer) else f"${answer}$", parsing_timeout=None
        )
    else:
        # Formulas only: a plain number picked out of one that cannot be read is not its value.
        formula = _TRIMMINGS.sub("", answer).strip() or answer
        parsed = _formula(formula) or _library().parse(
            f"${formula}$", [_library().LatexExtractionConfig()], parsing_timeout=None
        )
    return [_plain_symbols(item) for item in parsed]


def expression(answer: str):
    """The answer as one sympy expression, or None."""
    import sympy

    parsed = parse(answer)
    return parsed[0] if parsed and isinstance(parsed[0], sympy.Expr) else None


def _plain_symbols(item):
    """The expression with symbols told apart by name only, and i as the imaginary unit.

    The parser assumes `i` real in one place of a formula and not real in another.
    """
    import sympy

    if not isinstance(item, sympy.Expr):
        return item
    names = {
        symbol: symbol.name for symbol in item.free_symbols if isinstance(symbol, sympy.Symbol)
    }
    return item.xreplace(
        {symbol: sympy.I if name == "i" else sympy.Symbol(name) for symbol, name in names.items()}
    )


def formulas_equal(gold: str, prediction: str) -> bool:
    """Whether two answers are equal as formulas."""
    text = is_running_text(gold) or is_running_text(prediction)
    if not text and _primes(gold) != _primes(prediction):
        return False  # the parser drops them
    a, b = parse(gold), parse(prediction)
    if not a or not b:
        return False
    verdict = _equations_equal(a[0], b[0])
    if verdict is None:
        verdict = equal_values(a[0], b[0])
    if verdict is not None:
        return verdict
    return _library().verify(a, b, timeout_seconds=None, allow_set_relation_comp=True)


def _primes(answer: str) -> int:
    """Primed names in an answer; the apostrophe of a word is none."""
    return len(re.findall(r"(?<![A-Za-z])[A-Za-z](?:'(?![A-Za-z])|\s*\^\s*\{?\s*\\prime)", answer))


def _equations_equal(a, b) -> bool | None:
    """Whether two differential equations agree, up to sides and sign; a value given as n·x = v is
    none. None for anything else."""
    import sympy

    for value, equation in ((a, b), (b, a)):
        if isinstance(value, sympy.Expr) and isinstance(equation, sympy.Eq):
            left = equation.lhs
            if left.is_Mul and left.args[0].is_number and left.free_symbols:
                return False
    if not all(isinstance(e, sympy.Eq) and e.has(sympy.Derivative) for e in (a, b)):
        return None
    rates = sorted(a.atoms(sympy.Derivative) | b.atoms(sympy.Derivative), key=str)
    names = {rate: sympy.Symbol(f"rate{k}") for k, rate in enumerate(rates)}
    one, other = ((e.lhs - e.rhs).xreplace(names) for e in (a, b))
    verdicts = [equal_values(one, other), equal_values(one, -other)]
    return True if True in verdicts else None if None in verdicts else False


def equal_values(a, b) -> bool | None:
    """Whether two expressions have the same values; None where their values do not tell.

    Sympy's simplification takes long, and Math-Verify's rounding to six places takes small numbers
    for equal. Expressions of real variables are compared at random points at which every root and
    logarithm in them is real.
    """
    import sympy
    from sympy.core.function import AppliedUndef

    # Sums and the like to a symbolic limit have no value at a point that is no whole number.
    limits = (sympy.Sum, sympy.Product, sympy.Integral, sympy.Limit, sympy.Derivative)
    # At small points all floors are alike.
    limits += (sympy.floor, sympy.ceiling)
    unknown = (AppliedUndef, sympy.zoo, sympy.nan, sympy.oo, *limits)
    if not all(isinstance(e, sympy.Expr) and e.is_commutative for e in (a, b)):
        return None
    if a.has(*unknown) or b.has(*unknown):
        return None
    symbols = sorted((a.free_symbols | b.free_symbols), key=lambda s: s.name)
    tolerance = _ROUNDED if a.has(sympy.Float) or b.has(sympy.Float) else _EXACT
    if not symbols:
        return _close(_value(a, {}), _value(b, {}), tolerance)
    return _equal_at_points(a, b, symbols, tolerance)


def _equal_at_points(a, b, symbols, tolerance: float) -> bool | None:
    import sympy

    domain = _domain(a) + _domain(b)
    generator = random.Random(len(symbols))
    decided = 0
    for point in range(_POINTS):
        # Near 1, where powers stay small: positive, negative, positive, of either sign.
        signs = ((1,), (-1,), (1,), (1, -1))[point % 4]
        values = {
            s: generator.choice(signs) * sympy.Rational(generator.randint(1, 2_000_000), 999_983)
            for s in symbols
        }
        if not all(_is_positive(_value(base, values)) for base in domain):
            continue
        verdict = _close(_value(a, values), _value(b, values), tolerance)
        if verdict is False:
            return False
        decided += verdict is True
        if decided > _FEWEST_POINTS and point >= 3:
            return True
    return True if decided >= _FEWEST_POINTS else None


def _domain(e) -> list:
    """What must not be negative: bases of broken or symbolic powers, arguments of logarithms."""
    import sympy

    powers = [p.base for p in e.atoms(sympy.Pow) if not p.exp.is_integer and not p.base.is_number]
    signs = [p.base for p in e.atoms(sympy.Pow) if p.base.is_negative and not p.exp.is_integer]
    return powers + signs + [log.args[0] for log in e.atoms(sympy.log)]


def _is_positive(value) -> bool:
    return value is not None and value.is_real is not False and bool(value.as_real_imag()[0] > 0)


def _value(e, values):
    """The number that an expression is at a point; None where it is none."""
    import sympy

    try:
        value = e.evalf(_DIGITS, subs=values) if values else e.evalf(_DIGITS)
    except (TypeError, ValueError, ZeroDivisionError, OverflowError, AttributeError, KeyError):
        return None
    known = value.is_number and not value.has(sympy.nan, sympy.zoo, sympy.oo)
    parts = value.as_real_imag() if known else ()
    return (
        value
        if parts and all(part.is_Float or part.is_Integer or part.is_Rational for part in parts)
        else None
    )


def _close(a, b, tolerance: float) -> bool | None:
    """Whether two values agree; None where either is missing, both vanish, or they are huge."""
    if a is None or b is None:
        return None
    size = max(abs(a), abs(b))
    if size > _LARGEST or size < 1e-40:
        return None
    return bool(abs(a - b) <= tolerance * size)
