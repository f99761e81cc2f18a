"""Checks of attention: over whole sequences, over pages, over both, and around a ring."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.machine import plain
from experiments.machine.records import Absent, Agreed, Check
from experiments.machine.running import Known
from luspo_jax import sharding
from luspo_jax.ops import attention, paged_attention, pages
from luspo_jax.ops.paged_attention import Places
from luspo_jax.ops.paged_prefill import Runs, write_and_attend
from luspo_jax.ops.ring_attention import inverse_ring_order, ring_order
from luspo_jax.rollout.cache import PAGE_SIZES

TYPES = ("float32", "bfloat16")
_SIZES = {"T": 300, "N": 4, "K": 2, "H": 128}  # T is no multiple of any kernel's block
_TINY = {"T": 20, "N": 2, "K": 1, "H": 128}


def tolerance(dtype: str, device: jax.Device) -> float:
    """Returns the largest sound error, as a share of the largest value.

    In bfloat16, with 8 bits, results and what is multiplied are rounded several times. Accelerators
    may multiply float32 as TF32 or bfloat16, whatever is asked for; a kernel that sees a wrong
    token is off by a share near 1.
    """
    return 1e-5 if dtype == "float32" and device.platform == "cpu" else 2e-2


def without_a_kernel(part: str, name: str, reason: str) -> Check:
    """Returns the check of something that does not exist here."""

    def absent(_):
        raise Absent(reason)

    return Check(part, name, 0.0, absent)


def choices(resolve: Callable[[str], Any], kinds: tuple[str, ...] = TYPES) -> tuple[list[str], str]:
    """Returns the types that a kernel takes here, and why it takes no other.

    Args:
      resolve: raises ValueError for a type that does not fit.
      kinds: the types to try.
    """
    fit, reason = [], ""
    for kind in kinds:
        try:
            resolve(kind)
        except ValueError as error:
            reason = reason or str(error).split("; ")[0].partition("' ")[2]
        else:
            fit.append(kind)
    return fit, reason


def checks(device: jax.Device) -> Iterator[Check]:
    """Yields the checks of every implementation of attention."""
    for name in attention.IMPLEMENTATIONS:
        yield from _of_sequences(name, device)
    yield Check("kernels", "attention: ring over devices", 6.0, ring)
    for name in paged_attention.IMPLEMENTATIONS:
        yield from _of_pages(name, device)
    for name in attention.IMPLEMENTATIONS:
        kinds, reason = _fit(name, device)
        title = f"prefill over pages: {name}"
        if not kinds:
            yield without_a_kernel("kernels", title, reason)
        for kind, _ in kinds:
            run = functools.partial(prefilled, name, kind)
            yield Check("kernels", f"{title}, {kind}", 5.0, run)


def _fit(name, device):
    """((type, whether it takes packed rows) …, why not) of an implementation of attention."""

    def found(packed):
        def resolve(dtype):
            attention.resolve(
                name,
                platform=device.platform,
                packed=packed,
                head_dim=_SIZES["H"],
                dtype=dtype,
            )

        return choices(resolve)

    for packed in (True, False):
        kinds, reason = found(packed)
        if kinds:
            return [(kind, packed) for kind in kinds], ""
    return [], reason


def _of_sequences(name, device):
    kinds, reason = _fit(name, device)
    if not kinds:
        yield without_a_kernel("kernels", f"attention: {name}", reason)
    for kind, packed in kinds:
        for causal in (True, False):
            if not (causal or packed):
                continue  # images' patches need segment ids
            title = "packed rows" if packed else "one segment a row"
            title += "" if causal else ", no order"
            run = functools.partial(sequences, name, kind, packed, causal)
            yield Check("kernels", f"attention: {name}, {kind}, {title}", 5.0, run)


def _of_pages(name, device):
    size = PAGE_SIZES[device.platform]

    def resolve(dtype):
        paged_attention.resolve(
            name, platform=device.platform, page_size=size, head_dim=_SIZES["H"], dtype=dtype
        )

    kinds, reason = choices(resolve, (*TYPES, "int8"))
    if not kinds:
        yield without_a_kernel("kernels", f"attention over pages: {name}", reason)
    for kind in kinds:
        run = functools.partial(paged, name, kind, size)
        yield Check("kernels", f"attention over pages: {name}, {kind}", 4.0, run)


def _arrays(sizes, batch, dtype, seed=0):
    """Random (query, key, value, cotangent), rounded to a type."""
    rng, (T, N, K, H) = np.random.default_rng(seed), sizes.values()
    shapes = (batch, T, N, H), (batch, T, K, H), (batch, T, K, H), (batch, T, N, H)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def _segments(packed, batch, T):
    """Rows of two segments, and padding where they are packed."""
    segments_BT = np.ones((batch, T), np.int32)
    if packed:
        segments_BT[:, 3 * T // 8 :] = 2
        segments_BT[-1, 7 * T // 8 :] = 0
    return segments_BT


def sequences(name: str, dtype: str, packed: bool, causal: bool, known: Known) -> list[Agreed]:
    """Checks values and gradients of an implementation over whole sequences."""
    sizes = _TINY if known.tiny else _SIZES
    query, key, value, grad = _arrays(sizes, 2, dtype)
    segments_BT = _segments(packed, 2, sizes["T"])

    def function(*arrays):
        return attention.attention(
            *arrays, segment_ids_BT=segments_BT, causal=causal, implementation=name
        )

    return [_compared(function, (query, key, value), grad, segments_BT, causal, dtype, known)]


def _compared(function, arrays, grad, segments_BT, causal, dtype, known):
    """Compares attention on the device with the plain one; padding has no meaning and no weight."""
    T = segments_BT.shape[1]
    real_BT11 = (segments_BT > 0)[:, :, None, None]
    sees_BTS = segments_BT[:, :, None] == segments_BT[:, None]
    sees_BTS &= np.tri(T, dtype=bool) | (not causal)
    grad = jnp.where(real_BT11, grad, 0)

    @jax.jit
    def both(arrays, grad):
        out, pull = jax.vjp(function, *arrays)
        return out, *pull(grad.astype(out.dtype))

    def exact(*wide):
        return (plain.attention(*wide, sees_BTS),)

    out, *gradients = map(_wide, jax.device_get(both(arrays, grad)))
    want, want_gradients = plain.pulled(exact, list(map(_wide, arrays)), [_wide(grad)])
    real = np.broadcast_to(real_BT11, out.shape)
    return Agreed(
        plain.error([np.where(real, out, 0)], [np.where(real, want[0], 0)]),
        tolerance(dtype, known.device),
        plain.error(gradients, want_gradients),
    )


def _wide(array):
    return np.asarray(jnp.asarray(array).astype(jnp.float32), np.float64)


def ring(known: Known) -> list[Agreed]:
    """Checks attention with each row cut over all devices, up to eight."""
    devices = [one for one in jax.devices() if one.platform == known.device.platform][:8]
    count = 1 << (len(devices).bit_length() - 1)
    if count < 2:
        raise Absent("needs two devices, and there is one")
    layout = sharding.layout("train", {"context": count}, devices[:count])
    sizes = dict(_TINY if known.tiny else _SIZES, T=16 * count)
    dtype = "float32" if known.on_cpu else "bfloat16"
    name = attention.resolve(
        "auto", platform=known.device.platform, packed=True, head_dim=sizes["H"], dtype=dtype,
        context=count,
    )  # fmt: skip
    query, key, value, grad = _arrays(sizes, 2, dtype)
    segments_BT = _segments(True, 2, sizes["T"])
    order, back = ring_order(sizes["T"], count), inverse_ring_order(sizes["T"], count)

    def function(*arrays):
        arrays = [x[:, order] for x in arrays]
        out = attention.attention(
            *arrays,
            segment_ids_BT=jnp.asarray(segments_BT[:, order]),
            implementation=name,
            layout=layout,
        )
        return out[:, back]

    return [_compared(function, (query, key, value), grad, segments_BT, True, dtype, known)]


# ---------------------------------------------------------------- pages


def _pool(rng, lengths, size, K, H, dtype):
    """(pool of two layers, tables, by row what layer 1 gives back: keys and values [K, n, H])."""
    used = [-(-(n + 1) // size) for n in lengths]
    count, width = 1 + sum(used), max(used)
    tables_BM = np.zeros((len(lengths), width), np.int32)
    numbers = iter(rng.permutation(np.arange(1, count)))
    for b, many in enumerate(used):
        tables_BM[b, :many] = [next(numbers) for _ in range(many)]

    def half():
        array = jnp.asarray(rng.normal(size=(K, 2, count, size, H)), jnp.float32)
        return pages.scaled(array) if dtype == "int8" else array.astype(dtype)

    pool = pages.Pages(half(), half())
    held = [_held(x)[:, 1] for x in pool]
    rows = [
        [x[:, tables_BM[b]].reshape(K, -1, H)[:, :n] for x in held] for b, n in enumerate(lengths)
    ]
    return pool, tables_BM, rows


def _held(array):
    if isinstance(array, pages.Scaled):
        return np.asarray(array.numbers, np.float64) * np.asarray(array.scales)[..., None]
    return _wide(array)


def _activations(dtype, known):
    """The type of queries beside pages of a type."""
    if dtype != "int8":
        return dtype
    return "float32" if known.on_cpu else "bfloat16"


def paged(name: str, dtype: str, size: int, known: Known) -> list[Agreed]:
    """Checks one query a row over pages, rows ending in and at the ends of pages."""
    N, K, H = _heads(known)
    lengths = (1, size - 1, size, 3 * size - 5)
    rng, kind = np.random.default_rng(1), _activations(dtype, known)
    pool, tables_BM, rows = _pool(rng, lengths, size, K, H, dtype)
    B = len(lengths)
    query_BNH = jnp.asarray(rng.normal(size=(B, N, H)), kind)
    new = pages.Pages(*(jnp.asarray(rng.normal(size=(B, K, H)), kind) for _ in range(2)))
    places = Places(tables_BM, np.array(lengths, np.int32), np.ones(B, bool))

    @jax.jit
    def attended(query, new, pool):
        return paged_attention.append_and_attend(
            query, new, pool, jnp.int32(1), places=places, implementation=name
        )[0]

    own = [_wide(x) for x in pages.as_stored(new, pool)]
    want = []
    for b, row in enumerate(rows):
        keys, values = (
            np.concatenate([x, one[b][:, None]], axis=1).swapaxes(0, 1)
            for x, one in zip(row, own, strict=True)
        )
        sees = np.ones((1, 1, len(keys)), bool)
        arrays = _wide(query_BNH)[b][None, None], keys[None], values[None]
        exact = functools.partial(lambda sees, *x: (plain.attention(*x, sees),), sees)
        want.append(plain.pulled(exact, arrays, None)[0][0][0, 0])
    got = _wide(attended(query_BNH, new, pool))
    return [Agreed(plain.error([got], [np.stack(want)]), tolerance(kind, known.device))]


def _heads(known):
    sizes = _TINY if known.tiny else _SIZES
    return sizes["N"], sizes["K"], sizes["H"]


def prefilled(name: str, dtype: str, known: Known) -> list[Agreed]:
    """Checks runs of tokens over what is before them in pages and over themselves."""
    N, K, H = _heads(known)
    size = PAGE_SIZES[known.device.platform]
    starts, counts, T = (0, 2 * size), (size + 3, size + 7), size + 7
    rng = np.random.default_rng(2)
    pool, tables_RM, rows = _pool(rng, [s + T for s in starts], size, K, H, dtype)
    R = len(starts)
    query_RTNH = jnp.asarray(rng.normal(size=(R, T, N, H)), dtype)
    new = pages.Pages(*(jnp.asarray(rng.normal(size=(R, T, K, H)), dtype) for _ in range(2)))
    runs = Runs(tables_RM, np.array(starts, np.int32), np.array(counts, np.int32))

    @jax.jit
    def attended(query, new, pool):
        return write_and_attend(query, new, pool, jnp.int32(1), runs=runs, implementation=name)[0]

    got = _wide(attended(query_RTNH, new, pool))
    found, want = [], []
    for r, (start, count) in enumerate(zip(starts, counts, strict=True)):
        keys, values = (
            np.concatenate([x[:, :start].swapaxes(0, 1), _wide(one)[r, :count]])
            for x, one in zip(rows[r], new, strict=True)
        )
        sees = np.arange(len(keys))[None] <= start + np.arange(count)[:, None]
        arrays = _wide(query_RTNH)[r, :count][None], keys[None], values[None]
        exact = functools.partial(lambda sees, *x: (plain.attention(*x, sees[None]),), sees)
        want.append(plain.pulled(exact, arrays, None)[0][0][0])
        found.append(got[r, :count])
    error = plain.error([np.concatenate(found)], [np.concatenate(want)])
    return [Agreed(error, tolerance(dtype, known.device))]
