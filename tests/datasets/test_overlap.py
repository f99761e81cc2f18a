"""Problems that training and evaluation share."""

import pytest

from luspo_jax import datasets
from luspo_jax.datasets.example import Example
from luspo_jax.datasets.overlap import overlap, words

LONG = "Find the sum of all integer bases b greater than 9 for which 17 in base b divides 97."


def _set(*problems):
    return [Example(k, problem, "1") for k, problem in enumerate(problems)]


def test_words_see_through_dress():
    assert words(r"Let $x = \dfrac{1}{2}$, then") == words("let x=\\frac{1}2 Then")
    assert words("已知 x=1") == ("已", "知", "x", "1")


def test_a_copy_in_other_dress_is_whole_and_a_quotation_is_a_part():
    copy = LONG.replace("17", "$17$").upper()
    found = overlap(_set("Short.", LONG), _set("Something else.", copy, LONG))
    assert [(m.held_out, m.trained, m.share) for m in found.matches] == [(1, 1, 1.0)]
    quoted = f"{LONG} Prove that no other base will do, and say what happens in base 10."
    (match,) = overlap(_set(quoted), _set(LONG)).matches
    total, shared = len(words(quoted)) - 12, len(words(LONG)) - 12
    assert match.share == pytest.approx(shared / total)
    assert overlap(_set(LONG), _set(quoted)).matches[0].share == 1  # the training set holds it all


def test_the_best_match_is_kept_whatever_the_order():
    half = LONG.replace("divides", "is a divisor of")
    for trained in (_set(half, LONG), _set(LONG, half)):
        (match,) = overlap(_set(LONG), trained).matches
        assert match.share == 1


def test_short_problems_are_compared_as_a_whole():
    found = overlap(_set("What is 2 + 2?", "What is 2 + 3?"), _set("what is $2+3$", "what is 2"))
    assert [m.held_out for m in found.matches] == [1]
    assert str(found).startswith("1 of 2 held-out problems")


def test_a_length_that_is_none_is_refused():
    with pytest.raises(ValueError, match="ngram=0"):
        overlap([], [], ngram=0)


def test_a_real_set_holds_itself(shared_data, tmp_path):
    file = shared_data / "math_eval" / "aime24" / "test.jsonl"
    held_out, _ = datasets.load("aime24", file, data_dir=tmp_path)
    found = overlap(held_out, held_out)
    assert len(found.at_least(1)) == len(held_out) == 30
