"""Grouped matmul by the Pallas "megablox" kernels that come with jax, for TPU.

A tile of rows shared by two groups is computed once for each, with the other's rows masked, so
groups may begin anywhere. Groups with many rows still begin at tiles: sharing costs one tile per
group, padding half a tile. Few rows, as in decoding, are left unpadded.
"""

import contextlib
import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm

_ROWS = (512, 256, 128)  # of a tile; larger ones load less, smaller ones waste less
_LANES = 128
_WIDEST = 2048  # columns of a tile
_FAST_MEMORY = 13 * 2**20  # bytes for tiles, of the 16 MiB available to a kernel on v4 to v5p
_INTERPRET = False  # tests run the kernels on CPU this way


def row_multiple(num_rows, num_groups):
    """Returns the rows of a tile: at most an eighth of a group's share, 1 if below a tile."""
    share = num_rows // num_groups
    if share < _LANES:
        return 1
    return next((rows for rows in _ROWS if 8 * rows <= share), _LANES)


def matmul(x_MD, kernel_EDF, group_sizes_E, *, transposed):
    """See `grouped_matmul.grouped_matmul`."""
    M, inner = x_MD.shape
    rows = _tile_rows(M, group_sizes_E.shape[0])
    columns = kernel_EDF.shape[1 if transposed else 2]
    tiles = _tiles(rows, inner, columns, functools.partial(_matmul_bytes, x_MD.dtype.itemsize))
    # It takes no int8: of a layer's experts, a copy in the rows' type is written and read.
    kernel_EDF = kernel_EDF.astype(x_MD.dtype)
    with _settings(x_MD):
        y_MF = gmm(_padded(x_MD, rows), kernel_EDF, group_sizes_E, x_MD.dtype, tiles,
                   transpose_rhs=transposed, interpret=_INTERPRET)  # fmt: skip
    return y_MF[:M]


def outer(x_MD, grad_MF, group_sizes_E):
    """See `grouped_matmul.grouped_outer`."""
    rows = _tile_rows(x_MD.shape[0], group_sizes_E.shape[0])
    of = functools.partial(_outer_bytes, x_MD.dtype.itemsize)
    tiles = _tiles(rows, x_MD.shape[1], grad_MF.shape[1], of)
    x_MD, grad_MF = _padded(x_MD, rows), _padded(grad_MF, rows)
    with _settings(x_MD):
        return tgmm(x_MD.swapaxes(0, 1), grad_MF, group_sizes_E, jnp.float32, tiles,
                    interpret=_INTERPRET)  # fmt: skip


def _tile_rows(M, E):
    """Returns the rows of a tile; at most `row_multiple` if groups are padded to it."""
    fit = (rows for rows in _ROWS if M % rows == 0 and 9 * rows * E <= M)
    return next(fit, _LANES)


def _tiles(rows, inner, columns, of):
    """Returns (rows, inner, columns) of the largest tiles whose bytes fit."""
    counts = [-(-size // _WIDEST) for size in (inner, columns)]
    while True:
        tiles = rows, *map(_part, (inner, columns), counts)
        if of(*tiles) <= _FAST_MEMORY or max(tiles[1:]) <= _LANES:
            return tiles
        counts[0 if tiles[1] >= tiles[2] else 1] += 1


def _part(size, count):
    """Returns the columns of one of `count` tiles: all, or whole lanes."""
    return size if count == 1 else -(-size // (count * _LANES)) * _LANES


def _matmul_bytes(item, rows, inner, columns):
    """Counts two of each tile (one loads while the other is used) and the sums."""
    return 2 * item * (rows * (inner + columns) + inner * columns) + 4 * rows * columns


def _outer_bytes(item, rows, inner, columns):
    """Counts the same, plus a float32 copy of the inputs as they are masked."""
    inputs = (2 * item + 4) * rows * (inner + columns)
    return inputs + (2 * 4 + 4) * inner * columns


def _padded(x_MD, rows):
    return jnp.pad(x_MD, ((0, -x_MD.shape[0] % rows), (0, 0)))


@contextlib.contextmanager
def _settings(x_MD):
    """Sets promotion as jax's code expects; float32 factors keep all their bits."""
    precision = "highest" if x_MD.dtype == jnp.float32 else None
    with jax.numpy_dtype_promotion("standard"), jax.default_matmul_precision(precision):
        yield
