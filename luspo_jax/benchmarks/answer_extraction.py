"""The answer that a response to a benchmark's question ends on: an option, a set, a number, text.

A response that was cut off inside its reasoning has no answer. What is announced ("Answer:",
`\\boxed{…}`, "the correct option is") comes before what merely stands last.
"""

import json
import re
import string
from collections.abc import Mapping, Sequence
from fractions import Fraction

from luspo_jax.rewards.extraction import final_answer
from luspo_jax.rewards.latex import named_value, squeeze, tidy
from luspo_jax.rewards.plain_numbers import exact_number

_SHORT = 200  # characters; a response of one line this short is its own answer
_LONGEST = 2_000  # characters of a line, or of an announced answer, that is looked into
_SHORT_RESPONSE = 200  # characters up to which a response need not end with a full stop
_TEXT_COMMAND = re.compile(r"\\text\s*\{([^{}]*)\}")
_DEGREES = re.compile(r"\^\s*\\circ(?![a-zA-Z])")
_ANGLED = re.compile(r"^<+([^<>]*)>+$")  # <<B>>, as We-Math's prompt writes it
_QUOTES = "\"'“”‘’`*_ "


def answer_part(response: str) -> str:
    """What speaks to the reader: the last <answer>, or what follows </think>.

    Empty where reasoning was begun and not ended.
    """
    end = response.rfind("</answer>")
    start = response.rfind("<answer>", 0, end) if end >= 0 else -1
    if start >= 0:
        return response[start + len("<answer>") : end].strip()
    if "</think>" in response:
        return response.rpartition("</think>")[2].strip()
    return "" if "<think>" in response else response.strip()


def plain(answer: str) -> str:
    """An answer without emphasis, quotes, math delimiters and text commands."""
    answer = _DEGREES.sub(r"^{\\circ}", tidy(answer.replace("**", " ")))
    answer = _TEXT_COMMAND.sub(r"\1", answer).strip(_QUOTES)
    return _ANGLED.sub(r"\1", answer).strip()


def same_text(a: str, b: str) -> bool:
    """Whether two short answers read the same: case, spaces and decoration aside; or as numbers."""
    a, b = plain(a), plain(b)
    if squeeze(a).casefold() == squeeze(b).casefold():
        return True
    value = exact_number(a)
    return value is not None and value == exact_number(b)


def stated_answer(response: str) -> str | None:
    """The answer a response states in words or a formula; None where it states none."""
    part = answer_part(response)
    announced = final_answer(part)
    if announced:
        return announced
    return part if plain(part) and "\n" not in part and len(part) <= _SHORT else None


def json_field(response: str, name: str) -> str | None:
    """The last value of a field in JSON that a response holds, be it well-formed or not."""
    pattern = re.compile(rf'"{re.escape(name)}"\s*:\s*("(?:[^"\\\n]|\\.)*"|[^",}}\]\s]+)')
    values = pattern.findall(answer_part(response))
    if not values:
        return None
    try:
        value = json.loads(values[-1], strict=False)
    except ValueError:  # LaTeX with single backslashes, or True for true
        value = values[-1].strip('"')
    return None if value is None else str(value).strip()


# Options


def lettered(choices: Sequence[str]) -> dict[str, str]:
    """Letter → option, in order from A."""
    return dict(zip(string.ascii_uppercase, map(str, choices), strict=False))


def labelled_options(text: str) -> dict[str, str]:
    """Letter → option of a text such as `Choices: (A) yes (B) no` or `A. 1 cm; B. 2 cm`.

    Letters are looked for in their order, so that a stray "C." in option A does no harm to the
    letters that follow. Fewer than two are none.
    """
    marks = []
    position = 0
    for letter in string.ascii_uppercase:
        mark = re.compile(rf"(?:^|[\s;,])(?:\({letter}\)|{letter}\s*[.:)．：])").search(
            text, position
        )
        if mark is None:
            break
        marks.append((letter, mark.start(), mark.end()))
        position = mark.end()
    ends = [*(start for _, start, _ in marks[1:]), *[len(text)][: len(marks)]]
    options = {
        letter: text[start:end].strip(" \t\n;,")
        for (letter, _, start), end in zip(marks, ends, strict=True)
    }
    return options if len(options) > 1 else {}


_LETTER_ALONE = re.compile(
    r"(?i)(?:(?:option|choice|answer)\s*:?\s*)?[(\[{]?\s*([a-z])\s*[)\]}]?[.:]?"
)
_LEADING_LETTER = re.compile(
    r"(?:(?i:option|choice)\s+)?(?:\(([A-Z])\)|([A-Z])\s*[.:)]|(?i:option|choice)\s+([A-Z])\b)\s*\S.*",
    re.DOTALL,
)
_LETTER_AND_TEXT = re.compile(r"([A-Z])\s+(\S.*)", re.DOTALL)
_NUMBER_AND_UNIT = re.compile(r"([+-]?(?:\d[\d,]*(?:\.\d+)?|\.\d+))\s*((?:[^\d\s].*)?)", re.DOTALL)
# "A" and "I" are words too.
_LETTER = r"(?:[B-HJ-Z]|A(?!\s+[a-z])|A(?=\s+(?:is|was|because|since|as|and)\b))(?![\w'])"
# Repetitions are bounded, and white space belongs to one of them only: a hostile text must cost no
# more than a long one.
_ONE = rf"[*(\[{{$]{{0,6}}{_LETTER}[*)\]}}$]{{0,6}}"
_RUN = (
    rf"({_ONE}(?:(?:\s{{0,4}}[,;&]\s{{0,4}}(?:and\s{{1,4}})?|\s{{1,4}}and\s{{1,4}}){_ONE}){{0,12}})"
)
_ANNOUNCED = re.compile(
    r"(?i:\b(?:answers?|options?|choices?|select|choose)\b"
    r"(?:\s{1,4}(?:is|are|must\s+be|should\s+be|would\s+be))?\s{0,4}:?\s{0,4}(?:(?:options?|choices?)\s+)?)"
    + _RUN
)
_CONFIRMED = re.compile(
    _RUN + r"\s{1,4}(?i:is|are)\s{1,4}(?i:the\s{1,4})?(?i:correct|right|answer)"
)
_CAPITAL = re.compile(r"(?<![\w\\])[A-Z](?!\w)")


def chosen(response: str, options: Mapping[str, str]) -> str | None:
    """The letter of the option that a response chooses, by letter or by the option's text.

    Args:
      response: the whole response.
      options: letter → text; empty where they are unknown, and any letter is one.
    """
    part = answer_part(response)
    stated = final_answer(part)
    letter = option_meant(stated, options) if stated else None
    if letter is not None:
        return letter
    announced = announced_letters(part)
    if announced is not None and len(announced) == 1 and _is_option(min(announced), options):
        return min(announced)
    last = _last_line(part)
    return option_meant(last, options) if last else None


def announced_letters(text: str) -> frozenset[str] | None:
    """The letters after the last "the correct option is", or before "is correct"."""
    found = [*_ANNOUNCED.finditer(text), *_CONFIRMED.finditer(text)]
    if not found:
        return None
    return frozenset(_CAPITAL.findall(max(found, key=lambda match: match.end())[1])) or None


def option_meant(answer: str, options: Mapping[str, str]) -> str | None:
    """The letter of the option that a short answer means; None where it means none, or several."""
    verbatim = [c for c, option in options.items() if option.strip() == answer.strip()]
    if len(verbatim) == 1 and len(answer.strip()) > 1:  # "(b)" may be the text of option C
        return verbatim[0]
    text = plain(answer)
    alone = _LETTER_ALONE.fullmatch(text)
    if alone and _is_option(alone[1].upper(), options):
        return alone[1].upper()
    by_text = [letter for letter, option in options.items() if same_text(option, text)]
    if by_text:
        return by_text[0]  # of options with one text, the first; whoever scores compares texts
    leading = _LEADING_LETTER.fullmatch(text)
    letter = next(filter(None, leading.groups()), None) if leading else None
    if letter and _is_option(letter, options):
        return letter
    spaced = _LETTER_AND_TEXT.fullmatch(text)
    if spaced and spaced[1] in options and same_text(options[spaced[1]], spaced[2]):
        return spaced[1]
    return (
        _only(_with_number(text, options))
        or _only(_contained(text, options))
        or (_only([c for c in set(re.findall(r"\(([A-Z])\)", text)) if _is_option(c, options)]))
    )


def _is_option(letter: str, options: Mapping[str, str]) -> bool:
    return not options or letter in options


def _only(letters: Sequence[str]) -> str | None:
    return letters[0] if len(letters) == 1 else None


def _with_number(text: str, options: Mapping[str, str]) -> list[str]:
    """Options with the number of an answer, whose units agree or are left out."""
    value = number_and_unit(text)
    if value is None:
        return []
    found = []
    for letter, option in options.items():
        other = number_and_unit(option)
        if (
            other
            and other[0] == value[0]
            and (not other[1] or not value[1] or other[1] == value[1])
        ):
            found.append(letter)
    return found


def _contained(text: str, options: Mapping[str, str]) -> list[str]:
    """Options whose text stands in an answer as words, and in no longer option found there."""
    found = {}
    for letter, option in options.items():
        words = plain(option).casefold()
        pattern = rf"(?<![\w.]){re.escape(words)}(?!\w|\.\d)"
        if len(words) > 1 and re.search(pattern, text.casefold()):
            found[letter] = words
    return [
        letter
        for letter, words in found.items()
        if not any(words != other and words in other for other in found.values())
    ]


_FILLER = re.compile(
    r"(?i)\b(?:options?|choices?|answers?|letters?|figures?|images?|box|boxes|the|is|are|both)\b"
)
_SEPARATOR = re.compile(r"[\s,;&/()\[\]{}.:*$\\]+|\band\b")
_LABEL = re.compile(r"[A-Za-z]|\d{1,2}")


def labels_in(answer: str) -> frozenset[str] | None:
    """The labels of an answer that is nothing but labels: `B`, `(a), (c)`, `A and C`, `BD`, `3`.

    Of an answer that begins with one, as in `B. because …`, that one.
    """
    text = plain(answer)
    if re.search(r"\d\.\d", text):
        return None
    labels = [label for label in _SEPARATOR.split(_FILLER.sub(" ", text)) if label]
    if labels and all(_LABEL.fullmatch(label) for label in labels):
        return frozenset(label.upper() for label in labels)
    joined = labels[0] if len(labels) == 1 else ""
    if (
        joined.isascii()
        and joined.isalpha()
        and joined.isupper()
        and len(set(joined)) == len(joined)
    ):
        return frozenset(joined)
    leading = _LEADING_LETTER.fullmatch(text)
    return frozenset(filter(None, leading.groups())) if leading else None


def chosen_labels(response: str) -> frozenset[str] | None:
    """All labels that a response chooses; None where it chooses none."""
    part = answer_part(response)
    stated = final_answer(part)
    labels = labels_in(stated) if stated else None
    labels = labels or announced_letters(part)
    if labels is None and len(part) <= _SHORT:
        labels = labels_in(part)
    last = _last_line(part)
    return labels or (labels_in(last) if last else None)


def _last_line(text: str) -> str:
    """The last line with anything in it; nothing where it is too long to be an answer."""
    line = text.strip().rpartition("\n")[2].strip()
    return line if len(line) <= _LONGEST else ""


# Numbers

_LONGEST_NUMBER = 400  # characters
_ABOUT = re.compile(r"(?i)^(?:about|approximately|approx\.?|roughly|around|\\approx|≈|~|=)\s*")
_CURRENCY = re.compile(r"^([+-]?)\s*\\?[$€£¥]\s*")
_POWER = re.compile(
    r"([+-]?\d+(?:\.\d+)?)\s*(?:[eE]|(?:\\times|\*)\s*10\s*\^\s*\{?\s*)([+-]?\d{1,2})\s*\}?"
)
_NUMERAL = re.compile(r"(?<![\w.])[+-]?(?:\d[\d,]{0,40}(?:\.\d{1,40})?|\.\d{1,40})(?![\w]|\.\d)")
_SENTENCE = re.compile(r"(?<=[.!?])\s+")
_CLAUSE_END = re.compile(r"[,;]\s|\s(?:which|so|because)\b")
_VERB = re.compile(r"(?:\b(?:is|are|was|were|equals|be)\b|[=≈:])\s*")


def number_and_unit(answer: str) -> tuple[Fraction, str] | None:
    """(value, unit without spaces) of an answer such as `5`, `x = 5 cm`, `about $1,200`, `25%`."""
    if len(answer) > _LONGEST_NUMBER:
        return None
    text = named_value(plain(answer))[1]
    text = _CURRENCY.sub(r"\1", _ABOUT.sub("", text)).replace("\\%", "%")
    value = exact_number(text)
    if value is not None:
        return value, ""
    power = _POWER.fullmatch(text)
    if power:
        return Fraction(power[1]) * Fraction(10) ** int(power[2]), ""
    match = _NUMBER_AND_UNIT.fullmatch(text)
    if match is None or re.search(r"\d", re.sub(r"\^\{?[23]\}?", "", match[2])):
        return None
    value = exact_number(match[1])
    return None if value is None else (value, squeeze(match[2]).casefold())


def stated_number(response: str) -> tuple[str, Fraction] | None:
    """(as written, value) of the number that a response states, its unit left out.

    Without an announcement it is that of the last sentence: what follows a verb, the later the
    better, or else the only number in it. A long response that breaks off states none.
    """
    stated = stated_answer(response)
    found = _numeral(stated) if stated else None
    if found or (stated and final_answer(answer_part(response))):
        return found
    part = answer_part(response)
    last = _last_line(part)
    if not last or (len(part) > _SHORT_RESPONSE and not re.search(r"[.!?)\]}$*°%]\s*$", part)):
        return None
    sentence = _SENTENCE.split(last)[-1]
    for verb in reversed(list(_VERB.finditer(sentence))):
        found = _numeral(_CLAUSE_END.split(sentence[verb.end() :])[0])
        if found:
            return found
    numerals = _NUMERAL.findall(plain(sentence))
    return _numeral(numerals[0]) if len(numerals) == 1 else None


def _numeral(answer: str) -> tuple[str, Fraction] | None:
    """(numeral, value) of an answer that is a number, or that holds exactly one."""
    value = number_and_unit(answer)
    numerals = _NUMERAL.findall(plain(answer))
    if value is not None:
        return (numerals[0] if len(numerals) == 1 else plain(answer)), value[0]
    if len(numerals) != 1 or "\\" in plain(answer):
        return None
    value = exact_number(numerals[0].rstrip(","))
    return None if value is None else (numerals[0], value)


def numbers_in(answer: str) -> list[Fraction]:
    """The plain numbers in a text, in their order."""
    numerals = re.findall(r"(?<![\w.])[+-]?(?:\d{1,40}(?:\.\d{1,40})?|\.\d{1,40})", answer)
    return [Fraction(numeral) for numeral in numerals]
