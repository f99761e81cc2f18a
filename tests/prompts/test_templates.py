"""Templates: the known texts, and texts of one's own."""

import pytest

from luspo_jax.datasets import DataError
from luspo_jax.prompts.templates import TEMPLATES, Template, template


def test_the_dapo_prompt_is_that_of_dapos_own_file(shared_data):
    import pyarrow.parquet

    path = shared_data / "math_eval" / "aime24" / "dapo_aime-2024.parquet"
    row = pyarrow.parquet.read_table(path).slice(0, 1).to_pylist()[0]
    rendered = TEMPLATES["dapo"].text.replace("{problem}", row["extra_info"]["raw_problem"])
    assert rendered == row["prompt"][0]["content"]


def test_a_template_without_a_place_for_the_problem_is_refused():
    with pytest.raises(ValueError, match="problem"):
        Template("Q: {question}", chat=False)


def test_a_template_may_name_columns_and_leaves_braces_alone():
    own = template("{problem}\nHint: {hint}. Write \\boxed{answer}.")
    assert own.columns == ("hint",)
    filled = own.fill("What is \\frac{a}{b} + {x}?", {"hint": "{y}"})
    assert filled == "What is \\frac{a}{b} + {x}?\nHint: {y}. Write \\boxed{answer}."
    with pytest.raises(DataError, match=r"names the column \{hint\}; there are: \{problem\}"):
        own.fill("?", {})
    with pytest.raises(ValueError, match="did you mean 'boxed'"):
        template("boxd")
    assert template("boxed") is TEMPLATES["boxed"]
