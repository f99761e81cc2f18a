"""Finding the final answer in a response."""

import re

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_BRACE_OR_ESCAPE = re.compile(r"\\.|[{}]", re.DOTALL)


def boxed_contents(text: str) -> list[str]:
    """What each closed, outermost `\\boxed{…}` (or `\\fbox{…}`) holds, in order of appearance."""
    closings = closing_braces(text)
    contents, position = [], 0
    for opening in _BOX.finditer(text):
        end = closings.get(opening.end() - 1)
        if end is not None and opening.start() >= position:
            contents.append(text[opening.end() : end])
            position = end
    return contents


def closing_braces(text: str) -> dict[int, int]:
    """Index of each opening brace that is closed → index of the brace that closes it.

    Escaped braces are text. One pass, so that a hostile text costs no more than a long one.
    """
    closings, opened = {}, []
    for token in _BRACE_OR_ESCAPE.finditer(text):
        if token.group() == "{":
            opened.append(token.start())
        elif token.group() == "}" and opened:
            closings[opened.pop()] = token.start()
    return closings
