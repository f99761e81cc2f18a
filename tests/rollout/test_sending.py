"""Weights sent in pieces from where the policy is trained: the sampler's numbers, none lost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from luspo_jax import sharding
from luspo_jax.hosts.roles import Roles
from luspo_jax.models import decoder
from luspo_jax.rollout import handover, sending
from tests.rollout import rollout_cases as cases

MODEL = cases.config(98, model_type="qwen3")


@pytest.mark.parametrize("piece_bytes", [1, 1000, 1 << 26])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("meshes", [(None, None), ({"fsdp": 2, "tensor": 2}, {"tensor": 2})])
def test_what_is_sent_is_what_is_handed_over(monkeypatch, meshes, dtype, piece_bytes):
    """One process in both roles; its training and its rollout are on other devices."""
    monkeypatch.setattr(sending, "_PIECE_BYTES", piece_bytes)
    params, axes = cases.random_params(MODEL), decoder.param_axes(MODEL)
    train = rollout = None
    if meshes[0]:
        train = sharding.layout("train", meshes[0], jax.devices()[:4])
        rollout = sharding.layout("rollout", meshes[1], jax.devices()[4:6])
        spread = jax.device_put(params, sharding.shardings(axes, train))
    else:
        spread = jax.tree.map(jnp.asarray, params)
    how = {"config": MODEL, "layout": rollout, "dtype": dtype}

    sent = sending.sent_params(spread, Roles(), **how)

    expected = handover.rollout_params(spread, **how)
    assert jax.tree.structure(sent) == jax.tree.structure(expected)
    for x, y in zip(*map(jax.tree.leaves, (sent, expected)), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim)


def test_a_process_that_only_trains_keeps_no_weights_of_the_sampler():
    class Trains(Roles):
        samples = False

    params = jax.tree.map(jnp.asarray, cases.random_params(MODEL))
    how = {"config": MODEL, "layout": None, "dtype": "bfloat16"}
    assert sending.sent_params(params, Trains(), **how) is None
