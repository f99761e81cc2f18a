"""What a whole rollout batch decides, before it is cut: advantages and length scales."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from luspo_jax.objectives.advantages import ADVANTAGES
from luspo_jax.objectives.length_scales import LENGTH_SCALES
from luspo_jax.objectives.objective import Objective, bind
from luspo_jax.objectives.shapings import SHAPINGS


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RewardParts:
    """The parts of rewards, which the advantage "gdpo" normalises one by one.

    Attributes:
      values_BM: each part of each reward, before its weight.
      weights_M: λ, one for each part.
    """

    values_BM: jax.Array
    weights_M: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenStatistics:
    """What the sampling policy says of each token, which the advantage "otb" reads.

    Attributes:
      response_mask_BT: bool, true on response tokens.
      logprobs_BT: log π of the tokens, at the rollout temperature.
      collision_BT: Σ_v π_v² over the vocabulary at each token, in (0, 1].
      weight_BT: ρ, the weight of each token under truncated importance sampling; None for 1.
    """

    response_mask_BT: jax.Array
    logprobs_BT: jax.Array
    collision_BT: jax.Array
    weight_BT: jax.Array | None = None


def advantages(
    objective: Objective,
    rewards_B: jax.Array,
    group_ids_B: jax.Array,
    lengths_B: jax.Array,
    *,
    parts: RewardParts | None = None,
    tokens: TokenStatistics | None = None,
) -> jax.Array:
    """Returns the advantage of each response [B] or token [B, T], over a whole rollout batch.

    It is [B, T] if `objective.token_advantages`; the objective's shaping is applied.

    Args:
      objective: selects the advantage.
      rewards_B: rewards.
      group_ids_B: integers, equal for responses to one prompt, in any order.
      lengths_B: response lengths; a row of length 0 is absent, so pass the true lengths of rows
        that only the loss filters out.
      parts: of the rewards; needed for the advantage "gdpo".
      tokens: of the responses; needed for the advantage "otb".

    Raises:
      ValueError: shapes that differ, or parts or tokens that the advantage needs and lacks.
    """
    _require_rows(rewards_B=rewards_B, group_ids_B=group_ids_B, lengths_B=lengths_B)
    for name, given, needed in (
        ("parts", parts, objective.advantage == "gdpo"),
        ("tokens", tokens, objective.token_advantages),
    ):
        if needed and given is None:
            raise ValueError(f"{name} are missing: advantage {objective.advantage!r} reads them.")
    form = bind(ADVANTAGES[objective.advantage], objective)
    shape = None
    if objective.advantage_shaping != "none":
        shape = bind(SHAPINGS[objective.advantage_shaping], objective)
    return _advantages(form, shape, rewards_B, group_ids_B, lengths_B, parts, tokens)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _advantages(form, shape, rewards_B, group_ids_B, lengths_B, parts, tokens):
    lengths_B = real(lengths_B)
    dtype, present_B = lengths_B.dtype, lengths_B > 0

    def clean(values, present):
        return jnp.where(present, real(values).astype(dtype), 0)

    arrays = {
        "rewards_B": clean(rewards_B, present_B),
        "lengths_B": lengths_B,
        "group_ids_B": group_ids_B,
    }
    if parts is not None:
        arrays["parts_BM"] = clean(parts.values_BM, present_B[:, None])
        arrays["part_weights_M"] = real(parts.weights_M).astype(dtype)
    if tokens is not None:
        mask_BT = tokens.response_mask_BT & present_B[:, None]
        weight_BT = tokens.weight_BT
        arrays["response_mask_BT"] = mask_BT
        arrays["logprobs_BT"] = clean(tokens.logprobs_BT, mask_BT)
        arrays["collision_BT"] = clean(tokens.collision_BT, mask_BT)
        arrays["weight_BT"] = (
            mask_BT.astype(dtype) if weight_BT is None else clean(weight_BT, mask_BT)
        )
    result = form(**arrays)
    if shape is not None:
        result = shape(advantages_B=result, **arrays)
    return jax.lax.stop_gradient(result)


def length_scales(
    objective: Objective,
    lengths_B: jax.Array,
    group_ids_B: jax.Array,
    alpha_shift: jax.Array | float = 0.0,
) -> jax.Array:
    """Returns the length scale of each response [B], over a whole rollout or optimizer step.

    `alpha_shift` is added to the exponent of the adaptive scale and to λ of "lambda-grpo"; other
    scales ignore it.

    Raises:
      ValueError: shapes that differ.
    """
    _require_rows(lengths_B=lengths_B, group_ids_B=group_ids_B)
    function = bind(LENGTH_SCALES[objective.length_scale], objective)
    return _length_scales(function, lengths_B, group_ids_B, alpha_shift)


@functools.partial(jax.jit, static_argnums=0)
def _length_scales(function, lengths_B, group_ids_B, alpha_shift):
    lengths_B = real(lengths_B)
    shift = jnp.asarray(alpha_shift, lengths_B.dtype)
    scale_B = function(lengths_B=lengths_B, group_ids_B=group_ids_B, alpha_shift=shift)
    return jax.lax.stop_gradient(scale_B)


def validate_group_size(objective: Objective, group_size: int) -> None:
    """Refuses groups too small to compare a response with another.

    Raises:
      ValueError: fewer than two responses per prompt.
    """
    if group_size < 2:
        raise ValueError(
            f"group_size = {group_size}: advantage {objective.advantage!r} compares the responses "
            "to one prompt with each other; use at least 2."
        )


def real(values) -> jax.Array:
    """Casts to float32 at least: float64 stays, and integers become float64 under x64."""
    values = jnp.asarray(values)
    floating = jnp.issubdtype(values.dtype, jnp.floating)
    return values.astype(wide(values.dtype) if floating else float)


def wide(dtype) -> jnp.dtype:
    """Returns float64 for float64, else float32."""
    return jnp.dtype("float64" if dtype == jnp.dtype("float64") else "float32")


def _require_rows(**arrays_B) -> None:
    shapes = {name: jnp.shape(values) for name, values in arrays_B.items()}
    if len(set(shapes.values())) > 1 or any(len(shape) != 1 for shape in shapes.values()):
        listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"One value a response is expected, [B] each; got {listed}.")
