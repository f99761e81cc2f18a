"""Attention for GPU by Pallas kernels (through Triton) that read segment ids.

Tiles and loops follow `jax.experimental.pallas.ops.gpu.attention` (Dao 2023, arXiv:2307.08691),
which has one array of segment ids for queries and keys and one key head per query head. There are
four differences. Queries and keys have their own segment ids, so that a block may be off the
diagonal and the ring can use it. Query heads read their key head in place, without copies. A key
head's gradient is summed over its query heads where it is computed. Σ out · grad is float32.

Written without access to a GPU: compiled for one and run on CPU by Pallas' interpreter. Tile sizes
are not tuned.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from luspo_jax.ops.attention_blocks import Inputs, Results
from luspo_jax.ops.precision import wide
from luspo_jax.ops.segments import sees

_QUERIES, _KEYS = 128, 64  # per tile of the forward pass
_TILE = 64  # queries and keys per tile of the backward pass
_WARPS, _STAGES = 8, 2
_MASKED = -1e30  # finite: the exponential of a masked score is exactly zero, never NaN
_PADDING = -1  # a segment of its own
_INTERPRET = False  # tests run the kernels on CPU this way
_LOG2E = math.log2(math.e)


class _OfQueries(NamedTuple):
    """What the backward pass reads of the queries' results, or one thing for each of the three.

    Attributes:
      grad: cotangent of the output.
      lse: log-sum-exp of the scores.
      delta: Σ_h out · grad, which is the sum over keys of weight · gradient of the weight.
    """

    grad: Any
    lse: Any
    delta: Any


def forward_block(inputs, *, causal):
    """Returns Results, `out` in the queries' type."""
    T = inputs.query.shape[1]
    inputs = _padded_all(inputs)
    query, key = inputs[:2]
    B, padded_T, N, H = query.shape
    S, group, wide_H = key.shape[1], N // key.shape[2], pl.next_power_of_2(H)
    a_tile = pl.BlockSpec((None, _QUERIES, None, wide_H), lambda i, b, n: (b, i, n, 0))
    a_row = pl.BlockSpec((None, S, None, wide_H), lambda i, b, n: (b, 0, lax.div(n, group), 0))
    ids_T = pl.BlockSpec((None, _QUERIES), lambda i, b, n: (b, i))
    ids_S = pl.BlockSpec((None, S), lambda i, b, n: (b, 0))
    out_BTNH, lse_BNT = _call(
        functools.partial(_forward_kernel, causal=causal, head_dim=H),
        grid=(padded_T // _QUERIES, B, N),
        in_specs=[Inputs(a_tile, a_row, a_row, ids_T, ids_S)],
        out_specs=[a_tile, pl.BlockSpec((None, None, _QUERIES), lambda i, b, n: (b, n, i))],
        out_shape=[query, jax.ShapeDtypeStruct((B, N, padded_T), jnp.float32)],
        name="attention_forward",
    )(inputs)
    return Results(out_BTNH[:, :T], jnp.swapaxes(lse_BNT, 1, 2)[:, :T])


def backward_block(inputs, results, grad_BTNH, *, causal):
    """Returns gradients (dq, dk, dv), float32."""
    T, S, dtype = inputs.query.shape[1], inputs.key.shape[1], inputs.query.dtype
    inputs = _padded_all(inputs)
    delta_BTN = jnp.sum(wide(results.out) * wide(grad_BTNH), axis=-1)
    # Padding has no cotangent and, with a log-sum-exp this high, no weight.
    of_queries = _OfQueries(
        _padded(grad_BTNH.astype(dtype)),
        jnp.swapaxes(_padded(results.lse, 1e30), 1, 2),
        jnp.swapaxes(_padded(delta_BTN), 1, 2),
    )
    dq_BTNH = _query_gradient(inputs, of_queries, causal=causal)
    dk_BSKH, dv_BSKH = _key_gradients(inputs, of_queries, causal=causal)
    return dq_BTNH[:, :T], dk_BSKH[:, :S], dv_BSKH[:, :S]


def _query_gradient(inputs, of_queries, *, causal):
    (B, T, N, H), (S, K) = inputs.query.shape, inputs.key.shape[1:3]
    group, wide_H = N // K, pl.next_power_of_2(H)
    a_tile = pl.BlockSpec((None, _TILE, None, wide_H), lambda i, b, n: (b, i, n, 0))
    a_row = pl.BlockSpec((None, S, None, wide_H), lambda i, b, n: (b, 0, lax.div(n, group), 0))
    ids_T = pl.BlockSpec((None, _TILE), lambda i, b, n: (b, i))
    ids_S = pl.BlockSpec((None, S), lambda i, b, n: (b, 0))
    a_number = pl.BlockSpec((None, None, _TILE), lambda i, b, n: (b, n, i))
    return _call(
        functools.partial(_query_kernel, causal=causal, head_dim=H),
        grid=(T // _TILE, B, N),
        in_specs=[
            Inputs(a_tile, a_row, a_row, ids_T, ids_S),
            _OfQueries(a_tile, a_number, a_number),
        ],
        out_specs=a_tile,
        out_shape=jax.ShapeDtypeStruct(inputs.query.shape, jnp.float32),
        name="attention_query_gradient",
    )(inputs, of_queries)


def _key_gradients(inputs, of_queries, *, causal):
    (B, T, N, H), (S, K) = inputs.query.shape, inputs.key.shape[1:3]
    group, wide_H = N // K, pl.next_power_of_2(H)
    a_tile = pl.BlockSpec((None, _TILE, None, wide_H), lambda j, b, k: (b, j, k, 0))
    rows = pl.BlockSpec((None, T, group, wide_H), lambda j, b, k: (b, 0, k, 0))
    ids_T = pl.BlockSpec((None, T), lambda j, b, k: (b, 0))
    ids_S = pl.BlockSpec((None, _TILE), lambda j, b, k: (b, j))
    numbers = pl.BlockSpec((None, group, T), lambda j, b, k: (b, k, 0))
    return _call(
        functools.partial(_key_kernel, causal=causal, head_dim=H),
        grid=(S // _TILE, B, K),
        in_specs=[Inputs(rows, a_tile, a_tile, ids_T, ids_S), _OfQueries(rows, numbers, numbers)],
        out_specs=[a_tile, a_tile],
        out_shape=[jax.ShapeDtypeStruct(inputs.key.shape, jnp.float32)] * 2,
        name="attention_key_gradients",
    )(inputs, of_queries)


def _call(kernel, **settings):
    compiler_params = plgpu.CompilerParams(num_warps=_WARPS, num_stages=_STAGES)
    return pl.pallas_call(kernel, compiler_params=compiler_params, interpret=_INTERPRET, **settings)


def _padded_all(inputs):
    arrays, segments = inputs[:3], inputs[3:]
    return Inputs(*(_padded(x) for x in arrays), *(_padded(x, _PADDING) for x in segments))


def _padded(x_BT, value=0):
    widths = [(0, 0)] * x_BT.ndim
    widths[1] = (0, -x_BT.shape[1] % max(_QUERIES, _KEYS, _TILE))
    return jnp.pad(x_BT, widths, constant_values=value)


# ---------------------------------------------------------------- kernels
# Scores are in base 2. A tile's columns are padded to a power of two, and masked. `inputs` and
# `of_queries` hold references to a program's own parts of the arrays.


def _forward_kernel(inputs, out_ref, lse_ref, *, causal, head_dim):
    query_ref, key_ref, value_ref, ids_q_ref, ids_k_ref = inputs
    i = pl.program_id(0)
    columns = _columns(query_ref, head_dim)
    query, ids_q = plgpu.load(query_ref, mask=columns, other=0.0), ids_q_ref[...]

    def body(j, carry):
        out, top, total = carry
        here = pl.dslice(j * _KEYS, _KEYS)
        key = plgpu.load(key_ref.at[here, :], mask=columns, other=0.0)
        value = plgpu.load(value_ref.at[here, :], mask=columns, other=0.0)
        scores = _scores(query, key, head_dim)
        seen = _seen(ids_q, ids_k_ref[here], i * _QUERIES, j * _KEYS, causal)
        scores = jnp.where(seen, scores, _MASKED)
        new_top = jnp.maximum(top, jnp.max(scores, axis=-1))
        shrink = jnp.exp2(top - new_top)
        weights = jnp.exp2(scores - new_top[:, None])
        out = out * shrink[:, None] + _dot(weights.astype(value.dtype), value)
        return out, new_top, total * shrink + jnp.sum(weights, axis=-1)

    tiles = key_ref.shape[0] // _KEYS
    if causal:
        tiles = lax.div((i + 1) * _QUERIES + _KEYS - 1, _KEYS)
    start = (
        jnp.zeros(query_ref.shape, jnp.float32),
        jnp.full((_QUERIES,), _MASKED, jnp.float32),
        jnp.zeros((_QUERIES,), jnp.float32),
    )
    out, top, total = lax.fori_loop(0, tiles, body, start)
    lse_ref[...] = (top + jnp.log2(total)) * (1 / _LOG2E)
    plgpu.store(out_ref, (out / total[:, None]).astype(out_ref.dtype), mask=columns)


def _query_kernel(inputs, of_queries, dq_ref, *, causal, head_dim):
    query_ref, key_ref, value_ref, ids_q_ref, ids_k_ref = inputs
    i = pl.program_id(0)
    columns = _columns(query_ref, head_dim)
    query, grad = (plgpu.load(ref, mask=columns, other=0.0) for ref in (query_ref, of_queries.grad))
    ids_q, own = ids_q_ref[...], _OfQueries(grad, of_queries.lse[...], of_queries.delta[...])

    def body(j, dq):
        here = pl.dslice(j * _TILE, _TILE)
        key = plgpu.load(key_ref.at[here, :], mask=columns, other=0.0)
        value = plgpu.load(value_ref.at[here, :], mask=columns, other=0.0)
        seen = _seen(ids_q, ids_k_ref[here], i * _TILE, j * _TILE, causal)
        _, dscores = _weights_and_gradient(query, key, value, own, seen, head_dim)
        return dq + _dot(dscores.astype(key.dtype), key)

    tiles = i + 1 if causal else key_ref.shape[0] // _TILE
    dq = lax.fori_loop(0, tiles, body, jnp.zeros(query_ref.shape, jnp.float32))
    plgpu.store(dq_ref, dq * head_dim**-0.5, mask=columns)


def _key_kernel(inputs, of_queries, dk_ref, dv_ref, *, causal, head_dim):
    query_ref, key_ref, value_ref, ids_q_ref, ids_k_ref = inputs
    grad_ref, lse_ref, delta_ref = of_queries
    j = pl.program_id(0)
    columns = _columns(key_ref, head_dim)
    key, value = (plgpu.load(ref, mask=columns, other=0.0) for ref in (key_ref, value_ref))
    ids_k = ids_k_ref[...]
    first = j if causal else 0
    tiles = query_ref.shape[0] // _TILE - first

    def body(step, carry):
        dk, dv = carry
        head, i = lax.div(step, tiles), first + lax.rem(step, tiles)
        here = pl.dslice(i * _TILE, _TILE)
        query = plgpu.load(query_ref.at[here, head, :], mask=columns, other=0.0)
        grad = plgpu.load(grad_ref.at[here, head, :], mask=columns, other=0.0)
        own = _OfQueries(grad, lse_ref[head, here], delta_ref[head, here])
        seen = _seen(ids_q_ref[here], ids_k, i * _TILE, j * _TILE, causal)
        weights, dscores = _weights_and_gradient(query, key, value, own, seen, head_dim)
        dv = dv + _dot(weights.astype(grad.dtype).T, grad)
        return dk + _dot(dscores.astype(query.dtype).T, query), dv

    zeros = jnp.zeros(key_ref.shape, jnp.float32)
    dk, dv = lax.fori_loop(0, query_ref.shape[1] * tiles, body, (zeros, zeros))
    plgpu.store(dk_ref, dk * head_dim**-0.5, mask=columns)
    plgpu.store(dv_ref, dv, mask=columns)


def _weights_and_gradient(query, key, value, own, seen, head_dim):
    """Returns the softmax weights of a tile, and the gradient of its scores before scaling."""
    scores = _scores(query, key, head_dim) - own.lse[:, None] * _LOG2E
    weights = jnp.where(seen, jnp.exp2(scores), 0.0)
    return weights, weights * (_dot(own.grad, value.T) - own.delta[:, None])


def _scores(query, key, head_dim):
    return _dot(query, key.T) * (head_dim**-0.5 * _LOG2E)


def _dot(a, b):
    """Multiplies with float32 sums; float32 factors keep all their bits."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return plgpu.dot(a, b, precision=precision)


def _columns(ref, head_dim):
    return (jnp.arange(ref.shape[-1]) < head_dim)[None, :]


def _seen(ids_q, ids_k, first_query, first_key, causal):
    seen = sees(ids_q[:, None], ids_k[None, :])
    if not causal:
        return seen
    queries = first_query + jnp.arange(ids_q.shape[0])
    return seen & (queries[:, None] >= (first_key + jnp.arange(ids_k.shape[0]))[None, :])
