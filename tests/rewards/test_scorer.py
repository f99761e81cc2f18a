"""Batches are scored in order and nothing is lost, whatever a verifier does."""

import os
import subprocess
import sys
import time

import psutil
import pytest

from luspo_jax.hosts.workers import WALL_FACTOR
from luspo_jax.rewards import Sample, Scorer, TooManyFailures

LIMIT = 1.0
TRICKS = """
import os, random, signal, subprocess, sys, time

class Mute(Exception):
    def __str__(self):
        raise RuntimeError("no message")

def act(response, answer):
    if response == "hang":
        while True:
            pass
    if response == "deaf":  # catches everything that Python can catch
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True:
            try:
                time.sleep(60)
            except BaseException:
                pass
    if response == "native":  # one call into C that never looks at signals
        return 9 ** 9 ** 9 ** 9
    if response == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if response == "exit":
        os._exit(3)
    if response == "memory":
        return float(len(bytearray(1 << 40)))
    if response == "print":
        print("noise on standard output")
    if response == "raise":
        raise KeyboardInterrupt
    if response == "leave":
        raise SystemExit(0)
    if response == "mute":
        raise Mute
    if response == "fork":  # both return
        os.fork()
    if response == "start":
        subprocess.Popen(["sleep", "1000"])
        if os.fork() == 0:
            time.sleep(1000)
    if response == "flood":
        for _ in range(100):
            print("x" * 100_000, file=random.choice([sys.stdout, sys.stderr]))
    if response == "garble":
        for descriptor in range(3, 20):
            try:
                os.write(descriptor, b"\\0\\0\\0\\3abc")
            except OSError:
                pass
    if response == "multiply":  # 32 processes that never end
        for _ in range(5):
            os.fork()
        while True:
            pass
    return float(response == answer)
"""


@pytest.fixture(scope="module")
def tricks(tmp_path_factory):
    path = tmp_path_factory.mktemp("rewards") / "tricks.py"
    path.write_text(TRICKS)
    return f"{path}:act"


@pytest.fixture(scope="module")
def scorer(tricks):
    with Scorer({tricks: 1.0}, workers=2, time_limit=LIMIT, max_failure_rate=1.0) as scorer:
        yield scorer


def _alive(process):
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _descendants():
    return {child.pid for child in psutil.Process().children(recursive=True)}


def test_order_is_kept_and_cheap_parts_are_added(tricks):
    with Scorer([(tricks, 1.0), ("exact", 10.0)], workers=2) as scorer:
        samples = [Sample(str(n), str(n - n % 2)) for n in range(50)]
        rewards = scorer.score_batch(samples)
    assert [reward.value for reward in rewards] == [11.0, 0.0] * 25
    assert [reward.prediction for reward in rewards] == [str(n) for n in range(50)]


def test_hostile_samples_get_their_status_and_the_others_their_verdict(scorer):
    expected = {
        "hang": "timeout",
        "deaf": "timeout",
        "native": "timeout",
        "crash": "error",
        "exit": "error",
        "memory": "error",
        "raise": "error",
        "leave": "error",
        "mute": "error",
        "garble": "error",
        "multiply": "timeout",
        "start": "ok",
        "flood": "ok",
        "print": "ok",
    }
    samples = [Sample("fine", "fine")]
    for response in expected:
        samples += [Sample(response, "x"), Sample("fine", "fine")]
    rewards = scorer.score_batch(samples)
    assert [reward.status for reward in rewards[1::2]] == list(expected.values())
    assert all(reward.detail for reward in rewards if reward.status in ("timeout", "error"))
    assert [(r.value, r.status) for r in rewards[::2]] == [(1.0, "ok")] * (len(expected) + 1)
    assert "MemoryError" in rewards[11].detail
    assert "SystemExit: 0" in rewards[15].detail


def test_a_fork_of_a_verifier_has_no_say(scorer):
    """Its answers would be taken for those of the next tasks."""
    responses = ["a", "fork", "a", "b", "fork", "a", "a", "b"] * 3
    rewards = scorer.score_batch([Sample(response, "a") for response in responses])
    assert [r.value for r in rewards] == [float(response == "a") for response in responses]


def test_what_a_verifier_starts_ends_with_it(tricks):
    before = _descendants()
    with Scorer({tricks: 1.0}, workers=1, max_failure_rate=1.0) as scorer:
        scorer.score_batch([Sample("start", "x"), Sample("a", "a")])
        started = _descendants() - before
    _, alive = psutil.wait_procs([psutil.Process(p) for p in started if psutil.pid_exists(p)], 5)
    assert len(started) >= 4
    assert not [process for process in alive if _alive(process)]


def test_a_verifier_that_prints_without_end_does_not_fill_the_console(tricks, capfd):
    with Scorer({tricks: 1.0}, workers=1) as scorer:
        scorer.score_batch([Sample("print", "x"), Sample("flood", "x"), Sample("flood", "x")])
    printed = capfd.readouterr().err
    assert "noise on standard output" in printed
    assert "is not shown" in printed
    assert len(printed) < 20_000


def test_a_time_out_takes_its_limit_of_processor_time_and_at_most_three_by_the_clock(scorer):
    scorer.score_batch([Sample("fine", "fine")] * 2)
    start = time.monotonic()
    statuses = [r.status for r in scorer.score_batch([Sample("hang", "x")] * 4)]
    assert statuses == ["timeout"] * 4
    assert LIMIT <= time.monotonic() - start < 2 * WALL_FACTOR * LIMIT + 3


def test_a_worker_whose_child_is_killed_from_outside_is_replaced(tricks):
    before = _descendants()  # servers of other tests are among them
    with Scorer({tricks: 1.0}, workers=2, time_limit=LIMIT) as scorer:
        scorer.score_batch([Sample("fine", "fine")] * 2)
        killed = [psutil.Process(pid) for pid in _descendants() - before]
        assert killed
        for process in killed:
            process.kill()
        # A grandchild holds the pipe of tasks open until it is gone, not until its parent is; where
        # nothing reaps orphans it stays as a zombie, which holds nothing.
        deadline = time.monotonic() + 10
        while any(_alive(process) for process in killed):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert [r.status for r in scorer.score_batch([Sample("fine", "fine")] * 8)] == ["ok"] * 8


def test_workers_are_recycled_without_losing_a_task(tricks):
    with Scorer({tricks: 1.0}, workers=1, recycle_after=3) as scorer:
        assert sum(r.value for r in scorer.score_batch([Sample("a", "a")] * 10)) == 10


def test_no_process_is_left_after_closing(tricks):
    before = _descendants()
    with Scorer({tricks: 1.0}, workers=2, time_limit=LIMIT, max_failure_rate=1.0) as scorer:
        scorer.score_batch([Sample("hang", "x"), Sample("a", "a")])
        started = _descendants() - before
        assert started
    assert not [pid for pid in started if psutil.pid_exists(pid)]
    assert scorer.score_batch([Sample("a", "a")])[0].value == 1  # it starts again when needed
    scorer.close()


def test_no_process_outlives_a_killed_run_by_more_than_the_limit(tricks, tmp_path):
    script = tmp_path / "run.py"
    script.write_text(
        "from luspo_jax.rewards import Sample, Scorer\n"
        f"s = Scorer({{{tricks!r}: 1.0}}, workers=2, time_limit={2 * LIMIT})\n"
        "s.score_batch([Sample('a', 'a')] * 4)\n"
        "print('ready', flush=True)\n"
        "s.score_batch([Sample('hang', 'x')] * 4)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path])}
    run = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment
    )
    with run:
        assert run.stdout.readline() == "ready\n"
        time.sleep(0.3)
        children = psutil.Process(run.pid).children(recursive=True)
        assert len(children) >= 4
        run.kill()
    _, alive = psutil.wait_procs(children, timeout=WALL_FACTOR * 2 * LIMIT + 3)
    assert not alive


def test_a_failure_rate_below_the_limit_is_let_pass_and_above_it_stops(tricks):
    with Scorer({tricks: 1.0}, workers=1, max_failure_rate=0.2) as scorer:
        fine, broken = Sample("a", "a"), Sample("memory", "x")
        statuses = [r.status for r in scorer.score_batch([broken] * 10 + [fine] * 90)]
        assert statuses.count("error") == 10
        with pytest.raises(TooManyFailures, match=r"MemoryError.*|.*20.*"):
            scorer.score_batch([broken] * 20)


def test_a_reward_that_always_fails_stops_at_once():
    with (
        Scorer({"overlong": 1.0}, options={"overlong": {"buffer": 5}}) as scorer,
        pytest.raises(TooManyFailures, match="16 × overlong: ValueError"),
    ):
        scorer.score_batch([Sample("", "")] * 16)


def test_a_worker_that_cannot_start_says_why(tricks, monkeypatch):
    scorer = Scorer({tricks: 1.0}, workers=1)
    os.rename(tricks.removesuffix(":act"), tricks.removesuffix(":act") + ".away")
    try:
        with pytest.raises(RuntimeError, match="does not exist"):
            scorer.score_batch([Sample("a", "a")])
    finally:
        os.rename(tricks.removesuffix(":act") + ".away", tricks.removesuffix(":act"))


def test_an_empty_batch_starts_nothing(tricks):
    before = _descendants()
    assert Scorer({tricks: 1.0}).score_batch([]) == []
    assert _descendants() == before


def test_labels_name_every_verifier():
    scorer = Scorer({"dapo_math": 1.0, "boxed_math": 1.0})
    assert all("@" in label for label in scorer.labels.values())
