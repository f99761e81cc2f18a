"""Sums over the responses to one prompt, by group id.

Ids are arbitrary integers in any order. Every row is compared with every row: XLA fuses the
comparison into the reduction, so no [B, B] array is stored. Unlike a scatter, the sum has the same
order on every platform. Absent rows do not count.
"""

import jax
import jax.numpy as jnp


def _same(group_ids_B: jax.Array, present_B: jax.Array) -> jax.Array:
    return (group_ids_B[:, None] == group_ids_B[None, :]) & present_B[None, :]


def group_sum(values_B: jax.Array, group_ids_B: jax.Array, present_B: jax.Array) -> jax.Array:
    """Returns the sum over the present rows of each row's group [B]."""
    return jnp.where(_same(group_ids_B, present_B), values_B[None, :], 0).sum(axis=1)


def group_mean(values_B: jax.Array, group_ids_B: jax.Array, present_B: jax.Array) -> jax.Array:
    """Returns the mean over the present rows of each row's group [B]; 0 if the group has none."""
    count_B = group_sum(jnp.ones_like(values_B), group_ids_B, present_B)
    return group_sum(values_B, group_ids_B, present_B) / jnp.maximum(count_B, 1)


def group_is_constant(
    values_B: jax.Array, group_ids_B: jax.Array, present_B: jax.Array
) -> jax.Array:
    """Returns true [B] where the group's present rows are equal (or there are fewer than two)."""
    same_BB = _same(group_ids_B, present_B)
    high_B = jnp.where(same_BB, values_B[None, :], -jnp.inf).max(axis=1)
    low_B = jnp.where(same_BB, values_B[None, :], jnp.inf).min(axis=1)
    return high_B <= low_B
