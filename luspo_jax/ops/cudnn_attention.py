"""cuDNN's attention, for GPU: rows of one segment each, padded on the right.

It takes one length per row and no segment ids, so tokens of packed rows would see each other;
`ops.attention.resolve` refuses those. Lengths are counted from the segment ids. The derivative is
jax's own, so the backward pass calls the forward pass again; under one jit, XLA merges the two
identical computations.
"""

import jax
import jax.numpy as jnp


def forward_block(query_BTNH, key_BSKH, value_BSKH, segments_BT, segments_BS, *, causal):
    """Returns (out_BTNH, lse_BTN); arguments as in `reference_attention`, one segment a row."""
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
    """Returns recomputed gradients (dq, dk, dv) in the inputs' type; cannot be part of a ring."""
    _, pull = jax.vjp(
        lambda *arrays: _attend(*arrays, segments_BT, segments_BS, causal=causal)[0],
        query_BTNH,
        key_BSKH,
        value_BSKH,
    )
    return pull(grad_BTNH.astype(query_BTNH.dtype))


def _attend(query_BTNH, key_BSKH, value_BSKH, segments_BT, segments_BS, *, causal):
    # A row of padding only still gets one token, because a softmax over nothing is not finite.
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
