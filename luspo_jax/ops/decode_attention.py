"""Attention of one query per row over the first entries of that row's KV cache."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from luspo_jax.sharding import shard_map

CACHE_AXES = (
    None,
    "batch",
    "kv_heads",
    "cache_length",
    None,
)  # axes of keys and values, [L, B, K, S, H]
NEGATIVE = -1e30  # finite: the exponential of a masked score is exactly zero, never NaN
# Cache lengths that `rows` compiles for, no finer than 32; a row reads the shortest sufficient one.
_PREFIXES, _FINEST = 4, 32


class _Pair(NamedTuple):
    """A key and a value: the new ones of each row, the cache, or the axes of either."""

    key: Any
    value: Any


def decode_attention(
    query_BNH, keys_LBKSH, values_LBKSH, layer, *, lengths_B, implementation="auto"
):
    """Returns softmax(q·k / √H) v over the first `lengths_B[b]` cache entries of row b in a layer.

    The whole stacked cache is passed, so that an implementation may read a layer in place. Query
    head n reads key head n // (N / K). Scores, softmax and sums are float32.

    Args:
      query_BNH: one rotated query per row.
      keys_LBKSH: cached keys of every layer.
      values_LBKSH: cached values of every layer.
      layer: int32 scalar.
      lengths_B: int32 ≥ 1, number of entries that the row's query sees.
      implementation: a key of IMPLEMENTATIONS; "auto" is "rows" on CPU and "batched" elsewhere.

    Returns:
      Weighted values [B, N, H] in the type of the queries.

    Raises:
      ValueError: an unknown implementation; the message lists the known ones.
    """
    query_BKGH = _scaled_groups(query_BNH, keys_LBKSH)
    out_BKGH = _known(implementation)(
        query_BKGH, keys_LBKSH, values_LBKSH, layer, jnp.asarray(lengths_B)
    )
    return out_BKGH.reshape(query_BNH.shape).astype(query_BNH.dtype)


def append_and_attend(
    query_BNH, new, cached, layer, *, positions_B, implementation="auto", layout=None
):
    """Writes one key and value per row into the cache and attends to the entries up to them.

    With a layout, rows are sharded over "batch", heads over "heads" and "kv_heads", and the
    positions of the cache over "cache_length". Positions are dealt in turn (`dealt_positions`), so
    that parts are equally full at any length. Each device writes the positions that are its own and
    attends to the entries it holds; the softmax is combined from its parts,

      out = Σ_c exp(m_c − m) o_c / Σ_c exp(m_c − m) s_c,  m = max_c m_c,

    with m_c the largest score of part c, s_c = Σ exp(score − m_c) and o_c the sum of values with
    these weights, all float32.

    Args:
      query_BNH: one rotated query per row.
      new: the rotated key and the value of each row, [B, K, H] both.
      cached: keys and values of every layer, [L, B, K, S, H] both; S must be a multiple of
        layout.size("cache_length"). They are written in place if donated or not used afterwards.
      layer: int32 scalar.
      positions_B: int32, position of the new entry in its row; the query sees positions_B + 1
        entries.
      implementation: a key of IMPLEMENTATIONS.
      layout: the rollout's, or None for one device.

    Returns:
      Weighted values [B, N, H] in the type of the queries; the keys; the values.

    Raises:
      ValueError: an unknown implementation; the message lists the known ones.
    """
    if layout is not None and layout.size("cache_length") > 1:
        function = functools.partial(_append_and_attend_part, implementation, layout)
    else:
        function = functools.partial(_append_and_attend, implementation)
    query_axes, row_axes = ("batch", "heads", None), ("batch", "kv_heads", None)
    return shard_map(
        function,
        layout,
        (query_axes, _Pair(row_axes, row_axes), _Pair(CACHE_AXES, CACHE_AXES), (), ("batch",)),
        (query_axes, CACHE_AXES, CACHE_AXES),
    )(query_BNH, _Pair(*new), _Pair(*cached), jnp.asarray(layer), jnp.asarray(positions_B))


def _append_and_attend(implementation, query, new, cached, layer, positions_B):
    keys = _written(cached.key, new.key, layer, positions_B)
    values = _written(cached.value, new.value, layer, positions_B)
    out = decode_attention(
        query, keys, values, layer, lengths_B=positions_B + 1, implementation=implementation
    )
    return out, keys, values


def _append_and_attend_part(implementation, layout, query, new, cached, layer, positions_B):
    """Does the same when this device holds one part of the positions."""
    spread, C = layout.axis_names("cache_length"), layout.size("cache_length")
    part = lax.axis_index(spread)
    # Other parts' positions are moved past the end, where writes are dropped.
    own_B = jnp.where(positions_B % C == part, positions_B // C, cached.key.shape[3])
    keys = _written(cached.key, new.key, layer, own_B)
    values = _written(cached.value, new.value, layer, own_B)
    lengths_B = (positions_B - part) // C + 1  # ≥ 0: positions ≥ 0 and part < C
    out, top, total = _known(implementation)(
        _scaled_groups(query, keys), keys, values, layer, lengths_B, finish=_parts
    )
    # A part without entries has top = NEGATIVE, so its weight beside any other is 0.
    share = jnp.exp(top - lax.pmax(top, spread))
    sums = lax.psum(share * jnp.concatenate([out, total], axis=-1), spread)
    out = sums[..., :-1] / sums[..., -1:]
    return out.reshape(query.shape).astype(query.dtype), keys, values


def dealt_positions(x_LBKTH, layout):
    """Returns this device's part of ordered entries: position p is entry p // C of part p mod C.

    For use within `shard_map`. C is layout.size("cache_length"); T is padded to a multiple of it.
    """
    C = layout.size("cache_length")
    if C == 1:
        return x_LBKTH
    *lead, T, H = x_LBKTH.shape
    widths = [(0, 0)] * len(lead) + [(0, -T % C), (0, 0)]
    dealt = jnp.pad(x_LBKTH, widths).reshape(*lead, -(-T // C), C, H)
    part = lax.axis_index(layout.axis_names("cache_length"))
    return lax.dynamic_index_in_dim(dealt, part, -2, keepdims=False)


def _written(cached_LBKSH, new_BKH, layer, positions_B):
    # One vector [H] per index. With matrices [K, H], XLA on TPU would transpose K and S of the
    # whole cache and hold it twice.
    rows_B1, heads_K = jnp.arange(new_BKH.shape[0])[:, None], jnp.arange(new_BKH.shape[1])
    at = cached_LBKSH.at[layer, rows_B1, heads_K[None], positions_B[:, None]]
    return at.set(new_BKH, mode="drop")


def _known(implementation):
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"decode attention implementation {implementation!r} is unknown; "
            f"use one of {sorted(IMPLEMENTATIONS)}"
        )
    return IMPLEMENTATIONS[implementation]


def _scaled_groups(query_BNH, keys_LBKSH):
    """Returns queries over √H, grouped by their key head: [B, K, G, H]."""
    B, N, H = query_BNH.shape
    K = keys_LBKSH.shape[2]
    query_BKGH = query_BNH.astype(jnp.float32) * jnp.float32(H**-0.5)
    return query_BKGH.astype(query_BNH.dtype).reshape(B, K, N // K, H)


def _normalised(out, top, total):
    return out / total


def _parts(out, top, total):
    return out, top, total


# An implementation ends in finish(Σ exp(score − top) value, top, Σ exp(score − top)).


def _batched(query_BKGH, keys_LBKSH, values_LBKSH, layer, lengths_B, finish=_normalised):
    """Processes all rows at once: two batched products over the whole cache length."""
    keys_BKSH, values_BKSH = (
        lax.dynamic_index_in_dim(x, layer, 0, keepdims=False) for x in (keys_LBKSH, values_LBKSH)
    )
    visible_BS = jnp.arange(keys_BKSH.shape[2])[None, :] < lengths_B[:, None]
    return finish(*_weighted(query_BKGH, keys_BKSH, values_BKSH, visible_BS[:, None, None, :]))


def _rows(query_BKGH, keys_LBKSH, values_LBKSH, layer, lengths_B, finish=_normalised):
    """Processes one row at a time, over a prefix of its cache that covers its length.

    A row's piece of the cache stays near the core, and no layer is copied out of the stack: 1.8
    times as fast as `batched` on two CPU cores (B 64, S 192, K 4, H 32, half full).
    """
    S = keys_LBKSH.shape[3]
    count = min(_PREFIXES, -(-S // _FINEST))
    prefixes = [-(-S * (n + 1) // count) for n in range(count)]

    def read(prefix, row):
        _, _, K, _, H = keys_LBKSH.shape
        keys_1KSH, values_1KSH = (
            lax.dynamic_slice(x, (layer, row, 0, 0, 0), (1, 1, K, prefix, H))[0]
            for x in (keys_LBKSH, values_LBKSH)
        )
        query_1KGH = lax.dynamic_slice_in_dim(query_BKGH, row, 1)
        visible_S = jnp.arange(prefix) < lengths_B[row]
        parts = _weighted(query_1KGH, keys_1KSH, values_1KSH, visible_S[None, None, None, :])
        return jax.tree.map(lambda x: x[0], finish(*parts))

    def row_output(row):
        shortest = sum(jnp.int32(lengths_B[row] > prefix) for prefix in prefixes[:-1])
        return lax.switch(shortest, [functools.partial(read, prefix) for prefix in prefixes], row)

    return lax.map(row_output, jnp.arange(query_BKGH.shape[0], dtype=jnp.int32))


def _auto(*arguments, finish=_normalised):
    cpu, default = (functools.partial(one, finish=finish) for one in (_rows, _batched))
    return lax.platform_dependent(*arguments, cpu=cpu, default=default)


def _weighted(query_BKGH, keys_BKSH, values_BKSH, visible):
    scores_BKGS = jnp.einsum(
        "BKGH,BKSH->BKGS", query_BKGH, keys_BKSH, preferred_element_type=jnp.float32
    )
    scores_BKGS = jnp.where(visible, scores_BKGS, jnp.float32(NEGATIVE))
    top_BKG1 = jnp.max(scores_BKGS, axis=-1, keepdims=True)
    weights_BKGS = jnp.exp(scores_BKGS - top_BKG1)
    out_BKGH = jnp.einsum(
        "BKGS,BKSH->BKGH",
        weights_BKGS.astype(values_BKSH.dtype),
        values_BKSH,
        preferred_element_type=jnp.float32,
    )
    return out_BKGH, top_BKG1, jnp.sum(weights_BKGS, axis=-1, keepdims=True)


IMPLEMENTATIONS = {"auto": _auto, "rows": _rows, "batched": _batched}
