"""What is shown of a run's responses: which are chosen, and what is said about them."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import pytest

from experiments.command import UsageError
from experiments.responses import reading, selection
from experiments.responses.selection import Filters, bound
from experiments.responses.view import signed, view
from luspo_jax.rewards.record import STATUSES
from tests.experiments.show_cases import STEPS, record, write_run

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(tmp_path):
    return write_run(tmp_path / "run")


def _view(folder, step=2, against=None, **filters):
    """Returns the view of a step, with its groups read."""
    run = reading.stored(folder)
    with run.steps[step].open("rb") as file:
        found = view(run, step, file, Filters(**filters), against=against)
        return dataclasses.replace(found, groups=list(found.groups))


def _chosen(folder, step=2, **filters):
    """Returns (problem, sample) of what is shown."""
    groups = _view(folder, step, **filters).groups
    return [(r.prompt_id, r.sample_id) for group in groups for r in group.responses]


def test_the_summary_is_of_all_responses(folder):
    found = _view(folder, limit=1)
    assert found.title == "run, step 2"
    assert dict(found.facts) == {
        "responses": "6 in 3 groups",
        # Of the five with a verdict: exact 1, 0, 1, 1, 0, and 0.5 more each.
        "reward": "mean 1.1 (exact 0.6, form 0.5)",
        "accuracy": "60.0% by exact: 3 of 5",
        "groups": "1 all right, 1 some right, 1 all wrong",
        "length": "mean 12.5, median 8, 95th percentile 32, max 40 tokens",
        "truncated": "16.7%: 1 of 6",
        "advantage": "1 +, 1 −, 4 zero",
        "status": "4 ok, 1 timeout, 1 unparsed",
        "held out": "toy/acc/mean@4 62.5%",
    }
    assert found.shown == "the first 1 of 6 shown, --limit=0 shows all"
    assert not found.notes
    assert (found.accuracy, found.longest, found.num_shown) == ("exact", 40, 1)


def test_a_group_is_told_by_all_of_its_responses(folder):
    nine, eight, seven = _view(folder).groups
    assert nine.title == "problem 9"
    assert nine.facts == ["1 of 2 right", "10 … 40 tokens, mean 25.0", "mean reward 1"]
    assert (nine.prompt, nine.answer, nine.verdicts) == ("What is 9?", "9", [True, False])
    assert eight.verdicts == [True, True]
    assert seven.facts[:2] == ["0 of 1 right", "1 without verdict"]
    assert seven.verdicts == [None, False]
    (cut,) = _view(folder, truncated=True).groups
    assert cut.facts[-1] == "1 of 2 responses shown"
    assert cut.verdicts == [True, False]


FILTERS = {
    "none": ({}, [(9, 0), (9, 1), (8, 0), (8, 1), (7, 0), (7, 1)]),
    "limit": ({"limit": 3}, [(9, 0), (9, 1), (8, 0)]),
    "longest": ({"longest": 3}, [(9, 1), (9, 0), (7, 1)]),
    "shortest": ({"shortest": 3}, [(8, 0), (8, 1), (7, 0)]),
    "truncated": ({"truncated": True}, [(9, 1)]),
    "not truncated": ({"truncated": False}, [(9, 0), (8, 0), (8, 1), (7, 0), (7, 1)]),
    "pos": ({"advantage": "pos"}, [(9, 0)]),
    "neg": ({"advantage": "neg"}, [(9, 1)]),
    "zero": ({"advantage": "zero"}, [(8, 0), (8, 1), (7, 0), (7, 1)]),
    "status": ({"status": "unparsed"}, [(7, 1)]),
    # The response whose verifier failed has no reward: it is neither above nor below.
    "below": ({"bounds": [bound("exact:0.5", above=False)]}, [(9, 1), (7, 1)]),
    "above": ({"bounds": [bound("reward:1", above=True)]}, [(9, 0), (8, 0), (8, 1)]),
    "bounds exclude": ({"bounds": [bound("form:0.5", above=True)]}, []),
    "find": ({"find": "needle"}, [(8, 1)]),
    "problem": ({"problems": [7, 8]}, [(8, 0), (8, 1), (7, 0), (7, 1)]),
    "changed": ({"changed": True}, [(9, 0), (9, 1)]),
    "several": ({"problems": [8, 9], "advantage": "zero", "longest": 1}, [(8, 1)]),
    "changed and others": ({"changed": True, "truncated": False}, [(9, 0)]),
}


@pytest.mark.parametrize("name", FILTERS)
def test_filters(folder, name):
    filters, expected = FILTERS[name]
    assert _chosen(folder, **filters) == expected


def test_what_was_filtered_is_said(folder):
    shown = _view(folder, advantage="zero", longest=3, limit=2).shown
    assert shown == (
        "3 of 6 responses match: advantage zero, the 3 longest; the first 2 of 3 shown, "
        "--limit=0 shows all"
    )
    assert _view(folder, find="nowhere").shown == "0 of 6 responses match: with 'nowhere'"


def test_a_verdict_is_compared_with_the_last_time_its_problem_was_asked(folder):
    found = _view(folder, changed=True)
    assert found.shown.endswith("verdict changed; 2 of 3 problems were asked before")
    (nine,) = found.groups
    assert "in step 1: 0 of 2 right" in nine.facts
    # Problem 7 was all wrong in step 2; step 1 did not ask it.
    assert _chosen(folder, step=10, changed=True) == []
    later = _view(folder, step=10, changed=True, against=1)
    assert later.shown.endswith("0 of 1 problems were asked before")


def test_an_older_step_counts_only_for_problems_that_no_later_one_asked(tmp_path):
    steps = {
        1: [record(1, 0, value=0.0), record(2, 0, value=0.0)],
        2: [record(1, 0, value=1.0)],
        3: [record(1, 0, value=1.0), record(2, 0, value=1.0)],
    }
    folder = write_run(tmp_path / "run", steps)
    assert _chosen(folder, step=3, changed=True) == [(2, 0)]
    assert _chosen(folder, step=3, changed=True, against=1) == [(1, 0), (2, 0)]


def test_the_same_problem_twice_in_a_step_is_two_groups(tmp_path):
    again = [record(1, 0), record(1, 1), record(1, 0, value=0.0), record(1, 1)]
    folder = write_run(tmp_path / "run", {1: again})
    assert [group.verdicts for group in _view(folder, 1).groups] == [[True, True], [False, True]]


def test_lines_that_are_no_response_are_named_and_left_out(folder):
    path = folder / "rollouts" / "step_000002.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    lines[1] = lines[1].replace('"length": 40', '"length": "long"')
    path.write_text(
        "".join([*lines[:2], "\n", "[1]\n", "{}\n", *lines[2:], '{"prompt_id": 3, "re'])
    )
    found = _view(folder)
    assert dict(found.facts)["responses"] == "5 in 3 groups"
    assert found.notes == [
        '4 lines are no response and left out: line 2 (length is "long"); line 4 (no JSON object); '
        "line 5 (none of the fields of a response); line 10 (no JSON, cut off)"
    ]
    assert [len(group.responses) for group in found.groups] == [1, 2, 2]


def test_a_file_without_a_response_says_so(folder):
    (folder / "rollouts" / "step_000002.jsonl").write_text("")
    found = _view(folder)
    assert found.notes == ["no response can be read"]
    assert (found.facts, found.groups) == ([("responses", "0 in 0 groups"),
                                            ("held out", "toy/acc/mean@4 62.5%")], [])  # fmt: skip


@pytest.mark.parametrize(
    "field",
    [f.name for f in dataclasses.fields(record(1, 0)) if f.name not in ("tokens", "images")],
)
def test_a_field_that_older_runs_lack_is_said_and_shown_as_unknown(tmp_path, field):
    folder = write_run(tmp_path / "run")
    path = folder / "rollouts" / "step_000002.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text(
        "".join(json.dumps(line | {"x": 1}) + "\n" for line in lines if line.pop(field) or 1)
    )
    found = _view(folder)
    assert found.notes == [f"6 of 6 responses have no {field}: it is shown as ?"]
    responses = [r for group in found.groups for r in group.responses]
    assert [getattr(r, field) for r in responses] == [None] * 6
    texts = [r.response for r in responses]
    assert texts == [None] * 6 if field == "response" else texts == [r.response for r in STEPS[2]]


def test_token_ids_are_not_parsed_and_no_text_passes_for_them():
    said = 'he said "tokens": [1, 2], and "tokens": [3], too'
    line = json.dumps(dataclasses.asdict(record(1, 0, response=said, length=500))).encode()
    response, lacks = reading.parse(line + b"\n")
    assert (response.response, response.length, lacks) == (said, 500, [])


@pytest.mark.parametrize(
    ("names", "steps"),
    [
        ([], [10]),
        (["last"], [10]),
        (["2"], [2]),
        (["1", "10", "1"], [1, 10]),
        (["1-5"], [1, 2]),
        (["2-10", "last"], [2, 10]),
    ],
)
def test_steps_are_chosen(folder, names, steps):
    assert reading.chosen(reading.stored(folder), names) == steps


def test_steps_that_are_not_there_are_answered_with_those_that_are(folder):
    with pytest.raises(FileNotFoundError, match=r"--step=7: .*no responses of it; .*: 1-2, 10$"):
        reading.chosen(reading.stored(folder), ["7"])
    with pytest.raises(ValueError, match="--step=two: give a number"):
        reading.chosen(reading.stored(folder), ["two"])


def test_a_list_of_many_steps_is_cut(tmp_path):
    folder = write_run(tmp_path / "run", {10 * n: [record(1, 0)] for n in range(1, 61)})
    with pytest.raises(FileNotFoundError, match=r"10, 20, .* 100, …, 510, .* 600$"):
        reading.chosen(reading.stored(folder), ["7"])


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda f: f.rename(f.with_name("gone")), "does not exist: name the --workdir"),
        (lambda f: (f / "rollouts").rename(f.with_name("r")), "has not finished a step"),
        (lambda f: [p.unlink() for p in (f / "rollouts").iterdir()], "has not finished a step"),
        (
            lambda f: (
                (f / "rollouts").rename(f.with_name("r")),
                (f / "run.json").write_text('{"config": {"output.dump_every": 0}}'),
            ),
            "output.dump_every=0",
        ),
        (
            lambda f: ((f / "rollouts").rename(f.with_name("r")), (f / "run.json").unlink()),
            "is this the --workdir of a run?",
        ),
        (
            lambda f: (
                (f / "rollouts").rename(f.with_name("r")),
                (f / "run.json").rename(f / "evaluation.json"),
            ),
            "this is an evaluation",
        ),
    ],
)
def test_a_folder_without_responses_says_why(folder, prepare, message):
    prepare(folder)
    with pytest.raises(FileNotFoundError, match=message.replace("?", r"\?")):
        reading.stored(folder)


def test_a_run_without_its_manifest_is_shown_without_accuracy(folder):
    (folder / "run.json").write_text("{")
    (folder / "metrics.jsonl").write_text('{"ste\n{"step": 2}\n')
    found = _view(folder)
    assert not {"accuracy", "groups", "held out"} & dict(found.facts).keys()
    assert found.groups[0].facts[0] == "no verdict"
    with pytest.raises(UsageError, match=r"--changed: .*run.json does not say which part"):
        _view(folder, changed=True)


def test_filters_that_a_step_cannot_answer_are_refused(folder):
    with pytest.raises(UsageError, match=r"--below=exakt:1: .*did you mean 'exact'"):
        _view(folder, bounds=[bound("exakt:1", above=False)])
    with pytest.raises(UsageError, match=r"--against=10: .*before step 2"):
        _view(folder, changed=True, against=10)
    with pytest.raises(UsageError, match="one of --longest and --shortest"):
        Filters(longest=1, shortest=1)
    for text in ("exact", "exact:high", ":1"):
        with pytest.raises(UsageError, match=f"--above={text}: give NAME:NUMBER"):
            bound(text, above=True)


def test_signs_are_written():
    values = (0.25, -0.25, 0.0, -0.0, None, float("nan"))
    assert [signed(value) for value in values] == ["+0.25", "−0.25", "0", "−0", "?", "nan"]
    assert not any(is_(float("nan")) for is_ in selection.SIGNS.values())


def _call(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "experiments.show", *map(str, arguments)],
        cwd=ROOT, env=os.environ | {"XLA_FLAGS": ""}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def test_the_command(folder, tmp_path):
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    ran = _call(folder, "--step", "1,2", "--limit=2")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "run, step 1" in ran.stdout
    assert "run, step 2" in ran.stdout
    assert ran.stdout.count("the first 2 of ") == 4
    page = tmp_path / "out" / "page.html"
    ran = _call(f"--workdir={folder}", f"--html={page}", "--step=2", "--status=timeout")
    assert (ran.returncode, ran.stdout) == (0, f"{page}: 1 response of 1 step\n")
    written = page.read_bytes()
    ran = _call(folder, f"--html={page}")
    assert ran.returncode == 1
    assert ran.stderr.count("\n") == 1
    assert "exists already" in ran.stderr
    assert page.read_bytes() == written
    assert _call(folder, f"--html={page}", "--overwrite").returncode == 0
    assert page.read_bytes() != written
    ran = _call(folder, f"--html={folder / 'run.json'}", "--overwrite")
    assert ran.returncode == 1
    assert "run.json is no page, and --overwrite replaces pages only" in ran.stderr
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--workdir is required, or its value alone"),
        (["{folder}", "stray"], "unexpected argument 'stray'"),
        (["{folder}", "--step=7"], "there are: 1-2, 10"),
        (["{folder}", "--step=two"], "--step=two: give a number"),
        (["{folder}", "--problem=x"], "--problem=x: give ids"),
        (["{folder}", "--against=1"], "--against needs --changed"),
        (["{folder}", "--advantage=up"], "advantage"),
        (["{folder}", "--above=exact"], "give NAME:NUMBER"),
        (["{folder}/nowhere"], "does not exist"),
    ],
)
def test_mistakes_get_one_message(folder, arguments, message):
    ran = _call(*(argument.format(folder=folder) for argument in arguments))
    assert ran.returncode in (1, 2)
    assert message in ran.stderr
    assert ran.stderr.count("\n") == 1


def test_every_status_can_be_asked_for():
    flags = (ROOT / "experiments" / "show.py").read_text()
    assert ", ".join(f'"{status}"' for status in STATUSES) in flags
