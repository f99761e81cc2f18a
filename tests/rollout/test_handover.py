"""Weights go from the training mesh to the rollout's in one program, cast on the way."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from luspo_jax import sharding
from luspo_jax.models import decoder
from luspo_jax.models.decoder_config import DecoderConfig
from luspo_jax.rollout.handover import lower_rollout_params, rollout_params

CONFIG = DecoderConfig(
    "qwen2", 24, 2, 16, 32, 4, 2, 8, 1e4, 1e-6, True, False, False, 64
)  # fmt: skip


def _trained(sizes):
    layout = sharding.layout("train", sizes, jax.devices())
    return decoder.init_params(jax.random.key(0), CONFIG, layout=layout)


def _rollout(**sizes):
    return sharding.layout("rollout", {"data": -1, **sizes}, jax.devices())


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("tensor", [1, 2])
def test_the_sampler_gets_the_same_numbers_where_it_reads_them(dtype, tensor):
    params, layout = _trained({"fsdp": 4, "tensor": 2}), _rollout(tensor=tensor)
    placed = rollout_params(params, config=CONFIG, layout=layout, dtype=dtype)
    where = sharding.shardings(decoder.param_axes(CONFIG), layout)
    for x, y, place in zip(*map(jax.tree.leaves, (params, placed, where)), strict=True):
        assert y.dtype == dtype
        assert y.sharding.is_equivalent_to(place, y.ndim)
        np.testing.assert_array_equal(np.asarray(x).astype(dtype), y)


def test_what_travels_is_the_cast_array():
    params, layout = _trained({"fsdp": 8}), _rollout()
    lowered = lower_rollout_params(params, config=CONFIG, layout=layout, dtype=jnp.bfloat16)
    gathers = [line for line in lowered.compile().as_text().splitlines() if " all-gather(" in line]
    # XLA on CPU sends bfloat16 as float32, after the cast.
    assert gathers
    assert all("all-gather(%convert" in line or "= bf16[" in line for line in gathers)


def test_one_device_gives_its_own_arrays():
    params = decoder.init_params(jax.random.key(0), CONFIG)
    assert rollout_params(params, config=CONFIG, layout=None, dtype=jnp.float32) is params
