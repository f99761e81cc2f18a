"""Verdicts, rewards and figures of a visual benchmark; empty and unusable ones are told apart."""

import pytest

from luspo_jax.benchmarks.record import Record
from luspo_jax.benchmarks.statistics import difference, summary
from luspo_jax.benchmarks.verdicts import RuleScorer, accuracy, figures, score
from luspo_jax.benchmarks.visual import VISUAL
from luspo_jax.datasets.example import Example
from luspo_jax.rewards import Sample


def _items(number=4):
    meta = {"question_type": "free_form", "answer_type": "integer", "choices": None}
    meta |= {"task": "t", "skills": ["s"]}
    return [Example(n, "q", str(n), meta | {"id": str(n)}) for n in range(number)]


def test_what_is_missing_is_told_apart():
    verdicts = score(VISUAL["mathvista"], _items(), ["0", "", "no idea", "3.0"])
    assert [v.status for v in verdicts] == ["ok", "empty", "unparsed", "ok"]
    assert [v.strict for v in verdicts] == [True, False, False, True]
    assert [v.vlmevalkit for v in verdicts] == [True, False, False, False]


def test_accuracy_counts_an_item_in_each_of_its_groups():
    items = _items(3)
    verdicts = score(VISUAL["mathvista"], items, ["0", "5", "2"])
    found = accuracy("a", items, verdicts, lambda item: ["x", item.answer])
    assert [(f.group, f.n, f.strict) for f in found] == [
        ("0", 1, 1.0),
        ("1", 1, 0.0),
        ("2", 1, 1.0),
        ("x", 3, pytest.approx(2 / 3)),
    ]


def _records(name, items, responses):
    """Records of equally many responses to each item, judged by the benchmark's rule."""
    rows = [(item, k, text) for item, texts in zip(items, responses, strict=True)
            for k, text in enumerate(texts)]  # fmt: skip
    samples = [Sample(text, item.answer, None, None, item.meta, item.problem)
               for item, _, text in rows]  # fmt: skip
    with RuleScorer(VISUAL[name], workers=1) as judge:
        rewards = judge.score_batch(samples)
    return [
        Record(name, item.id, k, "", text, item.answer, None, None, None, item.meta, reward,
               judge.labels, item.problem)
        for (item, k, text), reward in zip(rows, rewards, strict=True)
    ]  # fmt: skip


def test_a_reward_holds_both_columns():
    records = _records("mathvista", _items(2), [["0.0"], ["1"]])
    assert [r.verdict.parts for r in records] == [
        {"strict": 1.0, "vlmevalkit": 0.0},
        {"strict": 1.0, "vlmevalkit": 1.0},
    ]
    assert records[0].scorers == {"mathvista": VISUAL["mathvista"].label}
    assert (records[0].verdict.value, records[0].verdict.prediction) == (1.0, "0.0")


def test_figures_of_several_responses_are_their_mean():
    """The worst case is that of the first responses and that of the second, not of all."""
    meta = {"answer_type": "float", "subject": "s", "level": "l", "question_id": "q"}
    items = [Example(v, "x?", str(v), meta | {"id": f"q/{v}", "variant": v}) for v in range(2)]
    records = _records("dynamath", items, [["0", "0"], ["1", "5"]])
    found = {(line.table, line.group): line for line in figures(VISUAL["dynamath"], records[::-1])}
    assert (found["average", "all"].strict, found["average", "all"].n) == (0.75, 2)
    assert (found["worst case", "all"].strict, found["worst case", "all"].n) == (0.5, 1)
    assert summary(records, metric="strict").accuracy == 0.75


def test_an_undefined_figure_stays_so():
    """Rote memorization is a share of the problems that were solved: of none it is undefined."""
    steps = [("2steps_1", "A"), ("2steps_2", "B"), ("2steps_multi", "C")]
    meta = {"option": "A. 1; B. 2; C. 3", "problem_id": "p"}
    items = [
        Example(n, "q", answer, meta | {"step": step, "id": f"p/{step}"})
        for n, (step, answer) in enumerate(steps)
    ]
    wrong_then_right = [["C", "A"], ["C", "B"], ["A", "C"]]
    lines = figures(VISUAL["wemath"], _records("wemath", items, wrong_then_right))
    found = {(line.table, line.group): line.strict for line in lines}
    assert found["four states, strict", "RM rate"] == 0.0  # of the second responses alone
    assert found["four states, strict", "score"] == 0.5
    wrong = figures(VISUAL["wemath"], _records("wemath", items, [["C"], ["C"], ["A"]]))
    assert {line.group: line.strict for line in wrong}["RM rate"] is None


def test_unusable_annotations_do_not_count():
    items = [Example(n, "q", a, {"id": n, "skill": ["s"]}) for n, a in enumerate(["B", ""])]
    records = _records("logicvista", items, [["B"], ["B"]])
    result = summary(records, metric="strict")
    assert (result.accuracy, result.num_problems) == (1.0, 1)
    assert result.statuses == {"ok": 1, "unusable": 1}
    assert figures(VISUAL["logicvista"], records)[0].strict == 1.0
    assert figures(VISUAL["logicvista"], records)[0].vlmevalkit == 0.5
    assert difference(records, records, metric="strict").equal == 1


def test_what_few_problems_do_to_a_figure_is_told():
    items = [Example(n, "q", "1", {"question_id": n % 2, "problem_id": n}) for n in range(5)]
    assert VISUAL["dynamath"].caveats(items) == [
        "the worst case is over 2 to 3 variants a question, not 10: the fewer, the easier"
    ]
    assert "of which these are 5" in VISUAL["wemath"].caveats(items)[0]
    every = [Example(n, "q", "1", {"question_id": n % 2}) for n in range(20)]
    assert not VISUAL["dynamath"].caveats(every)


@pytest.mark.parametrize("name", sorted(VISUAL))
def test_every_benchmark_says_what_its_second_column_is(name):
    assert VISUAL[name].note
    assert VISUAL[name].label == f"{name}@{VISUAL[name].version}"
