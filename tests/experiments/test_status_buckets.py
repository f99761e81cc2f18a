"""What `experiments.status` says of runs in buckets, with locks that live and die."""

import json
import os
import pathlib
import socket
import subprocess
import sys
import time

import pytest

from experiments.progress import facts, reading, watching
from luspo_jax.hosts import lease
from luspo_jax.hosts.buckets import Bucket, BucketError
from luspo_jax.metrics import json_line
from tests.bucket_cases import bucket_of
from tests.bucket_servers import BUCKET, Gate, environment

ROOT = pathlib.Path(__file__).resolve().parents[2]
ACCURACY = "val-core/toy/acc/mean@4"


@pytest.fixture(params=["gs", "s3"])
def bucket(request, bucket_ports, monkeypatch, tmp_path):
    """A run of 3 of 5 steps in a bucket of either kind."""
    bucket = bucket_of(request.param, bucket_ports[request.param], monkeypatch, tmp_path)
    write_run(bucket)
    return bucket


@pytest.fixture
def gs(bucket_ports, monkeypatch, tmp_path):
    """The same, behind a gate."""
    with Gate() as gate:
        gate.target = bucket_ports["gs"]
        bucket = bucket_of("gs", gate.port, monkeypatch, tmp_path)
        write_run(bucket)
        yield bucket, gate


def write_run(bucket, *, steps=3):
    rows = [json_line(0, {ACCURACY: 0.25})]
    for step in range(1, steps + 1):
        row = {"reward": step / 10, "response_length/mean": 100.0 + step, "timing_s/step": 7.0}
        rows.append(json_line(step, row | ({ACCURACY: 0.5} if step == 2 else {})))
    config = {"num_steps": 5, "eval.every": 2, "hosts.dead_after_s": 30.0}
    objects = {
        "run.json": json.dumps({"config": config}),
        "metrics.jsonl": "".join(rows),
        "checkpoints/2/host/data": "x" * 10,
        "checkpoints/2/state/data": "x" * 20,
        "checkpoints/2/commit_success.txt": "",
        "checkpoints/3/host/data": "x" * 30,  # in the background: its last mark is missing
        "checkpoints/3/state/data": "x" * 40,
        "rollouts/step_000001.jsonl": "y" * 50,
        "export/model.safetensors": "z" * 60,
    }
    for name, content in objects.items():
        bucket.write(name, content.encode())


def hold(bucket, *, beat=0, released=False, token="t", number=1):
    """Writes a lock as its holder would at a beat."""
    lock = lease.Held(number, token, socket.gethostname(), 1, "elsewhere", "noon", beat, released)
    bucket.write(f".lock/{number:06d}.json", json.dumps(vars(lock)).encode())


def shift(monkeypatch, seconds):
    """Moves this host's clock, which differs from the server's from then on."""
    plain = time.time
    for module in (facts, reading, reading.server_clock):
        clock = type("", (), {"time": lambda: plain() + seconds, "monotonic": time.monotonic})
        monkeypatch.setattr(module, "time", clock)


def look(folder, bucket):
    return facts.progress(bucket.url, folder, facts.Beats())


def test_how_far_and_how_well(bucket):
    known = look(reading.folder(bucket.url), bucket)
    assert (known.step, known.num_steps, known.seconds_per_step) == (3, 5, 7.0)
    assert known.values["reward"] == facts.Point(3, 0.3)
    assert known.curves[ACCURACY].best == facts.Point(2, 0.5)
    assert (known.checkpoints, known.best_checkpoint) == ([2], 2)
    metrics = bucket.entries()["metrics.jsonl"].size + bucket.entries()["run.json"].size
    sizes = {"checkpoints": 100, "rollouts": 50, "export": 60, "rest": metrics}
    assert known.bytes == sizes
    assert 0 <= known.age_s < 20


def test_nothing_there_is_gone(bucket):
    nothing = reading.folder(f"{bucket.url}/nothing")
    assert look(nothing, bucket).state == "gone"
    bucket.write("other/file", b"")
    assert look(reading.folder(f"{bucket.url}/other"), bucket).state == "never started"


def test_a_lock_that_lives_ends_and_is_given_back(bucket):
    folder = reading.folder(bucket.url)
    assert folder.entries()
    assert folder.is_locked() is None  # there is none
    hold(bucket)
    assert look(folder, bucket).state == "running"
    hold(bucket, beat=3, released=True)
    ended = look(folder, bucket)
    assert ended.state == "silent"
    assert "no run holds its lock" in ended.notes[-1]
    hold(bucket, number=2, token="u")  # the run was started again
    assert look(folder, bucket).state == "running"
    hold(bucket, number=2, token="u", beat=9, released=True)
    metrics = bucket.read("metrics.jsonl").decode()
    bucket.write("metrics.jsonl", (metrics + json_line(5, {"reward": 1.0})).encode())
    bucket.write("checkpoints/5/commit_success.txt", b"")
    assert look(folder, bucket).state == "finished"


def test_a_lease_of_a_live_run(bucket):
    held = lease.Lease(bucket)
    folder = reading.folder(bucket.url)
    assert look(folder, bucket).state == "running"
    held.close()
    assert look(folder, bucket).state == "silent"


@pytest.mark.parametrize("ahead", [-4000.0, 4000.0])
def test_clocks_that_differ(bucket, ahead, monkeypatch):
    hold(bucket)
    shift(monkeypatch, ahead)
    known = look(reading.folder(bucket.url), bucket)
    assert known.state == "running"
    assert 0 <= known.age_s < 20


def test_a_lock_that_died_is_known_at_the_first_look(bucket, monkeypatch):
    hold(bucket)
    monkeypatch.setattr(reading.server_clock, "ahead_s", lambda url: 0.0)
    shift(monkeypatch, lease.LEASE_S + 5)
    folder = reading.folder(bucket.url)
    dead = look(folder, bucket)
    assert dead.state == "silent"
    assert dead.age_s == pytest.approx(lease.LEASE_S + 5, abs=3)
    hold(bucket, beat=1)  # it did not die, whatever its server's clock said
    assert look(folder, bucket).state == "running"


@pytest.mark.parametrize("ahead", [-4000.0, 4000.0])
def test_without_the_server_s_time_a_watch_decides(bucket, ahead, monkeypatch):
    """A lock is alive at once; one that does not change is dead after the lease, not before."""
    hold(bucket)
    shift(monkeypatch, ahead)
    monkeypatch.setattr(reading.server_clock, "ahead_s", lambda url: None)
    now = [100.0]
    folder = reading.BucketFolder(bucket.url, clock=lambda: now[0])
    known = look(folder, bucket)
    assert known.state == "running"
    assert known.age_s >= 0
    now[0] += lease.LEASE_S - 1
    assert look(folder, bucket).state == "running"
    hold(bucket, beat=1)
    assert look(folder, bucket).state == "running"
    now[0] += lease.LEASE_S - 1
    assert look(folder, bucket).state == "running"
    now[0] += 2
    assert look(folder, bucket).state == "silent"


def test_heartbeats_of_several_processes(bucket, monkeypatch):
    hold(bucket)
    for index, status in enumerate(("running", "running")):
        post = {
            "process": index, "host": f"h{index}", "pid": 7, "attempt": "b", "beat": 1, "step": 4,
            "status": status, "phase": "gen", "message": "",
        }  # fmt: skip
        bucket.write(f"processes/{index}.json", json.dumps(post).encode())
    shift(monkeypatch, 4000.0)
    known = look(reading.folder(bucket.url), bucket)
    assert known.state == "running"
    assert [p.status for p in known.processes] == ["running", "running"]
    assert all(0 <= p.age_s < 20 for p in known.processes)


def test_a_look_reads_only_what_changed(gs):
    bucket, gate = gs
    hold(bucket)
    folder, beats = reading.folder(bucket.url), facts.Beats()

    def requests():
        before = dict(gate.requests)
        facts.members(folder)
        facts.progress(bucket.url, folder, beats)
        assert {m for m in gate.requests if gate.requests[m] != before.get(m)} == {"GET"}
        return gate.requests["GET"] - before.get("GET", 0)

    assert requests() == 5  # list, the server's time, run.json, metrics.jsonl, the lock
    assert requests() == 1
    hold(bucket, beat=1)
    assert requests() == 2


def test_a_watch_outlives_an_absent_server(gs, monkeypatch, capsys):
    bucket, _ = gs
    hold(bucket)
    looks = []
    plain = Bucket.entries

    def entries(self, below=""):
        looks.append(1)
        if len(looks) == 2:
            raise BucketError(f"{self.url} does not answer")
        if len(looks) > 3:
            raise KeyboardInterrupt
        return plain(self, below)

    monkeypatch.setattr(Bucket, "entries", entries)
    assert watching.show([bucket.url], every_s=0.01)
    out, err = capsys.readouterr()
    assert (out.count(f"{bucket.url}: running"), err.count("does not answer")) == (2, 1)
    looks[:] = [1]
    with pytest.raises(BucketError):  # at the first look there is nothing to go on with
        watching.show([bucket.url], every_s=0.01)


def call(*arguments, env, hide=""):
    code = (
        f"import runpy, sys; sys.modules.update(dict.fromkeys({hide.split()!r}))\n"
        f"sys.argv = ['status', *{list(arguments)!r}]\n"
        "runpy.run_module('experiments.status', run_name='__main__', alter_sys=True)\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"COLUMNS": "300"} | env,
        capture_output=True, text=True,
    )  # fmt: skip
    return ran.returncode, ran.stdout, ran.stderr


def test_the_command(gs, bucket_ports):
    bucket, _ = gs
    env = environment("gs", bucket_ports["gs"])
    hold(bucket)
    code, out, err = call(bucket.url, env=env)
    assert (code, err) == (0, "")
    for line in (f"{bucket.url}: running", "3 of 5", "latest 2, best 2", "in bucket   "):
        assert line in out
    code, out, _ = call(f"{bucket.url}/", "--json", env=env)
    assert (code, json.loads(out)["step"]) == (0, 3)


@pytest.mark.parametrize(("scheme", "package"), [("gs", "gcsfs"), ("s3", "s3fs")])
def test_refusals_are_one_line(bucket_ports, scheme, package):
    env = environment(scheme, bucket_ports[scheme])
    code, _, err = call(f"{scheme}://not-there/run", env=env)
    assert (code, err.count("\n")) == (1, 1)
    assert f"does the bucket {scheme}://not-there exist?" in err
    code, _, err = call(f"{scheme}://{BUCKET}/run", env=env, hide=package)
    assert (code, err.count("\n")) == (1, 1)
    assert f"needs the package {package}, which is not installed" in err


def test_a_forbidden_bucket_is_one_line(gs):
    bucket, gate = gs
    gate.answer = lambda method, path: 403
    code, _, err = call(bucket.url, env=environment("gs", gate.port))
    assert (code, err.count("\n")) == (1, 1)
    assert f"{bucket.url}: no permission to list there" in err


def test_it_does_not_import_jax(gs):
    code = (
        "import sys\nfrom experiments.progress import watching\n"
        f"watching.show([{gs[0].url!r}])\nprint('jax' in sys.modules)\n"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert out.stdout.splitlines()[-1:] == ["False"], out.stderr
