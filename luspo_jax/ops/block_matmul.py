"""Grouped matmul by a loop over pieces of groups, for CPU.

A group of n rows is cut into whole pieces of the largest ladder size that is at most n, plus one
piece for the rest, of the smallest size that holds it, which overlaps the previous piece. So groups
may begin anywhere and need no padding, a group with all rows costs no more than many small ones, an
empty group costs nothing, and each kernel is read once.

Measured on two cores against a batched product of blocks with gathered kernels: that copies a
kernel for each block, which took as long as the product itself or longer.
"""

import functools

import jax.numpy as jnp
from jax import lax

from luspo_jax.ops.precision import wide_type
from luspo_jax.ops.reference_grouped_matmul import bounds

_LEAST, _MOST = 16, 512  # rows of a piece: fewer are several times slower, more gain nothing


def row_multiple(num_rows, num_groups):
    """Returns 1: groups may begin anywhere."""
    del num_rows, num_groups
    return 1


def matmul(x_MD, kernel_EDF, group_sizes_E, *, transposed):
    """See `grouped_matmul.grouped_matmul`."""
    M, columns = x_MD.shape[0], 1 if transposed else 0
    starts_E, ends_E = bounds(group_sizes_E)
    ladder = _ladder(M, group_sizes_E.shape[0])

    def group(e, y_MF):
        kernel_DF = lax.dynamic_index_in_dim(kernel_EDF, e, keepdims=False).astype(x_MD.dtype)

        def piece(rows, at, _, y_MF):
            y = _dot(lax.dynamic_slice_in_dim(x_MD, at, rows), kernel_DF, 1, columns)
            y = y.astype(x_MD.dtype)
            if rows == ladder[0]:  # the piece may cross the bounds of its group
                mask = _within(at, rows, starts_E[e], ends_E[e])
                y = jnp.where(mask, y, lax.dynamic_slice_in_dim(y_MF, at, rows))
            return lax.dynamic_update_slice_in_dim(y_MF, y, at, 0)

        return pieces(piece, e, y_MF)

    pieces = functools.partial(_over_pieces, ladder, *_cut(starts_E, ends_E, ladder), ends_E)
    zeros_MF = jnp.zeros((M, kernel_EDF.shape[1 if transposed else 2]), x_MD.dtype)
    return _over_groups(group, group_sizes_E, zeros_MF)


def outer(x_MD, grad_MF, group_sizes_E):
    """See `grouped_matmul.grouped_outer`."""
    (M, D), E = x_MD.shape, group_sizes_E.shape[0]
    starts_E, ends_E = bounds(group_sizes_E)
    ladder = _ladder(M, E)

    def group(e, sums_EDF):
        def piece(rows, at, new, sum_DF):
            mask = _within(at, rows, new, ends_E[e])  # rows that no earlier piece has added
            x, grad = (lax.dynamic_slice_in_dim(a, at, rows) for a in (x_MD, grad_MF))
            x, grad = (jnp.where(mask, a, jnp.zeros_like(a)) for a in (x, grad))
            return sum_DF + _dot(x, grad, 0, 0)

        sum_DF = pieces(piece, e, jnp.zeros(sums_EDF.shape[1:], sums_EDF.dtype))
        return lax.dynamic_update_index_in_dim(sums_EDF, sum_DF, e, 0)

    pieces = functools.partial(_over_pieces, ladder, *_cut(starts_E, ends_E, ladder), ends_E)
    zeros_EDF = jnp.zeros((E, D, grad_MF.shape[1]), wide_type(x_MD))
    return _over_groups(group, group_sizes_E, zeros_EDF)


def _ladder(M, E):
    """Returns the possible piece sizes in rows: doubling, up to twice a group's share."""
    ladder = [min(_LEAST, M)]
    while ladder[-1] < min(2 * (M // E), _MOST) and 2 * ladder[-1] <= M:
        ladder.append(2 * ladder[-1])
    return tuple(ladder)


def _cut(starts_E, ends_E, ladder):
    """Returns the number of pieces of each size per group, and their first rows; [E, sizes]."""
    ladder_L = jnp.asarray(ladder, jnp.int32)[None]
    sizes_E1 = (ends_E - starts_E)[:, None]
    whole_E1 = jnp.max(jnp.where(ladder_L <= sizes_E1, ladder_L, 1), axis=1, keepdims=True)
    # A group smaller than the smallest piece has no whole piece.
    count_E1 = jnp.where(sizes_E1 < ladder[0], 0, sizes_E1 // whole_E1)
    rest_E1 = sizes_E1 - count_E1 * whole_E1
    last_E1 = jnp.min(jnp.where(ladder_L >= rest_E1, ladder_L, ladder[-1]), axis=1, keepdims=True)
    is_whole_EL = (ladder_L == whole_E1) & (count_E1 > 0)
    is_last_EL = (ladder_L == last_E1) & (rest_E1 > 0)
    counts_EL = jnp.where(is_whole_EL, count_E1, 0) + is_last_EL.astype(jnp.int32)
    first_EL = starts_E[:, None] + jnp.where(is_whole_EL, 0, count_E1 * whole_E1)
    return counts_EL, first_EL


def _over_pieces(ladder, counts_EL, first_EL, ends_E, body, e, carry):
    """Applies body(rows, first row, first new row, carry) to the pieces of group e."""
    for level, rows in enumerate(ladder):

        def step(i, carry, level=level, rows=rows):
            new = first_EL[e, level] + i * rows
            at = jnp.maximum(jnp.minimum(new, ends_E[e] - rows), 0)
            return body(rows, at, new, carry)

        carry = lax.fori_loop(0, counts_EL[e, level], step, carry)
    return carry


def _over_groups(body, group_sizes_E, carry):
    """Applies body(e, carry) to the groups that have rows."""
    order_E = jnp.argsort(group_sizes_E == 0, stable=True).astype(jnp.int32)
    count = jnp.sum(group_sizes_E > 0, dtype=jnp.int32)
    return lax.fori_loop(0, count, lambda i, carry: body(order_E[i], carry), carry)


def _within(at, rows, start, end):
    rows = at + lax.iota(jnp.int32, rows)
    return ((rows >= start) & (rows < end))[:, None]


def _dot(a, b, a_axis, b_axis):
    """Multiplies with float32 sums."""
    return lax.dot_general(
        a, b, (((a_axis,), (b_axis,)), ((), ())), preferred_element_type=wide_type(a)
    )
