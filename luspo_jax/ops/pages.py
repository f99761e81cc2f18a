"""A pool of pages that hold keys and values, and what lies where in it.

A page holds the keys and values of up to S consecutive tokens of one sequence, in every layer. A
sequence has a row of page numbers, its block table; several sequences may name the same page where
their tokens are the same. Page 0 belongs to nobody: rows that are idle write there.

Over a layout, each device along "pages" has a pool of its own, and page numbers are those of that
pool. Where "cache_length" deals out positions, device c of C holds the tokens t with t mod C = c, at
place t // C of the same table: a page number then stands for S · C tokens, S on each device.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

PAGES_AXES = ("kv_heads", None, "pages", None, None)  # of keys and values, [K, L, P, S, H]


class Pages(NamedTuple):
    """The pool: keys and values of P pages of S tokens, or the axes of either.

    Key heads come first and layers before pages, so that a kernel which takes [K, pages, S, H]
    reads any layer in place: page p of layer l is page l · P + p of [K, L · P, S, H].

    All of it must be finite, pages that nobody has too: begin with zeros. Attention reads past a
    row's end and gives what it finds there the weight 0, and 0 · NaN would be NaN.

    Attributes:
      keys: rotated keys, [K, L, P, S, H].
      values: values, likewise.
    """

    keys: Any
    values: Any

    @property
    def size(self) -> int:
        """Tokens of a page on one device."""
        return self.keys.shape[3]


def one_layer(array, layer, tables):
    """Returns (array [K, L · P, …], tables into it) of one layer; nothing is copied."""
    K, L, P, *rest = array.shape
    return array.reshape(K, L * P, *rest), tables + layer * P


def append(pages, new, layer, pages_B, places_B):
    """Writes one key and value a row, [B, K, H] each; rows whose page is past the end are dropped."""

    def written(array, new_BKH):
        # One vector [H] an index: of matrices, XLA on TPU would transpose the whole pool.
        heads_K1 = jnp.arange(array.shape[0])[:, None]
        at = array.at[heads_K1, layer, pages_B[None], places_B[None]]
        return at.set(jnp.swapaxes(new_BKH, 0, 1).astype(array.dtype), mode="drop")

    return Pages(written(pages.keys, new.keys), written(pages.values, new.values))


def copied(pages, sources_N, targets_N):
    """Copies pages `sources_N` to `targets_N` in every layer; targets past the end are dropped."""

    def copy(array):
        return array.at[:, :, targets_N].set(array[:, :, sources_N], mode="drop")

    return Pages(*map(copy, pages))


def read(array, layer, tables_RM):
    """Returns the keys or values that tables name, in their order: [K, R, M · S, H]."""
    (K, L, P, S, H), (R, M) = array.shape, tables_RM.shape
    # One page of one head an index: whole heads an index are half as fast on CPUs.
    heads_K11 = jnp.arange(K)[:, None, None] * (L * P)
    flat = array.reshape(K * L * P, S, H)
    found = jnp.take(flat, heads_K11 + layer * P + tables_RM[None], axis=0, mode="clip")
    return found.reshape(K, R, M * S, H)


def position_part(layout):
    """Returns (index of this device along "cache_length", their number); in `shard_map`."""
    if layout is None or layout.size("cache_length") == 1:
        return 0, 1
    return lax.axis_index(layout.axis_names("cache_length")), layout.size("cache_length")


def write_runs(pages, new, layer, pages_RN, part=0, parts=1):
    """Writes a run of tokens of each row into whole pages.

    Args:
      pages: the pool.
      new: Pages of [R, T, K, H] each; T tokens are N pages of S · parts.
      layer: int32 scalar.
      pages_RN: int32 page of each of them; past the end where it is not to be written.
      part: index of this device along "cache_length".
      parts: number of devices along it.
    """

    def written(array, new_RTKH):
        K, _, _, S, H = array.shape
        R, N = pages_RN.shape
        by_page = new_RTKH.reshape(R, N, S, parts, K, H)
        own_RNSKH = lax.dynamic_index_in_dim(by_page, part, 3, keepdims=False)
        own_KRNSH = jnp.moveaxis(own_RNSKH, 3, 0).astype(array.dtype)
        heads_K11 = jnp.arange(K)[:, None, None]
        return array.at[heads_K11, layer, pages_RN[None]].set(own_KRNSH, mode="drop")

    return Pages(written(pages.keys, new.keys), written(pages.values, new.values))
