"""Copies of the weights: their gradients' sum is the gradient, and each is of its own rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from luspo_jax import sharding
from luspo_jax.learner import copies
from luspo_jax.learner.logprobs import (
    LogprobRule,
    microbatch_logprobs,
    microbatch_logprobs_of_copies,
)
from luspo_jax.learner.rows import put
from luspo_jax.learner.state import param_shardings
from luspo_jax.models import decoder
from luspo_jax.models.forward import Forward
from luspo_jax.types import RowImages, TokenRows
from tests.models import expert_cases
from tests.models.test_vision import _golden
from tests.models.test_vision import batch_of as pictured_batch
from tests.test_mesh import CONFIG

ROWS, TOKENS = 4, 24


def _rows(config):
    rng = np.random.default_rng(0)
    shape = (ROWS, TOKENS)
    real_RT = np.arange(TOKENS) < rng.integers(12, TOKENS + 1, ROWS)[:, None]
    return TokenRows(
        tokens_RT=rng.integers(0, config.vocab_size, shape).astype(np.int32),
        positions_RT=np.tile(np.arange(TOKENS, dtype=np.int32), (ROWS, 1)),
        segment_ids_RT=real_RT.astype(np.int32),
        response_mask_RT=real_RT & (np.arange(TOKENS) > 4),
        rows_per_microbatch=ROWS,
    )


def _pictured_rows():
    config, params, rows, _ = _golden("untied")
    rows = (rows * ROWS)[:ROWS]
    batch = pictured_batch(rows, config, count=4 * ROWS)
    mask_RT = (batch.segments_BT > 0) & (batch.index_BT < 0)
    mask_RT[:, 0] = False
    return (
        config,
        params,
        TokenRows(
            tokens_RT=batch.tokens_BT,
            positions_RT=batch.positions_BT3,
            segment_ids_RT=batch.segments_BT,
            response_mask_RT=mask_RT,
            rows_per_microbatch=ROWS,
            images=RowImages(batch.patches, batch.index_BT),
        ),
    )


def _case(kind):
    if kind == "images":
        return _pictured_rows()
    if kind == "mixture":
        config = expert_cases.config()
        return config, expert_cases.params(config), _rows(config)
    return CONFIG, decoder.init_params(jax.random.key(0), CONFIG), _rows(CONFIG)


def _loss(params, rows, rule, weights_RT, forward):
    found = forward(params, rows, rule=rule)
    total = jnp.sum(weights_RT * (found.logprobs_RT + 0.1 * found.entropy_RT))
    if found.router is not None:
        total += jnp.sum(jnp.cos(jnp.arange(8))[None] * found.router.mass_LE)
    return total, found


@pytest.mark.parametrize("kind", ["dense", "mixture", "images"])
def test_gradients_of_copies_add_up_to_the_gradient(kind):
    config, params, rows = _case(kind)
    weights_RT = np.random.default_rng(1).normal(size=rows.tokens_RT.shape).astype(np.float32)
    layout = sharding.layout("train", {"data": 2, "fsdp": 2}, jax.devices()[:4])
    alone, spread = (LogprobRule(Forward(config, layout=one)) for one in (None, layout))
    step = jax.value_and_grad(_loss, has_aux=True)
    whole = jax.jit(functools.partial(step, rule=alone, forward=microbatch_logprobs))
    (_, expected), expected_grads = whole(params, rows, weights_RT=weights_RT)

    @jax.jit
    def of_copies(params, rows):
        forward = microbatch_logprobs_of_copies
        own = copies.copied(params, spread.how)
        out, grads = step(own, rows, spread, weights_RT, forward)
        grads = copies.constrained(grads, spread.how)
        return out, grads, copies.summed(grads, spread.how)

    placed = jax.device_put(params, param_shardings(spread.how))
    (_, found), each, grads = of_copies(placed, put(rows, layout))
    for path, x in jax.tree_util.tree_leaves_with_path(grads):
        want = functools.reduce(lambda tree, key: tree[key.key], path, expected_grads)
        error = np.abs(np.asarray(x) - np.asarray(want)).max()
        assert error <= 2e-5 * np.abs(want).max(), jax.tree_util.keystr(path)
    for x, want in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, want, atol=2e-5)
    # The second copy's gradient is that of the second half of the rows.
    half_RT = np.where(np.arange(ROWS)[:, None] >= ROWS // 2, weights_RT, 0)
    if kind == "dense":
        (_, _), half = whole(params, rows, weights_RT=half_RT)
        error = np.abs(np.asarray(each["head"])[1] - np.asarray(half["head"])).max()
        assert error <= 2e-5 * np.abs(half["head"]).max()
    own = {name: x for name, x in each.items() if name != "vision"}
    assert {x.shape[0] for x in jax.tree.leaves(own)} == {2}


def test_without_a_data_axis_weights_have_no_copies():
    for sizes in (None, {"fsdp": 4}):
        layout = sharding.layout("train", sizes, jax.devices()[:4]) if sizes else None
        how = Forward(CONFIG, layout=layout)
        params = {"head": jnp.ones((96, 64))}
        assert not copies.has_copies(how)
        assert copies.copied(params, how) is params
        assert copies.summed(params, how) is params
