"""cuDNN's attention, for GPU: rows of one segment each, padded on the right.

It takes one length per row and no segment ids, so tokens of packed rows would see each other;
`ops.attention.resolve` refuses those. Lengths are counted from the segment ids. The derivative is
jax's own, so the backward pass calls the forward pass again; under one jit, XLA merges the two
identical computations.
"""

import jax
import jax.numpy as jnp

from luspo_jax.ops.attention_blocks import Inputs, Results


def forward_block(inputs, *, causal):
    """Returns Results, `out` in the queries' type, of rows of one segment each."""
    return Results(*_attend(inputs, causal=causal))


def backward_block(inputs, results, grad_BTNH, *, causal):
    """Returns recomputed gradients (dq, dk, dv) in the inputs' type; cannot be part of a ring."""
    del results  # not what cuDNN keeps for its backward pass
    *arrays, segments_BT, segments_BS = inputs

    def out(*arrays):
        return _attend(Inputs(*arrays, segments_BT, segments_BS), causal=causal)[0]

    return jax.vjp(out, *arrays)[1](grad_BTNH.astype(inputs.query.dtype))


def _attend(inputs, *, causal):
    # A row of padding only still gets one token, because a softmax over nothing is not finite.
    lengths_B, key_lengths_B = (
        jnp.maximum(jnp.sum(segments != 0, axis=1, dtype=jnp.int32), 1)
        for segments in (inputs.segments, inputs.key_segments)
    )
    return jax.nn.dot_product_attention(
        inputs.query,
        inputs.key,
        inputs.value,
        is_causal=causal,
        query_seq_lengths=lengths_B,
        key_value_seq_lengths=key_lengths_B,
        implementation="cudnn",
        return_residual=True,
    )
