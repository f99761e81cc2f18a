"""Sums over the responses of one prompt, by group id.

Ids are arbitrary integers in any order. Every row is compared with every row: XLA fuses the
comparison into the reduction, so no [B, B] array is stored, and unlike a scatter the sum has one
order on every platform. A row that is not present counts nowhere.
"""

import jax
import jax.numpy as jnp


def _same(group_ids_B: jax.Array, present_B: jax.Array) -> jax.Array:
    return (group_ids_B[:, None] == group_ids_B[None, :]) & present_B[None, :]


def group_sum(values_B: jax.Array, group_ids_B: jax.Array, present_B: jax.Array) -> jax.Array:
    """Each row's group total over present rows [B]."""
    return jnp.where(_same(group_ids_B, present_B), values_B[None, :], 0).sum(axis=1)


def group_mean(values_B: jax.Array, group_ids_B: jax.Array, present_B: jax.Array) -> jax.Array:
    """Each row's group mean over present rows [B]; 0 for a group with none."""
    count_B = group_sum(jnp.ones_like(values_B), group_ids_B, present_B)
    return group_sum(values_B, group_ids_B, present_B) / jnp.maximum(count_B, 1)


def group_is_constant(
    values_B: jax.Array, group_ids_B: jax.Array, present_B: jax.Array
) -> jax.Array:
    """True [B] where all present rows of the group hold the same value (also: none or one)."""
    same_BB = _same(group_ids_B, present_B)
    high_B = jnp.where(same_BB, values_B[None, :], -jnp.inf).max(axis=1)
    low_B = jnp.where(same_BB, values_B[None, :], jnp.inf).min(axis=1)
    return high_B <= low_B
