"""Competition benchmarks whose files differ only in their column names."""

from luspo_jax.datasets.table import Table, integer

_PROBLEM = ("problem", "question", "extra_info.raw_problem", "prompt.0.content")
_ANSWER = ("answer", "expected_answer", "reward_model.ground_truth.target")

AIME = Table(
    problem=_PROBLEM,
    answer=(*_ANSWER, "reward_model.ground_truth"),
    meta=("url",),
    clean_answer=integer,
    origin="artofproblemsolving.com, American Invitational Mathematics Examination",
)
AMC = Table(
    problem=_PROBLEM,
    answer=(*_ANSWER, "reward_model.ground_truth"),
    meta=("url",),
    clean_answer=integer,
    origin="artofproblemsolving.com, American Mathematics Competition 12",
)
MATH500 = Table(
    problem=("problem",),
    answer=("answer",),
    meta=("subject", "level", "unique_id"),
    origin="huggingface.co/datasets/HuggingFaceH4/MATH-500",
)
