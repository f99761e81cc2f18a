"""Compares formulas as sympy expressions at sample points and, if undecided, by Math-Verify.

Both can hang or fill memory on hostile input: call this where it can be killed.
"""

import dataclasses
import functools
import logging
import random
import re

from luspo_jax.rewards.answers.latex import is_prose, is_running_text, tidy

_DIGITS = 50  # of the first evaluation
_MORE_DIGITS = 400  # of the second, for numbers that agree in the first
_NOISE = 8  # bits; an evaluation that keeps no more has found zero
_SPARE = 10  # last digits of an evaluation, not compared
_DECIMALS = 12  # digits compared if decimals, which carry 15, occur
_POINTS = 10
_FEWEST_POINTS = 2
_WHOLE_POINTS = 40  # to compare roundings to whole numbers
# Text that may surround a formula without being part of it.
_TRIMMINGS = re.compile(
    r"^\s*(?:=|\\approx|\\sim)|\\(?:text|mbox|[hv]space\*?)\s*\{[^{}]*\}\s*$|\s+[a-z]{3,}\s*$|\\+\s*$"
)

# Names that the parser would read as constants, in formulas that use them otherwise.
_TOKEN = re.compile(r"\\(?:text|mathrm|operatorname|mbox)\s*\{[^{}]*\}|\\[A-Za-z]+|[eEiI]")
_INDEX = re.compile(r"\s*_\s*\{?\s*([A-Za-z0-9]+)\s*\}?")
_NAMES = {"I", r"\gamma", r"\Gamma"}
_INDEXED = _NAMES | {"e", "E", "i"}
# 2(13) is a product, though 2\frac{1}{2} is a mixed number.
_FACTOR = re.compile(r"((?<![\w.^])(?:\d+\.?\d*|\.\d+)|\))\s*(?=\()")

# 1/2x is half of x, as on calculators.
_COEFFICIENT = re.compile(r"(?<![\w.}/^])(\d+\s*/\s*\d+)\s*(?=[A-Za-z]|\\(?:sqrt|pi)(?![A-Za-z]))")


@functools.cache
def _library():
    import math_verify

    for part in ("math_verify.parser", "math_verify.grader", "math_verify.utils"):
        logging.getLogger(part).setLevel(logging.ERROR)
    return math_verify


@functools.cache
def _formula_reader():
    """Returns (normalise, read): Math-Verify's reading of formulas, with R and r kept distinct."""
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy, normalize_latex

    library = _library()
    from math_verify.parser import LatexExtractionConfig, get_last_eq, should_treat_as_complex

    # Without a sentence around it, 6m is six times a variable: `quantities` handles units.
    rules = dataclasses.replace(LatexExtractionConfig().normalization_config, units=False)
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


def _unambiguous(latex: str) -> str:
    """Writes products out and renames variables that the parser would read as constants."""
    latex = _COEFFICIENT.sub(r"(\1)\\cdot ", _FACTOR.sub(r"\1\\cdot ", latex))
    pieces, end = [], 0
    for token in _TOKEN.finditer(latex):
        if token.start() < end:
            continue
        index = _INDEX.match(latex, token.end())
        call = token[0] == r"\Gamma" and latex[token.end() :].lstrip().startswith("(")
        if token[0] in (_INDEXED if index else _NAMES) and not call:
            name = token[0].lstrip("\\") + (index[1] if index else "")
            pieces += [latex[end : token.start()], rf"\lambda_{{name{name}}}"]
            end = index.end() if index else token.end()
    return "".join(pieces) + latex[end:]


def _formula(answer: str) -> list:
    normalise, read, last_equation, _ = _formula_reader()
    latex = _unambiguous(normalise(answer))
    for candidate in dict.fromkeys((latex, last_equation(latex))):
        try:
            return [read(candidate), latex]
        except Exception:  # the parser raises any kind of error
            continue
    return []


@functools.lru_cache(maxsize=4096)
def parse(answer: str) -> list:
    """Returns Math-Verify's reading of the answer as one formula; empty for text."""
    if is_running_text(answer) or is_prose(answer):
        return []  # a formula picked out of a text is not the text's answer
    formula = _TRIMMINGS.sub("", answer).strip() or answer
    parsed = _formula(formula) or _library().parse(
        f"${formula}$", [_library().LatexExtractionConfig()], parsing_timeout=None
    )
    return [_plain_symbols(item) for item in parsed]


def expression(answer: str):
    """Returns the answer as one sympy expression, or None."""
    import sympy

    parsed = parse(answer)
    return parsed[0] if parsed and isinstance(parsed[0], sympy.Expr) else None


def _plain_symbols(item):
    """Returns the expression with symbols identified by name only, and i as the imaginary unit.

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
    if _dropped(gold) != _dropped(prediction):
        return False  # the parser drops them
    return _parsed_equal(parse(gold), parse(prediction))


def text_ends_on(text: str, gold: str) -> bool:
    """Whether the last formula of a text, or its last number, is the gold answer."""
    found = _library().parse(tidy(text), parsing_timeout=None)
    return _parsed_equal(parse(tidy(gold)), [_plain_symbols(item) for item in found])


def _parsed_equal(a: list, b: list) -> bool:
    if not a or not b:
        return False
    verdict = _relations_agree(a[0], b[0])
    if verdict is None:
        verdict = equal_values(a[0], b[0])
    if verdict is not None:
        return verdict
    return _library().verify(a, b, timeout_seconds=None, allow_set_relation_comp=True)


def _dropped(answer: str) -> tuple[int, int]:
    """Counts the degree signs and primed names of an answer; a word's apostrophe is not a prime."""
    degrees = len(re.findall(r"\^\s*\{?\s*\\circ", answer))
    return degrees, len(
        re.findall(r"(?<![A-Za-z])[A-Za-z](?:'(?![A-Za-z])|\s*\^\s*\{?\s*\\prime)", answer)
    )


def _relations_agree(gold, prediction) -> bool | None:
    """Whether two equations or inequalities are the same, or an equation states a value.

    Solutions are not compared: all equations without solutions or unknowns would be equal. Returns
    None if neither is a relation, or one is compared with a set.
    """
    import sympy

    if any(isinstance(e, sympy.logic.boolalg.BooleanAtom) for e in (gold, prediction)):
        return False  # sympy reduced it to true or false; the relation itself is lost
    a, b = _ends_of_chain(gold), _ends_of_chain(prediction)
    relations = [isinstance(e, sympy.core.relational.Relational) for e in (a, b)]
    if all(relations):
        return _same_relation(a, b)
    chains = [isinstance(e, sympy.And) for e in (a, b)]
    if all(chains):
        sides = [e._unsorted_args for e in (a, b)]
        return any(
            len(sides[0]) == len(order) and all(map(_same_relation, sides[0], order))
            for order in (sides[1], sides[1][::-1])
        )
    value, equation = (a, b) if relations[1] else (b, a)
    if not any(relations) or not isinstance(value, sympy.Expr):
        return None
    return _states(equation, value, by_gold=relations[0])


def _ends_of_chain(e):
    """Reduces x = y = 5 to x = 5; returns anything else unchanged."""
    import sympy

    if isinstance(e, sympy.And):
        links = e._unsorted_args
        if all(isinstance(link, sympy.Eq) for link in links):
            return sympy.Eq(links[0].lhs, links[-1].rhs, evaluate=False)
    return e


def _states(equation, value, *, by_gold: bool) -> bool:
    """Whether an equation gives the value: (x+y)^2 = 81 gives 81 but 3x = 81 does not."""
    import sympy

    if not isinstance(equation, sympy.Eq):
        return False
    left = _opaque(equation.lhs, {})
    # A ratio of names counts as a name.
    ratio = left.as_numer_denom()[1].free_symbols and equation.rhs.is_number
    known = left.is_Symbol or not left.free_symbols or bool(ratio)
    if not known and (by_gold or (len(left.free_symbols) == 1 and _is_linear(left))):
        return False
    return equal_values(equation.rhs, value) is True


def _is_linear(e) -> bool:
    (symbol,) = e.free_symbols
    return e.diff(symbol).is_constant(symbol) is True


def _same_relation(a, b) -> bool:
    """Whether the sides of two relations agree, or their differences up to a constant factor."""
    import sympy

    a, b = (e.reversed if isinstance(e, (sympy.Gt, sympy.Ge)) else e for e in (a, b))
    if type(a) is not type(b):
        return False
    names: dict = {}
    (left, right), (other_left, other_right) = ([_opaque(s, names) for s in e.args] for e in (a, b))
    if _sides_agree(a.lhs, b.lhs) and _sides_agree(a.rhs, b.rhs):
        return True
    turns = isinstance(a, (sympy.Eq, sympy.Ne))  # a = b is b = a
    one, other = left - right, other_left - other_right
    if not one.free_symbols or not other.free_symbols:
        return turns and _sides_agree(a.lhs, b.rhs) and _sides_agree(a.rhs, b.lhs)
    ratio = _constant_ratio(one, other)
    if ratio is None and turns:
        ratio = _constant_ratio(*(sympy.fraction(sympy.together(e))[0] for e in (one, other)))
    return ratio is not None and bool(turns or ratio > 0)


def _sides_agree(a, b) -> bool:
    """Whether two sides have the same values, or are the same formula if values do not decide."""
    verdict = equal_values(a, b)
    return _library().verify([a], [b], timeout_seconds=None) if verdict is None else verdict


def _constant_ratio(a, b):
    """Returns b/a if it is one number at all points tried; else None."""
    ratios = []
    for values in _points(a, b):
        one, other = _value(a, values), _value(b, values)
        if one and other:
            ratios.append(other / one)
        elif bool(one) != bool(other) and None not in (one, other):
            return None
    agree = len(ratios) > _FEWEST_POINTS and all(
        _close(ratios[0], ratio, _tolerance(a, b)) for ratio in ratios[1:]
    )
    return ratios[0] if agree and ratios[0].is_real else None


def _opaque(e, names: dict):
    """Replaces every function, limit and the like without a value by a symbol.

    `names` holds the symbols given so far; equal expressions get the same symbol.
    """
    import sympy
    from sympy.core.function import AppliedUndef

    kinds = (AppliedUndef, sympy.Sum, sympy.Product, sympy.Integral, sympy.Limit, sympy.Derivative)
    if not isinstance(e, sympy.Expr) or not e.has(*kinds):
        return e
    if isinstance(e, kinds):
        return names.setdefault(e, sympy.Symbol(f"opaque{len(names)}"))
    return e.func(*(_opaque(part, names) for part in e.args))


def equal_values(a, b) -> bool | None:
    """Whether two expressions have the same values; None if their values do not decide.

    Sympy's simplification is slow, and Math-Verify's rounding to six places treats small numbers as
    equal. Expressions of real variables are compared at random points at which every root and
    logarithm in them is real.
    """
    import sympy

    if not all(isinstance(e, sympy.Expr) and e.is_commutative for e in (a, b)):
        return None
    if a.has(sympy.zoo, sympy.nan, sympy.oo) or b.has(sympy.zoo, sympy.nan, sympy.oo):
        return None
    names: dict = {}
    one, other = _opaque(a, names), _opaque(b, names)
    verdict = _numbers_agree(one, other) if _are_numbers(one, other) else _at_points(one, other)
    verdict = verdict and _roundings_agree(one, other)
    return verdict if verdict or not any(map(_has_value, names)) else None


def _has_value(e) -> bool:
    """Whether an opaque part may have a value of its own, like a sum; f(x) and dx/dt have none."""
    import sympy
    from sympy.core.function import AppliedUndef

    if isinstance(e, sympy.Derivative):
        return any(e.expr.has(variable) for variable in e.variables)
    return not isinstance(e, AppliedUndef)


def _are_numbers(a, b) -> bool:
    return not a.free_symbols and not b.free_symbols


def _numbers_agree(a, b) -> bool | None:
    """Whether two numbers are equal: rationals exactly, others to hundreds of digits."""
    import sympy

    tolerance = _tolerance(a, b)
    verdict = _close(_value(a, {}), _value(b, {}), tolerance)
    if not verdict or a.has(sympy.Float) or b.has(sympy.Float):
        return verdict
    difference = (a - b).doit()
    if difference.is_Rational:
        return bool(difference == 0)
    values = [_value(e, {}, _MORE_DIGITS) for e in (a, b)]
    return _close(*values, sympy.Float(10) ** (_SPARE - _MORE_DIGITS))


def _tolerance(a, b):
    """Returns the relative difference up to which two values are equal."""
    import sympy

    decimals = a.has(sympy.Float) or b.has(sympy.Float)
    return sympy.Float(10) ** (-_DECIMALS if decimals else _SPARE - _DIGITS)


def _at_points(a, b) -> bool | None:
    decided, tolerance = 0, _tolerance(a, b)
    for point, values in enumerate(_points(a, b)):
        verdict = _close(_value(a, values), _value(b, values), tolerance)
        if verdict is False:
            return False
        decided += verdict is True
        if decided > _FEWEST_POINTS and point >= 3:
            return True
    return True if decided >= _FEWEST_POINTS else None


def _points(a, b):
    """Returns values of the symbols at which every root and logarithm of both is real."""
    import sympy

    symbols = sorted(a.free_symbols | b.free_symbols, key=lambda s: s.name)
    domain = _domain(a) + _domain(b)
    generator = random.Random(len(symbols))
    for point in range(_POINTS):
        # Near 1, so that powers stay small: positive, negative, positive, of either sign.
        signs = ((1,), (-1,), (1,), (1, -1))[point % 4]
        values = {
            s: generator.choice(signs) * sympy.Rational(generator.randint(1, 2_000_000), 999_983)
            for s in symbols
        }
        if all(_is_positive(_value(base, values)) for base in domain):
            yield values


def _roundings_agree(a, b) -> bool | None:
    """Whether two expressions with floors agree at whole numbers; near 1 all floors look alike."""
    import sympy

    kinds = (sympy.floor, sympy.ceiling, sympy.Mod)
    symbols = sorted(a.free_symbols | b.free_symbols, key=lambda s: s.name)
    if not symbols or not (a.has(*kinds) or b.has(*kinds)):
        return True
    generator = random.Random(len(symbols))
    for point in range(1, _WHOLE_POINTS):
        values = {
            s: point if len(symbols) == 1 else generator.randint(1, _WHOLE_POINTS) for s in symbols
        }
        if _close(_value(a, values), _value(b, values), _tolerance(a, b)) is False:
            return False
    return True


def _domain(e) -> list:
    """Returns what must not be negative: bases of fractional or symbolic powers, log arguments."""
    import sympy

    powers = [p.base for p in e.atoms(sympy.Pow) if not p.exp.is_integer and not p.base.is_number]
    signs = [p.base for p in e.atoms(sympy.Pow) if p.base.is_negative and not p.exp.is_integer]
    return powers + signs + [log.args[0] for log in e.atoms(sympy.log)]


def _is_positive(value) -> bool:
    return value is not None and value.is_real is not False and bool(value.as_real_imag()[0] > 0)


def _value(e, values, digits: int = _DIGITS):
    """Returns the value of an expression at a point; None if it is not a number."""
    import sympy

    try:
        value = e.evalf(digits, subs=values) if values else e.evalf(digits)
    except (TypeError, ValueError, ZeroDivisionError, OverflowError, AttributeError, KeyError):
        return None
    known = value.is_number and not value.has(sympy.nan, sympy.zoo, sympy.oo)
    parts = value.as_real_imag() if known else ()
    if not parts or not all(part.is_Float or part.is_Rational for part in parts):
        return None
    real, imaginary = (0 if p.is_Float and p._prec <= _NOISE else p for p in parts)
    return real + sympy.I * imaginary


def _close(a, b, tolerance) -> bool | None:
    """Whether two values agree; None if either is missing."""
    if a is None or b is None:
        return None
    return bool(abs(a - b) <= tolerance * max(abs(a), abs(b)))
