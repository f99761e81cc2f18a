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
        # The sign, and a number as a whole.
        ("#### −3", "-3", 1, "ok"),
        ("#### −3", "3", 0, "ok"),
        ("#### - 3", "-3", 1, "ok"),
        ("#### **Total** - 3", "3", 1, "ok"),
        ("#### 3/8", "0.375", 1, "ok"),
        ("#### 3/8", "3", 0, "ok"),
        ("#### 2e3", "2000", 1, "ok"),
        ("#### 2e3", "2", 0, "ok"),
        ("#### 2e99999", "2", 0, "unparsed"),
        ("#### 12 345.5", "12345.5", 1, "ok"),
        ("#### １８", "18", 1, "ok"),
        (r"#### \boxed{18}", "18", 1, "ok"),
        ("#### **18**", "18", 1, "ok"),
        ("#### 9 + 9 = 18", "18", 1, "ok"),
        # Part of something else.
        ("#### 18-3", "18", 0, "unparsed"),
        ("#### 18 * 3", "18", 0, "unparsed"),
        ("#### 18**3", "18", 0, "unparsed"),
        ("#### 18:30", "18", 0, "unparsed"),
        ("#### 18, 19", "18", 1, "ok"),
        ("#### 18,19", "18", 0, "unparsed"),
        ("#### 18 3/4", "18", 0, "unparsed"),
        ("#### 18 million", "18", 0, "unparsed"),
        (r"#### \frac{18}{5}", "18", 0, "unparsed"),
        (r"#### \sqrt{18}", "18", 0, "unparsed"),
        (r"#### 18\pi", "18", 0, "unparsed"),
        ("#### " + "1" * 40_000, "1", 0, "unparsed"),
        # References that are no numbers.
        ("#### 18", r"\frac{18}{5}", 0, "error"),
        ("#### 18", r"18\pi", 0, "error"),
        ("#### 18", "x18", 0, "error"),
        ("#### 18", "18 or 19", 0, "error"),
        ("#### 18", "18 eggs", 1, "ok"),
        ("#### 18", "$18.00", 1, "ok"),
        ("#### 18", "18%", 1, "ok"),
        # What is thought is no answer.
        ("<think>#### 18</think>#### 19", "18", 0, "ok"),
        ("<think>so #### 18", "18", 0, "unparsed"),
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


@pytest.mark.parametrize("mark", ["", None, 4])
def test_a_mark_that_is_none_is_refused(mark):
    with pytest.raises(ValueError, match="mark must be"):
        gsm8k(mark)
