"""Loss and gradient against TRL 1.16's own trainer, recorded in float64."""

import json

import numpy as np
import pytest

from luspo_jax import objectives
from luspo_jax.objectives import PRESETS, PolicyBatch, preset
from tests.objectives.objective_cases import denominators_of, loss_grad, loss_grad_metrics

pytestmark = pytest.mark.usefixtures("strict_dtypes", "x64")

ROWS = 15  # the largest batch; smaller ones get empty rows, which must change nothing

NARROW = {"clip_low": 3e-4, "clip_high": 4e-4}
WIDE = {"clip_low": 0.1, "clip_high": 0.15}
KL = {"kl_coef": 0.04, "kl_importance_weight": True}  # TRL weighs its KL by the ratio
PAPER = {"clip_low": 2e-3, "clip_high": 2.5e-3}

SETTINGS = {
    "grpo": PRESETS["grpo"],
    "grpo_kl": preset("grpo", **KL),
    "bnpo": PRESETS["bnpo"],
    "dr_grpo": preset("dr_grpo", max_response_length=24),
    "dapo": PRESETS["dapo"],
    "cispo": preset("cispo", cispo_max_ratio=2.0),
    # TRL picks between its two temperatures in float32, whatever the log-probs are.
    "sapo": preset("sapo", sapo_temperature_neg=float(np.float32(1.05))),
    "gspo": PRESETS["gspo"],
    "gspo_wide": preset("gspo", **WIDE),
    "gspo_paper": preset("gspo", **PAPER),
    "luspo": PRESETS["luspo"],
    "luspo_narrow": preset("luspo", **NARROW),
    "luspo_wide": preset("luspo", **WIDE),
    "luspo_kl": preset("luspo", **WIDE, **KL),
    "grpo_two_sided": preset("grpo", delta=1.5),
    "vespo": PRESETS["vespo"],
}


@pytest.fixture(scope="module")
def oracle(shared_oracles):
    with np.load(shared_oracles / "trl_policy_losses.npz") as archive:
        return {name: archive[name] for name in archive.files}


def padded(values: np.ndarray) -> np.ndarray:
    rows = ROWS - values.shape[0]
    # What stands in empty rows must not matter.
    fill = np.nan if values.dtype.kind == "f" else 0
    width = [(0, rows)] + [(0, 0)] * (values.ndim - 1)
    return np.pad(values, width, constant_values=fill)


def step(oracle, index, objective):
    arrays = {
        name: oracle[f"{index}/{name}"]
        for name in ("logprobs", "old_logprobs", "ref_logprobs", "advantages")
    }
    mask_BT = padded(oracle[f"{index}/response_mask"].astype(bool))
    batch = PolicyBatch(
        logprobs_BT=padded(arrays["logprobs"]),
        old_logprobs_BT=padded(arrays["old_logprobs"]),
        ref_logprobs_BT=padded(arrays["ref_logprobs"]),
        advantages_B=padded(arrays["advantages"]),
        response_mask_BT=mask_BT,
        length_scale_B=objectives.length_scales(
            objective, mask_BT.sum(axis=1), np.zeros(ROWS, np.int32)
        ),
    )
    return batch, denominators_of(objective, batch)


def test_every_recorded_setting_is_covered(oracle):
    assert set(json.loads(str(oracle["meta"]))["settings"]) == set(SETTINGS)


@pytest.mark.parametrize("name", SETTINGS)
def test_loss_and_gradient_equal_trl(oracle, name):
    meta = json.loads(str(oracle["meta"]))
    for index in range(meta["num_batches"]):
        value, grad_BT = loss_grad(SETTINGS[name], *step(oracle, index, SETTINGS[name]))
        expected = oracle[f"{index}/{name}/grad_logprobs"]
        np.testing.assert_allclose(value, oracle[f"{index}/{name}/loss"], rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(grad_BT[: len(expected)], expected, rtol=1e-10, atol=1e-12)
        assert np.all(np.asarray(grad_BT[len(expected) :]) == 0)


@pytest.mark.parametrize(
    ("name", "recorded", "ours"),
    [
        ("dapo", "clip_ratio/region_mean", "clip_ratio/region_mean"),
        ("luspo_wide", "clip_ratio/region_mean", "clip_ratio/region_mean"),
        ("cispo", "cispo_clip_ratio", "clip_ratio/high_mean"),
    ],
)
def test_clip_fractions_equal_trl(oracle, name, recorded, ours):
    cases = json.loads(str(oracle["meta"]))["cases"]
    expected = [c["metrics"][recorded] for c in cases if c["setting"] == name]
    assert max(expected) > 0
    for index, fraction in enumerate(expected):
        *_, metrics = loss_grad_metrics(SETTINGS[name], *step(oracle, index, SETTINGS[name]))
        # TRL counts sequences in float32.
        assert float(objectives.metric_means(metrics)[ours]) == pytest.approx(fraction, rel=1e-6)
