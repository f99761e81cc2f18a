"""Multiple choice compares letters."""

import pytest

from luspo_jax.rewards import Sample, score, verifier


@pytest.mark.parametrize(
    ("response", "value", "status"),
    [
        (r"\boxed{B}", 1, "ok"),
        (r"\boxed{(B)}", 1, "ok"),
        (r"\boxed{\text{(B)}}", 1, "ok"),
        (r"\boxed{\text{B. a circle}}", 1, "ok"),
        ("The correct answer is (B).", 1, "ok"),
        ("The answer is B: a circle", 1, "ok"),
        ("Answer: b", 1, "ok"),
        ("B", 1, "ok"),
        (r"\boxed{A}", 0, "ok"),
        (r"\boxed{12}", 0, "unparsed"),
        ("The answer is Bob", 0, "unparsed"),
        ("It cannot be A or B", 0, "unparsed"),
        ("", 0, "unparsed"),
    ],
)
def test_verdict(response, value, status):
    verdict = verifier("multiple_choice").check(Sample(response, "(B)"))
    assert (verdict.value, verdict.status) == (value, status)


def test_a_reference_that_is_no_letter_is_an_error():
    assert score({"multiple_choice": 1.0}, "B", "12").status == "error"
