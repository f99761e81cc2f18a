"""Causal attention within segments."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from luspo_jax.ops.precision import wide, wide_type

NEGATIVE = -1e30  # finite: the exponential of a masked score is exactly zero, never NaN

# Measured on two CPU cores at B 64, T 192, N 8, K 4, H 32: small pieces that stay in the cache
# beat one batched einsum 4 times forward and 2 times with the backward pass.
_CHUNK = 32  # queries at a time
_BLOCKS = 8  # static pieces of the causal triangle; keys beyond a piece's end are skipped
_CACHED_SCORES = 2**18  # scores at a time while whole rows fit
_MOST_SCORES = 2**22  # scores at a time at any length; bounds memory


def attention(
    query_BTNH,
    key_BSKH,
    value_BSKH,
    *,
    segment_ids_BT,
    implementation="reference",
    layout=None,
):
    """softmax(q·k / √H) v over the keys of the same segment that are not in the future.

    Order is that of the arrays (S = T). Query head n reads key head n // (N / K). Scores, softmax
    and sums are float32. The reference loops over rows: where rows are spread over devices, call
    it within `shard_map`, so that each loops over its own.

    Args:
      query_BTNH: queries, already rotated.
      key_BSKH: keys, already rotated.
      value_BSKH: values.
      segment_ids_BT: int32, 0 on padding (whose outputs are finite and mean nothing).
      implementation: a key of IMPLEMENTATIONS.

    Returns:
      Weighted values [B, T, N, H] in the type of the queries.

    Raises:
      ValueError: on an unknown implementation, naming the known ones.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"attention implementation {implementation!r} is unknown; "
            f"use one of {sorted(IMPLEMENTATIONS)}"
        )
    if layout is not None:
        from luspo_jax import sharding

        q, k = ("batch", "length", "heads", None), ("batch", "length", "kv_heads", None)
        return sharding.shard_map(
            IMPLEMENTATIONS[implementation], layout, [q, k, k, ("batch", "length")], q
        )(query_BTNH, key_BSKH, value_BSKH, segment_ids_BT)
    return IMPLEMENTATIONS[implementation](query_BTNH, key_BSKH, value_BSKH, segment_ids_BT)


# ---------------------------------------------------------------- reference
# Flash attention's two passes (Dao et al. 2022) without its online softmax: a piece holds few
# queries and all keys before their end. Rows, then causal blocks, then chunks of queries.


@jax.custom_vjp
def _reference(query_BTNH, key_BSKH, value_BSKH, segment_ids_BT):
    return _reference_forward(query_BTNH, key_BSKH, value_BSKH, segment_ids_BT)[0]


def _reference_forward(query_BTNH, key_BSKH, value_BSKH, segment_ids_BT):
    B, T, N, _ = query_BTNH.shape
    pieces = _pieces(B, T, N)
    arrays = _grouped(query_BTNH, key_BSKH, value_BSKH, segment_ids_BT, pieces)
    out_BKTGH, lse_BKTG = _over_rows(functools.partial(_forward_rows, pieces), arrays, pieces)
    out_BTNH = _ungrouped(out_BKTGH, T).astype(query_BTNH.dtype)
    return out_BTNH, (query_BTNH, key_BSKH, value_BSKH, segment_ids_BT, out_BTNH, lse_BKTG)


def _reference_backward(residuals, grad_BTNH):
    query_BTNH, key_BSKH, value_BSKH, segment_ids_BT, out_BTNH, lse_BKTG = residuals
    B, T, N, H = query_BTNH.shape
    K = key_BSKH.shape[2]
    pieces = _pieces(B, T, N)
    arrays = _grouped(query_BTNH, key_BSKH, value_BSKH, segment_ids_BT, pieces)
    # Σ_s weight · ∂weight of each query, by way of the output (Dao et al. 2022, eq. 4).
    delta_BTN1 = jnp.sum(wide(out_BTNH) * wide(grad_BTNH), axis=-1, keepdims=True)
    grad_BKTGH, delta_BKTG1 = (_by_kv_head(x, K, pieces) for x in (grad_BTNH, delta_BTN1))
    arrays = (*arrays, lse_BKTG, delta_BKTG1[..., 0], grad_BKTGH)
    dq_BKTGH, dk_BKHT, dv_BKHT = _over_rows(
        functools.partial(_backward_rows, pieces), arrays, pieces
    )
    dk_BTKH, dv_BTKH = (jnp.transpose(x, (0, 3, 1, 2))[:, :T] for x in (dk_BKHT, dv_BKHT))
    dq_BTNH = _ungrouped(dq_BKTGH, T) * H**-0.5
    return (
        dq_BTNH.astype(query_BTNH.dtype),
        dk_BTKH.astype(key_BSKH.dtype),
        dv_BTKH.astype(value_BSKH.dtype),
        None,
    )


_reference.defvjp(_reference_forward, _reference_backward)


def _pieces(B, T, N):
    """(rows, block, chunk): rows at a time, and queries in a block and in a chunk of it."""
    chunk = min(_CHUNK, T)
    while chunk > 1 and N * chunk * T > _MOST_SCORES:
        chunk //= 2
    block = chunk * math.ceil(T / (chunk * _BLOCKS))
    fit = max(1, _CACHED_SCORES // (N * chunk * T))
    rows = max(divisor for divisor in range(1, B + 1) if B % divisor == 0 and divisor <= fit)
    return rows, block, chunk


def _grouped(query_BTNH, key_BSKH, value_BSKH, segment_ids_BT, pieces):
    """Head-major arrays, padded to whole blocks; queries scaled and grouped by their key head."""
    K = key_BSKH.shape[2]
    return (
        _by_kv_head(_scaled(query_BTNH), K, pieces),
        _by_kv_head(key_BSKH, K, pieces)[:, :, :, 0],
        _by_kv_head(value_BSKH, K, pieces)[:, :, :, 0],
        _padded(segment_ids_BT, pieces),
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
    """function(*arrays) a few rows at a time."""
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

    firsts = start + chunk * jnp.arange(block // chunk)
    carry, out = lax.scan(
        lambda carry, part: function(carry, *part), carry, (firsts, *map(split, arrays))
    )
    return carry, jax.tree.map(join, out)


def _forward_rows(pieces, query_RKTGH, key_RKTH, value_RKTH, segments_RT):
    """Outputs, and logarithms of the softmax's denominators, of a few rows."""
    T, block = query_RKTGH.shape[2], pieces[1]
    outs = []
    for start in range(0, T, block):
        end = start + block
        keys, values, segments = key_RKTH[:, :, :end], value_RKTH[:, :, :end], segments_RT[:, :end]

        def chunk(carry, first, query_RKCGH, segments_R1C, k=keys, v=values, s=segments):
            scores_RKCGS = _dot(query_RKCGH, k, 4, 3)
            mask = _mask(segments_R1C, s, first)
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


def _backward_rows(pieces, query_RKTGH, key_RKTH, value_RKTH, segments_RT, *rest):
    """Gradients of scaled queries [R, K, T, G, H], keys and values [R, K, H, T] of a few rows."""
    T, block = query_RKTGH.shape[2], pieces[1]
    R, K, _, H = key_RKTH.shape
    dkv = [jnp.zeros((R, K, H, T), wide_type(key_RKTH))] * 2
    dqs = []
    for start in range(0, T, block):
        end = start + block
        chunk = functools.partial(
            _backward_chunk, key_RKTH[:, :, :end], value_RKTH[:, :, :end], segments_RT[:, :end]
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


def _backward_chunk(
    keys, values, segments_RS, dkv, first, query_RKCGH, segments_R1C, lse_RKCG, delta_RKCG, grad
):
    dtype = query_RKCGH.dtype
    scores_RKCGS = _dot(query_RKCGH, keys, 4, 3)
    mask = _mask(segments_R1C, segments_RS, first)
    weights = jnp.where(mask, jnp.exp(scores_RKCGS - lse_RKCG[..., None]), 0.0)
    dscores = weights * (_dot(grad, values, 4, 3) - delta_RKCG[..., None])
    weights, dscores = weights.astype(dtype), dscores.astype(dtype)
    # As [H, S]: the transposed operand is the small one.
    dk_RKHS, dv_RKHS = _dot_queries(query_RKCGH, dscores), _dot_queries(grad, weights)
    return [dkv[0] + dk_RKHS, dkv[1] + dv_RKHS], _dot(dscores, keys, 4, 2)


def _mask(segments_R1C, segments_RS, first):
    """[R, 1, C, 1, S]: whether query first + c sees key s."""
    same_RCS = segments_R1C[:, 0, :, None] == segments_RS[:, None, :]
    queries_C = first + jnp.arange(segments_R1C.shape[2])
    past_CS = queries_C[:, None] >= jnp.arange(segments_RS.shape[1])[None, :]
    return (same_RCS & past_CS[None])[:, None, :, None]


def _dot(a, b, axis_a, axis_b):
    """Contracts one axis of each, batched over the first two, with float32 sums."""
    dims = (((axis_a,), (axis_b,)), ((0, 1), (0, 1)))
    return lax.dot_general(a, b, dims, preferred_element_type=wide_type(a))


def _dot_queries(a_RKCGH, b_RKCGS):
    dims = (((2, 3), (2, 3)), ((0, 1), (0, 1)))
    return lax.dot_general(a_RKCGH, b_RKCGS, dims, preferred_element_type=wide_type(a_RKCGH))


IMPLEMENTATIONS = {"reference": _reference}
