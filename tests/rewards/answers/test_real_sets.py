"""Intervals, inequalities, unions and conditions are sets of reals."""

import pytest

from luspo_jax.rewards.answers.real_sets import sets_agree
from luspo_jax.rewards.answers.symbolic import expression


@pytest.mark.parametrize(
    ("gold", "prediction", "verdict"),
    [
        (r"x \ge 3", r"[3,\infty)", True),
        ("1<x<2", "(1,2)", True),
        ("2>x>1", "(1,2)", True),
        ("|x-1|<2", "(-1,3)", True),
        (r"x<-1 \text{ or } x>1", r"(-\infty,-1)\cup(1,\infty)", True),
        (r"\{x \mid x>3\}", r"(3,\infty)", True),
        (r"\mathbb{R}\setminus\{0\}", r"x \ne 0", True),
        ("x<1", "y<1", False),
        ("(1,2)", "(1,2)", None),  # points, perhaps
        ("1<x<2", "x+y<1", None),
        ("x<1", "5", None),
    ],
)
def test_agreement(gold, prediction, verdict):
    assert sets_agree(gold, prediction, expression) is verdict


@pytest.mark.parametrize(("gold", "prediction"), [("x<1", "x>1"), ("x<1", r"(-\infty,1]")])
def test_other_sets_do_not_agree(gold, prediction):
    assert not sets_agree(gold, prediction, expression)
