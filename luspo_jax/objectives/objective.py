"""An objective: choices on four axes, an advantage, and their hyperparameters."""

import dataclasses
import functools
import inspect
import numbers
from collections.abc import Callable
from typing import Any

from luspo_jax.hosts.values import nearest
from luspo_jax.objectives.advantages import ADVANTAGES, TOKEN_ADVANTAGES
from luspo_jax.objectives.aggregation import AGGREGATIONS
from luspo_jax.objectives.corrections import CORRECTIONS
from luspo_jax.objectives.kl import KL_ESTIMATORS
from luspo_jax.objectives.length_scales import LENGTH_SCALES
from luspo_jax.objectives.ratios import RATIOS
from luspo_jax.objectives.shapings import SHAPINGS
from luspo_jax.objectives.surrogates import SURROGATE_RATIOS, SURROGATES


@dataclasses.dataclass(frozen=True)
class Objective:
    """All settings that turn log-probs and rewards into one scalar; static under jit.

    The loss of an optimizer step is loss_scale · (policy + kl_coef · KL) − entropy_coef · (mean
    entropy of a response token), policy and KL aggregated alike. The functions on each axis
    document their equations and hyperparameters; a hyperparameter that no chosen function reads has
    no effect.

    Attributes:
      ratio: key of `RATIOS`.
      surrogate: key of `SURROGATES`.
      length_scale: key of `LENGTH_SCALES`; anything but "none" requires "seq-mean-token-mean".
      aggregation: key of `AGGREGATIONS`.
      advantage: key of `ADVANTAGES`.
      advantage_shaping: key of `SHAPINGS`: what length does to the advantage.
      clip_low: ε_low, a distance from 1 (clip, dhpo, minirl).
      clip_high: ε_high, a distance from 1 (clip, dhpo, minirl).
      clip_length_exponent: β of ε·(L_ref/L)^β (clip).
      dual_clip: c, bound on the ratio where A < 0 (clip), or None.
      delta: δ, two-sided clipping (clip), or None.
      dhpo_alpha: α, the token ratio's part of the loss (dhpo).
      dhpo_sequence_low: ε_low of the sequence ratio (dhpo).
      dhpo_sequence_high: ε_high of the sequence ratio (dhpo).
      sapo_temperature_pos: τ for A > 0 (sapo, soft-sequence).
      sapo_temperature_neg: τ otherwise.
      cispo_min_ratio: lower bound of the weight, a ratio.
      cispo_max_ratio: upper bound of the weight, a ratio.
      gmpo_log_low: largest fall of a token's log ratio.
      gmpo_log_high: largest rise of a token's log ratio.
      vespo_k_pos: exponent of W where A ≥ 0.
      vespo_lambda_pos: decay in W where A ≥ 0.
      vespo_k_neg: exponent of W where A < 0.
      vespo_lambda_neg: decay in W where A < 0.
      dppo_tv_max: δ, largest change of a token's probability.
      dppo_kl_max: δ, largest binary KL of a token.
      dppo_max_ratio: C, bound on the weight.
      length_alpha: α (power, adaptive, vl-norm).
      reference_length: L_ref in tokens (power, adaptive, log; clip with β ≠ 0).
      length_lambda: λ (lambda-grpo).
      length_lambda_spread: r (lambda-grpo).
      length_cap: L_cap in tokens (capped).
      max_response_length: C of "seq-mean-token-sum-norm": the rollout's limit, never the padded
        width; 3000 by default, as in the Dr.GRPO runs.
      advantage_epsilon: ε added to a standard deviation or mean.
      otb_zero_tail: no baseline where only the longest response of a group goes on (otb).
      qglas_weight: λ (qglas).
      qglas_cap: c, the share of L_ref whose saving earns all (qglas).
      intern_share: τ, least share of a group with A > 0 (intern-s2).
      intern_alpha: α, weight of the longest (intern-s2).
      intern_gamma: γ (intern-s2).
      kl_coef: β; 0 = no reference policy.
      kl_estimator: key of `KL_ESTIMATORS`.
      kl_placement: "loss", or "reward" (see `kl.reward_adjustment`; the loss then has no KL).
      kl_importance_weight: multiply the KL of each token by the differentiable ratio, as TRL's
        `use_bias_correction_kl` does.
      entropy_coef: weight of the entropy bonus, a token mean under every aggregation.
      top_entropy_quantile: ρ; below 1, only the share ρ of tokens with the highest entropy carries
        policy gradient.
      off_policy_max: δ of the off-policy sequence mask, or None.
      off_policy_against: "old" or "sampler": the log-probs from which the mask measures drift. The
        formula says old; DeepSeek-V3.2 uses the sampler's (unconfirmed). Only the sampler's show
        the age of tokens under a decoupled `old_policy`.
      correction: keys of `CORRECTIONS` joined with "+".
      tis_max: C.
      icepop_low: least ρ kept.
      icepop_high: greatest ρ kept.
      sequence_tis_max: C for the product.
      sequence_mis_low: least product kept.
      sequence_mis_high: greatest product kept.
      geometric_low: least geometric mean kept.
      geometric_high: greatest geometric mean kept.
      k3_max: greatest mean k3 kept.
      binary_kl_max: φ, largest binary KL kept, either way.
      m2po_max: τ, largest mean of (log ρ)² over the tokens kept.
      segment_by: what begins a segment (ratio segment): "entropy", a token whose entropy under the
        old policy is among the highest of the step; or "sentence", the token after one that ends a
        sentence or a line.
      segment_share: share of tokens with the highest entropy, each of which begins a segment.
      old_policy: what the old policy is for tokens that an earlier policy sampled. "behaviour": the
        policy that sampled each, by the sampler's log-prob; ρ = 1 there, and the ratio is clipped
        around what sampled. "decoupled" (Hilton et al., arXiv 2110.00641; AReaL): the policy that
        starts the step, by the trainer; the ratio is clipped around it, and ρ = π_old/π_sampler is
        left to `correction`, without which nothing corrects for age. Other tokens have the policy
        that starts the step either way.
      loss_scale: constant factor on policy and KL; 1/L_ref makes LUSPO's loss GSPO-sized.

    Raises:
      ValueError: an unknown name (the message lists the valid ones), a value out of range, or an
        invalid combination; the message names the field.
    """

    ratio: str = "token"
    surrogate: str = "clip"
    length_scale: str = "none"
    aggregation: str = "seq-mean-token-mean"
    advantage: str = "group-std"
    advantage_shaping: str = "none"
    clip_low: float = 0.2
    clip_high: float = 0.2
    clip_length_exponent: float = 0.0
    dual_clip: float | None = None
    delta: float | None = None
    dhpo_alpha: float = 0.5
    dhpo_sequence_low: float = 3e-4
    dhpo_sequence_high: float = 4e-4
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    cispo_min_ratio: float = 0.0
    cispo_max_ratio: float = 5.0
    gmpo_log_low: float = 0.4
    gmpo_log_high: float = 0.4
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0
    dppo_tv_max: float = 0.15
    dppo_kl_max: float = 0.05
    dppo_max_ratio: float = 20.0
    length_alpha: float = 1.0
    reference_length: float = 1.0
    length_lambda: float = 1.0
    length_lambda_spread: float = 0.1
    length_cap: float | None = None
    max_response_length: int = 3000
    advantage_epsilon: float = 1e-6
    otb_zero_tail: bool = True
    qglas_weight: float = 0.5
    qglas_cap: float = 0.5
    intern_share: float = 0.5
    intern_alpha: float = 0.5
    intern_gamma: float = 1.0
    kl_coef: float = 0.0
    kl_estimator: str = "k3"
    kl_placement: str = "loss"
    kl_importance_weight: bool = False
    entropy_coef: float = 0.0
    top_entropy_quantile: float = 1.0
    off_policy_max: float | None = None
    off_policy_against: str = "old"
    correction: str = "none"
    tis_max: float = 2.0
    icepop_low: float = 0.5
    icepop_high: float = 5.0
    sequence_tis_max: float = 2.0
    sequence_mis_low: float = 0.5
    sequence_mis_high: float = 2.0
    geometric_low: float = 0.99
    geometric_high: float = 1.01
    k3_max: float = 1e-2
    binary_kl_max: float = 2.0
    m2po_max: float = 0.04
    segment_by: str = "entropy"
    segment_share: float = 0.05
    old_policy: str = "behaviour"
    loss_scale: float = 1.0

    @property
    def kl_in_reward(self) -> bool:
        """Whether a KL term is taken from the reward before advantages are formed."""
        return self.kl_coef > 0 and self.kl_placement == "reward"

    def __post_init__(self):
        for field, names in CHOICES.items():
            require_name(f"Objective.{field}", getattr(self, field), names)
        for name in self.correction.split("+"):
            require_name("Objective.correction", name, CORRECTIONS)
        for field, bounds in RANGES.items():
            _require_range(field, getattr(self, field), bounds)
        for broken, message in _senseless(self):
            if broken:
                raise ValueError(message)

    @property
    def corrections(self) -> tuple[str, ...]:
        """Returns the names of the corrections to apply."""
        return tuple(name for name in self.correction.split("+") if name != "none")

    @property
    def ranks_tokens(self) -> bool:
        """Whether tokens of the whole optimizer step are compared by what the old policy says.

        The old policy's log-probs are then needed before the step.
        """
        return (
            self.top_entropy_quantile < 1
            or "m2po" in self.corrections
            or self.token_advantages
            or self.cuts_by_entropy
        )

    @property
    def token_advantages(self) -> bool:
        """Whether each token has an advantage of its own."""
        return self.advantage in TOKEN_ADVANTAGES

    @property
    def cuts_by_entropy(self) -> bool:
        """Whether the old policy's entropies cut responses into segments."""
        return self.ratio == "segment" and self.segment_by == "entropy"

    @property
    def ranks_entropy(self) -> bool:
        """Whether the old policy's entropies are needed before the step."""
        return self.top_entropy_quantile < 1 or self.cuts_by_entropy


CHOICES = {
    "ratio": RATIOS,
    "surrogate": SURROGATES,
    "length_scale": LENGTH_SCALES,
    "aggregation": AGGREGATIONS,
    "advantage": ADVANTAGES,
    "advantage_shaping": SHAPINGS,
    "segment_by": ("entropy", "sentence"),
    "kl_estimator": KL_ESTIMATORS,
    "kl_placement": ("loss", "reward"),
    "off_policy_against": ("old", "sampler"),
    "old_policy": ("behaviour", "decoupled"),
}

_MOST = 1e9  # beyond it, squares of gradients leave float32
_POSITIVE = (0.0, _MOST, False)
_NOT_NEGATIVE = (0.0, _MOST, True)

# Field → (least, greatest, whether the least is allowed). None passes where it is the default.
RANGES = {
    "clip_low": (0.0, 1.0, False),
    "clip_high": _POSITIVE,
    "clip_length_exponent": (0.0, 2.0, True),
    "dhpo_alpha": (0.0, 1.0, True),
    "dhpo_sequence_low": (0.0, 1.0, False),
    "dhpo_sequence_high": _POSITIVE,
    "length_lambda": (-8.0, 8.0, True),
    "length_lambda_spread": (0.0, 1.0, True),
    "qglas_weight": _NOT_NEGATIVE,
    "qglas_cap": (0.0, 1.0, False),
    "intern_share": (0.0, 1.0, True),
    "intern_alpha": (0.0, 1.0, True),
    "intern_gamma": _POSITIVE,
    "segment_share": (0.0, 1.0, False),
    "dual_clip": (1.0, _MOST, False),
    "delta": (1.0, _MOST, False),
    "sapo_temperature_pos": _POSITIVE,
    "sapo_temperature_neg": _POSITIVE,
    "cispo_min_ratio": (0.0, 1.0, True),
    "cispo_max_ratio": (1.0, _MOST, True),
    "gmpo_log_low": _POSITIVE,
    "gmpo_log_high": _POSITIVE,
    "vespo_k_pos": _NOT_NEGATIVE,
    "vespo_lambda_pos": _POSITIVE,
    "vespo_k_neg": _NOT_NEGATIVE,
    "vespo_lambda_neg": _POSITIVE,
    "dppo_tv_max": (0.0, 1.0, False),
    "dppo_kl_max": _POSITIVE,
    "dppo_max_ratio": (1.0, _MOST, True),
    "length_alpha": (-2.0, 2.0, True),
    "reference_length": _POSITIVE,
    "length_cap": _POSITIVE,
    "max_response_length": (1, _MOST, True),
    "advantage_epsilon": _POSITIVE,
    "kl_coef": _NOT_NEGATIVE,
    "entropy_coef": _NOT_NEGATIVE,
    "top_entropy_quantile": (0.0, 1.0, False),
    "off_policy_max": _POSITIVE,
    "tis_max": (1.0, _MOST, True),
    "icepop_low": (0.0, 1.0, True),
    "icepop_high": (1.0, _MOST, True),
    "sequence_tis_max": (1.0, _MOST, True),
    "sequence_mis_low": (0.0, 1.0, True),
    "sequence_mis_high": (1.0, _MOST, True),
    "geometric_low": (0.0, 1.0, True),
    "geometric_high": (1.0, _MOST, True),
    "k3_max": _POSITIVE,
    "binary_kl_max": _POSITIVE,
    "m2po_max": _POSITIVE,
    "loss_scale": _POSITIVE,
}


def require_name(what: str, name: Any, names) -> None:
    """Refuses a name that is not in `names`; the error lists them and the nearest match."""
    if name in names:
        return
    raise ValueError(f"{what}: {name!r} is unknown: {nearest(name, names)}.")


def _require_range(field: str, value: Any, bounds: tuple[float, float, bool]) -> None:
    if value is None and Objective.__dataclass_fields__[field].default is None:
        return
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise ValueError(f"Objective.{field} must be a number, not {value!r}.")
    low, high, low_allowed = bounds
    if (low <= value if low_allowed else low < value) and value <= high:
        return
    least = f"at least {low:g}" if low_allowed else f"greater than {low:g}"
    raise ValueError(
        f"Objective.{field} = {value!r}: must be finite, {least} and at most {high:g}."
    )


def _senseless(objective: Objective) -> list[tuple[bool, str]]:
    """Returns (whether it applies, reason and remedy) for each invalid combination."""
    o = objective
    ratios, why = SURROGATE_RATIOS.get(o.surrogate, (tuple(RATIOS), ""))
    return [
        (
            o.length_scale != "none" and o.aggregation != "seq-mean-token-mean",
            f"Objective.length_scale = {o.length_scale!r} with aggregation = {o.aggregation!r} "
            "counts length twice: a length scale multiplies a sequence mean, so it goes with "
            "'seq-mean-token-mean' only.",
        ),
        (
            o.ratio not in ratios,
            f"Objective.surrogate = {o.surrogate!r} does not go with ratio = {o.ratio!r}: {why}. "
            f"Use ratio = {' or '.join(repr(name) for name in ratios)}.",
        ),
        (
            o.length_scale == "capped" and o.length_cap is None,
            "Objective.length_cap is not set: length_scale = 'capped' needs a length in tokens.",
        ),
        (
            o.surrogate != "clip" and not (o.dual_clip is None and o.delta is None),
            f"Objective.dual_clip and delta bound the clip surrogate, not {o.surrogate!r}.",
        ),
        (
            o.dual_clip is not None and o.delta is not None,
            "Objective.dual_clip and delta bound the same thing; set one of them.",
        ),
        (
            o.delta is not None and o.delta <= 1 + o.clip_high,
            f"Objective.delta = {o.delta} must be greater than 1 + clip_high = {1 + o.clip_high}.",
        ),
        (
            o.token_advantages and o.advantage_shaping != "none",
            f"Objective.advantage_shaping = {o.advantage_shaping!r} changes the advantage of a "
            f"response; advantage = {o.advantage!r} has one for each token.",
        ),
        (
            o.advantage == "gdpo" and o.kl_in_reward,
            "Objective.kl_placement = 'reward' does not go with advantage = 'gdpo', which "
            "normalises each part of the reward by itself; use 'loss'.",
        ),
        (
            o.clip_length_exponent > 0 and o.surrogate != "clip",
            "Objective.clip_length_exponent changes the band of the clip surrogate, not of "
            f"{o.surrogate!r}.",
        ),
        (
            o.kl_importance_weight and o.kl_placement == "reward",
            "Objective.kl_importance_weight weighs a KL in the loss, not one in the reward.",
        ),
        (
            o.kl_importance_weight and o.ratio == "sequence-product",
            "Objective.kl_importance_weight does not go with ratio = 'sequence-product': a product "
            "of ratios is no weight for the KL of one token.",
        ),
        (
            o.surrogate == "vespo" and bool(o.corrections),
            "Objective.correction does not go with surrogate = 'vespo': its W is the ratio to the "
            "policy that sampled. Hand the sampler's log-probs in as the old ones instead.",
        ),
        (
            o.surrogate == "vespo" and o.old_policy == "decoupled",
            "Objective.old_policy = 'decoupled' does not go with surrogate = 'vespo': its W is the "
            "ratio to the policy that sampled, which is old_policy = 'behaviour'.",
        ),
        (
            len(set(o.corrections)) != len(o.correction.split("+")) and o.correction != "none",
            f"Objective.correction = {o.correction!r} names a correction twice, or 'none' beside "
            "others.",
        ),
    ]


@functools.cache
def _signature(function: Callable) -> tuple[tuple[str, ...], tuple[str, ...]]:
    parameters = inspect.signature(function).parameters.values()
    keyword_only = inspect.Parameter.KEYWORD_ONLY
    arrays = tuple(p.name for p in parameters if p.kind != keyword_only)
    settings = tuple(p.name for p in parameters if p.kind == keyword_only)
    return arrays, settings


def hyperparameters(function: Callable) -> tuple[str, ...]:
    """Returns the keyword-only argument names of an axis function."""
    return _signature(function)[1]


def bind(function: Callable, objective: Objective) -> Callable:
    """Binds an axis function to the objective's hyperparameters; arrays are passed by name.

    The function receives only the arrays it names. A hyperparameter that `Objective` lacks keeps
    the function's own default, so that a new entry works before it has a field. Two objectives that
    agree on what the function reads get the same object, and so one compilation.
    """
    chosen = tuple(
        (name, getattr(objective, name))
        for name in hyperparameters(function)
        if hasattr(objective, name)
    )
    return _bound(function, chosen)


@functools.cache
def _bound(function: Callable, chosen: tuple[tuple[str, Any], ...]) -> Callable:
    names, _ = _signature(function)

    def bound(**arrays):
        return function(*(arrays[name] for name in names), **dict(chosen))

    return bound
