"""The references themselves, in several phrasings, score 100 % on the real annotation files."""

import pytest

from luspo_jax.benchmarks.verdicts import score
from luspo_jax.benchmarks.visual import VISUAL
from luspo_jax.datasets import DATASETS
from luspo_jax.datasets.table import read_examples

FILES = {
    "mathvista": "mathvista/testmini.json",
    "mathvision": "math_vision/test.jsonl",
    "mathverse": "mathverse/testmini_text_only.json",
    "dynamath": "dynamath",
    "wemath": "wemath/testmini.json",
    "logicvista": "logicvista/dataset.json",
}
PHRASES = {
    "bare": "{}",
    "luspo": "<think>1 or (B)?</think> <answer> The answer is $\\boxed{{{}}}$ </answer>",
}


def _items(name, path):
    return read_examples(DATASETS[name], path)[0]


@pytest.mark.parametrize("phrase", PHRASES)
@pytest.mark.parametrize("name", FILES)
def test_references_are_right(shared_data, name, phrase):
    items = _items(name, shared_data / "vl" / FILES[name])
    responses = [PHRASES[phrase].format(item.answer) for item in items]
    verdicts = score(VISUAL[name], items, responses)
    wrong = [
        (item.meta["id"], verdict.status, verdict.extracted)
        for item, verdict in zip(items, verdicts, strict=True)
        if verdict.strict is False
    ]
    assert not wrong
    unusable = sum(verdict.status == "unusable" for verdict in verdicts)
    assert unusable == (1 if name == "logicvista" else 0)


@pytest.mark.parametrize("name", ["mathvista", "mathvision", "wemath", "logicvista"])
def test_sentences_are_right_too(shared_data, name):
    """Where answers are letters and numbers, words around them do no harm."""
    items = [i for i in _items(name, shared_data / "vl" / FILES[name]) if "\\" not in i.answer]
    if name != "wemath":  # whose problems need all their steps
        items = items[:300]
    for phrase in ("First 3 steps.\n\nThe answer is {}.", "Well.\n**Answer:** {}"):
        verdicts = score(VISUAL[name], items, [phrase.format(item.answer) for item in items])
        assert not [v for v in verdicts if v.strict is False]
