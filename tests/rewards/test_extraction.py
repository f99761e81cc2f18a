"""Finding the final answer in a response."""

import time

import pytest

from luspo_jax.rewards.extraction import boxed_contents


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


@pytest.mark.parametrize("piece", [r"\boxed{", "{", "}", r"\boxed{}", "\\"])
def test_time_grows_with_the_length_and_no_faster(piece):
    start = time.perf_counter()
    boxed_contents(piece * (500_000 // len(piece)))
    assert time.perf_counter() - start < 3.0
