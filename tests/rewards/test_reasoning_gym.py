"""Scores of reasoning-gym's own scorers, through the workers, and the answers that reach them."""

import dataclasses
import json
from importlib.util import find_spec

import pytest

from luspo_jax.datasets.reasoning_gym import reasoning_gym as data
from luspo_jax.rewards import Sample, Scorer, gym_tasks
from luspo_jax.rewards.reasoning_gym import EVALUATED, EXTRACTIONS, may_call, reasoning_gym
from luspo_jax.rewards.record import run

SOME = ["chain_sum", "countdown", "letter_counting", "spell_backward"]


@pytest.mark.parametrize(
    ("name", "text", "answer"),
    [
        ("answer_tag", "so <answer> 5 </answer>", " 5 "),
        ("answer_tag", "<answer>4</answer> no, <answer>5</answer>.", "5"),
        ("answer_tag", "in <answer> tags: <answer>5</answer>", "5"),
        ("answer_tag", "<answer>a\nb</answer>", "a\nb"),
        ("answer_tag", "<answer>5", None),
        ("answer_tag", "5</answer>", None),
        ("answer_tag", "</answer><answer>", None),
        ("answer_tag", "5", None),
        ("boxed", r"\boxed{5} is wrong, so \boxed{6}", "6"),
        ("boxed", r"so \boxed{5} and \boxed{6}", "5,6"),  # as of mathematical answers
        ("boxed", "5", None),
        ("last_line", "so\n\n 5 \n\n", "5"),
        ("last_number", "3-4 is -1", "-1"),
        ("last_number", "3-4", "4"),
        ("last_number", "it costs $1,234.50.", "1234.50"),
        ("last_number", "1,2", "2"),
        ("last_number", "is −7", "-7"),
        ("last_number", "none", None),
        ("full", "a\nb", "a\nb"),
    ],
)
def test_extraction(name, text, answer):
    find, _ = EXTRACTIONS[name]
    found = find(text)
    assert (found and found.strip()) == (answer and answer.strip())


@pytest.mark.parametrize(
    ("text", "functions", "may"),
    [
        ("(1 + 2) * (3 - 4)", (), False),
        ("[[1, 2], [3, 4]]", (), False),
        ("[('Q', '_'), ('_', 'Q')]", (), False),
        ("2*(3)", (), False),
        ("2(3)", (), False),  # a number cannot be called
        ("open(0)", (), True),
        ("exp (x)", ("exp",), False),
        ("x.exp(2)", ("exp",), True),
        ("sin(x)*exp(2*x) + C", ("sin", "exp"), False),
        ("__import__('os').system('x')", ("sin",), True),
        ("(eval)(1)", (), True),
        ("[eval][0](1)", (), True),
        ("{0: eval}.pop(0)", (), True),
        ("eval\n(1)", (), True),
        ("eval\\\n(1)", (), True),
        ("eval#\n(1)", (), True),
        ("ｅval(1)", (), True),
        ("(lambda: 1)()", (), True),
        ("'x'.upper()", (), True),
        ("[x for x in (1, 2)]", (), True),  # refused too, though harmless
    ],
)
def test_what_could_call_something(text, functions, may):
    assert may_call(text, frozenset(functions)) == may


@pytest.fixture(scope="module")
def gym():
    return pytest.importorskip("reasoning_gym", reason="needs the extra [tasks]")


def _sample(task, number, response, options=None):
    entry = gym_tasks.item(task, options or {}, number)
    meta = {"task": task, "options": options or {}, "number": number, "source": task}
    meta = json.loads(json.dumps(meta))  # as a checkpoint and a stored generation have it
    answer = str(entry["answer"])
    return Sample(response(answer), answer, meta=meta, problem=entry["question"])


def _tagged(answer):
    return f"<think><answer>17</answer></think>so <answer>{answer}</answer>"


def _verdict(sample, solved=False, **options):
    """As a worker has it, without one."""
    return run(reasoning_gym(**options, solved=solved), sample)


def test_right_and_wrong_answers_in_workers(gym):
    right = [_sample(task, 7, _tagged) for task in SOME]
    wrong = [_sample(task, 7, lambda answer: _tagged("no")) for task in SOME]
    with Scorer({"reasoning_gym": 1.0}, workers=1, time_limit=60.0, max_failure_rate=1.0) as scorer:
        rewards = scorer.score_batch([*right, *wrong])
    assert [r.value for r in rewards[:4]] == [1.0] * 4
    assert all(r.value < 0.5 for r in rewards[4:])
    assert {r.status for r in rewards} == {"ok"}
    assert rewards[0].prediction == right[0].answer
    assert [_verdict(sample).value for sample in right + wrong] == [r.value for r in rewards]


def test_partial_credit_is_kept_and_does_not_solve(gym):
    sample = _sample("spell_backward", 7, lambda answer: _tagged(answer[:-1] + "#"))
    part, solved = _verdict(sample), _verdict(sample, solved=True)
    assert 0.5 < part.value < 1.0
    assert (solved.value, solved.status) == (0.0, "ok")
    full = _sample("spell_backward", 7, _tagged)
    assert _verdict(full, solved=True).value == 1.0


def test_another_right_answer_is_right(gym):
    """Countdown's reference is one of many solutions."""
    sample = _sample("countdown", 7, lambda answer: _tagged(f"(({answer}))"))
    assert _verdict(sample).value == 1.0


@pytest.mark.parametrize(
    ("extract", "response"),
    [("boxed", "\\boxed{%s}"), ("last_line", "so\n%s"), ("last_number", "%s"), ("full", "%s")],
)
def test_other_places_of_the_answer(gym, extract, response):
    sample = _sample("chain_sum", 7, lambda answer: response % answer)
    assert _verdict(sample, extract=extract).value == 1.0
    missing = _verdict(sample)
    assert (missing.value, missing.status) == (0.0, "unparsed")
    assert "no <answer>" in missing.detail


def test_reasoning_is_no_answer(gym):
    sample = _sample("chain_sum", 7, lambda answer: f"<think><answer>{answer}</answer>")
    verdict = _verdict(sample)
    assert (verdict.value, verdict.status, verdict.prediction) == (0.0, "unparsed", None)


@pytest.mark.parametrize("task", EVALUATED)
def test_answers_that_could_run_code_are_not_run(gym, tmp_path, task):
    canary = tmp_path / "canary"
    verdict = _verdict(_sample(task, 7, lambda _: f"<answer>open({str(canary)!r}, 'w')</answer>"))
    assert (verdict.value, verdict.status) == (0.0, "unparsed")
    assert "could call something" in verdict.detail
    assert not canary.exists()


def test_the_same_answers_would_run_code_in_the_package(gym, tmp_path):
    """What the rule above is for: it can be dropped when this fails."""
    canary = tmp_path / "canary"
    entry = gym_tasks.item("string_insertion", {}, 7)
    gym_tasks.grade("string_insertion", {}, entry, f"open({str(canary)!r}, 'w')")
    assert canary.exists()


def test_problems_of_another_dataset_are_errors(gym):
    verdict = _verdict(Sample("<answer>1</answer>", "1"))
    assert verdict.status == "error"
    assert "none of data.name=reasoning_gym" in verdict.detail


def test_an_item_of_another_version_is_an_error(gym):
    sample = _sample("chain_sum", 7, _tagged)
    other = dataclasses.replace(sample, problem=sample.problem + " ")
    verdict = _verdict(other)
    assert verdict.status == "error"
    assert "task 'chain_sum'" in verdict.detail
    assert "another version" in verdict.detail


def test_a_scorer_that_raises_names_its_task(gym, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(gym_tasks, "grade", broken)
    verdict = _verdict(_sample("chain_sum", 7, _tagged))
    assert verdict.status == "error"
    assert verdict.detail == "task 'chain_sum': ZeroDivisionError: by zero"


def test_an_answer_that_the_scorer_cannot_read_is_wrong(gym):
    """Not an error: it would leave the loss, and stop a run whose policy cannot answer yet."""
    verdict = _verdict(_sample("prime_factorization", 7, lambda _: _tagged("two and three")))
    assert (verdict.value, verdict.status) == (0.0, "unparsed")
    assert verdict.detail.startswith("task 'prime_factorization': ValueError: invalid literal")
    assert _verdict(_sample("prime_factorization", 7, _tagged)).value == 1.0


# Tasks whose items have no reference, only a scorer.
WITHOUT_REFERENCE = {"boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"}


@pytest.mark.slow
@pytest.mark.parametrize("task", gym_tasks.names() if find_spec("reasoning_gym") else [])
def test_every_scorer_tells_the_reference_from_other_answers(gym, task, monkeypatch):
    monkeypatch.setenv("PYTHONHASHSEED", "0")  # in this process, items are what they are
    samples = [_of(example, example.answer) for example in data("train", task=task)[:3]]
    right = [_verdict(sample, extract="full") for sample in samples]
    assert {verdict.status for verdict in right} == {"ok"}
    assert (min(v.value for v in right) == 1.0) == (task not in WITHOUT_REFERENCE)
    wrong = [
        _verdict(dataclasses.replace(sample, response=text), extract="full")
        for sample in samples
        for text in ("neither", "[[1]]", "170.5")
    ]
    assert {verdict.status for verdict in wrong} <= {"ok", "unparsed"}
    assert min(verdict.value for verdict in wrong) < 0.5


def _of(example, response):
    meta = json.loads(json.dumps(example.meta))
    return Sample(response, example.answer, meta=meta, problem=example.problem)


def test_a_power_tower_is_stopped(gym):
    sample = _sample("countdown", 7, lambda _: "<answer>9**9**9**9</answer>")
    with Scorer({"reasoning_gym": 1.0}, workers=1, time_limit=1.0, max_failure_rate=1.0) as scorer:
        (reward,) = scorer.score_batch([sample])
        assert reward.status == "timeout"
        (reward,) = scorer.score_batch([_sample("countdown", 7, _tagged)])
    assert reward.value == 1.0


def test_the_label_names_the_packages_version(gym):
    with Scorer({"reasoning_gym": 1.0}) as scorer:
        label = scorer.labels["reasoning_gym"]
    assert label == f"reasoning_gym[answer_tag]@1+{gym_tasks.version()}"


def test_an_unknown_extraction_is_refused(gym):
    with pytest.raises(
        ValueError, match="unknown extraction 'tag'; known: answer_tag, boxed, full"
    ):
        Scorer({"reasoning_gym": 1.0}, options={"reasoning_gym": {"extract": "tag"}})


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(gym_tasks, "PACKAGE", "no-such-package")
    with pytest.raises(ValueError, match=r"reward 'reasoning_gym': .*luspo_jax\[tasks\]"):
        Scorer({"reasoning_gym": 1.0})
