"""One optimizer step on 8 fake devices is the step of one device, however the mesh is cut."""

import dataclasses
import re

import jax
import numpy as np
import pytest

from luspo_jax import objectives, sharding
from luspo_jax.learner import optimizer
from luspo_jax.learner.logprobs import LogprobRule, row_logprobs
from luspo_jax.learner.rows import put
from luspo_jax.learner.state import (
    UpdateRule,
    abstract_state,
    fetched,
    initial_state,
    param_shardings,
    parked,
    state_shardings,
)
from luspo_jax.learner.step import update_step
from luspo_jax.models import decoder
from luspo_jax.models.decoder_config import DecoderConfig
from luspo_jax.models.forward import Forward
from tests.row_cases import batch_of, plan_of

LAYERS = 5  # a size that no other dimension has, so that a stack of layers is known in HLO
CONFIG = DecoderConfig(
    "qwen3", 96, LAYERS, 64, 128, 4, 2, 16, 1e4, 1e-6, False, True, False, 4096
)  # fmt: skip
B, T = 16, 48
MESHES = {
    "fsdp8": {"fsdp": 8},
    "data2-fsdp4": {"data": 2, "fsdp": 4},
    "fsdp4-tensor2": {"fsdp": 4, "tensor": 2},
    "context4-data2": {"context": 4, "data": 2},
    "expert2-context2-tensor2": {"expert": 2, "context": 2, "tensor": 2},
}
OPTIMIZER = optimizer.adamw(b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.01)
RATE = np.float32(1e-6)  # the paper's


def _batch(seed=0):
    rng = np.random.default_rng(seed)
    lengths_B = rng.integers(20, T + 1, B)
    sequences = [rng.integers(0, CONFIG.vocab_size, n) for n in lengths_B]
    prompts, responses = zip(*((x[:8], x[8:]) for x in sequences), strict=True)
    others = [[-3 * rng.random(len(r), np.float32) for r in responses] for _ in range(2)]
    return batch_of(
        CONFIG,
        plan_of(prompts, responses, width=T, microbatches=2),
        prompts,
        responses,
        advantages=rng.normal(size=B),
        groups=np.repeat(np.arange(4), 4),
        ref_logprobs=others[0],
        sampler_logprobs=others[1],
    )


def _rule(sizes, remat="full"):
    layout = sharding.layout("train", sizes, jax.devices()) if sizes else None
    objective = objectives.preset("luspo", kl_coef=0.01)
    logprobs = LogprobRule(Forward(CONFIG, remat=remat, layout=layout), head_chunk_tokens=64)
    return UpdateRule(logprobs, objective, OPTIMIZER, max_grad_norm=1.0)


def _stepped(sizes):
    """(state, metrics) on the host after one step, and the text of its program."""
    rule = _rule(sizes)
    params = decoder.init_params(jax.random.key(0), CONFIG)
    state = initial_state(params, rule, marked=True)
    batch = put(_batch(), rule.logprobs.how.layout)
    program = update_step.lower(state, batch, RATE, np.float32(0), rule=rule).compile()
    before = state_shardings(state, rule)
    state, metrics = update_step(state, batch, RATE, np.float32(0), rule=rule)
    if before is not None:
        kept = jax.tree.map(lambda x, s: s.is_equivalent_to(x.sharding, x.ndim), state, before)
        assert all(jax.tree.leaves(kept))
    return jax.device_get(state), jax.device_get(metrics), program.as_text()


@pytest.fixture(scope="module")
def one_device():
    return _stepped(None)


def _worst(tree, reference):
    """max|Δ| / max|reference| of the leaf where it is largest."""
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(reference), strict=True)
    return max(
        float(np.abs(a - b).max() / max(np.abs(b).max(), np.finfo(np.float32).tiny))
        for a, b in pairs
    )


@pytest.mark.parametrize("mesh", MESHES)
def test_a_step_is_that_of_one_device(one_device, mesh):
    state, metrics, text = _stepped(MESHES[mesh])
    expected, expected_metrics, _ = one_device
    # The first moment is 0.1 · the clipped gradient.
    assert _worst(state.opt_state[0].mu, expected.opt_state[0].mu) <= 1e-5
    assert _worst(state.params, expected.params) <= 1e-5
    assert _worst(metrics, expected_metrics) <= 1e-5
    _check_gathers(text)


def _check_gathers(text):
    """No collective makes a stack of layers: weights are gathered one layer at a time."""
    gathered = re.findall(r"= \(?\w+\[([\d,]*)\][^=]* all-gather(?:-start)?\(", text)
    assert gathered
    shapes = [[int(n) for n in dims.split(",") if n != "1"] for dims in gathered if dims]
    assert not [shape for shape in shapes if LAYERS in shape]
    # Nor does one make activations of whole rows: whole are at most some numbers a token.
    assert not [shape for shape in shapes if T in shape and len(shape) > 2]


@pytest.mark.parametrize("mesh", ["data2-fsdp4", "context4-data2"])
def test_tokens_of_several_ages_compete_over_all_devices(mesh):
    """The threshold of a mask is of the whole step, and sums by age are of all devices' tokens."""
    rng = np.random.default_rng(1)
    batch = _batch()
    mask_BT = batch.responses.response_mask_BT
    batch = dataclasses.replace(
        batch,
        responses=dataclasses.replace(
            batch.responses,
            old_logprobs_BT=np.where(mask_BT, -3 * rng.random(mask_BT.shape, np.float32), 0),
            ages_BT=np.where(mask_BT, rng.integers(0, 6, mask_BT.shape, np.int32), 0),
        ),
    )
    found = []
    for sizes in (None, MESHES[mesh]):
        rule = _rule(sizes)
        masked = dataclasses.replace(rule.objective, correction="m2po", m2po_max=0.5)
        rule = dataclasses.replace(rule, objective=masked)
        state = initial_state(decoder.init_params(jax.random.key(0), CONFIG), rule)
        state, metrics = update_step(state, put(batch, rule.logprobs.how.layout), RATE, rule=rule)
        found.append(jax.device_get((state.opt_state[0].mu, metrics)))
    (expected, expected_metrics), (got, metrics) = found
    assert _worst(got, expected) <= 1e-5
    assert _worst(metrics, expected_metrics) <= 1e-5
    dropped, count = metrics["rollout_corr/masked_fraction"]
    assert 0.1 * count < dropped < 0.9 * count
    assert all(metrics[f"staleness/share/age_{k}"][0] > 0 for k in range(5))


@pytest.mark.parametrize("mesh", ["context4-data2"])
def test_advantages_and_segments_of_tokens_are_those_of_one_device(mesh):
    rng = np.random.default_rng(2)
    batch = _batch()
    mask_BT = batch.responses.response_mask_BT
    drawn_BT = rng.normal(size=mask_BT.shape).astype(np.float32)
    batch = dataclasses.replace(
        batch,
        responses=dataclasses.replace(
            batch.responses,
            old_logprobs_BT=np.where(mask_BT, -3 * rng.random(mask_BT.shape, np.float32), 0),
            token_advantages_BT=np.where(mask_BT, drawn_BT, 0),
            segment_starts_BT=mask_BT & (rng.random(mask_BT.shape) < 0.2),
        ),
    )
    found = []
    for sizes in (None, MESHES[mesh]):
        rule = dataclasses.replace(_rule(sizes), objective=objectives.preset("hispo", clip_high=9))
        state = initial_state(decoder.init_params(jax.random.key(0), CONFIG), rule)
        state, _ = update_step(state, put(batch, rule.logprobs.how.layout), RATE, rule=rule)
        found.append(jax.device_get(state.opt_state[0].mu))
    assert _worst(found[1], found[0]) <= 1e-5


def test_scores_are_those_of_one_device(one_device):
    params = decoder.init_params(jax.random.key(0), CONFIG)
    scored = []
    for sizes in (None, *MESHES.values()):
        rule = dataclasses.replace(_rule(sizes).logprobs, collision=True)
        placed = jax.device_put(params, param_shardings(rule.how)) if sizes else params
        rows = put(_batch().rows, rule.how.layout)
        scored.append(row_logprobs(placed, rows, rule=rule))
    for found in scored[1:]:
        assert _worst(jax.device_get(found), jax.device_get(scored[0])) <= 1e-5
    plain = row_logprobs(params, put(_batch().rows, None), rule=_rule(None).logprobs)
    np.testing.assert_array_equal(plain.logprobs_RT, scored[0].logprobs_RT)


def test_parameters_and_moments_are_never_whole_on_a_device():
    rule = _rule({"fsdp": 4, "tensor": 2})
    state = initial_state(decoder.init_params(jax.random.key(0), CONFIG), rule)
    for leaf in jax.tree.leaves((state.params["layers"]["mlp"], state.opt_state[0].nu["head"])):
        assert leaf.addressable_shards[0].data.size == leaf.size // 8
    abstract = abstract_state(rule)
    for real, planned in zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True):
        assert (real.shape, real.dtype) == (planned.shape, planned.dtype)
        assert planned.sharding.is_equivalent_to(real.sharding, real.ndim)


def test_parked_parts_wait_in_host_memory():
    rule = _rule({"fsdp": 8})
    state = initial_state(decoder.init_params(jax.random.key(0), CONFIG), rule)
    before = jax.device_get(state)
    state = parked(state, "both")
    kinds = {"params": "device", "opt_state": "pinned_host", "ref_params": "pinned_host"}
    for name, kind in kinds.items():
        tree = getattr(state, name)
        assert {x.sharding.memory_kind for x in jax.tree.leaves(tree)} == {kind}
    state = fetched(state, "both")
    assert {x.sharding.memory_kind for x in jax.tree.leaves(state)} == {"device"}
    jax.tree.map(np.testing.assert_array_equal, state, before)
