"""Attention in plain XLA for every platform: loops over small pieces, memory linear in length.

Flash attention's two passes (Dao et al. 2022) without the online softmax: a piece holds few queries
and all keys up to their end. The loops run over rows, causal blocks, then chunks of queries.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from luspo_jax.ops.attention_blocks import Inputs, Results
from luspo_jax.ops.precision import wide, wide_type
from luspo_jax.ops.segments import sees

NEGATIVE = -1e30  # finite: the exponential of a masked score is exactly zero, never NaN

# Measured on two CPU cores, forward and backward: small pieces that stay in the cache are 2 to 4
# times as fast as one batched einsum; of about 64 queries they take 0.75 to 1.0 of the time of
# those of 32 (T 96 to 4096, N 8 or 9, H 32 or 64).
_CHUNK = 64  # queries at a time, about: chunks divide T with little padding
_BLOCKS = 8  # static pieces of the causal triangle; keys beyond a piece's end are skipped
_CACHED_SCORES = 2**18  # scores at a time, if whole rows fit
_MOST_SCORES = 2**22  # scores at a time at any length; bounds memory


@jax.custom_vjp
def attention(query_BTNH, key_BSKH, value_BSKH, segment_ids_BT):
    """Computes causal attention within segments on one device, as `ops.attention.attention` does.

    The backward pass is differentiable in its cotangent, which length pressure needs.
    """
    return _attention_forward(query_BTNH, key_BSKH, value_BSKH, segment_ids_BT)[0]


def _attention_forward(query_BTNH, key_BSKH, value_BSKH, segment_ids_BT):
    T, arrays = query_BTNH.shape[1], (query_BTNH, key_BSKH, value_BSKH)
    tied_BT = tied(segment_ids_BT, query_BTNH)
    out_BKTGH, lse_BKTG = _forward(Inputs(*arrays, tied_BT, tied_BT), causal=True)
    out_BTNH = _ungrouped(out_BKTGH, T).astype(query_BTNH.dtype)
    results = named(Results(out_BTNH, lse_BKTG))
    return results.out, ((*arrays, segment_ids_BT), results)


def _attention_backward(residuals, grad_BTNH):
    (*arrays, segment_ids_BT), results = tied(residuals, grad_BTNH)
    inputs = Inputs(*arrays, segment_ids_BT, segment_ids_BT)
    grads = _backward(inputs, results, grad_BTNH, causal=True)
    return *(grad.astype(x.dtype) for grad, x in zip(grads, arrays, strict=True)), None


attention.defvjp(_attention_forward, _attention_backward)


def tied(tree, to):
    """Makes the arrays depend on `to`.

    Without this, jax hoists values that do not depend on the loop's turn, such as a segment mask,
    out of the loop when it differentiates: for all chunks at once, a T × T array.
    """
    return lax.stop_gradient(lax.optimization_barrier((tree, to))[0])


def named(results):
    """Names the results of a forward pass, for the remat policies that keep them."""
    out, lse = results
    return Results(checkpoint_name(out, "attention_out"), checkpoint_name(lse, "attention_lse"))


def forward_block(inputs, *, causal):
    """Computes attention of queries over a block of keys; see `attention_blocks`.

    Args:
      inputs: Inputs.
      causal: whether query t sees keys 0 … t only (S = T then), or all.

    Returns:
      Results, float32.
    """
    T = inputs.query.shape[1]
    out_BKTGH, lse_BKTG = _forward(inputs, causal=causal)
    return Results(_ungrouped(out_BKTGH, T), _ungrouped(lse_BKTG[..., None], T)[..., 0])


def backward_block(inputs, results, grad_BTNH, *, causal):
    """Returns the gradients (dq, dk, dv), float32, through these keys; see `attention_blocks`."""
    (B, T, N, _), (S, K) = inputs.query.shape, inputs.key.shape[1:3]
    pieces = _pieces(B, T, S, N, causal)
    # Padding gets weight 0, whatever its scores.
    widths = ((0, 0), (0, -T % pieces[1]), (0, 0), (0, 0))
    lse_BTN1 = jnp.pad(results.lse[..., None], widths, constant_values=-NEGATIVE)
    lse_BKTG = _by_kv_head(lse_BTN1, K, pieces)[..., 0]
    return _backward(inputs, results._replace(lse=lse_BKTG), grad_BTNH, causal=causal)


def _forward(inputs, *, causal):
    """Returns (out, lse) grouped by key head and padded to whole blocks: [B, K, T, G, …]."""
    B, T, N, _ = inputs.query.shape
    pieces = _pieces(B, T, inputs.key.shape[1], N, causal)
    function = functools.partial(_forward_rows, pieces, causal)
    return _over_rows(function, (_grouped(inputs, pieces, causal),), pieces)


def _backward(inputs, results, grad_BTNH, *, causal):
    """Returns the gradients; `results.lse` is grouped and padded, as `_forward` returns it."""
    (B, T, N, H), (S, K) = inputs.query.shape, inputs.key.shape[1:3]
    pieces = _pieces(B, T, S, N, causal)
    grouped = _grouped(inputs, pieces, causal)
    # Σ_s weight · ∂weight of each query, through the output (Dao et al. 2022, eq. 4).
    delta_BTN1 = jnp.sum(wide(results.out) * wide(grad_BTNH), axis=-1, keepdims=True)
    grad_BKTGH, delta_BKTG1 = (_by_kv_head(x, K, pieces) for x in (grad_BTNH, delta_BTN1))
    arrays = (grouped, (results.lse, delta_BKTG1[..., 0], grad_BKTGH))
    dq_BKTGH, dk_BKHS, dv_BKHS = _over_rows(
        functools.partial(_backward_rows, pieces, causal), arrays, pieces
    )
    dk_BSKH, dv_BSKH = (jnp.transpose(x, (0, 3, 1, 2))[:, :S] for x in (dk_BKHS, dv_BKHS))
    return _ungrouped(dq_BKTGH, T) * H**-0.5, dk_BSKH, dv_BSKH


def _pieces(B, T, S, N, causal=True):
    """Returns (rows, block, chunk): rows at a time, queries per block and per chunk of it."""
    chunk = min(T, 8 * math.ceil(T / max(1, round(T / _CHUNK)) / 8))
    while chunk > 1 and N * chunk * S > _MOST_SCORES:
        chunk //= 2
    block = chunk * math.ceil(T / (chunk * (_BLOCKS if causal else 1)))
    fit = max(1, _CACHED_SCORES // (N * chunk * S))
    rows = max(divisor for divisor in range(1, B + 1) if B % divisor == 0 and divisor <= fit)
    return rows, block, chunk


def _grouped(inputs, pieces, causal):
    """Returns Inputs by head, padded to whole blocks; queries scaled and grouped by key head."""
    query_BTNH, key_BSKH, value_BSKH, segments_BT, segments_BS = inputs
    K = key_BSKH.shape[2]
    if causal:  # keys are cut at the same places as queries
        key_BSKH, value_BSKH, segments_BS = (
            _padded(x, pieces) for x in (key_BSKH, value_BSKH, segments_BS)
        )
    return Inputs(
        _by_kv_head(_scaled(query_BTNH), K, pieces),
        jnp.swapaxes(key_BSKH, 1, 2),
        jnp.swapaxes(value_BSKH, 1, 2),
        _padded(segments_BT, pieces),
        segments_BS,
    )


def _scaled(query):
    return (wide(query) * query.shape[-1] ** -0.5).astype(query.dtype)


def _padded(x_BT, pieces):
    widths = [(0, 0)] * x_BT.ndim
    widths[1] = (0, -x_BT.shape[1] % pieces[1])
    return jnp.pad(x_BT, widths)


def _by_kv_head(x_BTNH, K, pieces):
    x_BTNH = _padded(x_BTNH, pieces)
    B, T, N, H = x_BTNH.shape
    return jnp.swapaxes(x_BTNH.reshape(B, T, K, N // K, H), 1, 2)


def _ungrouped(x_BKTGH, T):
    B, K, _, G, H = x_BKTGH.shape
    return jnp.swapaxes(x_BKTGH, 1, 2)[:, :T].reshape(B, T, K * G, H)


def _over_rows(function, arrays, pieces):
    """Applies function(*arrays) to a few rows at a time."""
    rows, B = pieces[0], jax.tree.leaves(arrays)[0].shape[0]
    if rows == B:
        return function(*arrays)
    split = jax.tree.map(lambda x: x.reshape(B // rows, rows, *x.shape[1:]), arrays)
    out = lax.map(lambda part: function(*part), split)
    return jax.tree.map(lambda x: x.reshape(B, *x.shape[2:]), out)


def _over_chunks(function, carry, queries, start, pieces):
    """Scans `function(carry, first, queries)` over the chunks of the block at `start`.

    Arrays of `queries` and of results have queries on axis 2; `first` is the index of a chunk's
    first query.
    """
    _, block, chunk = pieces
    queries = jax.tree.map(lambda x: lax.slice_in_dim(x, start, start + block, axis=2), queries)
    if block == chunk:
        return function(carry, start, queries)

    def split(x):
        x = x.reshape(*x.shape[:2], block // chunk, chunk, *x.shape[3:])
        return jnp.moveaxis(x, 2, 0)

    def join(x):
        x = jnp.moveaxis(x, 0, 2)
        return x.reshape(*x.shape[:2], block, *x.shape[4:])

    firsts = tied(start + chunk * jnp.arange(block // chunk), queries[0])
    carry, out = lax.scan(
        lambda carry, part: function(carry, *part), carry, (firsts, jax.tree.map(split, queries))
    )
    return carry, jax.tree.map(join, out)


class _Keys(NamedTuple):
    """The keys that a block of queries may see, of a few rows."""

    key_RKSH: Any
    value_RKSH: Any
    segments_RS: Any


def _first_keys(inputs, end):
    return _Keys(inputs.key[:, :, :end], inputs.value[:, :, :end], inputs.key_segments[:, :end])


class _Queries(NamedTuple):
    """What the backward pass reads of queries: of a few rows (C = T), or of a chunk of them."""

    query_RKCGH: Any
    segments_R1C: Any
    lse_RKCG: Any
    delta_RKCG: Any
    grad_RKCGH: Any


def _forward_rows(pieces, causal, inputs):
    """Returns the outputs of a few rows, and the logarithms of the softmax's denominators."""
    T, S, block = inputs.query.shape[2], inputs.key.shape[2], pieces[1]
    queries = (inputs.query, inputs.segments[:, None])
    outs = []
    for start in range(0, T, block):
        keys = _first_keys(inputs, start + block if causal else S)
        chunk = functools.partial(_forward_chunk, causal, keys)
        outs.append(_over_chunks(chunk, None, queries, start, pieces)[1])
    return tuple(jnp.concatenate(parts, axis=2) for parts in zip(*outs, strict=True))


def _forward_chunk(causal, keys, carry, first, queries):
    query_RKCGH, segments_R1C = queries
    scores_RKCGS = _dot(query_RKCGH, keys.key_RKSH, 4, 3)
    mask = _mask(segments_R1C, keys.segments_RS, first if causal else None)
    scores_RKCGS = jnp.where(mask, scores_RKCGS, NEGATIVE)
    top = jnp.max(scores_RKCGS, axis=-1, keepdims=True)
    weights_RKCGS = jnp.exp(scores_RKCGS - top)
    total = jnp.sum(weights_RKCGS, axis=-1, keepdims=True)
    out_RKCGH = _dot(weights_RKCGS.astype(keys.value_RKSH.dtype), keys.value_RKSH, 4, 2) / total
    return carry, (out_RKCGH, (top + jnp.log(total))[..., 0])


def _backward_rows(pieces, causal, inputs, of_queries):
    """Gradients of a few rows: scaled queries [R, K, T, G, H]; keys, values [R, K, H, S]."""
    T, block = inputs.query.shape[2], pieces[1]
    R, K, S, H = inputs.key.shape
    queries = _Queries(inputs.query, inputs.segments[:, None], *of_queries)
    dkv = [jnp.zeros((R, K, H, S), wide_type(inputs.key))] * 2
    dqs = []
    for start in range(0, T, block):
        end = start + block if causal else S
        chunk = functools.partial(_backward_chunk, causal, _first_keys(inputs, end))
        dkv_block = [x[..., :end] for x in dkv]
        dkv_block, dq = _over_chunks(chunk, dkv_block, queries, start, pieces)
        dkv = [x.at[..., :end].set(new) for x, new in zip(dkv, dkv_block, strict=True)]
        dqs.append(dq)
    return jnp.concatenate(dqs, axis=2), *dkv


# Length pressure differentiates the backward pass in its cotangent. A chunk's weights are
# recomputed and not kept for that: those of all chunks would be a T × T array.
@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=(0,))
def _backward_chunk(causal, keys, dkv, first, queries):
    query_RKCGH, segments_R1C, lse_RKCG, delta_RKCG, grad_RKCGH = queries
    dtype = query_RKCGH.dtype
    scores_RKCGS = _dot(query_RKCGH, keys.key_RKSH, 4, 3)
    mask = _mask(segments_R1C, keys.segments_RS, first if causal else None)
    weights = jnp.where(mask, jnp.exp(scores_RKCGS - lse_RKCG[..., None]), 0.0)
    dscores = weights * (_dot(grad_RKCGH, keys.value_RKSH, 4, 3) - delta_RKCG[..., None])
    weights, dscores = weights.astype(dtype), dscores.astype(dtype)
    # As [H, S]: the transposed operand is the small one.
    dk_RKHS, dv_RKHS = _dot_queries(query_RKCGH, dscores), _dot_queries(grad_RKCGH, weights)
    return [dkv[0] + dk_RKHS, dkv[1] + dv_RKHS], _dot(dscores, keys.key_RKSH, 4, 2)


def _mask(segments_R1C, segments_RS, first):
    """Returns [R, 1, C, 1, S]: whether query first + c sees key s; no order without `first`."""
    seen_RCS = sees(segments_R1C[:, 0, :, None], segments_RS[:, None, :])
    if first is not None:
        queries_C = first + jnp.arange(segments_R1C.shape[2])
        past_CS = queries_C[:, None] >= jnp.arange(segments_RS.shape[1])[None, :]
        seen_RCS &= past_CS[None]
    return seen_RCS[:, None, :, None]


def _dot(a, b, axis_a, axis_b):
    """Contracts one axis of each, batched over the first two, with float32 sums."""
    dims = (((axis_a,), (axis_b,)), ((0, 1), (0, 1)))
    return lax.dot_general(a, b, dims, preferred_element_type=wide_type(a))


def _dot_queries(a_RKCGH, b_RKCGS):
    dims = (((2, 3), (2, 3)), ((0, 1), (0, 1)))
    return lax.dot_general(a_RKCGH, b_RKCGS, dims, preferred_element_type=wide_type(a_RKCGH))
