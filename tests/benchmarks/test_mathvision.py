"""MathVision: letters, numbers and LaTeX; model text is never evaluated."""

import pytest

from luspo_jax.benchmarks.free_form import Pair
from luspo_jax.benchmarks.mathvision import MATHVISION, read
from luspo_jax.benchmarks.verdicts import score
from luspo_jax.datasets.example import Example

LETTERS = ["A", "B", "C", "D", "E"]


def _item(answer, choices=(), name="7", level=1):
    meta = {"id": name, "choices": list(choices), "subject": "algebra", "level": level}
    return Example(0, "q", answer, meta)


@pytest.mark.parametrize(
    ("answer", "choices", "response", "strict", "vlmevalkit"),
    [
        ("C", LETTERS, "C", True, True),
        ("C", LETTERS, "the answer is c", True, True),
        ("C", LETTERS, "c", True, True),
        ("B", ["$10^{\\circ}$", "$15^{\\circ}$"], r"\boxed{15^\circ}", True, False),
        ("B", ["1 and 3", "2 and 4", "2 and 4"], "C", True, False),  # the same text
        ("C", [], "Answer: C", True, True),
        ("C", [], "Answer: B", False, False),
    ],
)
def test_letters(answer, choices, response, strict, vlmevalkit):
    reading = read(_item(answer, choices), response)
    assert (reading.strict, reading.vlmevalkit) == (strict, vlmevalkit)


@pytest.mark.parametrize(
    ("answer", "response", "vlmevalkit"),
    [
        ("60", "60", True),
        ("60", "The answer is 60 cm.", False),
        (r"2\sqrt{3}", r"\boxed{\sqrt{12}}", False),
        ("7/3", r"\boxed{\frac{7}{3}}", True),
    ],
)
def test_values_go_to_the_math_verifier(answer, response, vlmevalkit):
    reading = read(_item(answer), response)
    assert reading.strict == Pair(answer, reading.extracted)
    assert reading.vlmevalkit is vlmevalkit


def test_hostile_text_is_data(tmp_path):
    mark = tmp_path / "mark"
    response = rf"\boxed{{__import__('pathlib').Path('{mark}').touch() or 60}}"
    (verdict,) = score(MATHVISION, [_item("60")], [response])
    assert verdict.strict is False
    assert not mark.exists()


def test_values_end_to_end_by_subject_and_level():
    cases = [
        (r"2\sqrt{3}", r"So $\boxed{\sqrt{12}}$.", True),
        (r"$\frac{90}{23}^{\circ}$", r"\boxed{\frac{90}{23}}", True),
        (r"69{degrees}", "Answer: 69", True),
        (r"8\sqrt{3}{squareinches}", r"\boxed{8\sqrt{3}}", True),
        ("525/2", "262.5", True),
        (r"\pi-2", r"\boxed{1.14}", False),
        ("(3,-4)", "(3, -4)", True),
        ("60", "Answer: 47 or 60", False),
        ("60", r"\boxed{47, 60}", False),
        ("60", "The answer is 60 cm.", True),
    ]
    items = [_item(gold, name=str(n), level=1 + n % 2) for n, (gold, _, _) in enumerate(cases)]
    verdicts = score(MATHVISION, items, [response for _, response, _ in cases])
    assert [v.strict for v in verdicts] == [right for _, _, right in cases]
    lines = MATHVISION.lines(items, verdicts)
    found = {(line.table, line.group): line.strict for line in lines}
    assert found["accuracy by level", "1"] == pytest.approx(4 / 5)
    assert found["accuracy by level", "2"] == pytest.approx(3 / 5)
    assert found["accuracy by subject", "algebra"] == found["accuracy", "all"]
