"""Accuracy under token budgets, by hand and against a transcription that judges every cut."""

import dataclasses
import json
import math

import numpy as np
import pytest

from luspo_jax.benchmarks import budgets
from luspo_jax.benchmarks.budgets import Curve, Judged
from luspo_jax.benchmarks.intervals import accuracy_interval
from luspo_jax.rewards import Reward, Sample


class Judge:
    """Right if the text so far holds the answer; `X` in a text breaks the verifier."""

    def __init__(self):
        self.samples = []

    def verdict(self, sample):
        if "X" in sample.response:
            return Reward(0.0, "error", {"right": 0.0})
        right = float(sample.answer in sample.response)
        return Reward(right, "ok", {"right": right, "other": 1.0 - right})

    def score_batch(self, samples):
        self.samples += samples
        return [self.verdict(sample) for sample in samples]


def _decode(tokens):
    """Token 0 is the stop token, which has no text."""
    return "".join(chr(token) for token in tokens if token)


def _judged(text, answer, *, prompt="?", stopped=True):
    tokens = [*map(ord, text), *([0] if stopped else [])]
    opening = "<think>" if prompt.endswith("<think>") else ""
    sample = Sample(opening + text, answer, len(tokens), 99, {"level": 2}, "problem")
    return Judged(prompt, tokens, sample, Judge().verdict(sample))


def _under(responses, sizes, metric="right"):
    judge = Judge()
    found, count = budgets.right_under(responses, sizes, judge, _decode, metric)
    assert count == len(judge.samples)
    return found, judge.samples


def test_a_response_is_right_from_the_budget_that_holds_its_answer():
    found, samples = _under([_judged("ab42cdef", "42")], (1, 3, 4, 6, 8, 9, 16))
    np.testing.assert_array_equal(found, [[0, 0, 1, 1, 1, 1, 1]])
    # Nine tokens with the stop token: cut at 8 only that is lost, so the text is what was judged.
    assert [(s.response, s.length) for s in samples] == [
        ("a", 1), ("ab4", 3), ("ab42", 4), ("ab42cd", 6),
    ]  # fmt: skip
    assert {(s.answer, s.max_length, s.meta["level"], s.problem) for s in samples} == {
        ("42", 99, 2, "problem")
    }


def test_a_cut_can_make_a_response_right():
    """What follows may spoil an answer: here a text that its verifier cannot read."""
    found, _ = _under([_judged("42X", "42")], (2, 4))
    np.testing.assert_array_equal(found, [[1, np.nan]])


def test_the_opening_of_the_reasoning_is_judged_too():
    found, samples = _under([_judged("ab</think>1", "1", prompt="why? <think>")], (2, 64))
    assert [s.response for s in samples] == ["<think>ab"]
    np.testing.assert_array_equal(found, [[0, 1]])


def test_another_part_may_be_what_counts():
    found, _ = _under([_judged("ab42", "42")], (2, 8), metric="other")
    np.testing.assert_array_equal(found, [[1, 0]])


def test_without_long_responses_the_judge_is_not_asked():
    found, count = budgets.right_under([_judged("42", "42")], (3, 8), None, _decode, "right")
    assert count == 0
    np.testing.assert_array_equal(found, [[1, 1]])
    assert budgets.right_under([], (3,), None, _decode, "right")[0].shape == (0, 1)


def test_against_judging_every_cut():
    rng = np.random.default_rng(5)
    sizes = (1, 2, 5, 11, 30)
    responses = [
        _judged("".join(rng.choice(list("0123X"), rng.integers(1, 24))), "1", stopped=bool(i % 2))
        for i in range(60)
    ]
    found, samples = _under(responses, sizes)
    for response, row in zip(responses, found, strict=True):
        for size, value in zip(sizes, row, strict=True):
            text = _decode(response.tokens[:size])
            right = math.nan if "X" in text else float("1" in text)
            np.testing.assert_equal(value, right)
    longer = sum(len(r.tokens) > size for r in responses for size in sizes)
    assert 0 < len(samples) <= longer < len(responses) * len(sizes)


# --- curves ------------------------------------------------------------------------------------


def test_curve_and_area_by_hand():
    nan = np.nan
    right_PSK = np.array([
        [[0, 1, 1], [0, 0, 1]],
        [[nan, 0, 1], [0, nan, 1]],
        [[nan, nan, 0], [nan, nan, 0]],
    ])  # fmt: skip
    found = budgets.curve(right_PSK, (4, 8, 32), 7)
    assert found.accuracy == pytest.approx((0.0, (1 / 2 + 0) / 2, 2 / 3))
    assert found.ci95[0] == accuracy_interval([0, 0], [2, 1])
    assert found.ci95[1] == accuracy_interval([1, 0], [2, 1])
    assert found.ci95[2] == accuracy_interval([2, 2, 0], [2, 2, 2])
    # log2: 2, 3, 5; trapezoids (0 + 1/4)/2 · 1 and (1/4 + 2/3)/2 · 2, over 3.
    assert found.area == pytest.approx((0.125 + 11 / 12) / 3)
    assert (found.budgets, found.judged_again) == ((4, 8, 32), 7)


def test_area_of_one_budget_and_of_a_flat_curve_is_the_accuracy():
    ones = np.ones((3, 2, 4))
    assert budgets.curve(ones, (3, 7, 8, 90)).area == pytest.approx(1)
    assert budgets.curve(ones[:, :, :1] * [[[1]], [[0]], [[0]]], (8,)).area == pytest.approx(1 / 3)
    nothing = budgets.curve(np.full((2, 2, 1), np.nan), (8,))
    assert math.isnan(nothing.accuracy[0])
    assert math.isnan(nothing.area)


def test_a_curve_survives_json():
    found = budgets.curve(np.ones((3, 2, 2)), (4, 8), 3)
    assert Curve.from_json(json.loads(json.dumps(dataclasses.asdict(found)))) == found


# --- settings ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "limit", "expected"),
    [
        ("", 64, ()),
        ("auto", 20_480, (1024, 2048, 4096, 8192, 16_384, 20_480)),
        ("auto", 32_768, (1024, 2048, 4096, 8192, 16_384, 32_768)),
        ("auto", 40, (2, 4, 8, 16, 32, 40)),
        ("auto", 1, (1,)),
        ("1024, 2048", 4096, (1024, 2048)),
        ("4096", 4096, (4096,)),
    ],
)
def test_budgets_are_read(text, limit, expected):
    assert budgets.budgets(text, limit) == expected


@pytest.mark.parametrize("text", ["0,8", "8,8", "16,8", "8,", "1.5", "long", "128", "-4,8"])
def test_other_budgets_are_refused(text):
    with pytest.raises(ValueError, match=r'^budgets="[^"]*" must be "auto" or ascending.*\(64\)'):
        budgets.budgets(text, 64)


def test_tokens_per_right():
    assert budgets.tokens_per_right([10, 20, 30], [True, False, True]) == 30
    assert budgets.tokens_per_right([10], [False]) == math.inf
