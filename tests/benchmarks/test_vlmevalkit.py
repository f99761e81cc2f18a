"""VLMEvalKit's rules with their mistakes, one test each."""

import pytest

from luspo_jax.benchmarks.answer_extraction import lettered
from luspo_jax.benchmarks.vlmevalkit import arithmetic, equal_answers, inferred_option

OPTIONS = lettered(["3/11", "8/11", "6/11", "3/5"])


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("The correct answer is (B) 8/11.", "B"),
        ("B is what I would choose here", None),  # not among the last four words
        ("The answer is B because of many words that follow", "B"),
        ("the answer is approximately five", "A"),  # no word boundary after the letter
        ("8/11", "B"),
        ("8/11 or 6/11", None),
        ("b", None),  # lower case is no letter
        ("I can't process this file.", "Z"),
        ("A B", None),
        ("Z", "Z"),
    ],
)
def test_options(answer, letter):
    assert inferred_option(answer, OPTIONS) == letter


def test_long_answers_are_not_searched_for_texts():
    assert inferred_option("so 8/11 " + "x" * 40, OPTIONS) is None


@pytest.mark.parametrize(
    ("prediction", "gold", "equal"),
    [
        ("60", "60", True),
        ("60.0", "60", True),
        (r"\frac{1}{2}", "0.5", True),
        ("1/3", r"\frac{1}{3}", True),
        (r"2\sqrt{3}", r"2\sqrt{3}", True),
        (r"\sqrt{12}", r"2\sqrt{3}", False),  # roots match as strings only
        ("60 cm", "60", False),
        ("2025", "45^2", True),
        ("47", "45^2", True),  # Python's ^ on integers
        ("C", "c", True),
    ],
)
def test_equality(prediction, gold, equal):
    assert equal_answers(prediction, gold) is equal


@pytest.mark.parametrize(
    "text",
    ["__import__('os').system('true')", "9**9**9**9", "1/0", "x", "(1, 2)", "1" * 500, "(" * 90],
)
def test_model_text_is_never_evaluated(text):
    assert arithmetic(text) is None


def test_arithmetic():
    assert arithmetic("-(3 + 4) * 2 / 7") == -2
