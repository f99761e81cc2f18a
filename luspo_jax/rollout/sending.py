"""Sends weights from the processes that train to those that sample, piece by piece."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from luspo_jax import sharding
from luspo_jax.hosts import guard, processes
from luspo_jax.hosts.roles import Roles
from luspo_jax.models import decoder
from luspo_jax.models.decoder_config import DecoderConfig
from luspo_jax.rollout.handover import cast_program
from luspo_jax.sharding import Layout

_PIECE_BYTES = 1 << 26  # of a parameter at a time; at least one row of its first dimension


def sent_params(
    params: Any, roles: Roles, *, config: DecoderConfig, layout: Layout | None, dtype: Any
) -> Any:
    """Returns the weights as the sampler reads them where this process samples, else None.

    All processes must call. The cast is made where the weights lie. A parameter then travels in
    pieces: of each, the first process that trains has a copy, and shares it with all, bit for bit.
    Each process that samples assembles the parameter on the host, and puts its parts onto its
    devices.

    Args:
      params: master weights in the training layout; anything where this process only samples.
      roles: of the processes.
      config: of the model.
      layout: the rollout's.
      dtype: of the sampler.
    """
    dtype = jnp.dtype(dtype)
    shapes, tree = _shapes(config, dtype)
    leaves = jax.tree.leaves(cast_program(dtype)(params)) if roles.trains else [None] * len(shapes)
    own = sharding.on_own_devices(layout)
    places = jax.tree.leaves(sharding.shardings(decoder.param_axes(config, dtype), own))
    processes.barrier("weights", guard.MEETING)
    with guard.phase("gather"):
        found = []
        for index, shape in enumerate(shapes):
            whole = _sent(leaves[index], shape, roles)
            leaves[index] = None  # freed
            if roles.samples:
                found.append(jax.device_put(whole, places[index]) if own else jnp.asarray(whole))
    return jax.tree.unflatten(tree, found) if roles.samples else None


@functools.cache  # tracing the model is slow
def _shapes(config, dtype):
    return jax.tree.flatten(decoder.abstract_params(config, dtype))


def _sent(leaf, like, roles):
    """Returns a parameter on the host of a process that samples; elsewhere, None."""
    members, shape = processes.everyone(), like.shape
    row_bytes = math.prod(shape[1:]) * like.dtype.itemsize
    rows = min(shape[0], max(1, _PIECE_BYTES // row_bytes))
    whole = np.empty(shape, like.dtype) if roles.samples else None
    empty = np.zeros((rows, *shape[1:]), like.dtype)
    for start in range(0, shape[0], rows):
        start = min(start, shape[0] - rows)  # the last piece overlaps: pieces have one shape
        piece = empty
        if leaf is not None:
            place = sharding.whole_on_each(leaf)
            piece = _piece(leaf, np.int32(start), rows, place).addressable_data(0)
        row = sharding.stacked(piece, members)
        piece = _of_one(members, roles.train[0])(row).addressable_data(0)
        if roles.samples:
            whole[start : start + rows] = np.asarray(piece).view(like.dtype)
    return whole


@functools.partial(jax.jit, static_argnames=("rows", "place"))
def _piece(leaf, start, rows, place):
    piece = jax.lax.dynamic_slice_in_dim(leaf, start, rows)
    return sharding.constrain_tree(piece, place)


@functools.cache
def _of_one(members, source):
    """Returns the program that tells all processes the bits of one row.

    XLA makes it a sum in which the other rows count 0, which integers survive as they are, -0.0 and
    16-bit floats among them; a device holds two copies of the piece.
    """

    def one(rows):
        bits = jnp.dtype(f"uint{8 * rows.dtype.itemsize}")
        return jax.lax.bitcast_convert_type(rows, bits)[source]

    return jax.jit(one, out_shardings=sharding.across(members).sharding(()))
