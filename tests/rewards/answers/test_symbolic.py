"""Formulas are compared by their values where these tell."""

import pytest

from luspo_jax.rewards.answers.symbolic import (
    equal_values,
    expression,
    formulas_equal,
    text_ends_on,
)


@pytest.mark.parametrize(
    ("gold", "prediction", "verdict"),
    [
        ("x^2+2x", "x(x+2)", True),
        (r"\sqrt{x^2}", "x", False),
        (r"\sqrt{x^2}", "|x|", True),
        (r"\sqrt{ab}", r"\sqrt{a}\sqrt{b}", True),
        (r"\sqrt{a+b}", r"\sqrt{a}+\sqrt{b}", False),
        (r"\frac{R}{r}", "1", False),
        (r"\frac{\sqrt{2}}{10^{20}}", r"\frac{\sqrt{3}}{10^{20}}", False),
        (r"\sqrt{2}+\sqrt{3}", r"\sqrt{5+2\sqrt{6}}", True),
        ("f(x)", "f(y)", False),
        (r"\sum_{k=1}^{n} k", "n", None),
        ("2^{200}", "2^{200}+1", False),
    ],
)
def test_values(gold, prediction, verdict):
    assert equal_values(expression(gold), expression(prediction)) is verdict


def test_what_values_do_not_tell_is_left_to_math_verify():
    assert formulas_equal(r"\sum_{k=1}^{n} k", r"\frac{n(n+1)}{2}")
    assert not formulas_equal("2^{200}", "2^{200}+1")
    assert formulas_equal("y=2x+3", "2x-y+3=0")


@pytest.mark.parametrize(
    ("text", "gold", "verdict"),
    [
        ("Therefore $x < 4$ is the solution.", "$x > 4$", False),
        ("Therefore $4 < x$ is the solution.", "$x > 4$", True),
        ("It grew by 30 cm in a year", "30", True),
    ],
)
def test_a_text_ends_on_its_last_formula(text, gold, verdict):
    assert text_ends_on(text, gold) is verdict
