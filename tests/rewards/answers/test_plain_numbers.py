"""Plain numbers have exact values."""

import time
from fractions import Fraction

import pytest

from luspo_jax.rewards.answers.plain_numbers import cut_off_agrees, exact_number, numbers_equal


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        ("5", 5),
        ("-5", -5),
        ("+ 5", 5),
        ("1,024", 1024),
        ("1{,}024,000", 1024000),
        ("1 024", 1024),
        ("27.", 27),
        (".5", Fraction(1, 2)),
        ("1,000.99", Fraction(100099, 100)),
        ("$5", 5),
        (r"\$5", 5),
        ("3/4", Fraction(3, 4)),
        (r"-\frac{3}{4}", Fraction(-3, 4)),
        (r"\frac{-3}{4}", Fraction(-3, 4)),
        ("10,24", None),
        ("0,111", None),
        ("1/0", None),
        (".", None),
        ("$", None),
        ("", None),
        ("x", None),
        ("1e5", 100_000),
        (r"1.6\times 10^{-3}", Fraction(16, 10_000)),
        (r"3\frac{1}{2}", Fraction(7, 2)),
        ("-3 1/2", Fraction(-7, 2)),
        (r"0.1\overline{6}", Fraction(1, 6)),
        ("0.(3)", Fraction(1, 3)),
        ("5$", 5),
        ("1 2", None),
        (r"1\frac{1}{0}", None),
        ("9" * 1000, None),
    ],
)
def test_values(answer, value):
    assert exact_number(answer) == value


def test_a_decimal_stands_for_a_fraction_from_four_places_on():
    assert numbers_equal("1/3", "0.3333")
    assert numbers_equal("0.3333", "1/3")
    assert not numbers_equal("1/3", "0.333")
    assert not numbers_equal("1/3", "0.3334")
    assert not numbers_equal("1/4", "0.2501")


def test_a_decimal_that_goes_on():
    assert cut_off_agrees("1/3", r"0.333\ldots")
    assert cut_off_agrees(r"0.1666\ldots", "1/6")
    assert not cut_off_agrees("1/3", r"0.334\ldots")
    assert not cut_off_agrees("1/3", "0.333")


@pytest.mark.parametrize("piece", ["1", "1,", "1 ", "1,000", "-", "$"])
def test_long_answers_are_quick(piece):
    start = time.process_time()
    exact_number(piece * 100)
    assert time.process_time() - start < 0.5
