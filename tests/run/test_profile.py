"""The trace of a run's steps: what is in it, when it is written, and refusals."""

import gzip
import json

import jax
import pytest

from luspo_jax import metrics
from luspo_jax.hosts.values import ConfigError
from luspo_jax.metrics import StepMetrics, timed
from luspo_jax.run.profile import Profile, steps_of


def events(folder, name="perfetto_trace.json.gz"):
    """Returns the events of the only trace below a folder, as Perfetto reads them."""
    (path,) = folder.glob(f"plugins/profile/*/{name}")
    return json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]


def take(profile, steps, taken=None):
    """Takes steps of one phase each, as the loop does; returns the profile."""
    with profile:
        for step in steps:
            with profile.step(step), timed(StepMetrics(), f"phase_{step}"):
                jax.block_until_ready(jax.numpy.ones(3) + step)
    return profile


@pytest.mark.parametrize(
    ("text", "steps"), [("", None), ("4", (4, 4)), ("4-6", (4, 6)), ("6-6", (6, 6))]
)
def test_ranges_are_read(text, steps):
    assert steps_of(text, 6) == steps


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a-b", "is no range"),
        ("4-", "is no range"),
        ("-4", "is no range"),
        ("4,6", "is no range"),
        ("²", "is no range"),
        ("0-2", "count from 1"),
        ("5-4", "count from 1"),
        ("4-7", "beyond the run: num_steps=6"),
    ],
)
def test_other_ranges_are_refused(text, says):
    with pytest.raises(ConfigError, match=says) as refused:
        steps_of(text, 6)
    assert str(refused.value).startswith(f"--profile_steps={text}")
    assert "\n" not in str(refused.value)


def test_the_trace_holds_the_steps_and_their_phases_and_no_others(tmp_path):
    profile = take(Profile(tmp_path, (2, 3)), range(1, 6))
    (space,) = profile.folder.glob("plugins/profile/*/*.xplane.pb")
    found = events(profile.folder)
    names = {event.get("name") for event in found}
    assert names >= {"phase_2", "phase_3"}
    assert names.isdisjoint({"phase_1", "phase_4"})
    numbers = [e["args"]["step_num"] for e in found if e.get("name") == "rollout_step"]
    assert sorted(map(int, numbers)) == [2, 3]
    assert b"phase_2" in space.read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["profile"]


def test_no_annotation_is_made_outside_the_steps(tmp_path):
    made = []

    def annotation(phase):
        made.append(phase)
        return jax.profiler.TraceAnnotation(phase)

    with metrics.phases_in(annotation), timed(StepMetrics(), "inside"):
        pass
    take(Profile(), range(3))
    take(Profile(tmp_path, (1, 1)), range(1, 3))
    assert made == ["inside"]
    assert metrics._annotation("gen").__enter__() == "gen"  # what it is without a trace


def test_a_run_that_stops_inside_traces_the_rest_when_it_resumes(tmp_path):

    def steps():
        yield 1
        yield 2
        raise RuntimeError

    with pytest.raises(RuntimeError):
        take(Profile(tmp_path, (1, 3)), steps())
    assert list(tmp_path.iterdir()) == []
    resumed = Profile(tmp_path, (1, 3))
    resumed.check_ahead(2)
    take(resumed, [3])
    assert {"phase_3"} <= {event.get("name") for event in events(resumed.folder)}


def test_what_a_killed_run_left_of_a_trace_is_replaced(tmp_path):
    (tmp_path / ".profile.partial" / "plugins").mkdir(parents=True)
    take(Profile(tmp_path, (1, 1)), [1])
    assert [p.name for p in tmp_path.iterdir()] == ["profile"]


def test_a_resumed_run_past_the_steps_is_refused(tmp_path):
    profile = Profile(tmp_path, (2, 3))
    profile.check_ahead(2)
    with pytest.raises(ConfigError, match=r"--profile_steps=2-3: the run goes on at step 4"):
        profile.check_ahead(3)
    Profile().check_ahead(3)


def test_another_profile_is_refused_and_the_same_is_kept(tmp_path):
    """The command that recipes repeat after a preemption must go on."""
    take(Profile(tmp_path, (1, 1)), [1])
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    again = Profile(tmp_path, (1, 1))
    assert again.there
    again.check_ahead(3)
    take(again, [1])
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before
    with pytest.raises(ConfigError, match=r"--profile_steps=1-2: .* a profile of steps 1-1"):
        Profile(tmp_path, (1, 2))
    (tmp_path / "profile" / "steps.json").unlink()
    with pytest.raises(ConfigError, match="or something else"):
        Profile(tmp_path, (1, 1))


def test_each_of_several_processes_has_its_own(tmp_path, monkeypatch):
    for index in (0, 1):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        take(Profile(tmp_path, (1, 1), several=True), [1])
        names = {e.get("name") for e in events(tmp_path / "profile" / f"process_{index}")}
        assert "phase_1" in names
