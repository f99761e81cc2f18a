"""Inputs of attention, and attention computed densely, for the tests of all its implementations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from luspo_jax import sharding
from luspo_jax.ops.attention import attention, inverse_ring_order, ring_order


def inputs(B, T, N, K, H, dtype=np.float32):
    """(query, key, value, segment ids), rows with up to three segments and then padding."""
    rng = np.random.default_rng(B * T + N)
    query = rng.normal(size=(B, T, N, H)).astype(dtype)
    key, value = rng.normal(size=(2, B, T, K, H)).astype(dtype)
    segments = np.sort(rng.integers(0, 4, (B, T)), axis=1).astype(np.int32)
    segments = np.where(segments == 3, 0, segments + 1)
    segments[0] = 1
    if B > 2:
        segments[1] = 0  # a row of padding only
    return query, key, value, segments


def branched(B, T, N, K, H):
    """The same, rows with two trunks with branches, a segment without, and padding."""
    query, key, value, segments = inputs(B, T, N, K, H)
    rng = np.random.default_rng(B + T)
    for row in segments:
        ids = [1, 1 + 65536, 1 + 2 * 65536, 2, 3, 3 + 65536, 3 + 2 * 65536, 3 + 3 * 65536, 0]
        cuts = np.sort(rng.choice(np.arange(1, T), len(ids) - 1, replace=False))
        row[:] = np.repeat(ids, np.diff([0, *cuts, T]))
    return query, key, value, segments


def cotangent(query):
    """What the output's gradient is taken along."""
    return np.random.default_rng(0).normal(size=query.shape).astype(query.dtype)


def dense(query, key, value, segments, grad, causal=True):
    """(out, dq, dk, dv) in float64 NumPy, all scores at once."""
    query, key, value, grad = (np.asarray(x, np.float64) for x in (query, key, value, grad))
    (B, T, N, H), K = query.shape, key.shape[2]
    key_N, value_N = (np.repeat(x, N // K, axis=2) for x in (key, value))
    sees = segments[:, :, None] == segments[:, None]
    sees |= segments[:, :, None] % 65536 == segments[:, None]  # what a branch continues
    sees &= np.tri(T, dtype=bool) | (not causal)
    scores = np.einsum("btnh,bsnh->bnts", query, key_N) / np.sqrt(H)
    scores = np.where(sees[:, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    out = np.einsum("bnts,bsnh->btnh", weights, value_N)
    dweights = np.einsum("btnh,bsnh->bnts", grad, value_N)
    dscores = weights * (dweights - np.sum(dweights * weights, axis=-1, keepdims=True))
    dscores /= np.sqrt(H)
    dq = np.einsum("bnts,bsnh->btnh", dscores, key_N)
    dk = np.einsum("bnts,btnh->bsnh", dscores, query)
    dv = np.einsum("bnts,btnh->bsnh", weights, grad)
    dk, dv = (x.reshape(B, T, K, N // K, H).sum(axis=3) for x in (dk, dv))
    return out, dq, dk, dv


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _computed(implementation, layout, causal, query, key, value, segments, grad):
    def function(*arrays):
        return attention(
            *arrays,
            segment_ids_BT=segments,
            causal=causal,
            implementation=implementation,
            layout=layout,
        )

    out, pull = jax.vjp(function, query, key, value)
    return out, *pull(grad)


def computed(arrays, grad, implementation="reference", layout=None, causal=True):
    """(out, dq, dk, dv) of an implementation, positions in their own order."""
    T, count = arrays[0].shape[1], layout.size("length") if layout else 1
    order, back = ring_order(T, count), inverse_ring_order(T, count)
    arrays = [jnp.asarray(x)[:, order] for x in (*arrays, grad)]
    results = _computed(implementation, layout, causal, *arrays)
    return [np.asarray(x.astype(jnp.float32))[:, back] for x in results]


def error(got, expected):
    """Largest difference over largest value, the larger of all arrays."""
    return max(
        float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(got, expected, strict=True)
    )


def layout_of(**sizes):
    """The training layout of a mesh over as many of the fake devices as its sizes take."""
    return sharding.layout("train", sizes, jax.devices()[: int(np.prod(list(sizes.values())))])


def assert_unseen_has_no_influence(implementation, layout=None, T=16):
    """Exact: changing a key and value changes only what sees it, and takes no gradient from others.

    Segments of different sizes, padding, and a key changed in each of them.
    """
    query, key, value, _ = inputs(1, T, 4, 2, 4)
    ends = 3 * T // 8, 7 * T // 8
    segments = np.repeat([1, 2, 0], [ends[0], ends[1] - ends[0], T - ends[1]])[None]
    segments = segments.astype(np.int32)
    grad = cotangent(query)
    run = functools.partial(computed, implementation=implementation, layout=layout)
    before = run((query, key, value, segments), grad)
    for changed in (0, T // 2, T - 1):
        key_2, value_2 = key.copy(), value.copy()
        key_2[:, changed] = -3.0
        value_2[:, changed] = 1e9
        sees = (segments[0] == segments[0, changed]) & (np.arange(T) >= changed)
        after = run((query, key_2, value_2, segments), grad)
        for a, b in zip(before[:2], after[:2], strict=True):
            differs = (a != b).any(axis=(0, 2, 3))
            np.testing.assert_array_equal(differs[~sees], False)
        assert (before[0] != after[0]).any(axis=(0, 2, 3))[sees].all()
        silent = np.where(sees[None, :, None, None], np.float32(0), grad)
        for gradient in run((query, key, value, segments), silent)[2:]:
            assert not gradient[:, changed].any()
