"""Attention over rows that hold many short sequences: each is gathered, and computed by itself.

A packed row costs its whole triangle where nothing skips the keys that a query does not see. Here
sequences are taken out of the rows into arrays [sequences, width], attention is computed there by
`reference_attention`, and its results are put back in their places: the rest of the model computes
dense rows, and attention the sequences alone. A branch's queries see two blocks of keys:
their own, and those of their trunk (`ops.segments`), which are joined.
"""

import math

import jax
import jax.numpy as jnp

from luspo_jax.ops import reference_attention as reference
from luspo_jax.ops.attention_blocks import Inputs, Results
from luspo_jax.ops.moves import moved
from luspo_jax.ops.ring_attention import joined
from luspo_jax.types import Sequences


@jax.custom_vjp
def attention(query_RTNH, key_RTKH, value_RTKH, sequences: Sequences):
    """Computes causal attention within sequences on one device, as `ops.attention.attention` does.

    The backward pass is differentiable in its cotangent, which length pressure needs.
    """
    return _forward(query_RTNH, key_RTKH, value_RTKH, sequences)[0]


def _forward(query_RTNH, key_RTKH, value_RTKH, sequences):
    arrays = (query_RTNH, key_RTKH, value_RTKH)
    own, trunks, over = _blocks(arrays, sequences)
    results = reference.forward_block(own, causal=True)
    parts = [results]
    if trunks is not None:
        parts[0] = joined(results, reference.forward_block(over, causal=False))
        parts.append(reference.forward_block(trunks, causal=True))
    outs, lses = zip(*parts, strict=True)
    out_RTNH = _put(outs, sequences).astype(query_RTNH.dtype)
    found = reference.named(Results(out_RTNH, _put(lses, sequences)))
    return found.out, (arrays, sequences, found)


def _backward(residuals, grad_RTNH):
    arrays, sequences, found = reference.tied(residuals, grad_RTNH)
    own, trunks, over = _blocks(arrays, sequences)
    outs, lses, grads = (_taken(x, sequences) for x in (*found, grad_RTNH))
    results = Results(outs[0], lses[0])
    of_own = list(reference.backward_block(own, results, grads[0], causal=True))
    if trunks is None:
        return *_as(arrays, [_put([x], sequences) for x in of_own]), None
    dq, *of_keys = reference.backward_block(over, results, grads[0], causal=False)
    of_own[0] += dq
    results = Results(outs[1], lses[1])
    of_trunks = list(reference.backward_block(trunks, results, grads[1], causal=True))
    # Summed over the branches of each trunk; as a product, which is quick and has a transpose.
    members_BC = jax.nn.one_hot(
        sequences.trunks_B, sequences.trunk_starts_C.shape[0], dtype=dq.dtype
    )
    for i, of_branches in enumerate(of_keys, start=1):
        of_trunks[i] += jnp.einsum("bc,bskh->cskh", members_BC, of_branches)
    put = [_put(parts, sequences) for parts in zip(of_own, of_trunks, strict=True)]
    return *_as(arrays, put), None


attention.defvjp(_forward, _backward)


def _as(arrays, grads):
    return [grad.astype(x.dtype) for grad, x in zip(grads, arrays, strict=True)]


def _blocks(arrays, sequences):
    """Returns Inputs of the sequences' own tokens, of trunks, and of the first over the second."""
    query, key, value = (_taken(x, sequences) for x in arrays)
    ids_BW = _real(sequences.counts_B, sequences.width).astype(jnp.int32)
    own = Inputs(query[0], key[0], value[0], ids_BW, ids_BW)
    if not sequences.trunk_width:
        return own, None, None
    ids_CW = _real(sequences.trunk_counts_C, sequences.trunk_width).astype(jnp.int32)
    trunks = Inputs(query[1], key[1], value[1], ids_CW, ids_CW)
    # Of no trunk: the last one's keys, with an id that no query has.
    at_B = jnp.minimum(sequences.trunks_B, ids_CW.shape[0] - 1)
    has_B1 = (sequences.trunks_B < ids_CW.shape[0])[:, None]
    keys_BW = jnp.where(has_B1 & (ids_CW[at_B] > 0), 1, -1)
    return own, trunks, Inputs(query[0], key[1][at_B], value[1][at_B], ids_BW, keys_BW)


def _real(counts, width):
    return jnp.arange(width)[None] < counts[:, None]


def _taken(x_RT, sequences):
    """Takes [R, T, …] to ([B, W, …], [C, W', …]); the second is left out without trunks."""
    at_M, shapes = _tokens(sequences)
    rest = x_RT.shape[2:]
    taken = moved(x_RT.reshape(-1, *rest), at_M, sequences.places_RT.reshape(-1))
    parts = jnp.split(taken, [math.prod(shapes[0])])
    return [x.reshape(*shape, *rest) for x, shape in zip(parts, shapes, strict=False)]


def _put(parts, sequences):
    """Puts results for each sequence, and each trunk, back in their places: [R, T, …]."""
    rest = parts[0].shape[2:]
    values = jnp.concatenate([x.reshape(-1, *rest) for x in parts])
    put = moved(values, sequences.places_RT.reshape(-1), _tokens(sequences)[0])
    return put.reshape(*sequences.places_RT.shape, *rest)


def _tokens(sequences):
    """Returns the token at every place, N at those of none, and the shapes of the two kinds."""
    kinds = [(sequences.starts_B, sequences.counts_B, sequences.width)]
    if sequences.trunk_width:
        kinds.append((sequences.trunk_starts_C, sequences.trunk_counts_C, sequences.trunk_width))
    at = [
        jnp.where(
            _real(counts, width),
            starts[:, None] + jnp.arange(width)[None],
            sequences.places_RT.size,
        )
        for starts, counts, width in kinds
    ]
    return jnp.concatenate([x.reshape(-1) for x in at]), [x.shape for x in at]
