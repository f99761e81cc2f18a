"""Decides whether a predicted answer is mathematically equal to a reference answer.

Cheap decisions come first, on strings, words, numbers and the parts of lists. The rest goes to
sympy and Math-Verify, which can hang or fill memory on hostile input: call this where it can be
killed. It uses no signals.
"""

import itertools
import re
from collections.abc import Sequence

from luspo_jax.rewards.answers import quantities, words
from luspo_jax.rewards.answers.answer_lists import parts_agree, read_parts
from luspo_jax.rewards.answers.latex import (
    bracketed,
    is_running_text,
    named_value,
    same_name,
    squeeze,
    tidy,
    top_level_items,
)
from luspo_jax.rewards.answers.plain_numbers import (
    cut_off_agrees,
    decimal_commas_agree,
    decimal_places,
    exact_number,
    numbers_equal,
)
from luspo_jax.rewards.answers.real_sets import says_it_is_a_set, sets_agree
from luspo_jax.rewards.answers.symbolic import expression, formulas_equal

VERSION = "3"  # for every verifier that uses `equal`
LONGEST = 2_000  # characters; nothing longer is parsed
_SLACK = 1 + 1e-9  # 0.003 and 0.002 differ by 0.001 and a rounding error
_MOST_NUMBERS = 6  # most numbers in a list compared with tolerances
_DEEPEST = 6  # lists in lists


def equal(gold: str, prediction: str, *, tolerances: Sequence[float] = ()) -> bool:
    """Whether two answers are mathematically equal.

    Args:
      gold: the reference; a name it assigns to, as in `x = 5`, may be missing in the prediction.
      prediction: the answer to judge.
      tolerances: allowed absolute errors, one for all numbers of the gold answer or one for each in
        its order; if empty, only the rounding of `plain_numbers` is allowed.
    """
    gold, prediction = tidy(gold), tidy(prediction)
    if not gold or not prediction or max(len(gold), len(prediction)) > LONGEST:
        return False
    if _answers_agree(gold, prediction):
        return True
    return bool(tolerances) and _within(
        named_value(gold)[1], named_value(prediction)[1], tolerances
    )


def _answers_agree(gold: str, prediction: str, depth: int = 0) -> bool:
    """Whether two answers agree, with or without the names they are assigned to."""
    (gold_name, gold_value), (name, value) = named_value(gold), named_value(prediction)
    if gold_name and name and same_name(gold_name, name):
        # N = n reversed is n = N.
        turned = gold_name != name and _same(gold, prediction, depth)
        return turned or _same(gold_value, value, depth)
    if gold_name and name:
        return _same(gold, prediction, depth)
    if _same(gold_value, value, depth):
        return True
    return bool(gold_name or name) and _same(gold, prediction, depth)


def _same(gold: str, prediction: str, depth: int) -> bool:
    """Returns the verdict of the first rule that gives one; formulas come last."""
    if squeeze(gold) == squeeze(prediction):
        return True
    verdict = _first_verdict(WORD_RULES, gold, prediction)
    if verdict is None and not (is_running_text(gold) or is_running_text(prediction)):
        verdict = _first_verdict(RULES, gold, prediction)
        if verdict is None:
            verdict = _parts(gold, prediction, depth)
    if verdict is not None:
        return verdict
    return (
        formulas_equal(gold, prediction) or _rounds(gold, prediction) or _rounds(prediction, gold)
    )


def _first_verdict(rules, gold: str, prediction: str) -> bool | None:
    verdicts = (rule(gold, prediction) for rule in rules)
    return next((verdict for verdict in verdicts if verdict is not None), None)


def _numbers_rule(gold: str, prediction: str) -> bool | None:
    if exact_number(gold) is not None and exact_number(prediction) is not None:
        return numbers_equal(gold, prediction)
    return (decimal_commas_agree(gold, prediction) or cut_off_agrees(gold, prediction)) or None


def _percent_rule(gold: str, prediction: str) -> bool | None:
    """Accepts 50% for 50 if percent was asked for, and for 0.5."""
    values = [quantities.percent(answer) for answer in (gold, prediction)]
    if values == [None, None]:
        return None
    if None not in values:
        return _same(*values, depth=0)
    share, other = (values[0], prediction) if values[1] is None else (values[1], gold)
    measured = quantities.quantity(other)
    if measured and measured.words:
        return False
    return _same(share, other, 0) or _same(rf"\frac{{{share}}}{{100}}", other, 0)


def _base_rule(gold: str, prediction: str) -> bool | None:
    numbers = [quantities.in_base(answer) for answer in (gold, prediction)]
    if None not in numbers:
        return numbers[0][0] == numbers[1][0]
    if numbers == [None, None]:
        return None
    # If one base is missing, the digits must be the same; an unreadable base never agrees.
    if all("_" in answer for answer in (gold, prediction)):
        return False
    digits = [
        re.sub(r"[_b\\({].*|[()\s]", "", answer.lstrip("( ")) for answer in (gold, prediction)
    ]
    return digits[0].casefold() == digits[1].casefold()


def _residue_rule(gold: str, prediction: str) -> bool | None:
    residues = [quantities.residue(answer) for answer in (gold, prediction)]
    if residues == [None, None]:
        return None
    if None not in residues:
        (a, modulus), (b, other) = residues
        return modulus == other and (a - b) % modulus == 0
    value, _ = residues[0] or residues[1]
    return exact_number(prediction if residues[0] else gold) == value


def _ratio_rule(gold: str, prediction: str) -> bool | None:
    ratios = [quantities.ratio(answer) for answer in (gold, prediction)]
    if None in ratios:
        terms, other = (ratios[0], prediction) if ratios[0] else (ratios[1], gold)
        if terms is None or len(terms) != 2:
            return None
        if quantities.clock(gold) or quantities.clock(prediction):
            return False
        return _same(rf"\frac{{{terms[0]}}}{{{terms[1]}}}", other, 0)
    if len(ratios[0]) != len(ratios[1]):
        return False
    if any(quantities.clock(answer) for answer in (gold, prediction)):
        return squeeze(gold) == squeeze(prediction)
    numbers = [[exact_number(term) for term in terms] for terms in ratios]
    if None not in numbers[0] + numbers[1]:
        return quantities.proportional(*numbers)
    first = [terms[0] for terms in ratios]
    return all(
        _same(rf"\frac{{{a}}}{{{first[0]}}}", rf"\frac{{{b}}}{{{first[1]}}}", 0)
        for a, b in zip(ratios[0][1:], ratios[1][1:], strict=True)
    )


def _unit_rule(gold: str, prediction: str) -> bool | None:
    """Compares values with units: one answer may lack its unit, but units must not differ."""
    wanted, found = quantities.quantity(gold), quantities.quantity(prediction)
    if wanted is None and found is None:
        return None
    wanted = wanted or quantities.quantity(gold, letters=found.unit is not None)
    found = found or quantities.quantity(prediction, letters=wanted.unit is not None)
    values = [q.value if q else answer for q, answer in ((wanted, gold), (found, prediction))]
    if wanted and found:
        if not wanted.measures_as(found):
            return False
        if None not in (wanted.unit, found.unit) and wanted.factor != found.factor:
            relative = found.factor / wanted.factor
            values[1] = (
                rf"({values[1]})\cdot\frac{{{relative.numerator}}}{{{relative.denominator}}}"
            )
    agree = _same(*(value.strip() for value in values), depth=0)
    one = wanted or found
    return None if not agree and None in (wanted, found) and not one.certain else agree


def _sets_rule(gold: str, prediction: str) -> bool | None:
    verdict = sets_agree(gold, prediction, expression)
    if verdict is None:
        for one, other in ((gold, prediction), (prediction, gold)):
            parts = read_parts(other)
            values = parts.items if parts and parts.kind == "list" else ()
            if says_it_is_a_set(one) and values and None not in map(exact_number, values):
                return False  # 2, 5 are two numbers, 2 < x < 5 is an interval
    return verdict


# Each returns a verdict, or None if the answers are not of its kind.
WORD_RULES = (
    quantities.times_of_day_agree,
    words.choices_agree,
    words.number_words_agree,
    words.phrases_agree,
)
RULES = (
    _numbers_rule,
    _percent_rule,
    _base_rule,
    _residue_rule,
    _unit_rule,
    _ratio_rule,
    _sets_rule,
)


def _parts(gold: str, prediction: str, depth: int) -> bool | None:
    wanted, found = read_parts(gold), read_parts(prediction)
    if (wanted is None and found is None) or depth > _DEEPEST:
        return None
    if wanted is None or found is None:
        return _part_of_one(gold, prediction, wanted, found, depth)

    if _is_singleton(wanted) != _is_singleton(found):
        inner = [
            parts.items[0] if _is_singleton(parts) else answer
            for parts, answer in ((wanted, gold), (found, prediction))
        ]
        return _answers_agree(*inner, depth + 1)

    def same(a: str, b: str) -> bool:
        return _answers_agree(a, b, depth + 1)

    return parts_agree(wanted, found, same)


def _is_singleton(parts) -> bool:
    return parts.kind == "set" and len(parts.items) == 1


def _part_of_one(gold: str, prediction: str, wanted, found, depth: int) -> bool | None:
    """Compares parts with a value: {5} is 5, other sets and lists never; a matrix may be a sum."""
    parts, other = (wanted, prediction) if wanted else (found, gold)
    if parts.kind in ("matrix", "vector") or "matrix" in other:
        return None
    if len(parts.items) == 1 and parts.kind == "set":
        if words.phrases_agree(parts.items[0], r"\emptyset"):
            return False
        return _answers_agree(parts.items[0], other, depth + 1)
    return False if exact_number(other) is not None or bracketed(other) else None


def _within(gold: str, prediction: str, tolerances: Sequence[float]) -> bool:
    """Whether the numbers of both answers can be paired within the tolerances."""
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
    """Returns the values of a list of numeric expressions; empty if one has no real value."""
    values = []
    for item in top_level_items(answer):
        try:
            values.append(float(expression(item.strip()).evalf()))
        except (AttributeError, TypeError, ValueError, OverflowError):
            return []
    return values


def _rounds(decimal: str, other: str) -> bool:
    """Whether a plain decimal is the rounded value of a constant expression: 1.5708 for π/2.

    At least four places are required, as for fractions.
    """
    places = decimal_places(decimal)
    values = _numbers(other) if places >= 4 else []
    return len(values) == 1 and abs(values[0] - float(decimal)) <= 0.5 * 10.0**-places * _SLACK
