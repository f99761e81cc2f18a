"""The choice that a response states: its letters, or the text of an option.

The choice is the last box or announcement ("the answer is", "I choose", "B is correct"), else the
last sentence. Letters that are only mentioned, listed again, denied, asked for or left open ("A or
B") state nothing, and an article is not a letter.
"""

import re
from collections.abc import Mapping, Sequence

from luspo_jax.rewards.answers import quantities
from luspo_jax.rewards.answers.extraction import after_reasoning, boxed_answer
from luspo_jax.rewards.answers.latex import named_value, squeeze, tidy
from luspo_jax.rewards.answers.plain_numbers import exact_number

_LONGEST_RESPONSE = 20_000  # characters searched at its end
_LONGEST = 2_000  # characters of a statement
_MOST = 100  # announcements searched
_QUOTES = "\"'“”‘’`*_ "
_DEGREES = re.compile(r"\^\s*\\circ(?![a-zA-Z])")
_ANGLED = re.compile(r"^<+([^<>]*)>+$")  # <<B>>, as We-Math's prompt writes it
_TEXT_COMMAND = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|normal)?|math(?:rm|bf|sf|it)|mbox)\s*\{([^{}]*)\}"
)

# The text that is searched for announcements: no emphasis, no quotes, no math delimiters.
_WIDE = str.maketrans(
    {0xFF21 + n: chr(65 + n) for n in range(26)}
    | {0xFF41 + n: chr(97 + n) for n in range(26)}
    | dict(zip(map(ord, "：（）．，；！？\u3000、"), ":().,;!? ,", strict=True))
    | {ord("。"): ". "}
)
_QUOTED_LETTER = re.compile(r"(?<![A-Za-z])['‘]([A-Za-z])['’](?![A-Za-z])")
_EMPHASIS = re.compile(r"(?<![\\A-Za-z0-9)*])\*([^*\s][^*\n]{0,80})\*(?![A-Za-z0-9(*])")
_MARKUP = re.compile(r"\*\*|__|[$`\"“”]|\\[()\[\]]")

# A letter that is not the word "a" or "I", a variable of a formula or an initial.
_NO_NOUN = (
    "is|are|was|has|and|or|nor|to|because|since|as|from|with|in|for|by|on|at|which|that|but|not|so"
)
_LOWER_END = r"(?=\s{0,3}(?:[.,;:!)\]](?![a-z])|$)|\s{1,3}(?:and|or|because|since)\b)"
_BARE = (
    rf"(?:[B-HJ-Z]|A(?!\s+[a-z])|A(?=\s+(?:{_NO_NOUN})\b)|I(?!\s+[a-z])"
    rf"|(?<!the\s)(?<!The\s)[a-z]{_LOWER_END})\)?"
)
_MARK = (
    r"(?<![A-Za-z0-9\\'’^_.])(?:[(\[{<]{1,3}\s?[A-Za-z]\s?[)\]}>]{1,3}|"
    + _BARE
    + r")(?![A-Za-z0-9'’^_])"
)
_BETWEEN = (
    r"(?:\s{0,3}(?:[,;/&|–—-]|\b(?:and|or|nor|to|through)\b|[和与或及至到])\s{0,3}"
    r"(?:(?:and|or)\s{1,3})?(?:(?:options?|choices?)\s{1,3})?|\s{1,3}(?=[(\[]))"
)
_RUN = rf"(?P<run>(?>{_MARK}(?:{_BETWEEN}{_MARK}){{0,12}}))"  # all of them or none
_LETTER = re.compile(r"(?<![A-Za-z])[A-Za-z](?![A-Za-z])")
_OPEN = re.compile(r"\b(?:or|nor|to|through)\b|[/|–—或至到-]")
# What must not follow: a formula, or a verb whose subject is the letter.
_FOLLOWED = (
    r"(?!\s{0,3}(?:[=+^>_]|<(?![/|]))|[-–/]\w"
    r"|\s{0,3}\\(?:c[au]p|times|cdot|to|in|su[bp]|[lg]eq?|ne|pm|perp|parallel)"
    r"|\s{1,3}(?:is|are|was|were|isn't|cannot|can|could|might|may|does|looks|seems)\b|\s?[不错有]"
    r"|[,\s]{1,4}(?:which|but\s(?:that|this|it))\s(?:is|was|seems)\s(?:wrong|incorrect|not)\b)"
)
_FILLER = (
    r"(?i:(?:[^\w\s(\[{<\\+.-]|-(?=\s)|\s|\bI\s(?:think|believe|would\ssay)\b|\bit['’]s\b"
    r"|\b(?:it|that|likely|probably|definitely|clearly|indeed|simply|most|therefore|thus|so|hence"
    r"|then|must|be|is|the|option|choice|letter|answer|labell?ed)\b|选项?){0,16})"
)
_LEADING = re.compile(_FILLER + _RUN + _FOLLOWED)
_RATHER = re.compile(
    r"(?i)\s{0,3}not\s[^.!?\n]{1,60}?(?:\bbut\b|\brather\b|\bit(?:\sis|'s|’s))[\s,]{1,3}"
)

# Announcements: the answer follows them.
_KIND = r"(?:options?|choices?|letters?|ones?|statements?|selection|alternative)"
_GAP = r"(?:(?!\b(?:is|are|was|be)\b|(?-i:\b[B-HJ-Z]\b))[^.!?\n:=]){0,60}?"
_ANNOUNCED = re.compile(
    rf"""(?imx)
    (?: \banswers?\b (?: [\s,(]{{1,3}} (?:letter|option|choice|key|here|then|therefore|thus|to|for
          |in|of|among|from|that|which)\b {_GAP} )?
      | \b(?:correct|right|best|proper|appropriate|final|matching|suitable|my|chosen|selected)
          \s{{1,3}} {_KIND}\b {_GAP}
      | \b(?:option|choice|letter|one)\s{{1,3}}(?:that|which|whose|with)\b {_GAP}
      | ^\W{{0,6}}(?:option|choice|selection|letter)\b (?=\s{{0,3}}:)
    )
    (?: \s{{0,3}}\b(?:is|are|(?:must|should|would|has\sto)\s{{1,3}}be)\b(?!n't)\s{{0,3}}:?
      | ['’]?\s{{0,3}}[:=] | \s{{1,3}}[-–—](?=\s) )
    (?! \s{{0,3}}(?:correct|right|clear|helpful|wrong|incorrect|useful|based|as\sfollows)\b )
    | ^\W{{0,6}}(?:(?:final|correct)\s)?answer\s{{0,3}}\n
    | (?:答案|正确选项|正确的选项)\s?(?:应该?)?[是为选]?\s?:?
    """
)
# Statements that hold their letters.
_END = (
    r"(?=\s{0,3}(?:$|[.,;:!)\n])"
    r"|\s{1,3}(?:because|since|as\sthe\s(?:answer|correct|right|best))\b)"
)
_NAMED = tuple(
    re.compile(pattern)
    for pattern in (
        r"(?im:\b(?:choose|select|pick|mark|chose|picked|selected|go\swith|going\swith|opt\sfor)"
        rf"\s{{1,3}}(?:the\s)?(?:(?:option|choice|answer|letter)\s{{1,3}})?){_RUN}{_END}",
        r"(?i:\b(?:is|be|i\.e\.,?|namely,?|corresponds?\sto|matches|gives|means|so|thus|hence"
        rf"|therefore)\s{{1,3}}(?:the\s)?(?:option|choice|answer)\s{{1,3}}){_RUN}{_END}",
        rf"(?im:^\W{{0,6}}(?:final\s)?answer\s{{1,3}}){_RUN}{_END}",
        r"(?im:(?:^|(?<=[.!?]\s))(?:(?:so|thus|hence|therefore|then|actually|no),?\s)?"
        rf"it(?:\sis|['’]s|\smust\sbe)\s(?:(?:option|choice)\s)?){_RUN}{_END}",
        rf"{_RUN}(?:(?!\b(?:is|are|was|not|and|or|but|if)\b|\b[A-Z]\b)[^.!?\n]){{0,40}}"
        r"\s(?i:(?:is|are)\s(?:both\s|all\s|indeed\s|clearly\s|therefore\s|thus\s)?"
        r"(?:(?:the|my)\s)?(?:only\s)?(?:final\s|best\s)?(?:answer|choice"
        r"|(?:correct|right)(?:(?=\s{0,3}(?:$|[.,;:!)\n]))"
        rf"|\s(?:answers?|because|since|as|here|{_KIND})\b)))",
        rf"(?<!不)(?<!不能)选[择项]?\s?:?\s?{_RUN}{_FOLLOWED}",
        rf"{_RUN}\s?项?是?(?:正确|对的)",
    )
)
# Text before an announcement in its sentence that supposes it, denies it or calls it wrong.
_UNSTATED = re.compile(
    r"(?i)(?:\b(?:if|suppose|assum\w+|whether|unless|wrong|incorrect|none|neither|nor|hope|cannot"
    r"|not|never|no(?!\sdoubt)|which\s(?:of|choice|option|one|answer|letter))\b|n['’]t\b|不是|错误)"
    r"[^,;:]{0,60}$|\b(?:could|might|may)\s{0,3}$"
)
_NEGATED = re.compile(
    r"(?i)\b(?:not|cannot|never|neither|nor|none|no|unable|unclear|wrong|incorrect|whether|if|either"
    r"|could|might|may|rather\sthan|instead\sof|unlike|except)\b|n['’]t\b"
)
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)|\n")
_CLAUSE = re.compile(r"[,;]\s|\s(?=(?:rather than|instead of|not|but|because|since)\b)")
_CHATTER = re.compile(
    r"(?i)\W*(?:I\shope|hope\sth|let\sme\sknow|feel\sfree|if\syou|please\s(?:let|ask|feel)|thank"
    r"|good\sluck|happy\sto|glad\sto|希望|如有|如果[你您])"
)


def answer_part(response: str) -> str:
    """Returns the text after the reasoning, or the last <answer> there if there is one."""
    spoken = after_reasoning(response)
    _, mark, answer = spoken.rpartition("<answer>")
    return (answer.partition("</answer>")[0] if mark else spoken).strip()


def plain(answer: str) -> str:
    """Removes emphasis, quotes, math delimiters and text commands."""
    answer = _DEGREES.sub(r"^{\\circ}", tidy(answer.replace("**", " ")))
    answer = _TEXT_COMMAND.sub(r"\1", answer).strip(_QUOTES)
    return _ANGLED.sub(r"\1", answer).strip()


def same_text(a: str, b: str) -> bool:
    """Compares two short answers as text, ignoring case, spaces and decoration, or as numbers."""
    a, b = plain(a), plain(b)
    if not a or not b:
        return False
    if squeeze(a).casefold() == squeeze(b).casefold():
        return True
    value = exact_number(a)
    return value is not None and value == exact_number(b)


def chosen(response: str, options: Mapping[str, str]) -> str | None:
    """Returns the letter of the option that a response chooses, by letter or by the option's text.

    Args:
      response: the whole response.
      options: letter → text; if empty, the options are unknown and any letter is one.
    """
    found = statement(response)
    return option_meant(found[0], options, announced=found[1]) if found else None


def statement(response: str) -> tuple[str, bool] | None:
    """Returns (the statement of a response, whether it is announced); None if it states nothing.

    The statement begins with the answer; sentences may follow it.
    """
    part = answer_part(response)
    boxed, after = _box(part)
    announced = _announcement(_without_lists(_clean(after[-_LONGEST_RESPONSE:])))
    if boxed is not None and (announced is None or letters_of(announced, True) is None):
        return boxed[:_LONGEST], True
    if announced is not None:
        return announced[:_LONGEST], True
    last = _last_line(_without_lists(_clean(after[-_LONGEST_RESPONSE:])))
    return (last, False) if last else None


def _box(text: str) -> tuple[str | None, str]:
    """Returns (the last box's content, the text after it), or (None, the text)."""
    boxed = boxed_answer(text)
    if boxed is None:
        return None, text
    behind = text[max(text.rfind("\\boxed"), text.rfind("\\fbox")) :].partition("}")[2]
    return boxed, behind


def _clean(text: str) -> str:
    text = text.translate(_WIDE)
    for _ in range(2):  # \text{\textbf{B}}
        text = _TEXT_COMMAND.sub(r"\1", text)
    return _EMPHASIS.sub(r"\1", _MARKUP.sub("", _QUOTED_LETTER.sub(r"\1", text)))


def _announcement(text: str) -> str | None:
    """Returns the last announced statement, from its answer on."""
    found = [(m.end(), m) for m in _ANNOUNCED.finditer(text)]
    found += [(m.start("run"), m) for pattern in _NAMED for m in pattern.finditer(text)]
    for start, match in sorted(found, key=lambda one: one[0], reverse=True)[:_MOST]:
        if not _is_stated(text, match):
            continue
        if "run" in match.re.groupindex:
            return match["run"]
        return text[start:].lstrip(" \t\n:*-")[:_LONGEST].partition("\n")[0]
    return None


def _is_stated(text: str, match: re.Match) -> bool:
    """Whether an announcement is not a question, not supposed and not denied."""
    before = _SENTENCE_END.split(text[max(0, match.start() - 200) : match.start()])[-1]
    end = _SENTENCE_END.search(text, max(match.end() - 1, match.start()))
    asked = end is not None and end[0] == "?" and not match[0].rstrip().endswith(":")
    return not asked and not _UNSTATED.search(before)


def _last_line(text: str) -> str:
    """Returns the last line without friendly phrases; empty if it is too long."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    while lines and _CHATTER.match(lines[-1]):
        lines.pop()
    return lines[-1] if lines and len(lines[-1]) <= _LONGEST else ""


# Options listed again: marks in order, each with its text.

_LISTED = re.compile(r"(?:^|(?<=[\s;,]))(?:\(([A-Z])\)|([A-Z])[.:)])(?=\s{0,9}\S)", re.MULTILINE)
_REASON = re.compile(r"(?i)\b(?:because|since|is|are|not|but|so|while|and|or|if|then)\b")


def _without_lists(text: str) -> str:
    """Removes lists of options."""
    kept, position = [], 0
    for start, end in _lists(text):
        kept.append(text[position:start])
        position = end
    return "\n".join([*kept, text[position:]]) if position else text


def _lists(text: str) -> list[tuple[int, int]]:
    """Returns (start, end) of each list of two or more options."""
    runs: list[list[re.Match]] = []
    for mark in _LISTED.finditer(text):
        letter = mark[1] or mark[2]
        if letter == "A":
            runs.append([mark])
        elif runs and ord(letter) == 65 + len(runs[-1]) and _lists_on(text, runs[-1][-1], mark):
            runs[-1].append(mark)
    return [(run[0].start(), _line_end(text, run[-1].end())) for run in runs if len(run) > 1]


def _lists_on(text: str, mark: re.Match, following: re.Match) -> bool:
    """Whether the text between two marks is the text of an option."""
    between = text[mark.end() : following.start()]
    lines = all(not text[: m.start()].rpartition("\n")[2].strip() for m in (mark, following))
    words = re.search(r"\w", between) is not None and len(between) <= 300
    return words and (lines or _REASON.search(between) is None)


def _line_end(text: str, start: int) -> int:
    end = _SENTENCE_END.search(text, start)
    return end.end() if end else len(text)


# The meaning of a statement


def letters_of(text: str, announced: bool) -> frozenset[str] | None:
    """Returns the letters at the start of a statement; an empty set if it leaves them open.

    Returns None if it begins with no letter. Without an announcement, only text separated from the
    letter may follow it.
    """
    text = _RATHER.sub("", _clean(text), count=1)
    match = _LEADING.match(text)
    if match is None or not (announced or _stands_apart(match, text[match.end() :])):
        return None
    if _OPEN.search(match["run"]):
        return frozenset()
    return frozenset(letter.upper() for letter in _LETTER.findall(_words_left_out(match["run"])))


def _words_left_out(run: str) -> str:
    return re.sub(r"\b(?:and|options?|choices?)\b", " ", run)


def _stands_apart(match: re.Match, rest: str) -> bool:
    if rest.lstrip()[:1] == "?" or _NEGATED.search(match[0]):
        return False
    if match["run"].islower() and match.start("run") > 0:  # a truncated word
        return False
    bracketed = match["run"][-1] in ")]}>"
    return (
        bracketed or not re.match(r"\s{0,3}[^\s.:,;!-]", rest) or _BECAUSE.match(rest) is not None
    )


_BECAUSE = re.compile(r"\s{1,3}(?:because|since)\b")


def option_meant(text: str, options: Mapping[str, str], *, announced: bool = True) -> str | None:
    """Returns the letter of the option that a statement means; None if it means none or several."""
    words = text.strip().removesuffix(".")
    verbatim = [c for c, option in options.items() if option.strip() == words]
    if len(verbatim) == 1 and len(words) > 1:  # "(b)" may be the text of option C
        return verbatim[0]
    letters = letters_of(text, announced)
    if letters is None and not announced:
        letters = letters_of(_the_sentence(text, announced), announced)
    if letters is not None:
        letter = _only(sorted(letters))
        return letter if letter and (not options or letter in options) else None
    return _by_text(text, announced, options)


def _by_text(text: str, announced: bool, options: Mapping[str, str]) -> str | None:
    sentence = _the_sentence(text, announced)
    wholes = dict.fromkeys((text, sentence, _CLAUSE.split(sentence)[0]))
    for whole in map(plain, wholes):
        same = [c for c, option in options.items() if same_text(option, whole)]
        if same:
            return same[0]  # the first of options with equal text; the verifier compares texts
        labelled = re.fullmatch(r"([A-Z])\s+(\S.*)", whole)
        if labelled and same_text(options.get(labelled[1], ""), labelled[2]):
            return labelled[1]
        numbered = _with_quantity(whole, options)
        if numbered:
            return _only(numbered)
    if sentence.endswith("?"):
        return None
    found = _contained(sentence, options)
    if len(found) != 1:
        found = [c for clause in _CLAUSE.split(sentence) for c in _contained(clause, options)]
    return _only(list(dict.fromkeys(found)))


def _the_sentence(text: str, announced: bool) -> str:
    """Returns the first sentence of an announcement; else the last that is not just friendly."""
    sentences = re.split(r"(?<=[.!?])\s+", text.strip())
    if announced:
        return sentences[0]
    return next((s for s in reversed(sentences) if not _CHATTER.match(s)), "")


def _only(letters: Sequence[str]) -> str | None:
    return letters[0] if len(letters) == 1 else None


def _with_quantity(text: str, options: Mapping[str, str]) -> list[str]:
    """Returns the options with the value of an answer; units must agree or be left out."""
    value = _quantity(text)
    return [c for c, option in options.items() if value and _agree(_quantity(option), value)]


def _quantity(text: str) -> tuple | None:
    """Returns (value, dimensions, factor, sign) of a number with its unit, if the unit is known."""
    text = named_value(plain(text))[1]
    signed = _SIGNED.fullmatch(text)
    if signed:
        value, sign = exact_number(signed[1]), "%" if signed[2] else "°"
        return None if value is None else (value, None, 1, sign)
    number, unit = _UNIT_AT_END.fullmatch(text).groups(default="")
    value, known = exact_number(number), quantities.read_unit(unit) if unit else ((), 1)
    if value is None or (known is None and len(unit) == 1):  # 3P is a product
        return None
    return (value, *(known or (None, 1)), unit.casefold())


_SIGNED = re.compile(
    r"(?i)(.*\d)\s*(?:(\\?%|percent)|(?:\^\s*\{?\s*\\circ\s*\}?|\\degree|degrees?))"
)
_UNIT_AT_END = re.compile(r"(.*?)\s*((?<![A-Za-z\\{])[A-Za-z]+(?:\^\{?[23]\}?)?)?", re.DOTALL)


def _agree(one: tuple | None, other: tuple) -> bool:
    """Whether two quantities are equal; one may lack its unit."""
    if one is None:
        return False
    if () in (one[1], other[1]):
        return one[0] == other[0]
    if None in (one[1], other[1]):
        return one[0] == other[0] and one[3] == other[3]
    return one[1] == other[1] and one[0] * one[2] == other[0] * other[2]


def _contained(text: str, options: Mapping[str, str]) -> list[str]:
    """Returns the options whose text occurs in an answer as words, not denied; longest first."""
    text, found = plain(text).casefold(), []
    for letter, option in sorted(options.items(), key=lambda one: -len(plain(one[1]))):
        words = plain(option).casefold()
        match = re.search(rf"(?<![\w.]){re.escape(words)}(?!\w|\.\d)", text) if words else None
        if match is None or len(words) < 2 or _in_formula(text, match):
            continue
        text = text[: match.start()] + " # " + text[match.end() :]
        found.append(letter)
    return [] if _NEGATED.search(text) else found


def _in_formula(text: str, match: re.Match) -> bool:
    """Whether the text next to a match makes it part of a formula."""
    before, after = text[: match.start()].rstrip()[-1:], text[match.end() :].lstrip()[:1]
    return bool(before and before in "+-*/^_{\\<>(") or bool(after and after in "+-*/^_}\\<>=")
