"""The type that norms, softmax and sums are computed in."""

import jax
import jax.numpy as jnp


def wide_type(array: jax.Array) -> jnp.dtype:
    """float32, or float64 for float64 arrays: tests take rounding out of a question that way."""
    return jnp.dtype(jnp.float64 if array.dtype == jnp.float64 else jnp.float32)


def wide(array: jax.Array) -> jax.Array:
    """The array in its `wide_type`."""
    return array.astype(wide_type(array))
