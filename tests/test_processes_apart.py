"""Processes that only sample beside processes that only train: the numbers of one process."""

import json
import re

import pytest

from luspo_jax.metrics import read_metrics
from tests.test_train import (
    _assert_same_results,
    _results,
    assert_near_results,
    without_sampler_counts,
)
from tests.test_two_processes import Pair, single

SETTINGS = (
    "--config=configs/quickstart.py",
    "--config.num_steps=4",
    "--config.rollout.prompts_per_step=6",
    "--config.rollout.group_size=4",
    "--config.rollout.num_slots=16",
    "--config.rollout.max_age=2",
    "--config.rollout.overlap=3",  # groups in flight and an account of lengths are handed on
    "--config.rollout.chunk_length=4",
    "--config.train.num_minibatches=1",
    "--config.eval.every=2",
    "--config.eval.num_problems=7",
    "--config.eval.num_samples=2",
    "--config.eval.num_slots=8",
    "--config.output.checkpoint_every=1",
    "--config.output.tensorboard=False",
    "--config.shaping.dynamic_sampling=True",
    "--config.objective.kl_coef=0.01",
    "--config.objective.correction=tis",
    "--config.rollout_mesh.apart=1",
)


def _devices(number):
    return {"XLA_FLAGS": f"--xla_force_host_platform_device_count={number}"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("apart")


@pytest.fixture(scope="module")
def undisturbed(folder):
    codes, said, _ = Pair(folder, folder / "undisturbed", settings=SETTINGS).wait()
    assert codes == [0, 0], "\n".join(said)
    return folder / "undisturbed"


@pytest.mark.slow
def test_a_process_that_trains_and_one_that_samples_are_one_run(folder, undisturbed):
    single(folder, folder / "single", SETTINGS, **_devices(2))
    _assert_same_results(_results(undisturbed), _results(folder / "single"))
    rows = list(read_metrics(undisturbed / "metrics.jsonl"))[1:]
    assert all("timing_s/wait" in row for row in rows[:-1])
    assert all(row["rollout/in_flight/groups"] == 3 for row in rows)
    posts = [json.loads((undisturbed / "processes" / f"{i}.json").read_text()) for i in range(2)]
    assert [post["status"] for post in posts] == ["done", "done"]


def _near(folder, workdir, whole, *more, **processes):
    run = Pair(folder, workdir, *more, settings=SETTINGS, **processes)
    codes, said, _ = run.wait()
    assert not any(codes), "\n".join(said)
    assert_near_results(
        without_sampler_counts(_results(workdir)), without_sampler_counts(_results(whole))
    )


@pytest.mark.slow
def test_two_processes_that_train_and_one_that_samples_are_one_run(folder, undisturbed):
    _near(folder, folder / "two_train", undisturbed, count=3)


@pytest.mark.slow
def test_two_that_sample_and_two_devices_a_role_are_one_run(folder):
    """Every response is whole here: where a round ends depends on how many are decoded at once."""
    whole = "--config.rollout.overlap=0"
    single(folder, folder / "whole", (*SETTINGS, whole), **_devices(2))
    for name, count, devices in (("two_sample", 3, 1), ("two_devices", 2, 2)):
        flags = whole, "--config.rollout_mesh.apart=2"
        _near(folder, folder / name, folder / "whole", *flags, count=count, **_devices(devices))


@pytest.mark.slow
def test_the_death_of_either_role_is_named_and_the_run_goes_on(folder, undisturbed):
    workdir = folder / "disturbed"
    for fault in ("1:rollout:3:worker", "0:update_actor:3:host", "0:checkpoint:3:host"):
        victim, phase, step, _ = fault.split(":")
        codes, said, _ = Pair(folder, workdir, settings=SETTINGS, fault=fault).wait()
        assert all(codes), (fault, codes, *said)
        named = rf"process {victim} \(host .*, pid \d+\) .*phase {phase} of step {step}.*"
        found = re.search(named, said[1 - int(victim)])
        assert found, (fault, said[1 - int(victim)][-4000:])
        assert "continues from checkpoint step 2" in found[0]
    codes, said, _ = Pair(folder, workdir, settings=SETTINGS).wait()
    assert codes == [0, 0], "\n".join(said)
    _assert_same_results(_results(workdir), _results(undisturbed))
