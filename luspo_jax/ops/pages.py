"""A pool of pages that hold keys and values, and what lies where in it.

A page holds the keys and values of up to S consecutive tokens of one sequence, in every layer. A
sequence has a row of page numbers, its block table; several sequences may name the same page where
their tokens are the same. Page 0 belongs to nobody: rows that are idle write there.

Over a layout, each device along "pages" has a pool of its own, and page numbers are those of that
pool. Where "cache_length" deals out positions, device c of C holds the tokens t with t mod C = c,
at place t // C of the same table: a page number then stands for S · C tokens, S on each device.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

PAGES_AXES = ("kv_heads", None, "pages", None, None)  # of keys and values, [K, L, P, S, H]


class Scaled(NamedTuple):
    """Keys or values in int8: numbers times a scale for each vector of H; or the axes of either.

    Attributes:
      numbers: int8, [K, L, P, S, H].
      scales: float32, [K, L, P, S].
    """

    numbers: Any
    scales: Any

    @property
    def shape(self):
        """Shape of the numbers."""
        return self.numbers.shape

    @property
    def dtype(self):
        """Type of the numbers."""
        return self.numbers.dtype


class Pages(NamedTuple):
    """The pool: keys and values of P pages of S tokens, or the axes of either.

    Key heads come first and layers before pages, so that a kernel which takes [K, pages, S, H]
    reads any layer in place: page p of layer l is page l · P + p of [K, L · P, S, H].

    All of it must be finite, pages that nobody has too: begin with zeros. Attention reads past a
    row's end and gives what it finds there the weight 0, and 0 · NaN would be NaN.

    Attributes:
      keys: rotated keys, [K, L, P, S, H], or Scaled.
      values: values, likewise.
    """

    keys: Any
    values: Any

    @property
    def size(self) -> int:
        """Tokens of a page on one device."""
        return self.keys.shape[3]


def pages_axes(dtype):
    """Returns the Pages of logical axes of a pool in a type."""
    axes = Scaled(PAGES_AXES, PAGES_AXES[:4]) if dtype == jnp.int8 else PAGES_AXES
    return Pages(axes, axes)


def zeros(shape, dtype):
    """Returns Pages of zeros of a shape [K, L, P, S, H]; int8 ones are Scaled."""

    def half():
        array = jnp.zeros(shape, dtype)
        return Scaled(array, jnp.zeros(shape[:4], jnp.float32)) if dtype == jnp.int8 else array

    return Pages(half(), half())


def scaled(x):
    """Returns the Scaled of vectors [..., H]: the largest entry of each is 127 scales.

    A number differs from its entry by at most half a scale.
    """
    x = x.astype(jnp.float32)
    scales = jnp.max(jnp.abs(x), axis=-1) / 127
    numbers = jnp.round(x / jnp.where(scales > 0, scales, 1.0)[..., None])
    return Scaled(numbers.astype(jnp.int8), scales)


def as_stored(new, pages):
    """Returns keys and values as a pool gives them back: those for int8 rounded."""
    if not isinstance(pages.keys, Scaled):
        return new

    def back(x):
        numbers, scales = scaled(x)
        return (numbers.astype(jnp.float32) * scales[..., None]).astype(x.dtype)

    return Pages(*map(back, new))


def one_layer(array, layer, tables):
    """Returns (array [K, L · P, …], tables into it) of one layer; nothing is copied."""
    K, L, P = array.shape[:3]
    flat = jax.tree.map(lambda x: x.reshape(K, L * P, *x.shape[3:]), array)
    return flat, tables + layer * P


def _stored(array, new):
    """Yields (array of the pool, what is new for it): two pairs for Scaled, else one."""
    if isinstance(array, Scaled):
        return zip(array, scaled(new), strict=True)
    return ((array, new.astype(array.dtype)),)


def _written(pages, new, at):
    """Returns the pool with `at(array, new)` in place of each array of it."""

    def written(array, new):
        arrays = [at(*pair) for pair in _stored(array, new)]
        return Scaled(*arrays) if isinstance(array, Scaled) else arrays[0]

    return Pages(written(pages.keys, new.keys), written(pages.values, new.values))


def append(pages, new, layer, pages_B, places_B):
    """Writes one key and value a row, [B, K, H] each; drops those whose page is past the end."""

    def at(array, new_BK):
        # One vector [H] an index: of matrices, XLA on TPU would transpose the whole pool.
        heads_K1 = jnp.arange(array.shape[0])[:, None]
        here = array.at[heads_K1, layer, pages_B[None], places_B[None]]
        return here.set(jnp.swapaxes(new_BK, 0, 1), mode="drop")

    return _written(pages, new, at)


def copied(pages, sources_N, targets_N):
    """Copies pages `sources_N` to `targets_N` in every layer; targets past the end are dropped."""

    def copy(array):
        return array.at[:, :, targets_N].set(array[:, :, sources_N], mode="drop")

    return jax.tree.map(copy, pages)


def read(array, layer, tables_RM, dtype):
    """Returns the keys or values that tables name, in their order: [K, R, M · S, H].

    They have the type of the pool; of int8 they have `dtype`.
    """
    (K, L, P, S), (R, M) = array.shape[:4], tables_RM.shape

    def found(array):
        # One page of one head an index: whole heads an index are half as fast on CPUs.
        heads_K11 = jnp.arange(K)[:, None, None] * (L * P)
        flat = array.reshape(K * L * P, S, *array.shape[4:])
        found = jnp.take(flat, heads_K11 + layer * P + tables_RM[None], axis=0, mode="clip")
        return found.reshape(K, R, M * S, *array.shape[4:])

    if isinstance(array, Scaled):
        numbers, scales = map(found, array)
        return (numbers.astype(jnp.float32) * scales[..., None]).astype(dtype)
    return found(array)


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

    def at(array, new_RTK):
        K, S = array.shape[0], array.shape[3]
        R, N = pages_RN.shape
        by_page = new_RTK.reshape(R, N, S, parts, K, *array.shape[4:])
        own_RNSK = lax.dynamic_index_in_dim(by_page, part, 3, keepdims=False)
        heads_K11 = jnp.arange(K)[:, None, None]
        here = array.at[heads_K11, layer, pages_RN[None]]
        return here.set(jnp.moveaxis(own_RNSK, 3, 0), mode="drop")

    return _written(pages, new, at)
