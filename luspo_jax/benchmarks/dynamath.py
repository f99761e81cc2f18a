"""DynaMath: 501 questions, each in variants; average and worst case (arXiv:2411.00836).

A question counts in the worst case only if every variant of it is right.
"""

import collections
import dataclasses
import json
import math
import re
from collections.abc import Sequence

from luspo_jax.benchmarks.answer_extraction import (
    json_field,
    labelled_options,
    option_read,
    stated_answer,
    stated_number,
)
from luspo_jax.benchmarks.free_form import VERIFIER, OneOf, Pair
from luspo_jax.benchmarks.verdicts import Item, ItemVerdict, Line, Reading, VisualBenchmark, share
from luspo_jax.rewards.answers.choices import same_text

TOLERANCE = 0.001
VARIANTS = 10  # per question
_FIELD = "short answer"  # the JSON field that the benchmark's prompt asks for
_CHOICES = re.compile(r"(?i)\bchoices?\s*:")
_MONTHS = "january february march april may june july august september october november december"
_DAYS = "monday tuesday wednesday thursday friday saturday sunday"
_NAMES = {name[:3]: name for name in f"{_MONTHS} {_DAYS}".split()} | {"sept": "september"}
_CLOCK = re.compile(r"(\d{1,2}):(\d{1,2})")


def read(item: Item, response: str) -> Reading:
    """Reads a response according to the type of its answer."""
    kind = item.meta["answer_type"]
    if kind == "multiple choice":
        strict, extracted = _choice(item, response)
    else:
        extracted = json_field(response, _FIELD) or stated_answer(response)
        if extracted is None and kind != "text":
            extracted = (stated_number(response) or (None,))[0]
        strict = extracted is not None and (
            _same_name(item.answer, extracted) or Pair(item.answer, extracted, TOLERANCE)
        )
    return Reading(strict, kit_verdict(item.answer, kind, response, extracted), extracted)


_FORMS = {
    "multiple choice": "Provide the corresponding choice option, such as 'A', 'B', 'C', or 'D'.",
    "float": "Format the answer as a three-digit floating-point number.",
}
_TEXT_FORM = (
    "Float numbers in the answer should be formatted as three-digit floating-point numbers."
)


def question(item: Item) -> str:
    """Returns the authors' question and answer format, but without JSON."""
    return f"## Question\n{item.problem}\n{_FORMS.get(item.meta['answer_type'], _TEXT_FORM)}"


def _choice(item: Item, response: str) -> tuple[bool | OneOf, str | None]:
    mark = _CHOICES.search(item.problem)
    options = labelled_options(item.problem[mark.end() :]) if mark else {}
    gold = item.answer.strip().upper()
    options = options if gold in options else {}
    return option_read(json_field(response, _FIELD) or response, options, {gold})


def _same_name(gold: str, answer: str) -> bool:
    """Compares texts, with months and days written out and times in hours and minutes."""
    if same_text(gold, answer):
        return True
    times = _CLOCK.fullmatch(gold.strip()), _CLOCK.fullmatch(answer.strip())
    if None not in times:
        return [int(n) for n in times[0].groups()] == [int(n) for n in times[1].groups()]
    a, b = (text.strip().strip(".").casefold() for text in (gold, answer))
    return _NAMES.get(a, a) == _NAMES.get(b, b)


# VLMEvalKit's rule, vlmeval/dataset/dynamath.py at commit e8e78f05.


def kit_verdict(gold: str, kind: str, response: str, extracted: str | None) -> bool:
    """Applies `DynaMath_auxeval`, with our extracted answer in place of its judge's.

    Kept from it: a text answer is right if it is part of the reference, and so is an empty one; a
    letter is right if it occurs in the first three characters and no answer could be read.
    """
    text = _braced(response)
    short = _kit_json(text, kind)
    if short is None:
        short = _kit_parse(text, kind)
    if short is None:
        short = _kit_parse(extracted or "", kind)
    if kind == "float":
        return short is not None and abs(short - _kit_float(gold)) <= TOLERANCE
    if kind == "multiple choice":
        return gold in text[:3].upper() if short is None else short == gold
    return (short or "").lower() in gold.lower()


def _braced(response: str) -> str:
    """Returns the text from the first { to the last }, if any, without backslashes."""
    start, end = response.find("{"), response.rfind("}")
    return (response[start : end + 1] if 0 <= start < end else response).replace("\\", "")


def _kit_json(text: str, kind: str) -> float | str | None:
    try:
        answer = json.loads(text, strict=False)["short answer"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    # An unquoted number is not an answer to it.
    return _kit_parse(answer, kind) if isinstance(answer, str) else None


def _kit_parse(answer: str, kind: str) -> float | str | None:
    if kind == "float":
        return _kit_float(answer if answer.isdigit() else answer.split(" ")[0])
    if kind != "multiple choice":
        return answer
    if len(answer) == 1:
        return answer.upper()
    present = [letter for letter in "ABCDE" if letter in answer.upper()]
    return present[0] if len(present) == 1 else None


def _kit_float(text: str) -> float | None:
    before, pi, _ = text.partition("π")
    try:
        return float(before) * (math.pi if pi else 1.0)
    except ValueError:
        return None


# Figures


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One variant of one question: its groups, and whether its answer is right."""

    question: str
    subject: str
    level: str
    right: bool


def average(outcomes: Sequence[Outcome]) -> float | None:
    """Returns the share of right answers over questions and variants."""
    return share([outcome.right for outcome in outcomes])


def worst_case(outcomes: Sequence[Outcome]) -> float | None:
    """Returns the share of questions with every variant right."""
    rights: dict[str, bool] = {}
    for outcome in outcomes:
        rights[outcome.question] = rights.get(outcome.question, True) and outcome.right
    return share(list(rights.values()))


def caveats(items: Sequence[Item]) -> list[str]:
    """Returns caveats on the figures of these items."""
    counts = collections.Counter(str(item.meta["question_id"]) for item in items).values()
    if not counts or min(counts) == VARIANTS:
        return []
    span = str(min(counts)) if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
    return [
        f"the worst case is over {span} variants a question, not {VARIANTS}: the fewer, the easier"
    ]


FIGURES = {"average": average, "worst case": worst_case}


def lines(items: Sequence[Item], verdicts: Sequence[ItemVerdict]) -> list[Line]:
    """Computes average and worst case: overall, by subject, by level."""
    columns = [
        [_outcome(item, bool(right)) for item, right in zip(items, rights, strict=True)]
        for rights in ([v.strict for v in verdicts], [v.vlmevalkit for v in verdicts])
    ]
    found = []
    for figure in FIGURES:
        found += _by_group(figure, columns, "", lambda outcome: "all")
        found += _by_group(figure, columns, " by subject", lambda outcome: outcome.subject)
        found += _by_group(figure, columns, " by level", lambda outcome: outcome.level)
    return found


def _outcome(item: Item, right: bool) -> Outcome:
    subject, level = (" ".join(str(item.meta[name]).split()) for name in ("subject", "level"))
    return Outcome(str(item.meta["question_id"]), subject, level, right)


def _by_group(figure: str, columns: list, suffix: str, group) -> list[Line]:
    strict, kit = (collections.defaultdict(list), collections.defaultdict(list))
    for members, outcomes in zip((strict, kit), columns, strict=True):
        for outcome in outcomes:
            members[group(outcome)].append(outcome)
    value = FIGURES[figure]
    return [
        Line(figure + suffix, name, _behind(figure, found), value(found), value(kit[name]))
        for name, found in sorted(strict.items())
    ]


def _behind(figure: str, outcomes: Sequence[Outcome]) -> int:
    """Counts the outcomes, or questions, behind a figure."""
    return len({o.question for o in outcomes}) if figure == "worst case" else len(outcomes)


DYNAMATH = VisualBenchmark(
    id="dynamath",
    version=f"2+{VERIFIER}",
    read=read,
    lines=lines,
    question=question,
    note=(
        "its rule, with our extraction for its judge's: text is right where it is part of the "
        "reference, so an empty string or a single letter of it is"
    ),
    unit="question_id",
    caveats=caveats,
)
