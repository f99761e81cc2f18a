"""Exact match, of the whole response or of what a pattern finds in it."""

import pytest

from luspo_jax.rewards import Scorer
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
        (None, "<think>4 or 5</think>\n4", 1, "ok", "4"),
        (None, "<think>4", 0, "unparsed", None),
        (r"\d", "<think>4</think>5", 0, "ok", "5"),
    ],
)
def test_verdict(pattern, response, value, status, prediction):
    verdict = exact(pattern).check(Sample(response, "4"))
    assert (verdict.value, verdict.status, verdict.prediction) == (value, status, prediction)


def test_a_pattern_that_may_backtrack_for_ever_runs_where_it_can_be_killed():
    assert exact("(a+)+b").isolated
    assert not exact().isolated
    samples = [Sample("a" * 40, "4"), Sample("ab", "a")]
    options = {"exact": {"pattern": "(a+)+b"}}
    with Scorer(
        {"exact": 1.0}, options=options, workers=1, time_limit=0.3, max_failure_rate=1.0
    ) as scorer:
        rewards = scorer.score_batch(samples)
    assert [(reward.value, reward.status) for reward in rewards] == [(0, "timeout"), (1, "ok")]


@pytest.mark.parametrize("pattern", ["((", "*", 4, ["a"]])
def test_a_pattern_that_is_none_is_refused(pattern):
    with pytest.raises(ValueError, match=r"reward 'exact': pattern=.* is no regular expression"):
        Scorer({"exact": 1.0}, options={"exact": {"pattern": pattern}})


def test_the_label_names_the_pattern():
    assert exact(r"#(\d)").label != exact().label
