"""Items of reasoning-gym: those of the package itself, drawn by number, under checked options."""

import ast
import inspect
import json
import os
import subprocess
import sys

import pytest

rg = pytest.importorskip("reasoning_gym", reason="needs the extra [tasks]")

from luspo_jax.rewards import gym_tasks  # noqa: E402
from luspo_jax.rewards.gym_tasks import TaskError  # noqa: E402
from luspo_jax.rewards.reasoning_gym import EVALUATED  # noqa: E402

SOME = ["chain_sum", "countdown", "gsm_symbolic", "letter_counting", "survo", "acre"]
NUMBERS = (1, 500, 3_000_000_019)


def _package(task, number, place=None):
    """The item as the package draws it, from a seed and an index that add up to the number."""
    place = 3 if place is None else place
    return rg.create_dataset(task, seed=number - place, size=place + 1)[place]


def _same(task, number):
    if task in gym_tasks._CONSTRUCTED:  # their items follow the seed and the size too
        return rg.create_dataset(task, seed=number - 1, size=5)[1]
    return _package(task, number, 0 if number < 3 else 3)


@pytest.mark.parametrize("task", SOME)
def test_an_item_is_the_packages_own(task):
    for number in NUMBERS:
        ours, theirs = gym_tasks.item(task, {}, number), _same(task, number)
        assert (ours["question"], ours["answer"]) == (theirs["question"], theirs["answer"])


def test_items_do_not_depend_on_what_was_drawn_before():
    first = [gym_tasks.item("countdown", {}, number) for number in (5, 6, 7)]
    again = [gym_tasks.item("countdown", {}, number) for number in (7, 5, 6)]
    assert first == [again[1], again[2], again[0]]


def test_options_and_levels_reach_the_task():
    options = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    plain = gym_tasks.item("chain_sum", options, 9)
    assert plain["metadata"]["difficulty"] == {"num_terms": (2, 2), "num_digits": (1, 1)}

    def difficulty(**options):
        return gym_tasks.item("chain_sum", options, 9)["metadata"]["difficulty"]

    assert difficulty(level=3) == {"num_terms": (2, 5), "num_digits": (1, 4)}
    assert difficulty(level=3, level_mode="upper_bound") == {
        "num_terms": (5, 5),
        "num_digits": (4, 4),
    }
    assert difficulty(level=3, levels={"num_digits": 0}) == {
        "num_terms": (2, 5),
        "num_digits": (1, 1),
    }
    assert difficulty(levels={"num_terms": 1})["num_terms"] == (2, 3)
    assert difficulty(level=3, max_terms=9) == {"num_terms": (2, 9), "num_digits": (1, 4)}
    # Attributes with fewer levels keep to their highest.
    assert difficulty(level=10)["num_digits"] == (1, 10)


def test_lists_stand_for_tuples_as_json_has_them():
    options = {"operators": ["+", "*"]}
    assert gym_tasks.item("countdown", options, 4) == gym_tasks.item(
        "countdown", {"operators": ("+", "*")}, 4
    )


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("chain_sums", {}, r"^\.task='chain_sums' does not exist: did you mean 'chain_sum'\?"),
        ("composite", {}, r"^\.task='composite' does not exist"),
        ("codeio", {}, r"^\.task='codeio' cannot be used: .*that no seed fixes \(reasoning-gym"),
        (3, {}, r"^\.task=3 does not exist"),
        ("chain_sum", {"min_term": 2}, r"^\.min_term: .*no such option; did you mean 'min_terms'"),
        ("chain_sum", {"seed": 2}, r"^\.seed: .*no such option"),
        ("chain_sum", {"min_terms": "two"}, r"^\.min_terms='two' must be a whole number .*chain_"),
        ("chain_sum", {"min_terms": 9}, r"^: task 'chain_sum' refuses .*max_terms must be >= min"),
        ("chain_sum", {"level": 99}, r"^\.level=99 must be at least 0 and at most 10 .*chain_sum"),
        ("chain_sum", {"level": "x"}, r"^\.level='x' must be a whole number"),
        ("chain_sum", {"level": 1, "level_mode": "x"}, r"^\.level_mode='x': choose one of incl"),
        ("chain_sum", {"levels": {"num_term": 1}}, r"^\.levels\.num_term: .*'num_terms'"),
        ("chain_sum", {"levels": {"num_terms": 99}}, r"^\.levels\.num_terms=99 must be .*10"),
        ("chain_sum", {"levels": 3}, r"^\.levels=3 must be a section"),
        ("acre", {"level": 1}, r"^\.level: task 'acre' has no levels"),
        ("chain_sum", {"min_terms": {1, 2}}, r"^: values must be texts"),
        ("countdown", {"operators": ["^"]}, r"refuses .*invalid operator"),
    ],
)
def test_bad_tasks_and_options_are_named(task, options, message):
    with pytest.raises(TaskError, match=message):
        gym_tasks.check(task, options)


def test_a_package_that_is_absent_is_asked_for(monkeypatch):
    monkeypatch.setattr(gym_tasks, "PACKAGE", "no-such-package")
    with pytest.raises(ValueError, match=r"not installed: pip install 'luspo_jax\[tasks\]'"):
        gym_tasks.version()


def test_scorers_that_run_an_answer_as_code_are_listed():
    """Reads every scorer of the package for calls that evaluate the answer."""
    found = set()
    for task in gym_tasks.names():
        scorer = rg.factory.DATASETS[task][0].score_answer
        called = {
            getattr(node.func, "id", getattr(node.func, "attr", ""))
            for node in ast.walk(ast.parse(inspect.cleandoc("\n" + inspect.getsource(scorer))))
            if isinstance(node, ast.Call)
        }
        if called & {"eval", "exec", "parse_expr", "sympify", "compile"}:
            found.add(task)
    found -= {"number_sorting"}  # evaluates its own reference
    assert found == set(EVALUATED)


def _digests(hash_seed, tasks):
    code = (
        "import hashlib, json, sys; from luspo_jax.rewards import gym_tasks\n"
        "for task in json.loads(sys.argv[1]):\n"
        "    drawn = []\n"
        "    for number in (11, 4_000_000_007, 12_345_678, *range(100, 110)):\n"
        "        try: drawn.append(gym_tasks.item(task, {}, number))\n"
        "        except Exception as error: drawn.append({'question': repr(error), 'answer': ''})\n"
        "    text = json.dumps([[e['question'], str(e['answer'])] for e in drawn])\n"
        "    print(task, hashlib.sha256(text.encode()).hexdigest())\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, json.dumps(tasks)],
        env=os.environ | {"PYTHONHASHSEED": hash_seed}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return dict(line.split() for line in ran.stdout.splitlines())


def test_items_are_the_same_in_another_process():
    tasks = ["chain_sum", "countdown", "letter_counting"]
    assert _digests("1", tasks) == _digests("2", tasks)


@pytest.mark.slow
def test_tasks_that_follow_pythons_hash_seed_are_listed():
    tasks = gym_tasks.names()
    first, second, again = (_digests(seed, tasks) for seed in ("1", "2", "1"))
    assert first == again
    assert {task for task in tasks if first[task] != second[task]} <= gym_tasks.HASH_SEEDED


@pytest.mark.slow
@pytest.mark.parametrize("task", gym_tasks.names())
def test_every_item_is_the_packages_own(task, monkeypatch):
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    if task in gym_tasks.HASH_SEEDED:
        pytest.skip("its items follow Python's hash seed")
    gym_tasks.check(task, {})
    test_an_item_is_the_packages_own(task)


@pytest.mark.slow
def test_tasks_that_draw_when_they_are_constructed_are_listed():
    """For all others the seed and the index count only by their sum."""
    for task in sorted(gym_tasks._CONSTRUCTED):
        pairs = [(_package(task, n, 1), _package(task, n, 3)) for n in range(100, 110)]
        assert any(one["question"] != other["question"] for one, other in pairs), task
