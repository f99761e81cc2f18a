"""Weights handed from training to rollout: the same numbers, and no more of them than it takes."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from luspo_jax import sharding
from luspo_jax.models import decoder
from luspo_jax.rollout import handover
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
