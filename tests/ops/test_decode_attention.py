"""One query a row over its cache, against a plain computation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from luspo_jax.ops.decode_attention import IMPLEMENTATIONS, decode_attention

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
