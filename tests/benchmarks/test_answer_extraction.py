"""Answers are found in verbose responses, and none is found where none was given."""

import time
from fractions import Fraction

import pytest

from luspo_jax.benchmarks.answer_extraction import (
    chosen_labels,
    json_field,
    labelled_options,
    labels_in,
    lettered,
    number_and_unit,
    stated_answer,
    stated_number,
)
from luspo_jax.rewards.answers.choices import answer_part, chosen, option_meant

OPTIONS = lettered(["3/11", "8/11", "6/11", "a circle"])


@pytest.mark.parametrize(
    ("response", "part"),
    [
        ("plain", "plain"),
        ("<think>7</think> <answer> 8 </answer>", "8"),
        ("<answer>1</answer> no: <answer>2</answer>", "2"),
        ("<think>The answer is 7.", ""),
        ("<think>6</think>\nIt is 7.", "It is 7."),
    ],
)
def test_the_part_that_speaks_to_the_reader(response, part):
    assert answer_part(response) == part


@pytest.mark.parametrize(
    "response",
    [
        "B",
        "b",
        "(B)",
        "B.",
        "**B**",
        "B. 8/11",
        "(B) 8/11",
        "B 8/11",
        "8/11",
        r"\frac{8}{11}",
        "The correct answer is (B) 8/11.",
        "The correct option is B.",
        "Hence the correct choice is **(B)**.",
        "So option B is correct.",
        "A fits at first sight, but (B) is the correct one: the answer is B",
        "Therefore, we choose B.",
        "Step 1: count 3.\nStep 2: divide.\n\n(B)",
        "Step 1: count 3.\n\nAnswer: B",
        "Long reasoning.\n**Answer:** B",
        r"So we get $\boxed{B}$.",
        r"So we get $\boxed{\text{B}}$.",
        r"So we get $\boxed{\text{(B) } 8/11}$.",
        r"<think>(A)? no</think> <answer> The answer is $\boxed{B}$ </answer>",
        "The answer is 8/11 of the shape.",
        "Looking at all of it, we see a circle of eleven parts.\nThe answer is 8/11.",
    ],
)
def test_a_choice_in_many_phrasings(response):
    assert chosen(response, OPTIONS) == "B"


@pytest.mark.parametrize(
    "response",
    [
        "",
        "I cannot tell.",
        "<think>The answer is B.",
        "Either (A) or (C).",
        "The answer is 5/11.",
        "The answer is E.",
        "A good question about shapes with many parts.",
    ],
)
def test_no_choice_where_none_was_made(response):
    assert chosen(response, OPTIONS) is None


def test_an_article_is_no_letter():
    assert chosen("The answer is a circle", OPTIONS) == "D"
    assert chosen("The answer is A because of the shape", OPTIONS) == "A"
    assert chosen("Step 1.\nThe answer is a guess at best", OPTIONS) is None


def test_the_text_of_an_option_may_look_like_another_letter():
    options = lettered(["Neither", "(a)", "(b)"])
    assert option_meant("(b)", options) == "C"
    assert option_meant("B", options) == "B"


def test_units_may_be_left_out_and_longer_options_win():
    assert option_meant("145", lettered(["135°", "145°"])) == "B"
    assert option_meant("7 cm", lettered(["6cm", "7cm", "7m"])) == "B"
    assert option_meant("7", lettered(["6cm", "7cm", "7m"])) is None
    assert option_meant("it is a quarter past", lettered(["quarter", "quarter past"])) == "B"
    assert option_meant("18", lettered(["8", "18"])) == "B"


@pytest.mark.parametrize(
    ("text", "options"),
    [
        (" (A) yes (B) no", {"A": "yes", "B": "no"}),
        ("A. 1 cm;B. 1.5 cm; C. 3", {"A": "1 cm", "B": "1.5 cm", "C": "3"}),
        ("\nA:40°\nB:60°", {"A": "40°", "B": "60°"}),
        ("A. to point ;C. ;B. to point D", {"A": "to point ;C.", "B": "to point D"}),
        ("A. lonely", {}),
        ("no options", {}),
    ],
)
def test_options_in_a_text(text, options):
    assert labelled_options(text) == options


@pytest.mark.parametrize(
    ("answer", "labels"),
    [
        ("B", "B"),
        ("b", "B"),
        ("(a), (c)", "AC"),
        ("A and C", "AC"),
        ("A, B, and D", "ABD"),
        ("BD", "BD"),
        ("Options A and C", "AC"),
        ("3", "3"),
        ("C\nD", "CD"),
    ],
)
def test_labels(answer, labels):
    assert labels_in(answer) == frozenset(labels)
    assert chosen_labels(f"It follows.\nAnswer: {answer.replace(chr(10), ', ')}") is not None


@pytest.mark.parametrize("answer", ["", "the cat", "TREE", "12.5", "x = 3"])
def test_no_labels(answer):
    assert labels_in(answer) is None


def test_announced_sets():
    assert chosen_labels("So the correct options are A and D.") == frozenset("AD")
    assert chosen_labels("We see that B, C are correct.") == frozenset("BC")
    assert chosen_labels("I looked.\nNothing there.") is None


@pytest.mark.parametrize(
    ("answer", "value", "unit"),
    [
        ("5", 5, ""),
        ("14.0", 14, ""),
        ("1,200", 1200, ""),
        ("$1.45", Fraction("1.45"), ""),
        ("about 3 cm", 3, "cm"),
        ("25%", 25, "%"),
        ("25\\%", 25, "%"),
        ("x = 5", 5, ""),
        (r"\frac{1}{2}", Fraction(1, 2), ""),
        (r"1.5 \times 10^{3}", 1500, ""),
        ("145°", 145, r"^{\circ}"),
        ("9 cm²", 9, "cm^{2}"),
    ],
)
def test_numbers(answer, value, unit):
    assert number_and_unit(answer) == (value, unit)


@pytest.mark.parametrize("answer", ["", "two", "3 of 5", "x", "1e99999"])
def test_no_number(answer):
    assert number_and_unit(answer) is None


@pytest.mark.parametrize(
    ("response", "numeral", "value"),
    [
        ("14", "14", 14),
        ("The number missing in the sequence is 14.", "14", 14),
        ("The fraction is 0.6, which means that six out of 10 are.", "0.6", Fraction("0.6")),
        ("Luca needs $1.45 to buy a candy.", "1.45", Fraction("1.45")),
        ("There are 3 rows of 4.\n\nAnswer: 12 pencils", "12", 12),
        (r"Thus $v = \boxed{14.0}$ m/s.", "14.0", 14),
        ("The age gap is 6 years.", "6", 6),
    ],
)
def test_stated_numbers(response, numeral, value):
    assert stated_number(response) == (numeral, value)


@pytest.mark.parametrize(
    "response",
    ["", "no idea", "<think>it is 14", "It is 3 or 4.", "The answer is unknown, not 14 of 15."],
)
def test_no_stated_number(response):
    assert stated_number(response) is None


def test_a_long_response_that_breaks_off_states_no_number():
    assert stated_number("word " * 60 + "so the total is 14") is None
    assert stated_number("word " * 60 + "so the total is 14.") == ("14", 14)


def test_stated_answers():
    assert stated_answer("y = 4") == "y = 4"
    assert stated_answer("Long.\nThe answer is $y = 4$.") == "y = 4"
    assert stated_answer("Line one.\nLine two.") is None


@pytest.mark.parametrize(
    ("response", "value"),
    [
        ('{"solution": "…", "short answer": "Sep"}', "Sep"),
        ('```json\n{"solution": "\\frac{1}{2}", "short answer": 0.5}\n```', "0.5"),
        ('{"short answer": "\\pi"}', "\\pi"),
        ('{"short answer": null}', None),
        ('{"solution": "cut', None),
    ],
)
def test_json_fields(response, value):
    assert json_field(response, "short answer") == value


@pytest.mark.parametrize(
    "text",
    [
        " " * 20_000 + "x",
        "*" * 20_000,
        "answer is " * 4_000,
        "1,1," * 6_000 + "x",
        "1" * 20_000,
        "1" * 5_000 + "e5",
        "A, " * 8_000 + "is",
        "<answer>" * 4_000,
        "(((" * 6_000 + "A",
        '"short answer": ' * 2_000,
        "\\boxed{" * 3_000,
    ],
)
def test_hostile_texts_cost_no_more_than_long_ones(text):
    start = time.process_time()
    chosen(text, OPTIONS)
    chosen_labels(text)
    stated_number(text)
    json_field(text, "short answer")
    option_meant(text[:2000], OPTIONS)
    assert time.process_time() - start < 2.0
