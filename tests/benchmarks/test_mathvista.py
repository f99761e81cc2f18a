"""MathVista: options by letter or text, integers, rounded floats, lists; VLMEvalKit's mistakes."""

import pytest

from luspo_jax.benchmarks.mathvista import read
from luspo_jax.benchmarks.record import BenchmarkError
from luspo_jax.datasets.example import Example


def _item(answer, kind, *, choices=None, precision=None):
    question = "multi_choice" if choices else "free_form"
    meta = {"id": "7", "question_type": question, "answer_type": kind, "choices": choices}
    return Example(0, "q", answer, meta | {"precision": precision})


@pytest.mark.parametrize(
    ("answer", "kind", "precision", "response", "strict", "vlmevalkit"),
    [
        ("14", "integer", None, "14", True, True),
        ("14", "integer", None, "The missing number is 14.", True, True),
        ("14", "integer", None, "14.0", True, False),  # int("14.0") is an error there
        ("14", "integer", None, "14.7", False, False),
        ("1000", "integer", None, "1,000 g", True, False),
        ("14", "integer", None, "no idea", False, False),
        ("1.2", "float", 1, "1.2", True, True),
        ("1.2", "float", 1, "1.23", True, False),  # it does not round
        ("1.2", "float", 1, "1.20", True, True),
        ("1.2", "float", 1, "1.26", False, False),
        ("0.21", "float", 2, "0.2", False, False),
        ("[2014, 2016]", "list", None, "[2014, 2016]", True, False),  # lists are always wrong
        ("[2014, 2016]", "list", None, r"It is \boxed{[2014, 2016]}.", True, False),
        ("[2014, 2016]", "list", None, "The answer is 2014 and 2016.", True, False),
        ("[2014, 2016]", "list", None, "[2016, 2014]", False, False),
        ("[2014, 2016]", "list", None, "no idea", False, False),
        ("blue", "text", None, "The answer is Blue.", True, False),  # and so is free text
    ],
)
def test_free_form(answer, kind, precision, response, strict, vlmevalkit):
    reading = read(_item(answer, kind, precision=precision), response)
    assert (reading.strict, reading.vlmevalkit) == (strict, vlmevalkit)


@pytest.mark.parametrize(
    ("response", "strict", "vlmevalkit"),
    [
        ("C", True, True),
        ("145°", False, False),
        ("150°", True, True),
        ("150", True, False),
        ("The answer is (C).", True, True),
        ("The correct option is C, as the angle on the left shows to us", True, False),
        ("c", True, False),
        ("", False, False),
    ],
)
def test_choices(response, strict, vlmevalkit):
    reading = read(_item("150°", "text", choices=["135°", "145°", "150°"]), response)
    assert (reading.strict, reading.vlmevalkit) == (strict, vlmevalkit)


def test_options_with_one_text_are_both_right():
    item = _item("18", "text", choices=["9", "18", "18"])
    assert [read(item, letter).strict for letter in "ABC"] == [False, True, True]


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (_item("x", "text", choices=["a", "b"]), "item 7: answer 'x' is none of the choices"),
        (_item("x", "integer"), "item 7: answer 'x' is no number"),
        (_item("x", "colour"), "item 7: answer_type 'colour' is none of integer"),
    ],
)
def test_bad_annotations_are_named(item, message):
    with pytest.raises(BenchmarkError, match=message):
        read(item, "1")
