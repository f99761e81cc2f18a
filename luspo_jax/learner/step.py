"""One optimizer step: log-probs → objective → gradient over micro-batches → optax."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from luspo_jax import objectives, sharding
from luspo_jax.learner import copies, optimizer, routers
from luspo_jax.learner.logprobs import (
    microbatch_logprobs,
    microbatch_logprobs_of_copies,
    of_reference,
    of_responses,
    unless_empty,
)
from luspo_jax.learner.rows import split
from luspo_jax.learner.state import (
    UpdateRule,
    policy_params,
    state_shardings,
    with_base,
    without_base,
)
from luspo_jax.models import decoder
from luspo_jax.ops.precision import wide_type
from luspo_jax.types import TrainBatch, TrainState


@functools.partial(jax.jit, static_argnames=("rule",), donate_argnames=("state",))
def update_step(
    state: TrainState,
    batch: TrainBatch,
    rate: jax.Array,
    alpha_shift: jax.Array | float = 0.0,
    *,
    rule: UpdateRule,
) -> tuple[TrainState, dict[str, tuple[jax.Array, jax.Array]]]:
    """Takes one optimizer step on one minibatch.

    Denominators and length scales come from the whole minibatch before it is cut, and each
    micro-batch's loss is its sum over them: gradients add up to the gradient of the whole, however
    it is cut. A non-finite gradient changes only the count of skipped updates.

    Args:
      state: donated.
      batch: whole groups; its plan sets the micro-batches, which do not affect the result.
      rate: float32 scalar, the learning rate.
      alpha_shift: float32 scalar, added to the exponent of an adaptive length scale.
      rule: the static part.

    Returns:
      The new state, and metrics as (sum, count).
    """
    objective = rule.objective
    mask_BT, layout = batch.responses.response_mask_BT, rule.logprobs.how.layout
    lengths_B = jnp.sum(mask_BT, axis=1, dtype=jnp.int32)
    length_scale_B = objectives.length_scales(
        objective, lengths_B, batch.responses.group_ids_B, alpha_shift
    )
    denominators = objectives.denominators(
        objective,
        mask_BT,
        batch.responses.old_entropy_BT,
        batch.responses.old_logprobs_BT,
        batch.responses.sampler_logprobs_BT,
    )
    balance_LE = None
    if rule.router_aux_coef:
        balance_LE = routers.balance_weights(
            batch.rows, rule.logprobs.how.model, replay=rule.logprobs.replay
        )

    how, base = rule.logprobs.how, getattr(state, "base", None)
    reference = None
    if objective.kl_coef > 0 and batch.responses.ref_logprobs_BT is None:
        reference = policy_params(state, how, "ref_params")
    state = without_base(state)

    loss = _part_loss(rule, denominators, balance_LE, base, reference)

    def accumulate(grads, part):
        (_, found), new = jax.value_and_grad(loss, has_aux=True)(params, part)
        grads = jax.tree.map(lambda g, n: g + n.astype(g.dtype), grads, new)
        return copies.constrained(grads, how), found

    # Gradients add up in float32, or in float64 if the master weights are float64; over the data
    # axis they are summed once, when all micro-batches have added to them.
    params = copies.copied(state.params, how)
    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, wide_type(p)), params)
    whole = (batch.rows, batch.responses, length_scale_B)
    parts = split(whole, batch.rows.num_microbatches, layout)
    step = unless_empty(accumulate, lambda part: part[0], how.model)
    grads, found = jax.lax.scan(step, zeros, parts)
    grads = copies.summed(grads, how)
    metrics, router = jax.tree.map(lambda x: jnp.sum(x, axis=0), found)
    if router is not None:
        metrics |= routers.router_metrics(router, balance_LE)
    state, metrics = _step(state, grads, rate, metrics, rule)
    if base is not None:
        base = sharding.constrain_tree(
            base, sharding.shardings(decoder.frozen_axes(how), how.layout)
        )
    return with_base(state, base), metrics


def _part_loss(rule, denominators, balance_LE, base, reference):
    """Returns loss(params, part): a micro-batch's part of the loss, with (metrics, router).

    Args:
      rule: `UpdateRule`.
      denominators: of the whole minibatch.
      balance_LE: weights of the router's balancing loss; None without one.
      base: weights that an adapter is added to; None without one.
      reference: weights of the reference policy; None where `responses` has its log-probs, or
        nothing reads them.
    """
    how, objective = rule.logprobs.how, rule.objective

    def forward(params, rows):
        if copies.has_copies(how):
            return microbatch_logprobs_of_copies(params, rows, rule=rule.logprobs, base=base)
        params = decoder.whole_params(base, params, how)
        return microbatch_logprobs(params, rows, rule=rule.logprobs)

    def loss(params, part):
        rows, responses, scale_B = part
        found = forward(params, rows)
        referred = None
        if reference is not None:
            referred = microbatch_logprobs(reference, rows, rule=of_reference(rule.logprobs))
        total, metrics = objectives.loss(
            objective,
            _policy_batch(responses, scale_B, found, referred, how.layout),
            denominators,
            bin_edges=rule.bin_edges,
        )
        router = found.router
        if router is not None:
            if balance_LE is not None:
                total = total + rule.router_aux_coef * jnp.sum(balance_LE * router.mass_LE)
            router = jax.lax.stop_gradient(dataclasses.replace(router, expert_ids=None))
        return total, (metrics, router)

    return loss


def _policy_batch(responses, scale_B, found, referred, layout):
    """Returns the objective's input of a micro-batch.

    Args:
      responses: `ResponseRows`.
      scale_B: length scale of each.
      found: `TokenLogprobs` of the policy that is updated.
      referred: of the reference policy; None where `responses` has them, or nothing reads them.
      layout: the mesh layout of rows.
    """
    at = (responses.starts_B, responses.response_mask_BT, layout)
    logprobs_BT = of_responses(found.logprobs_RT, *at)
    old_BT, ref_BT = responses.old_logprobs_BT, responses.ref_logprobs_BT
    if responses.starts_step_B is not None:
        old_BT = jnp.where(responses.starts_step_B[:, None], logprobs_BT, old_BT)
    if referred is not None:
        ref_BT = of_responses(referred.logprobs_RT, *at)
    return objectives.PolicyBatch(
        logprobs_BT=logprobs_BT,
        old_logprobs_BT=old_BT,
        advantages_B=responses.advantages_B,
        response_mask_BT=responses.response_mask_BT,
        length_scale_B=scale_B,
        entropy_BT=of_responses(found.entropy_RT, *at),
        ref_logprobs_BT=ref_BT,
        sampler_logprobs_BT=responses.sampler_logprobs_BT,
        token_weights_BT=responses.token_weights_BT,
        ages_BT=responses.ages_BT,
        token_advantages_BT=responses.token_advantages_BT,
        segment_starts_BT=responses.segment_starts_BT,
    )


def _step(state, grads, rate, metrics, rule):
    """Clips and steps; keeps the old state if the gradient is not finite."""
    grads, norm, clipped = optimizer.clip_by_global_norm(grads, rule.max_grad_norm)
    finite = jnp.isfinite(norm)
    params, opt_state = optimizer.apply(
        rule.optimizer, state.params, grads, state.opt_state, rate=rate
    )
    params = {**params, **{name: state.params[name] for name in rule.frozen}}
    params, opt_state = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old),
        (params, opt_state),
        (state.params, state.opt_state),
    )
    skipped = 1 - finite.astype(jnp.int32)
    one, taken = jnp.ones((), jnp.float32), finite.astype(jnp.float32)
    metrics = {
        **metrics,
        # The mean is over updates taken: a skipped one is counted, not averaged in.
        "actor/grad_norm": (jnp.where(finite, norm, 0.0), taken),
        "actor/grad_clip_rate": (jnp.where(finite, clipped, False).astype(jnp.float32), taken),
        "actor/skipped_updates": (skipped.astype(jnp.float32), one),
    }
    state = dataclasses.replace(
        state,
        params=params,
        opt_state=opt_state,
        skipped_updates=state.skipped_updates + skipped,
    )
    return sharding.constrain_tree(state, state_shardings(state, rule)), metrics
