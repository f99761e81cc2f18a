"""Length pressure of a training run: selects responses, compiles programs, reports metrics."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from luspo_jax import objectives, sharding
from luspo_jax.learner import rows as training_rows
from luspo_jax.learner.logprobs import LogprobRule, microbatch_logprobs, of_responses
from luspo_jax.learner.plan import one_a_row
from luspo_jax.learner.policies import sequence_lengths
from luspo_jax.learner.rows import Planner, token_rows
from luspo_jax.length import pressure
from luspo_jax.length.candidates import Rescorer, candidate
from luspo_jax.length.pressure import Candidate, Half, Pressure
from luspo_jax.length.settings import LengthSettings
from luspo_jax.models import decoder
from luspo_jax.objectives import Objective
from luspo_jax.rollout import Response
from luspo_jax.types import TokenRows

OWN = "own"  # name of the run's own objective
_RAISED = "own_raised"
_ALPHA_STEP = 0.25  # change in α that measures the slope of pressure


@dataclasses.dataclass(frozen=True)
class Laboratory:
    """What a run measures, and how; static under jit.

    Attributes:
      rule: how log-probabilities are computed.
      objectives: what is measured, the run's own first.
      bin_edges: edges of the length bins, in tokens.
      rows_at_once: most rows computed together.
      rescorer: rewards the responses of a half; None keeps the rewards that they have.
    """

    rule: LogprobRule
    objectives: tuple[Candidate, ...]
    bin_edges: tuple[int, ...]
    rows_at_once: int
    rescorer: Rescorer | None = None

    @property
    def by_name(self) -> dict[str, Objective]:
        """Returns the objectives by name."""
        return {each.name: each.objective for each in self.objectives}

    @property
    def rewards(self) -> list[str]:
        """Returns the rewards of a group besides the run's, each once."""
        return list(dict.fromkeys(each.reward for each in self.objectives if each.reward))

    @property
    def reads_parts(self) -> bool:
        """Whether an objective reads the parts of rewards."""
        return any(each.objective.advantage == "gdpo" for each in self.objectives)

    @property
    def reads_tokens(self) -> bool:
        """Whether an objective reads what the policy says of tokens not drawn."""
        return any(each.objective.token_advantages for each in self.objectives)


@dataclasses.dataclass(frozen=True)
class Sampled:
    """The responses of a step on which pressure is measured.

    Attributes:
      prompts: of each response (`prompts.PromptRecord`).
      responses: with their rewards.
      group_ids_B: equal for the responses of one prompt.
      width: tokens of a row.
    """

    prompts: Sequence[Any]
    responses: Sequence[Response]
    group_ids_B: np.ndarray
    width: int


def laboratory(
    settings: LengthSettings,
    rule: LogprobRule,
    objective: Objective,
    *,
    max_response_length: int,
    rows_at_once: int,
    rescorer: Callable[[Sequence[str]], Rescorer] | None = None,
) -> Laboratory:
    """Resolves settings; log-probs are the trainer's, with attention that has second derivatives.

    Args:
      settings: of the run.
      rule: how log-probs are computed.
      objective: the run's.
      max_response_length: the sampler's limit, in tokens.
      rows_at_once: most rows computed together.
      rescorer: makes the Rescorer that knows these rewards of a group besides the run's.

    Raises:
      ValueError: a preset, shaping, advantage or reward that does not exist.
    """
    chosen = [Candidate(OWN, objective)]
    if objective.length_scale == "adaptive":
        up = objective.length_alpha + _ALPHA_STEP
        raised = up if up <= 2 else objective.length_alpha - _ALPHA_STEP
        chosen.append(Candidate(_RAISED, dataclasses.replace(objective, length_alpha=raised)))
    chosen += [candidate(name, max_response_length=max_response_length) for name in settings.names]
    lab = Laboratory(rule, tuple(chosen), settings.bins(max_response_length), rows_at_once)
    return dataclasses.replace(lab, rescorer=rescorer and rescorer(lab.rewards))


def chosen(sampled: Sampled, *, version: int, share: float, num_groups: int) -> Sampled | None:
    """Returns the first ⌈share · P⌉ groups that the current policy sampled and that carry gradient.

    None if there are fewer: programs are compiled for one size.
    """
    wanted = math.ceil(share * num_groups)
    fresh_B = np.array([(r.versions == version).all() for r in sampled.responses])
    trained_B = _trained(sampled)
    groups = np.unique(sampled.group_ids_B)
    rows_of = [np.flatnonzero(sampled.group_ids_B == group) for group in groups]
    usable = [rows for rows in rows_of if fresh_B[rows].all() and trained_B[rows].any()]
    if len(usable) < wanted:
        return None
    return _part(sampled, np.concatenate(usable[:wanted]))


def measure(
    lab: Laboratory,
    params: Any,
    end_params: Any,
    sampled: Sampled,
    alpha_shift: float,
    base: Any = None,
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
      base: the frozen weights of an adapter; None without one.
    """
    sides = [_half(_part(sampled, side), lab) for side in pressure.halves(sampled.group_ids_B)]
    result = _measure(base, params, end_params, *sides, np.float32(alpha_shift), lab=lab)
    return jax.device_get(result)


def abstract_half(lab: Laboratory, responses: int, width: int) -> Half:
    """Returns the shapes and shardings of a half with `responses` text responses."""
    model, layout = lab.rule.how.model, lab.rule.how.layout
    parts = _num_parts(lab, responses)
    responses += -responses % _row_parts(lab)
    ints = jax.ShapeDtypeStruct((responses, width), np.int32)
    bools = jax.ShapeDtypeStruct((responses, width), bool)
    positions = (responses, width, 3) if model.vision else (responses, width)
    each = jax.ShapeDtypeStruct((responses,), np.int32)
    rows = TokenRows(
        ints, jax.ShapeDtypeStruct(positions, np.int32), ints, bools, responses // parts
    )
    half = Half(
        rows=(rows, each, bools),
        response_mask_BT=bools,
        rewards_B=jax.ShapeDtypeStruct((responses,), np.float32),
        group_ids_B=each,
        trained_B=jax.ShapeDtypeStruct((responses,), bool),
        **_abstract_rewards(lab, responses),
    )
    return training_rows.abstract(half, layout)


def _abstract_rewards(lab, responses):
    if lab.rescorer is None:
        return {}
    numbers_B = jax.ShapeDtypeStruct((responses,), np.float32)
    parts = {}
    for name in ("", *lab.rewards) if lab.reads_parts else ():
        weights = lab.rescorer.weights(name)
        values = jax.ShapeDtypeStruct((responses, len(weights)), np.float32)
        parts[name] = objectives.RewardParts(
            values, jax.ShapeDtypeStruct(weights.shape, np.float32)
        )
    return {"other_rewards": dict.fromkeys(lab.rewards, numbers_B), "parts": parts}


def lower_measure(lab: Laboratory, params: Any, half: Half, base: Any = None) -> Any:
    """Returns the lowered program of `measure`, to inspect its memory; computes nothing.

    `params` may be shapes with shardings, `half` the result of `abstract_half`; `end_params` are
    assumed to be sharded as `params`, and the other half as `half`.
    """
    return _measure.lower(base, params, params, half, half, np.float32(0), lab=lab)


def taken(
    lab: Laboratory, params: Any, old_params: Any, sampled: Sampled, base: Any = None
) -> tuple[float, float]:
    """Returns the first-order change in mean length and reward by the update from `old_params`."""
    return jax.device_get(_taken(base, params, old_params, _half(sampled, lab), lab=lab))


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
    chosen = lab.by_name
    step = chosen[_RAISED].length_alpha - chosen[OWN].length_alpha
    return normalized(OWN), (normalized(_RAISED) - normalized(OWN)) / step


@functools.partial(jax.jit, static_argnames=("lab",))
def _measure(base, params, end_params, half_a, half_b, alpha_shift, *, lab):
    compute, parts = _logprobs(lab, base), _num_parts(lab, half_a.rewards_B.shape[0])
    half_a, half_b = (
        dataclasses.replace(
            half,
            end_logprobs_BT=pressure.half_logprobs(compute, end_params, half, num_parts=parts),
        )
        for half in (half_a, half_b)
    )
    if lab.reads_tokens:
        squares = _collisions(lab, base)
        half_a, half_b = (
            dataclasses.replace(
                half, collision_BT=pressure.half_logprobs(squares, params, half, num_parts=parts)
            )
            for half in (half_a, half_b)
        )
    found = pressure.cross_fitted(
        compute,
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
def _taken(base, params, old_params, half, *, lab):
    change = jax.tree.map(lambda new, old: new - old, params, old_params)
    parts = _num_parts(lab, half.rewards_B.shape[0])
    found = pressure.taken(_logprobs(lab, base), params, change, half, num_parts=parts)
    return _whole(found, lab)


def _whole(tree, lab):
    """Replicates results on every process, because the host reads them."""
    layout = lab.rule.how.layout
    return jax.tree.map(lambda x: sharding.constrain(x, (None,) * x.ndim, layout), tree)


def _logprobs(lab, base):
    """Returns the function (params, a micro-batch of a half) → log-probs of its responses."""

    def compute(params, part):
        rows, starts_B, mask_BT = part
        params = decoder.whole_params(base, params, lab.rule.how)
        found = microbatch_logprobs(params, rows, rule=lab.rule)
        return of_responses(found.logprobs_RT, starts_B, mask_BT, lab.rule.how.layout)

    return compute


def _collisions(lab, base):
    """Returns the function (params, a micro-batch of a half) → Σ_v π_v² at its tokens."""
    rule = dataclasses.replace(lab.rule, collision=True)

    def compute(params, part):
        rows, starts_B, mask_BT = part
        params = decoder.whole_params(base, params, rule.how)
        found = microbatch_logprobs(params, rows, rule=rule)
        return of_responses(found.collision_RT, starts_B, mask_BT, rule.how.layout)

    return compute


def _part(sampled, chosen):
    return dataclasses.replace(
        sampled,
        prompts=[sampled.prompts[i] for i in chosen],
        responses=[sampled.responses[i] for i in chosen],
        group_ids_B=sampled.group_ids_B[chosen],
    )


def _trained(sampled):
    return np.array([response.trained.any() for response in sampled.responses])


def _half(sampled, lab):
    """Puts a half on the devices: one response per row, plus empty rows to divide evenly."""
    total = len(sampled.responses)
    total += -total % _row_parts(lab)
    at_once = total // _num_parts(lab, total)
    responses = sampled.responses
    plan = one_a_row(
        sequence_lengths(sampled.prompts, responses),
        width=sampled.width,
        rows_per_microbatch=at_once,
        num_rows=total,
    )
    # Every token of a response with a verdict is used, whatever the step trains on.
    masks = [np.full(len(response.tokens), response.counted) for response in responses]
    how = lab.rule.how
    planner = Planner(how.model, sampled.width, 1, at_once, layout=how.layout)
    tokens = [response.tokens for response in responses]
    mask_BT = plan.place(masks)
    half = Half(
        rows=(
            token_rows(planner, plan, sampled.prompts, tokens, masks),
            plan.place_one(plan.firsts_B),
            mask_BT,
        ),
        response_mask_BT=mask_BT,
        group_ids_B=plan.place_one(sampled.group_ids_B),
        trained_B=plan.place_one(_trained(sampled)),
        segment_starts_BT=_segments(plan, responses),
        **_rewards(sampled, lab, plan),
    )
    return training_rows.put(half, how.layout)


def _rewards(sampled, lab, plan):
    """Returns the rewards of a half, and their parts where an objective reads them."""
    if lab.rescorer is None:
        values_B = np.array([r.reward.value for r in sampled.responses], np.float32)
        return {"rewards_B": plan.place_one(values_B)}
    known = sampled.prompts, sampled.responses, sampled.group_ids_B
    found = {name: lab.rescorer.of(*known, name) for name in ("", *lab.rewards)}
    parts = {}
    for name, rescored in found.items() if lab.reads_parts else ():
        values_BM = plan.place_one(rescored.parts_BM)
        parts[name] = objectives.RewardParts(values_BM, lab.rescorer.weights(name))
    placed = {name: plan.place_one(rescored.values_B) for name, rescored in found.items()}
    return {"rewards_B": placed.pop(""), "other_rewards": placed, "parts": parts}


def _segments(plan, responses):
    starts = [response.segment_starts for response in responses]
    return None if starts[0] is None else plan.place(starts)


def _row_parts(lab):
    return lab.rule.how.layout.size("batch") if lab.rule.how.layout else 1


def _num_parts(lab, total):
    """Returns the fewest equal pieces of at most `rows_at_once` rows that devices divide evenly."""
    even = _row_parts(lab)
    total += -total % even
    return next(
        n
        for n in range(1, total + 1)
        if total % (n * even) == 0 and total // n <= max(lab.rows_at_once, even)
    )
