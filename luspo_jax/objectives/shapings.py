"""Shapings: change advantages by length, after they are formed and before they are trained on.

Each function is `f(advantages_B, rewards_B, lengths_B, group_ids_B, *, hyperparameters) ->
advantages_B`; no gradient flows through it. A row of length 0 is absent. Neither of the two from
the literature changes the sign of an advantage, so what is right stays preferred to what is wrong;
a reward for length can change it.
"""

import jax
import jax.numpy as jnp

from luspo_jax.objectives.groups import group_extremes, group_mean, group_sum

_EPSILON = 1e-6  # tokens: keeps 0/0 out


def none(advantages_B: jax.Array) -> jax.Array:
    """Ã = A."""
    return advantages_B


def qglas(
    advantages_B: jax.Array,
    rewards_B: jax.Array,
    lengths_B: jax.Array,
    group_ids_B: jax.Array,
    *,
    qglas_weight: float,
    qglas_cap: float,
) -> jax.Array:
    """Ã = A + λ_g·h, h = clip((L_ref − L)/(L_ref + ε), 0, c)/c where A > 0, else 0.

    L_ref is the mean length of the group's responses with A > 0, λ_g = λ·σ_g, σ_g the
    unbiased deviation of the group's rewards: quality decides the sign, length the size (QGLAS
    2026, Eq 1–6). The paper lets λ_g follow the spread of rewards; how, and λ and c (both ½ here),
    are unconfirmed.
    """
    present_B = lengths_B > 0
    positive_B = _better(advantages_B, group_ids_B, present_B)
    reference_B = group_mean(lengths_B, group_ids_B, positive_B)
    saved_B = (reference_B - lengths_B) / (reference_B + _EPSILON)
    bonus_B = jnp.clip(saved_B, 0, qglas_cap) / qglas_cap
    mean_B = group_mean(rewards_B, group_ids_B, present_B)
    count_B = group_sum(jnp.ones_like(rewards_B), group_ids_B, present_B)
    squares_B = group_sum((rewards_B - mean_B) ** 2, group_ids_B, present_B)
    spread_B = jnp.sqrt(squares_B / jnp.maximum(count_B - 1, 1))
    return advantages_B + jnp.where(positive_B, qglas_weight * spread_B * bonus_B, 0)


def intern_s2(
    advantages_B: jax.Array,
    lengths_B: jax.Array,
    group_ids_B: jax.Array,
    *,
    intern_share: float,
    intern_alpha: float,
    intern_gamma: float,
) -> jax.Array:
    """Ã = (Σ_P A / Σ_P wA)·w·A in P = {A > 0}, if |P| ≥ τG; w = α + (1−α)(1 − x)^γ.

    x = (L − L_min)/(L_max − L_min + ε) over P. The sum of positive advantages stays, the short get
    more of it; hard groups, with few right, are left alone (Intern-S2 report 2026, §4.3.2, Eq
    14–17). τ ½, α ½ and γ 1 are ours: the report's are not known.
    """
    present_B = lengths_B > 0
    positive_B = _better(advantages_B, group_ids_B, present_B)
    low_B, high_B = group_extremes(lengths_B, group_ids_B, positive_B)
    place_B = jnp.where(positive_B, (lengths_B - low_B) / (high_B - low_B + _EPSILON), 0)
    weight_B = intern_alpha + (1 - intern_alpha) * jnp.clip(1 - place_B, 0, 1) ** intern_gamma
    before_B = group_sum(advantages_B, group_ids_B, positive_B)
    after_B = group_sum(weight_B * advantages_B, group_ids_B, positive_B)
    ones_B = jnp.ones_like(advantages_B)
    many_B = group_sum(ones_B, group_ids_B, positive_B) >= intern_share * group_sum(
        ones_B, group_ids_B, present_B
    )
    scale_B = before_B / jnp.where(after_B > 0, after_B, 1)
    return jnp.where(positive_B & many_B & (after_B > 0), scale_B * weight_B, 1) * advantages_B


def _better(advantages_B, group_ids_B, present_B):
    """Returns where A > 0 by more than the rounding of a mean: else a reward equal to its group's
    mean would count or not by the order of the rows."""
    low_B, high_B = group_extremes(advantages_B, group_ids_B, present_B)
    return present_B & (advantages_B > 1e-6 * jnp.maximum(high_B, -low_B))


SHAPINGS = {"none": none, "qglas": qglas, "intern-s2": intern_s2}
