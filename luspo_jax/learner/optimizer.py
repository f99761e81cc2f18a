"""AdamW from optax, a warm-up counted in rollout steps, and clipping by global norm."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax


@functools.cache  # one object for equal settings, so that runs of one process share programs
def adamw(*, b1: float, b2: float, eps: float, weight_decay: float) -> optax.GradientTransformation:
    """Returns AdamW with updates *not* yet multiplied by the learning rate (`apply` does that).

    The rate is an argument of the update, so that a warm-up counts rollout steps instead of
    optimizer steps, and resuming needs no schedule state. Biases and norm scales (one-dimensional
    arrays in each layer) decay like all else, as in torch's AdamW, which the peers use.
    """
    return optax.chain(
        optax.scale_by_adam(b1=b1, b2=b2, eps=eps),
        optax.add_decayed_weights(weight_decay) if weight_decay else optax.identity(),
    )


def learning_rate(step: int, *, peak: float, warmup_steps: int) -> float:
    """Returns peak · min(1, (step + 1) / warmup_steps) for rollout step `step`, from 0."""
    if warmup_steps <= 0:
        return peak
    return peak * min(1.0, (step + 1) / warmup_steps)


def constant(share: float, *, final: float) -> float:
    """1."""
    return 1.0


def linear(share: float, *, final: float) -> float:
    """1 − (1 − final) · share."""
    return 1 - (1 - final) * share


def cosine(share: float, *, final: float) -> float:
    """final + (1 − final) · (1 + cos(π · share)) / 2."""
    return final + (1 - final) * (1 + math.cos(math.pi * share)) / 2


# Factor on the learning rate once `share` of the steps after the warm-up are taken.
SCHEDULES = {"constant": constant, "linear": linear, "cosine": cosine}


def scheduled_rate(
    step: int,
    *,
    peak: float,
    warmup_steps: int,
    num_steps: int,
    schedule: str = "constant",
    final: float = 0.0,
) -> float:
    """Returns the rate of step `step` (from 0): the warm-up's, and after it times a schedule.

    The last of `num_steps` has the rate final · peak, with a schedule that falls.
    """
    rate = learning_rate(step, peak=peak, warmup_steps=warmup_steps)
    first = max(warmup_steps - 1, 0)  # the step that reaches the peak
    if step <= first:
        return rate
    share = min(1.0, (step - first) / max(1, num_steps - 1 - first))
    return rate * SCHEDULES[schedule](share, final=final)


def clip_by_global_norm(grads: Any, max_norm: float) -> tuple[Any, jax.Array, jax.Array]:
    """Scales `grads` to a global L2 norm of at most `max_norm` (0 = never).

    Returns:
      The gradients, their norm before clipping, and whether they were clipped.
    """
    norm = optax.global_norm(grads)
    if max_norm == 0:
        return grads, norm, jnp.zeros((), bool)
    clipped = norm > max_norm
    factor = jnp.where(clipped, max_norm / norm, 1.0)
    return jax.tree.map(lambda g: g * factor.astype(g.dtype), grads), norm, clipped


def apply(
    optimizer: optax.GradientTransformation, params: Any, grads: Any, opt_state: Any, *, rate: Any
) -> tuple[Any, Any]:
    """Takes θ ← θ − rate · update(grads); returns new (params, opt_state)."""
    updates, opt_state = optimizer.update(grads, opt_state, params)
    params = jax.tree.map(lambda p, u: p - (rate * u).astype(p.dtype), params, updates)
    return params, opt_state
