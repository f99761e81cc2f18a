"""Whole runs whose workdir is a bucket: the numbers of a local one, whatever happens on the way."""

import itertools
import json
import pathlib
import random
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

from luspo_jax.hosts.buckets import Bucket
from luspo_jax.hosts.lease import LEASE_S
from luspo_jax.metrics import read_metrics
from tests import bucket_servers
from tests.bucket_servers import BUCKET, Gate, connect, user
from tests.test_train import _assert_same_results, _results

ROOT = pathlib.Path(__file__).resolve().parents[1]
SETTINGS = (
    "--config=configs/quickstart.py",
    "--config.num_steps=12",
    "--config.rollout.prompts_per_step=6",
    "--config.rollout.group_size=4",
    "--config.rollout.max_response_length=16",
    "--config.eval.every=6",
    "--config.eval.num_problems=8",
    "--config.eval.num_samples=1",
    "--config.eval.num_slots=8",
    "--config.output.checkpoint_every=1",
    "--config.train.num_minibatches=1",
    "--config.train.num_epochs=2",
    "--config.shaping.dynamic_sampling=True",
)


class Site:
    """A gate with a server behind it, and what users do there.

    Attributes:
      gate: in front of the server.
      bucket: the run's folder.
    """

    def __init__(self, scheme, gate, folder, url):
        self.scheme, self.gate, self.folder = scheme, gate, folder
        self.bucket, self.log = Bucket(url), folder / "log"
        self._hosts = 0

    def start(self, *extra, workdir=None):
        """Starts a run on a host that never saw the workdir."""
        self._hosts += 1
        environment = dict(user(self.scheme, self.gate.port, self.folder / f"host_{self._hosts}"))
        environment["JAX_COMPILATION_CACHE_DIR"] = str(self.folder / "compiled")
        flags = (*SETTINGS, *extra, f"--workdir={workdir or self.bucket.url}")
        with self.log.open("a") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "experiments.train", *flags],
                cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def run(self, *extra, workdir=None, status=0):
        """Runs to the end; returns what it printed."""
        before = self.log.stat().st_size if self.log.exists() else 0
        process = self.start(*extra, workdir=workdir)
        try:
            found = process.wait(400)
        finally:
            process.kill()
        text = self.log.read_text()[before:]
        assert found == status, text[-4000:]
        return text

    def count_uploads(self):
        """Returns a function of a request: how many objects were sent with it, 0 if it is none."""
        sent, lock = itertools.count(1), threading.Lock()

        def number(method, path):
            with lock:
                sends = method == "PUT" or (method == "POST" and "/upload/" in path)
                return next(sent) if sends else 0

        return number

    def results(self):
        """Returns what the run left in the bucket."""
        target = self.folder / "fetched"
        for name in self.bucket.entries():
            if not name.startswith("checkpoints/"):
                self.bucket.download(name, target / name)
        return _results(target)


@pytest.fixture(params=["gs", "s3"])
def site(request, monkeypatch, tmp_path):
    server = {"gs": bucket_servers.gcs, "s3": bucket_servers.s3}[request.param]
    with Gate() as gate, server(gate.port) as port:
        gate.target = port
        connect(monkeypatch, request.param, gate.port)
        yield Site(request.param, gate, tmp_path, f"{request.param}://{BUCKET}/study/run")


gs_only = pytest.mark.parametrize("site", ["gs"], indirect=True)


def kill_at_upload(site, process, number, *, reached):
    """Kills a run when it sends its `number`-th object, which arrives or does not."""
    sent = site.count_uploads()

    def answer(method, path):
        if sent(method, path) == number:
            process.send_signal(signal.SIGKILL)
            process.wait()
            return None if reached else 503
        return None

    site.gate.answer = answer
    status = process.wait(400)
    site.gate.answer = lambda method, path: None
    return status


@gs_only
def test_a_run_that_is_killed_goes_on_on_another_host_as_if_nothing_was(site):
    site.run(workdir=site.folder / "straight")
    number = 45  # in the middle of a checkpoint
    status = kill_at_upload(site, site.start(), number, reached=True)
    assert status == -signal.SIGKILL, site.log.read_text()[-3000:]
    assert site.bucket.entries("checkpoints")
    assert site.bucket.read("summary.png") is None
    text = site.run()
    assert f"figure: {site.bucket.url}/summary.png" in text
    _assert_same_results(site.results(), _results(site.folder / "straight"))
    found = site.bucket.entries()
    assert {"summary.png", "run.json", "export/config.json"} <= found.keys()
    assert [n for n in found if n.startswith("tensorboard/events")]
    assert [n.split("/")[1] for n in found if n.endswith("/commit_success.txt")][-1] == "12"
    # Nothing is left on the host, and nothing was made of the address.
    assert not list(site.folder.glob("host_3/luspo_jax/workdirs/*/*"))
    assert not (ROOT / "gs:").exists()
    assert "is held by" not in text  # the killed process is of this host


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_ten_kills_during_uploads_change_nothing(site, seed):
    site.run(workdir=site.folder / "straight")
    rng = random.Random(seed)
    for _ in range(10):
        process = site.start()
        # A step sends about 18: some starts get a step further, others not.
        number = rng.randrange(1, 25)
        status = kill_at_upload(site, process, number, reached=rng.random() < 0.5)
        assert status == -signal.SIGKILL, site.log.read_text()[-3000:]
    site.run()
    _assert_same_results(site.results(), _results(site.folder / "straight"))


@pytest.mark.slow
def test_a_server_that_is_gone_for_a_minute_costs_nothing(site):
    site.run(workdir=site.folder / "straight")
    process, outage, sent = site.start(), [], site.count_uploads()

    def answer(method, path):
        if sent(method, path) == 30:  # in a checkpoint
            outage.append(True)
            site.gate.open = False
        return None

    site.gate.answer = answer
    until = time.monotonic() + 200
    while not outage and time.monotonic() < until and process.poll() is None:
        time.sleep(0.1)
    assert outage, site.log.read_text()[-3000:]
    time.sleep(60)
    site.gate.answer = lambda method, path: None
    site.gate.open = True
    assert process.wait(400) == 0, site.log.read_text()[-3000:]
    assert "does not answer" in site.log.read_text()
    _assert_same_results(site.results(), _results(site.folder / "straight"))


@pytest.mark.slow
def test_a_server_that_throttles_costs_nothing(site):
    site.run(workdir=site.folder / "straight")
    rng, lock = random.Random(0), threading.Lock()

    def answer(method, path):
        with lock:
            return rng.choice((429, 503)) if rng.random() < 0.05 else None

    site.gate.answer = answer
    site.run()
    site.gate.answer = lambda method, path: None
    _assert_same_results(site.results(), _results(site.folder / "straight"))


@pytest.mark.slow
def test_a_permission_that_is_taken_away_is_one_line_and_loses_nothing(site):
    site.run(workdir=site.folder / "straight")
    process, sent, forbidden = site.start(), site.count_uploads(), []

    def answer(method, path):
        if forbidden or sent(method, path) == 40:
            forbidden.append(True)
            return 403
        return None

    site.gate.answer = answer
    assert process.wait(400) == 1
    lines = site.log.read_text().splitlines()
    assert not any(line.startswith("Traceback") for line in lines)
    assert any("no permission to" in line for line in lines)
    site.gate.answer = lambda method, path: None
    site.run()
    _assert_same_results(site.results(), _results(site.folder / "straight"))


@pytest.mark.slow
@gs_only
def test_two_hosts_that_share_only_a_bucket(site):
    """Each has a cache of its own; one dies, is named, and both go on elsewhere."""
    port = bucket_servers.free_port()

    def start(where, attempt):
        return [
            site.start(
                f"--coordinator=127.0.0.1:{port}", "--num_processes=2", f"--process_id={index}",
                "--config.rollout.prompts_per_step=8", "--config.hosts.dead_after_s=8",
                "--config.output.checkpoint_every=2", workdir=where,
            )
            for index in range(2)
        ]  # fmt: skip

    for process in start(site.folder / "straight", 0):
        assert process.wait(400) == 0, site.log.read_text()[-3000:]
    first, second = start(None, 1)
    until = time.monotonic() + 300
    while b'"step": 3' not in (site.bucket.read("metrics.jsonl") or b""):
        assert time.monotonic() < until, site.log.read_text()[-3000:]
        time.sleep(0.1)
    assert set(site.bucket.entries("processes")) == {"processes/0.json", "processes/1.json"}
    for child in psutil.Process(second.pid).children(recursive=True):
        child.kill()
    second.kill()
    began = time.monotonic()
    assert first.wait(100) != 0
    assert time.monotonic() - began < 8 + 15
    text = site.log.read_text()
    assert "process 1 (host" in text
    assert "continues from its last checkpoint" in text
    for process in start(None, 2):
        assert process.wait(400) == 0, site.log.read_text()[-3000:]
    _assert_same_results(site.results(), _results(site.folder / "straight"))
    assert not site.bucket.entries("processes")


@pytest.mark.slow
@gs_only
def test_a_workdir_in_use_is_refused_and_one_of_a_dead_run_taken_over(site):
    long = (
        "--config.num_steps=5000",
        "--config.eval.every=0",
        "--config.output.checkpoint_every=20",
    )
    first = site.start(*long)
    _wait_for(lambda: site.bucket.read("metrics.jsonl"))
    began = time.monotonic()
    text = site.run(*long, status=1)
    assert "is in use by another run, on host" in text
    first.send_signal(signal.SIGSTOP)  # as a host that hangs: no sign of life, and not dead
    second = site.start(*long)
    _wait_for(lambda: site.bucket.entries(".lock").keys() == {".lock/000002.json"})
    assert time.monotonic() - began > LEASE_S
    first.send_signal(signal.SIGCONT)
    assert first.wait(100) == 1
    assert "was taken over by host" in site.log.read_text()
    taken = site.bucket.read("metrics.jsonl").count(b"\n")
    _wait_for(lambda: site.bucket.read("metrics.jsonl").count(b"\n") > taken + 3)
    second.send_signal(signal.SIGTERM)
    assert second.wait(100) == 143
    steps = [json.loads(line)["step"] for line in site.bucket.read("metrics.jsonl").splitlines()]
    assert steps == list(range(len(steps)))  # the first wrote nothing into the second's


@pytest.mark.slow
@gs_only
def test_bad_places_are_one_line(site):
    site.run()
    assert "holds a run with another configuration" in site.run("--config.seed=9", status=1)
    elsewhere = site.bucket.url[:-4]
    assert "is not empty and holds no run" in site.run(workdir=elsewhere, status=1)
    assert "does the bucket gs://absent exist?" in site.run(workdir="gs://absent/x", status=1)
    assert "az:// is not known" in site.run(workdir="az://b/x", status=1)


def _wait_for(condition, seconds=300):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.2)


@pytest.mark.slow
@gs_only
def test_a_fork_begins_from_a_bucket_and_in_one(site):
    site.run(workdir=site.folder / "straight")
    site.run()
    for parent, child in (
        (site.folder / "straight", f"{site.bucket.url[:-4]}/child"),
        (site.bucket.url, str(site.folder / "child")),
    ):
        text = site.run("--config.num_steps=13", f"--fork={parent}", workdir=child)
        assert f"fork      : of {parent} at step 12" in text
    far = Bucket(f"{site.bucket.url[:-4]}/child")
    far.download("metrics.jsonl", site.folder / "far.jsonl")
    rows = [
        [
            {k: v for k, v in row.items() if not k.startswith(("timing_s/", "perf/"))}
            for row in read_metrics(path)
        ]
        for path in (site.folder / "far.jsonl", site.folder / "child" / "metrics.jsonl")
    ]
    assert repr(rows[0]) == repr(rows[1])  # NaN is not itself
    assert [row["step"] for row in rows[0]][-1] == 13
