"""DAPO-Math-17k: its prompt, and extraction of the bare problem from it."""

from luspo_jax.datasets.table import Table, integer, text

PREFIX = (
    "Solve the following math problem step by step. The last line of your response should be of "
    "the form Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n"
)
SUFFIX = '\n\nRemember to put your answer on its own line after "Answer:".'


def bare_problem(cell) -> str:
    """Strips DAPO's instructions from a problem, if the file includes them."""
    return text(text(cell).removeprefix(PREFIX).removesuffix(SUFFIX))


# The original file repeats each problem about a hundred times and wraps it in the prompt; the
# deduplicated copy that verl users share has bare problems. AIME 2024 comes in the same layout.
DAPO_LAYOUT = Table(
    problem=("extra_info.raw_problem", "prompt.0.content"),
    answer=("reward_model.ground_truth",),
    clean_problem=bare_problem,
    clean_answer=integer,
    origin="huggingface.co/datasets/BytedTsinghua-SIA/DAPO-Math-17k",
)
