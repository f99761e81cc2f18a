"""Answers with several parts (lists, tuples, sets, matrices), and rules to pair their parts."""

import dataclasses
import re
from collections.abc import Callable

from luspo_jax.rewards.answers.latex import (
    is_prose,
    named_value,
    nesting,
    same_name,
    tokens,
    top_level_items,
)

# list: several answers in any order; set: the same, without repetition; tuple and vector: ordered;
# matrix: its parts are rows.
KINDS = ("list", "set", "tuple", "vector", "matrix")
_MOST = 60  # parts; longer lists are compared as strings

_JOINT = re.compile(
    r"\s*(?:,?\s*\\text(?:rm)?\s*\{\s*(?:and|or)\s*\}|,?(?<![a-zA-Z\\])(?:and|or)(?![a-zA-Z])|\\lor)\s*"
)
_MATRIX = re.compile(
    r"\(?\s*\\begin\s*\{([pbBv]?matrix|smallmatrix|array)\}(?:\s*\{[lcr|\s]*\})?(.*)"
    r"\\end\s*\{\1\}\s*\)?",
    re.DOTALL,
)
_ARRAY_BRACKETS = re.compile(r"[(\[]\s*(\\begin\s*\{array\}.*\\end\s*\{array\})\s*[)\]]", re.DOTALL)
_SPACED_NUMBERS = re.compile(r"-?\d+(?:\.\d+)?(?:\s+-?\d+(?:\.\d+)?)+")
_POINT = re.compile(r"([A-Z])\s*(\([^()]*,[^()]*\))")
_PLUS_MINUS = re.compile(r"\\pm(?![a-zA-Z])")
_MINUS_PLUS = re.compile(r"\\mp(?![a-zA-Z])")


@dataclasses.dataclass(frozen=True)
class Parts:
    """The parts of an answer; `brackets` distinguishes points from intervals."""

    kind: str
    items: tuple[str, ...]
    brackets: str = ""
    name: str = ""


def read_parts(answer: str) -> Parts | None:
    """Reads an answer with several parts or in braces; returns None for a single value."""
    answer = answer.strip()
    matrix = _matrix(answer)
    if matrix is not None:
        return matrix
    name, value = named_value(answer)
    point = _POINT.fullmatch(value)
    if point and not name:
        name, value = point[1], point[2]
    items = _split(value)
    if len(items) > 1 and not (is_prose(answer) and not _has_digits(items)):
        return _limited("list", _signs(items), name=name)
    if _SPACED_NUMBERS.fullmatch(value):
        return _limited("list", value.split(), name=name)
    both = _signs([value])
    if len(both) > 1:
        return _limited("list", both, name=name)
    return _enclosed(value, name)


def _has_digits(items: list[str]) -> bool:
    return all(any(c.isdigit() for c in item) for item in items)


def _limited(kind: str, items: list[str], brackets: str = "", name: str = "") -> Parts | None:
    items = [item.strip() for item in items]
    return Parts(kind, tuple(items), brackets, name) if len(items) <= _MOST else None


def _split(value: str) -> list[str]:
    """Splits at top-level separators: semicolons first, then commas and "and"."""
    for separator in (";", ","):
        items = top_level_items(value, separator)
        if len(items) > 1:
            break
    if separator == ",":
        items = [piece for item in items for piece in _joined(item)]
    return [item for item in items if item]


def _joined(item: str) -> list[str]:
    """Splits `1 and 2` at the word outside brackets."""
    pieces, start = [], 0
    for joint in _JOINT.finditer(item):
        if item.count("(", start, joint.start()) == item.count(")", start, joint.start()):
            pieces.append(item[start : joint.start()])
            start = joint.end()
    pieces.append(item[start:])
    # A leading "and", after a comma, leaves an empty piece before it.
    return [piece for piece in pieces if piece.strip()]


def _signs(items: list[str]) -> list[str]:
    """Repeats each item with ±: once with every upper sign, once with every lower."""
    both = []
    for item in items:
        if _PLUS_MINUS.search(item) and len(both) < _MOST:
            both.append(_MINUS_PLUS.sub("-", _PLUS_MINUS.sub("+", item)))
            both.append(_MINUS_PLUS.sub("+", _PLUS_MINUS.sub("-", item)))
        else:
            both.append(item)
    return both


def _enclosed(value: str, name: str) -> Parts | None:
    """Reads the parts of `(a, b)`, `[a, b)`, `{a, b}` or `\\{a, b\\}`."""
    opening = next((o for o in (r"\langle", r"\{", "(", "[", "{") if value.startswith(o)), None)
    closing = next((c for c in (r"\rangle", r"\}", ")", "]", "}") if value.endswith(c)), None)
    if opening is None or closing is None or len(value) < len(opening) + len(closing):
        return None
    depth = 0
    inside = value[len(opening) : len(value) - len(closing)]
    for token in tokens(inside):
        depth += nesting(token)
        if depth < 0:
            return None  # the first bracket closes before the end
    items = _signs(_split(inside))
    if opening == r"\{":
        return _limited("set", items, name=name) if closing == r"\}" else None
    if len(items) < 2:
        return None
    if opening == "{":
        return _limited("list", items, name=name) if closing == "}" else None
    rows = [_enclosed(item, "") for item in items]
    if opening == "[" and all(row and row.brackets == "[]" for row in rows):
        return _limited("matrix", items, name=name)
    brackets = "()" if opening == r"\langle" else opening + closing
    return _limited("tuple", items, brackets, name)


def _matrix(answer: str) -> Parts | None:
    bracketed = _ARRAY_BRACKETS.fullmatch(answer)
    match = _MATRIX.fullmatch(bracketed[1] if bracketed else answer)
    if match is None or match[1] == "vmatrix" or "\\begin" in match[2]:
        return None
    rows = [row.strip() for row in re.split(r"\\\\(?:\[[^\]]*\])?|\\cr(?![a-z])", match[2])]
    rows = [row for row in rows if row and row != r"\hline"]
    if len(rows) > 1 and all("&" not in row for row in rows):
        return _limited("vector", rows)
    return _limited("matrix", ["[" + row.replace("&", ",") + "]" for row in rows])


def parts_agree(gold: Parts, prediction: Parts, same: Callable[[str, str], bool]) -> bool:
    """Compares the parts of two answers, in order if either side is ordered."""
    if gold.name and prediction.name and not same_name(gold.name, prediction.name):
        return False
    kinds = {gold.kind, prediction.kind}
    if kinds == {"matrix", "tuple"}:
        gold, prediction = (_only_row(parts) for parts in (gold, prediction))
        return None not in (gold, prediction) and _in_order(gold, prediction, same)
    if "matrix" in kinds:
        return kinds == {"matrix"} and _in_order(gold, prediction, same, rows=True)
    if kinds <= {"list", "set"}:
        return _unordered(gold, prediction, same)
    if "set" in kinds:
        return False
    if kinds == {"tuple"} and not _same_brackets(gold, prediction):
        return False
    return _in_order(gold, prediction, same)


def _only_row(parts: Parts) -> Parts | None:
    """Turns a matrix of one row into a tuple."""
    if parts.kind != "matrix":
        return parts
    return _enclosed(parts.items[0], "") if len(parts.items) == 1 else None


def _same_brackets(gold: Parts, prediction: Parts) -> bool:
    # Only two parts can form an interval.
    brackets = {gold.brackets, prediction.brackets}
    return len(brackets) == 1 or (brackets == {"()", "[]"} and len(gold.items) > 2)


def _in_order(gold: Parts, prediction: Parts, same, *, rows: bool = False) -> bool:
    if len(gold.items) != len(prediction.items):
        return False
    pairs = zip(gold.items, prediction.items, strict=True)
    if rows:
        return all(_row_agrees(a, b, same) for a, b in pairs)
    return all(same(a, b) for a, b in pairs)


def _row_agrees(gold: str, prediction: str, same) -> bool:
    entries = [top_level_items(row.strip()[1:-1]) for row in (gold, prediction)]
    return len(entries[0]) == len(entries[1]) and all(
        same(a, b) for a, b in zip(*entries, strict=True)
    )


def _unordered(gold: Parts, prediction: Parts, same) -> bool:
    names = [[named_value(item)[0] for item in parts.items] for parts in (gold, prediction)]
    distinct = [len(set(filter(None, found))) for found in names]
    if min(distinct) == 0 and max(distinct) > 1:
        # a = 1, b = 2 against 1, 2: only the order shows which is which.
        return _in_order(gold, prediction, same)
    if gold.kind == "list" and _repeats(gold.items):
        return _pairs_off(gold.items, prediction.items, same)
    return _covers(gold.items, prediction.items, same) and _covers(
        prediction.items, gold.items, lambda a, b: same(b, a)
    )


def _repeats(items: tuple[str, ...]) -> bool:
    return len({re.sub(r"\s", "", item) for item in items}) < len(items)


def _pairs_off(items, others, same) -> bool:
    left = list(others)
    for item in items:
        found = next((other for other in left if same(item, other)), None)
        if found is None:
            return False
        left.remove(found)
    return not left


def _covers(items, others, same) -> bool:
    return all(any(same(item, other) for other in others) for item in items)
