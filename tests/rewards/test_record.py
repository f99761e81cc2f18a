"""Rewards are records: values, the worst status, the parts, and what went wrong."""

import math

import pytest

from luspo_jax.rewards.record import Sample, Verdict, Verifier, combine, run


def test_a_reward_is_the_weighted_sum_of_its_parts():
    verdicts = {"format": Verdict(1.0), "math": Verdict(0.0, "unparsed", detail="no box")}
    reward = combine({"math": 1.0, "format": 0.5}, verdicts)
    assert reward.value == 0.5
    assert reward.parts == {"math": 0.0, "format": 1.0}
    assert list(reward.parts) == ["math", "format"]
    assert (reward.status, reward.detail) == ("unparsed", "math: no box")


def test_the_worst_status_and_the_first_prediction_win():
    verdicts = {
        "a": Verdict(0.0, "timeout"),
        "b": Verdict(1.0, prediction="5"),
        "c": Verdict(0.0, "unparsed", prediction="6"),
    }
    reward = combine({"a": 1, "b": 1, "c": 1}, verdicts)
    assert (reward.status, reward.prediction) == ("timeout", "5")


def test_an_exception_becomes_an_error_with_its_reason():
    def broken(sample):
        raise RuntimeError("out of ink")

    verdict = run(Verifier("broken", "1", broken), Sample("", ""))
    assert (verdict.value, verdict.status) == (0.0, "error")
    assert verdict.detail == "RuntimeError: out of ink"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_value_that_is_no_number_is_an_error_too(value):
    verdict = run(Verifier("odd", "1", lambda sample: Verdict(value)), Sample("", ""))
    assert verdict.status == "error"


def test_an_unknown_status_is_refused():
    with pytest.raises(ValueError, match="unparsed"):
        Verdict(0.0, "maybe")
