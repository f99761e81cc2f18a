"""The guard with made-up heartbeat files and small processes that never import jax."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from luspo_jax.hosts import guard


def _membership(folder, index=0, count=3, **changes):
    values = {"dead_after_s": 30.0, "phase_timeout_s": 0.0, "attempt": "now", **changes}
    return guard.Membership(
        folder=str(folder / "processes"),
        checkpoints=str(folder / "checkpoints"),
        index=index,
        count=count,
        **values,
    )


def _post(folder, index, **changes):
    post = {
        "process": index, "host": f"host-{index}", "pid": 100 + index, "attempt": "now", "beat": 1,
        "phase": "rollout", "step": 7, "status": "running", "message": "",
    }  # fmt: skip
    (folder / "processes").mkdir(exist_ok=True)
    (folder / "processes" / f"{index}.json").write_text(json.dumps(post | changes))


class _Clock:
    now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return _Clock()


def test_beats_keep_a_process_alive_and_silence_names_it(tmp_path, clock):
    peers = guard.Peers(_membership(tmp_path), clock)
    for beat in range(5):
        for index in (1, 2):
            _post(tmp_path, index, beat=beat)
        assert peers.look() is None
        clock.now += 20
    _post(tmp_path, 1, beat=9)
    assert peers.look() is None  # 20 s of silence
    clock.now += 15
    _post(tmp_path, 1, beat=10)
    assert peers.look() == (
        "process 2 (host host-2, pid 102) is dead: no sign of life for 35 s "
        "(hosts.dead_after_s=30); it was last in phase rollout of step 7"
    )


def test_files_of_an_earlier_attempt_are_no_signs(tmp_path, clock):
    _post(tmp_path, 1, attempt="before", status="failed", message="old news")
    _post(tmp_path, 2)
    peers = guard.Peers(_membership(tmp_path), clock)
    assert peers.look() is None
    clock.now += 31
    _post(tmp_path, 2, beat=2)
    assert "process 1 has given no sign of life" in peers.look()
    assert "not on storage that all processes share" in peers.look()


def test_failure_is_named_at_once_and_a_cause_goes_before_its_consequences(tmp_path, clock):
    peers = guard.Peers(_membership(tmp_path), clock)
    _post(tmp_path, 1, status="broken", message="Gloo AllGather failed")
    _post(tmp_path, 2)
    assert peers.look() is None  # somebody broke the collective, and may yet be named
    _post(tmp_path, 1, status="stopped", message="process 2 is the cause")
    assert peers.look() == "process 2 is the cause"
    _post(tmp_path, 2, status="failed", message="no prompts", phase="reward")
    assert peers.look() == (
        "process 2 (host host-2, pid 102) failed in phase reward of step 7: no prompts"
    )


def test_who_is_done_is_not_dead(tmp_path, clock):
    peers = guard.Peers(_membership(tmp_path, count=2), clock)
    _post(tmp_path, 1, status="done")
    peers.look()
    clock.now += 1000
    assert peers.look() is None


def test_damaged_file_is_no_sign_of_life(tmp_path, clock):
    peers = guard.Peers(_membership(tmp_path, count=2), clock)
    _post(tmp_path, 1)
    assert peers.look() is None
    (tmp_path / "processes" / "1.json").write_text('{"process": 1, "be')
    clock.now += 29
    assert peers.look() is None
    clock.now += 2
    assert "process 1 (host host-1, pid 101) is dead" in peers.look()


def test_next_start(tmp_path):
    assert guard.next_start(tmp_path / "checkpoints").endswith("starts over")
    for name in ("2", "10", "12.orbax-checkpoint-tmp"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert guard.next_start(tmp_path / "checkpoints").endswith("checkpoint step 10")


def test_errors_of_collectives_are_told_from_others():
    class JaxRuntimeError(RuntimeError):
        pass

    assert guard._is_collective(JaxRuntimeError("UNKNOWN: Gloo AllGather failed"))
    assert not guard._is_collective(JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"))
    assert guard._is_collective(ValueError("UNKNOWN: Gloo AllGather failed: closed by peer"))
    assert not guard._is_collective(ValueError("bad data"))
    wrapped = OSError("a checkpoint")
    wrapped.__cause__ = JaxRuntimeError("UNAVAILABLE")
    assert guard._is_collective(wrapped)


def test_phases_nest_and_keep_the_one_that_failed(monkeypatch):
    said = []
    monkeypatch.setattr(guard, "_tell", lambda **news: said.append(news))
    monkeypatch.setattr(guard, "_here", {"phase": "step", "step": 1})
    with guard.phase("rollout"), guard.phase("gather"):
        pass
    assert [news["phase"] for news in said] == ["rollout", "gather", "rollout", "step"]
    with pytest.raises(ValueError, match="bad"), guard.phase("reward"):
        raise ValueError("bad")
    assert said[-1] == {"phase": "reward"}


# A process of a run: argument 1 is its index, 2 the folder, 3 what it does. Never imports jax.
MEMBER = """
import os, signal, subprocess, sys, time
sys.path.insert(0, os.environ["ROOT"])
from luspo_jax.hosts import guard
guard.BEAT_S, guard._GRACE_S = 0.5, 2.0  # a test need not wait as long as hosts do
index, folder, what = sys.argv[1:]

def main():
    if what == "alone":
        guard.may_be_aborted("process 0 of 2 could not meet the others")
        os.abort()
    assert "jax" not in sys.modules
    guard.join(guard.Membership(
        folder=folder + "/processes", checkpoints=folder + "/checkpoints", index=int(index),
        count=2, attempt="now", dead_after_s=4.0,
        phase_timeout_s=3.0 if what in ("hang", "meet") else 0.0))
    guard.at_step(3)
    if what == "meet":
        with guard.phase(guard.MEETING):
            time.sleep(8.0)
        return 0
    with guard.phase("reward"):
        time.sleep(1.0)
        if what == "exit":
            os._exit(7)
        if what == "raise":
            raise ValueError("bad data on this host")
        if what == "abort":
            os.abort()
        if what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "host":
            os.kill(os.getppid(), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "guard":
            os.kill(os.getppid(), signal.SIGKILL)
        if what == "broken":
            class JaxRuntimeError(RuntimeError): pass
            raise JaxRuntimeError("Gloo AllGather failed")
        time.sleep(1.0 if what == "done" else 60.0)
    return 0

if guard.guarded():
    guard.work(main)
sys.exit(guard.watch([sys.executable, *sys.orig_argv[1:]]))
"""
NAMED = r"process 1 (host "
WHERE = "phase reward of step 3"


def _members(folder, *whats):
    environment = os.environ | {"ROOT": str(pathlib.Path(guard.__file__).parents[2])}
    return [
        subprocess.Popen(
            [sys.executable, "-c", MEMBER, str(index), str(folder), what],
            env=environment, stderr=subprocess.PIPE, text=True,
        )
        for index, what in enumerate(whats)
    ]  # fmt: skip


def test_who_meets_others_may_wait_for_them_without_limit(tmp_path):
    members = _members(tmp_path, "meet", "meet")
    said = [member.communicate(timeout=40)[1] for member in members]
    assert [member.returncode for member in members] == [0, 0], said


def _status(folder, index):
    return json.loads((folder / "processes" / f"{index}.json").read_text())


def test_members_that_are_done_leave_files_that_say_so(tmp_path):
    for member in (members := _members(tmp_path, "done", "done")):
        assert member.communicate(timeout=30)[1] == ""
    assert [member.returncode for member in members] == [0, 0]
    for index in range(2):
        post = _status(tmp_path, index)
        assert (post["status"], post["step"]) == ("done", 3)


@pytest.mark.parametrize(
    ("what", "code", "message", "seconds"),
    [
        ("exit", 7, "it ended with exit status 7", 6),
        ("raise", 1, "ValueError: bad data on this host", 6),
        ("kill", 137, "killed by SIGKILL", 6),
        ("abort", 134, "killed by SIGABRT", 15),  # first it is waited for another cause
        ("broken", 1, "Gloo AllGather failed", 15),
        ("host", -9, "no sign of life", 12),
        ("guard", -9, "no sign of life", 12),
        ("hang", 1, "hosts.phase_timeout_s=3", 10),
    ],
)
def test_survivor_names_the_other(tmp_path, what, code, message, seconds):
    survivor, victim = _members(tmp_path, "wait", what)
    started = time.monotonic()
    said = survivor.communicate(timeout=40)[1]
    assert time.monotonic() - started < seconds
    assert survivor.returncode == 1
    victim.communicate(timeout=10)
    assert victim.returncode == code
    assert NAMED in said
    assert WHERE in said
    assert message in said
    assert "the same command, run again on all processes, starts over" in said
    assert _status(tmp_path, 0)["status"] == "stopped"


def test_worker_that_lost_its_collective_waits_for_the_cause(tmp_path):
    """As where process 0's host dies and jax aborts this one at once."""
    survivor, victim = _members(tmp_path, "abort", "host")
    said = survivor.communicate(timeout=40)[1]
    victim.communicate(timeout=10)
    assert survivor.returncode == 1
    assert "process 1 (host " in said
    assert "is dead: no sign of life" in said
    assert "process 0" not in said


def test_worker_ends_with_its_guard(tmp_path):
    (member,) = _members(tmp_path, "wait")
    until = time.monotonic() + 10
    while not (tmp_path / "processes" / "0.json").exists() and time.monotonic() < until:
        time.sleep(0.1)
    worker = _status(tmp_path, 0)["pid"]
    assert worker != member.pid
    member.kill()
    member.communicate(timeout=10)
    while time.monotonic() < until:
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            break
        time.sleep(0.1)
    else:
        pytest.fail("the worker outlived its guard")


def test_process_that_jax_aborts_before_it_has_joined_says_what_that_means(tmp_path):
    (member,) = _members(tmp_path, "alone")
    assert member.communicate(timeout=10)[1] == "process 0 of 2 could not meet the others\n"
    assert member.returncode == 128 + signal.SIGABRT


def test_silence_proves_nothing_where_nobody_can_write(tmp_path, clock):
    peers = guard.Peers(_membership(tmp_path, count=2), clock)
    _post(tmp_path, 1)
    assert peers.look() is None
    clock.now += 31
    assert peers.look(trust_silence=False) is None
    assert "process 1 (host host-1, pid 101) is dead" in peers.look()


def test_signal_of_a_scheduler_reaches_the_worker(tmp_path):
    (member,) = _members(tmp_path, "wait")
    until = time.monotonic() + 10
    while not (tmp_path / "processes" / "0.json").exists() and time.monotonic() < until:
        time.sleep(0.1)
    member.send_signal(signal.SIGTERM)
    said = member.communicate(timeout=10)[1]
    assert member.returncode == 128 + signal.SIGTERM
    assert "killed by SIGTERM" in said
    assert _status(tmp_path, 0)["status"] == "failed"
