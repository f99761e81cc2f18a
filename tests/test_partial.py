"""Runs whose responses take several steps, or are sampled one step ahead: exact resume, ages."""

import itertools
import json
import os
import signal
import threading
import types

import jax
import pytest

from luspo_jax import train
from luspo_jax.experience import ahead, rounds
from luspo_jax.hosts.guard import Preempted
from luspo_jax.hosts.values import ConfigError
from luspo_jax.metrics import read_metrics
from luspo_jax.run import checks, fields
from luspo_jax.run.build import roles
from luspo_jax.run.checkpoint import Checkpointer
from luspo_jax.sharding import MeshError
from tests import test_train
from tests.test_train import _assert_same_results, _results, _train, model_folder  # noqa: F401

config = test_train.config


@pytest.fixture
def partial(config):
    """Steps of three groups with six in flight; few slots and short chunks, so that some wait."""
    config.num_steps = 5
    config.rollout.prompts_per_step = 3
    config.rollout.overlap, config.rollout.max_age = 3, 2
    config.rollout.chunk_length, config.rollout.num_slots = 2, 8
    config.train.num_minibatches = 1
    config.eval.every = 0
    config.output.checkpoint_every = 1
    return config


def _rows(folder):
    return list(read_metrics(folder / "metrics.jsonl"))[1:]


def _cut_at(monkeypatch, config, folder, step):
    """A run that ends in the middle of a step, continued."""
    real = train.optimize

    def crash(programs, state, batches, **kwargs):
        if crash.left == 0:
            raise KeyboardInterrupt
        crash.left -= 1
        return real(programs, state, batches, **kwargs)

    crash.left = step
    monkeypatch.setattr(train, "optimize", crash)
    with pytest.raises(KeyboardInterrupt):
        _train(config, folder)
    monkeypatch.setattr(train, "optimize", real)
    _train(config, folder)


def test_a_partial_run_resumes_bit_for_bit(partial, tmp_path, monkeypatch):
    _train(partial, tmp_path / "straight")
    rows = _rows(tmp_path / "straight")
    assert max(row["rollout/age/max"] for row in rows) in (1, 2)
    assert all(row["rollout/in_flight/groups"] == 3 for row in rows)
    assert sum(row["rollout/continued_tokens"] for row in rows) > 0
    assert sum(row["length/account/finished/count"] for row in rows) >= 5 * 12
    assert all(row["shaping/trained_responses"] == 12 for row in rows)
    _cut_at(monkeypatch, partial, tmp_path / "cut", 3)
    _assert_same_results(_results(tmp_path / "cut"), _results(tmp_path / "straight"))


def test_a_run_with_rewards_of_groups_resumes_bit_for_bit(partial, tmp_path, monkeypatch):
    """With a dual variable, the shortest groups first, and outliers cut."""
    partial.rollout.order = "shortest"
    partial.shaping.dot, partial.shaping.dot_deviations, partial.shaping.dot_margin = True, 0.5, 1
    group = {"reward.group.leash": 1.0, "reward.group.kimi": 0.5}
    options = {"reward.group_options.leash.target": 5, "reward.group_options.leash.rate": 0.1}
    fields.assign(partial, group | options)
    _train(partial, tmp_path / "straight")
    rows = _rows(tmp_path / "straight")
    duals = [row["length/dual/leash"] for row in rows]
    assert duals[0] == 0.2
    assert len({*duals}) == 5
    for row, following in itertools.pairwise(rows):
        excess = row["response_length/mean"] / 5 - 1
        expected = min(1.0, max(0.0, row["length/dual/leash"] + 0.1 * excess))
        assert following["length/dual/leash"] == pytest.approx(expected, abs=1e-6)
    for record in _records(tmp_path / "straight"):
        parts = record["parts"]
        own = sum(value for name, value in parts.items() if name not in ("leash", "kimi"))
        expected = own + parts["leash"] + 0.5 * parts["kimi"]
        assert record["reward"] == pytest.approx(expected, abs=1e-9)
    assert any(row["reward/part/leash"] < 0 for row in rows)
    told = json.loads((tmp_path / "straight" / "run.json").read_text())["scorers"]
    assert told["group/leash"] == "leash@1"
    _cut_at(monkeypatch, partial, tmp_path / "cut", 3)
    _assert_same_results(_results(tmp_path / "cut"), _results(tmp_path / "straight"))


def test_an_older_checkpoint_starts_dual_variables_anew(partial, tmp_path, monkeypatch):
    partial.num_steps = 2
    options = {"reward.group_options.leash.target": 5, "reward.group_options.leash.initial": 0.5}
    fields.assign(partial, {"reward.group.leash": 1.0} | options)
    _train(partial, tmp_path)
    assert _rows(tmp_path)[-1]["length/dual/leash"] > 0.5
    restore = Checkpointer.restore

    def older(*args):
        state, host, waiting = restore(*args)
        assert host.pop("duals").keys() == {"leash"}
        return state, host, waiting

    monkeypatch.setattr(Checkpointer, "restore", older)
    partial.num_steps = 3
    _train(partial, tmp_path)
    assert _rows(tmp_path)[-1]["length/dual/leash"] == 0.5


@pytest.mark.parametrize("where", ["sampling", "training"])
def test_a_run_that_is_asked_to_end_saves_itself_and_goes_on(partial, tmp_path, monkeypatch, where):
    """In the middle of a step, with prompts in flight, and no other checkpoint."""
    _train(partial, tmp_path / "straight")
    partial.output.checkpoint_every = 0
    owner, name = (train, "optimize") if where == "training" else (rounds, "chosen")
    real, calls = getattr(owner, name), []

    def ask(*args, **kwargs):
        calls.append(None)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, ask)
    with pytest.raises(Preempted):
        _train(partial, tmp_path / "asked")
    monkeypatch.setattr(owner, name, real)
    steps = [int(path.name) for path in (tmp_path / "asked" / "checkpoints").iterdir()
             if path.name.isdigit()]  # fmt: skip
    assert steps == [2 if where == "sampling" else 3]
    partial.output.checkpoint_every = 1
    _train(partial, tmp_path / "asked")
    _assert_same_results(_results(tmp_path / "asked"), _results(tmp_path / "straight"))


def test_a_fork_that_samples_otherwise_says_what_it_leaves_behind(partial, tmp_path):
    partial.num_steps = 1
    _train(partial, tmp_path / "parent")
    partial.num_steps, partial.rollout.overlap = 2, 2
    with pytest.warns(UserWarning, match=r"3 groups .* not taken along, .*: rollout\.overlap"):
        test_train._forked(partial, tmp_path / "fork", tmp_path / "parent")


def test_an_overlap_of_0_is_the_run_without(partial, tmp_path):
    """Whatever max_age then is."""
    partial.num_steps, partial.rollout.overlap = 2, 0
    _train(partial, tmp_path / "aged")
    partial.rollout.max_age = 0
    _train(partial, tmp_path / "plain")
    _assert_same_results(_results(tmp_path / "aged"), _results(tmp_path / "plain"))
    assert not any("rollout/age/max" in row for row in _rows(tmp_path / "plain"))


def test_where_a_step_ends_changes_no_token_but_at_ties_if_nothing_is_learned(partial, tmp_path):
    """Prompts that both runs begin in their first step, and that one of them ends later."""
    partial.train.learning_rate, partial.num_steps = 1e-30, 3
    tokens = {}
    for name, prompts, overlap in (("whole", 6, 0), ("partial", 3, 3)):
        partial.rollout.prompts_per_step, partial.rollout.overlap = prompts, overlap
        _train(partial, tmp_path / name)
        tokens[name] = {
            (record["prompt_id"], record["sample_id"]): record["tokens"]
            for record in _records(tmp_path / name)
        }
    first = [key for key in list(tokens["whole"])[:24] if key in tokens["partial"]]
    assert len(first) == 24
    assert sum(tokens["whole"][key] != tokens["partial"][key] for key in first) <= 1


def _records(folder):
    for path in sorted((folder / "rollouts").iterdir()):
        yield from map(json.loads, path.read_text().splitlines())


needs_devices = pytest.mark.skipif(len(jax.devices()) < 4, reason="needs 4 devices")


@needs_devices
@pytest.mark.parametrize(
    ("devices", "apart", "overlap"), [(2, 1, 0), pytest.param(4, 2, 2, marks=pytest.mark.slow)]
)
def test_a_run_one_step_off_resumes_bit_for_bit(
    partial, tmp_path, monkeypatch, devices, apart, overlap
):
    build = test_train.build
    monkeypatch.setattr(
        test_train, "build", lambda config: build(config, devices=jax.devices()[:devices])
    )
    partial.rollout.prompts_per_step, partial.rollout.overlap = 4, overlap
    partial.rollout_mesh.apart = apart
    partial.objective.correction = "tis"
    _train(partial, tmp_path / "straight")
    rows = _rows(tmp_path / "straight")
    assert "timing_s/wait" in rows[0]
    assert "timing_s/wait" not in rows[-1]
    # The first batch is by the policy that it trains, the others by the one before.
    assert "rollout_corr/max_abs_diff" in rows[0]
    _cut_at(monkeypatch, partial, tmp_path / "cut", 3)
    _assert_same_results(_results(tmp_path / "cut"), _results(tmp_path / "straight"))
    _fail_beside(monkeypatch, partial, tmp_path / "failed", 3)
    _assert_same_results(_results(tmp_path / "failed"), _results(tmp_path / "straight"))


def _fail_beside(monkeypatch, config, folder, batch):
    """A run whose sampler fails in its thread while the policy trains, continued."""
    real, asked = ahead.collect, []

    def fail(*args):
        asked.append(threading.current_thread() is threading.main_thread())
        if len(asked) == batch:
            raise OSError("the sampler is gone")
        return real(*args)

    monkeypatch.setattr(ahead, "collect", fail)
    with pytest.raises(OSError, match="the sampler is gone"):
        _train(config, folder)
    assert asked[-1] is False
    monkeypatch.setattr(ahead, "collect", real)
    _train(config, folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"overlap": 2}, r"rollout\.overlap=2 lets .*rollout\.max_age=0 allows none"),
        ({"overlap": 9, "max_age": 2}, r"rollout\.overlap=9 .* at most 8"),
        ({"apart": 1}, r"rollout_mesh\.apart=1 .*rollout\.max_age=0"),
        ({"apart": 1, "overlap": 5, "max_age": 2}, r"rollout\.overlap=5 .* at most 4"),
        ({"late": "never"}, r"rollout\.late"),
    ],
)
def test_what_cannot_keep_its_ages_is_refused_by_name(config, fields, message):
    fields = dict(fields)
    config.rollout_mesh.apart = fields.pop("apart", 0)
    config.rollout.update(fields)
    with pytest.raises(ConfigError, match=message):
        checks.check(config)


def _devices(counts):
    """Devices of several processes, as many as each has, in an order of their own."""
    found = [types.SimpleNamespace(process_index=i) for i, n in enumerate(counts) for _ in range(n)]
    return found[::2] + found[1::2]


@pytest.mark.parametrize(
    ("counts", "apart", "train", "rollout"),
    [
        ((2, 2), 0, (0, 1), (0, 1)),
        ((1, 1), 1, (0,), (1,)),
        ((4, 4, 4), 4, (0, 1), (2,)),
        ((4, 4, 4), 8, (0,), (1, 2)),
        ((8,), 2, (0,), (0,)),
    ],
)
def test_the_last_processes_sample(config, counts, apart, train, rollout):
    config.rollout_mesh.apart = apart
    found = roles(config, _devices(counts))
    assert (found.train, found.rollout) == (train, rollout)
    assert found.split == (len(counts) > 1 and apart > 0)


@pytest.mark.parametrize(
    ("counts", "apart", "message"),
    [
        ((4, 4), 2, r"apart=2: .* multiple of 4, .* at most 4"),
        ((4, 4), 6, r"apart=6: .* multiple of 4, .* at most 4"),
        ((4, 4, 4), 5, r"apart=5: .* multiple of 4, .* at most 8"),
        ((4, 4), 8, r"apart=8 leaves no device to train on: there are 8"),
    ],
)
def test_processes_of_both_roles_are_refused_by_name(config, counts, apart, message):
    config.rollout_mesh.apart = apart
    with pytest.raises(MeshError, match=message):
        roles(config, _devices(counts))


def test_roles_that_leave_no_device_are_refused_by_name(config):
    config.rollout_mesh.apart, config.rollout.max_age = 2, 1
    with pytest.raises(ConfigError, match=r"rollout_mesh\.apart=2 leaves no device"):
        test_train.build(config, devices=jax.devices()[:2])
