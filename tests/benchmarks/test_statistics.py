"""pass@k and the summary against enumeration and counting."""

import itertools

import numpy as np
import pytest

from luspo_jax.benchmarks import BenchmarkError, Record, intervals, statistics, voting
from luspo_jax.rewards import Reward


def record(problem_id, sample_id, right, *, prediction="1", length=10, status="ok", meta=None):
    return Record(
        benchmark="aime24",
        problem_id=problem_id,
        sample_id=sample_id,
        prompt="",
        response="",
        answer="1",
        tokens=None,
        length=length,
        truncated=None if length is None else length > 100,
        meta=meta or {},
        verdict=Reward(float(right), status, {"dapo_math": float(right)}, prediction),
        scorers={"dapo_math": "dapo_math@1"},
    )


@pytest.mark.parametrize("right", range(6))
@pytest.mark.parametrize("k", range(1, 6))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(right, k):
    verdicts = [1] * right + [0] * (5 - right)
    subsets = list(itertools.combinations(verdicts, k))
    expected = np.mean([any(subset) for subset in subsets])
    assert statistics.pass_at_k(5, right, k) == pytest.approx(expected, abs=1e-12)


def test_pass_at_k_is_unbiased_where_drawing_again_is_not():
    """Mean over all outcomes of n = 4 responses at accuracy 0.3, for k = 2: 1 − 0.7²."""
    mean = sum(
        np.prod([0.3 if x else 0.7 for x in xs]) * statistics.pass_at_k(4, sum(xs), 2)
        for xs in itertools.product([0, 1], repeat=4)
    )
    assert mean == pytest.approx(1 - 0.7**2, abs=1e-12)


@pytest.mark.parametrize(("n", "right", "k"), [(4, 5, 1), (4, 2, 5), (4, 2, 0), (4, -1, 2)])
def test_impossible_counts_are_refused(n, right, k):
    with pytest.raises(ValueError, match="1 ≤ k ≤ n"):
        statistics.pass_at_k(n, right, k)


def test_powers_end_at_n():
    assert statistics.powers(1) == [1]
    assert statistics.powers(6) == [1, 2, 4, 6]
    assert statistics.powers(32) == [1, 2, 4, 8, 16, 32]


def test_summary_counts():
    records = [
        record(0, 0, True, length=8, meta={"level": 1}),
        record(0, 1, False, length=200, prediction=None, status="unparsed", meta={"level": 1}),
        record(3, 0, False, length=70, prediction="2", meta={"level": 5}),
        record(3, 1, False, length=64, prediction="2", status="timeout", meta={"level": 5}),
    ]
    result = statistics.summary(records, metric="dapo_math", split_by=["level"])
    assert (result.num_problems, result.num_samples, result.accuracy) == (2, 2, 0.25)
    assert result.pass_at == {1: 0.25, 2: 0.5}
    assert result.majority_at == {1: 0.25, 2: 0.5}  # the unparsed response abstains
    assert result.statuses == {"ok": 2, "timeout": 1, "unparsed": 1}
    assert result.truncated == 0.25
    assert result.lengths["mean"] == 85.5
    assert (result.lengths["right"], result.lengths["wrong"]) == (8, pytest.approx(334 / 3))
    assert result.by_length["≤64"] == {"accuracy": 0.5, "responses": 2}
    assert list(result.by_length) == ["≤64", "≤128", "≤256"]
    assert result.completed == 0.25  # the long response is wrong anyway
    assert result.completed_ci95 == result.accuracy_ci95
    assert result.tokens_per_right == 342
    assert result.modes == {
        "≤64": {
            "accuracy": 0.5, "mode_accuracy": 0.5, "distinct": None, "differ": None, "problems": 2,
        },
        "≤128": {
            "accuracy": 0.0, "mode_accuracy": 0.0, "distinct": None, "differ": None, "problems": 1,
        },
        "≤256": {
            "accuracy": 0.0, "mode_accuracy": 0.0, "distinct": None, "differ": None, "problems": 1,
        },
    }  # fmt: skip
    assert result.by_field["level"]["1"]["accuracy"] == 0.5
    assert result.by_field["level"]["5"] | {"ci95": None} == {
        "accuracy": 0.0, "ci95": None, "problems": 1,
    }  # fmt: skip
    assert 0 <= result.accuracy_ci95[0] < 0.25 < result.accuracy_ci95[1] <= 1


def test_a_right_response_that_was_cut_is_not_completed():
    records = [record(0, 0, True, length=101), record(0, 1, True), record(1, 0, False)]
    result = statistics.summary([*records, record(1, 1, True)], metric="dapo_math")
    assert (result.accuracy, result.completed) == (0.75, 0.5)
    assert result.completed_ci95 == intervals.accuracy_interval([1, 1], [2, 2])
    assert result.tokens_per_right == pytest.approx(131 / 3)
    unknown = statistics.summary([record(0, 0, True, length=None)], metric="dapo_math")
    assert (unknown.completed, unknown.completed_ci95, unknown.tokens_per_right) == (None,) * 3
    nothing = statistics.summary([record(0, 0, False)], metric="dapo_math")
    assert (nothing.completed, nothing.tokens_per_right) == (0.0, None)


def test_the_mode_may_grow_with_length_where_accuracy_falls():
    """Long answers to problem 0 scatter around the right one; short ones agree or are wrong."""
    short = [record(0, s, s < 2, prediction="1" if s < 2 else "2", length=9) for s in range(4)]
    answers = ["1", "1", "7", "8"]
    long = [record(0, 4 + s, a == "1", prediction=a, length=99) for s, a in enumerate(answers)]
    bins = statistics.summary([*short, *long], metric="dapo_math").modes
    assert bins["≤64"] == pytest.approx(
        {"accuracy": 0.5, "mode_accuracy": 0.5, "distinct": 0.5, "differ": 4 / 6, "problems": 1}
    )
    assert bins["≤128"] == pytest.approx(
        {"accuracy": 0.5, "mode_accuracy": 1.0, "distinct": 0.75, "differ": 5 / 6, "problems": 1}
    )
    silent = [record(0, s, False, prediction=None) for s in range(2)]
    assert statistics.summary(silent, metric="dapo_math").modes == {}


def test_modes_are_means_over_the_problems_of_a_bin():
    rng = np.random.default_rng(2)
    records = [
        record(p, s, a == "1", prediction=a, length=int(rng.choice([5, 64, 65, 128, 300])))
        for p in range(6)
        for s, a in enumerate(rng.choice(["1", "2", "3"], 7))
    ]
    for edge, low, high in (("≤64", 0, 64), ("≤128", 64, 128), ("≤512", 256, 512)):
        shares, modes = [], []
        for p in range(6):
            own = [r for r in records if r.problem_id == p and low < r.length <= high]
            if own:
                right = [r.right("dapo_math") for r in own]
                shares.append(np.mean(right))
                votes = [r.verdict.prediction for r in own]
                modes.append(voting.majority_at_k(votes, right, [len(own)])[0])
        found = statistics.summary(records, metric="dapo_math").modes[edge]
        assert found["accuracy"] == pytest.approx(np.mean(shares))
        assert found["mode_accuracy"] == pytest.approx(np.mean(modes))
        assert found["problems"] == len(shares)


def test_order_of_records_does_not_matter():
    records = [record(p, s, (p + s) % 3 == 0) for p in range(4) for s in range(3)]
    shuffled = [records[i] for i in np.random.default_rng(0).permutation(len(records))]
    assert statistics.summary(records, metric="dapo_math") == statistics.summary(
        shuffled, metric="dapo_math"
    )


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "no responses"),
        ([record(0, 0, True), record(0, 0, True)], "same sample twice"),
        ([record(0, 0, True), record(1, 0, True), record(1, 1, True)], "equally many"),
    ],
)
def test_unusable_records_are_refused(records, message):
    with pytest.raises(BenchmarkError, match=message):
        statistics.summary(records, metric="dapo_math")


def test_difference_is_paired_by_problem():
    ours = [record(p, s, s < 3) for p in range(4) for s in range(4)]
    theirs = [record(p, s, s < p) for p in range(4) for s in range(2)]
    result = statistics.difference(ours, theirs, metric="dapo_math")
    assert result.difference == pytest.approx(0.75 - np.mean([0, 0.5, 1, 1]))
    assert (result.better, result.worse, result.equal) == (2, 2, 0)
    assert result.ci95[0] < result.difference < result.ci95[1]
    with pytest.raises(BenchmarkError, match="not the same problems"):
        statistics.difference(ours, theirs[:2], metric="dapo_math")


def test_record_survives_jsonl_and_damage_is_named():
    one = record(1, 2, True, meta={"level": 3})
    assert Record.from_json(one.to_json(), "x") == one
    with pytest.raises(BenchmarkError, match=r"part_0.jsonl, line 3: not a stored generation"):
        Record.from_json('{"benchmark": 1}', "part_0.jsonl, line 3")
