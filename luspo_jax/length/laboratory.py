"""Length pressure of a training run: which responses, which programs, which metrics."""

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
from luspo_jax.logprobs import LogprobRule, token_logprobs
from luspo_jax.objectives import Objective
from luspo_jax.types import TokenBatch

OWN = "own"  # the run's objective among those measured
_RAISED = "own_raised"
_ALPHA_STEP = 0.25  # how far α is moved to see what pressure does


@dataclasses.dataclass(frozen=True)
class Laboratory:
    """What a run measures; static under jit.

    Attributes:
      rule: how log-probabilities are computed.
      objectives: (name, objective) pairs, the run's own first.
      bin_edges: of the length bins, tokens.
      rows_at_once: most rows scored together.
    """

    rule: LogprobRule
    objectives: tuple[tuple[str, Objective], ...]
    bin_edges: tuple[int, ...]
    rows_at_once: int


@dataclasses.dataclass(frozen=True)
class Sampled:
    """The responses of a step that pressure reads, as NumPy arrays.

    Attributes:
      rows: the token rows; the mask holds every response token.
      rewards_B: rewards.
      group_ids_B: of each prompt.
      counted_B: whether the response has a verdict.
      trained_B: whether it carries gradient.
      fresh_B: sampled by the policy that starts the step.
      prompts_B: objects, the prompt of each with its images; None where no prompt has any.
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
    rule: LogprobRule,
    objective: Objective,
    *,
    max_response_length: int,
    rows_at_once: int,
) -> Laboratory:
    """Resolves settings; the scorer is the trainer's, whose attention has second derivatives.

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
    return Laboratory(rule, tuple(chosen), settings.bins(max_response_length), rows_at_once)


def chosen(sampled: Sampled, *, share: float, num_groups: int) -> Sampled | None:
    """The first ⌈share · P⌉ groups that the current policy sampled and that carry gradient.

    None where there are not that many.
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
    """Pressure of every objective at the start of a step, and as NAME/end at its end.

    At the start all ratios are 1. At the end, coefficients are taken at `end_params`, so that
    the ratios are those of the step's last updates and clipping shows.

    Args:
      lab: what to measure.
      params: the policy that sampled.
      end_params: the policy after the step's updates.
      sampled: of `chosen`.
      alpha_shift: of an adaptive length scale.
    """
    sides = [_half(_rows(sampled, side), lab) for side in pressure.halves(sampled.group_ids_B)]
    result = _measure(params, end_params, *sides, np.float32(alpha_shift), lab=lab)
    return jax.device_get(result)


def lower_measure(lab: Laboratory, params: Any, sampled: Sampled) -> Any:
    """The lowered program of `measure`, for looking at what it holds; nothing is computed.

    `params` may be shapes with shardings; `end_params` are taken to lie alike.
    """
    layout = lab.rule.how.layout

    def shape(x):
        where = layout.sharding(("batch", *[None] * (x.ndim - 1))) if layout else None
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    sides = [
        jax.tree.map(shape, _half_rows(_rows(sampled, side), lab))
        for side in pressure.halves(sampled.group_ids_B)
    ]
    return _measure.lower(params, params, *sides, np.float32(0), lab=lab)


def taken(lab: Laboratory, params: Any, old_params: Any, sampled: Sampled) -> tuple[float, float]:
    """First-order change of mean length and mean reward by the update from `old_params`."""
    return jax.device_get(_taken(params, old_params, _half(sampled, lab), lab=lab))


def metrics(measured: Mapping[str, Pressure]) -> dict[str, float]:
    """Measurements by metric name: per unit of learning rate of plain gradient descent."""
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
    """The run's own pressure per unit of gradient mass, and its derivative in α (0 if fixed)."""

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
    """Results on every process, because the host reads them."""
    layout = lab.rule.how.layout
    return jax.tree.map(lambda x: sharding.constrain(x, (None,) * x.ndim, layout), tree)


def _score(lab):
    return lambda params, rows: token_logprobs(params, rows, rule=lab.rule)[0]


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
    layout = lab.rule.how.layout
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
    # Empty rows, which count nowhere, so that devices have equally many.
    missing = -len(sampled.rewards_B) % _row_parts(lab)
    half = jax.tree.map(lambda x: np.pad(x, [(0, missing), *[(0, 0)] * (x.ndim - 1)]), half)
    return dataclasses.replace(half, rows=_with_images(half, sampled.prompts_B, lab))


def _with_images(half, prompts_B, lab):
    """The half's rows with the images of each piece that is scored at a time."""
    if prompts_B is None:
        return half.rows
    total, num_parts = len(half.rewards_B), _num_parts(lab, half)
    return image_rows.with_images(
        half.rows,
        prompts_B,
        np.arange(total) // (total // num_parts),
        num_parts,
        config=lab.rule.how.model,
        layout=lab.rule.how.layout,
    )


def _row_parts(lab):
    return lab.rule.how.layout.size("batch") if lab.rule.how.layout else 1


def _num_parts(lab, half):
    """Fewest equal pieces of at most `rows_at_once` rows, each spread evenly over the devices."""
    total, even = half.rewards_B.shape[0], _row_parts(lab)
    return next(
        n
        for n in range(1, total + 1)
        if total % (n * even) == 0 and total // n <= max(lab.rows_at_once, even)
    )
