"""Attention of one query a row over the pages that hold the row's keys and values.

| name | platform | what it is |
|---|---|---|
| reference | all | gathers every page that a table can name; for tests, and where others fail |
| blocks | CPU | a few rows and pages at a time; pages that rows share are read once for all |
| gpu | GPU | a Pallas kernel that reads live entries only |
| tpu | TPU | the Pallas kernel that comes with jax: it reads live pages, in blocks; bfloat16 |
"""

import functools
import importlib
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from luspo_jax.ops.pages import Pages, append, pages_axes, position_part
from luspo_jax.sharding import shard_map

# Modules with attend(query_BNH, pages, layer, tables_BM, lengths_B, shared) -> Partial.
IMPLEMENTATIONS = {
    "reference": "reference_paged_attention",
    "blocks": "block_paged_attention",
    "gpu": "gpu_paged_attention",
    "tpu": "tpu_paged_attention",
}


class Partial(NamedTuple):
    """Attention over some of a row's keys, in a form that joins with others.

    Attributes:
      out: Σ softmax · value over these keys, [B, N, H], float32.
      lse: log Σ exp(score), [B, N], float32; very low where a row sees no key.
    """

    out: Any
    lse: Any


class Shared(NamedTuple):
    """Rows that begin with the same full pages, for implementations that read them once.

    Arrays are cut like rows over "batch", rows are those of one device, and groups stand first.

    Attributes:
      skipped_B: int32, pages at the start of a row's table that its group reads for it.
      tables_BM: int32, the tables without these pages.
      members_BW: int32, the up to W rows of each group; any row where there are fewer.
      places_B: int32, W · group + member of each row; less than 0 if it is in none.
      group_tables_BM: int32, the shared pages of each group.
      group_pages_B: int32, their number; 0 past the last group.
    """

    skipped_B: Any
    tables_BM: Any
    members_BW: Any
    places_B: Any
    group_tables_BM: Any
    group_pages_B: Any


def most_groups(rows: int, width: int) -> int:
    """Most groups of a device: twice as many as full ones have room."""
    return min(rows, 2 * -(-rows // width))


class Places(NamedTuple):
    """Where each row's new entry goes and which entries the row sees.

    Attributes:
      tables_BM: int32 page numbers of each row. All must name pages of the pool; those after the
        row's last entry are not read.
      positions_B: int32, position of the new entry; the row sees entries 0 … position.
      real_B: bool; other rows write nothing, and their output means nothing.
      shared: Shared, or None.
    """

    tables_BM: Any
    positions_B: Any
    real_B: Any
    shared: Any = None


_ROW, _TABLE = ("batch",), ("batch", None)
SHARED_AXES = Shared(_ROW, _TABLE, _TABLE, _ROW, _TABLE, _ROW)
PLACES_AXES = Places(_TABLE, _ROW, _ROW, SHARED_AXES)


def append_and_attend(query_BNH, new, pages, layer, *, places, implementation, layout=None):
    """Writes one key and value a row into its page and attends to the entries up to them.

      softmax(q·k / √H) v over the row's entries 0 … position; scores and sums are float32.

    With a layout, rows are sharded over "batch", heads over "heads" and "kv_heads", and pages as
    `ops.pages` says; where positions are dealt out, each device attends to its own and the softmax
    is joined by its log-sum-exp.

    Args:
      query_BNH: one rotated query a row; query head n reads key head n // (N / K).
      new: Pages of one entry a row: rotated keys and values, [B, K, H] each.
      pages: the pool; written in place if donated or not used afterwards.
      layer: int32 scalar.
      places: Places.
      implementation: a key of IMPLEMENTATIONS, from `resolve`.
      layout: the rollout's, or None for one device.

    Returns:
      Weighted values [B, N, H] in the type of the queries; the pool.

    Raises:
      ValueError: an unknown implementation; the message lists the known ones.
    """
    shared = places.shared
    arrays = [query_BNH, Pages(*new), pages, jnp.asarray(layer), *places[:3]]
    row_axes = ("batch", "kv_heads", None)
    query_axes, pool_axes = ("batch", "heads", None), pages_axes(pages.keys.dtype)
    axes = [query_axes, Pages(row_axes, row_axes), pool_axes, (), *PLACES_AXES[:3]]
    if shared is not None:
        arrays.append(shared)
        axes.append(SHARED_AXES)
    function = functools.partial(_append_and_attend, _module(implementation), layout)
    return shard_map(function, layout, axes, (query_axes, pool_axes))(*arrays)


def _append_and_attend(module, layout, query, new, pages, layer, *places):
    where = Places(*places)
    part, parts = position_part(layout)
    pages_B, places_B = entry_of(where, pages, part, parts)
    pages = append(pages, new, layer, pages_B, places_B)
    # ≥ 0: positions ≥ 0 and part < parts. Rows that are not real read nothing.
    lengths_B = jnp.where(where.real_B, (where.positions_B - part) // parts + 1, 0)
    found = module.attend(query, pages, layer, where.tables_BM, lengths_B, where.shared)
    if parts > 1:
        found = joined(found, layout.axis_names("cache_length"))
    return found.out.astype(query.dtype), pages


def entry_of(where, pages, part=0, parts=1):
    """Returns (page, place in it) of each row's new entry; pages past the end where it is another
    device's or none."""
    local_B = where.positions_B // parts
    at_B1 = (local_B // pages.size)[:, None]
    pages_B = jnp.take_along_axis(where.tables_BM, at_B1, axis=1, mode="clip")[:, 0]
    own_B = where.real_B & (where.positions_B % parts == part)
    return jnp.where(own_B, pages_B, pages.keys.shape[2]), local_B % pages.size


def joined(found, axis):
    """Joins the parts of all devices: Σ_c e^(lse_c − m) out_c / Σ_c e^(lse_c − m)."""
    weight = jnp.exp(found.lse - lax.pmax(found.lse, axis))[..., None]
    total = lax.psum(weight, axis)
    return found._replace(out=lax.psum(weight * found.out, axis) / total)


def resolve(implementation: str, *, platform: str, page_size: int, head_dim: int, dtype) -> str:
    """Resolves "auto" to an implementation, and refuses one that does not fit.

    "auto" is blocks on CPU, gpu on GPU and tpu on TPU where these fit, else the reference.

    Args:
      implementation: "auto" or a key of IMPLEMENTATIONS.
      platform: of the devices ("cpu", "tpu", "gpu", "cuda", "rocm").
      page_size: tokens of a page.
      head_dim: H.
      dtype: of keys and values.

    Raises:
      ValueError: what the implementation cannot do, and what to set instead.
    """
    needs = {
        "platform": platform,
        "page_size": page_size,
        "head_dim": head_dim,
        "dtype": jnp.dtype(dtype).name,
    }
    if implementation == "auto":
        fit = (name for name in ("blocks", "gpu", "tpu") if not _unfit(name, **needs))
        return next(fit, "reference")
    _module(implementation)
    reason = _unfit(implementation, **needs)
    if reason:
        raise ValueError(
            f"paged attention {implementation!r} {reason}; here {resolve('auto', **needs)!r} does "
            "(or 'auto')"
        )
    return implementation


_PLATFORMS = {"blocks": ("cpu",), "gpu": ("gpu", "cuda", "rocm"), "tpu": ("tpu",)}


def _unfit(name, *, platform, page_size, head_dim, dtype):
    """Returns why an implementation does not fit; None if it does."""
    if name == "reference":
        return None
    if platform not in _PLATFORMS[name]:
        return f"runs on {' or '.join(_PLATFORMS[name])}, not on {platform}"
    if name == "gpu" and dtype not in ("bfloat16", "float16", "float32", "int8"):
        return f"takes bfloat16, float16, float32 or int8, not {dtype}"
    if name == "gpu" and head_dim > 256:
        return f"takes heads of up to 256, not {head_dim}"
    if name == "tpu" and dtype == "int8":
        return "takes the scales of int8 only as wide as the heads, in float32: a copy of the pool"
    if name == "tpu" and dtype != "bfloat16":
        return f"multiplies in bfloat16, and keys and values are {dtype}"
    if name == "tpu" and head_dim % 128:
        return f"takes heads of a multiple of 128, not {head_dim}: it would copy the pool"
    if name == "tpu" and page_size % 8:
        return f"takes pages of a multiple of 8 tokens, not {page_size}"
    return None


def _module(implementation):
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"paged attention {implementation!r} is unknown; "
            f"use 'auto' or one of {sorted(IMPLEMENTATIONS)}"
        )
    return importlib.import_module(f"luspo_jax.ops.{IMPLEMENTATIONS[implementation]}")


def partial(query_BNH, lse_top, total, weighted):
    """Returns the Partial of sums over exp(score − top): of them, and of values with them."""
    B, N, H = query_BNH.shape
    out = weighted / jnp.where(total > 0, total, 1.0)[..., None]
    lse = jnp.where(total > 0, lse_top + jnp.log(jnp.where(total > 0, total, 1.0)), NEGATIVE)
    return Partial(out.reshape(B, N, H), lse.reshape(B, N))


NEGATIVE = -1e30  # finite: the exponential of a masked score is exactly zero, never NaN


def scaled_groups(query_BNH, num_kv_heads):
    """Returns queries over √H, grouped by their key head: [B, K, G, H]."""
    B, N, H = query_BNH.shape
    query = query_BNH.astype(jnp.float32) * jnp.float32(H**-0.5)
    return query.astype(query_BNH.dtype).reshape(B, num_kv_heads, N // num_kv_heads, H)
