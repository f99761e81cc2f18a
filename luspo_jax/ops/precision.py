"""The dtype in which norms, softmax and sums are computed."""

import jax
import jax.numpy as jnp


def wide_type(array: jax.Array) -> jnp.dtype:
    """Returns float32, or float64 for float64 arrays, with which tests rule out rounding."""
    return jnp.dtype(jnp.float64 if array.dtype == jnp.float64 else jnp.float32)


def wide(array: jax.Array) -> jax.Array:
    """Casts the array to its `wide_type`."""
    return array.astype(wide_type(array))
