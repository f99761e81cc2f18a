"""MathVista testmini: 1000 questions about figures, by task and skill (arXiv:2310.02255)."""

from fractions import Fraction

from luspo_jax.benchmarks.answer_extraction import (
    digits_for_words,
    lettered,
    numbers_in,
    option_read,
    stated_answer,
    stated_number,
)
from luspo_jax.benchmarks.free_form import VERIFIER
from luspo_jax.benchmarks.record import BenchmarkError
from luspo_jax.benchmarks.verdicts import Item, Reading, VisualBenchmark, accuracy
from luspo_jax.benchmarks.vlmevalkit import inferred_option
from luspo_jax.rewards.answers.choices import answer_part, same_text


def read(item: Item, response: str) -> Reading:
    """Reads a response, by the type of the question and of the answer."""
    if item.meta["question_type"] == "multi_choice":
        return _choice(item, response)
    readers = {"integer": _integer, "float": _float, "list": _list, "text": _text}
    kind = item.meta["answer_type"]
    if kind not in readers:
        raise BenchmarkError(
            f"mathvista, item {item.meta['id']}: answer_type {kind!r} is none of "
            f"{', '.join(readers)}"
        )
    return readers[kind](item, response)


def _choice(item: Item, response: str) -> Reading:
    options = lettered(item.meta["choices"] or ())
    right = [letter for letter, option in options.items() if same_text(option, item.answer)]
    if not right:
        raise BenchmarkError(
            f"mathvista, item {item.meta['id']}: answer {item.answer!r} is none of the choices"
        )
    strict, letter = option_read(response, options, right)
    inferred = inferred_option(response, options)
    if inferred is None:
        inferred = inferred_option(stated_answer(response) or "", options)
    return Reading(strict, inferred == right[0], letter)


def _integer(item: Item, response: str) -> Reading:
    gold, stated = _gold_number(item), stated_number(digits_for_words(response))
    if stated is None:
        return Reading(False, _as(int, response) == gold)
    numeral, value = stated
    kit = gold in (_as(int, response), _as(int, numeral))  # int("14.0") is an error
    return Reading(value == gold, kit, numeral)


def _float(item: Item, response: str) -> Reading:
    """Right if the number rounds to the reference at the question's precision."""
    gold, stated = _gold_number(item), stated_number(response)
    if stated is None:
        return Reading(False, _as(float, response) == float(gold))
    numeral, value = stated
    places = item.meta.get("precision")
    error = Fraction(1, 2 * 10 ** int(places)) if places is not None else Fraction(0)
    kit = float(gold) in (_as(float, response), _as(float, numeral))  # it does not round
    return Reading(abs(value - gold) <= error, kit, numeral)


def _list(item: Item, response: str) -> Reading:
    """Right if the numbers are the reference's, in order; VLMEvalKit reads "None"."""
    part = answer_part(response)
    start, end = part.rfind("["), part.rfind("]")
    stated = part[start : end + 1] if 0 <= start < end else stated_answer(response)
    if not stated or not numbers_in(stated):
        return Reading(False, False)
    return Reading(numbers_in(stated) == numbers_in(item.answer), False, stated)


def _text(item: Item, response: str) -> Reading:
    stated = stated_answer(response)
    return Reading(bool(stated) and same_text(stated, item.answer), False, stated)


def _gold_number(item: Item) -> Fraction:
    try:
        return Fraction(item.answer)
    except ValueError as error:
        raise BenchmarkError(
            f"mathvista, item {item.meta['id']}: answer {item.answer!r} is no number"
        ) from error


def _as(kind: type, text: str):
    try:
        return kind(text)
    except ValueError:
        return None


_HINTS = {
    "integer": "requiring an integer answer and provide the final value, e.g., 1, 2, 3,",
    "float 1": "requiring a floating-point number with one decimal place and provide the final "
    "value, e.g., 1.2, 1.3, 1.4,",
    "float 2": "requiring a floating-point number with two decimal places and provide the final "
    "value, e.g., 1.23, 1.34, 1.45,",
    "list": "requiring a Python list as an answer and provide the final list, e.g., [1, 2, 3], "
    "[1.2, 1.3, 1.4],",
    "letter": "and provide the correct option letter, e.g., A, B, C, D,",
}


def question(item: Item) -> str:
    """Returns hint, question, unit and choices as in the authors' `build_query.py`."""
    choices = item.meta["choices"] or ()
    kind, precision = item.meta["answer_type"], item.meta.get("precision")
    if item.meta["question_type"] == "multi_choice":
        kind = "letter"
    elif kind == "float" and precision is not None:
        kind = f"float {int(precision)}"
    hint = _HINTS.get(kind, "and provide the final value")
    unit = f" (Unit: {item.meta['unit']})" if item.meta.get("unit") else ""
    lines = [f"Hint: Please answer the question {hint} at the end."]
    lines.append(f"Question: {item.problem}{unit}")
    lines += ["Choices:"] if choices else []
    return "\n".join([*lines, *(f"({k}) {text}" for k, text in lettered(choices).items())])


def lines(items, verdicts) -> list:
    """Computes accuracy overall, by task (one per question) and by skill (one or more)."""
    return [
        *accuracy("accuracy", items, verdicts),
        *accuracy("accuracy by task", items, verdicts, lambda item: [item.meta["task"]]),
        *accuracy("accuracy by skill", items, verdicts, lambda item: item.meta["skills"]),
    ]


MATHVISTA = VisualBenchmark(
    id="mathvista",
    version=f"2+{VERIFIER}",
    read=read,
    lines=lines,
    question=question,
    note=(
        "its post_check, with our extraction for its judge's: lists and free text always wrong, "
        "14.0 wrong for 14, floats not rounded to the question's precision"
    ),
)
