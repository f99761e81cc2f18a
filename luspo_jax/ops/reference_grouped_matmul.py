"""Grouped matmul in plain XLA: every kernel times all rows, keeping the rows of its group.

It does E times the necessary multiplications, one array of [M, F] at a time.
"""

import jax.numpy as jnp
from jax import lax

from luspo_jax.ops.precision import wide_type


def row_multiple(num_rows, num_groups):
    """Returns 1: groups may begin anywhere."""
    del num_rows, num_groups
    return 1


def matmul(x_MD, kernel_EDF, group_sizes_E, *, transposed):
    """See `grouped_matmul.grouped_matmul`."""
    columns = 1 if transposed else 0

    def add(y_MF, group):
        kernel_DF, start, end = group
        y = _dot(x_MD, kernel_DF.astype(x_MD.dtype), 1, columns)
        return y_MF + kept(y, start, end), None

    shape = x_MD.shape[0], kernel_EDF.shape[1 if transposed else 2]
    zeros_MF = jnp.zeros(shape, wide_type(x_MD))
    groups = kernel_EDF, *bounds(group_sizes_E)
    return lax.scan(add, zeros_MF, groups)[0].astype(x_MD.dtype)


def outer(x_MD, grad_MF, group_sizes_E):
    """See `grouped_matmul.grouped_outer`."""

    def step(_, group):
        return None, _dot(kept(x_MD, *group), kept(grad_MF, *group), 0, 0)

    return lax.scan(step, None, bounds(group_sizes_E))[1]


def bounds(group_sizes_E):
    """Returns the first row of each group and the row after its last; int32."""
    ends_E = jnp.cumsum(group_sizes_E, dtype=jnp.int32)
    return ends_E - group_sizes_E, ends_E


def kept(x_MD, start, end):
    """Keeps rows from `start` to before `end` and sets the others to zero."""
    rows_M = lax.iota(jnp.int32, x_MD.shape[0])
    return jnp.where(((rows_M >= start) & (rows_M < end))[:, None], x_MD, jnp.zeros_like(x_MD))


def _dot(a, b, a_axis, b_axis):
    return lax.dot_general(
        a, b, (((a_axis,), (b_axis,)), ((), ())), preferred_element_type=wide_type(a)
    )
