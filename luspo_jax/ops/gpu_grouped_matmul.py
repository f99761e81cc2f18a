"""Grouped matmul for GPU by Pallas kernels (through Triton, so Ampere or newer).

Each program computes one tile of the result. Tiles of rows are counted from the start of their
group, so groups may begin anywhere and need no padding. A tile's group and first row are computed
from the sizes outside the kernel. There are at most M / rows + E such tiles; programs of unused
tiles end at once.

Written without access to a GPU: compiled for one and run on CPU by Pallas' interpreter. Tile sizes
are not tuned.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from luspo_jax.ops.reference_grouped_matmul import bounds

_LEAST = 16  # smallest side of a tile that tensor cores accept
_ROWS, _COLUMNS = 128, 128  # largest tile of the result
_WARPS = 8
_INTERPRET = False  # tests run the kernels on CPU this way


def row_multiple(num_rows, num_groups):
    """Returns 1: groups may begin anywhere."""
    del num_rows, num_groups
    return 1


def matmul(x_MD, kernel_EDF, group_sizes_E, *, transposed):
    """See `grouped_matmul.grouped_matmul`."""
    M, inner = x_MD.shape
    E, columns = kernel_EDF.shape[0], kernel_EDF.shape[1 if transposed else 2]
    rows = _tile_rows(M, E)
    count = M // rows + E
    tile = rows, _side(columns), _side(inner, _depth(x_MD))
    return _call(
        functools.partial(_matmul_kernel, transposed=transposed, tile=tile),
        grid=(pl.cdiv(columns, tile[1]), count),
        out_shape=jax.ShapeDtypeStruct((M, columns), x_MD.dtype),
        name="grouped_matmul",
    )(_tiles(group_sizes_E, rows, count), x_MD, kernel_EDF)


def outer(x_MD, grad_MF, group_sizes_E):
    """See `grouped_matmul.grouped_outer`."""
    D, F, E = x_MD.shape[1], grad_MF.shape[1], group_sizes_E.shape[0]
    tile = _side(D), _side(F), _depth(x_MD)
    return _call(
        functools.partial(_outer_kernel, tile=tile),
        grid=(pl.cdiv(F, tile[1]), pl.cdiv(D, tile[0]), E),
        out_shape=jax.ShapeDtypeStruct((E, D, F), jnp.float32),
        name="grouped_outer",
    )(*bounds(group_sizes_E), x_MD, grad_MF)


def _tile_rows(M, E):
    """Returns the rows of a tile: at most a quarter of a group's share, to waste little."""
    return min(_ROWS, max(_LEAST, pl.next_power_of_2(M // (4 * E) + 1) // 2))


def _side(size, most=_COLUMNS):
    return min(most, max(_LEAST, pl.next_power_of_2(size)))


def _depth(x_MD):
    """Returns the number of terms of a sum loaded at once."""
    return 64 if x_MD.dtype.itemsize == 2 else 32


class _Tiles(NamedTuple):
    """Each tile of rows: its group, its first row, and the group's end row.

    An unused tile has first row = end row.
    """

    group_T: Any
    first_T: Any
    end_T: Any


def _tiles(group_sizes_E, rows, count):
    """Returns the _Tiles of groups of these sizes."""
    starts_E, ends_E = bounds(group_sizes_E)
    before_E, through_E = bounds(-(-group_sizes_E // rows))  # tiles
    tiles_T = lax.iota(jnp.int32, count)
    group_T = jnp.sum(tiles_T[:, None] >= through_E[None], axis=1, dtype=jnp.int32)
    group_T = jnp.minimum(group_T, group_sizes_E.shape[0] - 1)
    first_T = starts_E[group_T] + (tiles_T - before_E[group_T]) * rows
    return _Tiles(group_T, jnp.minimum(first_T, ends_E[group_T]), ends_E[group_T])


def _call(kernel, **settings):
    compiler_params = plgpu.CompilerParams(num_warps=_WARPS, num_stages=3)
    return pl.pallas_call(kernel, compiler_params=compiler_params, interpret=_INTERPRET, **settings)


# ---------------------------------------------------------------- kernels
# References are to whole arrays; the sides of a tile are powers of two, with the excess masked.


def _matmul_kernel(tiles, x_ref, kernel_ref, y_ref, *, transposed, tile):
    j, t = pl.program_id(0), pl.program_id(1)
    group, first, end = (ref[t] for ref in tiles)
    rows, columns, depth = tile
    width, inner = y_ref.shape[1], x_ref.shape[1]
    here, across = pl.dslice(first, rows), pl.dslice(j * columns, columns)
    in_rows = _below(first, rows, end)[:, None]
    in_columns = _below(j * columns, columns, width)

    def body(k, sums):
        along = pl.dslice(k * depth, depth)
        in_depth = _below(k * depth, depth, inner)
        x = plgpu.load(x_ref.at[here, along], mask=in_rows & in_depth[None], other=0.0)
        if transposed:
            mask = in_columns[:, None] & in_depth[None]
            kernel = plgpu.load(kernel_ref.at[group, across, along], mask=mask, other=0).T
        else:
            mask = in_depth[:, None] & in_columns[None]
            kernel = plgpu.load(kernel_ref.at[group, along, across], mask=mask, other=0)
        return sums + _dot(x, kernel.astype(x.dtype))

    @pl.when(first < end)
    def _():
        sums = jnp.zeros((rows, columns), jnp.float32)
        sums = lax.fori_loop(0, pl.cdiv(inner, depth), body, sums)
        mask = in_rows & in_columns[None]
        plgpu.store(y_ref.at[here, across], sums.astype(y_ref.dtype), mask=mask)


def _outer_kernel(start_ref, end_ref, x_ref, grad_ref, sum_ref, *, tile):
    j, i, e = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    start, end = start_ref[e], end_ref[e]
    rows, columns, depth = tile
    down, across = pl.dslice(i * rows, rows), pl.dslice(j * columns, columns)
    in_rows = _below(i * rows, rows, x_ref.shape[1])[None]
    in_columns = _below(j * columns, columns, grad_ref.shape[1])[None]

    def body(k, sums):
        first = start + k * depth
        here, in_group = pl.dslice(first, depth), _below(first, depth, end)[:, None]
        x = plgpu.load(x_ref.at[here, down], mask=in_group & in_rows, other=0.0)
        grad = plgpu.load(grad_ref.at[here, across], mask=in_group & in_columns, other=0.0)
        return sums + _dot(x.T, grad)

    steps = lax.div(end - start + depth - 1, depth)
    sums = lax.fori_loop(0, steps, body, jnp.zeros((rows, columns), jnp.float32))
    plgpu.store(sum_ref.at[e, down, across], sums, mask=in_rows.T & in_columns)


def _below(first, count, end):
    return first + lax.iota(jnp.int32, count) < end


def _dot(a, b):
    """Multiplies with float32 sums; float32 factors keep all their bits."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return plgpu.dot(a, b, precision=precision)
