"""Changes that turn a gold into another answer: one number, sign, name, unit, operator, bracket …

Each kind is a function of the gold, its LaTeX in braces, and a random generator; it yields every
mutant it can make. `mutants` takes a few of each kind and leaves out those equal to the gold.
"""

import random
import re
from collections.abc import Callable, Iterator
from fractions import Fraction

from experiments.verdicts.truth import is_constant, same_in_truth
from experiments.verdicts.writing import (
    Token,
    braced,
    brackets,
    fractions,
    group_after,
    is_integer,
    replaced,
    sides,
    split,
    tokens,
    undollared,
    visible,
)

Made = Iterator[str]

_GREEK = [rf"\{n}" for n in ("alpha", "gamma", "Gamma", "delta", "lambda", "mu", "omega", "theta")]
_LETTERS = [*"abcdefghijkmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ", *_GREEK]
_NAMES = {*_GREEK, r"\pi", r"\rho", r"\nu", r"\zeta", r"\hbar", r"\eta", r"\epsilon", r"\Delta"}
_OTHER_UNITS = {
    **{"cm": "m", "m": "km", "km": "m", "inches": "feet", "inch": "feet", "feet": "inches"},
    **{"cents": "dollars", "dollars": "cents", "degrees": "radians", "hours": "minutes"},
    **{"minutes": "seconds", "seconds": "hours", "kg": "g", "g": "kg", "square": "cubic"},
}
_WORDS = ("Navin", "Evelyn", "west", "odd", "even", "hyperbola", "yes", "MR", "LRMC")
_STARTS = ("(", "[", r"\{", ",", "=", "&", r"\\", ";", "$")


def exponent(gold: str, _: random.Random) -> Made:
    """Changes x^2 to x^3, x^n to x^{n+1}, and x^2 to x."""
    for token in tokens(gold):
        group = group_after(gold, token.end) if token.text == "^" else None
        if group is None or re.search(r"\\(circ|prime)|\*", group[0]):
            continue
        content, end = group
        place = Token("exponent", gold[token.start : end], token.start, end)
        number = re.fullmatch(r"-?\d+", content.strip())
        yield replaced(gold, place, f"^{{{int(content) + 1 if number else content + '+1'}}}")
        yield replaced(gold, place, " ")


def number_raised(gold: str, _: random.Random) -> Made:
    """Raises one number by one."""
    for token in tokens(gold):
        if token.kind == "number":
            whole, point, rest = token.text.partition(".")
            yield replaced(gold, token, str(int(whole or 0) + 1).zfill(len(whole)) + point + rest)


def digit_changed(gold: str, rng: random.Random) -> Made:
    """Swaps two neighbouring digits, or changes a single one."""
    for token in tokens(gold):
        if token.kind != "number":
            continue
        digits = token.text
        swaps = [
            digits[:k] + digits[k + 1] + digits[k] + digits[k + 2 :]
            for k in range(len(digits) - 1)
            if digits[k] != digits[k + 1] and "." not in digits[k : k + 2]
        ]
        swaps = [new for new in swaps if new[0] != "0" or digits[0] == "0"]
        place = rng.choice([k for k, c in enumerate(digits) if c.isdigit()])
        other = str((int(digits[place]) + rng.randint(2, 8)) % 10)
        swaps = swaps or [digits[:place] + other + digits[place + 1 :]]
        yield replaced(gold, token, rng.choice(swaps))


def number_scaled(gold: str, _: random.Random) -> Made:
    """Multiplies one number by ten."""
    for token in tokens(gold):
        if token.kind == "number":
            value = Fraction(token.text) * 10
            text = str(value) if value.denominator == 1 else str(float(value))
            yield replaced(gold, token, text)


def sign(gold: str, _: random.Random) -> Made:
    """Drops or adds a sign before an item."""
    found = visible(gold)
    for before, token in zip([None, *found[:-1]], found, strict=True):
        if before is not None and before.text not in _STARTS:
            continue
        if token.text == "$" or (before and before.text == "$" and _closes(gold, before)):
            continue
        is_value = (token.kind == "number" and float(token.text)) or token.kind == "letter"
        is_value = is_value or re.match(r"\\(frac|dfrac|sqrt|pi|infty|sin|cos)", token.text)
        if token.text == "-":
            yield replaced(gold, token, "")
        elif is_value:
            yield replaced(gold, token, "-" + token.text)


def _closes(gold: str, dollar: Token) -> bool:
    return gold[: dollar.end].count("$") % 2 == 0


def name(gold: str, rng: random.Random) -> Made:
    """Replaces one name in one place by another, of any alphabet, including names of constants."""
    for token in tokens(gold):
        is_exponent_mark = token.text in "eE" and re.search(r"\d$", gold[: token.start])
        if (token.kind == "letter" and not is_exponent_mark) or token.text in _NAMES:
            other = rng.choice([n for n in _LETTERS if n != token.text])
            spaced = other + " " if other[0] == "\\" else other
            yield replaced(gold, token, spaced)


def word(gold: str, rng: random.Random) -> Made:
    """Replaces a word by another, a choice by another letter."""
    for token in tokens(gold):
        content = re.sub(r"^\\\w+\s*\{|\}$", "", token.text) if token.kind == "words" else ""
        choice = re.fullmatch(r"\s*\(?([A-E])\)?\s*", content)
        if choice:
            yield replaced(gold, token, rf"\text{{({chr(ord(choice[1]) + 1)})}}")
        elif token.text == undollared(gold).strip() and content and not _unit_words(content):
            yield rf"\text{{{rng.choice([w for w in _WORDS if w != content.strip()])}}}"
        elif token.kind == "word" and token.text.isupper():
            yield replaced(gold, token, rng.choice([w for w in _WORDS if w != token.text]))


def _unit_words(content: str) -> list[str]:
    return [w for w in re.findall(r"[a-z]+", content) if w in _OTHER_UNITS]


def unit(gold: str, _: random.Random) -> Made:
    """Replaces a unit by another."""
    for token in tokens(gold):
        for known in _unit_words(token.text) if token.kind == "words" else ():
            yield replaced(gold, token, token.text.replace(known, _OTHER_UNITS[known]))
    degree = re.search(r"\^\s*\{?\s*\\circ\s*\}?", gold)
    if degree:
        yield gold[: degree.start()] + r"\%" + gold[degree.end() :]
        yield gold[: degree.start()] + r"\text{ radians}" + gold[degree.end() :]
    percent = re.search(r"\\?%", gold)
    if percent:
        yield gold[: percent.start()] + r"^\circ" + gold[percent.end() :]
    if gold.startswith(r"\$"):
        yield gold[2:] + r"\text{ cents}"
        yield gold[2:] + r"\text{ cm}"


_OPERATORS = {"+": "-", r"\cdot": "/", r"\times": "/", "*": "/", "/": r"\cdot ", "!": ""}
_OPERATORS |= {r"\cup": r"\cap ", r"\pm": "+", r"\lfloor": r"\lceil ", r"\rfloor": r"\rceil "}


def operator(gold: str, _: random.Random) -> Made:
    """Changes plus to minus, product to quotient, union to intersection; drops a root or !."""
    found = visible(gold)
    for before, token in zip([None, *found[:-1]], found, strict=True):
        binary = before is not None and before.text not in (*_STARTS, "{")
        if token.text == "-" and binary:
            yield replaced(gold, token, "+")
        elif token.text == r"\sqrt":
            yield replaced(gold, token, "")
        elif token.text in _OPERATORS and (binary or token.text != "+"):
            yield replaced(gold, token, _OPERATORS[token.text])


_RELATIONS = {"<": (r"\le ", ">"), ">": (r"\ge ", "<"), r"\le": ("<", r"\ge "), "=": (r"\ne ", "<")}
_RELATIONS |= {r"\leq": ("<", r"\geq "), r"\ge": (">", r"\le "), r"\geq": (">", r"\leq ")}
_RELATIONS |= {r"\geqslant": (">", r"\leqslant "), r"\leqslant": ("<",), r"\in": (r"\notin ",)}


def relation(gold: str, _: random.Random) -> Made:
    """Changes < to ≤ or >, and = to < or ≠."""
    for token in tokens(gold):
        for other in _RELATIONS.get(token.text, ()):
            yield replaced(gold, token, other)


def bracket(gold: str, _: random.Random) -> Made:
    """Opens or closes an end of an interval, or turns a tuple into a set.

    An infinite end stays as it is; three or more items are not an interval, whatever their
    brackets.
    """
    for pair in brackets(gold):
        left, right, items = pair
        if left.text == r"\{":
            yield _rebracketed(gold, pair, "(", ")")
            continue
        if len(items) > 2:
            yield _rebracketed(gold, pair, r"\{", r"\}")
            continue
        other = {"(": "[", "[": "("}[left.text], {")": "]", "]": ")"}[right.text]
        if "infty" not in items[0]:
            yield _rebracketed(gold, pair, other[0], right.text)
        if "infty" not in items[-1]:
            yield _rebracketed(gold, pair, left.text, other[1])
        if "infty" not in items[0] + items[-1]:
            yield _rebracketed(gold, pair, *other)
            yield _rebracketed(gold, pair, r"\{", r"\}")


def _rebracketed(gold: str, pair, left: str, right: str) -> str:
    return replaced(replaced(gold, pair.right, right), pair.left, left)


def item_dropped(gold: str, _: random.Random) -> Made:
    """Drops one item of a list, tuple, set or union."""
    for separator in (",", r"\cup"):
        parts = split(gold, separator)
        for k in range(len(parts) if len(parts) > 1 else 0):
            yield f"{separator} ".join(parts[:k] + parts[k + 1 :])
    for pair in brackets(gold):
        for k in range(len(pair.items)):
            yield _with_items(gold, pair, pair.items[:k] + pair.items[k + 1 :])


def item_added(gold: str, rng: random.Random) -> Made:
    """Adds one item to a list, tuple, set or single value."""
    for pair in brackets(gold):
        if pair.left.text == r"\{" or len(pair.items) > 2:
            yield _with_items(gold, pair, [*pair.items, _neighbour(pair.items[-1], rng)])
    if not any(token.kind in ("words", "word") for token in tokens(gold)):
        last = split(gold, ",")[-1]
        yield f"{gold}, {_neighbour(last, rng)}"
        yield f"{_neighbour(last, rng)}, {gold}"


def _neighbour(item: str, rng: random.Random) -> str:
    return next(iter(number_raised(item, rng)), "1")


def _with_items(gold: str, pair, items: list[str]) -> str:
    inside = gold[pair.left.end : pair.right.start]
    tail = r" \right" if inside.rstrip().endswith(r"\right") else ""
    return gold[: pair.left.end] + ", ".join(items) + tail + gold[pair.right.start :]


def order(gold: str, _: random.Random) -> Made:
    """Swaps two items of a tuple or interval."""
    for pair in brackets(gold):
        if pair.left.text != r"\{":
            first, second, *rest = pair.items
            yield _with_items(gold, pair, [second, first, *rest])


def side(gold: str, _: random.Random) -> Made:
    """Changes one side of an equation, or the whole equation."""
    both = sides(gold)
    if both:
        left, right = both
        yield f"{left}=({right})+1"
        yield f"{left}+1={right}"
        yield f"{left}=2({right})"
        yield "1=2"
        yield f"{left}={left}"


def fraction_swapped(gold: str, _: random.Random) -> Made:
    """Swaps numerator and denominator."""
    for whole, above, below in fractions(gold):
        yield replaced(gold, whole, rf"\frac{{{below}}}{{{above}}}")


def tiny(gold: str, _: random.Random) -> Made:
    """Changes a constant by less than floating point resolves."""
    if "." not in gold and "e" not in re.sub(r"\\[a-zA-Z]+", "", gold) and is_constant(gold):
        yield rf"{gold}-10^{{-50}}"
        yield rf"{gold}+\frac{{1}}{{3^{{100}}}}"


MUTATIONS: dict[str, Callable[[str, random.Random], Made]] = {
    "exponent": exponent,
    "number + 1": number_raised,
    "digit changed": digit_changed,
    "number · 10": number_scaled,
    "sign": sign,
    "name": name,
    "word": word,
    "unit": unit,
    "operator": operator,
    "relation": relation,
    "bracket": bracket,
    "item dropped": item_dropped,
    "item added": item_added,
    "order of a tuple": order,
    "side of an equation": side,
    "fraction swapped": fraction_swapped,
    "off by 1e-48": tiny,
}


def mutants(gold: str, *, seed: int = 0, most: int = 3) -> tuple[list[tuple[str, str]], int]:
    """Returns ((kind, mutant), …) of a gold, at most `most` per kind, and how many equal the gold.

    A plain integer gets one of each kind: most golds are plain integers.
    """
    most = 1 if is_integer(gold) else most
    written = braced(undollared(gold))
    rng = random.Random(f"{seed} {gold}")
    seen, made, dropped = {gold, written}, [], 0
    for kind, mutation in MUTATIONS.items():
        new = [text for text in dict.fromkeys(mutation(written, rng)) if text not in seen]
        for text in rng.sample(new, min(most, len(new))):
            seen.add(text)
            if not text.strip() or same_in_truth(written, text):
                dropped += 1
            else:
                made.append((kind, text))
    return made, dropped
