"""Plain numbers have exact values."""

import time
from fractions import Fraction

import pytest

from luspo_jax.rewards.plain_numbers import exact_number, in_base, numbers_equal


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
        ("1e5", None),
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


def test_bases():
    assert in_base("2516_{8}") == 0o2516
    assert in_base("ff_{16}") == 255
    assert in_base("9_{8}") is None
    assert in_base("9_{99}") is None
    assert in_base("9") is None


@pytest.mark.parametrize("piece", ["1", "1,", "1 ", "1,000", "-", "$"])
def test_long_answers_are_quick(piece):
    start = time.process_time()
    exact_number(piece * 100)
    assert time.process_time() - start < 0.5
