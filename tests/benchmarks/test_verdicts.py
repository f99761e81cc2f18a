"""Missing, empty and unknown predictions are counted and named; nothing is scored from nothing."""

import pytest

from luspo_jax.benchmarks.verdicts import BenchmarkError, accuracy, score
from luspo_jax.benchmarks.visual import VISUAL
from luspo_jax.datasets.example import Example


def _items(number=4):
    meta = {"question_type": "free_form", "answer_type": "integer", "choices": None}
    meta |= {"task": "t", "skills": ["s"]}
    return [Example(n, "q", str(n), meta | {"id": str(n)}) for n in range(number)]


def test_what_is_missing_is_named():
    predictions = {"0": "0", "1": "", "2": "no idea", "9": "9"}
    scores = score(VISUAL["mathvista"], _items(), predictions)
    assert [v.status for v in scores.verdicts.values()] == ["ok", "empty", "unparsed", "missing"]
    assert scores.with_status("missing") == ["3"]
    assert scores.with_status("empty") == ["1"]
    assert scores.unknown == ["9"]
    assert scores.lines[0].strict == 0.25
    assert scores.scorer == f"mathvista@{VISUAL['mathvista'].version}"


@pytest.mark.parametrize(
    ("items", "predictions", "message"),
    [
        (_items(), {}, "there are no predictions"),
        ([], {"0": "0"}, "there are no annotations"),
        (_items(), {"a": "0"}, "no prediction has the id .* predictions have 'a', annotations '0'"),
        (_items(1) * 2, {"0": "0"}, "two annotations have the id '0'"),
    ],
)
def test_what_cannot_be_scored_is_refused(items, predictions, message):
    with pytest.raises(BenchmarkError, match=message):
        score(VISUAL["mathvista"], items, predictions)


def test_accuracy_counts_an_item_in_each_of_its_groups():
    items = _items(3)
    verdicts = list(
        score(VISUAL["mathvista"], items, {"0": "0", "1": "5", "2": "2"}).verdicts.values()
    )
    found = accuracy("a", items, verdicts, lambda item: ["x", item.answer])
    assert [(f.group, f.n, f.strict) for f in found] == [
        ("0", 1, 1.0),
        ("1", 1, 0.0),
        ("2", 1, 1.0),
        ("x", 3, pytest.approx(2 / 3)),
    ]


@pytest.mark.parametrize("name", sorted(VISUAL))
def test_every_benchmark_says_what_its_second_column_is(name):
    assert VISUAL[name].note
    assert VISUAL[name].label == f"{name}@{VISUAL[name].version}"
