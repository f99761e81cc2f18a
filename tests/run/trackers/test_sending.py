"""Trackers get every step once and in order; one that fails or hangs costs a run nothing."""

import json
import threading
import time

import pytest

from luspo_jax.metrics import AnswerRecord, RolloutRecord
from luspo_jax.run.trackers.sending import MEMORY, Trackers, completions
from luspo_jax.run.trackers.tracker import About, Table
from tests.run.trackers.tracker_cases import Raising, Recorder

NAN = float("nan")


def _trackers(tmp_path, say=None, closing_s=10.0, **trackers):
    lines = [] if say is None else say
    about = About(tmp_path, "p", "", "r")
    return Trackers(trackers, about, lines.append, closing_s=closing_s)


def test_steps_arrive_in_order_and_only_their_finite_numbers(tmp_path):
    one, other = Recorder(), Recorder()
    trackers = _trackers(tmp_path, one=one, other=other)
    table = Table(("prompt",), [("1+1?",)])
    trackers.begin_after(-1)
    trackers.log(0, {"reward": 0.5, "actor/lr": NAN, "actor/grad_norm": float("inf")})
    trackers.table(1, table)
    trackers.log(1, {"reward": 0.75})
    trackers.close(failed=True)
    assert one.calls == [
        ("start", -1, ""), ("log", 0, {"reward": 0.5}), ("table", 1, table),
        ("log", 1, {"reward": 0.75}), ("close", True),
    ]  # fmt: skip
    assert other.calls == one.calls
    assert json.loads((tmp_path / MEMORY).read_text())["one"] == {"id": "new", "step": 1}


def test_a_resumed_run_continues_and_repeats_only_what_may_be_overwritten(tmp_path):
    first = _trackers(tmp_path, keeps=Recorder(), takes=Recorder(overwrites=True))
    for step in range(6):
        first.log(step, {"reward": float(step)})
    first.close()
    keeps, takes, lines = Recorder(), Recorder(overwrites=True), []
    second = _trackers(tmp_path, lines, keeps=keeps, takes=takes)
    second.begin_after(3)
    for step in range(4, 8):
        second.table(step, Table((), []))
        second.log(step, {"reward": float(step)})
    second.close()
    assert keeps.calls[0] == ("start", 3, "new")
    assert [call[1] for call in keeps.calls if call[0] == "log"] == [6, 7]
    assert [call[1] for call in keeps.calls if call[0] == "table"] == [6, 7]
    assert takes.calls[0] == ("start", 3, "")
    assert [call[1] for call in takes.calls if call[0] == "log"] == [4, 5, 6, 7]
    assert len(lines) == 1
    assert "keeps has steps up to 5" in lines[0]


def test_a_tracker_that_is_added_later_begins_where_the_run_is(tmp_path):
    first = _trackers(tmp_path, one=Recorder())
    first.log(0, {})
    first.close()
    other = Recorder()
    second = _trackers(tmp_path, one=Recorder(), other=other)
    second.begin_after(0)
    second.log(1, {"reward": 1.0})
    second.close()
    assert other.calls[:2] == [("start", 0, ""), ("log", 1, {"reward": 1.0})]
    assert json.loads((tmp_path / MEMORY).read_text())["one"]["id"] == "new"


@pytest.mark.parametrize("where", ["start", "log", "table", "close"])
def test_a_tracker_that_raises_is_told_of_once_and_the_others_go_on(tmp_path, where):
    lines, sound = [], Recorder()
    trackers = _trackers(tmp_path, lines, broken=Raising(where), sound=sound)
    for step in range(5):
        trackers.table(step, Table((), []))
        trackers.log(step, {"reward": 1.0})
    trackers.close()
    assert [call[0] for call in sound.calls].count("log") == 5
    warned = [line for line in lines if "no space left" in line]
    assert len(warned) == 1
    assert warned[0].startswith("warning: tracker broken: ")
    assert "\n" not in warned[0]
    lacks = [line for line in lines if "lacks" in line]
    assert len(lacks) == (where in ("start", "log"))
    assert all("lacks 5 steps, which metrics.jsonl has" in line for line in lacks)


def test_a_tracker_that_hangs_delays_nothing(tmp_path):
    free, lines = threading.Event(), []

    class Hanging(Recorder):
        def log(self, step, numbers):
            free.wait(30)

    began = time.monotonic()
    trackers = _trackers(tmp_path, lines, closing_s=0.05, slow=Hanging())
    for step in range(2000):
        trackers.log(step, {"reward": 1.0})
    trackers.close()
    assert time.monotonic() - began < 5
    free.set()
    assert len([line for line in lines if "warning: tracker slow: it is more than" in line]) == 1
    assert any("lacks 2,000 steps" in line for line in lines)


def test_a_memory_that_is_damaged_begins_a_new_run(tmp_path):
    (tmp_path / MEMORY).write_text('{"one": ')
    one = Recorder()
    trackers = _trackers(tmp_path, one=one)
    trackers.log(0, {})
    trackers.close()
    assert one.calls[0] == ("start", -1, "")


def test_nothing_is_started_for_a_run_that_logs_nothing(tmp_path):
    one = Recorder()
    _trackers(tmp_path, one=one).close()
    assert one.calls == []


def test_a_table_has_what_people_read():
    answer = AnswerRecord(1, 0, "p", "r", "ref", [1], 1, 2, False, True)
    assert completions([answer], 4) == Table(
        ("prompt", "response", "reference", "length", "truncated", "exact"),
        [("p", "r", "ref", 1, False, True)],
    )
    response = RolloutRecord(1, 0, "p", "r", "a", [1], NAN, {}, "error", None, 0.5, 1, True)
    found = completions([response] * 3, 2)
    assert found.columns == (
        "prompt", "response", "answer", "reward", "advantage", "length", "truncated"
    )  # fmt: skip
    assert found.rows == [("p", "r", "a", None, 0.5, 1, True)] * 2
    assert completions([], 2) == Table((), [])
