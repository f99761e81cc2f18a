"""Other ways of writing a gold with the same value: each kind is a function that returns them."""

import random
import re
from collections.abc import Callable, Iterator

from experiments.verdicts.writing import (
    braced,
    brackets,
    depths,
    fractions,
    is_integer,
    replaced,
    sides,
    split,
    tokens,
    undollared,
    visible,
)

Made = Iterator[str]

_UNITS = r"(?:cm|m|km|inch|inches|feet|cents|dollars|degrees|hours|minutes|seconds)"
_UNIT = re.compile(rf"\s*\\(?:text|mbox)\s*\{{\s*({_UNITS})\s*\}}(\s*\^\s*\{{?\d\}}?)?$")
_DEGREE = re.compile(r"\s*\^\s*(?:\{\s*\\circ\s*\}|\\circ)$")


def _is_formula(gold: str) -> bool:
    """Whether a gold is one expression: no list, relation, text, matrix, unit, or ±."""
    marks = {",", "=", "<", ">", ":", ";", "%", r"\$", "$", r"\pm", r"\in", r"\cup", "&", r"\circ"}
    marks |= {r"\{", "'", "*", r"\%", r"\quad", r"\geqslant", r"\prime", "_"}
    found = tokens(gold)
    return not any(t.text in marks or t.kind in ("words", "word") for t in found) and not re.search(
        r"\d\s*[eE]\s*[+-]?\d|\d\.\s*/", gold
    )


def _value(gold: str) -> tuple[str, str]:
    """Splits a gold into (`name=` or nothing, the value)."""
    both = sides(gold)
    return (f"{both[0]}=", both[1]) if both else ("", gold)


def _terms(value: str) -> list[str]:
    """Splits a sum into its terms, each with its sign."""
    parts, start, before = [], 0, None
    for token, depth in depths(value):
        if token.kind == "space":
            continue
        joins = before is None or before.text in ("^", "/", r"\cdot", r"\times")
        if depth == 0 and token.text in "+-" and not joins and token.start > start:
            parts.append(value[start : token.start].strip())
            start = token.start
        before = token
    return [*parts, value[start:].strip()]


def terms_reversed(gold: str) -> Made:
    """Reverses a sum."""
    head, value = _value(gold)
    terms = _terms(value) if _is_formula(value) else []
    if len(terms) > 1:
        signed = [term if term[0] in "+-" else f"+{term}" for term in reversed(terms)]
        yield head + "".join(signed).removeprefix("+")


def factors_reversed(gold: str) -> Made:
    """Reverses a product."""
    head, value = _value(gold)
    if not _is_formula(value) or len(_terms(value)) != 1:
        return
    sign, body = ("-", value[1:].strip()) if value[:1] == "-" else ("", value)
    factors = _factors(body)
    if factors and len(factors) > 1:
        yield head + sign + r" \cdot ".join(reversed(factors))


_FACTOR = re.compile(
    r"\s*(?:\\cdot\s*|\\times\s*)?((?:\d+(?:\.\d+)?|\\sqrt(?:\[\d\])?\{[^{}]*\}|\\pi(?![a-z])|[a-zA-Z]"
    r"|\\frac\{[^{}]*\}\{[^{}]*\}|\([^()]*\))(?:\s*\^\s*\{[^{}]*\})?)"
)


def _factors(body: str) -> list[str] | None:
    """Splits a product into its factors; None for anything else, or a mixed number."""
    if re.search(r"\d\s*\\frac|[a-zA-Z]\(", body):
        return None
    factors, place = [], 0
    while place < len(body):
        match = _FACTOR.match(body, place)
        if match is None:
            return None
        factors.append(match[1])
        place = match.end()
    return factors


def fraction_forms(gold: str) -> Made:
    r"""Writes \dfrac and \tfrac, and drops braces around single digits."""
    if fractions(gold):
        yield re.sub(r"\\[dt]?frac", r"\\dfrac", gold)
        yield re.sub(r"\\[dt]?frac", r"\\tfrac", gold)
        short = re.sub(r"\\frac\{(\d)\}\{(\d)\}", r"\\frac\1\2", gold)
        if short != gold:
            yield short


def fraction_inline(gold: str) -> Made:
    """Writes a/b for every fraction of plain numbers, in brackets if anything is beside it."""
    found = [f for f in fractions(gold) if f[1].strip().isdigit() and f[2].strip().isdigit()]
    if not found or re.search(r"\d\s*\\[dt]?frac|\^\s*\{?\s*-?\\[dt]?frac", gold):
        return
    text = gold
    for whole, above, below in reversed(found):
        beside = (gold[: whole.start].rstrip()[-1:], gold[whole.end :].lstrip()[:1])
        alone = beside[0] in ("", "(", ",", "[", "=", "-") and beside[1] in ("", ")", ",", "]")
        text = replaced(text, whole, f"{above}/{below}" if alone else f"({above}/{below})")
    yield text


def fraction_sign(gold: str) -> Made:
    r"""Writes -\frac{a}{b} as \frac{-a}{b}."""
    found = fractions(gold)
    if len(found) == 1 and gold[: found[0][0].start].strip() == "-" and _is_formula(gold):
        whole, above, below = found[0]
        if whole.end == len(gold) and above.strip().isdigit():
            yield rf"\frac{{-{above}}}{{{below}}}"


def spaces_dropped(gold: str) -> Made:
    """Drops all spaces except those that end a command or separate words and numbers."""
    if not re.search(r"[A-Za-z]{2,}\s+[A-Za-z]{2,}", gold):
        yield _tight(gold)


def _tight(gold: str) -> str:
    kept = re.sub(r"(\\[a-zA-Z]+)\s+(?=[a-zA-Z])", "\\1\x00", gold)
    kept = re.sub(r"(?<=\d)\s+(?=\d)", "\x00", kept)
    return re.sub(r"\s+", "", kept).replace("\x00", " ")


def spaces_added(gold: str) -> Made:
    r"""Adds a space around operators and after commas, and \, before and after."""
    if tokens(gold) and not re.search(r"[A-Za-z]{3,}\s|\de[+-]?\d|\\text|\\mbox", gold):
        wide = "".join(
            f" {t.text} " if t.text in ("+", "-", "=", ",") else t.text for t in tokens(gold)
        )
        yield wide.strip()
        yield rf"\,{gold}\,"
        yield rf" {gold} "


def sized_brackets(gold: str) -> Made:
    r"""Adds \left and \right to round and square brackets, or drops them."""
    if r"\left" in gold:
        yield re.sub(r"\\(left|right)(?![a-z])\s*", "", gold)
        return
    found = brackets(gold)
    text = gold
    for pair in reversed(found):
        text = replaced(text, pair.right, rf"\right{pair.right.text}")
        text = replaced(text, pair.left, rf"\left{pair.left.text}")
    if found:
        yield text


_UNICODE = {
    **{r"\pi": "π", r"\cdot": "·", r"\times": "×", r"\infty": "∞", r"\cup": "∪", r"\le": "≤"},
    **{r"\leq": "≤", r"\ge": "≥", r"\geq": "≥", r"\geqslant": "≥", r"\pm": "±", r"\in": "∈"},
    **{r"\theta": "θ", "-": "−"},
}


def unicode(gold: str) -> Made:
    """Writes Unicode signs for commands, minus, squares, roots, ½ and degrees."""
    if r"\begin" in gold or re.search(r"\de-?\d", gold):
        return
    text = "".join(_UNICODE.get(t.text, t.text) for t in tokens(gold))
    text = re.sub(r"\^\{2\}", "²", text)
    text = re.sub(r"\^\{3\}", "³", text)
    text = re.sub(r"\^\{?\\circ\}?", "°", text)
    text = re.sub(r"\\sqrt\{(\d+|[a-z])\}", r"√\1", text)
    if text != gold:
        yield text
    half = gold.replace(r"\frac{1}{2}", "½")
    if half != gold and not re.search(r"\^\s*\{?-?½|\d½", half):
        yield half


def dollars(gold: str) -> Made:
    r"""Adds dollar signs around, or \(…\)."""
    if "$" not in gold:
        yield f"${gold}$"
        yield rf"\({gold}\)"


def dollars_dropped(gold: str) -> Made:
    """Drops the gold's dollar signs."""
    if re.search(r"(?<!\\)\$", gold):
        yield re.sub(r"(?<!\\)\$", "", gold).strip()


def unit_dropped(gold: str) -> Made:
    """Drops the gold's unit."""
    for pattern in (_UNIT, _DEGREE):
        if pattern.search(gold) and len(split(gold, ",")) == 1:
            yield pattern.sub("", gold)
    if gold.startswith(r"\$"):
        yield gold[2:]
    if re.fullmatch(r"[\d.]+\s*\\?%", gold):
        yield gold.rstrip("%\\ ")


def unit_written(gold: str) -> Made:
    """Writes the gold's unit in another command, or in plain letters."""
    match = _UNIT.search(gold)
    if match:
        value, power = gold[: match.start()], (match[2] or "").strip()
        for form in (r"\text{{{}}}", r" \text{{ {}}}", r"\,\mathrm{{{}}}", " {}"):
            yield value + form.format(match[1]) + power
    if _DEGREE.search(gold) and len(split(gold, ",")) == 1:
        yield _DEGREE.sub(r"^{\\circ}", gold)
        yield _DEGREE.sub("°", gold)
        yield _DEGREE.sub(r"\\text{ degrees}", gold)
        yield _DEGREE.sub(" degrees", gold)
    if gold.startswith(r"\$"):
        yield gold[1:]
        yield gold[2:] + r"\text{ dollars}"
    if re.fullmatch(r"[\d.]+\s*%", gold):
        yield gold.replace("%", r"\%")


def thousands(gold: str) -> Made:
    """Adds or drops separators between groups of three digits."""
    bare = gold.replace(r",\!", "").replace(" ", "")
    match = re.fullmatch(r"(-?(?:\\\$)?)(\d{4,})(\.\d+)?", bare)
    if match:
        for mark in (",", "{,}", r"\,", r",\!"):
            yield match[1] + f"{int(match[2]):,}".replace(",", mark) + (match[3] or "")
        yield bare


def trailing_zero(gold: str) -> Made:
    """Writes 5.0 and 5.00 for 5, 18.9 for 18.90."""
    if re.fullmatch(r"-?\d+", gold):
        yield f"{gold}.0"
        yield f"{gold}.00"
    elif re.fullmatch(r"-?(\\\$)?\d+\.\d+", gold):
        yield f"{gold}0"
        if gold.endswith("0"):
            yield gold.rstrip("0").rstrip(".")


def text_command(gold: str) -> Made:
    r"""Puts words in \text, or takes them out."""
    match = re.fullmatch(r"\\(?:text|mbox)\s*\{([^{}]*)\}", gold)
    if match:
        yield match[1].strip()
        yield rf"\textbf{{{match[1].strip()}}}"
        yield rf"\mathrm{{{match[1].strip()}}}"
    elif re.fullmatch(r"-?\d+", gold):
        yield rf"\text{{{gold}}}"


def items_reversed(gold: str) -> Made:
    """Reverses a list or a set; writes a list with another separator."""
    items = split(gold, ",")
    whole = all(item.count("$") in (0, 2) for item in items)
    if len(items) > 1 and whole and "where" not in gold:
        yield ", ".join(reversed(items))
        yield ",".join(items)
        if "$" not in gold:
            yield r" \text{ and } ".join(items) if len(items) == 2 else "; ".join(items)
    for pair in brackets(gold):
        if pair.left.text == r"\{" and pair.left.start == 0:
            yield r"\{" + ", ".join(reversed(pair.items)) + r"\}"


def name_added(gold: str) -> Made:
    """Adds `x = …` before a value."""
    plain = _is_formula(gold) and not re.search(r"\\(ln|log|sin|cos|arcsin)", gold)
    if plain and sides(gold) is None:
        free = next(n for n in "xyABw" if all(t.text != n for t in tokens(gold)))
        yield f"{free}={gold}"
        yield f"{free} = {gold}"


def name_dropped(gold: str) -> Made:
    """Drops the name that a gold assigns to."""
    both = sides(gold)
    if both and re.fullmatch(r"[a-zA-Z](_\{?\w+\}?)?(\([a-z]\))?", both[0].strip()):
        yield both[1]


def scientific(gold: str) -> Made:
    r"""Writes 4.5 \times 10^{33} for 4.5e33."""
    match = re.fullmatch(r"(-?[\d.]+)e(-?\d+)", gold)
    if match:
        yield rf"{match[1]} \times 10^{{{match[2]}}}"
        yield rf"{match[1]} \cdot 10^{{{match[2]}}}"
        yield f"{match[1]}E{match[2]}"


def unbraced(gold: str) -> Made:
    r"""Writes x^2 and \sqrt5 without braces."""
    text = re.sub(r"\^\{(\w)\}", r"^\1", re.sub(r"\\sqrt\{(\d)\}", r"\\sqrt\1", gold))
    if text != gold:
        yield text


def interval(gold: str) -> Made:
    """Writes one interval as an inequality if the gold gives its name, and the reverse."""
    match = re.fullmatch(r"([a-z]) \\in \[([^,]*),([^,]*)\]", gold)
    if match:
        yield rf"{match[2]} \le {match[1]} \le {match[3]}"


def unchanged(gold: str) -> Made:
    """Returns the gold itself, with \\displaystyle, with a full stop."""
    yield gold
    if visible(gold) and "$" not in gold:
        yield rf"\displaystyle {gold}"
        yield f"{gold}."


REWRITINGS: dict[str, Callable[[str], Made]] = {
    "unchanged": unchanged,
    "order of a sum": terms_reversed,
    "order of a product": factors_reversed,
    "form of a fraction": fraction_forms,
    "a/b": fraction_inline,
    "sign of a fraction": fraction_sign,
    "without braces": unbraced,
    "without spaces": spaces_dropped,
    "with spaces": spaces_added,
    "\\left, \\right": sized_brackets,
    "Unicode": unicode,
    "$…$, \\(…\\)": dollars,
    "without $": dollars_dropped,
    "without the unit": unit_dropped,
    "form of the unit": unit_written,
    "thousands": thousands,
    "trailing .0": trailing_zero,
    "\\text": text_command,
    "order of a list": items_reversed,
    "x = …": name_added,
    "without its name": name_dropped,
    "power of ten": scientific,
    "inequality": interval,
}


def rewritings(gold: str, *, seed: int = 0, most: int = 3) -> list[tuple[str, str]]:
    """Returns ((kind, text), …) of a gold, at most `most` a kind; one each for a plain integer."""
    most = 1 if is_integer(gold) else most
    rng = random.Random(f"{seed} {gold}")
    written = undollared(gold)
    seen, made = set(), []
    for kind, rewriting in REWRITINGS.items():
        of = written if kind == "thousands" else gold if kind == "unchanged" else braced(written)
        new = [text for text in dict.fromkeys(rewriting(of)) if text not in seen]
        for text in rng.sample(new, min(most, len(new))):
            seen.add(text)
            made.append((kind, text))
    return made
