"""Finding the final answer in a response."""

import time

import pytest

from luspo_jax.rewards.extraction import (
    after_reasoning,
    boxed_answer,
    boxed_contents,
    final_answer,
)


@pytest.mark.parametrize(
    ("response", "spoken"),
    [
        ("It is 5.", "It is 5."),
        ("<think>It is 4.</think>It is 5.", "It is 5."),
        ("It is 4.\n</think>\nIt is 5.", "\nIt is 5."),  # the prompt opened the reasoning
        ("<think>a</think>It is 4.<think>b</think>It is 5.", "It is 5."),
        ("It is 4.<think>b", ""),
        ("<think>a</think>It is 4.<think>b", ""),
        ("<think>a</think>", ""),
        ("", ""),
    ],
)
def test_what_is_thought_is_no_answer(response, spoken):
    assert after_reasoning(response) == spoken


@pytest.mark.parametrize(
    ("text", "contents"),
    [
        (r"\boxed{1}", ["1"]),
        (r"\boxed{\frac{1}{2}} then \fbox{3}", [r"\frac{1}{2}", "3"]),
        (r"\boxed {x}", ["x"]),
        (r"\boxed{\boxed{7}}", [r"\boxed{7}"]),
        (r"\boxed{\{1, 2\}}", [r"\{1, 2\}"]),
        (r"\boxed{a\}", []),
        (r"\boxed{", []),
        (r"\boxed{1 \boxed{2}", ["2"]),
        (r"} \boxed{3}}", ["3"]),
        ("boxed{1}", []),
        ("", []),
    ],
)
def test_boxes(text, contents):
    assert boxed_contents(text) == contents


@pytest.mark.parametrize(
    "piece",
    [
        *(r"\boxed{", "{", "}", r"\boxed{}", "\\", r"\boxed{1} and ", "$", "$$", r"\(", " ", "\n"),
        *("answer is ", "answer", "Answer: ", "#### ", "is ", "* ", "final answer is $1$ and "),
    ],
)
def test_time_grows_with_the_length_and_no_faster(piece):
    text = piece * (200_000 // len(piece))
    start = time.process_time()
    boxed_answer(text)
    final_answer(text)
    final_answer("answer is " + text)
    assert time.process_time() - start < 3.0
