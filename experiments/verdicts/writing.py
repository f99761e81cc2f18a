"""A small LaTeX reader for making and judging changes to answers.

It shares nothing with `luspo_jax.rewards`, so that a fault there is not repeated here.
"""

import re
from typing import NamedTuple

_KINDS = {
    "words": r"\\(?:text|mbox|hbox|mathrm|operatorname|mathbb|begin|end)\s*\{[^{}]*\}",
    "command": r"\\[a-zA-Z]+|\\.",
    "number": r"\d+(?:\.\d+)?|\.\d+",
    "word": r"[A-Za-z]{3,}",
    "letter": r"[A-Za-z]",
    "space": r"\s+",
    "sign": r".",
}
_TOKEN = re.compile("|".join(f"(?P<{kind}>{p})" for kind, p in _KINDS.items()), re.DOTALL)
_OPENING = ("(", "[", "{", r"\{", r"\langle", r"\lfloor", r"\lceil")
_CLOSING = (")", "]", "}", r"\}", r"\rangle", r"\rfloor", r"\rceil")


class Token(NamedTuple):
    """A piece of an answer and its position."""

    kind: str
    text: str
    start: int
    end: int


def tokens(answer: str) -> list[Token]:
    """Splits an answer into pieces; together they are the answer."""
    return [Token(m.lastgroup, m.group(), *m.span()) for m in _TOKEN.finditer(answer)]


def visible(answer: str) -> list[Token]:
    """Returns the tokens that are not white space."""
    return [token for token in tokens(answer) if token.kind != "space"]


def replaced(answer: str, token: Token, new: str) -> str:
    """Replaces a token of the answer by another text."""
    return answer[: token.start] + new + answer[token.end :]


def depths(answer: str) -> list[tuple[Token, int]]:
    """Returns each token with its bracket depth; a bracket itself counts as outside."""
    found, depth = [], 0
    for token in tokens(answer):
        is_environment = token.text.startswith((r"\begin", r"\end"))
        depth -= token.text in _CLOSING or (is_environment and token.text.startswith(r"\end"))
        found.append((token, depth))
        depth += token.text in _OPENING or (is_environment and token.text.startswith(r"\begin"))
    return found


def split(answer: str, *separators: str) -> list[str]:
    """Splits at separators outside all brackets."""
    parts, start = [], 0
    for token, depth in depths(answer):
        if depth == 0 and token.text in separators:
            parts.append(answer[start : token.start].strip())
            start = token.end
    return [*parts, answer[start:].strip()]


class Bracket(NamedTuple):
    """A pair of brackets around a list: its tokens and the items between them."""

    left: Token
    right: Token
    items: list[str]


def brackets(answer: str) -> list[Bracket]:
    """Returns the outermost bracket pairs with two or more items, except groups of LaTeX."""
    found, opened = [], None
    for token, depth in depths(answer):
        if depth == 0 and token.text in ("(", "[", r"\{"):
            opened = token
        elif depth == 0 and token.text in (")", "]", r"\}") and opened:
            items = split(re.sub(r"\\right\s*$", "", answer[opened.end : token.start]), ",")
            if len(items) > 1:
                found.append(Bracket(opened, token, items))
            opened = None
    return found


def undollared(answer: str) -> str:
    """Removes the single pair of dollar signs around the answer, and its full stop."""
    inner = answer.strip().rstrip(".")
    if len(inner) > 2 and inner[0] == inner[-1] == "$" and "$" not in inner[1:-1]:
        return inner[1:-1].strip()
    return answer


def is_integer(answer: str) -> bool:
    """Whether an answer consists of digits, with or without a sign."""
    return re.fullmatch(r"[+-]?\d+", undollared(answer).strip()) is not None


def sides(answer: str) -> tuple[str, str] | None:
    """Returns left and right of the equals sign of an answer that is a single equation."""
    parts = split(answer, "=")
    single = len(parts) == 2 and len(split(answer, ",", ";")) == 1 and all(parts)
    return (parts[0], parts[1]) if single and "$" not in answer else None


def braced(answer: str) -> str:
    r"""Puts arguments, exponents and thousands commas of the answer in braces: \frac{4}{3}."""
    answer = re.sub(r"(?<=\d),\\!\s*(?=\d{3})", "{,}", answer)
    answer = re.sub(r"\\(frac|sqrt)\s*(\d)", r"\\\1{\2}", answer)
    answer = re.sub(r"(\\frac\s*\{[^{}]*\})\s*(\d)", r"\1{\2}", answer)
    return re.sub(r"\^\s*(\d)", r"^{\1}", answer)


def fractions(answer: str) -> list[tuple[Token, str, str]]:
    r"""Returns each \frac of braced arguments: the whole as a token, numerator and denominator."""
    found = []
    for start in re.finditer(r"\\[dt]?frac\s*(?=\{)", answer):
        above, end = _group(answer, start.end())
        below_at = end + len(answer[end:]) - len(answer[end:].lstrip())
        if above is None or answer[below_at : below_at + 1] != "{":
            continue
        below, end = _group(answer, below_at)
        if below is not None:
            whole = Token("fraction", answer[start.start() : end], start.start(), end)
            found.append((whole, above, below))
    return found


def _group(answer: str, start: int) -> tuple[str | None, int]:
    """Returns the content of the brace at `start`, and the position after its closing brace."""
    depth = 0
    for match in re.finditer(r"\\.|[{}]", answer[start:], re.DOTALL):
        depth += {"{": 1, "}": -1}.get(match.group(), 0)
        if depth == 0:
            return answer[start + 1 : start + match.start()], start + match.end()
    return None, start


def group_after(answer: str, start: int) -> tuple[str, int] | None:
    """Returns the content of the braces at `start` and their end; None if there are none."""
    if answer[start : start + 1] != "{":
        return None
    content, end = _group(answer, start)
    return None if content is None else (content, end)


_SPACING = re.compile(r"\\(?:left|right|displaystyle)(?![a-zA-Z])|\\[!,;: ]|~|\s+|\\quad")


def squeezed(answer: str) -> str:
    """Removes what changes only the looks: spaces, size commands, sizes of fractions."""
    answer = re.sub(r"\\[dt]frac", r"\\frac", braced(undollared(answer)))
    answer = _SPACING.sub("", answer)
    return re.sub(r"\{([A-Za-z0-9])\}", r"\1", answer)
