"""Two real processes on this host: the numbers of one, deaths named, and a run that goes on."""

import contextlib
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from luspo_jax.metrics import read_metrics
from tests.test_train import (
    _assert_same_results,
    _results,
    assert_near_results,
    without_sampler_counts,
)

ROOT = pathlib.Path(__file__).resolve().parents[1]
SETTINGS = (
    "--config=configs/quickstart.py",
    "--config.num_steps=4",
    "--config.rollout.prompts_per_step=7",  # shares of 3 and 4
    "--config.rollout.group_size=8",
    "--config.rollout.num_slots=16",
    "--config.train.num_minibatches=1",
    "--config.train.num_epochs=2",
    "--config.eval.every=2",
    "--config.eval.num_problems=15",
    "--config.eval.num_samples=2",
    "--config.eval.num_slots=8",
    "--config.output.checkpoint_every=1",
    "--config.output.tensorboard=False",
    "--config.shaping.dynamic_sampling=True",
    "--config.objective.kl_coef=0.01",
)
SEEING = ("--config=configs/quickstart_vl.py", *SETTINGS[1:])
DEAD_AFTER = 8

# Runs the launcher, and does to its own process what the variable FAULT says: no part of the
# product knows of it. FAULT is process:phase:step:what.
DRIVER = """
import contextlib, os, signal, sys, time
from luspo_jax.hosts import guard
from experiments import cluster, train

index, at, step, what = os.environ.get("FAULT", "-:-:-:-").split(":")
here, real = f"--process_id={index}" in sys.argv and guard.guarded(), guard.phase

@contextlib.contextmanager
def phase(name):
    with real(name):
        if here and name == at and guard._here["step"] == int(step):
            time.sleep(3.0)  # until all have read the phase
            if what == "hang":
                time.sleep(600)
            if what == "error":
                raise RuntimeError("the data of this host is bad")
            if what == "host":  # both at once, as when the power fails
                os.kill(os.getppid(), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)
        yield

guard.phase = phase
if os.environ.get("VISIBLE_AFTER"):
    from luspo_jax.hosts import processes
    processes._VISIBLE_AFTER_S = float(os.environ["VISIBLE_AFTER"])
if os.environ.get("OTHER_SOURCE") and here:
    from luspo_jax.hosts import processes
    real_hashes = processes.source_hashes
    processes.source_hashes = lambda *f: real_hashes(*f) | {"source luspo_jax/train.py": "0"}
sys.exit(cluster.call(train.main, required=("config", "workdir")))
"""


class Pair:
    """Two processes of one run, or `count`, started together."""

    def __init__(
        self,
        folder,
        workdir,
        *extra,
        flags=((), (), ()),
        fault="",
        settings=SETTINGS,
        count=2,
        **environment,
    ):
        self.folder = folder
        driver = folder / "driver.py"
        driver.write_text(DRIVER)
        environment = {
            **{k: v for k, v in os.environ.items() if k != "XLA_FLAGS"},
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
            "PYTHONPATH": str(ROOT),
            "FAULT": fault or "-:-:-:-",
            **environment,
        }
        port = _free_port()
        self.processes, self.ended = [], {}
        for index in range(count):
            command = [
                sys.executable,
                str(driver),
                *settings,
                f"--config.hosts.dead_after_s={DEAD_AFTER}",
                f"--workdir={workdir}",
                f"--coordinator=127.0.0.1:{port}",
                f"--num_processes={count}",
                f"--process_id={index}",
                *extra,
                *flags[index],
            ]
            with self.log(index).open("w") as log:
                self.processes.append(
                    subprocess.Popen(
                        command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT
                    )
                )

    def log(self, index):
        return self.folder / f"process_{index}.log"

    def wait(self, seconds=400):
        """(exit statuses, what both said, seconds between the two ends)."""
        until = time.monotonic() + seconds
        count = len(self.processes)
        while len(self.ended) < count and time.monotonic() < until:
            for index, process in enumerate(self.processes):
                if index not in self.ended and process.poll() is not None:
                    self.ended[index] = time.monotonic()
            time.sleep(0.05)
        said = [self.log(index).read_text() for index in range(count)]
        for process in self.processes:
            process.kill()
        assert len(self.ended) == count, f"still running after {seconds} s:\n" + "\n".join(said)
        apart = max(self.ended.values()) - min(self.ended.values())
        return [process.returncode for process in self.processes], said, apart


def _free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def single(folder, workdir, settings=SETTINGS, **variables):
    """The run in one process, to its end."""
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | variables
    environment |= {"JAX_COMPILATION_CACHE_DIR": str(folder / "cache"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "experiments.train", *settings, f"--workdir={workdir}"]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pair")


@pytest.fixture(scope="module")
def undisturbed(folder):
    codes, said, _ = Pair(folder, folder / "undisturbed").wait()
    assert codes == [0, 0], "\n".join(said)
    return folder / "undisturbed", said


@pytest.mark.slow
def test_two_processes_are_one_run(folder, undisturbed):
    workdir, said = undisturbed
    single(folder, folder / "single")
    assert_near_results(
        without_sampler_counts(_results(workdir)),
        without_sampler_counts(_results(folder / "single")),
    )
    posts = [json.loads((workdir / "processes" / f"{i}.json").read_text()) for i in range(2)]
    assert [post["status"] for post in posts] == ["done", "done"]
    assert "process 0 of 2" in said[0]
    assert "process 1 of 2" in said[1]
    assert "step 1/4" in said[0]
    assert "step 1/4" not in said[1]


@pytest.mark.slow
def test_two_processes_with_images_are_one_run(folder):
    codes, said, _ = Pair(folder, folder / "seeing", settings=SEEING).wait()
    assert codes == [0, 0], "\n".join(said)
    single(folder, folder / "seeing_single", SEEING)
    assert_near_results(
        without_sampler_counts(_results(folder / "seeing")),
        without_sampler_counts(_results(folder / "seeing_single")),
    )


FAULTS = (
    "1:rollout:2:worker",
    "1:rollout:2:host",
    "1:reward:2:host",
    "1:update_actor:2:host",
    "1:checkpoint:2:host",
    "1:testing:2:host",
    "1:reward:2:error",
    "0:rollout:2:worker",
    "0:update_actor:2:host",
    "0:checkpoint:2:host",
)


@pytest.mark.slow
def test_deaths_are_named_and_the_run_goes_on(folder, undisturbed):
    workdir = folder / "disturbed"
    seconds = {}
    for fault in FAULTS:
        victim, phase, step, what = fault.split(":")
        codes, said, seconds[fault] = Pair(folder, workdir, fault=fault).wait()
        print(fault, "ended", f"{seconds[fault]:.1f} s apart")
        assert all(codes), (fault, codes, *said)
        named = rf"process {victim} \(host .*, pid \d+\) .*phase {phase} of step {step}"
        survivor = said[1 - int(victim)]
        found = re.search(named + ".*", survivor)
        assert found, (fault, survivor[-4000:])
        assert "continues from checkpoint step 1" in found[0]
        if what == "error":
            assert "the data of this host is bad" in found[0]
        assert seconds[fault] < 60
    codes, said, _ = Pair(folder, workdir).wait()
    assert codes == [0, 0], "\n".join(said)
    rows = list(read_metrics(workdir / "metrics.jsonl"))
    assert [row["step"] for row in rows] == list(range(5))
    _assert_same_results(_results(workdir), _results(undisturbed[0]))


@pytest.mark.slow
def test_a_phase_that_hangs_ends_the_run(folder):
    limits = ("--config.hosts.phase_timeout_s=40",)
    codes, said, apart = Pair(folder, folder / "hung", *limits, fault="1:reward:1:hang").wait()
    assert all(codes)
    assert apart < 20
    for text in said:
        assert re.search(r"process 1 \(.*\) hangs in phase reward of step 1: .*starts over", text)


@pytest.mark.slow
def test_processes_that_are_asked_to_end_save_together_and_go_on(folder, undisturbed):
    """One of them is asked, in the middle of a step; nothing else writes checkpoints."""
    never = ("--config.output.checkpoint_every=0",)
    workdir = folder / "asked"
    pair = Pair(folder, workdir, *never)
    until = time.monotonic() + 300
    metrics = workdir / "metrics.jsonl"
    while time.monotonic() < until and (
        not metrics.exists() or '"training/global_step": 1' not in metrics.read_text()
    ):
        time.sleep(0.1)
    pair.processes[1].send_signal(signal.SIGTERM)
    codes, said, _ = pair.wait()
    assert codes == [143, 143], "\n".join(said)
    assert "is saved, and the same command goes on" in said[0]
    posts = [json.loads((workdir / "processes" / f"{i}.json").read_text()) for i in range(2)]
    assert [post["status"] for post in posts] == ["preempted", "preempted"]
    codes, said, _ = Pair(folder, workdir, *never).wait()
    assert codes == [0, 0], "\n".join(said)
    _assert_same_results(_results(workdir), _results(undisturbed[0]))


@pytest.mark.slow
def test_processes_that_differ_are_refused(folder):
    flags = ((), ("--config.train.learning_rate=1e-3",))
    codes, said, _ = Pair(folder, folder / "differ", flags=flags).wait()
    assert all(codes)
    expected = "process 1: --config.train.learning_rate is 0.001, and 0.0002 on process 0"
    assert all(expected in text for text in said), "\n".join(said)
    fault = {"fault": "1:-:-:-", "OTHER_SOURCE": "1"}
    codes, said, _ = Pair(folder, folder / "differ", **fault).wait()
    assert all(codes)
    assert all("process 1: source luspo_jax/train.py is '0', and" in text for text in said), said


@pytest.mark.slow
def test_workdir_that_is_not_shared_is_refused(folder):
    flags = ((f"--workdir={folder}/here",), (f"--workdir={folder}/there",))
    codes, said, _ = Pair(folder, "-", flags=flags, VISIBLE_AFTER="2").wait()
    assert all(codes)
    assert all("must be on storage that all processes share" in text for text in said), said


# Three processes without any folder in common, as where the workdir is in a bucket. The variable
# FAULT is process:what.
APART = """
import os, signal, sys, time
from luspo_jax.hosts import guard

index, port, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
victim, what = os.environ["FAULT"].split(":")

def end(number, both):
    if both:
        os.kill(os.getppid(), number)
    os.kill(os.getpid(), number)

def main():
    from luspo_jax.hosts import processes
    arguments = {
        "coordinator_address": f"127.0.0.1:{port}", "num_processes": 3, "process_id": index,
    }
    processes.start(
        arguments, f"{folder}/own_{index}", dead_after_s=8.0, phase_timeout_s=0.0, shared=False,
        checkpoints="gs://bucket/run/checkpoints",
    )
    guard.at_step(3)
    with guard.phase("reward"):
        time.sleep(3.0)  # until all have read the phase
        if str(index) == victim:
            if what == "error":
                raise RuntimeError("the data of this host is bad")
            end(signal.SIGSTOP if what == "frozen" else signal.SIGKILL, both=what != "worker")
    assert processes.gather(index) == [0, 1, 2]
    processes.stop()
    return 0

if guard.guarded():
    guard.work(main)
sys.exit(guard.watch([sys.executable, *sys.orig_argv[1:]]))
"""


class _Apart:
    """The three processes, and their descendants for the end of a test."""

    def __init__(self, folder, fault):
        (folder / "apart.py").write_text(APART)
        environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(ROOT),
            "FAULT": fault,
        }
        port = str(_free_port())
        self.processes = [
            subprocess.Popen(
                [sys.executable, str(folder / "apart.py"), str(index), port, str(folder)],
                env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                start_new_session=True,
            )
            for index in range(3)
        ]  # fmt: skip

    def said(self, index):
        """(exit status, last words)"""
        text = self.processes[index].communicate(timeout=120)[1]
        return self.processes[index].returncode, text

    def end(self):
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


@pytest.mark.slow
def test_processes_without_a_common_folder_end_together(tmp_path):
    apart = _Apart(tmp_path, "-:-")
    try:
        ends = [apart.said(index) for index in range(3)]
    finally:
        apart.end()
    assert [code for code, _ in ends] == [0, 0, 0], ends
    posts = [
        json.loads((tmp_path / "own_0" / "processes" / f"{index}.json").read_text())
        for index in range(3)
    ]
    assert [(post["process"], post["status"], post["step"]) for post in posts] == [
        (0, "done", 3), (1, "done", 3), (2, "done", 3),
    ]  # fmt: skip
    assert not (tmp_path / "own_1").exists()
    assert not (tmp_path / "own_2").exists()


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("what", ["worker", "host", "frozen", "error"])
def test_survivors_without_a_common_folder_name_the_one_that_ended(tmp_path, victim, what):
    """Both of them: when process 0 is gone they do not take each other for it."""
    apart = _Apart(tmp_path, f"{victim}:{what}")
    try:
        ends = [apart.said(index) for index in range(3) if index != victim]
    finally:
        apart.end()
    for code, said in ends:
        found = re.search(
            rf"process {victim} \(host .*, pid \d+\) .*phase reward of step 3.*", said
        )
        assert code == 1, said
        assert found, said[-3000:]
        assert "continues from its last checkpoint, if it has one" in found[0]
        expected = {"worker": "killed by SIGKILL", "error": "the data of this host is bad"}
        assert expected.get(what, "is dead: no sign of life for") in found[0]
        others = {0, 1, 2} - {victim}
        assert not any(f"process {other} (host" in said for other in others)
