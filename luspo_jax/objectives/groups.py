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


def group_extremes(
    values_B: jax.Array, group_ids_B: jax.Array, present_B: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns the least and the greatest [B] of the present rows of each row's group.

    Of a group without any they are +∞ and −∞.
    """
    same_BB = _same(group_ids_B, present_B)
    low_B = jnp.where(same_BB, values_B[None, :], jnp.inf).min(axis=1)
    high_B = jnp.where(same_BB, values_B[None, :], -jnp.inf).max(axis=1)
    return low_B, high_B


def group_is_constant(
    values_B: jax.Array, group_ids_B: jax.Array, present_B: jax.Array
) -> jax.Array:
    """Returns true [B] where the group's present rows are equal (or there are fewer than two)."""
    low_B, high_B = group_extremes(values_B, group_ids_B, present_B)
    return high_B <= low_B


def run_totals(values: jax.Array, starts: jax.Array, *, axis: int) -> jax.Array:
    """Returns, at each place, the sum over the run that it is in.

    Runs follow each other along `axis`; one begins wherever `starts` holds, and at index 0. Sums
    are taken in the order of a tree, so they are the same on every platform, and a long run loses
    no digits to what comes before it.

    Args:
      values: numbers.
      starts: bool, of the same shape.
      axis: along which runs lie.
    """

    def add(left, right):
        (x, _), (y, begins) = left, right
        return jnp.where(begins, y, x + y), left[1] | begins

    def last(right, left):  # reversed: `right` comes first
        (x, _), (y, ends) = right, left
        return jnp.where(ends, y, x), right[1] | ends

    sums, _ = jax.lax.associative_scan(add, (values, starts), axis=axis)
    ends = jnp.roll(starts, -1, axis=axis) | (
        jax.lax.broadcasted_iota(jnp.int32, starts.shape, axis) == starts.shape[axis] - 1
    )
    totals, _ = jax.lax.associative_scan(last, (sums, ends), axis=axis, reverse=True)
    return totals


def group_token_sum(
    values_BT: jax.Array, group_ids_B: jax.Array, present_BT: jax.Array
) -> jax.Array:
    """Returns at each token the sum over the present tokens at that place of its group [B, T]."""
    order_B = jnp.argsort(group_ids_B, stable=True)
    sorted_B = group_ids_B[order_B]
    starts_B = sorted_B != jnp.roll(sorted_B, 1)
    values_BT = jnp.where(present_BT, values_BT, 0)[order_B]
    starts_BT = jnp.broadcast_to(starts_B[:, None], values_BT.shape)
    return run_totals(values_BT, starts_BT, axis=0)[jnp.argsort(order_B)]
