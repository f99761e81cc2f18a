"""Sets of real numbers, written as intervals, inequalities, unions or conditions."""

import itertools
import re

from luspo_jax.rewards.answers.latex import bracketed, named_value

_UNION = re.compile(
    r"\\cup(?![a-z])|\\lor(?![a-z])|\\text\s*\{\s*or\s*\}|(?<![a-zA-Z\\])or(?![a-zA-Z])"
)
_CONDITION = re.compile(
    r"\\\{\s*([a-zA-Z])\s*(?:\\in\s*(?:\\mathbb\s*\{?\s*R\s*\}?|R)\s*)?(?:\||\\mid|:|\\vert)(.*)\\\}",
    re.DOTALL,
)
_REALS = re.compile(r"\\mathbb\s*\{?\s*R\s*\}?|\\R|\(\s*-\\infty\s*,\s*\+?\\infty\s*\)")
_WITHOUT = re.compile(
    r"(.*?)\s*(?:\\setminus|\\backslash|\\smallsetminus|-)\s*(\\\{.*\\\})", re.DOTALL
)
_RELATION = re.compile(
    r"\\(?:leqslant|leqq|leq|le|lt|geqslant|geqq|geq|ge|gt|neq|ne)(?![a-zA-Z])|<=|>=|!=|<|>"
)
_SIGNS = {"leqslant": "<=", "leqq": "<=", "leq": "<=", "le": "<=", "lt": "<", "gt": ">", "ge": ">="}
_SIGNS |= {"geqslant": ">=", "geqq": ">=", "geq": ">=", "neq": "!=", "ne": "!="}
_LONGEST = 300  # characters


def says_it_is_a_set(answer: str) -> bool:
    """Whether an answer must be a set of reals: `1<x` must be; `(1, 2)` may be a point."""
    if _RELATION.search(answer) or re.search(r"\\cup|\\mathbb|\\setminus|\\backslash", answer):
        return True
    return bool(re.search(r"\\infty", answer)) and named_value(answer)[1].strip()[:1] in "(["


def real_set(answer: str, parse):
    """Returns (variable or "", the set) of an answer; None if it is not a set of real numbers.

    `parse` reads one expression, or returns None.
    """
    import sympy

    if len(answer) > _LONGEST:
        return None
    name, value = named_value(answer)
    condition = _CONDITION.fullmatch(value.strip())
    if condition:
        name, value = condition[1], condition[2]
    found, variables = [], {name} if len(name) == 1 else set()
    pieces, listed = _pieces(value)
    for piece in pieces:
        read = _piece(piece.strip().strip("$").strip(), parse)
        if read is None:
            return None
        variables |= {read[0]} - {""}
        found.append(read[1])
    if len(variables) > 1:
        return None
    if listed and any(
        a.intersect(b) != sympy.S.EmptySet for a, b in itertools.combinations(found, 2)
    ):
        return None  # several answers, not one
    return (variables.pop() if variables else ""), sympy.Union(*found)


def _pieces(value: str) -> tuple[list[str], bool]:
    """Returns the parts of a union or a list of intervals, and whether it is a list."""
    pieces, listed = _UNION.split(value), False
    if len(pieces) == 1 and re.search(r"[)\]]\s*,\s*[(\[]", value) and "\\infty" in value:
        pieces, listed = re.split(r"(?<=[)\]])\s*,\s*(?=[(\[])", value), True
    return pieces, listed


def _piece(text: str, parse):
    import sympy

    if _REALS.fullmatch(text):
        return "", sympy.S.Reals
    without = _WITHOUT.fullmatch(text)
    if without and without[1].strip():
        outer, inner = _piece(without[1].strip(), parse), _piece(without[2], parse)
        return None if None in (outer, inner) else (outer[0], outer[1] - inner[1])
    if text.startswith(r"\{") and text.endswith(r"\}"):
        values = [_number(item, parse) for item in text[2:-2].split(",")]
        return None if None in values else ("", sympy.FiniteSet(*values))
    name, value = named_value(text)
    ends = bracketed(value)
    if ends is not None and len(ends[1]) == 2:
        return _interval(name if len(name) == 1 else "", ends, parse)
    return _inequality(text, parse)


def _interval(name: str, ends, parse):
    import sympy

    brackets, items = ends
    values = [_number(item, parse) for item in items]
    if None in values or (values[0] < values[1]) != sympy.true:
        return None
    return name, sympy.Interval(*values, brackets[0] == "(", brackets[1] == ")")


def _number(text: str, parse):
    import sympy

    infinite = {r"\infty": sympy.oo, r"+\infty": sympy.oo, r"-\infty": -sympy.oo}
    squeezed = text.replace(" ", "")
    squeezed = squeezed.replace("inf", r"\infty") if squeezed.strip("+-") == "inf" else squeezed
    if squeezed in infinite:
        return infinite[squeezed]
    value = parse(text)
    value = value.doit() if isinstance(value, sympy.Expr) else None
    return value if value is not None and value.is_number and value.is_real else None


def _inequality(text: str, parse):
    import sympy

    signs = [_SIGNS.get(s.lstrip("\\"), s) for s in _RELATION.findall(text)]
    sides = [parse(side.strip()) for side in _RELATION.split(text)] if signs else []
    if not signs or len(signs) > 2 or not all(isinstance(side, sympy.Expr) for side in sides):
        return None
    symbols = set().union(*(side.free_symbols for side in sides))
    if len(symbols) != 1:
        return None
    (symbol,) = symbols
    real = sympy.Symbol("t", real=True)
    sides = [side.doit().subs(symbol, real) for side in sides]
    try:
        relations = [sympy.Rel(a, b, s) for a, b, s in zip(sides, sides[1:], signs, strict=False)]
        sets = [relation.as_set() for relation in relations]
    except Exception:  # sympy refuses what it cannot solve in many ways
        return None
    return symbol.name, sympy.Intersection(*sets)


def sets_agree(gold: str, prediction: str, parse) -> bool | None:
    """Whether two answers are the same set of reals; None if undecided."""
    import sympy

    if not (says_it_is_a_set(gold) or says_it_is_a_set(prediction)):
        return None
    sets = real_set(gold, parse), real_set(prediction, parse)
    if None in sets:
        return None
    (name, wanted), (other, found) = sets
    if name and other and name != other:
        return False
    both = all(map(_RELATION.search, (gold, prediction)))
    if both and (wanted.is_empty or sympy.S.Reals.is_subset(wanted)):
        return None  # inequalities true for all numbers, or for none, may still differ
    if wanted == found:
        return True
    try:
        return (wanted.symmetric_difference(found) == sympy.S.EmptySet) or None
    except Exception:
        return None
