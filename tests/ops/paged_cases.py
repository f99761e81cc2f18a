"""Rows of keys and values in order and in pages, a plain softmax over them, and compiled steps."""

import functools
import os
import subprocess
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from luspo_jax.ops import pages
from luspo_jax.ops.paged_attention import Places, _module, append_and_attend
from luspo_jax.ops.pages import Pages, Scaled

LAYER, LAYERS = 1, 3
GARBAGE = 1e30  # finite, and far larger than any key or value
PAGES_OF_64 = {"S": 64, "M": 520}  # of `temporaries`
S16 = (1, 16, 17, 0, 31, 32, 33, 90, 2)  # ends of pages of 16; nine rows, no multiple of a block


class Rows(NamedTuple):
    """Rows of some lengths: what they hold in order, and the same in pages.

    Attributes:
      query: [B, N, H].
      keys: of each row in order, K heads of [length, H].
      values: likewise.
      pool: Pages.
      tables: [B, M].
      lengths: [B].
    """

    query: Any
    keys: Any
    values: Any
    pool: Pages
    tables: Any
    lengths: Any


def rows_of(lengths, *, K=2, G=3, H=64, S=16, dtype=jnp.float32, garbage=GARBAGE, more=3):
    """Random rows; what no row holds is garbage, and so are tables past their rows' ends."""
    rng = np.random.default_rng(sum(lengths) + K + G + H + S)
    B, used = len(lengths), [-(-length // S) for length in lengths]
    P, M = sum(used) + 4, max(1, *used) + more
    query = jnp.asarray(rng.normal(size=(B, K * G, H)), query_type(dtype))
    pool = garbage * rng.choice([-1.0, 1.0], size=(2, K, LAYERS, P, S, H))
    tables = rng.integers(0, P, size=(B, M)).astype(np.int32)
    numbers = iter(rng.permutation(np.arange(1, P)))
    rows = [rounded(rng.normal(size=(2, K, length, H)), dtype) for length in lengths]
    for b, row in enumerate(rows):
        tables[b, : used[b]] = [next(numbers) for _ in range(used[b])]
        for t in range(lengths[b]):
            pool[:, :, LAYER, tables[b, t // S], t % S] = row[:, :, t]
    keys, values = zip(*rows, strict=True)
    lengths = np.array(lengths, np.int32)
    return Rows(query, keys, values, pool_of(*pool, dtype), tables, lengths)


def query_type(dtype):
    """Returns the type of queries over a pool of a type."""
    return jnp.float32 if dtype == jnp.int8 else dtype


def pool_of(keys, values, dtype):
    """Returns Pages of a type that hold arrays, numbers of int8 as numpy rounds them."""

    def half(array):
        if dtype != jnp.int8:
            return jnp.asarray(array, dtype)
        scales = np.abs(array).max(axis=-1) / 127
        numbers = np.rint(array / np.where(scales > 0, scales, 1)[..., None])
        return Scaled(jnp.asarray(numbers, jnp.int8), jnp.asarray(scales, jnp.float32))

    return Pages(half(keys), half(values))


def rounded(array, dtype):
    """Returns what a pool of a type holds of an array [..., H], as float32."""
    held = pool_of(array, array, dtype).keys
    if isinstance(held, Scaled):
        return np.asarray(held.numbers, np.float32) * np.asarray(held.scales)[..., None]
    return np.array(held.astype(jnp.float32))


def plain(query, keys, values):
    """Returns (out, log-sum-exp) in float64; 0 and −∞ for a row without keys."""
    query = np.asarray(jnp.asarray(query, jnp.float32), np.float64)
    out, lse = np.zeros_like(query), np.full(query.shape[:2], -np.inf)
    for b, n in np.ndindex(lse.shape):
        head = n // (query.shape[1] // len(keys[b]))
        key, value = (np.asarray(x[b][head], np.float64) for x in (keys, values))
        if len(key):
            scores = key @ query[b, n] / np.sqrt(query.shape[2])
            weights = np.exp(scores - scores.max())
            out[b, n] = weights / weights.sum() @ value
            lse[b, n] = scores.max() + np.log(weights.sum())
    return out, lse


def assert_plain(rows, found):
    """Compares a Partial with `plain`; bfloat16 rounds the scaled queries and the weights."""
    out, lse = plain(rows.query, rows.keys, rows.values)
    rough = rows.query.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.out, out, atol=0.02 if rough else 2e-6)
    seen = rows.lengths > 0
    np.testing.assert_allclose(found.lse[seen], lse[seen], atol=0.02 if rough else 4e-6)
    assert np.all(np.asarray(found.lse)[~seen] < -1e29)
    assert found.out.dtype == found.lse.dtype == jnp.float32


def attended(name, rows, shared=None):
    """Returns the Partial of an implementation."""
    attend = jax.jit(_module(name).attend)
    return attend(rows.query, rows.pool, np.int32(LAYER), rows.tables, rows.lengths, shared)


def _all_layers(query, new, pool, places, *, name):
    """One step over all layers, their pool in the carry as in a decoder."""

    def layer(index, carry):
        query, pool = carry
        return append_and_attend(query, new, pool, index, places=places, implementation=name)

    return jax.lax.fori_loop(0, pool.keys.shape[1], layer, (query, pool))


def temporaries(
    machine, name, *, K=4, N=28, H=128, L=28, S=128, B=64, M=260, tokens=4000, dtype="bfloat16"
):
    """Returns (bytes beside the arguments, bytes of the pool) of a step compiled for a machine.

    Defaults are the sizes of Qwen2.5-7B, 64 rows that may be 33,280 tokens long.
    """
    from experiments.rehearsal.topologies import topology

    device = jax.sharding.SingleDeviceSharding(topology(machine).devices[0])

    def shape(*dims, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(dims, dtype, sharding=device)

    empty = functools.partial(pages.zeros, (K, L, B * tokens // S, S, H), jnp.dtype(dtype))
    pool = jax.tree.map(lambda x: shape(*x.shape, dtype=x.dtype), jax.eval_shape(empty))
    ints, booleans = jnp.int32, jnp.bool_
    places = Places(shape(B, M, dtype=ints), shape(B, dtype=ints), shape(B, dtype=booleans))
    step = jax.jit(functools.partial(_all_layers, name=name), donate_argnums=2)
    compiled = step.lower(shape(B, N, H), Pages(*[shape(B, K, H)] * 2), pool, places).compile()
    assert "paged_attention" in compiled.as_text()
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(pool))
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= size  # the pool that is returned is the one given
    return memory.temp_size_in_bytes, size


_ELSEWHERE = """
from tests.ops.paged_cases import temporaries
for machine, name, sizes in CASES:
    print(*temporaries(machine, name, **sizes), flush=True)
"""


def temporaries_of(cases, **settings):
    """Compiles in a process of its own; returns (temporaries, pool) in MiB of each case."""
    ran = subprocess.run(
        [sys.executable, "-c", _ELSEWHERE.replace("CASES", repr(cases))],
        env={**os.environ, **settings}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-2000:]
    return [tuple(int(x) / 2**20 for x in line.split()) for line in ran.stdout.splitlines()]
