"""Length pressure of a training run: selects responses, compiles programs, reports metrics."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from luspo_jax import image_rows, objectives, sharding
from luspo_jax.length import pressure
from luspo_jax.length.pressure import Half, Pressure
from luspo_jax.length.settings import LengthSettings
from luspo_jax.logprobs import Scoring, token_logprobs
from luspo_jax.objectives import Objective
from luspo_jax.types import TokenBatch

OWN = "own"  # name of the run's own objective
_RAISED = "own_raised"
_ALPHA_STEP = 0.25  # change in α that measures the slope of pressure


@dataclasses.dataclass(frozen=True)
class Laboratory:
    """What a run measures, and how; static under jit.

    Attributes:
      scoring: how log-probs are computed.
      objectives: (name, objective) pairs, the run's own first.
      bin_edges: edges of the length bins, tokens.
      rows_at_once: most rows whose log-probs are computed together.
    """

    scoring: Scoring
    objectives: tuple[tuple[str, Objective], ...]
    bin_edges: tuple[int, ...]
    rows_at_once: int


@dataclasses.dataclass(frozen=True)
class Sampled:
    """The responses of a step on which pressure is measured, as NumPy arrays.

    Attributes:
      rows: the token rows; the mask holds every response token.
      rewards_B: rewards.
      group_ids_B: integers, equal for responses to one prompt.
      counted_B: bool, whether the response has a verdict.
      trained_B: bool, whether it carries gradient.
      fresh_B: bool, whether the policy at the start of the step sampled it.
      prompts_B: objects, each response's prompt with its images; None if no prompt has images.
    """

    rows: TokenBatch
    rewards_B: np.ndarray
    group_ids_B: np.ndarray
    counted_B: np.ndarray
    trained_B: np.ndarray
    fresh_B: np.ndarray
    prompts_B: np.ndarray | None = None


def laboratory(
    settings: LengthSettings,
    scoring: Scoring,
    objective: Objective,
    *,
    max_response_length: int,
    rows_at_once: int,
) -> Laboratory:
    """Resolves settings; log-probs use the trainer's attention, which has second derivatives.

    Raises:
      ValueError: a preset that does not exist.
    """
    chosen = [(OWN, objective)]
    if objective.length_scale == "adaptive":
        up = objective.length_alpha + _ALPHA_STEP
        raised = up if up <= 2 else objective.length_alpha - _ALPHA_STEP
        chosen.append((_RAISED, dataclasses.replace(objective, length_alpha=raised)))
    chosen += [
        (name, objectives.preset(name, max_response_length=max_response_length))
        for name in settings.names
    ]
    return Laboratory(scoring, tuple(chosen), settings.bins(max_response_length), rows_at_once)


def chosen(sampled: Sampled, *, share: float, num_groups: int) -> Sampled | None:
    """Selects the first ⌈share · P⌉ groups that the current policy sampled and that carry gradient.

    Returns None if there are fewer.
    """
    wanted = math.ceil(share * num_groups)
    groups = np.unique(sampled.group_ids_B)
    rows_of = [np.flatnonzero(sampled.group_ids_B == group) for group in groups]
    usable = [
        rows for rows in rows_of if sampled.fresh_B[rows].all() and sampled.trained_B[rows].any()
    ]
    if len(usable) < wanted:
        return None
    return _rows(sampled, np.concatenate(usable[:wanted]))


def measure(
    lab: Laboratory, params: Any, end_params: Any, sampled: Sampled, alpha_shift: float
) -> dict[str, Pressure]:
    """Measures the pressure of every objective at the start of a step, and as NAME/end at its end.

    At the start all ratios are 1. At the end, coefficients are taken at `end_params`, so the ratios
    are those of the step's last updates and clipping shows.

    Args:
      lab: what to measure.
      params: the policy that sampled.
      end_params: the policy after the step's updates.
      sampled: output of `chosen`.
      alpha_shift: shift of an adaptive length scale.
    """
    sides = [_half(_rows(sampled, side), lab) for side in pressure.halves(sampled.group_ids_B)]
    result = _measure(params, end_params, *sides, np.float32(alpha_shift), lab=lab)
    return jax.device_get(result)


def lower_measure(lab: Laboratory, params: Any, sampled: Sampled) -> Any:
    """Lowers the program of `measure` for inspection; computes nothing.

    `params` may be shapes with shardings; `end_params` are assumed to have the same.
    """
    layout = lab.scoring.layout

    def shape(x):
        where = layout.sharding(("batch", *[None] * (x.ndim - 1))) if layout else None
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    sides = [
        jax.tree.map(shape, _half_rows(_rows(sampled, side), lab))
        for side in pressure.halves(sampled.group_ids_B)
    ]
    return _measure.lower(params, params, *sides, np.float32(0), lab=lab)


def taken(lab: Laboratory, params: Any, old_params: Any, sampled: Sampled) -> tuple[float, float]:
    """Returns the first-order change in mean length and reward by the update from `old_params`."""
    return jax.device_get(_taken(params, old_params, _half(sampled, lab), lab=lab))


def metrics(measured: Mapping[str, Pressure]) -> dict[str, float]:
    """Names the measurements as metrics: per unit of learning rate of plain gradient descent."""
    values = {}
    for name, p in measured.items():
        if name.startswith(_RAISED):
            continue
        values[f"length/pressure/{name}"] = p.length
        values[f"length/reward_pressure/{name}"] = p.reward
        values[f"length/pressure/{name}/pos"] = p.length_pos
        values[f"length/pressure/{name}/neg"] = p.length_neg
        share = "length/gradient_share" + ("" if name == OWN else f"/{name}")
        for k, (part, weight) in enumerate(zip(p.length_bins, p.gradient_share, strict=True)):
            values[f"length/pressure/{name}/bin_{k}"] = part
            values[f"{share}/bin_{k}"] = weight
    return {name: float(value) for name, value in values.items()}


def own_slope(lab: Laboratory, measured: Mapping[str, Pressure]) -> tuple[float, float]:
    """Returns the run's own pressure per unit of gradient mass, and its slope in α (0 if fixed)."""

    def normalized(name):
        p = measured[name]
        return float(p.length / p.mass) if p.mass > 0 else math.nan

    if _RAISED not in measured:
        return normalized(OWN), 0.0
    chosen = dict(lab.objectives)
    step = chosen[_RAISED].length_alpha - chosen[OWN].length_alpha
    return normalized(OWN), (normalized(_RAISED) - normalized(OWN)) / step


@functools.partial(jax.jit, static_argnames=("lab",))
def _measure(params, end_params, half_a, half_b, alpha_shift, *, lab):
    score, parts = _score(lab), _num_parts(lab, half_a)
    half_a, half_b = (
        dataclasses.replace(
            half, end_logprobs_BT=pressure.scored(score, end_params, half, num_parts=parts)
        )
        for half in (half_a, half_b)
    )
    found = pressure.cross_fitted(
        score,
        params,
        half_a,
        half_b,
        objectives=lab.objectives,
        bin_edges=lab.bin_edges,
        num_parts=parts,
        alpha_shift=alpha_shift,
    )
    return _whole(found, lab)


@functools.partial(jax.jit, static_argnames=("lab",))
def _taken(params, old_params, half, *, lab):
    change = jax.tree.map(lambda new, old: new - old, params, old_params)
    found = pressure.taken(_score(lab), params, change, half, num_parts=_num_parts(lab, half))
    return _whole(found, lab)


def _whole(tree, lab):
    """Replicates results to every process, because the host reads them."""
    layout = lab.scoring.layout
    return jax.tree.map(lambda x: sharding.constrain(x, (None,) * x.ndim, layout), tree)


def _score(lab):
    return lambda params, rows: token_logprobs(params, rows, scoring=lab.scoring)[0]


def _rows(sampled, rows):
    return dataclasses.replace(
        sampled,
        rows=jax.tree.map(lambda x: x[rows], sampled.rows),
        **{
            field.name: getattr(sampled, field.name)[rows]
            for field in dataclasses.fields(sampled)
            if field.name != "rows" and getattr(sampled, field.name) is not None
        },
    )


def _half(sampled, lab):
    layout = lab.scoring.layout
    return jax.tree.map(
        lambda x: sharding.put(x, ("batch", *[None] * (x.ndim - 1)), layout),
        _half_rows(sampled, lab),
    )


def _half_rows(sampled, lab):
    mask_BT = sampled.rows.response_mask_BT & sampled.counted_B[:, None]
    half = Half(
        rows=dataclasses.replace(sampled.rows, response_mask_BT=mask_BT),
        response_mask_BT=mask_BT,
        rewards_B=sampled.rewards_B.astype(np.float32),
        group_ids_B=sampled.group_ids_B,
        trained_B=sampled.trained_B,
    )
    # Pad with empty rows, which never count, so that each device gets the same number.
    missing = -len(sampled.rewards_B) % _row_parts(lab)
    half = jax.tree.map(lambda x: np.pad(x, [(0, missing), *[(0, 0)] * (x.ndim - 1)]), half)
    return dataclasses.replace(half, rows=_with_images(half, sampled.prompts_B, lab))


def _with_images(half, prompts_B, lab):
    """Adds the images of each piece whose log-probs are computed at a time to the half's rows."""
    if prompts_B is None:
        return half.rows
    total, num_parts = len(half.rewards_B), _num_parts(lab, half)
    return image_rows.with_images(
        half.rows,
        prompts_B,
        np.arange(total) // (total // num_parts),
        num_parts,
        config=lab.scoring.model,
        layout=lab.scoring.layout,
    )


def _row_parts(lab):
    return lab.scoring.layout.size("batch") if lab.scoring.layout else 1


def _num_parts(lab, half):
    """Returns the fewest equal pieces of at most `rows_at_once` rows, each even over devices."""
    total, even = half.rewards_B.shape[0], _row_parts(lab)
    return next(
        n
        for n in range(1, total + 1)
        if total % (n * even) == 0 and total // n <= max(lab.rows_at_once, even)
    )
