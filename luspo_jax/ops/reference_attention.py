"""Attention in plain XLA for every platform: loops over small pieces, memory linear in length.

Flash attention's two passes (Dao et al. 2022) without the online softmax: a piece holds few queries
and all keys up to their end. The loops run over rows, causal blocks, then chunks of queries.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from luspo_jax.ops.precision import wide, wide_type

NEGATIVE = -1e30  # finite: the exponential of a masked score is exactly zero, never NaN

# Measured on two CPU cores at B 64, T 192, N 8, K 4, H 32: small pieces that stay in the cache are
# 4 times as fast as one batched einsum forward, 2 times with the backward pass.
_CHUNK = 32  # queries at a time
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
    T = query_BTNH.shape[1]
    arrays = (query_BTNH, key_BSKH, value_BSKH, tied(segment_ids_BT, query_BTNH))
    out_BKTGH, lse_BKTG = _forward(*arrays, arrays[-1], causal=True)
    out_BTNH = _ungrouped(out_BKTGH, T).astype(query_BTNH.dtype)
    out_BTNH, lse_BKTG = named(out_BTNH, lse_BKTG)
    return out_BTNH, (query_BTNH, key_BSKH, value_BSKH, segment_ids_BT, out_BTNH, lse_BKTG)


def _attention_backward(residuals, grad_BTNH):
    *arrays, segment_ids_BT, out_BTNH, lse_BKTG = tied(residuals, grad_BTNH)
    segments = (segment_ids_BT, segment_ids_BT)
    grads = _backward(*arrays, *segments, out_BTNH, lse_BKTG, grad_BTNH, causal=True)
    return *(grad.astype(x.dtype) for grad, x in zip(grads, arrays, strict=True)), None


attention.defvjp(_attention_forward, _attention_backward)


def tied(tree, to):
    """Makes the arrays depend on `to`.

    Without this, jax hoists values that do not depend on the loop's turn, such as a segment mask,
    out of the loop when it differentiates: for all chunks at once, a T × T array.
    """
    return lax.stop_gradient(lax.optimization_barrier((tree, to))[0])


def named(out, lse):
    """Names a forward pass's results, for the remat policies that keep them."""
    return checkpoint_name(out, "attention_out"), checkpoint_name(lse, "attention_lse")


def forward_block(query_BTNH, key_BSKH, value_BSKH, segments_BT, segments_BS, *, causal):
    """Computes attention of queries over a block of keys, in a form that joins with other blocks.

    Args:
      query_BTNH: queries.
      key_BSKH: keys.
      value_BSKH: values.
      segments_BT: int32 segment ids of the queries.
      segments_BS: int32 segment ids of the keys.
      causal: whether query t sees keys 0 … t only (S = T then), or all.

    Returns:
      (out_BTNH, lse_BTN): weighted values and log Σ_s exp(score), float32. If a query sees no key,
      `out` is finite and `lse` so low that its weight beside any other block is exactly 0.
    """
    T = query_BTNH.shape[1]
    out_BKTGH, lse_BKTG = _forward(
        query_BTNH, key_BSKH, value_BSKH, segments_BT, segments_BS, causal=causal
    )
    return _ungrouped(out_BKTGH, T), _ungrouped(lse_BKTG[..., None], T)[..., 0]


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
    """Returns the gradients (dq, dk, dv), float32, through these keys.

    Arguments as in `forward_block`. `out_BTNH` and `lse_BTN` come from the queries' attention over
    all their keys, including those of other blocks; `grad_BTNH` is the cotangent of `out_BTNH`.
    """
    T, S, N = query_BTNH.shape[1], key_BSKH.shape[1], query_BTNH.shape[2]
    pieces = _pieces(query_BTNH.shape[0], T, S, N, causal)
    # Padding gets weight 0, whatever its scores.
    widths = ((0, 0), (0, -T % pieces[1]), (0, 0), (0, 0))
    lse_BTN1 = jnp.pad(lse_BTN[..., None], widths, constant_values=-NEGATIVE)
    lse_BKTG = _by_kv_head(lse_BTN1, key_BSKH.shape[2], pieces)[..., 0]
    arrays = (query_BTNH, key_BSKH, value_BSKH, segments_BT, segments_BS)
    return _backward(*arrays, out_BTNH, lse_BKTG, grad_BTNH, causal=causal)


def _forward(query_BTNH, key_BSKH, value_BSKH, segments_BT, segments_BS, *, causal):
    B, T, N, _ = query_BTNH.shape
    pieces = _pieces(B, T, key_BSKH.shape[1], N, causal)
    arrays = _grouped(query_BTNH, key_BSKH, value_BSKH, segments_BT, segments_BS, pieces, causal)
    return _over_rows(functools.partial(_forward_rows, pieces, causal), arrays, pieces)


def _backward(
    query_BTNH,
    key_BSKH,
    value_BSKH,
    segments_BT,
    segments_BS,
    out_BTNH,
    lse_BKTG,
    grad_BTNH,
    *,
    causal,
):
    B, T, N, H = query_BTNH.shape
    S, K = key_BSKH.shape[1:3]
    pieces = _pieces(B, T, S, N, causal)
    arrays = _grouped(query_BTNH, key_BSKH, value_BSKH, segments_BT, segments_BS, pieces, causal)
    # Σ_s weight · ∂weight of each query, through the output (Dao et al. 2022, eq. 4).
    delta_BTN1 = jnp.sum(wide(out_BTNH) * wide(grad_BTNH), axis=-1, keepdims=True)
    grad_BKTGH, delta_BKTG1 = (_by_kv_head(x, K, pieces) for x in (grad_BTNH, delta_BTN1))
    arrays = (*arrays, lse_BKTG, delta_BKTG1[..., 0], grad_BKTGH)
    dq_BKTGH, dk_BKHS, dv_BKHS = _over_rows(
        functools.partial(_backward_rows, pieces, causal), arrays, pieces
    )
    dk_BSKH, dv_BSKH = (jnp.transpose(x, (0, 3, 1, 2))[:, :S] for x in (dk_BKHS, dv_BKHS))
    return _ungrouped(dq_BKTGH, T) * H**-0.5, dk_BSKH, dv_BSKH


def _pieces(B, T, S, N, causal=True):
    """Returns (rows, block, chunk): rows at a time, queries per block and per chunk of it."""
    chunk = min(_CHUNK, T)
    while chunk > 1 and N * chunk * S > _MOST_SCORES:
        chunk //= 2
    block = chunk * math.ceil(T / (chunk * (_BLOCKS if causal else 1)))
    fit = max(1, _CACHED_SCORES // (N * chunk * S))
    rows = max(divisor for divisor in range(1, B + 1) if B % divisor == 0 and divisor <= fit)
    return rows, block, chunk


def _grouped(query_BTNH, key_BSKH, value_BSKH, segments_BT, segments_BS, pieces, causal):
    """Returns head-major arrays, padded to whole blocks; queries scaled and grouped by key head."""
    K = key_BSKH.shape[2]
    if causal:  # keys are cut at the same places as queries
        key_BSKH, value_BSKH, segments_BS = (
            _padded(x, pieces) for x in (key_BSKH, value_BSKH, segments_BS)
        )
    return (
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
    rows, B = pieces[0], arrays[0].shape[0]
    if rows == B:
        return function(*arrays)
    split = [x.reshape(B // rows, rows, *x.shape[1:]) for x in arrays]
    out = lax.map(lambda part: function(*part), split)
    return jax.tree.map(lambda x: x.reshape(B, *x.shape[2:]), out)


def _over_chunks(function, carry, arrays, start, pieces):
    """Scans `function(carry, first, *chunk)` over the chunks of the block at `start`.

    `arrays` and results have queries on axis 2; `first` is the index of a chunk's first query.
    """
    _, block, chunk = pieces
    arrays = [lax.slice_in_dim(x, start, start + block, axis=2) for x in arrays]
    if block == chunk:
        return function(carry, start, *arrays)

    def split(x):
        x = x.reshape(*x.shape[:2], block // chunk, chunk, *x.shape[3:])
        return jnp.moveaxis(x, 2, 0)

    def join(x):
        x = jnp.moveaxis(x, 0, 2)
        return x.reshape(*x.shape[:2], block, *x.shape[4:])

    firsts = tied(start + chunk * jnp.arange(block // chunk), arrays[0])
    carry, out = lax.scan(
        lambda carry, part: function(carry, *part), carry, (firsts, *map(split, arrays))
    )
    return carry, jax.tree.map(join, out)


def _forward_rows(pieces, causal, query_RKTGH, key_RKSH, value_RKSH, segments_RT, segments_RS):
    """Returns the outputs of a few rows, and the logarithms of the softmax's denominators."""
    T, S, block = query_RKTGH.shape[2], key_RKSH.shape[2], pieces[1]
    outs = []
    for start in range(0, T, block):
        end = start + block if causal else S
        keys, values, segments = key_RKSH[:, :, :end], value_RKSH[:, :, :end], segments_RS[:, :end]

        def chunk(carry, first, query_RKCGH, segments_R1C, k=keys, v=values, s=segments):
            scores_RKCGS = _dot(query_RKCGH, k, 4, 3)
            mask = _mask(segments_R1C, s, first if causal else None)
            scores_RKCGS = jnp.where(mask, scores_RKCGS, NEGATIVE)
            top = jnp.max(scores_RKCGS, axis=-1, keepdims=True)
            weights_RKCGS = jnp.exp(scores_RKCGS - top)
            total = jnp.sum(weights_RKCGS, axis=-1, keepdims=True)
            out_RKCGH = _dot(weights_RKCGS.astype(v.dtype), v, 4, 2) / total
            return carry, (out_RKCGH, (top + jnp.log(total))[..., 0])

        outs.append(
            _over_chunks(chunk, None, (query_RKTGH, segments_RT[:, None]), start, pieces)[1]
        )
    return tuple(jnp.concatenate(parts, axis=2) for parts in zip(*outs, strict=True))


def _backward_rows(
    pieces, causal, query_RKTGH, key_RKSH, value_RKSH, segments_RT, segments_RS, *rest
):
    """Gradients of a few rows: scaled queries [R, K, T, G, H]; keys, values [R, K, H, S]."""
    T, block = query_RKTGH.shape[2], pieces[1]
    R, K, S, H = key_RKSH.shape
    dkv = [jnp.zeros((R, K, H, S), wide_type(key_RKSH))] * 2
    dqs = []
    for start in range(0, T, block):
        end = start + block if causal else S
        chunk = functools.partial(
            _backward_chunk,
            causal,
            key_RKSH[:, :, :end],
            value_RKSH[:, :, :end],
            segments_RS[:, :end],
        )
        dkv_block, dq = _over_chunks(
            chunk,
            [x[..., :end] for x in dkv],
            (query_RKTGH, segments_RT[:, None], *rest),
            start,
            pieces,
        )
        dkv = [x.at[..., :end].set(new) for x, new in zip(dkv, dkv_block, strict=True)]
        dqs.append(dq)
    return jnp.concatenate(dqs, axis=2), *dkv


# Length pressure differentiates the backward pass in its cotangent. A chunk's weights are
# recomputed and not kept for that: those of all chunks would be a T × T array.
@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=(0,))
def _backward_chunk(
    causal,
    keys,
    values,
    segments_RS,
    dkv,
    first,
    query_RKCGH,
    segments_R1C,
    lse_RKCG,
    delta_RKCG,
    grad,
):
    dtype = query_RKCGH.dtype
    scores_RKCGS = _dot(query_RKCGH, keys, 4, 3)
    mask = _mask(segments_R1C, segments_RS, first if causal else None)
    weights = jnp.where(mask, jnp.exp(scores_RKCGS - lse_RKCG[..., None]), 0.0)
    dscores = weights * (_dot(grad, values, 4, 3) - delta_RKCG[..., None])
    weights, dscores = weights.astype(dtype), dscores.astype(dtype)
    # As [H, S]: the transposed operand is the small one.
    dk_RKHS, dv_RKHS = _dot_queries(query_RKCGH, dscores), _dot_queries(grad, weights)
    return [dkv[0] + dk_RKHS, dkv[1] + dv_RKHS], _dot(dscores, keys, 4, 2)


def _mask(segments_R1C, segments_RS, first):
    """Returns [R, 1, C, 1, S]: whether query first + c sees key s; no order without `first`."""
    same_RCS = segments_R1C[:, 0, :, None] == segments_RS[:, None, :]
    if first is not None:
        queries_C = first + jnp.arange(segments_R1C.shape[2])
        past_CS = queries_C[:, None] >= jnp.arange(segments_RS.shape[1])[None, :]
        same_RCS &= past_CS[None]
    return same_RCS[:, None, :, None]


def _dot(a, b, axis_a, axis_b):
    """Contracts one axis of each, batched over the first two, with float32 sums."""
    dims = (((axis_a,), (axis_b,)), ((0, 1), (0, 1)))
    return lax.dot_general(a, b, dims, preferred_element_type=wide_type(a))


def _dot_queries(a_RKCGH, b_RKCGS):
    dims = (((2, 3), (2, 3)), ((0, 1), (0, 1)))
    return lax.dot_general(a_RKCGH, b_RKCGS, dims, preferred_element_type=wide_type(a_RKCGH))
