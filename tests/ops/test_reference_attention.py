"""Attention against a plain float64 computation, and the arrays it must not make."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from luspo_jax.ops import reference_attention as module
from luspo_jax.ops.attention import attention
from luspo_jax.ops.attention_blocks import Inputs, Results
from tests.ops import attention_cases as cases

pytestmark = pytest.mark.usefixtures("strict_dtypes")


def _plain(query, key, value, segments):
    """Every query by itself, in float64."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    B, T, N, H = query.shape
    out = np.zeros_like(query)
    for b, t, n in np.ndindex(B, T, N):
        k = n // (N // key.shape[2])
        sees = (segments[b] == segments[b, t]) & (np.arange(T) <= t)
        scores = np.where(sees, key[b, :, k] @ query[b, t, n] / np.sqrt(H), -np.inf)
        weights = np.exp(scores - scores.max())
        out[b, t, n] = weights / weights.sum() @ value[b, :, k]
    return out


@jax.jit
def _attention(query, key, value, segments):
    return attention(query, key, value, segment_ids_BT=segments)


@pytest.mark.parametrize(
    "shape",
    [
        (2, 9, 4, 2, 8),
        (3, 5, 3, 1, 4),
        (1, 40, 2, 2, 6),
        (1, 1, 2, 1, 2),
        (4, 21, 4, 2, 4),
        (2, 97, 4, 2, 8),
        (2, 150, 4, 2, 8),
    ],
)
def test_values_match_a_plain_computation(shape):
    inputs = cases.inputs(*shape)
    got = _attention(*inputs)
    np.testing.assert_allclose(got, _plain(*inputs), atol=3e-6)


def test_pieces_give_the_values_and_gradients_of_one_piece(monkeypatch):
    inputs = cases.inputs(4, 21, 4, 2, 4)
    weights = np.random.default_rng(0).normal(size=inputs[0].shape).astype(np.float32)

    def values_and_gradients():
        out, vjp = jax.vjp(jax.jit(lambda *x: module.attention(*x, inputs[3])), *inputs[:3])
        return out, *jax.jit(vjp)(weights)

    whole = values_and_gradients()
    # Now every loop turns: rows, causal blocks that do not divide T, chunks of a block.
    monkeypatch.setattr(module, "_CHUNK", 8)
    monkeypatch.setattr(module, "_BLOCKS", 2)
    monkeypatch.setattr(module, "_CACHED_SCORES", 2 * 4 * 8 * 21)
    assert module._pieces(4, 21, 21, 4) == (2, 16, 8)
    for a, b in zip(values_and_gradients(), whole, strict=True):
        np.testing.assert_allclose(a, b, atol=5e-6)


def test_gradients_match_those_of_a_masked_softmax():
    query, key, value, segments = cases.inputs(3, 12, 4, 2, 4)
    weights = np.random.default_rng(0).normal(size=query.shape).astype(np.float32)

    def masked_softmax(query, key, value):
        key, value = (jnp.repeat(x, 2, axis=2) for x in (key, value))
        scores = jnp.einsum("btnh,bsnh->bnts", query, key) * jnp.float32(0.5)
        sees = (segments[:, :, None] == segments[:, None]) & np.tri(12, dtype=bool)
        scores = jnp.where(sees[:, None], scores, -jnp.inf)
        return jnp.sum(jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores), value) * weights)

    def ours(query, key, value):
        out = attention(query, key, value, segment_ids_BT=segments)
        return jnp.sum(out * weights)

    expected, got = (
        jax.jit(jax.grad(f, argnums=(0, 1, 2)))(query, key, value) for f in (masked_softmax, ours)
    )
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=5e-6)


@pytest.mark.parametrize("changed", [0, 7, 13, 19])
def test_the_future_and_other_segments_have_no_influence(changed):
    """Exact: neither the values of the others, nor the gradients that reach this position."""
    query, key, value, _ = cases.inputs(1, 20, 4, 2, 4)
    segments = np.array([[1] * 6 + [2] * 10 + [0] * 4], np.int32)
    key_2, value_2 = key.copy(), value.copy()
    key_2[:, changed] = -3.0
    value_2[:, changed] = 1e9
    before = np.asarray(_attention(query, key, value, segments))
    after = np.asarray(_attention(query, key_2, value_2, segments))
    sees = (segments[0] == segments[0, changed]) & (np.arange(20) >= changed)
    np.testing.assert_array_equal((before != after).any(axis=(0, 2, 3)), sees)

    def of_unseeing(key, value):
        out = attention(query, key, value, segment_ids_BT=segments)
        return jnp.sum(out * jnp.where(sees, 0.0, 1.0)[None, :, None, None])

    for gradient in jax.jit(jax.grad(of_unseeing, argnums=(0, 1)))(key, value):
        assert not np.asarray(gradient)[:, changed].any()


def test_extreme_scores_stay_finite():
    query, key, value, segments = cases.inputs(3, 10, 2, 1, 4)
    loss = lambda q, k, v: jnp.sum(attention(q, k, v, segment_ids_BT=segments))  # noqa: E731
    for scale in (np.float32(0), np.float32(1e4)):
        gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(scale * query, scale * key, value)
        assert all(np.isfinite(g).all() for g in gradients)


def test_bfloat16_sums_in_float32():
    query, key, value, segments = cases.inputs(2, 16, 4, 2, 8)
    exact = _plain(query, key, value, segments)
    rough = _attention(*(jnp.asarray(x, jnp.bfloat16) for x in (query, key, value)), segments)
    assert rough.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(rough, np.float64), exact, atol=0.04)


def test_no_array_grows_with_the_square_of_the_length(monkeypatch):
    """Forward and backward at 1 × 8192, 2 heads: one T × T float32 array alone is 256 MiB."""
    monkeypatch.setattr(module, "_BLOCKS", 2)  # less to compile
    shapes = [jax.ShapeDtypeStruct((1, 8192, 2, 8), jnp.float32)] * 3
    segments = jax.ShapeDtypeStruct((1, 8192), jnp.int32)
    loss = lambda q, k, v, s: jnp.sum(attention(q, k, v, segment_ids_BT=s))  # noqa: E731
    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*shapes, segments).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 32 * 2**20


@pytest.mark.parametrize(("T", "S"), [(6, 9), (40, 8), (5, 33)])
def test_a_block_off_the_diagonal_sees_all_keys_of_its_segment(T, S):
    """Keys in two blocks, joined by hand, are attention over both; so are their gradients."""
    rng = np.random.default_rng(T)
    query = rng.normal(size=(2, T, 4, 8)).astype(np.float32)
    key, value = rng.normal(size=(2, 2, S, 2, 8)).astype(np.float32)
    segments_q, segments_k = rng.integers(0, 3, (2, T)), rng.integers(0, 3, (2, S))
    segments_k[:, :3] = [0, 1, 2]  # every query sees a key, and some of the first block none
    grad = cases.cotangent(query)

    def masked_softmax(query, key, value):
        key, value = (jnp.repeat(x, 2, axis=2) for x in (key, value))
        scores = jnp.einsum("btnh,bsnh->bnts", query, key) * jnp.float32(8**-0.5)
        sees = segments_q[:, :, None] == segments_k[:, None]
        scores = jnp.where(sees[:, None], scores, -jnp.inf)
        return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores), value)

    expected, pull = jax.vjp(jax.jit(masked_softmax), query, key, value)
    cut = 2
    parts = [slice(0, cut), slice(cut, S)]
    forward = jax.jit(functools.partial(module.forward_block, causal=False))
    backward = jax.jit(functools.partial(module.backward_block, causal=False))
    blocks = [Inputs(query, key[:, p], value[:, p], segments_q, segments_k[:, p]) for p in parts]
    outs, lses = zip(*map(forward, blocks), strict=True)
    lse = np.logaddexp(*lses)
    weights = [np.exp(part - lse)[..., None] for part in lses]
    out = sum(w * o for w, o in zip(weights, outs, strict=True))
    assert cases.error([out], [np.asarray(expected)]) < 1e-6
    grads = [backward(block, Results(out, lse), grad) for block in blocks]
    dq = grads[0][0] + grads[1][0]
    dk, dv = (np.concatenate([part[i] for part in grads], axis=1) for i in (1, 2))
    assert cases.error([dq, dk, dv], [np.asarray(x) for x in pull(grad)]) < 1e-6
