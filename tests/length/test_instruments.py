"""Length instruments in the loop: what a step reports, that measuring changes nothing, resume."""

import dataclasses
import types

import jax
import numpy as np
import pytest

from luspo_jax import batches, instruments, train
from luspo_jax.datasets import Example
from luspo_jax.experience import Group, Rollouts
from luspo_jax.length.settings import LengthSettings
from luspo_jax.length.steering import LengthState
from luspo_jax.metrics import StepMetrics, declared, read_metrics
from luspo_jax.objectives import preset
from luspo_jax.prompts import PromptRecord
from luspo_jax.rewards import Reward
from luspo_jax.rollout import Response
from luspo_jax.run import beginning, fields
from luspo_jax.run.build import build
from luspo_jax.run.checkpoint import Checkpointer
from luspo_jax.types import TokenBatch, TrainBatch
from tests import test_train
from tests.test_train import _assert_same_results, _results, _train

# The tiny model and configuration of the loop's own tests.
model_folder, config = test_train.model_folder, test_train.config

MEASURED = ("own", "grpo", "gspo", "luspo")
BINS = range(4)  # three default edges


@pytest.fixture
def steered(config, monkeypatch):
    """A run whose α is steered by pressure, measured in steps 1, 3, … and used in the next."""
    # A restored state is tied to its device and a new one is not: every program of a continued
    # run would be compiled again, which these tests have no time for and test_train.py does.
    begin_state = beginning.begin_state
    monkeypatch.setattr(
        beginning, "begin_state", lambda run: jax.device_put(begin_state(run), jax.devices()[0])
    )
    config.objective.length_scale = "adaptive"
    config.objective.reference_length = 8.0
    config.output.checkpoint_every = 1
    config.length.every = 2
    config.length.share = 0.5
    config.length.steer = "pressure"
    config.length.alpha_low = -2.0
    config.length.alpha_rate = 0.2
    config.length.window = 1
    config.length.growth = 0.0
    return config


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Folder for the uninterrupted run, made by the first test that needs it."""
    return tmp_path_factory.mktemp("straight") / "run"


@pytest.fixture
def finished(straight, steered):
    if not straight.exists():
        _train(steered, straight)
    return straight


def _rows(folder):
    return list(read_metrics(folder / "metrics.jsonl"))[1:]


def _length_state(folder, config):
    """What the last checkpoint of a run remembers of its lengths."""
    run = build(config)
    checkpointer = Checkpointer(folder / "checkpoints", keep_latest=2, keep_best=1)
    try:
        return beginning.begin(run, checkpointer)[3].length
    finally:
        checkpointer.close()


# --- metrics -----------------------------------------------------------------------------------


def test_measured_steps_report_every_objective(finished):
    rows = _rows(finished)
    for row in rows[0::2]:
        for name in [label + end for label in MEASURED for end in ("", "/end")]:
            total = row[f"length/pressure/{name}"]
            assert np.isfinite(total)
            assert np.isfinite(row[f"length/reward_pressure/{name}"])
            bins = [row[f"length/pressure/{name}/bin_{k}"] for k in BINS]
            signs = [row[f"length/pressure/{name}/{sign}"] for sign in ("pos", "neg")]
            scale = np.abs([*bins, *signs]).sum()
            assert sum(bins) == pytest.approx(total, abs=1e-5 * scale)
            assert sum(signs) == pytest.approx(total, abs=1e-5 * scale)
            share = "length/gradient_share" + ("" if name == "own" else f"/{name}")
            shares = [row[f"{share}/bin_{k}"] for k in BINS]
            assert min(shares) >= 0
            assert sum(shares) == pytest.approx(1, abs=1e-5)
        assert any(row[f"length/pressure/{name}"] != 0 for name in MEASURED)
        # The raised α only serves the slope.
        assert not any("raised" in name for name in row)
    for row in rows[1::2]:
        assert not any(name.startswith("length/gradient_share") for name in row)
        assert "length/pressure/own" not in row


def test_the_step_after_a_measured_one_reports_what_was_taken(finished):
    rows = _rows(finished)
    for name in ("length/pressure/taken", "length/reward_pressure/taken"):
        assert [name in row for row in rows] == [False, True, False, True]
        assert all(np.isfinite(row[name]) and row[name] != 0 for row in rows[1::2])


def test_every_step_reports_degeneration_and_clipped_shares_by_bin(finished):
    rows = _rows(finished)
    for row in rows:
        assert {f"actor/clipfrac/{s}/bin_{k}" for s in ("pos", "neg") for k in BINS} <= set(row)
    names = [f"length/degeneration/{name}" for name in ("growth", "accuracy_gain", "flag")]
    assert [rows[0][name] for name in names] == [0, 0, 0]  # no step before it
    mean = [row["response_length/mean"] for row in rows]
    right = [row["reward/part/gsm8k"] for row in rows]
    for step in range(1, 4):
        growth, gain, flag = (rows[step][name] for name in names)
        assert growth == pytest.approx(mean[step] / mean[step - 1] - 1)
        assert gain == pytest.approx(right[step] - right[step - 1])
        assert flag == (growth > 0 and gain < 0.01)


def test_alpha_moves_after_a_measurement_and_within_its_rate(finished):
    alphas = [row["length/scale_alpha"] for row in _rows(finished)]
    assert alphas[0] == 1.0  # nothing is known in the first step
    assert alphas[1] != 1.0
    assert np.max(np.abs(np.diff(alphas))) <= 0.2 + 1e-12
    assert -2 <= min(alphas) <= max(alphas) <= 1.5


def test_every_metric_is_declared_for_what_it_is(finished):
    for row in _rows(finished):
        for name in row.keys() - {"step"}:
            declared(name)
    for name, reducer, unit in (
        ("length/pressure/own/end/bin_3", "mean", "tokens/lr"),
        ("length/pressure/taken", "mean", "tokens"),
        ("length/reward_pressure/luspo", "mean", "1/lr"),
        ("length/reward_pressure/taken", "mean", ""),
        ("length/gradient_share/grpo/bin_0", "mean", ""),
        ("length/degeneration/flag", "last", ""),
        ("length/scale_alpha", "last", ""),
    ):
        assert (declared(name).reducer, declared(name).unit) == (reducer, unit)


# --- resume ------------------------------------------------------------------------------------


def test_interrupted_steering_goes_on_bit_for_bit(finished, steered, tmp_path, monkeypatch):
    """Cut in the step after a measured one, in which α moves and what was taken is measured:
    pressure, slope and the policy before the measured update all come from the checkpoint."""
    real, calls = train.update_step, []

    def crash(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4:  # the second update of the second step
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(train, "update_step", crash)
    with pytest.raises(KeyboardInterrupt):
        _train(steered, tmp_path / "run")
    monkeypatch.setattr(train, "update_step", real)
    _train(steered, tmp_path / "run")
    _assert_same_results(_results(tmp_path / "run"), _results(finished))
    remembered = _length_state(finished, steered)
    assert _length_state(tmp_path / "run", steered) == remembered
    assert None not in dataclasses.astuple(remembered)
    last = _rows(finished)[-1]
    assert 1.0 + remembered.alpha_shift == last["length/scale_alpha"]


def test_measuring_does_not_change_training(steered, tmp_path):
    """With and without instruments: the same policy, responses and metrics, bit for bit."""
    steered.num_steps = 2
    steered.eval.every = 0
    steered.length.steer = "none"
    steered.length.every = 0
    _train(steered, tmp_path / "plain")
    steered.length.every = 1
    _train(steered, tmp_path / "measured")
    plain, measured = _results(tmp_path / "plain"), _results(tmp_path / "measured")
    assert "length/pressure/own" in measured[0][1]
    assert {"length/pressure/own", "length/pressure/taken"} <= measured[0][2].keys()
    for row in measured[0][1:]:
        assert row["length/scale_alpha"] == 1.0
        # At α 1 the run's own objective is LUSPO / L_ref, which is measured beside it.
        for end in ("", "/end", "/pos", "/neg", *(f"/bin_{k}" for k in BINS)):
            own, luspo = (row[f"length/pressure/{name}{end}"] for name in ("own", "luspo"))
            scale = abs(row["length/pressure/luspo/pos"]) + abs(row["length/pressure/luspo/neg"])
            assert own * 8 == pytest.approx(luspo, rel=1e-4, abs=1e-5 * scale)
    extra = ("length/pressure/", "length/reward_pressure/", "length/gradient_share/")
    shared = [{k: v for k, v in row.items() if not k.startswith(extra)} for row in measured[0]]
    _assert_same_results((shared, *measured[1:]), plain)


# --- pieces ------------------------------------------------------------------------------------


def _group(right, lengths, judged=None):
    size = len(right)
    judged = np.array([True] * size if judged is None else judged)
    return Group(
        prompt=PromptRecord(0, np.array([1]), "?", Example(0, "?", "!")),
        responses=[
            Response(0, i, np.zeros(n, np.int32), np.zeros(n, np.float32), True)
            for i, n in enumerate(lengths)
        ],
        texts=["x" * n for n in lengths],
        rewards=[Reward(float(r), "ok", {"right": float(r)}) for r in right],
        counted=judged,
        trained=judged,
    )


def _some_run(objective, **settings):
    """The parts of a run that the functions under test read."""
    config = fields.default_config()
    config.rollout.max_response_length = 10
    return types.SimpleNamespace(
        config=config,
        rule=types.SimpleNamespace(objective=objective),
        length=LengthSettings(**settings),
        metric="right",
    )


def _observe(run, state, *groups):
    metrics = StepMetrics()
    state, flagged = instruments.observe(run, state, Rollouts(groups), metrics)
    return state, flagged, metrics.result()


def test_responses_without_a_verdict_are_not_observed():
    run = _some_run(preset("luspo"), window=1)
    judged = [True, True, False, True]
    state, *_ = _observe(run, LengthState(), _group([1, 0, 1, 0], [2, 4, 90, 6], judged))
    assert state.history == ((4.0, 1 / 3),)
    assert state.length == 4.0
    again, flagged, values = _observe(run, state, _group([1, 1], [9, 9], [False, False]))
    assert again == state
    assert not flagged
    assert values["length/degeneration/flag"] == 0
    assert "length/scale_alpha" not in values  # no adaptive scale


def test_alpha_goes_down_while_flagged():
    objective = preset("luspo", length_scale="adaptive", reference_length=4.0)
    run = _some_run(objective, window=1, mitigation="scale", alpha_rate=0.1)
    state, flagged, values = _observe(run, LengthState(), _group([1, 0], [2, 4]))
    assert (flagged, values["length/scale_alpha"]) == (False, 1.0)
    state, flagged, values = _observe(run, state, _group([1, 0], [4, 8]))
    assert (flagged, values["length/degeneration/flag"]) == (True, 1.0)
    assert values["length/scale_alpha"] == pytest.approx(0.9)
    _, flagged, values = _observe(run, state, _group([1, 1], [8, 9]))  # better for it
    assert not flagged
    assert values["length/scale_alpha"] == pytest.approx(0.9)


def _advantages(run, rollouts, *, shorten):
    rows = np.zeros((4, 12), np.int32)
    batch = TrainBatch(
        rows=TokenBatch(*[rows] * len(dataclasses.fields(TokenBatch))),
        advantages_B=np.zeros(4, np.float32),
        group_ids_B=rollouts.group_ids_B,
        old_logprobs_BT=None,
        old_entropy_BT=None,
        ref_logprobs_BT=None,
        sampler_logprobs_BT=None,
    )
    return batches.with_advantages(run, rollouts, batch, shorten=shorten).advantages_B


def test_the_penalty_takes_from_long_responses_while_flagged():
    """Of two right responses the longer loses more; unflagged or without it, nothing changes."""
    rollouts = Rollouts([_group([1, 1, 0, 0], [2, 10, 2, 10])])
    objective = preset("dr_grpo")  # A = R − mean, so that the penalty can be read off
    run = _some_run(objective, mitigation="penalty", penalty=0.2)
    plain = _advantages(run, rollouts, shorten=False)
    np.testing.assert_allclose(plain, [0.5, 0.5, -0.5, -0.5])
    shorter = _advantages(run, rollouts, shorten=True)
    # 0.2 · L / 10 is taken: 0.04 and 0.2, their mean 0.12 comes back.
    np.testing.assert_allclose(shorter - plain, [0.08, -0.08, 0.08, -0.08], atol=1e-6)
    for mitigation in ("none", "scale"):
        other = _some_run(objective, mitigation=mitigation, penalty=0.2)
        np.testing.assert_array_equal(_advantages(other, rollouts, shorten=True), plain)


def test_steps_without_a_sample_or_not_due_measure_nothing():
    """Too few fresh groups, or the wrong step: the state passes through untouched."""
    run = _some_run(preset("luspo"), every=2)
    state, length, metrics = object(), LengthState(length=3.0), StepMetrics()
    assert instruments.sample(_some_run(preset("luspo")), None, None, 0) is None
    assert instruments.before_update(run, state, None, 1, metrics) is state
    for step in (0, 1, 2):
        assert instruments.after_update(run, state, length, None, step, metrics) is length
    assert instruments.after_update(run, state, length, object(), 1, metrics) is length
    assert metrics.result() == {}


def test_a_step_after_no_step_takes_no_measure_of_it():
    """Step 0 is due, but the step before it does not exist."""
    assert [instruments._due(_some_run(preset("luspo"), every=1), s) for s in (-1, 0, 1)] == [
        False,
        True,
        True,
    ]
