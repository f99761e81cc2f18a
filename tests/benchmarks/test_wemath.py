"""We-Math: letters, VLMEvalKit's first character, and the four states by brute force."""

import random

import pytest

from luspo_jax.benchmarks.record import BenchmarkError
from luspo_jax.benchmarks.verdicts import ItemVerdict
from luspo_jax.benchmarks.wemath import kit_letter, lines, metrics, read, state
from luspo_jax.datasets.example import Example


def _item(answer="B", *, problem="2steps_1", step="2steps_1"):
    meta = {"id": f"{problem}/{step}", "option": "A. 1 cm;B. 2 cm; C. No correct answer"}
    return Example(0, "q", answer, meta | {"problem_id": problem, "step": step})


@pytest.mark.parametrize(
    ("response", "strict", "vlmevalkit"),
    [
        ("B", True, True),
        ("2 cm", True, False),
        ("Answer: B", True, True),
        ("Answer: B. 2 cm", True, True),
        ("**Answer:** B", True, False),  # it reads the asterisks
        ("The answer is B.", True, False),  # and only "Answer" with a capital
        ("Answer: <<B>>", True, True),
        ("By counting, we find option C.", False, True),  # the B of "By"
        ("", False, False),
    ],
)
def test_letters(response, strict, vlmevalkit):
    reading = read(_item(), response)
    assert (reading.strict, reading.vlmevalkit) == (strict, vlmevalkit)


def test_what_exact_matching_reads():
    texts = ("Answer: D", "Answer: I", "Answer", "", "Answer : (B)")
    assert [kit_letter(text) for text in texts] == ["D", None, None, None, None]


@pytest.mark.parametrize(
    ("steps", "whole", "strict", "loose"),
    [
        ((True, True), True, "CM", "CM"),
        ((True, False), True, "RM", "CM"),
        ((False, False), True, "RM", "RM"),
        ((True, True), False, "IG", "IG"),
        ((True, False), False, "IK", "IK"),
        ((False, False, False), False, "IK", "IK"),
    ],
)
def test_states(steps, whole, strict, loose):
    assert state((steps, whole), loose=False) == strict
    assert state((steps, whole), loose=True) == loose


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("loose", [False, True])
def test_metrics_equal_a_brute_force_count(seed, loose):
    """The definitions of the four states, counted one by one."""
    rng = random.Random(seed)
    problems = [
        ([rng.random() < 0.7 for _ in range(rng.choice((2, 3)))], rng.random() < 0.6)
        for _ in range(rng.randint(1, 40))
    ]
    n = len(problems)
    ik = sum((False in steps) and not whole for steps, whole in problems)
    ig = sum((False not in steps) and not whole for steps, whole in problems)
    if loose:
        cm = sum((True in steps) and whole for steps, whole in problems)
        rm = sum((True not in steps) and whole for steps, whole in problems)
    else:
        cm = sum((False not in steps) and whole for steps, whole in problems)
        rm = sum((False in steps) and whole for steps, whole in problems)
    found = metrics(problems, loose=loose)
    assert (found["IK"], found["IG"], found["CM"], found["RM"]) == (ik, ig, cm, rm)
    assert found["score"] == pytest.approx((n - 0.5 * ig - rm - ik) / n)
    assert found["RM rate"] == (pytest.approx(rm / (cm + rm)) if cm + rm else None)
    assert found["IK rate"] == pytest.approx(ik / n)
    assert metrics(problems, loose=loose, total=525)["score"] == pytest.approx(
        (525 - 0.5 * ig - rm - ik) / 525
    )


def test_figures_from_items():
    steps = ["2steps_1", "2steps_2", "2steps_multi"]
    items = [_item(problem=p, step=s) for p in ("2steps_1", "2steps_2") for s in steps]
    rights = [True, True, True, True, False, True]
    verdicts = [ItemVerdict(right, False, "ok") for right in rights]
    found = {
        (line.table, line.group): (line.strict, line.vlmevalkit) for line in lines(items, verdicts)
    }
    assert found["four states, strict", "CM"] == (1, 0)
    assert found["four states, strict", "RM"] == (1, 0)
    assert found["four states, loose", "CM"] == (2, 0)
    assert found["four states, strict", "score"] == (0.5, (525 - 2) / 525)
    assert found["accuracy", "1 step"] == (0.75, 0.0)
    assert found["accuracy", "2 steps"] == (1.0, 0.0)


def test_a_problem_without_its_whole_is_refused():
    with pytest.raises(BenchmarkError, match="problem 2steps_1: it needs its steps and its whole"):
        lines([_item()], [ItemVerdict(True, True, "ok")])
