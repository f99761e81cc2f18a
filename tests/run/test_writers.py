"""Metrics and rollouts are written whole, and cut back on resume."""

import contextlib
import dataclasses
import json
import math
import types

import numpy as np
import pytest

from luspo_jax.hosts import processes
from luspo_jax.metrics import RolloutRecord, read_metrics
from luspo_jax.run import writers
from luspo_jax.run.output_sections import OutputSettings
from luspo_jax.run.trackers import registry
from luspo_jax.run.trackers.sending import Trackers
from luspo_jax.run.trackers.tracker import About
from luspo_jax.run.writers import MetricsWriter, console_line
from tests.run.trackers import tracker_cases


@pytest.fixture
def writer(tmp_path):
    writer = MetricsWriter(tmp_path / "run", console=None)
    yield writer
    writer.close()


def test_a_name_that_is_not_declared_leaves_no_line(writer):
    with pytest.raises(KeyError, match=r"did you mean|known"):
        writer.write(1, {"rewards": 1.0})
    assert not writer.path.exists()


def test_numbers_survive_to_the_last_bit(writer):
    values = {"reward": 0.1 + 0.2, "actor/lr": 1e-300, "reward_std": np.float32(0.1)}
    writer.write(1, values)
    (record,) = read_metrics(writer.path)
    assert record == {"step": 1, **{k: float(v) for k, v in values.items()}}


def test_values_that_json_lacks_are_named(writer):
    writer.write(1, {"reward": math.nan, "actor/grad_norm": -math.inf, "actor/lr": 1.0})
    line = json.loads(writer.path.read_text(), parse_constant=pytest.fail)
    assert line["reward"] is None
    (record,) = read_metrics(writer.path)
    assert math.isnan(record["reward"])
    assert record["actor/grad_norm"] == -math.inf
    assert "nonfinite" not in record


def _run(writer, first, last):
    for step in range(first, last + 1):
        writer.write(step, {"reward": step / 7})
        writer.write_rollouts(step, [_rollout(step)])


def _rollout(step):
    return RolloutRecord(
        prompt_id=3,
        sample_id=0,
        prompt="1+1?",
        response="∑ = 2",
        answer="2",
        tokens=[1, 2, step],
        reward=1.0,
        parts={"exact": 1.0},
        status="ok",
        prediction="2",
        advantage=0.5,
        length=3,
        truncated=False,
    )


def _contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_a_killed_and_continued_run_leaves_the_same_files(tmp_path):
    whole = MetricsWriter(tmp_path / "whole", console=None)
    _run(whole, 1, 8)
    killed = MetricsWriter(tmp_path / "killed", console=None)
    _run(killed, 1, 6)
    with killed.path.open("a") as stream:
        stream.write('{"step": 7, "rewa')  # cut off by the kill
    resumed = MetricsWriter(tmp_path / "killed", console=None)
    resumed.truncate_after(4)
    assert sorted(_contents(tmp_path / "killed"))[-1].endswith("step_000004.jsonl")
    _run(resumed, 5, 8)
    assert _contents(tmp_path / "killed") == _contents(tmp_path / "whole")


def test_truncating_to_the_start_and_truncating_nothing(writer):
    writer.truncate_after(0)
    _run(writer, 1, 2)
    writer.truncate_after(2)
    assert [record["step"] for record in read_metrics(writer.path)] == [1, 2]
    writer.truncate_after(0)
    assert writer.path.read_text() == ""


def test_a_damaged_line_in_the_middle_is_named(writer):
    writer.path.write_text('{"step": 1}\n{"ste\n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2"):
        writer.truncate_after(3)
    assert '{"ste\n' in writer.path.read_text()


def test_rollouts_are_dumped_whole(writer):
    path = writer.write_rollouts(12, [_rollout(12), _rollout(12)])
    assert path.name == "step_000012.jsonl"
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert lines == [dataclasses.asdict(_rollout(12))] * 2
    assert [p.name for p in path.parent.iterdir()] == [path.name]

    def torn():
        yield _rollout(12)
        raise RuntimeError("interrupted")

    before = path.read_bytes()
    with pytest.raises(RuntimeError, match="interrupted"):
        writer.write_rollouts(12, torn())
    assert path.read_bytes() == before


def test_the_console_line_is_short_and_says_what_is_there():
    line = console_line(
        3, 10, {"reward": 0.5, "response_length/mean": 25.71, "val-core/toy/acc/mean@4": 0.75}
    )
    assert line == "step 3/10 | reward 0.500 | length 25.7 | toy/acc/mean@4 0.750"
    assert console_line(3, None, {}) == "step 3"


def test_the_console_gets_each_step(tmp_path):
    lines = []
    writer = MetricsWriter(tmp_path, num_steps=2, console=lines.append)
    _run(writer, 1, 2)
    assert [line.split(" | ")[0] for line in lines] == ["step 1/2", "step 2/2"]


@pytest.mark.parametrize("fails", [True, False])
def test_trackers_know_whether_a_run_came_to_its_end(tmp_path, fails):
    tracker = tracker_cases.Recorder()
    trackers = Trackers({"one": tracker}, About(tmp_path, "p", "", "r"))
    writer = MetricsWriter(tmp_path, trackers=trackers, console=None)
    with contextlib.suppress(ZeroDivisionError), contextlib.closing(writer):
        writer.write(1, {"reward": 1.0})
        assert 1 / (not fails)
    assert tracker.calls[-1] == ("close", fails)


def test_only_the_first_process_writes_and_starts_trackers(tmp_path, monkeypatch):
    def start():
        raise AssertionError("a tracker was made")

    monkeypatch.setitem(registry.TRACKERS, "wandb", start)
    monkeypatch.setattr(processes, "is_writer", lambda: False)
    output = OutputSettings(trackers="wandb")
    run = types.SimpleNamespace(settings=types.SimpleNamespace(output=output, num_steps=2))
    silent = writers.writer(run, types.SimpleNamespace(path=tmp_path, name="r"), None)
    silent.show_completions(1, [_rollout(1)])
    silent.write(1, {"reward": 1.0})
    silent.write_rollouts(1, [_rollout(1)])
    silent.close()
    assert not list(tmp_path.iterdir())
