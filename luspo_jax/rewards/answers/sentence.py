"""The answer in the first sentence of a text: its formulas and the words that belong to them."""

import bisect
import itertools
import operator
import re
from typing import NamedTuple

from luspo_jax.rewards.answers.latex import nesting, tokens

# Between the parts of one answer: punctuation and math delimiters, or a few words with an "and".
_PUNCTUATION = r"(?:[\s,;$]|\\[()\[\],;]|\\q?quad)"
BETWEEN_PARTS = re.compile(
    rf"{_PUNCTUATION}{{0,20}}"
    rf"(?:(?:\\text\s*\{{)?[^.!?\n]{{0,24}}\b(?:and|or)\b[^.!?\n]{{0,16}})?"
)
_DELIMITER = re.compile(r"\\.|\$\$?", re.DOTALL)
_CLOSED_BY = {"$": "$", "$$": "$$", r"\(": r"\)", r"\[": r"\]"}
_SENTENCE_END = re.compile(r"[.;!?](?:\s|$)|\*\*|</")
_VERB = re.compile(r"\b(?:is|are|equals)\b[\s:]*")
_WORD = re.compile(r"\S+")
_OPERATORS = r"+\-±*/^×·÷=<>"
# Words that belong to an adjacent formula: a sign or number before it, an operator after it.
_BEFORE = re.compile(rf"[{_OPERATORS}(\[]*(?:\d[\d.,]*)?[{_OPERATORS})\]]*")
_OPERATOR = re.compile(rf"[{_OPERATORS}]")
_OPERAND = re.compile(r"[(\[]?[+\-]?\d[\d.,]*[)\]]*[.,]?")
_SUM = re.compile(r"[^({\s]\s*[+-]")
_ENDS_ON_COMMAND = re.compile(r"\\[a-zA-Z]+\Z")
_MASK = "\0"


class Formula(NamedTuple):
    """Position of a formula, delimiters included, and the text between them."""

    start: int
    end: int
    content: str


def formulas(text: str) -> list[Formula]:
    """Returns the formulas between math delimiters, in order.

    One pass, so that cost is linear even on hostile text.
    """
    marks = [(m.group(), m.start(), m.end()) for m in _DELIMITER.finditer(text)]
    last = {mark: start for mark, start, _ in marks}
    found, opening, start, inside = [], "", 0, 0
    for mark, left, right in marks:
        if not opening:
            # A dollar sign that is not closed later means money.
            if mark in _CLOSED_BY and last.get(_CLOSED_BY[mark], -1) > left:
                opening, start, inside = mark, left, right
        elif mark == _CLOSED_BY[opening]:
            found.append(Formula(start, right, text[inside:left].strip()))
            opening = ""
        elif mark == "$$" and opening == "$":  # one ends and the next begins: $a$$b$
            found.append(Formula(start, left + 1, text[inside:left].strip()))
            start, inside = left + 1, right
    return [formula for formula in found if formula.content]


def stated(text: str) -> str:
    """Returns the answer in a text's first sentence.

    The answer follows the last verb. If there is a formula, the answer is the formula with the
    numbers, signs and units that touch it, and the formulas directly after it, separated by commas.
    """
    text = text.replace(r"\"", '"')  # text that was escaped twice
    found = formulas(text)
    masked = _masked(text, found)
    line = masked.partition("\n")[0]
    end = _SENTENCE_END.search(line)
    line = line if end is None else line[: end.start()]
    verbs = list(_VERB.finditer(line))
    start = verbs[-1].end() if verbs else 0  # "the largest n is 34": the text after the verb
    found = [formula for formula in found if formula.start >= start]
    if not found or found[0].start >= len(line):
        return text[start : len(line)].strip().strip("\"'“”")
    return _joined(text, masked, found, start)


def _masked(text: str, found: list[Formula]) -> str:
    """Replaces formulas by words of equal length; one that ends on a full stop keeps it."""
    pieces, position = [], 0
    for start, end, content in found:
        stop = "." if content.endswith(".") else _MASK
        pieces += [text[position:start], _MASK * (end - start - 1), stop]
        position = end
    return "".join([*pieces, text[position:]])


def _joined(text: str, masked: str, found: list[Formula], start: int) -> str:
    """Joins the first formula and those adjacent to it, each with the words that belong to it."""
    words = [(m.start(), m.end()) for m in _WORD.finditer(masked, start)]
    parts: list[str] = []
    bare: list[str] = []
    end = start
    for formula in found:
        if formula.start < end:  # it belongs to the previous one
            bare.append(formula.content)
            continue
        left, right = _extent(masked, words, formula, end)
        if parts and not BETWEEN_PARTS.fullmatch(text, end, left):
            break
        parts.append(_unmasked(text, found, left, right))
        bare.append(formula.content)
        end = right
    joined = ",".join(parts)
    return joined if _is_balanced(joined) else ",".join(bare)


def _extent(masked: str, words, formula: Formula, least: int) -> tuple[int, int]:
    """Returns start and end of the words around a formula that belong to it."""
    index = bisect.bisect_right(words, formula.start, key=operator.itemgetter(1))
    first, last = index, index
    while (
        first
        and words[first - 1][0] >= least
        and _BEFORE.fullmatch(masked, *words[first - 1])
        and not (first == index and _are_two_numbers(masked, words[first - 1], formula))
    ):
        first -= 1
    while (
        last + 2 < len(words)
        and _OPERATOR.fullmatch(masked, *words[last + 1])
        and (
            _OPERAND.fullmatch(masked, *words[last + 2])
            or masked.startswith(_MASK, words[last + 2][0])
        )
    ):
        last += 2
    left, right = max(words[first][0], least), words[last][1]
    before, after = masked[left : formula.start], masked[formula.end : right]
    left = formula.start - len(before.rpartition(":")[2].lstrip(".,;=*_\"'“”`≈~ "))
    return left, formula.end + len(
        after.partition("**")[0].partition("</")[0].rstrip(".,;:!?*_\"'“”` ")
    )


def _are_two_numbers(masked: str, word: tuple[int, int], formula: Formula) -> bool:
    return masked[word[1] - 1].isdigit() and formula.content[0].isdigit()


def _unmasked(text: str, found: list[Formula], left: int, right: int) -> str:
    """Returns a piece of the text without the delimiters of its formulas."""
    pieces, position = [], left
    first = bisect.bisect_left(found, left, key=operator.attrgetter("start"))
    for start, end, content in itertools.takewhile(
        lambda f: f.start < right, itertools.islice(found, first, None)
    ):
        before, after = text[position:start], text[end : min(end + 1, right)]
        multiplied = before.strip()[-1:] not in ("", *"=<>([,") or after in tuple("*/^×·÷%")
        pieces += [before, f"({content})" if multiplied and _SUM.search(content) else content]
        # 2$\pi$r becomes 2\pi r.
        pieces += [" "] if after.isalpha() and _ENDS_ON_COMMAND.search(content) else []
        position = end
    return "".join([*pieces, text[position:right]]).strip()


def _is_balanced(answer: str) -> bool:
    depth = 0
    for token in tokens(answer):
        depth += nesting(token)
        if depth < 0:
            return False
    return depth == 0
