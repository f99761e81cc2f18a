"""Frozen matrices in 4 bits: NF4, as QLoRA stores them (Dettmers et al. 2023, arXiv:2305.14314).

W ≈ t[c] · m: c is the nearest of 16 levels t to W / m, and m the largest |W| of a block of 64
inputs of one output, as bitsandbytes cuts Hugging Face's [out, in] matrices. Where 64 does not
divide the inputs, an output's last block is shorter; bitsandbytes goes on into the next output.
A code takes 4 bits where the platform packs them, and a block another 4 bytes.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

BLOCK = 64
# Quantiles of the normal distribution, zero among them: appendix E of the paper.
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("values", "largest"),
    meta_fields=("contracted", "kept"),
)
@dataclasses.dataclass(frozen=True)
class Nf4:
    """A matrix in NF4, or several; in a tree of axes, the axes of both.

    Attributes:
      values: uint4 codes, in the shape of the matrix. The first field: Flax compares its shape.
      largest: float32 m, [..., blocks, out].
      contracted: axes that a product sums over, which come before those that it keeps; static.
      kept: axes that it keeps, the last ones; static. Those before both stack matrices.
    """

    values: Any
    largest: Any
    contracted: int
    kept: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Returns the shape of the matrix."""
        return self.values.shape


def quantise(kernel: jax.Array, contracted: int, lead: int) -> Nf4:
    """Rounds a matrix to NF4, its first `lead` axes stacking matrices, the next summed over."""
    kept = kernel.ndim - lead - contracted
    wide = kernel.astype(jnp.float32)
    stacked, inner, outer = _parts(wide.shape, contracted, kept)
    inputs = math.prod(inner)
    blocks = -(-inputs // BLOCK)
    rows = wide.reshape(*stacked, inputs, *outer)
    widths = [(0, 0)] * lead + [(0, blocks * BLOCK - inputs)] + [(0, 0)] * kept
    cut = jnp.pad(rows, widths).reshape(*stacked, blocks, BLOCK, *outer)
    largest = jnp.max(jnp.abs(cut), axis=lead + 1)
    # Without a number in it, a block is all zeros, and any divisor will do.
    shares = cut / jnp.expand_dims(jnp.where(largest > 0, largest, 1), lead + 1)
    levels = np.asarray(LEVELS, np.float32)
    middles = (levels[1:] + levels[:-1]) / 2
    codes = sum((shares > middle).astype(jnp.uint8) for middle in middles)
    codes = codes.reshape(*stacked, blocks * BLOCK, *outer)
    codes = jax.lax.slice_in_dim(codes, 0, inputs, axis=lead).reshape(kernel.shape)
    return Nf4(codes.astype(jnp.uint4), largest, contracted, kept)


def dense(kernel: Nf4) -> jax.Array:
    """Returns t[c] · m, float32."""
    stacked, inner, _ = _parts(kernel.shape, kernel.contracted, kernel.kept)
    inputs, lead = math.prod(inner), len(stacked)
    levels = jnp.asarray(LEVELS, jnp.float32)[kernel.values.astype(jnp.int32)]
    each = jnp.repeat(kernel.largest, BLOCK, axis=lead)
    each = jax.lax.slice_in_dim(each, 0, inputs, axis=lead)
    return levels * each.reshape(kernel.shape)


def nf4_axes(axes: tuple[str | None, ...], contracted: int, lead: int) -> Nf4:
    """Returns the logical axes of a matrix in NF4; blocks are whole on every device."""
    kept = len(axes) - lead - contracted
    return Nf4(axes, (*axes[:lead], None, *axes[lead + contracted :]), contracted, kept)


def _parts(shape, contracted, kept):
    lead = len(shape) - contracted - kept
    return shape[:lead], shape[lead : lead + contracted], shape[lead + contracted :]
