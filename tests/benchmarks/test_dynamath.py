"""DynaMath: readings, VLMEvalKit's mistakes, and average and worst case by brute force."""

import itertools
import random

import pytest

from luspo_jax.benchmarks.dynamath import DYNAMATH, Outcome, average, lines, read, worst_case
from luspo_jax.benchmarks.free_form import Pair
from luspo_jax.benchmarks.verdicts import ItemVerdict, score
from luspo_jax.datasets.example import Example


def _item(answer, kind, *, problem="q", question="1", variant=1, subject="s", level="l"):
    meta = {"id": f"{question}/{variant}", "answer_type": kind, "question_id": question}
    meta |= {"variant": variant, "subject": subject, "level": level}
    return Example(0, problem, answer, meta)


def _json(answer):
    return '{"solution": "long", "short answer": "' + answer + '"}'


@pytest.mark.parametrize(
    ("answer", "kind", "response", "strict", "vlmevalkit"),
    [
        ("B", "multiple choice", _json("B"), True, True),
        ("B", "multiple choice", "(B) no", True, True),
        ("A", "multiple choice", "(A) yes", True, True),  # A among the first three characters
        ("A", "multiple choice", "The answer is yes", True, True),
        ("B", "multiple choice", "", False, False),
        ("Sep", "text", _json("Sep"), True, True),
        ("Sep", "text", _json("september"), True, False),
        ("Sep", "text", "e", False, True),  # part of the reference
        ("Sep", "text", "", False, True),  # an empty string is part of everything
        ("8:0", "text", _json("8:00"), True, False),
    ],
)
def test_letters_and_text(answer, kind, response, strict, vlmevalkit):
    item = _item(answer, kind, problem="Is it? Choices: (A) yes (B) no")
    (verdict,) = score(DYNAMATH, [item], [response])
    assert (verdict.strict, verdict.vlmevalkit) == (strict, vlmevalkit)


@pytest.mark.parametrize(
    ("answer", "response", "strict", "vlmevalkit"),
    [
        ("2.0944", _json("2.094"), True, True),
        ("2.0944", _json("2.096"), False, False),
        ("2.0944", "2.094 seconds", True, True),
        ("29", _json("29"), True, True),
        ("29", '{"short answer": 29}', True, True),
        ("-0.5", "The answer is -0.5.", True, True),
        ("3.1416", "1π", True, True),
        ("5", "", False, False),
    ],
)
def test_floats(answer, response, strict, vlmevalkit):
    (verdict,) = score(DYNAMATH, [_item(answer, "float")], [response])
    assert (verdict.strict, verdict.vlmevalkit) == (strict, vlmevalkit)


def test_other_text_goes_to_the_verifier_with_the_tolerance():
    assert read(_item("(2, 4)", "text"), _json("(2.000, 4.000)")).strict == Pair(
        "(2, 4)", "(2.000, 4.000)", 0.001
    )


@pytest.mark.parametrize("seed", range(20))
def test_figures_equal_a_brute_force_count(seed):
    rng = random.Random(seed)
    questions, variants = rng.randint(1, 9), rng.randint(1, 6)
    right = {
        key: rng.random() < 0.8 for key in itertools.product(range(questions), range(variants))
    }
    group = {q: (rng.choice("st"), rng.choice("lm")) for q in range(questions)}
    items = [
        _item("1", "float", question=str(q), variant=v, subject=group[q][0], level=group[q][1])
        for q, v in right
    ]
    verdicts = [ItemVerdict(r, not r, "ok") for r in right.values()]
    found = {(line.table, line.group): line for line in lines(items, verdicts)}

    def brute(wanted, members, worst):
        if worst:
            hits = [all(right[q, v] == wanted for v in range(variants)) for q in members]
        else:
            hits = [right[q, v] == wanted for q in members for v in range(variants)]
        return sum(hits) / len(hits)

    for figure, suffix, place in itertools.product(
        ("average", "worst case"), ("", " by subject", " by level"), (0,)
    ):
        place = {"": None, " by subject": 0, " by level": 1}[suffix]
        names = {"all"} if place is None else {group[q][place] for q in range(questions)}
        for name in names:
            members = [q for q in range(questions) if place is None or group[q][place] == name]
            line = found[figure + suffix, name]
            worst = figure == "worst case"
            assert line.strict == pytest.approx(brute(True, members, worst))
            assert line.vlmevalkit == pytest.approx(brute(False, members, worst))


def test_figures_of_nothing_are_undefined():
    assert average([]) is None
    assert worst_case([]) is None
    assert worst_case([Outcome("1", "s", "l", True), Outcome("1", "s", "l", False)]) == 0
