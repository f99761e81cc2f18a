"""LogicVista: sets of letters; an annotation without an answer is unusable."""

import pytest

from luspo_jax.benchmarks.logicvista import LOGICVISTA
from luspo_jax.benchmarks.verdicts import score
from luspo_jax.datasets.example import Example


def _score(answer, response):
    item = Example(0, "q", answer, {"id": "v", "skill": ["inductive"]})
    verdicts = score(LOGICVISTA, [item], [response])
    return verdicts[0], LOGICVISTA.lines([item], verdicts)


@pytest.mark.parametrize(
    ("answer", "response", "strict", "vlmevalkit"),
    [
        ("B", "B", True, True),
        ("B", "b", True, False),  # letters must be upper case
        ("B", "The figure on the right, so the answer is B.", True, True),
        ("B", "C", False, False),
        ("B, D", "B and D", True, True),
        ("B, D", "BD", True, True),
        ("B, D", "The answer is D, B.", True, True),
        ("B, D", "B", False, False),
        ("B", "B, D", False, False),
        ("3", "Answer: 3", True, False),  # a reference that is no letter is never right there
        ("B", "", False, False),
    ],
)
def test_sets(answer, response, strict, vlmevalkit):
    verdict, _ = _score(answer, response)
    assert (verdict.strict, verdict.vlmevalkit) == (strict, vlmevalkit)


def test_an_annotation_without_an_answer_is_unusable():
    verdict, lines = _score("", "B")
    assert verdict.status == "unusable"
    assert (lines[0].strict, lines[0].vlmevalkit) == (None, 0.0)
