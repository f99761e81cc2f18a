"""Attention over rows sharded along their length: keys and values travel around a ring.

A ring, rather than gathering all keys and values on every device, because at lengths that require
sharding a row, memory per device is the limit. Gathered keys and values, and the sums of their
gradients, grow with the whole length. In a ring a device holds its own part and the one that has
just arrived, whatever the number of devices. The traffic is the same and overlaps with the work on
the part that arrived before (Liu et al. 2023, arXiv:2310.01889).

A causal row cut into `count` contiguous parts would leave the first device idle most of the time.
So a row is cut into 2·count chunks, and device i holds chunks i and 2·count − 1 − i, the "ring
order". A device then has the same work in each turn. In the first turn it processes its own two
chunks (causal, and the later one over the earlier). In each later turn it processes two whole pairs
of chunks: its later chunk over the earlier one that arrived, and either its earlier chunk over that
same one (if they come from before it) or its later chunk over the later one (if they come from
after it). All other pairs are in the future; they are never computed, and no branch is needed.

Parts are joined by their log-sum-exp in float32. The first turn includes each query's own key, so a
part in which a query sees nothing gets weight exactly 0.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from luspo_jax.ops.attention_blocks import Inputs, Results
from luspo_jax.ops.precision import wide, wide_type


def ring_order(length: int, count: int) -> np.ndarray:
    """Returns the position at each index of a row whose length is sharded over `count` devices.

    `x_ring = x[ring_order(length, count)]`: the row is 2·count chunks, and part i of the result
    holds chunks i and 2·count − 1 − i. With one device it is the row itself.

    Returns:
      int64 positions [length].

    Raises:
      ValueError: 2·count does not divide the length.
    """
    if count == 1:
        return np.arange(length)
    check_length(length, count)
    chunks = np.arange(length).reshape(2 * count, -1)
    return np.stack([chunks[:count], chunks[count:][::-1]], axis=1).reshape(-1)


def inverse_ring_order(length: int, count: int) -> np.ndarray:
    """Returns the index of each position: `x = x_ring[inverse_ring_order(length, count)]`."""
    return np.argsort(ring_order(length, count))


def check_length(length: int, count: int) -> None:
    """Refuses a row length that does not give two equal chunks to each of `count` devices."""
    if length % (2 * count):
        raise ValueError(
            f"rows of {length} tokens cannot be cut over {count} context devices: each holds two "
            f"equal chunks, so the length must be a multiple of {2 * count}; pad the rows to "
            f"{length + -length % (2 * count)}"
        )


def forward_ring(block, axis, count, inputs):
    """Returns the Results, float32, of this device's queries over the keys of all devices.

    For use inside `shard_map`; arrays are the device's own parts, in ring order.

    Args:
      block: the `forward_block` of an implementation.
      axis: name of the mesh axis.
      count: its size.
      inputs: Inputs whose queries and keys are at the same positions, of the same segments.
    """
    index, keys = lax.axis_index(axis), (inputs.key, inputs.value, inputs.segments)
    arriving = _passed_on(keys, axis, count)  # in transit while the device's own keys are read
    queries = (inputs.query, inputs.segments)
    own = _attend(block, _both(queries), _both(keys), causal=True)
    early, late = _halves(own, axis=0)
    whole = _attend(block, _late(queries), _early(keys), causal=False)
    state = early, joined(late, whole)

    def turn(state, step):
        (early, late), keys = state
        arriving = _passed_on(keys, axis, count)
        before = step <= index  # the keys come from a device before this one
        parts = _attend(block, _pairs(before, queries), _pair_keys(before, keys), causal=False)
        first, second = _halves(parts, axis=0)
        late = joined(late, first)
        # One of the two adds the second part, the other nothing.
        early = joined(early, _silenced(second, before))
        late = joined(late, _silenced(second, ~before))
        return ((early, late), arriving), None

    (state, _), _ = lax.scan(turn, (state, arriving), jnp.arange(1, count))
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), *state)


def backward_ring(block, axis, count, inputs, results, grad_BTNH):
    """Returns gradients (dq, dk, dv), float32; those of keys and values travel around with them.

    Arguments as in `forward_ring`; `block` is a `backward_block`, `results` are the ring's, and
    `grad_BTNH` is the cotangent of their `out`.
    """
    index, keys = lax.axis_index(axis), (inputs.key, inputs.value, inputs.segments)
    arriving = _passed_on(keys, axis, count)
    queries = (inputs.query, inputs.segments, results, grad_BTNH)
    dq, dk, dv = (
        jnp.concatenate(_halves(x, axis=0), axis=1)
        for x in _pull(block, _both(queries), _both(keys), causal=True)
    )
    dq_late, dk_early, dv_early = _pull(block, _late(queries), _early(keys), causal=False)
    dq, dk, dv = _added(dq, dq_late, 1), _added(dk, dk_early, 0), _added(dv, dv_early, 0)

    def turn(state, step):
        dq, dkv, keys = state
        arriving = _passed_on(keys, axis, count)
        dkv = _passed_on(dkv, axis, count)
        before = step <= index
        dqs, dks, dvs = _pull(
            block, _pairs(before, queries), _pair_keys(before, keys), causal=False
        )
        first, second = _halves(dqs, axis=0)
        dq = _added(_added(dq, first, 1), second, jnp.where(before, 0, 1))
        dkv = tuple(
            _added(
                _added(x, new[: len(new) // 2], 0), new[len(new) // 2 :], jnp.where(before, 0, 1)
            )
            for x, new in zip(dkv, (dks, dvs), strict=True)
        )
        return (dq, dkv, arriving), None

    (dq, dkv, _), _ = lax.scan(turn, (dq, (dk, dv), arriving), jnp.arange(1, count))
    return dq, *_passed_on(dkv, axis, count)


def _passed_on(arrays, axis, count):
    """Passes arrays one device on around the ring; the last passes to the first."""
    ring = [(i, (i + 1) % count) for i in range(count)]
    return jax.tree.map(lambda x: lax.ppermute(x, axis, ring), arrays)


# ---------------------------------------------------------------- halves of a device's length


def _halves(tree, axis=1):
    """Splits each array into its first and second half along an axis, as two trees."""
    size = jax.tree.leaves(tree)[0].shape[axis] // 2
    cut = lambda start: jax.tree.map(  # noqa: E731
        lambda x: lax.slice_in_dim(x, start, start + size, axis=axis), tree
    )
    return cut(0), cut(size)


def _early(tree):
    return _halves(tree)[0]


def _late(tree):
    return _halves(tree)[1]


def _stacked(first, second):
    """Stacks two halves as twice the rows."""
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=0), first, second)


def _both(tree):
    return _stacked(*_halves(tree))


def _chosen(early_one, tree):
    return jax.tree.map(functools.partial(jnp.where, early_one), *_halves(tree))


def _pairs(before, queries):
    """Returns the queries of a turn's two pairs: the later chunk, then one chunk by source.

    The second is the earlier chunk if the keys come from before this device, else the later again.
    """
    return _stacked(_late(queries), _chosen(before, queries))


def _pair_keys(before, keys):
    """Returns the keys of the pairs: the earlier chunk, then it again if from before."""
    return _stacked(_early(keys), _chosen(before, keys))


def _added(total, part, half):
    """Adds `part` to half 0 or 1 of `total`; `half` may be traced."""
    size = part.shape[1]
    old = lax.dynamic_slice_in_dim(total, half * size, size, axis=1)
    return lax.dynamic_update_slice_in_dim(total, old + part, half * size, axis=1)


# ---------------------------------------------------------------- one block, and joining two


def _attend(block, queries, keys, *, causal):
    (query, segments_q), (key, value, segments_k) = queries, keys
    out, lse = block(Inputs(query, key, value, segments_q, segments_k), causal=causal)
    return Results(wide(out), lse)


def _pull(block, queries, keys, *, causal):
    (query, segments_q, results, grad), (key, value, segments_k) = queries, keys
    inputs = Inputs(query, key, value, segments_q, segments_k)
    return tuple(map(wide, block(inputs, results, grad, causal=causal)))


def joined(a, b):
    """Joins the results of two parts into those of the union of their keys."""
    (out_a, lse_a), (out_b, lse_b) = a, b
    top = jnp.maximum(lse_a, lse_b)
    weight_a, weight_b = jnp.exp(lse_a - top), jnp.exp(lse_b - top)
    total = weight_a + weight_b
    out = (out_a * weight_a[..., None] + out_b * weight_b[..., None]) / total[..., None]
    return Results(out, top + jnp.log(total))


def _silenced(part, kept):
    """Returns the part if `kept`, else one with weight 0."""
    nothing = jnp.asarray(-jnp.inf, wide_type(part.lse))
    return part._replace(lse=jnp.where(kept, part.lse, nothing))
