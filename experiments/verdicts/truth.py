"""Decides by its own means whether a changed answer still has the gold's value.

It is strict: True needs a proof, which is the same letters without spacing, or the same values at
three points to 100 of 120 digits, with names as variables (e and i too); lists and sets in any
order and without repetition, ± as two values, equations up to a factor. Anything it cannot read is
assumed to differ.
"""

import random

import mpmath

from experiments.verdicts.writing import (
    brackets,
    sides,
    split,
    squeezed,
    tokens,
    undollared,
    visible,
)

_DIGITS = 120
_CLOSE = mpmath.mpf(10) ** -100
_FUNCTIONS = {
    rf"\{name}": getattr(mpmath, function)
    for name, function in (
        *((f, f) for f in ("sin", "cos", "tan", "cot", "exp", "log", "ln")),
        *(("arcsin", "asin"), ("arccos", "acos"), ("arctan", "atan")),
    )
}
_ROUND = {r"\lfloor": (r"\rfloor", mpmath.floor), r"\lceil": (r"\rceil", mpmath.ceil)}
_CLOSINGS = {"(": ")", "[": "]", "{": "}", r"\{": r"\}"}
_IGNORED = (r"\left", r"\right", r"\,", r"\;", r"\!", r"\ ", r"\quad", r"\displaystyle")


class _Unread(Exception):
    """An expression is not understood here."""


class _Reader:
    """Recursive descent over one expression; the point and name determine a name's value."""

    def __init__(self, text: str, point: int):
        self.rest = [t.text for t in visible(text) if t.text not in _IGNORED]
        self.point = point
        self.names: set[str] = set()

    def value(self):
        """Returns the value of the whole expression."""
        total = self._sum()
        if self.rest:
            raise _Unread(self.rest[0])
        return total

    def _next(self, expected: str | None = None) -> str:
        if not self.rest or (expected is not None and self.rest[0] != expected):
            raise _Unread(expected)
        return self.rest.pop(0)

    def _sum(self):
        total = self._product()
        while self.rest[:1] in (["+"], ["-"]):
            sign = 1 if self._next() == "+" else -1
            total += sign * self._product()
        return total

    def _product(self):
        total = self._signed()
        while self.rest and self.rest[0] not in ("+", "-", ")", "]", "}", r"\}", r"\rfloor"):
            if self.rest[0] == r"\rceil":
                break
            if self.rest[0] in (r"\cdot", r"\times", "*"):
                self._next()
                total *= self._signed()
            elif self.rest[0] == "/":
                self._next()
                total /= self._signed()
            else:
                total *= self._power()
        return total

    def _signed(self):
        if self.rest[:1] in (["+"], ["-"]):
            return (1 if self._next() == "+" else -1) * self._signed()
        return self._power()

    def _power(self):
        total = self._atom()
        while self.rest[:1] in (["^"], ["!"]):
            if self._next() == "!":
                total = mpmath.factorial(total)
            elif self.rest[:1] == [r"\circ"] or self.rest[:3] == ["{", r"\circ", "}"]:
                del self.rest[: 1 if self.rest[0] == r"\circ" else 3]
                total *= self._name("degree")
            else:
                total = mpmath.power(total, self._argument())
        return total

    def _argument(self):
        """Returns the argument of a command or ^: a braced group, or one digit, letter, command."""
        if self.rest[:1] == ["{"]:
            return self._within()
        if self.rest and self.rest[0][0].isdigit() and len(self.rest[0]) > 1:
            digit, self.rest[0] = self.rest[0][0], self.rest[0][1:]
            return mpmath.mpf(digit)
        return self._signed() if self.rest[:1] == ["-"] else self._atom()

    def _within(self):
        closing = _CLOSINGS[self._next()]
        total = self._sum()
        self._next(closing)
        return total

    def _name(self, name: str):
        self.names.add(name)
        generator = random.Random(f"{self.point} {name}")
        return mpmath.mpf(generator.randint(10**6, 2 * 10**6)) / 999_983

    def _atom(self):
        if not self.rest:
            raise _Unread("end")
        if self.rest[0] in ("(", "[", "{"):
            return self._within()
        token = self._next()
        if token[0].isdigit() or token[0] == ".":
            return self._number(token)
        if token in (r"\frac", r"\dfrac", r"\tfrac"):
            return self._argument() / self._argument()
        if token == r"\binom":
            return mpmath.binomial(self._argument(), self._argument())
        if token == r"\sqrt":
            return self._root()
        if token in _FUNCTIONS:
            return self._applied(_FUNCTIONS[token])
        if token in _ROUND:
            closing, function = _ROUND[token]
            total = function(self._sum())
            self._next(closing)
            return total
        if token == r"\pi":
            return mpmath.pi()
        if (token.isalpha() and len(token) == 1) or (token[0] == "\\" and token[1:].isalpha()):
            return self._subscripted(token)
        raise _Unread(token)

    def _number(self, token: str):
        total = mpmath.mpf(token)
        if self.rest[:1] in (["e"], ["E"]) and self.rest[1:2] != ["^"]:
            raise _Unread("e")  # 4e33, or 4 times e
        mixed = self.rest[:1] in ([r"\frac"], [r"\dfrac"]) and "." not in token
        return total + self._power() if mixed and self._is_plain_fraction() else total

    def _is_plain_fraction(self) -> bool:
        shape = ["{" if t == "{" else "}" if t == "}" else t.isdigit() for t in self.rest[1:7]]
        return shape == ["{", True, "}", "{", True, "}"]

    def _root(self):
        degree = self._within() if self.rest[:1] == ["["] else 2
        return mpmath.root(self._argument(), int(degree)) if degree else mpmath.nan

    def _applied(self, function):
        power = 1
        if self.rest[:1] == ["^"]:
            self._next()
            power = self._argument()
        return mpmath.power(function(self._power()), power)

    def _subscripted(self, name: str):
        if self.rest[:1] == ["_"]:
            self._next()
            depth = 0
            while self.rest:
                token = self._next()
                name += token
                depth += (token == "{") - (token == "}")
                if depth == 0:
                    break
        if self.rest[:1] == ["'"]:
            raise _Unread("'")
        return self._name(name)


def _values(text: str) -> list | None:
    """Returns the values of one expression at three points; None if it is not understood."""
    with mpmath.workdps(_DIGITS):
        try:
            found = [_Reader(text, point).value() for point in range(3)]
        except (_Unread, ValueError, ZeroDivisionError, OverflowError, TypeError, RecursionError):
            return None
        return found if all(mpmath.isfinite(value) for value in found) else None


def is_constant(text: str) -> bool:
    """Whether an answer is one number without names."""
    reader = _Reader(text, 0)
    with mpmath.workdps(_DIGITS):
        try:
            value = reader.value()
        except (_Unread, ValueError, ZeroDivisionError, OverflowError, TypeError, RecursionError):
            return False
    return bool(mpmath.isfinite(value)) and not reader.names


def _close(a, b) -> bool:
    with mpmath.workdps(_DIGITS):
        return abs(a - b) <= _CLOSE * max(abs(a), abs(b))


def _same_expression(a: str, b: str) -> bool:
    if squeezed(a) == squeezed(b):
        return True
    values = _values(a), _values(b)
    return None not in values and all(map(_close, *values))


def _same_equation(a: tuple[str, str], b: tuple[str, str]) -> bool:
    if all(map(same_in_truth, a, b)) or all(map(same_in_truth, a, b[::-1])):
        return True
    values = [_values(side) for side in (*a, *b)]
    if None in values:
        return False
    with mpmath.workdps(_DIGITS):
        one = [left - right for left, right in zip(*values[:2], strict=True)]
        other = [left - right for left, right in zip(*values[2:], strict=True)]
        if any(abs(value) < _CLOSE for value in one + other):
            return False
        if _close(one[0], one[1]):  # no unknowns: 1 = 2 is 3 = 5 by a factor only
            return False
        ratios = [x / y for x, y in zip(one, other, strict=True)]
    return all(_close(ratio, ratios[0]) for ratio in ratios)


def _same_members(a: list[str], b: list[str]) -> bool:
    return all(any(same_in_truth(x, y) for y in b) for x in a) and all(
        any(same_in_truth(x, y) for x in a) for y in b
    )


def _items(answer: str) -> list[str]:
    r"""Splits a list into its parts; one with ± counts as two."""
    found = []
    for item in split(answer, ",", ";", r"\cup"):
        item = undollared(item)
        if any(token.text in (r"\pm", r"\mp") for token in tokens(item)):
            found += [item.replace(r"\pm", "+").replace(r"\mp", "-")]
            found += [item.replace(r"\pm", "-").replace(r"\mp", "+")]
        else:
            found.append(item)
    return found


def _enclosed(answer: str) -> tuple[str, list[str]] | None:
    r"""Returns (kind of bracket, items) of an answer that is one tuple, interval or set."""
    answer = answer.replace(r"\left", "").replace(r"\right", "").strip()
    found = brackets(answer)
    whole = len(found) == 1 and found[0].left.start == 0 and found[0].right.end == len(answer)
    return (found[0].left.text + found[0].right.text, found[0].items) if whole else None


def same_in_truth(gold: str, other: str) -> bool:
    """Whether both answers are proven equal."""
    gold, other = undollared(gold), undollared(other)
    if squeezed(gold) == squeezed(other):
        return True
    equations = sides(gold), sides(other)
    if None not in equations:
        return _same_equation(*equations)
    if equations != (None, None):
        return False
    lists = _items(gold), _items(other)
    if max(map(len, lists)) > 1:
        return _same_members(*lists)
    tuples = _enclosed(gold), _enclosed(other)
    if None not in tuples:
        (kind, items), (other_kind, others) = tuples
        if kind != other_kind:
            return False
        if kind == r"\{\}":
            return _same_members(_items(",".join(items)), _items(",".join(others)))
        return len(items) == len(others) and all(map(same_in_truth, items, others))
    return tuples == (None, None) and _same_expression(gold, other)
