"""Every refusal names the field and says what would be right."""

import dataclasses

import numpy as np
import pytest

from luspo_jax import objectives
from luspo_jax.objectives import PRESETS, Objective, preset
from luspo_jax.objectives.objective import CHOICES, RANGES
from tests.objectives.objective_cases import batch_of, case, denominators_of

REFUSED = {
    "unknown ratio": (
        {"ratio": "tokens"},
        r"Objective.ratio: 'tokens'.*'token'.*sequence, .*token",
    ),
    "unknown surrogate": ({"surrogate": "ppo"}, r"Objective.surrogate.*clip, .*sapo"),
    "unknown scale": ({"length_scale": "lenght"}, r"Objective.length_scale.*did you mean 'length'"),
    "unknown aggregation": ({"aggregation": "mean"}, r"Objective.aggregation.*token-mean"),
    "unknown advantage": ({"advantage": "gae"}, r"Objective.advantage.*group-std"),
    "unknown estimator": ({"kl_estimator": "k4"}, r"Objective.kl_estimator.*k1, k2, k3"),
    "unknown placement": ({"kl_placement": "both"}, r"Objective.kl_placement.*loss, reward"),
    "unknown correction": ({"correction": "tis+mask"}, r"Objective.correction: 'mask'.*k3-mask"),
    "correction twice": ({"correction": "tis+tis"}, r"Objective.correction.*twice"),
    "none beside another": ({"correction": "none+tis"}, r"Objective.correction.*'none' beside"),
    "clip too low": ({"clip_low": 0.0}, r"Objective.clip_low = 0.0.*greater than 0 and at most 1"),
    "clip past one": ({"clip_low": 1.5}, r"Objective.clip_low"),
    "negative clip": ({"clip_high": -0.1}, r"Objective.clip_high"),
    "infinite clip": ({"clip_high": float("inf")}, r"Objective.clip_high.*finite"),
    "clip that is no number": ({"clip_high": float("nan")}, r"Objective.clip_high.*finite"),
    "clip as text": ({"clip_high": "0.2"}, r"Objective.clip_high must be a number, not '0.2'"),
    "clip unset": ({"clip_high": None}, r"Objective.clip_high must be a number, not None"),
    "alpha": ({"length_alpha": 3.0}, r"Objective.length_alpha.*at least -2 and at most 2"),
    "quantile": ({"top_entropy_quantile": 0.0}, r"Objective.top_entropy_quantile"),
    "quantile past one": ({"top_entropy_quantile": 1.2}, r"Objective.top_entropy_quantile"),
    "dual clip": ({"dual_clip": 1.0}, r"Objective.dual_clip.*greater than 1"),
    "delta inside the clip": ({"delta": 1.2}, r"Objective.delta = 1.2 must be greater than 1 \+"),
    "both outer clips": ({"delta": 2.0, "dual_clip": 3.0}, r"dual_clip and delta.*one of them"),
    "loss scale": ({"loss_scale": 0.0}, r"Objective.loss_scale"),
    "no cap": ({"ratio": "sequence", "length_scale": "capped"}, r"Objective.length_cap is not set"),
    "length twice": (
        {"length_scale": "length", "aggregation": "token-mean"},
        r"Objective.length_scale = 'length' with aggregation = 'token-mean' counts length twice",
    ),
    "outer clip elsewhere": ({"surrogate": "sapo", "delta": 2.0}, r"clip surrogate, not 'sapo'"),
    "GMPO by sequence": (
        {"surrogate": "gmpo", "ratio": "sequence"},
        r"geometric mean itself.*token",
    ),
    "VESPO by token": ({"surrogate": "vespo"}, r"'vespo'.*Use ratio = 'sequence-product'"),
    "DPPO by sequence": ({"surrogate": "dppo-tv", "ratio": "sequence"}, r"single tokens"),
    "corrected VESPO": (
        {"surrogate": "vespo", "ratio": "sequence-product", "correction": "tis"},
        r"Objective.correction does not go with surrogate = 'vespo'",
    ),
    "decoupled VESPO": (
        {"surrogate": "vespo", "ratio": "sequence-product", "old_policy": "decoupled"},
        r"Objective.old_policy = 'decoupled' does not go with surrogate = 'vespo'",
    ),
    "unknown old policy": ({"old_policy": "proximal"}, r"Objective.old_policy.*behaviour, dec"),
    "binary KL": ({"binary_kl_max": 0.0}, r"Objective.binary_kl_max = 0.0.*greater than 0"),
    "second moment": ({"m2po_max": float("inf")}, r"Objective.m2po_max.*finite"),
    "weighted KL in the reward": (
        {"kl_importance_weight": True, "kl_placement": "reward"},
        r"Objective.kl_importance_weight",
    ),
    "KL weighted by a product": (
        {"kl_importance_weight": True, "ratio": "sequence-product"},
        r"Objective.kl_importance_weight",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_at_construction(name):
    changes, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        Objective(**changes)


def test_presets_refuse_unknown_names_and_settings_they_do_not_read():
    with pytest.raises(ValueError, match=r"preset: 'luspoo'.*did you mean 'luspo'"):
        preset("luspoo")
    with pytest.raises(ValueError, match=r"'clip_hi' is unknown.*did you mean 'clip_high'"):
        preset("luspo", clip_hi=0.1)
    with pytest.raises(
        ValueError, match=r"clip_low has no effect on preset 'sapo'; it reads sapo_temp"
    ):
        preset("sapo", clip_low=0.1)
    with pytest.raises(ValueError, match="tis_max has no effect"):
        preset("luspo", tis_max=3.0)
    assert preset("luspo", tis_max=3.0, correction="tis").tis_max == 3.0
    # A property of the run, which callers hand to every preset alike.
    assert preset("sapo", max_response_length=64).max_response_length == 64


def test_every_number_has_a_range_and_every_name_a_list():
    for field in dataclasses.fields(Objective):
        known = field.name in RANGES or field.name in CHOICES
        assert known or field.name in ("correction", "kl_importance_weight", "otb_zero_tail")


@pytest.fixture
def step():
    arrays = case(2, dtype=np.float32)
    batch = batch_of(PRESETS["luspo"], arrays)
    return batch, denominators_of(PRESETS["luspo"], batch)


@pytest.mark.parametrize(
    ("changes", "absent"),
    [
        ({"kl_coef": 0.1}, "ref_logprobs_BT"),
        ({"entropy_coef": 0.1}, "entropy_BT"),
        ({"top_entropy_quantile": 0.5}, "entropy_BT"),
        ({"correction": "tis"}, "sampler_logprobs_BT"),
        ({"off_policy_max": 0.5, "off_policy_against": "sampler"}, "sampler_logprobs_BT"),
    ],
)
def test_missing_inputs(step, changes, absent):
    batch, denominators = step
    batch = dataclasses.replace(batch, **{absent: None})
    with pytest.raises(ValueError, match=f"PolicyBatch.{absent} is missing: Objective"):
        objectives.loss(preset("luspo", **changes), batch, denominators)


def test_entropy_threshold_is_of_the_whole_step(step):
    batch, denominators = step
    objective = preset("luspo", top_entropy_quantile=0.5)
    with pytest.raises(ValueError, match="entropy_threshold is missing"):
        objectives.loss(objective, batch, denominators)
    with pytest.raises(ValueError, match="entropy_BT is missing"):
        objectives.denominators(objective, batch.response_mask_BT)


def test_the_second_moment_is_of_the_whole_step(step):
    batch, denominators = step
    objective = preset("luspo", correction="m2po")
    with pytest.raises(ValueError, match="m2po_threshold is missing"):
        objectives.loss(objective, batch, denominators)
    for missing in ("old_logprobs_BT", "sampler_logprobs_BT"):
        known = {"old_logprobs_BT": batch.old_logprobs_BT}
        known |= {"sampler_logprobs_BT": batch.sampler_logprobs_BT, missing: None}
        with pytest.raises(ValueError, match=r"sampler_logprobs_BT is missing: .*'m2po'"):
            objectives.denominators(objective, batch.response_mask_BT, **known)


def test_ages_come_with_the_samplers_logprobs(step):
    batch, denominators = step
    ages_BT = np.zeros(batch.response_mask_BT.shape, np.int32)
    aged = dataclasses.replace(batch, ages_BT=ages_BT, sampler_logprobs_BT=None)
    with pytest.raises(ValueError, match=r"sampler_logprobs_BT is missing: .*ages_BT need it"):
        objectives.loss(PRESETS["luspo"], aged, denominators)


def test_shapes_and_masks(step):
    batch, denominators = step
    objective = PRESETS["luspo"]
    short = dataclasses.replace(batch, advantages_B=batch.advantages_B[:5])
    narrow = dataclasses.replace(batch, old_logprobs_BT=batch.old_logprobs_BT[:, 1:])
    with pytest.raises(ValueError, match=r"PolicyBatch.advantages_B has shape \(5,\); \(6,\)"):
        objectives.loss(objective, short, denominators)
    with pytest.raises(ValueError, match=r"PolicyBatch.old_logprobs_BT has shape \(6, 8\)"):
        objectives.loss(objective, narrow, denominators)
    with pytest.raises(ValueError, match="response_mask_BT must be bool"):
        objectives.denominators(objective, batch.response_mask_BT.astype(np.float32))
    with pytest.raises(ValueError, match=r"lengths_B \(6,\), group_ids_B \(1,\)"):
        objectives.length_scales(objective, np.ones(6), np.ones(1, np.int32))
