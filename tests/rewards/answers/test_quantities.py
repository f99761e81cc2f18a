"""Units, percent, bases, residues, ratios and times."""

from fractions import Fraction

import pytest

from luspo_jax.rewards.answers import quantities


@pytest.mark.parametrize(
    ("answer", "value", "unit", "factor"),
    [
        ("5 cm", "5", (("length", 1),), Fraction(1, 100)),
        (r"5\text{ cm}^2", "5", (("length", 2),), Fraction(1, 10_000)),
        (r"25 \text{ square feet}", "25", (("length", 2),), Fraction("0.3048") ** 2),
        ("60 km/h", "60", (("length", 1), ("time", -1)), Fraction(1000, 3600)),
        (r"\$5", "5", (("money", 1),), Fraction(1)),
        (r"17\text{ apples}", "17", None, Fraction(1)),
        ("12 dollars", "12", (("money", 1),), Fraction(1)),
        ("5 million", r"5 \times 10^{6}", None, Fraction(1)),
        (r"30^{\circ}", "30", (("angle", 1),), Fraction(1)),
    ],
)
def test_units(answer, value, unit, factor):
    found = quantities.quantity(answer)
    assert (found.value, found.unit, found.factor) == (value, unit, factor)


@pytest.mark.parametrize("answer", ["5", "5x", "5 x", "10 or 12", "2 pi", r"5\text{ or }6", "5m"])
def test_what_is_no_unit(answer):
    assert quantities.quantity(answer) is None


def test_bases_and_residues():
    assert quantities.in_base("2516_{8}") == (0o2516, 8)
    assert quantities.in_base("ff_{16}") == (255, 16)
    assert quantities.in_base(r"413_{\text{five}}") == (108, 5)
    assert quantities.in_base("(1011)_2") == (11, 2)
    assert quantities.in_base("1011 base 2") == (11, 2)
    for answer in ("9_{8}", "9_{99}", "9", "a_{1}"):
        assert quantities.in_base(answer) is None
    assert quantities.residue(r"7 \pmod{10}") == (7, 10)
    assert quantities.residue(r"x \equiv 7 (mod 10)") == (7, 10)
    assert quantities.residue(r"7 \pmod{0}") is None


def test_percent_and_ratios():
    assert quantities.percent(r"12.5\%") == "12.5"
    assert quantities.percent("12 percent") == "12"
    assert quantities.percent("12") is None
    assert quantities.ratio("3 to 4") == ["3", "4"]
    assert quantities.ratio("3:4:5") == ["3", "4", "5"]
    assert quantities.ratio("3/4") is None
    assert quantities.proportional([Fraction(1), Fraction(2)], [Fraction(3), Fraction(6)])
    assert not quantities.proportional([Fraction(1), Fraction(0)], [Fraction(2), Fraction(0)])


@pytest.mark.parametrize(
    ("gold", "prediction", "verdict"),
    [
        ("3:30 PM", "3:30 p.m.", True),
        ("3:30 PM", "3:30 AM", False),
        ("3:30", "3:30 PM", True),
        ("2 PM", "2:00 PM", True),
        ("3:30", "6:60", None),
        ("5", "5", None),
    ],
)
def test_times(gold, prediction, verdict):
    assert quantities.times_of_day_agree(gold, prediction) is verdict
