"""The ring gives one device's attention, holds no whole row, and sends only to a neighbour."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from luspo_jax.ops import reference_attention
from luspo_jax.ops.attention import attention
from luspo_jax.ops.ring_attention import inverse_ring_order, ring_order
from tests.ops import attention_cases as cases

pytestmark = pytest.mark.usefixtures("strict_dtypes")


@pytest.mark.parametrize(("length", "count"), [(16, 2), (24, 4), (48, 8), (7, 1)])
def test_ring_order_deals_each_device_its_chunks_and_inverts(length, count):
    order = ring_order(length, count)
    assert order.shape == (length,)
    np.testing.assert_array_equal(order[inverse_ring_order(length, count)], np.arange(length))
    np.testing.assert_array_equal(inverse_ring_order(length, count)[order], np.arange(length))
    if count == 1:
        np.testing.assert_array_equal(order, np.arange(length))
        return
    size = length // (2 * count)
    for i, part in enumerate(order.reshape(count, -1)):
        first, last = i * size, (2 * count - 1 - i) * size
        np.testing.assert_array_equal(part[:size], np.arange(first, first + size))
        np.testing.assert_array_equal(part[size:], np.arange(last, last + size))
    # Each device's queries see as many keys.
    assert len({int((part + 1).sum()) for part in order.reshape(count, -1)}) == 1


def test_a_length_that_does_not_cut_is_refused():
    with pytest.raises(ValueError, match=r"36 tokens.*4 context devices.*multiple of 8.*to 40"):
        ring_order(36, 4)
    query, key, value, segments = cases.inputs(1, 12, 2, 2, 4)
    layout = cases.layout_of(context=8)
    with pytest.raises(ValueError, match=r"12 tokens.*8 context devices.*pad the rows to 16"):
        attention(query, key, value, segment_ids_BT=segments, layout=layout)


@pytest.mark.parametrize(
    "sizes",
    [
        {"context": 2},
        {"context": 4},
        {"context": 8},
        {"context": 4, "data": 2},
        {"context": 2, "tensor": 2, "data": 2},
    ],
    ids=str,
)
def test_the_ring_gives_values_and_gradients_of_one_device(sizes):
    arrays = cases.inputs(4, 32, 4, 2, 8)
    grad = cases.cotangent(arrays[0])
    ours = cases.computed(arrays, grad, layout=cases.layout_of(**sizes))
    assert cases.error(ours, cases.computed(arrays, grad)) < 1e-6
    assert cases.error(ours, cases.dense(*arrays, grad)) < 1e-6


@pytest.mark.parametrize("count", [2, 4])
def test_the_future_and_other_segments_have_no_influence(count):
    cases.assert_unseen_has_no_influence("reference", cases.layout_of(context=count))


def test_bfloat16_parts_are_joined_in_float32():
    """A ring is as far from the exact result as one device: rounding happens once, at the end."""
    arrays = cases.inputs(2, 64, 4, 2, 8)
    rough = tuple(jnp.asarray(x, jnp.bfloat16) for x in arrays[:3])
    arrays = (*(np.asarray(x.astype(jnp.float32)) for x in rough), arrays[3])
    grad = jnp.asarray(cases.cotangent(arrays[0]), jnp.bfloat16)
    exact = cases.dense(*arrays, np.asarray(grad.astype(jnp.float32)))
    inputs = (*rough, arrays[3])
    ring = cases.error(cases.computed(inputs, grad, layout=cases.layout_of(context=4)), exact)
    alone = cases.error(cases.computed(inputs, grad), exact)
    assert ring < 0.01
    assert ring < 1.25 * alone


def test_the_pullback_has_a_derivative_in_its_cotangent():
    """Length pressure transposes the backward pass; here against the directional derivative."""
    layout = cases.layout_of(context=2, data=2)
    query, key, value, segments = cases.inputs(2, 16, 4, 2, 4)
    order = ring_order(16, 2)
    query, key, value, segments = (jnp.asarray(x)[:, order] for x in (query, key, value, segments))
    direction = [jnp.asarray(cases.cotangent(x)) for x in (query, key, value)]

    @functools.partial(jax.jit, static_argnums=0)
    def along(layout, arrays, direction):
        def function(*arrays):
            return attention(*arrays, segment_ids_BT=segments, layout=layout)

        out, pull = jax.vjp(function, *arrays)
        return jax.vjp(pull, jnp.zeros_like(out))[1](tuple(direction))[0]

    def masked_softmax(query, key, value):
        key, value = (jnp.repeat(x, 2, axis=2) for x in (key, value))
        sees = (segments[:, :, None] == segments[:, None]) & (order[:, None] >= order)[None]
        scores = jnp.einsum("btnh,bsnh->bnts", query, key) * jnp.float32(0.5)
        scores = jnp.where(sees[:, None], scores, -jnp.inf)
        return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores), value)

    arrays = (query, key, value)
    _, expected = jax.jvp(masked_softmax, arrays, tuple(direction))
    ours = along(layout, arrays, direction)
    assert cases.error([np.asarray(ours)], [np.asarray(expected)]) < 1e-6


@functools.cache
def _compiled(length, **sizes):
    """Forward and backward of [2, length, 4, 16] as a compiled program."""
    layout = cases.layout_of(**sizes)

    def shape(dims, axes, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(dims, dtype, sharding=layout.sharding(axes))

    query = shape((2, length, 4, 16), ("batch", "length", "heads", None))
    key = shape((2, length, 2, 16), ("batch", "length", "kv_heads", None))
    segments = shape((2, length), ("batch", "length"), jnp.int32)

    def both(query, key, value, segments, grad):
        function = lambda *x: attention(*x, segment_ids_BT=segments, layout=layout)  # noqa: E731
        out, pull = jax.vjp(function, query, key, value)
        return out, pull(grad)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference_attention, "_BLOCKS", 1)  # less to compile
        return jax.jit(both).lower(query, key, key, segments, query).compile()


def test_nothing_is_gathered_and_no_array_is_long_in_two_ways():
    length = 4096
    text = _compiled(length, context=4, data=2).as_text()
    assert "collective-permute" in text
    for operation in ("all-gather", "all-to-all", "all-reduce"):
        assert operation not in text
    # A device holds 1024 positions of a row; no array has more, or has them twice.
    shapes = re.findall(r"\b(?:f32|bf16|s32|pred|u32|f16)\[([\d,]+)\]", text)
    dims = [sorted(int(d) for d in dims.split(",")) for dims in set(shapes)]
    assert max(d[-1] for d in dims) == length // 4
    assert max(d[-2] for d in dims if len(d) > 1) < length // 8


def test_memory_grows_with_the_length_and_not_with_its_square():
    temporaries = [
        _compiled(length, context=4, data=2).memory_analysis().temp_size_in_bytes
        for length in (4096, 16384)
    ]
    assert temporaries[1] < 4.2 * temporaries[0]
