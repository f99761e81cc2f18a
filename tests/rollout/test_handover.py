"""Weights handed from training to rollout: the same numbers, and no more of them than it takes."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from luspo_jax import sharding
from luspo_jax.models import decoder, low_rank
from luspo_jax.models.forward import Forward
from luspo_jax.models.low_rank import Adapter
from luspo_jax.rollout import Cache, Engine, Sampling, handover
from tests.models import expert_cases
from tests.rollout import rollout_cases as cases

MODEL = cases.config(98, model_type="qwen3")
MESHES = [  # of training, and of the rollout
    ({"fsdp": 8}, {"data": 4, "tensor": 2}),
    ({"fsdp": 2, "context": 4}, {"data": 2, "context": 2, "tensor": 2}),
    ({"data": 2, "fsdp": 4}, {"data": 8}),
    ({"fsdp": 4, "tensor": 2}, {"data": 4, "tensor": 2}),
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("train", "rollout"), MESHES)
def test_handing_over(train, rollout, dtype):
    train = sharding.layout("train", train, jax.devices())
    rollout = sharding.layout("rollout", rollout, jax.devices())
    params, axes = cases.random_params(MODEL), decoder.param_axes(MODEL)
    spread = jax.device_put(params, sharding.shardings(axes, train))

    placed = handover.rollout_params(spread, config=MODEL, layout=rollout, dtype=dtype)

    where = sharding.shardings(axes, rollout)
    for x, original, place in zip(*map(jax.tree.leaves, (placed, params, where)), strict=True):
        np.testing.assert_array_equal(x, jnp.asarray(original, dtype))
        assert x.sharding.is_equivalent_to(place, x.ndim)
    program = handover.lower_rollout_params(spread, config=MODEL, layout=rollout, dtype=dtype)
    gathered = re.findall(r"= \w+\[([\d,]+)\]\S* all-gather\(", program.compile().as_text())
    largest = max(math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(placed))
    assert gathered
    assert max(math.prod(map(int, shape.split(","))) for shape in gathered) <= largest


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_handing_over_from_a_mesh_in_another_order(dtype):
    train = sharding.layout("train", {"fsdp": 4, "tensor": 2}, jax.devices())
    order = [jax.devices()[i] for i in (0, 4, 2, 6, 3, 7, 1, 5)]
    grid = np.array(order).reshape(train.mesh.devices.shape)
    train = sharding.Layout(jax.sharding.Mesh(grid, train.mesh.axis_names), "train")
    rollout = sharding.layout("rollout", {"data": 4, "tensor": 2}, jax.devices())
    params, axes = cases.random_params(MODEL), decoder.param_axes(MODEL)
    spread = jax.device_put(params, sharding.shardings(axes, train))

    moved = jax.device_put(
        spread, sharding.in_order_of(rollout, spread)
    )  # parts go whole from device to device
    for x, y in zip(*map(jax.tree.leaves, (spread, moved)), strict=True):
        parts = [{s.device.id: s.data for s in z.addressable_shards} for z in (x, y)]
        for i, device in enumerate(order):
            np.testing.assert_array_equal(parts[0][device.id], parts[1][i])

    placed = handover.rollout_params(spread, config=MODEL, layout=rollout, dtype=dtype)
    where = sharding.shardings(axes, rollout)
    for x, original, place in zip(*map(jax.tree.leaves, (placed, params, where)), strict=True):
        np.testing.assert_array_equal(x, jnp.asarray(original, dtype))
        assert x.sharding.is_equivalent_to(place, x.ndim)


MIXTURE = expert_cases.config(8, 2, num_layers=3, dense_layers=(1,))


@pytest.mark.parametrize(
    ("model", "base", "train", "rollout"),
    [
        (MODEL, "float32", {"data": 8}, {"data": 8}),
        (MODEL, "nf4", {"fsdp": 8}, {"data": 4, "tensor": 2}),
        (MODEL, "int8", {"data": 2, "fsdp": 4}, {"data": 2, "context": 2, "tensor": 2}),
        (MIXTURE, "float32", {"fsdp": 2, "expert": 4}, {"data": 4, "expert": 2}),
        (MIXTURE, "nf4", {"fsdp": 8}, {"data": 2, "expert": 2, "tensor": 2}),
    ],
    ids=lambda x: "mixture" if x is MIXTURE else "dense" if x is MODEL else None,
)
def test_an_adapter_apart_samples_as_the_merged_weights_of_one_device(model, base, train, rollout):
    """Rounded or not, the sampler's matrices are the trainer's: log-probs within 1e-5."""
    adapter = Adapter(rank=2, alpha=4.0, base=base, experts=model is MIXTURE)
    train = sharding.layout("train", train, jax.devices())
    rollout = sharding.layout("rollout", rollout, jax.devices())
    random = cases.random_params if model is MODEL else expert_cases.params
    axes = decoder.param_axes(model)

    def policy(layout):
        how = Forward(model, layout=layout, adapter=adapter)
        params = jax.device_put(random(model), sharding.shardings(axes, layout))
        frozen, made = low_rank.begun(jax.random.key(1), params, axes, adapter, layout)
        places = sharding.shardings(decoder.trained_axes(how), layout)
        shift = lambda x: x + 0.1 * jnp.sin(jnp.arange(x.size)).reshape(x.shape)  # noqa: E731
        made = jax.jit(lambda made: jax.tree.map(shift, made), out_shardings=places)(made)
        return how, decoder.whole_params(frozen, made, how)

    how, spread = policy(train)
    placed = handover.apart_params(spread, how=how, layout=rollout)
    where = sharding.shardings(decoder.whole_axes(how), rollout)
    for x, original, place in zip(*map(jax.tree.leaves, (placed, spread, where)), strict=True):
        assert x.dtype == original.dtype
        np.testing.assert_array_equal(x, original)
        assert x.sharding.is_equivalent_to(place, x.ndim)

    sampler = Forward(model, layout=rollout, adapter=adapter)
    engine = Engine(
        sampler, Sampling(12, (0,)), num_slots=8, max_prompt_length=9, chunk_length=6,
        cache=Cache(None, 4),
    )  # fmt: skip
    requests = cases.requests_of([3, 9, 1, 6], model.vocab_size)
    responses, _ = engine.generate(placed, requests, group_size=2, seed=5, step=2)
    # Frozen weights of few bits leave others in bfloat16; the forward pass here is of float32.
    merged = jax.tree.map(lambda x: x.astype(jnp.float32), low_rank.merged_tree(policy(None)[1]))
    found = cases.teacher_logits(model, merged, requests, responses)
    assert sum(len(r.tokens) for r in responses) > 50
    for logits, response in zip(found, responses, strict=True):
        own = cases.log_softmax(logits)[np.arange(len(response.tokens)), response.tokens]
        np.testing.assert_allclose(response.logprobs, own, atol=1e-5)


@pytest.mark.parametrize("base", ["float32", "nf4"])
def test_an_adapter_apart_travels_to_devices_of_their_own(base):
    adapter = Adapter(rank=2, alpha=4.0, base=base)
    train = sharding.layout("train", {"fsdp": 4}, jax.devices()[:4])
    rollout = sharding.layout("rollout", {"data": 2, "tensor": 2}, jax.devices()[4:])
    how, axes = Forward(MODEL, layout=train, adapter=adapter), decoder.param_axes(MODEL)
    params = jax.device_put(cases.random_params(MODEL), sharding.shardings(axes, train))
    frozen, made = low_rank.begun(jax.random.key(1), params, axes, adapter, train)
    spread = decoder.whole_params(frozen, made, how)
    placed = handover.apart_params(spread, how=how, layout=rollout)
    for x, original in zip(*map(jax.tree.leaves, (placed, spread)), strict=True):
        assert x.sharding.device_set == set(jax.devices()[4:])
        np.testing.assert_array_equal(x, np.asarray(original))
