"""One optimizer step of an adapter on 8 fake devices is that of one device."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from luspo_jax import objectives, sharding
from luspo_jax.learner.logprobs import LogprobRule
from luspo_jax.learner.rows import put
from luspo_jax.learner.state import (
    UpdateRule,
    initial_state,
    state_shardings,
    with_base,
    without_base,
)
from luspo_jax.learner.step import update_step
from luspo_jax.models import decoder, low_rank
from luspo_jax.models.forward import Forward
from luspo_jax.models.low_rank import Adapter
from luspo_jax.rollout import handover
from tests import test_mesh
from tests.models import expert_cases

ADAPTER = Adapter(rank=4, alpha=8.0, base="float32")
DENSE = test_mesh.CONFIG
MIXTURE = expert_cases.config(8, 2, num_layers=3, dense_layers=(1,))


def _moved(x):
    return x + 0.02 * jnp.sin(jnp.arange(x.size)).reshape(x.shape)


def _stepped(model, adapter, sizes):
    """(state, metrics, the sampler's weights) after a step."""
    layout = sharding.layout("train", sizes, jax.devices()) if sizes else None
    how = Forward(model, remat="full", layout=layout, adapter=adapter)
    rule = UpdateRule(
        LogprobRule(how, head_chunk_tokens=64),
        objectives.preset("luspo", kl_coef=0.01),
        test_mesh.OPTIMIZER,
        max_grad_norm=1.0,
        copies_reference=False,
    )
    params = decoder.init_params(jax.random.key(0), model, layout=layout)
    base, made = low_rank.begun(
        jax.random.key(1), params, decoder.param_axes(model), adapter, layout
    )
    # B is not zero, so that A has a gradient.
    places = sharding.shardings(decoder.trained_axes(how), layout)
    made = jax.jit(lambda made: jax.tree.map(_moved, made), out_shardings=places)(made)
    state = with_base(initial_state(made, rule), base)
    batch = test_mesh._batch()
    if model.num_experts:
        batch = dataclasses.replace(batch, rows=dataclasses.replace(batch.rows, expert_ids=None))
    before = state_shardings(without_base(state), rule)
    state, metrics = update_step(
        state, put(batch, layout), test_mesh.RATE, np.float32(0), rule=rule
    )
    if layout is not None:
        kept = jax.tree.map(
            lambda x, s: s.is_equivalent_to(x.sharding, x.ndim), without_base(state), before
        )
        assert all(jax.tree.leaves(kept))
    rollout = sharding.layout("rollout", {"data": 4, "tensor": 2}, jax.devices()) if sizes else None
    whole = decoder.whole_params(state.base, state.params, how)
    sampled = handover.rollout_params(whole, config=model, layout=rollout, dtype="float32")
    # The first moment is 0.1 · the clipped gradient.
    return jax.device_get((state.opt_state[0].mu, state.params, metrics, sampled))


@pytest.mark.parametrize(
    ("mesh", "base"),
    [("data2-fsdp4", "float32"), ("context4-data2", "float32"), ("fsdp4-tensor2", "nf4")],
)
def test_a_step_is_that_of_one_device(mesh, base):
    adapter = dataclasses.replace(ADAPTER, base=base)
    _check(DENSE, adapter, test_mesh.MESHES[mesh])


@pytest.mark.parametrize(
    ("mesh", "base"),
    [
        ("fsdp 2, expert 4", "int8"),
        pytest.param("data 2, expert 2, tensor 2", "float32", marks=pytest.mark.slow),
    ],
)
def test_a_step_of_a_mixture_is_that_of_one_device(mesh, base):
    adapter = dataclasses.replace(ADAPTER, base=base, experts=True)
    _check(MIXTURE, adapter, expert_cases.MESHES[mesh])


@pytest.mark.parametrize("mesh", ["data2-fsdp4", "fsdp4-tensor2"])
def test_principal_parts_are_those_of_one_device(mesh):
    """Of one kernel the singular vectors could have the other sign, and training another path."""
    adapter = dataclasses.replace(ADAPTER, init="pissa")
    axes = decoder.param_axes(DENSE)
    params = decoder.init_params(jax.random.key(0), DENSE)
    layout = sharding.layout("train", test_mesh.MESHES[mesh], jax.devices())
    spread = jax.device_put(params, sharding.shardings(axes, layout))
    expected = low_rank.begun(jax.random.key(1), params, axes, adapter, None)
    got = low_rank.begun(jax.random.key(1), spread, axes, adapter, layout)
    for part, of_axes in zip(got, (axes, low_rank.adapter_axes(axes, adapter)), strict=True):
        where = sharding.shardings(of_axes, layout)
        same = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), part, where)
        assert all(jax.tree.leaves(same))
    assert test_mesh._worst(*map(jax.device_get, (got, expected))) <= 2e-6
    _check(DENSE, adapter, test_mesh.MESHES[mesh])


def _check(model, adapter, sizes):
    expected = _stepped(model, adapter, None)
    got = _stepped(model, adapter, sizes)
    for a, b in zip(got, expected, strict=True):
        assert test_mesh._worst(a, b) <= 2e-5
