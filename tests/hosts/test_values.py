"""The rules of values, and the one line that refuses one."""

import math

import numpy as np
import pytest

from luspo_jax.hosts.values import SEED, TEMPERATURE, Number, OneOf, Text, nearest, refusal


def test_an_unknown_name_is_answered_with_the_closest_and_with_few_names_all():
    assert nearest("lenght", ["length", "none"]) == "did you mean 'length'? known: length, none"
    assert nearest("zzz", ["b", "a", ""]) == "known: a, b"
    many = [f"field_{i}" for i in range(99)]
    assert nearest("field_7x", many) == "did you mean 'field_7'?"
    assert nearest("zzz", many) == "nothing has a name like it"


@pytest.mark.parametrize(
    ("rule", "inside", "outside"),
    [
        (Number(0, 1), (0, 0.5, 1), (-1e-9, 1.1)),
        (Number(0, 1, open_low=True), (1e-30, 1), (0, 1.1)),
        (Number(0, 1, open_high=True), (0, 0.999), (1,)),
        (Number(2, 9, also=(0,)), (0, 2, 9), (1, 10)),
        (SEED, (0, 2**32 - 1), (-1, 2**32)),
        (TEMPERATURE, (1e-3, 1, 1e3), (0, 1e-4, 1e-9, 1e-40)),
    ],
    ids=str,
)
def test_numbers_lie_between_their_bounds_and_are_finite(rule, inside, outside):
    assert all(rule.allows(value) for value in inside)
    for value in (*outside, math.nan, math.inf, -math.inf):
        assert not rule.allows(value)
        assert str(rule) in refusal("a.b", float(value), float, rule)


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        *((value, bool) for value in (0, 1, "True", None, np.True_)),
        *((value, int) for value in (1.0, True, "1", None, np.int64(1), [1])),
        *((value, float) for value in (True, "1", None, {}, np.float32(1))),
        *((value, str) for value in (1, None, b"x", ["x"], {"x": 1})),
    ],
)
def test_another_type_is_refused_in_a_line_that_shows_it(value, kind):
    line = refusal("a.b", value, kind)
    assert line.startswith("a.b=")
    assert "\n" not in line
    assert len(line) < 140


def test_a_whole_number_is_a_number_and_numpys_float_is_one():
    assert refusal("a", 1, float) is None
    assert refusal("a", np.float64(0.5), float) is None


def test_names_and_texts():
    assert refusal("a", "y", str, OneOf(("x", "y"))) is None
    assert (
        refusal("a", "xy", str, OneOf(("x", "y")))
        == "a='xy' does not exist: did you mean 'y'? known: x, y"
    )
    assert refusal("a", " ", str, Text("say something")) == "a is empty: say something"
