"""Answers in words."""

import pytest

from luspo_jax.rewards.answers import words


@pytest.mark.parametrize(
    ("gold", "prediction", "verdict"),
    [
        ("B", "(B)", True),
        ("B", r"\text{(B)} 25", True),
        ("B", "B. 25", True),
        ("B", "C. 25", False),
        ("B", "Option B", True),
        ("B", "Bob", None),
        ("B", "25", None),
        ("A, C", "C and A", True),
        ("A, C", "A and B", False),
        ("ABC", "CBA", False),
        (r"\text{(B)} 12", "B", True),
        ("12", "B", None),
    ],
)
def test_choices(gold, prediction, verdict):
    assert words.choices_agree(gold, prediction) is verdict


@pytest.mark.parametrize(
    ("gold", "prediction", "verdict"),
    [
        ("Evelyn", r"\text{Evelyn.}", True),
        ("an ellipse", "ellipse", True),
        ("north-west", "north west", True),
        ("odd", "even", False),
        (r"\text{dog}", "god", False),
        ("ab", "ba", None),
        ("x", "X", False),
        ("yes", "Yes, it does", True),
        ("no", "Yes, it does", False),
        (r"\emptyset", "no solution", True),
        (r"\infty", "infinity", True),
        (r"(-\infty,\infty)", "all real numbers", True),
        ("5", "5", None),
    ],
)
def test_phrases(gold, prediction, verdict):
    assert words.phrases_agree(gold, prediction) is verdict


def test_number_words():
    assert words.number_words_agree("3", "three") is True
    assert words.number_words_agree("twenty-one", "21") is True
    assert words.number_words_agree("2", "three") is False
    assert words.number_words_agree("x", "three") is None
    assert words.number_words_agree("2", "2") is None
