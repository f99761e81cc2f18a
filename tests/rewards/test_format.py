"""Format rewards look at form only."""

import pytest

from luspo_jax.rewards.format import FORMATS, text_format
from luspo_jax.rewards.record import Sample

VL = "<think>\nwork\n</think> <answer> The answer is $\\boxed{5}$ </answer>"


@pytest.mark.parametrize(
    ("name", "response", "value"),
    [
        ("answer_line", "work\nAnswer: 5\n", 1),
        ("answer_line", "Answer: 5\nAnswer: 6", 0),
        ("answer_line", "Answer: 5\nand more", 0),
        ("answer_line", "Answer:", 0),
        ("answer_line", "5", 0),
        ("gsm8k_line", "work #### 1,000", 1),
        ("gsm8k_line", "#### 4 #### 4", 0),
        ("gsm8k_line", "#### four", 0),
        ("gsm8k_line", "#### 4 and", 0),
        ("boxed", r"so \boxed{\frac{1}{2}}.", 1),
        ("boxed", r"\boxed{1} or \boxed{2}", 0),
        ("boxed", r"\boxed{1", 0),
        ("boxed", r"\boxed{1} \boxed{2", 0),
        ("boxed", r"\boxed{ }", 0),
        ("answer_line", "<think>Answer: 5</think>Answer: 6", 1),
        ("answer_line", "<think>Answer: 5", 0),
        ("gsm8k_line", "<think>so\n#### 4", 0),
        ("boxed", r"<think>\boxed{4}?</think>\boxed{5}", 1),
        ("boxed", r"<think>\boxed{5}", 0),
        ("luspo_vl", VL, 1),
        ("luspo_vl", VL.replace("\n", ""), 1),
        ("luspo_vl", VL + " done", 0),
        ("luspo_vl", "so " + VL, 0),
        ("luspo_vl", VL.replace("work", " "), 0),
        ("luspo_vl", VL.replace("work", "a <think> b"), 0),
        ("luspo_vl", VL.replace("5}", "5}, \\boxed{6}"), 0),
        ("luspo_vl", VL.replace("The answer is ", ""), 0),
        ("luspo_vl", VL.replace("</think> ", "</think> aside "), 0),
        ("luspo_vl", VL.replace("\\boxed{5}", "5"), 0),
    ],
)
def test_named_formats(name, response, value):
    assert text_format(name).check(Sample(response, "unused")).value == value


@pytest.mark.parametrize("name", FORMATS)
def test_every_named_format_refuses_an_empty_response(name):
    assert text_format(name).check(Sample("", "")).value == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fullmatch": "(("}, "fullmatch=.* is no regular expression"),
        ({"final": 3}, "final=3 is no regular expression"),
        ({"name": ["boxed"]}, "unknown format"),
        ({"name": "boxd"}, "known: answer_line"),
        ({}, "exactly one of"),
    ],
)
def test_what_is_no_form_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        text_format(**options)


def test_patterns_of_the_users_own():
    whole = text_format(fullmatch=r"[a-z=;]*#\d\$")
    assert [whole.check(Sample(r, "")).value for r in ("a=b;#4$", "#4$ ", "4")] == [1, 0, 0]
    final = text_format(final=r"#\d\$")
    assert [final.check(Sample(r, "")).value for r in ("a#4$ ", "#4$#4$", "#4$a")] == [1, 0, 0]


def test_a_pattern_that_may_backtrack_for_ever_runs_where_it_can_be_killed():
    assert text_format(fullmatch="(a+)+b").isolated
    assert not text_format("boxed").isolated


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="answer_line"):
        text_format("answer")
    with pytest.raises(ValueError, match="exactly one"):
        text_format("boxed", final="x")
    with pytest.raises(ValueError, match="exactly one"):
        text_format()
