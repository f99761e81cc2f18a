"""The guard with small processes that never import jax, and a store in a folder of the test's."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from luspo_jax.hosts import guard


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


def _await(condition, within_s=15.0):
    until = time.monotonic() + within_s
    while time.monotonic() < until:
        try:
            if condition():
                return
        except OSError:
            pass
        time.sleep(0.05)
    pytest.fail("it did not come about")


# A process of a run: argument 1 is its index, 2 the folder, 3 what it does. Never imports jax.
MEMBER = """
import os, pathlib, signal, socket, sys, time
sys.path.insert(0, os.environ["ROOT"])
from luspo_jax.hosts import guard, peers
peers.BEAT_S, guard._GRACE_S = 0.5, 2.0  # a test need not wait as long as hosts do
index, folder, what = sys.argv[1:]
CLOSED = os.environ.get("CLOSED")  # where guards cannot reach one another
if index == os.environ.get("CLOCK_OF"):  # a host whose clocks began at another time
    real = time.monotonic
    time.monotonic, time.time = lambda: real() + 1e6, lambda: 5.0

class Store:
    # As that of jax: texts by process, an error while it cannot be reached.
    def __init__(self):
        self.folder = pathlib.Path(folder) / "store"
        self.folder.mkdir(exist_ok=True)
    def check(self):
        if (self.folder / f"gone_for_{index}").exists():
            raise RuntimeError("UNAVAILABLE: failed to connect to all addresses")
    def put(self, index, text):
        self.check()
        (self.folder / f"new{index}").write_text(text)
        (self.folder / f"new{index}").rename(self.folder / f"{index}.json")
    def texts(self):
        self.check()
        return [path.read_text() for path in self.folder.glob("*.json")]
    def meet(self, label, timeout_s):
        (self.folder / f"{label}{index}").touch()
        while len(list(self.folder.glob(f"{label}*"))) < 2:
            time.sleep(0.05)

def main():
    if what == "alone":
        guard.may_be_aborted("process 0 of 2 could not meet the others")
        os.abort()
    assert "jax" not in sys.modules
    guard.join(peers.Membership(
        folder=folder + "/processes_of_" + index, checkpoints=folder + "/checkpoints",
        index=int(index), count=2, attempt="now", secret="s",
        host="nowhere.invalid" if CLOSED else "127.0.0.1", dead_after_s=4.0,
        phase_timeout_s=3.0 if what in ("hang", "meet") else 0.0), Store())
    guard.at_step(3)
    if what == "meet":
        with guard.phase(guard.MEETING):
            time.sleep(8.0)
        return 0
    with guard.phase("reward"):
        time.sleep(1.0)
        if what == "exit":
            os._exit(7)
        if what == "ctrl-c":
            # Tests in a shell's background are begun with SIGINT ignored.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.kill(os.getpid(), signal.SIGINT)
        if what == "raise":
            raise ValueError("bad data on this host")
        if what == "abort":
            os.abort()
        if what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "host":
            os.kill(os.getppid(), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "frozen":
            os.kill(os.getppid(), signal.SIGSTOP)
            os.kill(os.getpid(), signal.SIGSTOP)
        if what == "guard":
            os.kill(os.getppid(), signal.SIGKILL)
        if what == "busy":
            os.kill(os.getpid(), signal.SIGSTOP)  # as one that holds Python's lock
        if what == "broken":
            class JaxRuntimeError(RuntimeError): pass
            raise JaxRuntimeError("Gloo AllGather failed")
        seconds = {"done": float(os.environ.get("SECONDS", 1.0)), "busy": 1.0}
        time.sleep(seconds.get(what, 60.0))
    guard.leave()
    return 0

if guard.guarded():
    guard.work(main)
sys.exit(guard.watch([sys.executable, *sys.orig_argv[1:]]))
"""
WHERE = "phase reward of step 3"


def _members(folder, *whats, **variables):
    environment = os.environ | {"ROOT": str(pathlib.Path(guard.__file__).parents[2])} | variables
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
    return json.loads((folder / "processes_of_0" / f"{index}.json").read_text())


@pytest.mark.parametrize("variables", [{}, {"CLOSED": "1"}])
def test_members_that_are_done_leave_files_that_say_so(tmp_path, variables):
    """Guard 0 writes them, and no other."""
    for member in (members := _members(tmp_path, "done", "done", **variables)):
        assert member.communicate(timeout=30)[1] == ""
    assert [member.returncode for member in members] == [0, 0]
    for index in range(2):
        post = _status(tmp_path, index)
        assert (post["process"], post["status"], post["step"]) == (index, "done", 3)
        assert "guard" not in post
    assert not (tmp_path / "processes_of_1").exists()


def test_clocks_of_hosts_need_not_agree(tmp_path):
    members = _members(tmp_path, "done", "done", CLOCK_OF="1", SECONDS="6")
    said = [member.communicate(timeout=30)[1] for member in members]
    assert [member.returncode for member in members] == [0, 0], said


@pytest.mark.parametrize("closed", ["", "1"])
def test_store_that_cannot_be_reached_for_a_while_kills_nobody(tmp_path, closed):
    """With open ports even for longer than dead_after_s, as the guards ask one another."""
    gone = tmp_path / "store" / "gone_for_1"
    members = _members(tmp_path, "done", "done", SECONDS="9", CLOSED=closed)
    _await(lambda: (tmp_path / "store" / "1.json").exists())
    time.sleep(1.0)
    gone.touch()
    time.sleep(2.5 if closed else 6.0)
    gone.unlink()
    said = [member.communicate(timeout=30)[1] for member in members]
    assert [member.returncode for member in members] == [0, 0], said


def test_worker_that_is_busy_is_no_dead_one_as_its_guard_says(tmp_path):
    """It gives no sign of life for longer than dead_after_s."""
    members = _members(tmp_path, "done", "busy", SECONDS="9")
    _await(lambda: '"reward"' in (tmp_path / "store" / "1.json").read_text())
    time.sleep(7.5)
    assert [member.poll() for member in members] == [None, None]
    os.kill(json.loads((tmp_path / "store" / "1.json").read_text())["pid"], signal.SIGCONT)
    said = [member.communicate(timeout=30)[1] for member in members]
    assert [member.returncode for member in members] == [0, 0], said


@pytest.mark.parametrize(
    ("victim", "what", "code", "message", "seconds"),
    [
        (1, "exit", 7, "it ended with exit status 7", 6),
        (1, "raise", 1, "ValueError: bad data on this host", 6),
        (1, "ctrl-c", 1, "KeyboardInterrupt", 6),
        (1, "kill", 137, "killed by SIGKILL", 6),
        (0, "kill", 137, "killed by SIGKILL", 6),
        (1, "abort", 134, "killed by SIGABRT", 15),  # first it is waited for another cause
        (1, "broken", 1, "Gloo AllGather failed", 15),
        (0, "host", -9, "no sign of life", 12),
        (1, "host", -9, "no sign of life", 12),
        (1, "frozen", -9, "no sign of life", 12),
        (1, "guard", -9, "no sign of life", 12),
        (1, "hang", 1, "hosts.phase_timeout_s=3", 10),
    ],
)
def test_survivor_names_the_other(tmp_path, victim, what, code, message, seconds):
    members = _members(tmp_path, *((what, "wait") if victim == 0 else ("wait", what)))
    survivor, started = members[1 - victim], time.monotonic()
    said = survivor.communicate(timeout=40)[1]
    assert time.monotonic() - started < seconds
    assert survivor.returncode == 1
    if what == "frozen":
        _end_frozen(tmp_path, members[victim], victim)
    members[victim].communicate(timeout=10)
    assert members[victim].returncode == code
    assert f"process {victim} (host " in said
    assert WHERE in said
    assert message in said
    assert "the same command, run again on all processes, starts over" in said
    if victim == 1:
        assert _status(tmp_path, 0)["status"] == "stopped"


@pytest.mark.parametrize(
    ("victim", "what", "message"),
    [
        (0, "raise", "ValueError: bad data on this host"),  # its worker posts it
        (0, "host", "is dead: no sign of life"),
        (1, "kill", "is dead: no sign of life"),
    ],
)
def test_where_ports_are_closed_silence_still_names_it(tmp_path, victim, what, message):
    whats = (what, "wait") if victim == 0 else ("wait", what)
    members = _members(tmp_path, *whats, CLOSED="1")
    said = members[1 - victim].communicate(timeout=40)[1]
    assert members[1 - victim].returncode == 1
    members[victim].communicate(timeout=10)
    assert f"process {victim} (host " in said
    assert WHERE in said
    assert message in said


def _end_frozen(folder, member, index):
    member.kill()
    os.kill(json.loads((folder / "store" / f"{index}.json").read_text())["pid"], signal.SIGKILL)


@pytest.mark.parametrize("closed", ["", "1"])
def test_worker_that_lost_its_collective_waits_for_the_cause(tmp_path, closed):
    """As where process 0's host dies and jax aborts this one at once."""
    victim, survivor = _members(tmp_path, "host", "abort", CLOSED=closed)
    said = survivor.communicate(timeout=40)[1]
    victim.communicate(timeout=10)
    assert survivor.returncode == 1
    assert "process 0 (host " in said
    assert "is dead: no sign of life" in said
    assert "process 1" not in said


@pytest.mark.parametrize("what", ["abort", "broken"])
def test_process_0_that_lost_its_collective_waits_for_the_cause(tmp_path, what):
    survivor, victim = _members(tmp_path, what, "host")
    said = survivor.communicate(timeout=40)[1]
    victim.communicate(timeout=10)
    assert survivor.returncode == 1
    assert "process 1 (host " in said
    assert "is dead: no sign of life" in said
    assert "process 0" not in said


def test_worker_ends_with_its_guard(tmp_path):
    (member,) = _members(tmp_path, "wait")
    until = time.monotonic() + 10
    _await(lambda: _status(tmp_path, 0))
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


def test_signal_of_a_scheduler_reaches_the_worker(tmp_path):
    (member,) = _members(tmp_path, "wait")
    _await(lambda: _status(tmp_path, 0))
    member.send_signal(signal.SIGTERM)
    said = member.communicate(timeout=10)[1]
    assert member.returncode == 128 + signal.SIGTERM
    assert "killed by SIGTERM" in said
    assert _status(tmp_path, 0)["status"] == "failed"
