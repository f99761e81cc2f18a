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
