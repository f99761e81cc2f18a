"""Attention of a run of tokens a row over pages written earlier and over the run itself.

A long prompt, or a response that lost its pages, is read in runs. A run begins where a page does;
its keys and values fill pages of their own. Its queries see what is before it in the row, from
pages, and themselves causally; the two are joined by their log-sum-exp. Both are blocks of the
implementations in `ops.attention`, so no platform needs a kernel more.
"""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from luspo_jax.ops import attention
from luspo_jax.ops.attention_blocks import Inputs, Results
from luspo_jax.ops.pages import Pages, as_stored, pages_axes, position_part, read, write_runs
from luspo_jax.ops.ring_attention import joined
from luspo_jax.sharding import shard_map

_BEFORE = 512  # entries of a row that are read at a time
_LOW = -1e30  # log-sum-exp of nothing: its weight beside anything is exactly 0
# cuDNN takes lengths and no segment ids, so it cannot leave out what a row does not have.
_OF_PAGES = {"cudnn": "flash_gpu"}


class Runs(NamedTuple):
    """Where the runs of a prefill lie.

    Attributes:
      tables_RM: int32 page numbers of each row.
      starts_R: int32 position of the run's first token, a multiple of the tokens of a page on all
        devices along "cache_length".
      counts_R: int32 tokens of the run; the rest of the row is padding.
    """

    tables_RM: Any
    starts_R: Any
    counts_R: Any


RUNS_AXES = Runs(("batch", None), ("batch",), ("batch",))


def write_and_attend(query_RTNH, new, pages, layer, *, runs, implementation, layout=None):
    """Writes the keys and values of runs into pages and attends to all up to each token.

    Args:
      query_RTNH: rotated queries.
      new: Pages of [R, T, K, H] each: rotated keys and values.
      pages: the pool; written in place if donated or not used afterwards.
      layer: int32 scalar.
      runs: Runs.
      implementation: a key of `attention.IMPLEMENTATIONS`.
      layout: the rollout's, or None for one device; sharded as in `paged_attention`.

    Returns:
      Weighted values [R, T, N, H] in the type of the queries; the pool.
    """
    function = functools.partial(_write_and_attend, implementation, layout)
    query_axes, key_axes = ("batch", None, "heads", None), ("batch", None, "kv_heads", None)
    pool_axes = pages_axes(pages.keys.dtype)
    axes = [query_axes, Pages(key_axes, key_axes), pool_axes, (), RUNS_AXES]
    arrays = (query_RTNH, Pages(*new), pages, jnp.asarray(layer), runs)
    return shard_map(function, layout, axes, (query_axes, pool_axes))(*arrays)


def _write_and_attend(implementation, layout, query, new, pages, layer, runs):
    T = query.shape[1]
    part, parts = position_part(layout)
    written = jnp.arange(T)[None] < runs.counts_R[:, None]
    segments_RT = written.astype(jnp.int32)
    # As they will be read: a token that is decoded sees the same as one that is read again.
    own = Inputs(query, *as_stored(new, pages), segments_RT, segments_RT)
    found = attention.blocks(implementation).forward_block(own, causal=True)
    found = Results(found.out.astype(jnp.float32), found.lse)
    tokens = pages.size * parts
    new = Pages(*(jnp.pad(x, ((0, 0), (0, -T % tokens), (0, 0), (0, 0))) for x in new))
    # A page of the run after its last token is not the row's, or not yet.
    first_R1 = (runs.starts_R // tokens)[:, None]
    turn_1N = jnp.arange(-(-T // tokens))[None]
    at_RN = jnp.take_along_axis(runs.tables_RM, first_R1 + turn_1N, axis=1, mode="clip")
    at_RN = jnp.where(turn_1N * tokens < runs.counts_R[:, None], at_RN, pages.keys.shape[2])
    pages = write_runs(pages, new, layer, at_RN, part, parts)
    # Read after it is written: else the pool is copied for the one or the other.
    before = _over_pages(implementation, query, pages, layer, runs, part, parts)
    if parts > 1:
        before = _of_all(before, layout.axis_names("cache_length"))
    return joined(found, before).out.astype(query.dtype), pages


def _over_pages(implementation, query, pages, layer, runs, part, parts):
    """Returns the Results, float32, over the entries on this device that come before the runs."""
    (R, T, N, _), S = query.shape, pages.size
    lengths_R = (runs.starts_R - part + parts - 1) // parts
    width = min(max(1, _BEFORE // S), runs.tables_RM.shape[1])
    tables_RM = jnp.pad(runs.tables_RM, ((0, 0), (0, -runs.tables_RM.shape[1] % width)))
    block = attention.blocks(_OF_PAGES.get(implementation, implementation)).forward_block
    segments_RT = jnp.ones((R, T), jnp.int32)

    def turn(i, state):
        tables = lax.dynamic_slice_in_dim(tables_RM, i * width, width, axis=1)
        keys, values = (jnp.moveaxis(read(x, layer, tables, query.dtype), 0, 2) for x in pages)
        there_RS = i * width * S + jnp.arange(width * S)[None] < lengths_R[:, None]
        inputs = Inputs(query, keys, values, segments_RT, there_RS.astype(jnp.int32))
        found = block(inputs, causal=False)
        return joined(state, Results(found.out.astype(jnp.float32), found.lse))

    nothing = Results(jnp.zeros(query.shape, jnp.float32), jnp.full((R, T, N), _LOW, jnp.float32))
    turns = -(-jnp.max(lengths_R) // (width * S))
    return lax.fori_loop(0, turns, turn, nothing)


def _of_all(found, axis):
    """Joins the parts of the devices along `axis`."""
    top = lax.pmax(found.lse, axis)
    weight = jnp.exp(found.lse - top)
    total = lax.psum(weight, axis)
    out = lax.psum(weight[..., None] * found.out, axis) / total[..., None]
    return Results(out, top + jnp.log(total))
