"""Paged attention for GPU by a Pallas kernel (through Triton, so Ampere or newer).

It does what `jax.experimental.pallas.ops.gpu.paged_attention` does, on the same layout of pages.
There are four differences. A row's entries are dealt out to programs tile by tile, so that a short
row in a long table keeps all of its programs busy (there, each has a fixed stretch of the table).
It returns the log-sum-exp. Programs' sums are joined in float32 (there, in the queries' type).
Entries past a row's length are not loaded, whatever they are, and neither are pages past it.
Numbers in int8 are multiplied as they are, and scores and weights by the scales of their entries.

Written without access to a GPU: compiled for one and run on CPU by Pallas' interpreter. Tile sizes
and the number of programs are not tuned.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from luspo_jax.ops.paged_attention import NEGATIVE, partial, scaled_groups
from luspo_jax.ops.pages import Scaled, one_layer

_ENTRIES = 64  # per tile
_LEAST = 16  # smallest side of a tile that tensor cores accept
_PROGRAMS = 4096  # about 30 a multiprocessor of an H100: rows differ in length, some are idle
_SPLITS = 32  # at most so many programs share a row and key head
_TILES = 4  # and at least so many tiles of a full table are each one's
_WARPS, _STAGES = 4, 3
_INTERPRET = False  # tests run the kernel on CPU this way
_LOG2E = math.log2(math.e)


def attend(query_BNH, pages, layer, tables_BM, lengths_B, shared=None):
    """Attention over the first `lengths_B` entries; see `paged_attention.IMPLEMENTATIONS`."""
    del shared  # the tables name these pages too
    (B, N, H), K = query_BNH.shape, pages.keys.shape[0]
    _refuse_wrapped_addresses(pages.keys)
    keys, tables_BM = one_layer(pages.keys, layer, tables_BM)
    values, _ = one_layer(pages.values, layer, tables_BM)
    splits = _splits(B * K, tables_BM.shape[1] * pages.size)
    sums = jax.ShapeDtypeStruct((splits, B, K, N // K), jnp.float32)
    top, total, weighted = pl.pallas_call(
        _kernel,
        grid=(splits, K, B),
        out_shape=(sums, sums, jax.ShapeDtypeStruct((*sums.shape, H), jnp.float32)),
        compiler_params=plgpu.CompilerParams(num_warps=_WARPS, num_stages=_STAGES),
        interpret=_INTERPRET,
        name="paged_attention",
    )(_typed(scaled_groups(query_BNH, K), keys), keys, values, tables_BM, lengths_B)
    new_top = jnp.max(top, axis=0)
    kept = jnp.exp(top - new_top[None])
    total, weighted = jnp.sum(kept * total, axis=0), jnp.sum(kept[..., None] * weighted, axis=0)
    return partial(query_BNH, new_top, total, weighted)


def _typed(query, keys):
    """Returns the queries in the type of the keys, or as they are beside int8, which holds less."""
    return query if isinstance(keys, Scaled) else query.astype(keys.dtype)


def _refuse_wrapped_addresses(keys):
    """Pallas counts elements in 32 bits, with a sign, up to arrays of 4 GiB (jax 0.10.2)."""
    size = math.prod(keys.shape)
    if keys.dtype.itemsize == 1 and 2**31 <= size <= 2**32:
        raise ValueError(
            f"int8 keys of {size} elements cannot be addressed on GPU: take a pool whose keys have "
            "fewer than 2 GiB or more than 4 GiB (rollout.cache_gb)"
        )


def _splits(rows, entries):
    """Returns the number of programs that share a row and key head: a power of two."""
    most = min(_SPLITS, _PROGRAMS // rows, entries // (_ENTRIES * _TILES))
    return pl.next_power_of_2(max(1, most) + 1) // 2


# References are to whole arrays; the sides of a tile are powers of two, with the excess masked.
# Scores are in base 2.


def _kernel(
    query_ref, keys_ref, values_ref, tables_ref, lengths_ref, top_ref, total_ref, weighted_ref
):
    split, k, b = (pl.program_id(axis) for axis in range(3))
    (G, H), S, M = query_ref.shape[2:], keys_ref.shape[2], tables_ref.shape[1]
    wide_G, wide_H = (max(_LEAST, pl.next_power_of_2(size)) for size in (G, H))
    all_heads, all_columns = pl.dslice(0, wide_G), pl.dslice(0, wide_H)
    heads, columns = jnp.arange(wide_G) < G, jnp.arange(wide_H) < H
    query = plgpu.load(
        query_ref.at[b, k, all_heads, all_columns],
        mask=heads[:, None] & columns[None],
        other=0.0,
    )
    length = jnp.minimum(lengths_ref[b], M * S)

    def body(i, carry):
        top, total, weighted = carry
        entries = (split + i * pl.num_programs(0)) * _ENTRIES + jnp.arange(_ENTRIES)
        seen = entries < length
        numbers = plgpu.load(tables_ref.at[b, entries // S], mask=seen, other=0)
        # Pallas' interpreter takes slices or arrays of indices, not both in one load.
        each = (numbers[:, None], (entries % S)[:, None], jnp.arange(wide_H)[None])
        here = (k, *(jnp.broadcast_to(x, (_ENTRIES, wide_H)) for x in each))
        of_entry, mask = (k, numbers, entries % S), seen[:, None] & columns[None]
        key, key_scales = _loaded(keys_ref, here, mask, of_entry, seen, query.dtype)
        value, value_scales = _loaded(values_ref, here, mask, of_entry, seen, query.dtype)
        scores = jnp.where(seen[None], _dot(query, key.T) * key_scales * _LOG2E, NEGATIVE)
        new_top = jnp.maximum(top, jnp.max(scores, axis=-1))
        kept = jnp.exp2(top - new_top)
        weights = jnp.exp2(scores - new_top[:, None])  # a tile sees one entry at least
        total = total * kept + jnp.sum(weights, axis=-1)
        weights = (weights * value_scales).astype(value.dtype)
        return new_top, total, weighted * kept[:, None] + _dot(weights, value)

    tiles = pl.cdiv(length, _ENTRIES)
    start = (
        jnp.full((wide_G,), NEGATIVE, jnp.float32),
        jnp.zeros((wide_G,), jnp.float32),
        jnp.zeros((wide_G, wide_H), jnp.float32),
    )
    own = pl.cdiv(jnp.maximum(tiles - split, 0), pl.num_programs(0))
    top, total, weighted = lax.fori_loop(0, own, body, start)
    here = (split, b, k, all_heads)
    plgpu.store(top_ref.at[here], top * (1 / _LOG2E), mask=heads)
    plgpu.store(total_ref.at[here], total, mask=heads)
    plgpu.store(
        weighted_ref.at[(*here, all_columns)], weighted, mask=heads[:, None] & columns[None]
    )


def _loaded(ref, here, mask, of_entry, seen, dtype):
    """Returns keys or values of a tile in a type, and the scales of its entries [1, entries]."""
    if not isinstance(ref, Scaled):
        return plgpu.load(ref.at[here], mask=mask, other=0.0), 1.0
    numbers = plgpu.load(ref.numbers.at[here], mask=mask, other=0)
    scales = plgpu.load(ref.scales.at[of_entry], mask=seen, other=0.0)
    return numbers.astype(dtype), scales[None]


def _dot(a, b):
    """Multiplies with float32 sums; float32 factors keep all their bits."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return plgpu.dot(a, b, precision=precision)
