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
        "…": r"\ldots ",
        "∞": r"\infty ",
        "∨": r"\lor ",
        "ℝ": r"\mathbb{R}",
        "\u00a0": " ",
        "\u2009": " ",
        "\u202f": " ",
        "\u200b": "",
        "，": ",",
        "（": "(",
        "）": ")",
    }
)
_WORD_END = r"(?![a-zA-Z])"
_REWRITES = tuple(
    (re.compile(pattern), new)
    for pattern, new in (
        (r"(?<=\d)\.(?=\s*/)", ""),  # 1./3 is 1/3
        (r"\\!\s*", ""),  # negative space, as in 11,\! 111
        (rf"(?<!\\)(?:\\(?:[,;:> ]|q?quad{_WORD_END})|~)", " "),
        (rf"\\(?:display|text|script)style{_WORD_END}", ""),
        (rf"\\[bB]igg?[lr]?{_WORD_END}", ""),
        (rf"\\(?:left|right){_WORD_END}(?=\s*[()\[\]|.\\])", ""),
        (rf"\\[dtc]frac{_WORD_END}", r"\\frac"),
        (rf"\\varnothing{_WORD_END}", r"\\emptyset"),
        (rf"\\(?:c?dots|dots[cbmio]){_WORD_END}|\.\.\.+", r"\\ldots "),
        (r"\\textcolor\s*\{[^{}]*\}|\\color\s*\{[^{}]*\}", ""),
        # Marks of geometry and emphasis around a name or a number.
        (rf"\\(?:angle|triangle){_WORD_END}\s*", ""),
        (r"\\(?:overline|overrightarrow|vec)\s*\{\s*([A-Z]{1,3})\s*\}", r"\1"),
        (r"\\underline\s*\{([^{}]*)\}", r"\1"),
        # Commands in shorthand, or without their backslash.
        (r"(?<![\\a-zA-Z])(frac|sqrt)(?=\s*\{)", r"\\\1"),
        (r"\\(frac|sqrt)\s*(\d)(?![\d.])", r"\\\1{\2}"),
        (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
        (r"(\\frac\s*\{[^{}]*\})\s*(\d)", r"\1{\2}"),
        (r"√\s*(\d+|[a-zA-Z])", r"\\sqrt{\1}"),
        (r"√\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"(?<=\d)\s*[xX*]\s*10\s*\^", r"\\times 10^"),
        # Degrees are a unit, but not inside a trigonometric function.
        (
            r"(\\(?:sin|cos|tan|cot|sec|csc)\s*(?:\^\s*(?:\{\w+\}|\w)\s*)?[({]?\s*)"
            r"(\d+(?:\.\d+)?)\s*\^\s*(?:\{\s*\\circ\s*\}|\\circ)",
            r"\1{(\2\\pi/180)}",
        ),
        # A list of words in one text command, and what range a free letter has.
        (r"^\s*\\text\s*\{([^{}]*,[^{}]*)\}\s*$", r"\1"),
        (
            r"(?<=\S)\s*,?\s*(?:\\text\s*\{[^{}]*\}\s*|,\s*)\(?\s*[a-z]\s*"
            r"\\in\s*\\mathbb\s*\{?\s*[NZQ]\s*\}?\s*\)?\s*$",
            "",
        ),
        # A scale of temperature after the degree sign; upright letters after a number are a unit.
        (r"(\^\s*\{?\s*\\circ\s*\}?)\s*(?:\\(?:text|mathrm)\s*\{\s*[CFK]\s*\}|[CFK]\b)", r"\1"),
        (
            r"(?<=[\d})])(\s*)\\(?:mathrm|textrm|textnormal|mbox|hbox|operatorname)"
            r"\s*\{\s*(?![eid]\s*\})(?=[^{}]*[a-zA-Z])",
            r"\1\\text{",
        ),
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
_FORMULA_AND_UNIT = re.compile(r"\$([^$]+)\$\s*([A-Za-z]+(?:\s[A-Za-z]+)*)")
_RAISED_UNIT = re.compile(r"(?<=\d)\s*(?:[kcdm]?m|in|ft|mi|yd)[²³]")
_DOUBLED_COMMAND = re.compile(r"\\\\(?=[a-zA-Z]{2,})")
_DELIMITERS = (("**", "**"), ("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"))


_SIGN_BEFORE = re.compile(r"(-)\s*\$([^$]+)\$")


def tidy(answer: str) -> str:
    """The answer without math delimiters, spacing and size commands, and Unicode signs."""
    # One space for many: patterns below may then try both sides of a space without harm.
    answer = re.sub(r"\s+", " ", _RAISED_UNIT.sub("", answer).translate(_UNICODE))
    if "\\begin" not in answer:  # there, \\ ends a row
        answer = _DOUBLED_COMMAND.sub(r"\\", answer)
    for pattern, new in _REWRITES:
        answer = pattern.sub(new, answer)
    previous = None
    while answer != previous:
        previous = answer
        answer = _undelimited(answer.strip().rstrip(".,;:").strip().strip("`").strip())
    return answer


def _undelimited(answer: str) -> str:
    signed = _SIGN_BEFORE.fullmatch(answer)
    if signed:
        sign, inside = signed.groups()
        return f"{sign}({inside})" if re.search(r"[^({]\s*[+-]", inside) else f"{sign}{inside}"
    measured = _FORMULA_AND_UNIT.fullmatch(answer)
    if measured:
        return rf"{measured[1].strip()} \text{{{measured[2]}}}"
    for left, right in _DELIMITERS:
        inside = answer[len(left) : -len(right)]
        whole = answer.startswith(left) and answer.endswith(right) and left not in inside
        if whole and inside.strip():
            return inside
    return answer


def squeeze(answer: str) -> str:
    """The answer as compared letter by letter: without spaces; a word in lower case."""
    answer = re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", answer)
    # Not between digits: 1 2 is not 12.
    answer = re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", answer.strip())
    return answer.casefold() if re.fullmatch(r"[A-Za-z]{2,}", answer) else answer


_NAME = re.compile(
    r"""(?x)
    (?P<name>
      (?: \\Delta \s* )?
      (?: [A-Z]{2,4} | \|[A-Z]{2}\| | \([a-z](?:\s*,\s*[a-z])+\) (?=\s*=)
        | [A-Za-z] | \\[a-zA-Z]+ ) (?: _\{[^{}]*\} )? (?: '+ | \^\{?\\prime\}? | \^\{?\*\}? )?
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


_OPENING = {"(", "[", "{", r"\{", r"\begin", r"\langle"}
_CLOSING = {")", "]", "}", r"\}", r"\end", r"\rangle"}
_TOKEN = re.compile(r"\\(?:begin|end|langle|rangle)(?![a-z])|\\.|.", re.DOTALL)
_PROSE = re.compile(r"[A-Za-z']{2,}\s+[A-Za-z']{2,}")


def nesting(token: str) -> int:
    """1 for a token that opens a bracket, -1 for one that closes it."""
    return (token in _OPENING) - (token in _CLOSING)


def tokens(answer: str) -> list[str]:
    """The characters of an answer, where a command that brackets something is one."""
    return _TOKEN.findall(answer)


def top_level_items(answer: str, separator: str = ",") -> list[str]:
    """The parts between the separators that no bracket encloses."""
    items, depth = [""], 0
    for token in tokens(answer):
        depth += nesting(token)
        if token == separator and depth == 0:
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
    for token in tokens(answer[1:-1]):
        depth += nesting(token)
        if depth < 0:
            return None  # the first bracket closes before the end
    elements = top_level_items(answer[1:-1])
    return (answer[0] + answer[-1], elements) if len(elements) > 1 else None


_COMMANDS = re.compile(r"\\text\s*\{[^{}]*\}|\\[a-zA-Z]+")
_SENTENCE = re.compile(r"[A-Za-z']{2,}(?:\s+[A-Za-z']{2,}){2,}")
_WORD = re.compile(r"(?<![A-Za-z])(?!(?:and|or)(?![A-Za-z]))[A-Za-z]{3,}")


def is_prose(answer: str) -> bool:
    """Whether an answer is a sentence rather than a formula."""
    return "\\" not in answer and _PROSE.search(answer) is not None


def is_running_text(answer: str) -> bool:
    """Whether an answer is text with formulas in it, which is no list and has no unit."""
    words = _COMMANDS.sub(" ", answer)
    if _SENTENCE.search(words) and not re.match(r"[+-]?[\d.,]+\s*[A-Za-z]", words):
        return True
    has_formula = re.search(r"(?<!\\)\$|\\\(|\\\[", answer) is not None
    return has_formula and _WORD.search(words) is not None
