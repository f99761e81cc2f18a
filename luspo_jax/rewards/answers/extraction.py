"""Extraction of the final answer from a response."""

import re

from luspo_jax.rewards.answers.sentence import BETWEEN_PARTS, stated

_SIGNS = {0xFF01 + i: 0x21 + i for i in range(94)} | str.maketrans(  # fullwidth forms are ASCII
    {"−": "-", "﹣": "-", "‑": "-", "。": "."}
    | dict.fromkeys("\u00a0\u2009\u202f\u3000", " ")
    | dict.fromkeys("\u200b\u2060\ufeff", "")
)
_DASH_AS_SIGN = re.compile(r"(?<![\w)\]}])[‐-―](?=[\d.])")

_BOX = re.compile(r"\\(?:boxed|fbox|framebox)\s*\{")
_BRACE_OR_ESCAPE = re.compile(r"\\.|[{}]", re.DOTALL)

# Phrases that announce an answer. The strong forms have no other use.
_STRONG = re.compile(
    r"""(?ix)
    \#\#\#\# | <answer> | \bfinal[ ]+answer[ ]+is\b
    | (?:^|[\n.!?*]) [^\w\n("'\[{$\\]{0,12}
      (?:final[ ]{1,4})? answer [ ]{0,4} (?:\*\*)? [ ]{0,4} :
    # A heading, where one line follows it and nothing else.
    | (?:^|\n) [ \t>]{0,8} (?:\*\*|\#{1,6}[ \t]{1,4}) (?:final[ ]{1,4})? answer [ ]{0,4} (?:\*\*)?
      (?=[ \t]{0,8}\n\s*[^\n]{1,400}(?:\n\s*)?\Z)
    """
)
_WEAK = re.compile(r"(?i)\banswer[ ]+is\b")
_LONGEST_STATEMENT = 4_000  # characters searched after an announcement
_AFTER_ANNOUNCEMENT = re.compile(r"[\s:*]*")


def plain_signs(text: str) -> str:
    """Replaces Unicode minus signs, fullwidth forms and odd spaces by ASCII."""
    return text if text.isascii() else _DASH_AS_SIGN.sub("-", text.translate(_SIGNS))


def after_reasoning(text: str) -> str:
    """Returns the text after the last `</think>`; the whole text if it has neither tag.

    Returns an empty text if a `<think>` is not closed: reasoning is not an answer.
    """
    spoken = text.rpartition("</think>")[2]
    return "" if "<think>" in spoken else spoken


def with_opening(prompt: str, response: str) -> str:
    """Puts back the `<think>` before the response if its prompt ends on one.

    Some chat templates open the reasoning themselves; a response truncated inside it would
    otherwise look like an answer.
    """
    _, tag, rest = prompt.rpartition("<think>")
    return tag + rest + response if tag and not rest.strip() else response


def boxed_contents(text: str) -> list[str]:
    """Returns the contents of each closed, outermost `\\boxed{…}` (or `\\fbox{…}`), in order."""
    return [text[start:end] for start, end in _boxes(text)]


def closing_braces(text: str) -> dict[int, int]:
    """Maps the index of each closed opening brace to the index of its closing brace.

    Escaped braces are text. One pass, so that cost is linear even on hostile text.
    """
    closings, opened = {}, []
    for token in _BRACE_OR_ESCAPE.finditer(text):
        if token.group() == "{":
            opened.append(token.start())
        elif token.group() == "}" and opened:
            closings[opened.pop()] = token.start()
    return closings


def _boxes(text: str) -> list[tuple[int, int]]:
    closings = closing_braces(text)
    spans, position = [], 0
    for opening in _BOX.finditer(text):
        end = closings.get(opening.end() - 1)
        if end is not None and opening.start() >= position:
            spans.append((opening.end(), end))
            position = end
    return spans


def boxed_answer(text: str) -> str | None:
    """Returns the content of the last box; of adjacent boxes, all, separated by commas."""
    text = after_reasoning(text)
    answer = _last_boxes(text)
    return ",".join(text[start:end].strip() for start, end in answer) if answer else None


def _last_boxes(text: str) -> list[tuple[int, int]]:
    spans = _boxes(text)
    answer = spans[-1:]
    for previous, following in zip(reversed(spans[:-1]), reversed(spans[1:]), strict=True):
        opening = text.rfind("\\", 0, following[0])
        if not BETWEEN_PARTS.fullmatch(text, previous[1] + 1, opening):
            break
        answer.append(previous)
    return answer[::-1]


def final_answer(text: str) -> str | None:
    """Returns the answer that a response ends on, or None if it announces none.

    The answer is the last box, unless "final answer is", "Answer:", "<answer>" or "####" comes
    after it; without any of these, the text after the last "answer is". After such words the answer
    is the formula, if there is one, with the text that touches it, else the rest of the sentence. A
    last number without an announcement is not an answer: a truncated response would be right by
    luck. Reasoning (`after_reasoning`) announces nothing.
    """
    text = plain_signs(after_reasoning(text))
    boxes = _last_boxes(text)
    strong = _last_end(_STRONG, text, boxes[-1][1] if boxes else 0)
    if strong is not None:
        return _stated(text, strong) or (boxed_answer(text) if boxes else None)
    if boxes:
        return boxed_answer(text)
    weak = _last_end(_WEAK, text, 0)
    return (_stated(text, weak) or None) if weak is not None else None


def _last_end(pattern: re.Pattern, text: str, start: int) -> int | None:
    matches = list(pattern.finditer(text, start))
    return matches[-1].end() if matches else None


def _stated(text: str, start: int) -> str:
    """Returns the answer in the sentence that begins at `start`."""
    start = _AFTER_ANNOUNCEMENT.match(text, start).end()
    return stated(text[start : start + _LONGEST_STATEMENT])
