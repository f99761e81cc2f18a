"""MathVerse testmini: one problem in several versions, from text to image (arXiv:2403.14624)."""

from luspo_jax.benchmarks.answer_extraction import (
    chosen_labels,
    free_form_answer,
    labelled_options,
    labels_in,
    option_read,
)
from luspo_jax.benchmarks.free_form import VERIFIER, Pair
from luspo_jax.benchmarks.verdicts import Item, Reading, VisualBenchmark, accuracy


def read(item: Item, response: str) -> Reading:
    """Reads a response: letters if the reference is letters, else by the math verifier."""
    gold = labels_in(item.answer) if _is_choice(item) else None
    if gold is None or not all(label.isalpha() for label in gold):
        stated = free_form_answer(response, item.answer)
        kit = stated is not None and stated.strip() == item.answer.strip()
        return Reading(
            False if stated is None else Pair(_once(item.answer), _once(stated)), kit, stated
        )
    if len(gold) > 1:
        labels = chosen_labels(response)
        extracted = None if labels is None else ", ".join(sorted(labels))
        return Reading(labels == gold, extracted == item.answer.strip(), extracted)
    right, letter = option_read(response, _options(item), gold)
    return Reading(right, letter == item.answer.strip(), letter)


def _once(answer: str) -> str:
    """Reduces an answer of several identical lines to one line."""
    lines = {line.strip() for line in answer.strip().splitlines()}
    return lines.pop() if len(lines) == 1 else answer


def _is_choice(item: Item) -> bool:
    return item.meta["question_type"].replace("_", "-") == "multi-choice"


def _options(item: Item) -> dict[str, str]:
    """Maps letters to options, from a list or the question; empty if neither has any."""
    listed = item.meta.get("choices")
    if listed:
        return labelled_options("\n".join(listed))
    question = item.problem or item.meta.get("question_for_eval") or ""
    _, mark, after = question.rpartition("Choices:")
    return labelled_options(after) if mark else {}


def question(item: Item) -> str:
    """Returns the authors' column `query_cot`, built by the same rule if a file lacks it.

    In the version Vision Only, only the image contains the problem.
    """
    form = "provide the final value, e.g., 1, 2.5, 300"
    if _is_choice(item):
        form = "provide the correct option letter, e.g., A, B, C, D"
    asked = f"first conduct reasoning, and then answer the question and {form}, at the end."
    if not item.problem:
        return f"According to the question shown in the image, please {asked}"
    listed = item.meta.get("choices")
    choices = ["Choices:", *listed] if listed and "Choices:" not in item.problem else []
    return "\n".join([f"Please {asked}", f"Question: {item.problem}", *choices])


def lines(items, verdicts) -> list:
    """Computes accuracy overall, by version, subject, subfield, and subject within each version."""

    def both(item: Item):
        return [f"{item.meta['problem_version']} / {item.meta['subject']}"]

    return [
        *accuracy("accuracy", items, verdicts),
        *(
            line
            for name in ("problem_version", "subject", "subfield")
            for line in accuracy(
                f"accuracy by {name}", items, verdicts, lambda item, name=name: [item.meta[name]]
            )
        ),
        *accuracy("accuracy by problem_version and subject", items, verdicts, both),
    ]


MATHVERSE = VisualBenchmark(
    id="mathverse",
    version=f"2+{VERIFIER}",
    read=read,
    lines=lines,
    question=question,
    note=(
        "what it decides without its judge model: the extracted answer equals the reference letter "
        "by letter; a lower bound of its published figures, not comparable with them"
    ),
)
