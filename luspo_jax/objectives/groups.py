"""Sums over the responses of one prompt, by group id.

A row whose length is 0 is absent: it neither counts in its group nor receives anything.
"""

import jax
import jax.numpy as jnp


def group_index(group_ids_B: jax.Array) -> jax.Array:
    """Dense group numbers 0 … B−1 for arbitrary integer ids [B]; static shapes, so jit-able."""
    size = group_ids_B.shape[0]
    _, index_B = jnp.unique(group_ids_B, return_inverse=True, size=size)
    return index_B.reshape(size).astype(jnp.int32)


def group_sum(values_B: jax.Array, index_B: jax.Array) -> jax.Array:
    """Each row's group total [B]."""
    return jax.ops.segment_sum(values_B, index_B, num_segments=index_B.shape[0])[index_B]


def group_mean(values_B: jax.Array, present_B: jax.Array, index_B: jax.Array) -> jax.Array:
    """Each row's group mean over present rows [B]; 0 for a group with none."""
    total_B = group_sum(jnp.where(present_B, values_B, 0), index_B)
    count_B = group_sum(present_B.astype(values_B.dtype), index_B)
    return total_B / jnp.maximum(count_B, 1)


def group_is_constant(values_B: jax.Array, present_B: jax.Array, index_B: jax.Array) -> jax.Array:
    """True [B] where all present rows of the group hold the same value (also: none or one)."""
    size = index_B.shape[0]
    high_B = jnp.where(present_B, values_B, -jnp.inf)
    low_B = jnp.where(present_B, values_B, jnp.inf)
    high_B = jax.ops.segment_max(high_B, index_B, num_segments=size)[index_B]
    low_B = jax.ops.segment_min(low_B, index_B, num_segments=size)[index_B]
    return high_B <= low_B
