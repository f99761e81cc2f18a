"""GSM8K's rule: the number after the last ####."""

import pytest

from luspo_jax.rewards.gsm8k import gsm8k
from luspo_jax.rewards.record import Sample


@pytest.mark.parametrize(
    ("response", "answer", "value", "status"),
    [
        ("#### 18", "18", 1, "ok"),
        ("first #### 3, no: #### 18", "18", 1, "ok"),
        ("#### 18\n#### 3", "18", 0, "ok"),
        ("#### 1,024", "1024", 1, "ok"),
        ("#### $1,024.50", "1024.5", 1, "ok"),
        ("#### 18.0", "18", 1, "ok"),
        ("#### -3", "-3", 1, "ok"),
        ("#### .5", "0.5", 1, "ok"),
        ("#### 18 eggs", "18", 1, "ok"),
        ("#### 18", "She has 9 * 2 = 18.\n#### 18", 1, "ok"),
        ("a#1=3;b2=0;#### 4", "4", 1, "ok"),
        ("18", "18", 0, "unparsed"),
        ("####", "18", 0, "unparsed"),
        ("#### eighteen", "18", 0, "unparsed"),
        ("#### 18", "eighteen", 0, "error"),
    ],
)
def test_verdict(response, answer, value, status):
    verdict = gsm8k().check(Sample(response, answer))
    assert (verdict.value, verdict.status) == (value, status)


def test_the_prediction_is_written_without_an_exponent():
    number = gsm8k().check(Sample("#### 100000000000000000000000000000", "1")).prediction
    assert number == "1" + "0" * 29


def test_another_mark():
    assert gsm8k("A:").check(Sample("so it is 3\nA: 3", "3\nA: 3")).value == 1
    assert gsm8k("A:").check(Sample("#### 3", "3")).status == "unparsed"
    assert gsm8k("A:").label != gsm8k().label
