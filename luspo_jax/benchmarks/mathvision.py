"""MathVision: 3040 competition problems with figures, by subject and level (arXiv:2402.14804)."""

import re

from luspo_jax.benchmarks.answer_extraction import (
    free_form_answer,
    lettered,
    option_read,
    stated_answer,
)
from luspo_jax.benchmarks.free_form import VERIFIER, Pair
from luspo_jax.benchmarks.verdicts import Item, Reading, VisualBenchmark, accuracy
from luspo_jax.benchmarks.vlmevalkit import equal_answers, inferred_option


def read(item: Item, response: str) -> Reading:
    """Reads a response: a letter if the question has options, else a value."""
    options = lettered(item.meta["choices"] or ())
    if options or re.fullmatch(r"[A-Z]", item.answer.strip()):
        return _choice(item, response, options)
    stated = free_form_answer(response, item.answer)
    if stated is None:
        return Reading(False, equal_answers(response, item.answer))
    kit = equal_answers(response, item.answer) or equal_answers(stated, item.answer)
    return Reading(Pair(item.answer, stated), kit, stated)


def _choice(item: Item, response: str, options: dict[str, str]) -> Reading:
    gold = item.answer.strip().upper()
    right, letter = option_read(response, options, {gold})
    if not options:  # a letter without options: VLMEvalKit compares strings
        return Reading(right, equal_answers(letter or response, gold), letter)
    inferred = inferred_option(response, options)
    if inferred is None:
        inferred = inferred_option(stated_answer(response) or "", options)
    return Reading(right, inferred == gold, letter)


_TASK = (
    'Please solve the problem step by step and put your answer in one "\\boxed{}". If it is a '
    'multiple choice question, only one letter is allowed in the "\\boxed{}".'
)


def question(item: Item) -> str:
    """Returns task, problem and options as in the authors' `models/Qwen-VL.py`.

    Options that are their own letters are not repeated. The marks `<image1>` … stay in place: one
    image contains everything they refer to.
    """
    options = lettered(item.meta["choices"] or ())
    shown = [] if "".join(options.values()) == "".join(options) else options.items()
    return "\n".join([_TASK, item.problem, *(f"({k}) {text}" for k, text in shown)])


def lines(items, verdicts) -> list:
    """Computes accuracy overall, by subject and by level."""
    return [
        *accuracy("accuracy", items, verdicts),
        *accuracy("accuracy by subject", items, verdicts, lambda item: [item.meta["subject"]]),
        *accuracy("accuracy by level", items, verdicts, lambda item: [str(item.meta["level"])]),
    ]


MATHVISION = VisualBenchmark(
    id="mathvision",
    version=f"2+{VERIFIER}",
    read=read,
    lines=lines,
    question=question,
    note=(
        "its post_check, with our extraction for its judge's and safe arithmetic for its eval of "
        "model text: roots, π and units match as strings only; it reports no levels"
    ),
)
