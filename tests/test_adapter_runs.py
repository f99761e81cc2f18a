"""Whole runs with a low-rank adapter: what is trained, resume, reference, mesh."""

import contextlib
import json
import math

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from experiments.evaluation import policy
from luspo_jax import train
from luspo_jax.hosts.roles import Roles
from luspo_jax.hosts.values import ConfigError
from luspo_jax.learner import programs
from luspo_jax.learner.state import parked
from luspo_jax.metrics import read_metrics
from luspo_jax.models import adapter_files, low_rank
from luspo_jax.models.safetensors_folder import WeightsError
from luspo_jax.run import adapters, beginning
from luspo_jax.run import workdir as workdirs
from luspo_jax.run.build import build, facts
from luspo_jax.run.checkpoint import Checkpointer
from luspo_jax.run.export import export_policy
from luspo_jax.run.workdir import WorkdirError
from tests import test_train
from tests.test_train import (
    _assert_same_results,
    _results,
    _train,
    assert_near_results,
    without_sampler_counts,
)

model_folder = test_train.model_folder


@pytest.fixture
def config(model_folder):
    config = test_train.config.__wrapped__(model_folder)
    config.lora.rank = 4
    config.lora.alpha = 8.0
    config.lora.base = "float32"
    config.objective.kl_coef = 0.1
    config.train.learning_rate = 1e-2
    return config


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Folder for the uninterrupted run, made by the first test that needs it."""
    return tmp_path_factory.mktemp("straight") / "run"


@pytest.fixture
def finished(straight, config):
    if not straight.exists():
        _train(config, straight)
    return straight


def test_it_trains_the_adapter_alone_and_exports_the_merged_policy(finished, config):
    metrics, _, weights = _results(finished)
    base = load_file(f"{config.model.path}/model.safetensors")
    changed = {name for name in base if np.any(weights[name] != base[name])}
    assert changed == {name for name in base if "_proj." in name}
    for name in changed:
        assert np.linalg.matrix_rank(weights[name] - base[name], tol=1e-6) <= 4
    assert metrics[4]["actor/kl_loss"] > 1e-6  # away from the base
    assert metrics[1]["rollout_corr/kl"] < 1e-6
    stored = json.loads((finished / "run.json").read_text())
    assert stored["adapter_parameters"] == 4 * 2 * (
        2 * (16 + 16) + 2 * (16 + 8) + 3 * (16 + 24)
    )  # fmt: skip


def test_a_checkpoint_holds_the_adapter_alone(finished):
    count = json.loads((finished / "run.json").read_text())["adapter_parameters"]
    with contextlib.closing(Checkpointer(finished / "checkpoints", read_only=True)) as kept:
        stored = kept._manager.item_metadata(4)["state"].tree
    sizes = [math.prod(x.shape) for x in jax.tree.leaves(stored)]
    # A and B and two moments of each, and counters; the reference is the adapter switched off.
    assert sum(size for size in sizes if size > 1) == 3 * count


def test_interrupted_run_goes_on_bit_for_bit(finished, config, tmp_path, monkeypatch):
    real, calls = programs.update_step, []

    def crash(*args, **kwargs):
        calls.append(1)
        if len(calls) == 6:  # the second update of the third step
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(programs, "update_step", crash)
    with pytest.raises(KeyboardInterrupt):
        _train(config, tmp_path / "run")
    monkeypatch.setattr(programs, "update_step", real)
    _train(config, tmp_path / "run")
    _assert_same_results(_results(tmp_path / "run"), _results(finished))


def test_other_frozen_weights_are_refused(finished, config, monkeypatch):
    run = build(config)
    known = facts(run)
    with pytest.raises(WorkdirError, match="base_sha256"):
        workdirs.Workdir(finished, config, known | {"base_sha256": "0"})


def test_a_run_on_a_mesh_is_that_of_one_device(finished, config, tmp_path):
    config.mesh.data, config.mesh.tensor = 2, 1
    config.rollout_mesh.context = 2
    run = build(config, jax.devices())
    workdir = workdirs.Workdir(tmp_path / "run", config, facts(run))
    train.train(run, workdir)
    workdir.close()
    got, expected = _results(tmp_path / "run"), _results(finished)
    assert_near_results(without_sampler_counts(got), without_sampler_counts(expected), 1e-4)


def test_principal_parts_and_a_refreshed_reference_take_steps(config, tmp_path):
    config.lora.init = "pissa"
    config.lora.rslora = True
    config.train.ref_every = 1
    config.train.num_minibatches = 1
    config.num_steps = 2
    _train(config, tmp_path / "run")
    rows = list(read_metrics(tmp_path / "run" / "metrics.jsonl"))
    assert abs(rows[2]["actor/kl_loss"]) < 1e-9  # the reference is the policy that begins the step
    assert rows[1]["actor/grad_norm"] > 0


def test_the_adapter_is_written_in_pefts_format_and_begun_from(finished, config, tmp_path):
    run = build(config)
    made = run.rule.logprobs.how.adapter
    stored = adapter_files.read(finished / "adapter", run.model.config, made)
    config.lora.start = str(finished / "adapter")
    again = build(config)
    jax.tree.map(np.testing.assert_array_equal, again.initial_params(), stored)
    assert again.rule.copies_reference  # it begins there, not at the model's own policy
    assert facts(again)["start_sha256"] != facts(again)["base_sha256"]
    config.lora.targets = "q_proj"
    with pytest.raises(WeightsError, match="is not of this model and lora"):
        build(config).initial_params()


@pytest.mark.parametrize(
    "sizes",
    [
        None,
        ({"data": 8}, {"data": 8}),
        ({"fsdp": 8}, {"data": 8}),
        ({"data": 2, "fsdp": 2, "context": 2}, {"data": 2, "context": 4}),
    ],
    ids=["one device", "data", "fsdp", "context"],
)
def test_a_sampler_reads_the_adapter_apart(finished, config, tmp_path, sizes):
    """The same run up to rounding: tokens are drawn by log-probs that differ in the last bits."""
    config.rollout.lora = "apart"
    config.num_steps = 1
    if sizes is not None:
        for section, mesh in zip(("mesh", "rollout_mesh"), sizes, strict=True):
            config[section].update({"data": 1} | ({"fsdp": 1} if section == "mesh" else {}) | mesh)
    run = build(config, None if sizes is None else jax.devices())
    state = beginning.begin_state(run)
    weights = run.rollout_params(run.policy(state))
    if sizes is None:
        assert weights["embedding"] is state.base["embedding"]
    assert low_rank.is_composed(weights)
    with workdirs.Workdir(tmp_path / "run", config, facts(run)) as workdir:
        train.train(run, workdir)
    got, expected = (
        list(read_metrics(folder / "metrics.jsonl"))[1] for folder in (tmp_path / "run", finished)
    )
    for name in ("reward", "response_length/mean", "actor/grad_norm"):
        assert got[name] == pytest.approx(expected[name], rel=1e-4)
    assert got["rollout_corr/kl"] < 1e-6
    assert got["rollout_corr/max_abs_diff"] <= 1e-5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lora__rank": 0}, "rollout.lora=apart is of an adapter"),
        ({"model__rollout_dtype": "int8"}, "reads the weights as lora.base stores them"),
    ],
)
def test_an_adapter_that_cannot_be_apart_is_refused(config, fields, message):
    config.rollout.lora = "apart"
    for name, value in fields.items():
        section, field = name.split("__")
        config[section][field] = value
    with pytest.raises(ConfigError) as error:
        build(config)
    assert message in str(error.value)


def test_an_adapter_is_not_apart_in_processes_that_only_sample(config):
    config.rollout.lora = "apart"
    run = build(config)
    with pytest.raises(ConfigError, match="where processes sample that do not train"):
        adapters.check_rollout(run.settings, run.rule.logprobs.how.adapter, Roles((0,), (1,)))


@pytest.mark.parametrize("base", ["nf4", pytest.param("int8", marks=pytest.mark.slow)])
def test_frozen_weights_of_few_bits_take_steps_and_are_not_merged_unasked(config, tmp_path, base):
    config.lora.base = base
    config.num_steps = 2
    config.length.every = 1
    config.length.share = 0.5
    config.model.rollout_dtype = "bfloat16"
    config.rollout.mismatch_limit = 1.0
    config.train.packing = True
    config.train.microbatch_tokens = 96
    outcome = _train(config, tmp_path / "run")
    assert outcome.export is None
    assert not (tmp_path / "run" / "export").exists()
    rows = list(read_metrics(tmp_path / "run" / "metrics.jsonl"))
    assert 0 < rows[1]["rollout_corr/kl"] < 0.1  # the sampler's weights are rounded once more
    assert np.isfinite(rows[1]["length/pressure/own"])
    tensors = load_file(tmp_path / "run" / "adapter" / adapter_files.WEIGHTS)
    assert all(np.any(x) for x in tensors.values())  # B left zero everywhere
    stored = policy.stored_policy(tmp_path / "run", "latest")
    with pytest.raises(ConfigError, match="say into which type"):
        export_policy(stored.config, stored.model, stored.params, tmp_path / "merged")
    export_policy(stored.config, stored.model, stored.params, tmp_path / "merged", dtype="bfloat16")
    assert (tmp_path / "merged" / "model.safetensors").is_file()


def test_parts_that_wait_on_the_host_change_nothing(config, tmp_path):
    """Moments and the reference, a copy of the adapter here; and what a layer kept of itself."""
    config.train.ref_every = 1
    config.num_steps = 2
    _train(config, tmp_path / "run")
    config.train.offload, config.model.remat = "both", "offload"
    run = build(config)
    state = parked(beginning.begin_state(run), "both")
    kinds = {"params": "device", "base": "device", "opt_state": "pinned_host",
             "ref_params": "pinned_host"}  # fmt: skip
    for name, kind in kinds.items():
        found = {x.sharding.memory_kind for x in jax.tree.leaves(getattr(state, name))}
        assert found == {kind}, name
    _train(config, tmp_path / "parked")
    assert_near_results(_results(tmp_path / "parked"), _results(tmp_path / "run"), 1e-4)


def test_an_averaged_reference_is_refused(config):
    config.train.ref_every, config.train.ref_decay = 1, 0.9
    with pytest.raises(ConfigError, match="is no average of policies"):
        build(config)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"targets": "q_prj"}, "lora.targets: no linear layer 'q_prj'; did you mean 'q_proj'"),
        ({"targets": " "}, "lora.targets is empty"),
        ({"rank": 9}, "lora.rank=9 exceeds the 8 of the smaller side of layers/attention/key"),
        ({"start": "adapter", "init": "pissa"}, "lora.start begins from an adapter"),
        ({"dropout": 0.1}, "lora.dropout"),
        ({"init": "orthogonal"}, "lora.init"),
        ({"experts": True}, "lora.experts is set, and the model"),
        ({"vision": True}, "lora.vision is set, and the model"),
    ],
)
def test_adapters_that_cannot_be_are_refused(config, fields, message):
    for name, value in fields.items():
        config.lora[name] = value
    with pytest.raises(ConfigError) as error:
        build(config)
    assert message in str(error.value)
