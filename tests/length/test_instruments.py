"""Length instruments in the loop: what a step reports, that measuring changes nothing, resume."""

import dataclasses

import jax
import numpy as np
import pytest

from luspo_jax.datasets import Example
from luspo_jax.experience import stages
from luspo_jax.experience.groups import Group, Rollouts
from luspo_jax.learner import programs
from luspo_jax.length import instruments
from luspo_jax.length.laboratory import Sampled
from luspo_jax.length.settings import LengthSettings
from luspo_jax.length.steering import LengthState
from luspo_jax.metrics import StepMetrics, declared, read_metrics
from luspo_jax.objectives import preset
from luspo_jax.prompts import PromptRecord
from luspo_jax.rewards import Reward
from luspo_jax.rollout import Response
from luspo_jax.run import beginning
from luspo_jax.run.build import build
from luspo_jax.run.checkpoint import Checkpointer
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
        assert 0 <= row["actor/clip_lre"] < 2
    parts = ("growth", "accuracy_gain", "flag", "collapse")
    names = [f"length/degeneration/{name}" for name in parts]
    assert [rows[0][name] for name in names] == [0, 0, 0, 0]  # no step before it
    mean = [row["response_length/mean"] for row in rows]
    right = [row["reward/part/gsm8k"] for row in rows]
    for step in range(1, 4):
        growth, gain, flag, collapse = (rows[step][name] for name in names)
        assert growth == pytest.approx(mean[step] / mean[step - 1] - 1)
        assert gain == pytest.approx(right[step] - right[step - 1])
        assert flag == (growth > 0 and gain < 0.01)
        assert collapse == (growth < -0.1 and gain < 0.01)


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
    real, calls = programs.update_step, []

    def crash(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4:  # the second update of the second step
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(programs, "update_step", crash)
    with pytest.raises(KeyboardInterrupt):
        _train(steered, tmp_path / "run")
    monkeypatch.setattr(programs, "update_step", real)
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


VERSION = 3


def _group(right, lengths, judged=None):
    judged = [True] * len(right) if judged is None else judged
    return Group(
        prompt=PromptRecord(0, np.array([1]), "?", Example(0, "?", "!")),
        responses=[
            Response(
                prompt_id=0,
                sample_id=i,
                tokens=np.zeros(n, np.int32),
                logprobs=np.zeros(n, np.float32),
                stopped=True,
                versions=np.full(n, VERSION, np.uint32),
                text="x" * n,
                reward=Reward(float(r), "ok", {"right": float(r)}),
                counted=j,
                trained=np.full(n, j),
            )
            for i, (r, n, j) in enumerate(zip(right, lengths, judged, strict=True))
        ],
    )


def _observe(settings, objective, state, group):
    metrics = StepMetrics()
    state, direction = instruments.observe(
        state, settings, objective, group.responses, "right", metrics
    )
    return state, direction, metrics.result()


def test_responses_without_a_verdict_are_not_observed():
    known = LengthSettings(window=1), preset("luspo")
    judged = [True, True, False, True]
    state, *_ = _observe(*known, LengthState(), _group([1, 0, 1, 0], [2, 4, 90, 6], judged))
    assert state.history == ((4.0, 1 / 3),)
    assert state.length == 4.0
    again, direction, values = _observe(*known, state, _group([1, 1], [9, 9], [False, False]))
    assert again == state
    assert direction == 0
    assert values["length/degeneration/flag"] == 0
    assert "length/scale_alpha" not in values  # no adaptive scale


def test_alpha_goes_down_while_length_grows_unpaid():
    objective = preset("luspo", length_scale="adaptive", reference_length=4.0)
    known = LengthSettings(window=1, mitigation="scale", alpha_rate=0.1), objective
    state, direction, values = _observe(*known, LengthState(), _group([1, 0], [2, 4]))
    assert (direction, values["length/scale_alpha"]) == (0, 1.0)
    state, direction, values = _observe(*known, state, _group([1, 0], [4, 8]))
    assert (direction, values["length/degeneration/flag"]) == (1, 1.0)
    assert values["length/degeneration/collapse"] == 0.0
    assert values["length/scale_alpha"] == pytest.approx(0.9)
    _, direction, values = _observe(*known, state, _group([1, 1], [8, 9]))  # better for it
    assert direction == 0
    assert values["length/scale_alpha"] == pytest.approx(0.9)


def test_alpha_goes_up_while_length_collapses():
    objective = preset("luspo", length_scale="adaptive", reference_length=4.0)
    known = LengthSettings(window=1, mitigation="scale", alpha_rate=0.1), objective
    state, *_ = _observe(*known, LengthState(), _group([1, 0], [4, 8]))
    state, direction, values = _observe(*known, state, _group([1, 0], [2, 4]))
    assert (direction, values["length/degeneration/collapse"]) == (-1, 1.0)
    assert values["length/degeneration/flag"] == 0.0
    assert values["length/scale_alpha"] == pytest.approx(1.1)
    _, direction, values = _observe(*known, state, _group([1, 1], [1, 2]))  # shorter and better
    assert (direction, values["length/degeneration/collapse"]) == (0, 0.0)
    assert values["length/scale_alpha"] == pytest.approx(1.1)


def _advantages(settings, rollouts, *, direction):
    penalty_B = instruments.penalty(settings, rollouts.lengths_B, 10, direction=direction)
    # A = R − mean, so that the penalty can be read off.
    return stages.with_advantages(rollouts, preset("dr_grpo"), 12, penalty_B).advantages_B


def test_the_penalty_takes_from_long_responses_and_gives_while_length_collapses():
    """Of two right responses the longer loses more; unflagged or without it, nothing changes."""
    rollouts = Rollouts([_group([1, 1, 0, 0], [2, 10, 2, 10])], VERSION)
    settings = LengthSettings(mitigation="penalty", penalty=0.2)
    plain = _advantages(settings, rollouts, direction=0)
    np.testing.assert_allclose(plain, [0.5, 0.5, -0.5, -0.5])
    shorter = _advantages(settings, rollouts, direction=1)
    # 0.2 · L / 10 is taken: 0.04 and 0.2, their mean 0.12 comes back.
    np.testing.assert_allclose(shorter - plain, [0.08, -0.08, 0.08, -0.08], atol=1e-6)
    longer = _advantages(settings, rollouts, direction=-1)
    np.testing.assert_allclose(longer - plain, [-0.08, 0.08, -0.08, 0.08], atol=1e-6)
    for mitigation in ("none", "scale"):
        other = LengthSettings(mitigation=mitigation, penalty=0.2)
        for direction in (1, -1):
            got = _advantages(other, rollouts, direction=direction)
            np.testing.assert_array_equal(got, plain)


def test_steps_without_a_sample_or_not_due_measure_nothing():
    """Too few fresh groups, or the wrong step: the state passes through untouched."""
    settings = LengthSettings(every=2)
    state, length, metrics = object(), LengthState(length=3.0), StepMetrics()
    assert instruments.sample(LengthSettings(), None, step=0, version=0) is None
    assert instruments.before_update(None, settings, state, None, 1, metrics) is state
    arguments = None, settings, state, length
    for step in (0, 1, 2):
        assert instruments.after_update(*arguments, None, step, metrics) is length
    assert instruments.after_update(*arguments, object(), 1, metrics) is length
    assert metrics.result() == {}


def test_a_sample_is_of_groups_of_the_version_that_starts_the_step():
    """The share is of all groups of the step; where fewer are fresh there is no sample."""
    groups = [_group([1, 0], [2, 3]) for _ in range(4)]
    old = [np.full(n, VERSION - 1, np.uint32) for n in (2, 3)]
    rollouts = Rollouts([groups[0].enriched(versions=old), *groups[1:]], VERSION)
    sampled = Sampled(rollouts.prompts, rollouts.responses, rollouts.group_ids_B, 4)
    settings = LengthSettings(every=2, share=0.75)
    for step in (4, 5):
        found = instruments.sample(settings, sampled, step=step, version=VERSION)
        assert found.group_ids_B.tolist() == [1, 1, 2, 2, 3, 3]
        assert instruments.sample(settings, sampled, step=step, version=VERSION + 1) is None
    whole = dataclasses.replace(settings, share=1.0)
    assert instruments.sample(whole, sampled, step=4, version=VERSION) is None


def test_a_step_after_no_step_takes_no_measure_of_it():
    """Step 0 is due, but the step before it does not exist."""
    assert [instruments._due(LengthSettings(every=1), s) for s in (-1, 0, 1)] == [
        False,
        True,
        True,
    ]
