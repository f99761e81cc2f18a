"""Answers in LaTeX brought to one form, by general rules."""

import re

_UNICODE = str.maketrans(
    {
        "−": "-",
        "–": "-",
        "×": r"\times ",
        "·": r"\cdot ",
        "÷": r"\div ",
        "π": r"\pi ",
        "θ": r"\theta ",
        "∞": r"\infty ",
        "≤": r"\le ",
        "≥": r"\ge ",
        "≠": r"\ne ",
        "∪": r"\cup ",
        "∩": r"\cap ",
        "∈": r"\in ",
        "∅": r"\emptyset ",
        "±": r"\pm ",
        "°": r"^{\circ}",
        "²": "^{2}",
        "³": "^{3}",
        "½": r"\frac{1}{2}",
        "¼": r"\frac{1}{4}",
        "¾": r"\frac{3}{4}",
        "\u00a0": " ",
        "\u2009": " ",
        "\u202f": " ",
        "\u200b": "",
        "，": ",",
        "（": "(",
        "）": ")",
    }
)
# Words that are part of a formula, and so no unit after a number.
_MATH_WORDS = r"(?:and|or|pi|mod|sqrt|sin|cos|tan|cot|sec|csc|log|ln|exp|infty|infinity)\b"
_WORD_END = r"(?![a-zA-Z])"
_REWRITES = tuple(
    (re.compile(pattern), new)
    for pattern, new in (
        (r"\\!\s*", ""),  # negative space, as in 11,\! 111
        (rf"(?<!\\)(?:\\(?:[,;:> ]|q?quad{_WORD_END})|~)", " "),
        (rf"\\(?:display|text|script)style{_WORD_END}", ""),
        (rf"\\[bB]igg?[lr]?{_WORD_END}", ""),
        (rf"\\(?:left|right){_WORD_END}(?=\s*[()\[\]|.\\])", ""),
        (rf"\\[dtc]frac{_WORD_END}", r"\\frac"),
        (rf"\\varnothing{_WORD_END}", r"\\emptyset"),
        # Degrees are a unit, but not inside a trigonometric function.
        (
            r"(\\(?:sin|cos|tan|cot|sec|csc)\s*(?:\^\s*(?:\{\w+\}|\w)\s*)?[({]?\s*)"
            r"(\d+(?:\.\d+)?)\s*\^\s*(?:\{\s*\\circ\s*\}|\\circ)",
            r"\1{(\2\\pi/180)}",
        ),
        (rf"^([+-]?[\d.,]+)\s+(?!{_MATH_WORDS})[a-zA-Z]{{3,}}(?:\s+[a-zA-Z]+)*\s*$", r"\1"),
        (
            r"\\(?:mathrm|mathbf|mathit|mathsf|operatorname|textbf|textit|textrm)\s*\{([^{}]*)\}",
            r"\1",
        ),
        (rf"\\(?:rm|bf|it){_WORD_END}\s*", ""),
        # Subscripts in one form: _B, _{\text{B}} and _{\max } are words in braces.
        (r"_\s*\{\s*\\text\s*\{\s*([A-Za-z0-9]+)\s*\}\s*\}", r"_{\1}"),
        (r"_\s*\{\s*\\?([A-Za-z0-9]+)\s*\}", r"_{\1}"),
        (r"_\s*([A-Za-z0-9])", r"_{\1}"),
    )
)
_RAISED_UNIT = re.compile(r"(?<=\d)\s*(?:[kcdm]?m|in|ft|mi|yd)[²³]")
_DOUBLED_COMMAND = re.compile(r"\\\\(?=[a-zA-Z]{2,})")
_DELIMITERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"))


def tidy(answer: str) -> str:
    """The answer without math delimiters, spacing and size commands, and Unicode signs."""
    answer = _RAISED_UNIT.sub("", answer).translate(_UNICODE)
    if "\\begin" not in answer:  # there, \\ ends a row
        answer = _DOUBLED_COMMAND.sub(r"\\", answer)
    for pattern, new in _REWRITES:
        answer = pattern.sub(new, answer)
    previous = None
    while answer != previous:
        previous = answer
        answer = _undelimited(answer.strip().rstrip(".,;:").strip())
    return answer


def _undelimited(answer: str) -> str:
    for left, right in _DELIMITERS:
        inside = answer[len(left) : -len(right)]
        whole = answer.startswith(left) and answer.endswith(right) and left not in inside
        if whole and inside.strip():
            return inside
    return answer


def squeeze(answer: str) -> str:
    """The answer as compared letter by letter: without spaces; a word in lower case."""
    answer = re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", answer)
    answer = re.sub(r"\s", "", answer)
    return answer.casefold() if re.fullmatch(r"[A-Za-z]{2,}", answer) else answer


_NAME = re.compile(
    r"""(?x)
    (?P<name>
      (?: \\Delta \s* )?
      (?: [A-Za-z] | \\[a-zA-Z]+ ) (?: _\{[^{}]*\} )? (?: '+ | \^\{?\\prime\}? | \^\{?\*\}? )?
      (?: \s* \( [^()=<>]* \) )?
    )
    \s* (?: = | \\approx (?![a-z]) | \\in (?![a-z]) | : (?!\d) ) \s*
    (?P<value> (?: (?! \\approx) [^=<>] )+ )
    """
)


def named_value(answer: str) -> tuple[str, str]:
    """(name, value) of an answer like `x = 5`, `f(x) = …`, `c \\in […]`; else ("", answer)."""
    match = _NAME.fullmatch(answer)
    if match is None:
        return "", answer
    return match["name"], match["value"].strip()


_BRACKETS = {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}
_TOKEN = re.compile(r"\\.|.", re.DOTALL)
_PROSE = re.compile(r"[A-Za-z']{2,}\s+[A-Za-z']{2,}")


def top_level_items(answer: str) -> list[str]:
    """The parts between the commas that no bracket encloses."""
    items, depth = [""], 0
    for token in _TOKEN.findall(answer):
        depth += _BRACKETS.get(token[-1], 0)  # \{ and \} count as brackets
        if token == "," and depth == 0:
            items.append("")
        else:
            items[-1] += token
    return [item.strip() for item in items]


def bracketed(answer: str) -> tuple[str, list[str]] | None:
    """(brackets, elements) of a tuple or interval, `(a, b]`; None where it is none."""
    answer = answer.strip()
    if len(answer) < 2 or answer[0] not in "([" or answer[-1] not in ")]":
        return None
    depth = 0
    for position, token in enumerate(answer):
        depth += _BRACKETS.get(token, 0)
        if depth == 0 and position < len(answer) - 1:
            return None  # the first bracket closes before the end
    elements = top_level_items(answer[1:-1])
    return (answer[0] + answer[-1], elements) if len(elements) > 1 else None


def is_prose(answer: str) -> bool:
    """Whether an answer is a sentence rather than a formula."""
    return "\\" not in answer and _PROSE.search(answer) is not None
