"""General rules that bring LaTeX answers to one form."""

import re
import unicodedata

_SIGNS = {
    **dict.fromkeys("‐‑‒–—―−－", "-"),
    **dict.fromkeys("·⋅∙", r"\cdot "),
    **dict.fromkeys("≤⩽≦", r"\le "),
    **dict.fromkeys("≥⩾≧", r"\ge "),
    **dict.fromkeys("°º˚", r"^{\circ}"),
    **dict.fromkeys("∅Ø⌀", r"\emptyset "),
    **dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff", ""),
    **{"⟨": r"\langle ", "⟩": r"\rangle ", "⌊": r"\lfloor ", "⌋": r"\rfloor ", "⌈": r"\lceil "},
    **{"⌉": r"\rceil ", "×": r"\times ", "÷": r"\div ", "≠": r"\ne ", "±": r"\pm ", "∓": r"\mp "},
    **{"∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∨": r"\lor ", "∖": r"\setminus "},
    **{"…": r"\ldots ", "∞": r"\infty ", "≈": r"\approx ", "≡": r"\equiv ", "∠": r"\angle "},
    **{"∑": r"\sum ", "∫": r"\int ", "→": r"\to ", "∛": "√[3]", "∜": "√[4]", "、": ",", "′": "'"},
    **{letter: rf"\mathbb{{{name}}}" for letter, name in zip("ℝℤℚℕℂ", "RZQNC", strict=True)},
}
_RAISED = re.compile(r"[⁰¹²³⁴-⁹⁺⁻⁽⁾ⁿⁱˣ]+")
_LOWERED = re.compile(r"[₀-₉₊₋₍₎ₐₑₒₓₕ-ₜᵢⱼ]+")
_FRACTION = re.compile(r"(\d+)⁄(\d+)")


def _plain_letters(text: str) -> str:
    """Replaces Unicode signs and letters by LaTeX and ASCII."""
    if text.isascii():
        return text
    text = _RAISED.sub(lambda run: f"^{{{_compatible(run[0])}}}", text)
    text = _LOWERED.sub(lambda run: f"_{{{_compatible(run[0])}}}", text)
    return "".join(map(_sign, text.translate(str.maketrans(_SIGNS)))).replace("⁄", "/")


def _sign(character: str) -> str:
    """Replaces ⅓ by a fraction, β by a command; other characters lose special width and weight."""
    if character.isascii():
        return character
    plain = _compatible(character)
    fraction = _FRACTION.fullmatch(plain)
    if fraction:
        return rf"\frac{{{fraction[1]}}}{{{fraction[2]}}}"
    words = unicodedata.name(plain, "").split() if len(plain) == 1 else []
    if words[:1] == ["GREEK"] and words[2:3] == ["LETTER"] and words[-1] in _GREEK:
        small = words[1] == "SMALL"
        name = words[-1].casefold().replace("lamda", "lambda")
        return rf"\{name if small else name.capitalize()} "
    return plain


def _compatible(text: str) -> str:
    return unicodedata.normalize("NFKC", text).replace("\u2212", "-")


_GREEK = {"ALPHA", "BETA", "GAMMA", "DELTA", "EPSILON", "ZETA", "ETA", "THETA", "IOTA", "KAPPA"}
_GREEK |= {"LAMDA", "MU", "NU", "XI", "PI", "RHO", "SIGMA", "TAU", "PHI", "CHI", "PSI", "OMEGA"}
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
        # Shorthand commands, or commands without their backslash.
        (r"(?<![\\a-zA-Z])(frac|sqrt)(?=\s*\{)", r"\\\1"),
        (r"\\(frac|sqrt)\s*(\d)(?![\d.])", r"\\\1{\2}"),
        (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
        (r"(\\frac\s*\{[^{}]*\})\s*(\d)", r"\1{\2}"),
        (r"√(\[\d\])?\s*(\d+|[a-zA-Z])", r"\\sqrt\1{\2}"),
        (r"√(\[\d\])?\s*\(([^()]*)\)", r"\\sqrt\1{\2}"),
        (r"(?<=\w)\*\*(?=[\w({-])", "^"),
        (r"(?<=\d)\s*[xX*]\s*10\s*\^", r"\\times 10^"),
        # Degrees are a unit, but not inside a trigonometric function.
        (
            r"(\\(?:sin|cos|tan|cot|sec|csc)\s*(?:\^\s*(?:\{\w+\}|\w)\s*)?[({]?\s*)"
            r"(\d+(?:\.\d+)?)\s*\^\s*(?:\{\s*\\circ\s*\}|\\circ)",
            r"\1{(\2\\pi/180)}",
        ),
        # A number in a text command, and the words that announce it.
        (r"^\\text\s*\{\s*(?:[Tt]he )?(?:[Ff]inal )?[Aa]nswer(?: is)?\b[\s:]*", r"\\text{"),
        (r"^\\text\s*\{\s*\}", ""),
        (r"^\\text\s*\{\s*([+-]?[\d.,/]*\d)\s*\}", r"\1"),
        (r"^\\text\s*\{\s*([+-]?[\d.,/]*\d)\s*([a-zA-Z][^{}\d]*\})", r"\1 \\text{\2"),
        # A list of words in one text command, and the range of a free letter.
        (r"^\s*\\text\s*\{([^{}]*,[^{}]*)\}\s*$", r"\1"),
        (
            r"(?<=\S)\s*,?\s*(?:\\text\s*\{[^{}]*\}\s*|,\s*)\(?\s*[a-z]\s*"
            r"\\in\s*\\mathbb\s*\{?\s*[NZQ]\s*\}?\s*\)?\s*$",
            "",
        ),
        # A temperature scale after the degree sign; upright letters after a number are a unit.
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
        # Subscripts in one form, a word in braces: _B, _{\text{B}} and _{\max }.
        (r"_\s*\{\s*\\text\s*\{\s*([A-Za-z0-9]+)\s*\}\s*\}", r"_{\1}"),
        (r"_\s*\{\s*\\?([A-Za-z0-9]+)\s*\}", r"_{\1}"),
        (r"_\s*([A-Za-z0-9])", r"_{\1}"),
    )
)
_FORMULA_AND_UNIT = re.compile(r"\$([^$]+)\$\s*([A-Za-z]+(?:\s[A-Za-z]+)*)")
_RAISED_UNIT = re.compile(r"(?<=\d)\s*([kcdm]?m|in|ft|mi|yd)([²³])")
_DOUBLED_COMMAND = re.compile(r"\\\\(?=[a-zA-Z]{2,})")
_FORMULA_MARK = re.compile(r"(?<!\\)(?:\$\$?|\\[()\[\]])")
_ENCLOSURES = (("**", "**"), ("__", "__"), ("*", "*"), ("「", "」"))
_BINDING = re.compile(r"[-*/^\d)]\s*$")
_SUM = re.compile(r"[^({]\s*[+-]")


def tidy(answer: str) -> str:
    """Removes math delimiters, spacing and size commands, and Unicode signs."""
    # Collapse spaces: the patterns below may then try both sides of a space at no cost.
    answer = _RAISED_UNIT.sub(r" \\text{\1}\2", answer)
    answer = re.sub(r"\s+", " ", _plain_letters(answer))
    if "\\begin" not in answer:  # there, \\ ends a row
        answer = _DOUBLED_COMMAND.sub(r"\\", answer)
    answer = _without_marks(_opened(answer.strip()))
    for pattern, new in _REWRITES:
        answer = pattern.sub(new, answer)
    previous = None
    while answer != previous:
        previous = answer
        answer = _opened(answer.strip().rstrip(".,;:").strip().strip("`").strip())
    return answer


def _without_marks(answer: str) -> str:
    """Removes dollar signs and brackets around formulas; running text keeps them."""
    answer = _FORMULA_MARK.sub("$", answer)
    pieces = re.split(r"(?<!\\)\$", answer)
    if len(pieces) == 2:  # one dollar sign is money
        return (r"\$" if re.match(r"\s*[\d.]", pieces[1]) else "").join(pieces)
    measured = _FORMULA_AND_UNIT.fullmatch(answer.strip())
    if measured:
        return rf"{measured[1].strip()} \text{{{measured[2]}}}"
    if len(pieces) == 1 or is_running_text("$".join(pieces[::2]) + "$"):
        return answer
    joined = ""
    for place, piece in enumerate(pieces):
        # Text that touches a formula belongs to it.
        bound = place % 2 and _BINDING.search(joined) and _SUM.search(piece)
        joined += f"({piece})" if bound else piece
    return joined


def _opened(answer: str) -> str:
    """Removes marks of emphasis around the answer."""
    for left, right in _ENCLOSURES:
        inside = answer[len(left) : -len(right)]
        whole = answer.startswith(left) and answer.endswith(right) and left not in inside
        if whole and inside.strip():
            return inside
    return answer


def squeeze(answer: str) -> str:
    """Returns the answer for comparison letter by letter: no spaces; a word in lower case."""
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
    """Splits `x = 5`, `f(x) = …` or `c \\in […]` into (name, value); else returns ("", answer)."""
    match = _NAME.fullmatch(answer)
    if match is None:
        return "", answer
    return match["name"], match["value"].strip()


def same_name(one: str, other: str) -> bool:
    """Whether two names are the same; case counts only in a function's argument."""
    (name, *of), (other_name, *other_of) = (squeeze(n).partition("(") for n in (one, other))
    return name.casefold() == other_name.casefold() and of == other_of


_OPENING = {"(", "[", "{", r"\{", r"\begin", r"\langle"}
_CLOSING = {")", "]", "}", r"\}", r"\end", r"\rangle"}
_TOKEN = re.compile(r"\\(?:begin|end|langle|rangle)(?![a-z])|\\.|.", re.DOTALL)
_PROSE = re.compile(r"[A-Za-z']{2,}\s+[A-Za-z']{2,}")


def nesting(token: str) -> int:
    """Returns 1 for a token that opens a bracket, -1 for one that closes it."""
    return (token in _OPENING) - (token in _CLOSING)


def tokens(answer: str) -> list[str]:
    """Splits an answer into characters; a bracketing command is one token."""
    return _TOKEN.findall(answer)


def top_level_items(answer: str, separator: str = ",") -> list[str]:
    """Splits at the separators outside all brackets."""
    items, depth = [""], 0
    for token in tokens(answer):
        depth += nesting(token)
        if token == separator and depth == 0:
            items.append("")
        else:
            items[-1] += token
    return [item.strip() for item in items]


def bracketed(answer: str) -> tuple[str, list[str]] | None:
    """Returns (brackets, elements) of a tuple or interval, `(a, b]`; None for anything else."""
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


_COMMANDS = re.compile(r"\\(?:text|[mh]box)\s*\{[^{}]*\}|\\[a-zA-Z]+")
_SENTENCE = re.compile(r"[A-Za-z']{2,}(?:\s+[A-Za-z']{2,}){2,}")
_WORD = re.compile(r"(?<![A-Za-z])(?!(?:and|or)(?![A-Za-z]))[A-Za-z]{3,}")


def is_prose(answer: str) -> bool:
    """Whether an answer is a sentence and not a formula."""
    return "\\" not in answer and _PROSE.search(answer) is not None


def is_running_text(answer: str) -> bool:
    """Whether an answer is text with formulas in it, not a list and without a unit."""
    words = _COMMANDS.sub(" ", answer)
    if _SENTENCE.search(words) and not re.match(r"[+-]?[\d.,]+\s*[A-Za-z]", words):
        return True
    has_formula = re.search(r"(?<!\\)\$|\\\(|\\\[", answer) is not None
    return has_formula and _WORD.search(words) is not None
