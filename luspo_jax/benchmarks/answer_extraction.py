"""Extraction of the answer a response ends on: an option, a set, a number or text.

A response truncated inside its reasoning has no answer. An announced answer ("Answer:",
`\\boxed{…}`, "the correct option is") takes precedence over one that merely comes last.
"""

import json
import re
import string
from collections.abc import Collection, Mapping, Sequence
from fractions import Fraction

from luspo_jax.benchmarks.free_form import OneOf
from luspo_jax.rewards.answers.choices import (
    answer_part,
    chosen,
    letters_of,
    plain,
    same_text,
    statement,
)
from luspo_jax.rewards.answers.extraction import final_answer
from luspo_jax.rewards.answers.latex import is_running_text, named_value, squeeze
from luspo_jax.rewards.answers.plain_numbers import exact_number
from luspo_jax.rewards.answers.words import spelled

_SHORT = 200  # characters; a one-line response this short is its own answer
_LONGEST = 2_000  # characters of a line or announced answer that is examined
_SHORT_RESPONSE = 200  # characters; a response this short need not end with a full stop


def stated_answer(response: str) -> str | None:
    """Returns the answer a response states in words or a formula; None if it states none."""
    part = answer_part(response)
    announced = final_answer(part)
    if announced:
        return announced
    return part if plain(part) and "\n" not in part and len(part) <= _SHORT else None


def json_field(response: str, name: str) -> str | None:
    """Returns the last value of a field in a response's JSON, well-formed or not."""
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
    """Maps letters to options, in order from A."""
    return dict(zip(string.ascii_uppercase, map(str, choices), strict=False))


def labelled_options(text: str) -> dict[str, str]:
    """Maps letters to options in a text such as `Choices: (A) yes (B) no` or `A. 1 cm; B. 2 cm`.

    Letters are searched for in order, so that a stray "C." in option A does not affect later
    letters. Fewer than two options count as none.
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


_FILLER = re.compile(
    r"(?i)\b(?:options?|choices?|answers?|letters?|figures?|images?|box|boxes|the|is|are|both)\b"
)
_SEPARATOR = re.compile(r"[\s,;&/()\[\]{}.:*$\\]+|\band\b")
_LABELS = re.compile(r"[A-Za-z]"), re.compile(r"\d{1,2}")  # never both


def labels_in(answer: str) -> frozenset[str] | None:
    """Returns the labels of an answer of labels alone: `B`, `(a), (c)`, `A and C`, `BD`, `3`."""
    text = plain(answer)
    if re.search(r"\d\.\d", text):
        return None
    labels = [label for label in _SEPARATOR.split(_FILLER.sub(" ", text)) if label]
    if any(all(kind.fullmatch(label) for label in labels) for kind in _LABELS if labels):
        return frozenset(label.upper() for label in labels)
    joined = labels[0] if len(labels) == 1 else ""
    apart = len(set(joined)) == len(joined) > 0
    return frozenset(joined) if apart and set(joined) <= set("ABCDEFGH") else None


def chosen_labels(response: str) -> frozenset[str] | None:
    """Returns all labels that a response chooses; None if it chooses none or leaves them open."""
    part, found = answer_part(response), statement(response)
    if found is None:
        return None
    alone = (labels_in(text) for text in (part, found[0]) if len(text) <= _SHORT)
    return next((labels for labels in alone if labels), None) or letters_of(*found) or None


def option_read(
    response: str, options: Mapping[str, str], right: Collection[str]
) -> tuple[bool | OneOf, str | None]:
    """Returns (verdict, letter) of a response to a question with one or more right options.

    If it states a formula that does not match an option literally, the math verifier decides.
    """
    letter = chosen(response, options)
    if letter is None:
        return _option_by_value(response, options, right), None
    same = letter in options and any(
        same_text(options[letter], options[one]) for one in right if one in options
    )
    return letter in right or same, letter


def _option_by_value(response: str, options, right: Collection[str]) -> bool | OneOf:
    found = statement(response)
    if found is None or not found[1] or letters_of(*found) is not None:
        return False
    formula = plain(_SENTENCE.split(found[0])[0])
    formulas = tuple((c, option) for c, option in options.items() if _is_formula(option))
    if not formulas or not _is_formula(formula):
        return False
    return OneOf(formula, formulas, frozenset(right))


def _is_formula(text: str) -> bool:
    short = len(text) <= _SHORT and not is_running_text(text)
    return short and re.search(r"\d|\\[a-z]|[=^+*/]", text) is not None


def _last_line(text: str) -> str:
    """Returns the last non-empty line; empty if it is too long to be an answer."""
    line = text.strip().rpartition("\n")[2].strip()
    return line if len(line) <= _LONGEST else ""


# Numbers

_NUMBER_AND_UNIT = re.compile(r"([+-]?(?:\d[\d,]*(?:\.\d+)?|\.\d+))\s*((?:[^\d\s].*)?)", re.DOTALL)
_LONGEST_NUMBER = 400  # characters
_ABOUT = re.compile(r"(?i)^(?:about|approximately|approx\.?|roughly|around|\\approx|≈|~|=)\s*")
_ORDINAL = re.compile(r"(?i)st|nd|rd|th|:.*")
_CURRENCY = re.compile(r"^([+-]?)\s*\\?[$€£¥]\s*")
_POWER = re.compile(
    r"([+-]?\d+(?:\.\d+)?)\s*(?:[eE]|(?:\\times|\*)\s*10\s*\^\s*\{?\s*)([+-]?\d{1,2})\s*\}?"
)
# Not a term of a ratio or a time, nor the argument of a function.
_NUMERAL = re.compile(
    r"(?<![\w.])(?<!\d:)(?<![A-Za-z]\()[+-]?(?:\d[\d,]{0,40}(?:\.\d{1,40})?|\.\d{1,40})(?!\w|\.\d|:\d)"
)
_BOUND = re.compile(
    rf"(?i)\b(?:than|above|below|exceeding)\s(?:or\sequal\sto\s)?{_NUMERAL.pattern}"
)
_WHOLE_POWER = re.compile(r"(-?)(\d{1,9})\s*\^\s*(?:\{\s*(\d{1,2})\s*\}|(\d{1,2}))")
_WORD = re.compile(r"(?<![\\\w])[A-Za-z]{3,9}(?:-[a-z]{3,5})?(?![\w-])")
_NOT_COUNTED = re.compile(r"(?i)(?<!\bis )(?<!\bare )(?<!: )(?<!^)\bone\b|\bone\sof\b")
_SENTENCE = re.compile(r"(?<=[.!?])\s+")
_CLAUSE_END = re.compile(r"[,;]\s|\s(?:which|so|because)\b")
_CLAUSE = re.compile(r"[,;]\s|\s(?=(?:but|not|rather than|instead of|unlike)\b)")
_DENIED = re.compile(
    r"(?i)\b(?:not|cannot|never|neither|nor|whether|rather\sthan|instead\sof|unlike)\b|n['’]t\b"
)
_VERB = re.compile(r"(?:\b(?:is|are|was|were|equals|be)\b|[=≈]|(?<!\d):|:(?!\d))\s*")


def number_and_unit(answer: str) -> tuple[Fraction, str] | None:
    """Reads (value, unit without spaces) of answers like `5`, `x = 5 cm`, `about $1,200`, `25%`."""
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
    power = _WHOLE_POWER.fullmatch(text)
    if power:
        value = int(power[2]) ** int(power[3] or power[4])
        return Fraction(-value if power[1] else value), ""
    match = _NUMBER_AND_UNIT.fullmatch(text)
    if (
        match is None
        or _ORDINAL.fullmatch(match[2])
        or re.search(r"\d", re.sub(r"\^\{?[23]\}?", "", match[2]))
    ):
        return None
    value = exact_number(match[1])
    return None if value is None else (value, squeeze(match[2]).casefold())


def digits_for_words(text: str) -> str:
    """Replaces number words by digits, as in `two` or `twenty-one`."""

    def digits(match: re.Match) -> str:
        value = None if _NOT_COUNTED.match(text, match.start()) else spelled(match[0])
        return match[0] if value is None else str(value)

    return _WORD.sub(digits, text)


def stated_number(response: str) -> tuple[str, Fraction] | None:
    """Returns (as written, value) of the number that a response states, without its unit.

    Without an announcement it is the number in the last sentence: one after a verb (the later the
    better), or else the only one. A long response that breaks off states none.
    """
    stated = stated_answer(response)
    found = _numeral(_not_denied(stated)) if stated and not stated.endswith("?") else None
    if found or (stated and final_answer(answer_part(response))):
        return found
    part = answer_part(response)
    last = _last_line(part)
    if not last or (len(part) > _SHORT_RESPONSE and not re.search(r"[.!?)\]}$*°%]\s*$", part)):
        return None
    sentence = _not_denied(_SENTENCE.split(last)[-1])
    if sentence.endswith("?"):
        return None
    for verb in reversed(list(_VERB.finditer(sentence))):
        found = _numeral(_CLAUSE_END.split(sentence[verb.end() :])[0])
        if found:
            return found
    text = _BOUND.sub("", plain(sentence))
    # A number inside a formula is not a number of the sentence.
    numerals = [] if re.search(r"\\[a-zA-Z]", text) else _NUMERAL.findall(text)
    return _numeral(numerals[0]) if len(numerals) == 1 else None


def free_form_answer(response: str, reference: str) -> str | None:
    """Returns the answer that a response states; of a sentence, the text after its verb.

    `The length is $2\\sqrt{3}$.` states the formula, as `The answer is …` would. A sentence equal
    to the reference states itself.
    """
    stated = stated_answer(response)
    if stated and (
        final_answer(answer_part(response))
        or not is_running_text(stated)
        or same_text(stated, plain(reference))
    ):
        return stated
    number = stated_number(response)
    if number or not stated:
        return number and number[0]
    sentence = _not_denied(_SENTENCE.split(stated)[-1]).removesuffix(".")
    verbs = list(_VERB.finditer(sentence))
    return sentence[verbs[-1].end() :] if verbs else stated


def _not_denied(text: str) -> str:
    """Removes the clauses that rule answers out."""
    if not _DENIED.search(text):
        return text
    return ", ".join(clause for clause in _CLAUSE.split(text) if not _DENIED.search(clause))


def _numeral(answer: str) -> tuple[str, Fraction] | None:
    """Returns (numeral, value) of an answer that is a number or contains exactly one."""
    value = number_and_unit(answer)
    numerals = _NUMERAL.findall(_BOUND.sub("", plain(answer)))
    if value is not None:
        return (numerals[0] if len(numerals) == 1 else plain(answer)), value[0]
    if len(numerals) != 1 or "\\" in plain(answer):
        return None
    value = exact_number(numerals[0].rstrip(","))
    return None if value is None else (numerals[0], value)


def numbers_in(answer: str) -> list[Fraction]:
    """Returns the plain numbers in a text, in order."""
    numerals = re.findall(r"(?<![\w.])[+-]?(?:\d{1,40}(?:\.\d{1,40})?|\.\d{1,40})", answer)
    return [Fraction(numeral) for numeral in numerals]
