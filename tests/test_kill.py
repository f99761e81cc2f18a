"""A run killed with SIGKILL at arbitrary moments and started again equals the uninterrupted run."""

import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest

from luspo_jax.metrics import read_metrics
from tests.test_train import _assert_same_results, _results

ROOT = pathlib.Path(__file__).resolve().parents[1]
SETTINGS = (
    "--config=configs/quickstart.py",
    "--config.num_steps=10",
    "--config.rollout.prompts_per_step=8",
    "--config.eval.every=5",
    "--config.eval.num_problems=16",
    "--config.eval.num_samples=2",
    "--config.eval.num_slots=16",
    "--config.output.checkpoint_every=2",
    "--config.shaping.dynamic_sampling=True",
    "--config.objective.kl_coef=0.01",
)
# Measures every step and moves α by it: what a kill must not lose beside the policy.
STEERED = (
    "--config.objective.length_scale=adaptive",
    "--config.objective.reference_length=14.0",
    "--config.length.every=1",
    "--config.length.steer=pressure",
    "--config.length.alpha_rate=0.2",
)
# Prompts stand once in dense rows; the first of two minibatches has no pass of the old policy.
DENSE = (
    *STEERED,
    "--config.train.packing=True",
    "--config.train.pack_length=256",
    "--config.train.microbatch_tokens=256",
    "--config.train.num_minibatches=2",
)
# Images of groups that are carried over come back from their files, or are drawn again.
SEEING = ("--config=configs/quickstart_vl.py",)
# Responses go on from step to step.
PARTIAL = (
    "--config.rollout.overlap=8",
    "--config.rollout.max_age=2",
    "--config.rollout.chunk_length=4",
)
# A device samples the next step's responses while the other trains.
AHEAD = (*PARTIAL, "--config.rollout_mesh.apart=1")


def _start(workdir, log, extra):
    # As a user's process: one device, no test flags.
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    if extra == AHEAD:
        environment["JAX_NUM_CPU_DEVICES"] = "2"
    settings = (*SEEING, *SETTINGS[1:]) if extra == SEEING else (*SETTINGS, *extra)
    flags = (*settings, f"--workdir={workdir}")
    command = [sys.executable, "-m", "experiments.train", *flags]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seed", "extra"),
    [(0, ()), (1, ()), (2, STEERED), (3, SEEING), (4, PARTIAL), (5, AHEAD), (6, DENSE)],
    ids=["0", "1", "steered", "seeing", "partial", "ahead", "dense"],
)
def test_killed_and_continued_run_is_the_same_run(tmp_path, seed, extra):
    with (tmp_path / "log").open("w") as log:
        started = time.monotonic()
        assert _start(tmp_path / "straight", log, extra).wait(600) == 0, (
            tmp_path / "log"
        ).read_text()
        whole = time.monotonic() - started
        rng = random.Random(seed)
        kills = 0
        for attempt in range(40):
            process = _start(tmp_path / "killed", log, extra)
            try:
                # Later and later, so that it gets somewhere whatever start-up costs. The first run
                # compiled, so it took longer than these.
                process.wait(whole * rng.uniform(0.1, 0.6) * (1 + 0.1 * attempt))
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
                kills += 1
                continue
            assert process.returncode == 0, (tmp_path / "log").read_text()[-3000:]
            break
        else:
            pytest.fail("the run never finished")
    assert kills >= 1
    rows = list(read_metrics(tmp_path / "killed" / "metrics.jsonl"))
    assert [row["step"] for row in rows] == list(range(11))
    if extra == DENSE:
        assert all(row["packing/shared"] > 0.05 for row in rows[1:])
    if extra in (STEERED, DENSE):
        assert len({row["length/scale_alpha"] for row in rows[1:]}) > 2
    if extra in (PARTIAL, AHEAD):
        assert max(row["rollout/age/max"] for row in rows[1:]) > 0
        assert sum(row["rollout/continued_tokens"] for row in rows[1:]) > 0
    _assert_same_results(_results(tmp_path / "killed"), _results(tmp_path / "straight"))


@pytest.mark.slow
def test_a_run_that_is_asked_to_end_ends_soon_and_goes_on(tmp_path):
    """By SIGTERM, as schedulers do it, without any other checkpoint."""
    never = ("--config.output.checkpoint_every=0",)
    with (tmp_path / "log").open("w") as log:
        assert _start(tmp_path / "straight", log, never).wait(600) == 0
        process = _start(tmp_path / "asked", log, never)
        metrics, until = tmp_path / "asked" / "metrics.jsonl", time.monotonic() + 300
        while time.monotonic() < until and (
            not metrics.exists() or len(metrics.read_text().splitlines()) < 4
        ):
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        asked = time.monotonic()
        assert process.wait(60) == 143
        assert time.monotonic() - asked < 25  # the least that schedulers grant is 25 to 30 s
        assert _start(tmp_path / "asked", log, never).wait(600) == 0
    assert "is saved, and the same command goes on" in (tmp_path / "log").read_text()
    _assert_same_results(_results(tmp_path / "asked"), _results(tmp_path / "straight"))
