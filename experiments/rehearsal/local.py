"""Local devices, with measured rates if the table of chips lacks them."""

import os
import time

import jax
import jax.numpy as jnp

from experiments.rehearsal.topologies import Chip

_SIZE = 1536  # side of the multiplied matrices
_ADDED = 2**24  # float32 values read and written, more than any cache holds
_TURNS = 8
_REPEATS = 3


def measured_chip(num_devices: int) -> Chip:
    """Returns a CPU device: its share of the host's memory and of all cores' speed."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / num_devices
    x = jnp.ones((_SIZE, _SIZE), jnp.float32)
    flops = 2 * _SIZE**3 / _best(jax.jit(jnp.matmul), x, x)
    y = jnp.ones(_ADDED, jnp.float32)
    adding = jax.jit(lambda v: jax.lax.fori_loop(0, _TURNS, lambda i, v: v + i, v)[:1])
    bandwidth = 2 * y.nbytes * _TURNS / _best(adding, y)
    share = bandwidth / num_devices
    return Chip(
        "cpu", memory, 0.1 * memory, flops / num_devices, share, share, share, num_devices, (),
        f"measured here in float32: a product of {_SIZE} × {_SIZE} matrices, and additions; "
        f"all cores together, shared by {num_devices} device(s)",
    )  # fmt: skip


def _best(function, *arguments):
    jax.block_until_ready(function(*arguments))
    seconds = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        seconds.append(time.perf_counter() - started)
    return min(seconds)
