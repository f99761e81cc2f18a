"""cuDNN's attention, for GPU: rows of one segment each, padded on the right.

It takes a length a row and no segment ids, and would let the tokens of packed rows see each other;
`ops.attention.resolve` refuses those. The lengths are counted from the segment ids. Its derivative
is jax's own, so the backward pass names the forward pass again; under one jit the two are the same
computation, which XLA does once.
"""

import jax
import jax.numpy as jnp


def forward_block(query_BTNH, key_BSKH, value_BSKH, segments_BT, segments_BS, *, causal):
    """(out_BTNH, lse_BTN); arguments as in `reference_attention`, with one segment a row."""
    arrays = (query_BTNH, key_BSKH, value_BSKH)
    return _attend(*arrays, segments_BT, segments_BS, causal=causal)


def backward_block(
    query_BTNH,
    key_BSKH,
    value_BSKH,
    segments_BT,
    segments_BS,
    out_BTNH,
    lse_BTN,
    grad_BTNH,
    *,
    causal,
):
    """Gradients (dq, dk, dv) in the type of the inputs, recomputed; no part of a ring."""
    _, pull = jax.vjp(
        lambda *arrays: _attend(*arrays, segments_BT, segments_BS, causal=causal)[0],
        query_BTNH,
        key_BSKH,
        value_BSKH,
    )
    return pull(grad_BTNH.astype(query_BTNH.dtype))


def _attend(query_BTNH, key_BSKH, value_BSKH, segments_BT, segments_BS, *, causal):
    # A row of padding only still gets one token: a softmax over nothing is not finite.
    lengths_B, key_lengths_B = (
        jnp.maximum(jnp.sum(segments != 0, axis=1, dtype=jnp.int32), 1)
        for segments in (segments_BT, segments_BS)
    )
    return jax.nn.dot_product_attention(
        query_BTNH,
        key_BSKH,
        value_BSKH,
        is_causal=causal,
        query_seq_lengths=lengths_B,
        key_value_seq_lengths=key_lengths_B,
        implementation="cudnn",
        return_residual=True,
    )
