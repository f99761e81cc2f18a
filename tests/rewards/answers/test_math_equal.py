"""A table of answers with verdict and reason, and the rules that decide without a parser."""

import csv
import pathlib
import time

import pytest

from luspo_jax.rewards.answers.answer_lists import read_parts
from luspo_jax.rewards.answers.latex import tidy
from luspo_jax.rewards.answers.math_equal import LONGEST, RULES, WORD_RULES, equal

TABLE = pathlib.Path(__file__).with_name("math_cases.tsv")
CASES = [
    row
    for row in csv.reader(TABLE.open(encoding="utf-8"), delimiter="\t", quoting=csv.QUOTE_NONE)
    if row and not row[0].startswith("#")
]


def test_the_table_is_large_and_its_cases_are_distinct():
    assert len(CASES) >= 200
    assert len({tuple(row[:2]) for row in CASES}) == len(CASES)
    assert {row[2] for row in CASES} == {"0", "1"}


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]} | {case[1]}")
def test_case(case):
    gold, prediction, verdict, reason = case
    assert equal(gold, prediction) == (verdict == "1"), reason


@pytest.mark.parametrize(
    ("gold", "prediction", "tolerances", "verdict"),
    [
        (r"\cos^{10}(\frac{\pi}{10})", "0.6054", [1e-4], True),
        (r"7 \times 10^{35}", r"7.1 \cdot 10^{35}", [1e34], True),
        (r"7 \times 10^{35}", r"7.1 \cdot 10^{35}", [1e33], False),
        ("7, 0.002", "0.001, 7.5", [1.0, 1e-3], True),  # tolerances follow the gold's order
        ("7, 0.002", "0.001, 7.5", [1e-3, 1.0], False),
        ("0.003, 5.233", "0.002, 5.234", [1e-3], True),
        ("1, 2", "1", [1.0], False),
        ("5", "x", [1e9], False),
    ],
)
def test_tolerances(gold, prediction, tolerances, verdict):
    assert equal(gold, prediction, tolerances=tolerances) == verdict


def test_nothing_equals_an_empty_or_an_endless_answer():
    assert not equal("", "")
    assert not equal("5", " $ $ ")
    assert not equal("5", "1+" * LONGEST + "1")


@pytest.mark.parametrize("piece", ["1 a  ", "A, ", "per ", "A and ", "(", "1,", "m^2/", "1 ", "x<"])
def test_rules_take_no_longer_than_the_length_of_an_answer_asks(piece):
    answer = "5 " + piece * (LONGEST // len(piece) - 2) + "!"
    start = time.process_time()
    for rule in (*WORD_RULES, *RULES[:-1]):  # the last asks the parser
        rule(tidy(answer), "5")
    read_parts(tidy(answer))
    assert time.process_time() - start < 1.5


@pytest.mark.parametrize(
    ("gold", "prediction", "same"),
    [
        ("A:B=2", "2", True),
        ("A:B=2", "C:B=2", False),
        (r"\frac{MN}{PN}=\frac{1}{\sqrt{7}}", r"\frac{1}{\sqrt{7}}", True),
        (r"\frac{MN}{PN}=2", r"\frac{PN}{MN}=2", False),
        ("PQ/RS=3", "4", False),
    ],
)
def test_a_ratio_of_lengths_is_a_name(gold, prediction, same):
    assert equal(gold, prediction) is same
