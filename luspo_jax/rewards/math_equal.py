"""Whether a predicted answer is mathematically equal to a reference answer.

Cheap decisions first, on strings and plain numbers; what they leave open goes to Math-Verify and
sympy, which can hang or fill memory on hostile input: call this where it can be killed. No signal
is used here.
"""

import functools
import itertools
import logging
from collections.abc import Sequence

from luspo_jax.rewards.latex import bracketed, is_prose, named_value, squeeze, tidy, top_level_items
from luspo_jax.rewards.plain_numbers import (
    decimal_commas_agree,
    decimal_places,
    exact_number,
    in_base,
    numbers_equal,
)

VERSION = "1"  # of every verifier that judges by `equal`
LONGEST = 2_000  # characters; nothing longer is parsed
_SLACK = 1 + 1e-9  # 0.003 and 0.002 differ by 0.001 and a rounding error
_MOST_NUMBERS = 6  # in a list compared with tolerances


def equal(gold: str, prediction: str, *, tolerances: Sequence[float] = ()) -> bool:
    """Whether the two answers mean the same.

    Args:
      gold: the reference; a name it assigns to, as in `x = 5`, may be missing in the prediction.
      prediction: the answer to be judged.
      tolerances: absolute errors that are allowed, one for all numbers of the gold answer or one
        for each in its order; none allows only the rounding of `plain_numbers`.
    """
    gold, prediction = tidy(gold), tidy(prediction)
    if not gold or not prediction or max(len(gold), len(prediction)) > LONGEST:
        return False
    (gold_name, gold_value), (name, value) = named_value(gold), named_value(prediction)
    if gold_name and name and squeeze(gold_name) != squeeze(name):
        return _same(gold, prediction)
    if _same(gold_value, value) or ((gold_name or name) and _same(gold, prediction)):
        return True
    return bool(tolerances) and _within(gold_value, value, tolerances)


def _same(gold: str, prediction: str) -> bool:
    if squeeze(gold) == squeeze(prediction):
        return True
    if exact_number(gold) is not None and exact_number(prediction) is not None:
        return numbers_equal(gold, prediction)
    if decimal_commas_agree(gold, prediction):
        return True
    bases = in_base(gold), in_base(prediction)
    if None not in bases:
        return bases[0] == bases[1]
    return (
        _elements_agree(gold, prediction)
        or _math_verify(gold, prediction)
        or _rounds(gold, prediction)
        or _rounds(prediction, gold)
    )


def _elements_agree(gold: str, prediction: str) -> bool:
    """Whether both are tuples or intervals with the same brackets and equal elements."""
    a, b = bracketed(gold), bracketed(prediction)
    if a is None or b is None or a[0] != b[0] or len(a[1]) != len(b[1]):
        return False
    return all(_same(x, y) for x, y in zip(a[1], b[1], strict=True))


def _within(gold: str, prediction: str, tolerances: Sequence[float]) -> bool:
    """Whether the numbers of both answers can be paired off within the tolerances."""
    wanted, found = _numbers(gold), _numbers(prediction)
    if not wanted or not found or len(wanted) != len(found) or len(wanted) > _MOST_NUMBERS:
        return False
    if len(tolerances) == 1:
        tolerances = list(tolerances) * len(wanted)
    return len(tolerances) == len(wanted) and any(
        all(abs(a - b) <= t * _SLACK for a, b, t in zip(wanted, order, tolerances, strict=True))
        for order in itertools.permutations(found)
    )


def _numbers(answer: str) -> list[float]:
    """The values of a list of numeric expressions; empty where one has no real value."""
    values = []
    for item in top_level_items(answer):
        parsed = _parse(item.strip())
        try:
            values.append(float(parsed[0].evalf()))
        except (AttributeError, IndexError, TypeError, ValueError, OverflowError):
            return []
    return values


@functools.cache
def _library():
    import math_verify

    for part in ("math_verify.parser", "math_verify.grader", "math_verify.utils"):
        logging.getLogger(part).setLevel(logging.ERROR)
    return math_verify


@functools.lru_cache(maxsize=4096)
def _parse(answer: str) -> list:
    """Math-Verify's reading: of the formulas in a text, or of the answer as one formula."""
    is_text = "$" in answer.replace(r"\$", "") or r"\(" in answer or r"\[" in answer
    is_text = is_text or is_prose(answer)
    parsed = _library().parse(answer if is_text else f"${answer}$", parsing_timeout=None)
    return [_plain_symbols(item) for item in parsed]


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


def _math_verify(gold: str, prediction: str) -> bool:
    return _library().verify(
        _parse(gold), _parse(prediction), timeout_seconds=None, allow_set_relation_comp=True
    )


def _rounds(decimal: str, other: str) -> bool:
    """Whether a plain decimal is the rounded value of a constant expression, as in 1.5708 for π/2.

    Four places or more are asked for, as for fractions.
    """
    places = decimal_places(decimal)
    values = _numbers(other) if places >= 4 else []
    return len(values) == 1 and abs(values[0] - float(decimal)) <= 0.5 * 10.0**-places * _SLACK
