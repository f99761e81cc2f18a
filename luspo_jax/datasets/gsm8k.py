"""GSM8K: the answer follows `####` in the reference solution."""

from luspo_jax.datasets.table import Table, answer_text


def final_answer(cell) -> str:
    """Returns the number after the last `####`, without thousands commas."""
    head, mark, tail = answer_text(cell).rpartition("####")
    if not mark:
        raise ValueError(f"has no '####' before its answer: {head[-40:]!r}")
    return answer_text(tail.replace(",", ""))


GSM8K = Table(
    problem=("question",),
    answer=("answer",),
    clean_answer=final_answer,
    origin="github.com/openai/grade-school-math",
)
