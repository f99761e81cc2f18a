"""Finding the final answer in a response."""

import re

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_BRACE_OR_ESCAPE = re.compile(r"\\.|[{}]", re.DOTALL)

# Between the boxes of one answer: punctuation and math delimiters, or a few words with an "and".
_PUNCTUATION = r"(?:[\s,;$]|\\[()\[\],;]|\\q?quad)"
_BETWEEN_BOXES = re.compile(
    rf"{_PUNCTUATION}{{0,20}}"
    rf"(?:(?:\\text\s*\{{)?[^.!?\n]{{0,24}}\b(?:and|or)\b[^.!?\n]{{0,16}})?"
)
# What announces an answer. The strong forms are used for nothing else.
_STRONG = re.compile(
    r"""(?ix)
    \#\#\#\# | <answer> | \bfinal[ ]+answer[ ]+is\b
    | (?:^|[\n.!?*]) [ \t>]{0,8} (?:\*\*|\#{1,6}[ \t]{0,4})?
      (?:final[ ]{1,4})? answer [ ]{0,4} (?:\*\*)? [ ]{0,4} :
    """
)
_WEAK = re.compile(r"(?i)\banswer[ ]+is\b")
_LONGEST_STATEMENT = 4_000  # characters after an announcement that are looked at
_VERB = re.compile(r"\b(?:is|are|equals)\b[\s:]*")
_AFTER_ANNOUNCEMENT = re.compile(r"[\s:*]*")
_MATH = re.compile(
    r"\$\$(?P<a>.+?)\$\$|(?<!\\)\$(?P<b>(?:[^$\\]|\\.)+)\$|\\\((?P<c>.+?)\\\)|\\\[(?P<d>.+?)\\\]",
    re.DOTALL,
)
_SENTENCE_END = re.compile(r"[.;!?](?:\s|$)|\s*\*\*|</")


def after_reasoning(text: str) -> str:
    """What a response says after its last `</think>`; all of it where it has neither tag.

    Nothing where a `<think>` is not closed: what was thought is no answer.
    """
    spoken = text.rpartition("</think>")[2]
    return "" if "<think>" in spoken else spoken


def boxed_contents(text: str) -> list[str]:
    """What each closed, outermost `\\boxed{…}` (or `\\fbox{…}`) holds, in order of appearance."""
    return [text[start:end] for start, end in _boxes(text)]


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
    """The content of the last box; of several boxes side by side, all, separated by commas."""
    answer = _last_boxes(text)
    return ",".join(text[start:end].strip() for start, end in answer) if answer else None


def _last_boxes(text: str) -> list[tuple[int, int]]:
    spans = _boxes(text)
    answer = spans[-1:]
    for previous, following in zip(reversed(spans[:-1]), reversed(spans[1:]), strict=True):
        opening = text.rfind("\\", 0, following[0])
        if not _BETWEEN_BOXES.fullmatch(text, previous[1] + 1, opening):
            break
        answer.append(previous)
    return answer[::-1]


def final_answer(text: str) -> str | None:
    """The answer that a response ends on, or None where it announces none.

    It is the last box, unless "final answer is", "Answer:", "<answer>" or "####" comes after it;
    without any of these, what follows the last "answer is". After such words the answer is the
    formula there if there is one, else the rest of the sentence. A last number that nothing
    announces is no answer: a response that was cut off would be right by luck.
    """
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
    """The answer in the sentence that begins at `start`."""
    start = _AFTER_ANNOUNCEMENT.match(text, start).end()
    text = text[start : start + _LONGEST_STATEMENT]
    return _in_sentence(text, text.partition("\n")[0])


def _in_sentence(text: str, sentence: str) -> str:
    """The answer in a sentence, of which the text is the continuation."""
    end = _SENTENCE_END.search(sentence)
    words = len(sentence) if end is None else end.start()
    verbs = list(_VERB.finditer(sentence, 0, words))
    start = verbs[-1].end() if verbs else 0  # "the largest n is 34": what follows the verb
    formula = _MATH.search(text, start)
    if formula is not None and formula.start() < words:
        return _joined_formulas(text, formula)
    return text[start:words].strip().strip("\"'“”")


def _joined_formulas(text: str, first: re.Match) -> str:
    """The first formula, and those that follow it side by side, separated by commas."""
    formulas = [first]
    while following := _MATH.search(text, formulas[-1].end()):
        if not _BETWEEN_BOXES.fullmatch(text, formulas[-1].end(), following.start()):
            break
        formulas.append(following)
    contents = [next(g for g in formula.groups() if g is not None) for formula in formulas]
    return ",".join(content.strip() for content in contents)
