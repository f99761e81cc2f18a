"""DAPO's rule gives the verdicts that verl's users know."""

import time

import pytest

from luspo_jax.rewards.dapo_math import WINDOW, dapo_math, gold, normalise
from luspo_jax.rewards.record import Sample


def _verdict(response, answer):
    return dapo_math().check(Sample(response, answer))


@pytest.mark.parametrize(
    ("response", "answer", "value"),
    [
        ("Answer: 33", "33", 1),
        ("Answer: 033", "33", 0),
        ("Answer: 33.", "33", 0),
        ("**Answer:** 33", "33", 0),
        (r"Answer: $\boxed{33}$", "33", 1),
        ("Answer: x=33", "33", 1),
        ("Answer: 33 square units", "33", 1),
        ("Answer: 1,024", "1024", 1),
        ("Answer: 0.5", r"\frac12", 0),
        # Files write AIME golds zero-filled.
        ("Answer: 33", "033", 1),
        ("Answer: 33", " 033 ", 1),
        ("Answer: -7", "-07", 1),
        ("Answer: 0", "000", 1),
        # Unlike verl's.
        ("<think>Answer: 33</think>Answer: 34", "33", 0),
        ("<think>\nAnswer: 33\nor not", "33", 0),
        ("<think>no</think>Answer: 33", "33", 1),
        ("Answer: −33", "-33", 1),
        ("Answer：３３", "33", 1),
        # The last of several answers counts, in any case, with any spacing.
        ("Answer: 1\nanswer : 33", "33", 1),
        ("Answer: 33\nAnswer: 1", "33", 0),
        ("ANSWER:33\n\nthat is all", "33", 1),
        ("The answer is 33", "33", 0),
        (r"Answer: 90^\circ", "90", 1),
        (r"Answer: \frac12", r"\frac{1}{2}", 1),
        (r"Answer: \sqrt2", r"\sqrt{2}", 1),
        (r"Answer: $\text{12}$ dollars", "12", 1),
        (r"Answer: \$12", "12", 1),
    ],
)
def test_verdict(response, answer, value):
    assert _verdict(response, answer).value == value


def test_only_the_end_of_the_response_is_read():
    assert _verdict("Answer: 33" + " " * (WINDOW - 10), "33").value == 1
    far = _verdict("Answer: 33" + " " * WINDOW, "33")
    assert (far.value, far.status) == (0, "unparsed")


def test_a_response_without_an_answer_is_unparsed_and_says_why():
    verdict = _verdict(r"so it is \boxed{33}", "33")
    assert (verdict.value, verdict.status, verdict.prediction) == (0, "unparsed", None)
    assert "Answer:" in verdict.detail


def test_the_prediction_is_what_was_compared():
    assert _verdict("Answer: $x = 1,024$ units", "5").prediction == "1024"


def test_normalisation_is_idempotent_on_ordinary_answers():
    for answer in ("33", r"\frac{1}{2}", r"3\sqrt{2}", "(1,2)", "x^2+1"):
        assert normalise(normalise(answer)) == normalise(answer)
        assert gold(answer) == normalise(answer)


def test_a_thousand_answers_a_second():
    responses = ["working " * 100 + f"\nAnswer: $\\boxed{{{n}}}$" for n in range(1000)]
    start = time.process_time()
    assert sum(_verdict(response, "7").value for response in responses) == 1
    assert time.process_time() - start < 1.0
