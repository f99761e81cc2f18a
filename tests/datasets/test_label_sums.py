"""Both label tasks: splits, order, and every answer and trace read back from its text alone."""

import re

import numpy as np
import pytest

from luspo_jax.datasets import DataError, label_lookup, label_sums, load
from luspo_jax.datasets.label_lookup import LabelLookup
from luspo_jax.datasets.label_sums import LabelSums
from luspo_jax.rewards import score

TASKS = [LabelSums, LabelLookup]
GOLDEN_SUMS = ["a1b0c3d3e1f2?", "a4b3c0d0e4f1?"]  # the first of train, the first of test
GOLDEN_LOOKUP = ["a4b1c2d3e0f2c?", "a2b2c2d4e4f4b?"]


def parsed(problem):
    """(values by label, the label asked for or None) of a problem's text."""
    match = re.fullmatch(r"((?:[a-i]\d)+)([a-i])?\?", problem)
    return {label: int(value) for label, value in re.findall(r"([a-i])(\d)", match[1])}, match[2]


def solved(problem):
    """The answer, worked out from the text."""
    values, asked = parsed(problem)
    return values[asked] if asked else sum(values.values()) % 5


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("num_terms", [2, 3, 6])
def test_every_answer_is_right(task, num_terms):
    for split in label_sums.SPLITS:
        for example in task(split, num_terms):
            values, _ = parsed(example.problem)
            assert "".join(values) == "abcdefghi"[:num_terms]
            assert set(values.values()) <= set(range(5))
            assert example.answer == str(solved(example.problem))


@pytest.mark.parametrize(("task", "problems"), [(LabelSums, 5**6), (LabelLookup, 6 * 5**6)])
def test_splits_are_disjoint_and_cover_all_problems(task, problems):
    train, test = task("train"), task("test")
    texts = [{example.problem for example in split} for split in (train, test)]
    assert len(texts[0]) == len(train)
    assert len(texts[1]) == len(test)
    assert not texts[0] & texts[1]
    assert len(texts[0] | texts[1]) == problems
    assert len(test) / problems == pytest.approx(1 / 8, abs=0.01)
    ids = [example.id for split in (train, test) for example in split]
    assert sorted(ids) == list(range(problems))


@pytest.mark.parametrize("task", TASKS)
def test_seed_orders_and_moves_nothing_between_splits(task):
    first, again, other = (list(task("test", seed=seed)) for seed in (0, 0, 1))
    assert first == again
    assert [e.id for e in first] != [e.id for e in other]
    assert {e.problem for e in first} == {e.problem for e in other}


@pytest.mark.parametrize("task", TASKS)
def test_random_access(task):
    examples = task("train", 3)
    listed = list(examples)
    assert len(listed) == len(examples)
    assert [examples[i] for i in (5, 0, 17)] == [listed[i] for i in (5, 0, 17)]
    assert examples[-1] == listed[-1]
    with pytest.raises(IndexError):
        examples[len(examples)]


def test_first_problems_do_not_change():
    """Golden: results are comparable only as long as a seed means the same problems."""
    assert [e.problem for e in (LabelSums("train")[0], LabelSums("test")[0])] == GOLDEN_SUMS
    assert [e.problem for e in (LabelLookup("train")[0], LabelLookup("test")[0])] == GOLDEN_LOOKUP


def test_answers_are_balanced():
    answers = [int(example.answer) for example in LabelSums("test")]
    assert np.bincount(answers, minlength=5) / len(answers) == pytest.approx(0.2, abs=0.03)


def test_every_trace_states_right_sums():
    """All chunkings of a few problems: each sum is that of the terms up to its label."""
    for example in list(LabelSums("test", 5))[:20]:
        values, _ = parsed(example.problem)
        for chunks in _compositions(5):
            steps, final = _read_trace(label_sums.trace(example.meta["values"], chunks))
            assert len(steps) == len(chunks)
            for label, value, total in steps:
                assert value == values[label]
                assert total == sum(v for k, v in values.items() if k <= label) % 5
            assert final == solved(example.problem)
            assert not steps or steps[-1][0] == "e"


def _compositions(total):
    """Every way to cut `total` into positive chunks."""
    return [
        (first, *rest) for first in range(1, total + 1) for rest in _compositions(total - first)
    ] or [()]


def _read_trace(text):
    *steps, mark, answer = text.split(" ")
    assert mark == "####"
    matches = [re.fullmatch(r"([a-i])(\d)=(\d)", step) for step in steps]
    return [(m[1], int(m[2]), int(m[3])) for m in matches], int(answer)


def test_direct_answer_and_bad_chunks():
    assert label_sums.trace((3, 1, 4), ()) == "#### 3"
    assert label_sums.trace((3, 1, 4), (2, 1)) == "b1=4 c4=3 #### 3"
    for chunks in [(1, 1), (2, 2), (3, 0)]:
        with pytest.raises(ValueError, match="do not cover 3 values"):
            label_sums.trace((3, 1, 4), chunks)


def test_random_chunks_cover_and_keep_to_their_limits():
    rng = np.random.default_rng(0)
    draws = [label_sums.random_chunks(rng, 6, direct=0.25, low=0.4, largest=3) for _ in range(2000)]
    traced = [chunks for chunks in draws if chunks]
    assert 1 - len(traced) / len(draws) == pytest.approx(0.25, abs=0.03)
    assert all(sum(chunks) == 6 and max(chunks) <= 3 for chunks in traced)
    assert {len(chunks) for chunks in traced} == {2, 3, 4, 5, 6}


def test_lookup_response_and_filler():
    assert label_lookup.response(4, 3) == "...#### 4"
    rng = np.random.default_rng(0)
    drawn = [label_lookup.random_filler(rng, low=0.05, high=0.5, largest=30) for _ in range(2000)]
    assert min(drawn) == 0
    assert max(drawn) == 30
    assert np.mean(drawn) > 1.5 * np.median(drawn)  # a heavy tail


@pytest.mark.parametrize("name", ["label_sums", "label_lookup"])
def test_verifier_accepts_exactly_the_right_answer(name):
    examples, report = load(name, split="test", num_terms=4)
    assert report.examples == len(examples)
    for example in list(examples)[:20]:
        values = [
            score({"gsm8k": 1.0}, label_sums.final_answer(guess), example.answer).value
            for guess in range(5)
        ]
        assert values == [float(str(guess) == example.answer) for guess in range(5)]


@pytest.mark.parametrize("task", TASKS)
def test_bad_split_and_size(task):
    with pytest.raises(DataError, match=r"'dev' .*train.*test"):
        task("dev")
    with pytest.raises(DataError, match="num_terms must be from 2 to 9, not 10"):
        task("train", 10)
