"""Exact match, of the whole response or of what a pattern finds in it."""

import pytest

from luspo_jax.rewards.exact import exact
from luspo_jax.rewards.record import Sample


@pytest.mark.parametrize(
    ("pattern", "response", "value", "status", "prediction"),
    [
        (None, " 4 \n", 1, "ok", "4"),
        (None, "44", 0, "ok", "44"),
        (r"#(\d)\$", "a=1#3$ b#4$", 1, "ok", "4"),
        (r"\d", "3 then 4", 1, "ok", "4"),
        (r"#(\d)\$", "a=1", 0, "unparsed", None),
        (r"#(\d)?\$", "#$", 0, "ok", ""),
    ],
)
def test_verdict(pattern, response, value, status, prediction):
    verdict = exact(pattern).check(Sample(response, "4"))
    assert (verdict.value, verdict.status, verdict.prediction) == (value, status, prediction)


def test_the_label_names_the_pattern():
    assert exact(r"#(\d)").label != exact().label
