"""MathVerse: letters, sets of letters and free form, by version and subject."""

import pytest

from luspo_jax.benchmarks.free_form import Pair
from luspo_jax.benchmarks.mathverse import MATHVERSE, read
from luspo_jax.benchmarks.verdicts import score
from luspo_jax.datasets.example import Example

QUESTION = "The size of angle CED is ()\nChoices:\nA:40°\nB:60°\nC:120°\nD:140°"


def _item(answer, *, kind="multi-choice", problem=QUESTION, name="7", version="Text Lite", **more):
    meta = {"id": name, "question_type": kind, "problem_version": version}
    return Example(0, problem, answer, meta | {"subject": "Functions", "subfield": "f"} | more)


@pytest.mark.parametrize(
    ("answer", "response", "strict", "vlmevalkit"),
    [
        ("D", "D", True, True),
        ("D", "The answer is 140°.", True, True),
        ("D", r"\boxed{140}", True, True),
        ("D", "C", False, False),
        ("(C)", "C", True, False),  # its string equality, before it asks a judge
        ("C\nD", "The answers are C and D.", True, False),
        ("C\nD", "C", False, False),
    ],
)
def test_letters(answer, response, strict, vlmevalkit):
    reading = read(_item(answer), response)
    assert (reading.strict, reading.vlmevalkit) == (strict, vlmevalkit)


def test_a_question_in_the_image_takes_letters_only():
    assert read(_item("D", problem=""), "(D)").strict is True
    assert read(_item("D", problem=""), "The answer is 140.").strict is False
    listed = _item("B", problem="", kind="multi_choice", choices=["A:one", "B:two"])
    assert read(listed, "two").strict is True


def test_a_choice_whose_reference_is_no_letter_goes_to_the_verifier():
    reading = read(_item(r"090^\circ T"), r"\boxed{090^\circ T}")
    assert reading.strict == Pair(r"090^\circ T", r"090^\circ T")
    assert read(_item("False"), "false").strict == Pair("False", "false")


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"Its length is $2\sqrt{3}$.", r"$2\sqrt{3}$"),
        (r"Its length is not $2\sqrt{3}$, it is $\sqrt{3}$.", r"$\sqrt{3}$"),
        ("The distance is 8.3.", "8.3"),
        (r"2\sqrt{3}", r"2\sqrt{3}"),
    ],
)
def test_a_sentence_states_what_follows_its_verb(response, answer):
    assert read(_item("1", kind="free-form"), response).extracted == answer


def test_free_form_end_to_end():
    cases = [
        ("2191.7 metres", r"\boxed{2191.7}", True),
        (r"Area $=113.1 \mathrm{~cm}^{2}$", "The answer is 113.1 cm².", True),
        (r"4+4\sqrt{3}", r"\boxed{4(1+\sqrt{3})}", True),
        (r"$y+3=\frac{3}{4}(x-2)$", r"\boxed{y+3=\frac{3}{4}(x-2)}", True),
        ("8.246", "The distance is 8.246.", True),
        ("8.246", "The distance is 8.3.", False),
    ]
    items = [
        _item(gold, kind="free-form", name=str(n), version="Text Lite" if n < 2 else "Vision Only")
        for n, (gold, _, _) in enumerate(cases)
    ]
    verdicts = score(MATHVERSE, items, [response for _, response, _ in cases])
    assert [v.strict for v in verdicts] == [right for _, _, right in cases]
    lines = MATHVERSE.lines(items, verdicts)
    found = {(line.table, line.group): line.strict for line in lines}
    assert found["accuracy by problem_version", "Vision Only"] == 0.75
    assert found["accuracy by problem_version and subject", "Text Lite / Functions"] == 1.0
