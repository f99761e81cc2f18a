"""Sampling with int8 weights: the policy of the rounded matrices, on one device and on many."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from luspo_jax import sharding
from luspo_jax.models import decoder
from luspo_jax.models.forward import Forward
from luspo_jax.rollout import Engine, Sampling, handover
from tests.rollout import int8_cases
from tests.rollout import rollout_cases as cases

MODELS = int8_cases.MODELS
RAGGED = cases.requests_of([3, 17, 1, 9, 12, 5], 98)
SAMPLING = Sampling(24, (0, 11, 50))
MESHES = {  # of training, and of the rollout
    "data 4, tensor 2": ({"fsdp": 8}, {"data": 4, "tensor": 2}),
    "data 2, expert 2, tensor 2": (
        {"fsdp": 2, "expert": 2, "tensor": 2},
        {"data": 2, "expert": 2, "tensor": 2},
    ),
    "context 2": ({"fsdp": 2, "context": 4}, {"data": 4, "context": 2}),
}


def _weights(name, mesh=None):
    """The weights that a run hands over from its training mesh."""
    model = MODELS[name]
    params, layout = int8_cases.params(model), None
    if mesh is not None:
        train, rollout = MESHES[mesh]
        places = sharding.shardings(
            decoder.param_axes(model), sharding.layout("train", train, jax.devices())
        )
        params = jax.device_put(params, places)
        layout = sharding.layout("rollout", rollout, jax.devices())
    return handover.rollout_params(params, config=model, layout=layout, dtype="int8"), layout


@functools.cache
def _generate(name, mesh=None, dtype="float32"):
    params, layout = _weights(name, mesh)
    how = Forward(MODELS[name], dtype, layout=layout)
    engine = Engine(how, SAMPLING, num_slots=6, max_prompt_length=17, chunk_length=8)
    return engine.generate(params, RAGGED, group_size=3, seed=5, step=2)[0]


@pytest.mark.parametrize("name", MODELS)
def test_logprobs_are_those_of_a_dense_float32_model_with_the_rounded_weights(name):
    """Of the activations' rounding nothing is left in float32: the int8 products themselves."""
    model = MODELS[name]
    whole = int8_cases.dequantised(_weights(name)[0], model)
    responses = _generate(name)
    assert sum(len(r.tokens) for r in responses) > 150
    logits = cases.teacher_logits(model, whole, RAGGED, responses)
    originals = cases.teacher_logits(model, int8_cases.params(model), RAGGED, responses)
    rounding = []
    for response, own, exact in zip(responses, logits, originals, strict=True):
        at = np.arange(len(response.tokens)), response.tokens
        assert np.abs(response.logprobs - cases.log_softmax(own)[at]).max() <= 2e-5
        rounding.append(np.abs(response.logprobs - cases.log_softmax(exact)[at]).max())
    assert max(rounding) > 1e-2  # and not those of the weights before they were rounded


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_activations_are_near(name):
    model = MODELS[name]
    whole = int8_cases.dequantised(_weights(name)[0], model)
    responses = _generate(name, dtype="bfloat16")
    off = []
    for response, own in zip(
        responses, cases.teacher_logits(model, whole, RAGGED, responses), strict=True
    ):
        at = np.arange(len(response.tokens)), response.tokens
        off.append(np.abs(response.logprobs - cases.log_softmax(own)[at]))
    assert np.median(np.concatenate(off)) < 0.1


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", MODELS)
def test_a_mesh_hands_over_the_same_integers_and_scales(name, mesh):
    """Though parts of a channel lie on several devices, whose maximum counts."""
    expected, (placed, layout) = _weights(name)[0], _weights(name, mesh)
    where = sharding.shardings(decoder.param_axes(MODELS[name], jnp.int8), layout)
    assert jax.tree.structure(placed) == jax.tree.structure(expected)
    for x, one, place in zip(*map(jax.tree.leaves, (placed, expected, where)), strict=True):
        np.testing.assert_array_equal(x, one)
        assert x.dtype == one.dtype
        assert x.sharding.is_equivalent_to(place, x.ndim)


def test_int8_travels_and_no_device_gathers_more_than_it_needs():
    model = MODELS["dense, untied"]
    train, rollout = MESHES["data 4, tensor 2"]
    train = sharding.layout("train", train, jax.devices())
    rollout = sharding.layout("rollout", rollout, jax.devices())
    params = jax.device_put(
        int8_cases.params(model), sharding.shardings(decoder.param_axes(model), train)
    )
    placed = handover.rollout_params(params, config=model, layout=rollout, dtype="int8")
    program = handover.lower_rollout_params(params, config=model, layout=rollout, dtype="int8")
    found = re.findall(r"= (\w+)\[([\d,]+)\]\S* all-gather\(", program.compile().as_text())
    sizes = {}
    for kind, shape in found:
        sizes.setdefault(kind, []).append(math.prod(map(int, shape.split(","))))
    own = {True: [], False: []}
    for x in jax.tree.leaves(placed):
        own[x.dtype == jnp.int8].append(math.prod(x.sharding.shard_shape(x.shape)))
    assert 0 < max(sizes.pop("s8")) <= max(own[True])
    # The rest are scales and norms, and the embedding's own bfloat16.
    assert sum(map(sum, sizes.values())) <= sum(own[False])


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        ("dense, tied", "data 4, tensor 2"),
        ("dense, untied", "context 2"),
        ("experts and a dense layer", "data 2, expert 2, tensor 2"),
    ],
)
def test_tokens_on_a_mesh_are_those_of_one_device_but_at_ties(name, mesh):
    model, ties, tokens = MODELS[name], 0, 0
    whole = int8_cases.dequantised(_weights(name)[0], model)
    prompts = {request.prompt_id: request for request in RAGGED}
    for mine, other in zip(_generate(name), _generate(name, mesh), strict=True):
        length = min(len(mine.tokens), len(other.tokens))
        differ = np.flatnonzero(mine.tokens[:length] != other.tokens[:length])
        same = differ[0] if len(differ) else length
        tokens += same
        np.testing.assert_allclose(mine.logprobs[:same], other.logprobs[:same], atol=2e-5)
        if len(differ):
            ties += 1
            logits = cases.teacher_logits(model, whole, RAGGED, [mine])[0][same]
            noise = cases.noise(5, 2, prompts[mine.prompt_id], mine)[same]
            assert cases.boundary_distance(logits, noise) <= 2e-5
    assert tokens > 150
    assert ties <= 1
