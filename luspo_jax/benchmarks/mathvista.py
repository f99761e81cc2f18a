"""MathVista testmini: 1000 questions about figures, by task and skill (arXiv:2310.02255)."""

from fractions import Fraction

from luspo_jax.benchmarks.answer_extraction import (
    answer_part,
    chosen,
    lettered,
    numbers_in,
    same_text,
    stated_answer,
    stated_number,
)
from luspo_jax.benchmarks.verdicts import BenchmarkError, Item, Reading, VisualBenchmark, accuracy
from luspo_jax.benchmarks.vlmevalkit import inferred_option


def read(item: Item, response: str) -> Reading:
    """The reading of a response, by the question's type and the answer's."""
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
    letter = chosen(response, options)
    inferred = inferred_option(response, options)
    if inferred is None:
        inferred = inferred_option(stated_answer(response) or "", options)
    return Reading(letter in right, inferred == right[0], letter)


def _integer(item: Item, response: str) -> Reading:
    gold, stated = _gold_number(item), stated_number(response)
    if stated is None:
        return Reading(False, _as(int, response) == gold)
    numeral, value = stated
    kit = gold in (_as(int, response), _as(int, numeral))  # int("14.0") is an error
    return Reading(value == gold, kit, numeral)


def _float(item: Item, response: str) -> Reading:
    """Right where the number rounds to the reference at the question's precision."""
    gold, stated = _gold_number(item), stated_number(response)
    if stated is None:
        return Reading(False, _as(float, response) == float(gold))
    numeral, value = stated
    places = item.meta.get("precision")
    error = Fraction(1, 2 * 10 ** int(places)) if places is not None else Fraction(0)
    kit = float(gold) in (_as(float, response), _as(float, numeral))  # it does not round
    return Reading(abs(value - gold) <= error, kit, numeral)


def _list(item: Item, response: str) -> Reading:
    """Right where the numbers are the reference's, in its order; VLMEvalKit reads "None"."""
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


def lines(items, verdicts) -> list:
    """Accuracy overall, by task and by skill; a question has one task and one skill or more."""
    return [
        *accuracy("accuracy", items, verdicts),
        *accuracy("accuracy by task", items, verdicts, lambda item: [item.meta["task"]]),
        *accuracy("accuracy by skill", items, verdicts, lambda item: item.meta["skills"]),
    ]


MATHVISTA = VisualBenchmark(
    id="mathvista",
    version="1",
    read=read,
    lines=lines,
    note=(
        "its post_check, with our extraction for its judge's: lists and free text always wrong, "
        "14.0 wrong for 14, floats not rounded to the question's precision"
    ),
)
