"""Generates part of a long random draw without the rest."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.random import threefry2x32_p

_BELOW_ONE = np.nextafter(np.float32(-1), np.float32(0), dtype=np.float32)


def normal_slice(key: jax.Array, start: int, shape: tuple[int, ...]) -> jax.Array:
    """Returns `jax.random.normal(key, (n,))[start : start + size].reshape(shape)` for any large n.

    Threefry (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") maps (key, i) to
    the bits of number i, so each device can generate its own part of an array: x_i = √2 ·
    erf⁻¹(u_i), with u_i in (−1, 1) from 23 of 32 bits. The numbers equal jax's to the last bit,
    which the tests verify. For use under jit, inside `jax.enable_x64(True)`: positions exceed 32
    bits.

    Args:
      key: key of the default implementation, with the default jax_threefry_partitionable.
      start: uint64 position of the first number; may be traced.
      shape: shape of the float32 result, filled in row-major order.
    """
    key_words = jax.random.key_data(key)
    position = jnp.full(shape, start, jnp.uint64)
    for axis in range(len(shape)):
        stride = np.uint64(math.prod(shape[axis + 1 :]))
        position += stride * jax.lax.broadcasted_iota(jnp.uint64, shape, axis)
    counts = (position >> np.uint64(32)).astype(jnp.uint32), position.astype(jnp.uint32)
    words = threefry2x32_p.bind(*(jnp.broadcast_to(k, shape) for k in key_words), *counts)
    mantissa = (words[0] ^ words[1]) >> np.uint32(9)
    one_to_two = jax.lax.bitcast_convert_type(mantissa | np.uint32(0x3F800000), jnp.float32)
    uniform = (one_to_two - np.float32(1)) * (np.float32(1) - _BELOW_ONE) + _BELOW_ONE
    return np.float32(np.sqrt(2)) * jax.lax.erf_inv(jnp.maximum(_BELOW_ONE, uniform))
