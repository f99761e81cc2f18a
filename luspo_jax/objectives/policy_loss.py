"""The loss of one micro-batch, its denominators over the optimizer step, and its metrics.

Values on masked positions, NaN and infinities included, have no effect: inputs there are set to 0
before any arithmetic, so loss and metrics do not depend on them and the gradient there is exactly
0. Arithmetic is in float32, or float64 where log-probs are.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from luspo_jax.objectives import corrections as correction_functions
from luspo_jax.objectives.aggregation import AGGREGATIONS
from luspo_jax.objectives.kl import token_kl
from luspo_jax.objectives.objective import Objective, bind
from luspo_jax.objectives.policy_metrics import (
    Metrics,
    mismatch_metrics,
    ratio_metrics,
    staleness_metrics,
    sum_rows,
    token_sums,
    unit_sums,
    weight_metrics,
)
from luspo_jax.objectives.ratios import RATIOS, bounded
from luspo_jax.objectives.surrogates import SURROGATES, clip_band
from luspo_jax.objectives.whole_batch import real, wide


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PolicyBatch:
    """Inputs to the loss of one micro-batch, one row per response.

    Attributes:
      logprobs_BT: log-probs of the policy being updated; only they and entropy carry a gradient.
      old_logprobs_BT: log-probs of the policy at the start of the step; None if it is the same
        policy.
      advantages_B: from `advantages`; the mean over each response, if its tokens have their own.
      response_mask_BT: bool, true on response tokens. Overlong-filtered rows have none.
      length_scale_B: from `length_scales`.
      entropy_BT: the policy's entropy at each token; needed for an entropy bonus or quantile.
      ref_logprobs_BT: log-probs of the reference policy; needed for a KL in the loss.
      sampler_logprobs_BT: log-probs from the sampler; needed for a correction and beside ages.
      token_weights_BT: factor on each token's policy loss; None for 1. Denominators count tokens.
      ages_BT: integer steps that the policy took between sampling each token and this step; None
        for no metrics by age.
      token_advantages_BT: advantage of each token, in place of its response's; None for that.
      segment_starts_BT: bool, tokens that begin a segment; needed with the ratio "segment".
    """

    logprobs_BT: jax.Array
    old_logprobs_BT: jax.Array | None
    advantages_B: jax.Array
    response_mask_BT: jax.Array
    length_scale_B: jax.Array
    entropy_BT: jax.Array | None = None
    ref_logprobs_BT: jax.Array | None = None
    sampler_logprobs_BT: jax.Array | None = None
    token_weights_BT: jax.Array | None = None
    ages_BT: jax.Array | None = None
    token_advantages_BT: jax.Array | None = None
    segment_starts_BT: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Denominators:
    """Divisors for the sums over all micro-batches of one optimizer step; each at least 1.

    Attributes:
      sequences: rows with at least one response token.
      tokens: response tokens.
      policy: the aggregation's denominator, for the policy loss and the KL.
      entropy_threshold: lowest entropy that carries gradient; None without an entropy quantile.
      m2po_threshold: |log ρ| above which a token is dropped; None without the correction "m2po".
    """

    sequences: jax.Array
    tokens: jax.Array
    policy: jax.Array
    entropy_threshold: jax.Array | None = None
    m2po_threshold: jax.Array | None = None


def denominators(
    objective: Objective,
    response_mask_BT: jax.Array,
    entropy_BT: jax.Array | None = None,
    old_logprobs_BT: jax.Array | None = None,
    sampler_logprobs_BT: jax.Array | None = None,
) -> Denominators:
    """Returns the denominators of the whole optimizer step; no gradient flows through them.

    Args:
      objective: selects the aggregation.
      response_mask_BT: bool, all rows of the step.
      entropy_BT: entropies at all tokens of the step, of the policy at its start; needed with
        `top_entropy_quantile` < 1, whose threshold must not depend on the micro-batch.
      old_logprobs_BT: old log-probs at all tokens of the step; needed for the correction "m2po".
      sampler_logprobs_BT: likewise, from the sampler.

    Raises:
      ValueError: a mask that is not bool, or missing entropies or log-probs.
    """
    require_mask(response_mask_BT)
    threshold = m2po_threshold = None
    if objective.top_entropy_quantile < 1:
        if entropy_BT is None:
            raise ValueError("entropy_BT is missing: Objective.top_entropy_quantile < 1 needs it.")
        threshold = _entropy_threshold(objective.top_entropy_quantile, entropy_BT, response_mask_BT)
    if "m2po" in objective.corrections:
        if old_logprobs_BT is None or sampler_logprobs_BT is None:
            raise ValueError(
                "old_logprobs_BT or sampler_logprobs_BT is missing: Objective.correction 'm2po' "
                "ranks the tokens of the step by both."
            )
        m2po_threshold = _m2po_threshold(
            objective.m2po_max, old_logprobs_BT, sampler_logprobs_BT, response_mask_BT
        )
    counts = _counts(bind(AGGREGATIONS[objective.aggregation], objective), response_mask_BT)
    return Denominators(*counts, threshold, m2po_threshold)


@functools.partial(jax.jit, static_argnums=0)
def _counts(function, response_mask_BT):
    lengths_B = real(response_mask_BT.sum(axis=1, dtype=jnp.int32))
    _, policy = function(lengths_B=lengths_B)
    sequences = real((lengths_B > 0).sum(dtype=jnp.int32))
    tokens = real(response_mask_BT.sum(dtype=jnp.int32))
    return [jnp.maximum(count, 1) for count in (sequences, tokens, policy)]


@functools.partial(jax.jit, static_argnums=0)
def _entropy_threshold(quantile, entropy_BT, response_mask_BT):
    entropy_BT = jax.lax.stop_gradient(real(entropy_BT))
    return correction_functions.entropy_threshold(
        entropy_BT, response_mask_BT, top_entropy_quantile=quantile
    )


@functools.partial(jax.jit, static_argnums=0)
def _m2po_threshold(m2po_max, old_logprobs_BT, sampler_logprobs_BT, response_mask_BT):
    log_rho_BT = real(old_logprobs_BT) - real(sampler_logprobs_BT)
    return correction_functions.m2po_threshold(
        jax.lax.stop_gradient(log_rho_BT), response_mask_BT, m2po_max=m2po_max
    )


def loss(
    objective: Objective,
    batch: PolicyBatch,
    denominators: Denominators,
    *,
    bin_edges: tuple[int, ...] = (),
) -> tuple[jax.Array, Metrics]:
    """Returns this micro-batch's share of the step's loss, and metrics as (sum, count) pairs.

    The shares of all micro-batches with the same denominators add up to the loss of the whole step,
    and so do their gradients and metrics. `bin_edges` (tokens) adds clip fractions by length bin.

    Raises:
      ValueError: shapes that differ, a mask that is not bool, or a missing input.
    """
    _require_batch(objective, batch)
    rows = _clean(batch)
    dtype = rows.logprobs_BT.dtype
    denominators = jax.tree.map(lambda x: jnp.asarray(x, dtype), denominators)
    mask_BT, advantages_BU = rows.response_mask_BT, rows.advantages_B[:, None]
    if rows.token_advantages_BT is not None:
        advantages_BU = rows.token_advantages_BT
    arrays = {
        "logprobs_BT": rows.logprobs_BT,
        "old_logprobs_BT": rows.old_logprobs_BT,
        "response_mask_BT": mask_BT,
        "advantages_BU": advantages_BU,
        "segment_starts_BT": rows.segment_starts_BT,
        "band_B1": clip_band(
            mask_BT,
            dtype,
            exponent=objective.clip_length_exponent,
            reference_length=objective.reference_length,
        ),
    }
    log_ratio_BU = bind(RATIOS[objective.ratio], objective)(**arrays)
    surrogate_function = bind(SURROGATES[objective.surrogate], objective)
    surrogate = surrogate_function(log_ratio_BU=log_ratio_BU, **arrays)
    weight_BU, pairs = _policy_weight(objective, rows, denominators)
    lengths_B = mask_BT.sum(axis=1, dtype=jnp.int32).astype(dtype)
    divisor_B, _ = bind(AGGREGATIONS[objective.aggregation], objective)(lengths_B=lengths_B)

    def aggregate(loss_BU):
        # Mask and sum over tokens first: scaling a token mean by L would weigh padding (L²/T).
        row_loss_B = token_sums(loss_BU, mask_BT)
        return (row_loss_B * (rows.length_scale_B / divisor_B)).sum() / denominators.policy

    policy = objective.loss_scale * aggregate(surrogate.loss_BU * weight_BU)
    total = policy
    if objective.kl_coef > 0 and objective.kl_placement == "loss":
        kl_BT = token_kl(
            rows.logprobs_BT, rows.ref_logprobs_BT, kl_estimator=objective.kl_estimator
        )
        pairs["actor/kl_loss"] = token_sums(kl_BT, mask_BT), lengths_B
        if objective.kl_importance_weight:
            kl_BT = kl_BT * jnp.exp(bounded(log_ratio_BU))
        total = total + objective.loss_scale * objective.kl_coef * aggregate(kl_BT)
    if rows.entropy_BT is not None:
        entropy_B = token_sums(rows.entropy_BT, mask_BT)
        pairs["actor/entropy"] = entropy_B, lengths_B
        if objective.entropy_coef > 0:
            total = total - objective.entropy_coef * entropy_B.sum() / denominators.tokens
    drift_BT = rows.old_logprobs_BT - rows.logprobs_BT
    pairs |= ratio_metrics(surrogate, log_ratio_BU, drift_BT, advantages_BU, mask_BT, bin_edges)
    if rows.ages_BT is not None:
        pairs |= staleness_metrics(
            rows.ages_BT,
            log_ratio_BU,
            surrogate.high_BU | surrogate.low_BU,
            rows.old_logprobs_BT - rows.sampler_logprobs_BT,
            rows.logprobs_BT - rows.sampler_logprobs_BT,
            mask_BT,
        )
    metrics = sum_rows(jax.lax.stop_gradient(pairs))
    sequences = (lengths_B > 0).astype(dtype).sum()
    metrics["actor/pg_loss"] = policy, sequences / denominators.sequences
    return total, jax.lax.stop_gradient(metrics)


def _policy_weight(
    objective: Objective, rows: PolicyBatch, denominators: Denominators
) -> tuple[jax.Array, Metrics]:
    """Returns the factor on each token's policy loss [B, U], and metrics of what it dropped."""
    mask_BT, advantages_B1 = rows.response_mask_BT, rows.advantages_B[:, None]
    weight_BU = jnp.ones_like(advantages_B1)
    pairs: Metrics = {}
    if rows.sampler_logprobs_BT is not None:
        log_rho_BT = jax.lax.stop_gradient(rows.old_logprobs_BT - rows.sampler_logprobs_BT)
        pairs |= mismatch_metrics(log_rho_BT, mask_BT)
        if "m2po" in objective.corrections and denominators.m2po_threshold is None:
            raise ValueError(
                "denominators.m2po_threshold is missing: Objective.correction 'm2po' needs "
                "denominators(objective, response_mask_BT, old_logprobs_BT=…, "
                "sampler_logprobs_BT=…)."
            )
        for name in objective.corrections:
            correction = bind(correction_functions.CORRECTIONS[name], objective)
            weight_BU = weight_BU * correction(
                log_rho_BT=log_rho_BT,
                response_mask_BT=mask_BT,
                old_logprobs_BT=rows.old_logprobs_BT,
                sampler_logprobs_BT=rows.sampler_logprobs_BT,
                m2po_threshold=denominators.m2po_threshold,
            )
        if objective.corrections:
            pairs |= weight_metrics(weight_BU, mask_BT)
    if objective.off_policy_max is not None:
        against_sampler = objective.off_policy_against == "sampler"
        keep_B1 = correction_functions.off_policy_keep(
            jax.lax.stop_gradient(rows.logprobs_BT),
            rows.sampler_logprobs_BT if against_sampler else rows.old_logprobs_BT,
            advantages_B1,
            mask_BT,
            off_policy_max=objective.off_policy_max,
        )
        weight_BU = jnp.where(keep_B1, weight_BU, 0)
        dropped_B1 = (~keep_B1).astype(weight_BU.dtype)
        lengths_B = mask_BT.sum(axis=1, dtype=jnp.int32).astype(weight_BU.dtype)
        pairs["rollout_corr/off_policy_masked"] = unit_sums(dropped_B1, mask_BT, lengths_B)
    if objective.top_entropy_quantile < 1:
        if denominators.entropy_threshold is None:
            raise ValueError(
                "denominators.entropy_threshold is missing: Objective.top_entropy_quantile < 1 "
                "needs denominators(objective, response_mask_BT, entropy_BT)."
            )
        entropy_BT = jax.lax.stop_gradient(rows.entropy_BT)
        weight_BU = jnp.where(entropy_BT >= denominators.entropy_threshold, weight_BU, 0)
    if rows.token_weights_BT is not None:
        weight_BU = weight_BU * rows.token_weights_BT
    return weight_BU, pairs


def _clean(batch: PolicyBatch) -> PolicyBatch:
    """Casts to one floating dtype and sets masked positions to 0."""
    dtype = wide(batch.logprobs_BT.dtype)
    mask_BT = batch.response_mask_BT
    present_B = mask_BT.any(axis=1)

    def tokens(values_BT):
        return None if values_BT is None else jnp.where(mask_BT, values_BT.astype(dtype), 0)

    def constants(values_BT):
        return jax.lax.stop_gradient(tokens(values_BT))

    def row_constants(values_B):
        values_B = jnp.where(present_B, jnp.asarray(values_B).astype(dtype), 0)
        return jax.lax.stop_gradient(values_B)

    old_logprobs_BT = batch.old_logprobs_BT
    return PolicyBatch(
        logprobs_BT=tokens(batch.logprobs_BT),
        old_logprobs_BT=constants(
            batch.logprobs_BT if old_logprobs_BT is None else old_logprobs_BT
        ),
        advantages_B=row_constants(batch.advantages_B),
        response_mask_BT=mask_BT,
        length_scale_B=row_constants(batch.length_scale_B),
        entropy_BT=tokens(batch.entropy_BT),
        ref_logprobs_BT=constants(batch.ref_logprobs_BT),
        sampler_logprobs_BT=constants(batch.sampler_logprobs_BT),
        token_weights_BT=constants(batch.token_weights_BT),
        ages_BT=None if batch.ages_BT is None else jnp.where(mask_BT, batch.ages_BT, 0),
        token_advantages_BT=constants(batch.token_advantages_BT),
        segment_starts_BT=None
        if batch.segment_starts_BT is None
        else mask_BT & batch.segment_starts_BT,
    )


def require_mask(response_mask_BT: jax.Array) -> None:
    """Refuses a response mask that is not bool [B, T]."""
    if jnp.ndim(response_mask_BT) != 2 or response_mask_BT.dtype != bool:
        raise ValueError(
            "response_mask_BT must be bool [B, T]; "
            f"got {response_mask_BT.dtype} {jnp.shape(response_mask_BT)}."
        )


def _require_batch(objective: Objective, batch: PolicyBatch) -> None:
    require_mask(batch.response_mask_BT)
    shape = batch.response_mask_BT.shape
    for field in dataclasses.fields(batch):
        values = getattr(batch, field.name)
        expected = shape if field.name.endswith("_BT") else shape[:1]
        if values is not None and jnp.shape(values) != expected:
            raise ValueError(
                f"PolicyBatch.{field.name} has shape {jnp.shape(values)}; {expected} is expected, "
                f"as response_mask_BT is {shape}."
            )
    against_sampler = (
        objective.off_policy_max is not None and objective.off_policy_against == "sampler"
    )
    needs = {
        "ref_logprobs_BT": (
            objective.kl_coef > 0 and objective.kl_placement == "loss",
            "Objective.kl_coef > 0 needs",
        ),
        "entropy_BT": (
            objective.entropy_coef > 0 or objective.top_entropy_quantile < 1,
            "Objective.entropy_coef > 0 or top_entropy_quantile < 1 needs",
        ),
        "sampler_logprobs_BT": (
            bool(objective.corrections) or against_sampler or batch.ages_BT is not None,
            "Objective.correction, off_policy_against = 'sampler' and ages_BT need",
        ),
        "segment_starts_BT": (objective.ratio == "segment", "Objective.ratio = 'segment' needs"),
    }
    for name, (needed, setting) in needs.items():
        if needed and getattr(batch, name) is None:
            raise ValueError(f"PolicyBatch.{name} is missing: {setting} it.")
