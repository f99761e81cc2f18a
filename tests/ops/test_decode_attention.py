"""One query a row over its cache, against a plain computation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from luspo_jax import sharding
from luspo_jax.ops.decode_attention import (
    CACHE_AXES,
    IMPLEMENTATIONS,
    append_and_attend,
    dealt_positions,
    decode_attention,
)

pytestmark = pytest.mark.usefixtures("strict_dtypes")


def _inputs(L=3, B=5, N=4, K=2, S=13, H=6):
    rng = np.random.default_rng(0)
    query = rng.normal(size=(B, N, H)).astype(np.float32)
    keys, values = rng.normal(size=(2, L, B, K, S, H)).astype(np.float32)
    return query, keys, values, np.array([1, S, S // 4 + 1, S // 2, 3 * S // 4], np.int32)


def _plain(query, keys, values, lengths, layer):
    query, keys, values = (np.asarray(x, np.float64) for x in (query, keys, values))
    out = np.zeros_like(query)
    for b, n in np.ndindex(*query.shape[:2]):
        k, length = n // (query.shape[1] // keys.shape[2]), lengths[b]
        scores = keys[layer, b, k, :length] @ query[b, n] / np.sqrt(query.shape[2])
        weights = np.exp(scores - scores.max())
        out[b, n] = weights / weights.sum() @ values[layer, b, k, :length]
    return out


@pytest.mark.parametrize("implementation", sorted(IMPLEMENTATIONS))
@pytest.mark.parametrize("cache", [{}, {"K": 4}, {"S": 70, "K": 1, "H": 3}, {"S": 128}])
def test_values_match_a_plain_computation(implementation, cache):
    query, keys, values, lengths = _inputs(**cache)
    attend = jax.jit(functools.partial(decode_attention, implementation=implementation))
    for layer in (0, 2):
        got = attend(query, keys, values, layer, lengths_B=lengths)
        np.testing.assert_allclose(got, _plain(query, keys, values, lengths, layer), atol=2e-6)


@pytest.mark.parametrize("implementation", sorted(IMPLEMENTATIONS))
def test_entries_beyond_a_row_and_other_layers_have_no_influence(implementation):
    query, keys, values, lengths = _inputs()
    beyond = np.arange(keys.shape[3]) >= lengths[:, None]
    mask = np.broadcast_to(beyond[None, :, None, :, None], keys.shape).copy()
    mask[[0, 2]] = True
    before, after = (
        decode_attention(query, k, v, 1, lengths_B=lengths, implementation=implementation)
        for k, v in ((keys, values), (np.where(mask, 1e9, keys), np.where(mask, -1e9, values)))
    )
    np.testing.assert_array_equal(before, after)


def test_no_layer_is_copied_on_cpu():
    shapes = [jax.ShapeDtypeStruct((4, 64, 2, 256, 8), jnp.float32)] * 2
    compiled = (
        jax.jit(lambda q, k, v, layer, n: decode_attention(q, k, v, layer, lengths_B=n))
        .lower(
            jax.ShapeDtypeStruct((64, 4, 8), jnp.float32),
            *shapes,
            jax.ShapeDtypeStruct((), jnp.int32),
            jax.ShapeDtypeStruct((64,), jnp.int32),
        )
        .compile()
    )
    one_layer = 64 * 2 * 256 * 8 * 4
    assert compiled.memory_analysis().temp_size_in_bytes < 0.2 * one_layer


def test_bfloat16_cache():
    query, keys, values, lengths = _inputs()
    exact = _plain(query, keys, values, lengths, 1)
    query, keys, values = (jnp.asarray(x, jnp.bfloat16) for x in (query, keys, values))
    rough = decode_attention(query, keys, values, 1, lengths_B=lengths)
    assert rough.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(rough, np.float64), exact, atol=0.04)


def test_an_unknown_implementation_is_refused():
    query, keys, values, lengths = _inputs()
    with pytest.raises(ValueError, match=r"'paged' is unknown; use one of .*'batched'"):
        decode_attention(query, keys, values, 0, lengths_B=lengths, implementation="paged")


# On a mesh.

MESHES = [
    {"data": 2, "context": 4},
    {"fsdp": 2, "tensor": 2, "context": 2},
    {"context": 8},
    {"data": 4, "tensor": 2},
]


def _dealt(entries_S, C):
    """Where entries in order lie among the C parts, one part after the other."""
    return np.concatenate([entries_S[part::C] for part in range(C)])


def _on_mesh(layout, implementation, new, cached, query, layer, positions):
    """Output, and the cache in order again."""
    append = jax.jit(
        functools.partial(append_and_attend, implementation=implementation, layout=layout),
        donate_argnums=2,
    )
    order_S = _dealt(np.arange(cached[0].shape[3]), layout.size("cache_length"))
    cached = tuple(sharding.put(x[:, :, :, order_S], CACHE_AXES, layout) for x in cached)
    out, *written = append(query, new, cached, np.int32(layer), positions_B=positions)
    assert all(x.is_deleted() for x in cached)
    assert all(x.sharding.is_equivalent_to(layout.sharding(CACHE_AXES), 5) for x in written)
    return np.asarray(out), [np.asarray(x)[:, :, :, np.argsort(order_S)] for x in written]


@pytest.mark.parametrize("implementation", sorted(IMPLEMENTATIONS))
@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_a_mesh_writes_one_entry_a_row_and_attends_as_one_device(sizes, implementation):
    layout = sharding.layout("rollout", sizes, jax.devices())
    query, keys, values, _ = _inputs(B=8, S=48)
    rng = np.random.default_rng(1)
    new = tuple(rng.normal(size=(2, 8, 2, 6)).astype(np.float32))
    # The first and last entries of parts and of the row, and one that lies in no part.
    positions = np.array([0, 1, 7, 8, 23, 47, 40, 48], np.int32)
    out, written = _on_mesh(layout, implementation, new, (keys, values), query, 1, positions)
    expected = [keys.copy(), values.copy()]
    for b in range(7):
        for cache, entry in zip(expected, new, strict=True):
            cache[1, b, :, positions[b]] = entry[b]
    for got, want in zip(written, expected, strict=True):
        np.testing.assert_array_equal(got, want)
    plain = _plain(query, *expected, np.minimum(positions + 1, 48), 1)
    np.testing.assert_allclose(out, plain, atol=2e-6)


def test_parts_without_entries_weigh_nothing_beside_any_score():
    """Scores of −1000 in the only part with entries, and huge values in the others."""
    layout = sharding.layout("rollout", {"context": 8}, jax.devices())
    query, keys, values, _ = _inputs(B=8, S=16)
    query, positions = np.full_like(query, 30.0), np.zeros(8, np.int32)
    new = (np.full((8, 2, 6), -15.0, np.float32), np.full((8, 2, 6), 2.5, np.float32))
    values = np.full_like(values, 1e9)
    for implementation in ("rows", "batched"):
        out, _ = _on_mesh(layout, implementation, new, (keys, values), query, 0, positions)
        np.testing.assert_array_equal(out, np.full_like(out, 2.5))


def test_dealt_positions_are_every_cth_with_zeros_to_fill_up():
    layout = sharding.layout("rollout", {"data": 2, "context": 4}, jax.devices())
    x = np.arange(1, 2 * 3 * 10 + 1, dtype=np.float32).reshape(2, 3, 10, 1)
    axes = ("batch", None, None, None)
    deal = sharding.shard_map(
        lambda x: dealt_positions(x, layout), layout, (axes,), ("batch", None, "cache_length", None)
    )
    padded = np.pad(x, ((0, 0), (0, 0), (0, 2), (0, 0)))
    expected = padded[:, :, _dealt(np.arange(12), 4)]
    np.testing.assert_array_equal(jax.jit(deal)(x), expected)


def test_a_mesh_refuses_an_unknown_implementation():
    layout = sharding.layout("rollout", {"data": 2, "context": 4}, jax.devices())
    query, keys, values, _ = _inputs(B=8, S=16)
    new = (query[:, :2], query[:, :2])
    with pytest.raises(ValueError, match=r"'paged' is unknown"):
        append_and_attend(
            query, new, (keys, values), np.int32(0),
            positions_B=np.zeros(8, np.int32), implementation="paged", layout=layout,
        )  # fmt: skip
