"""Benchmarks whose answers are expressions, units or lists: Minerva and OlympiadBench."""

from luspo_jax.datasets.table import Table, answer_text, text
from luspo_jax.rewards.answers.extraction import boxed_answer


def boxed(cell) -> str:
    """Returns the last box of a reference solution."""
    answer = boxed_answer(text(cell))
    if not answer:
        raise ValueError(f"has no closed \\boxed{{…}}: {text(cell)[-40:]!r}")
    return answer_text(answer)


def listed(cell) -> str:
    """Joins the answers of a list by commas."""
    if not isinstance(cell, list) or not cell:
        raise ValueError(f"must be a list of answers, not {cell!r:.40}")
    return ", ".join(answer_text(item) for item in cell)


MINERVA = Table(
    problem=("problem",),
    answer=("solution",),
    meta=("type", "idx"),
    clean_answer=boxed,
    origin="arXiv:2206.14858, OCW Courses",
)
OLYMPIADBENCH = Table(
    problem=("question",),
    answer=("final_answer",),
    meta=("id", "subfield", "answer_type", "is_multiple_answer", "unit", "error"),
    clean_answer=listed,
    origin="github.com/OpenBMB/OlympiadBench",
)
