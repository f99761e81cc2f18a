"""One optimizer step: log-probs → objective → gradient over micro-batches → optax."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from luspo_jax import objectives, optimizer, sharding
from luspo_jax.logprobs import Scoring, token_logprobs
from luspo_jax.models import decoder
from luspo_jax.models.decoder_config import DecoderConfig
from luspo_jax.objectives import Objective
from luspo_jax.ops.precision import wide_type
from luspo_jax.types import TokenBatch, TrainBatch, TrainState


@dataclasses.dataclass(frozen=True)
class UpdateRule:
    """Everything about an optimizer step that is static under jit.

    Attributes:
      scoring: how log-probabilities are computed.
      objective: the loss.
      optimizer: an optax transformation (compared by identity: build it once).
      num_microbatches: parts a minibatch is cut into, one after another; the result does not
        depend on it.
      max_grad_norm: global-norm clipping, 0 = off.
      bin_edges: of the length bins of metrics, tokens; empty for none.
    """

    scoring: Scoring
    objective: Objective
    optimizer: optax.GradientTransformation
    num_microbatches: int
    max_grad_norm: float
    bin_edges: tuple[int, ...] = ()


def initial_state(
    params: Any, rule: UpdateRule, *, marked: bool = False, layout: sharding.Layout | None = None
) -> TrainState:
    """A state that has taken no step; the reference policy, if the objective has one, is `params`.

    The arrays are copies, because `update_step` gives its state's memory away. `marked` makes
    room for `TrainState.marked_params`. With a layout, `params` lie on its mesh; what belongs to a
    parameter lies like it, and counters on every device.
    """
    params = jax.tree.map(lambda x: jnp.array(x, wide_type(x)), params)
    opt_state = rule.optimizer.init(params)
    return TrainState(
        params,
        jax.tree.map(lambda x: x if x.ndim else sharding.put(x, (), layout), opt_state),
        sharding.put(jnp.zeros((), jnp.int32), (), layout),
        jax.tree.map(jnp.copy, params) if rule.objective.kl_coef else None,
        jax.tree.map(jnp.copy, params) if marked else None,
    )


def abstract_state(
    config: DecoderConfig,
    rule: UpdateRule,
    *,
    marked: bool = False,
    layout: sharding.Layout | None = None,
) -> TrainState:
    """Shapes, types and places of an `initial_state`, for `Checkpointer.restore`: no memory."""
    state = jax.eval_shape(
        functools.partial(initial_state, rule=rule, marked=marked), decoder.abstract_params(config)
    )
    if layout is None:
        return state
    places = sharding.shardings(decoder.param_axes(config), layout)
    everywhere = layout.sharding(())

    def like_params(tree):
        return jax.tree.map(_placed, tree, places)

    return TrainState(
        like_params(state.params),
        optax.tree.map_params(
            rule.optimizer,
            _placed,
            state.opt_state,
            places,
            transform_non_params=lambda x: _placed(x, everywhere),
        ),
        _placed(state.skipped_updates, everywhere),
        None if state.ref_params is None else like_params(state.ref_params),
        None if state.marked_params is None else like_params(state.marked_params),
    )


def _placed(x, place):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)


@functools.partial(jax.jit, static_argnames=("scoring", "num_microbatches"))
def score_rows(
    params: Any, rows: TokenBatch, *, scoring: Scoring, num_microbatches: int
) -> tuple[jax.Array, jax.Array]:
    """(logprobs_BT, entropy_BT) of rows without gradients, one micro-batch at a time."""
    parts = _split(rows, num_microbatches)
    _, scored = jax.lax.scan(
        lambda _, part: (None, token_logprobs(params, part, scoring=scoring)), None, parts
    )
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), scored)


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
    micro-batch's loss is its sum over them: gradients add up to the gradient of the whole,
    however it is cut. A non-finite gradient changes nothing but the count of skipped updates.

    Args:
      state: donated.
      batch: rows whose number `rule.num_microbatches` divides; whole groups.
      rate: float32 scalar, the learning rate.
      alpha_shift: float32 scalar, added to the exponent of an adaptive length scale.
      rule: the static part.

    Returns:
      The new state, and metrics as (sum, count).
    """
    objective = rule.objective
    response_mask_BT = batch.rows.response_mask_BT
    lengths_B = jnp.sum(response_mask_BT, axis=1, dtype=jnp.int32)
    length_scale_B = objectives.length_scales(objective, lengths_B, batch.group_ids_B, alpha_shift)
    denominators = objectives.denominators(objective, response_mask_BT, batch.old_entropy_BT)

    def loss(params, part):
        micro, scale_B = part
        logprobs_BT, entropy_BT = token_logprobs(params, micro.rows, scoring=rule.scoring)
        return objectives.loss(
            objective,
            objectives.PolicyBatch(
                logprobs_BT=logprobs_BT,
                old_logprobs_BT=micro.old_logprobs_BT,
                advantages_B=micro.advantages_B,
                response_mask_BT=micro.rows.response_mask_BT,
                length_scale_B=scale_B,
                entropy_BT=entropy_BT,
                ref_logprobs_BT=micro.ref_logprobs_BT,
                sampler_logprobs_BT=micro.sampler_logprobs_BT,
            ),
            denominators,
            bin_edges=rule.bin_edges,
        )

    def accumulate(grads, part):
        (_, metrics), new = jax.value_and_grad(loss, has_aux=True)(state.params, part)
        return jax.tree.map(lambda g, n: g + n.astype(g.dtype), grads, new), metrics

    # Gradients add up in float32, or float64 where the master weights are.
    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, wide_type(p)), state.params)
    parts = _split((batch, length_scale_B), rule.num_microbatches)
    grads, metrics = jax.lax.scan(accumulate, zeros, parts)
    metrics = jax.tree.map(lambda x: jnp.sum(x, axis=0), metrics)
    return _step(state, grads, rate, metrics, rule)


@functools.partial(jax.jit, static_argnames=("decay",), donate_argnames=("state",))
def refresh_reference(state: TrainState, *, decay: float) -> TrainState:
    """π_ref ← decay · π_ref + (1 − decay) · π: decay 0 copies the policy, 0.99 is an average."""
    reference = jax.tree.map(
        lambda ref, new: decay * ref + (1 - decay) * new, state.ref_params, state.params
    )
    return dataclasses.replace(state, ref_params=reference)


def mark_params(state: TrainState) -> TrainState:
    """Remembers the policy as it is now, before an update whose effect is to be measured."""
    return dataclasses.replace(state, marked_params=_copied(state.params))


_copied = jax.jit(functools.partial(jax.tree.map, jnp.copy))


def _step(state, grads, rate, metrics, rule):
    """Clips, steps, and keeps the old state where the gradient is not finite."""
    grads, norm, clipped = optimizer.clip_by_global_norm(grads, rule.max_grad_norm)
    finite = jnp.isfinite(norm)
    params, opt_state = optimizer.apply(
        rule.optimizer, state.params, grads, state.opt_state, rate=rate
    )
    params, opt_state = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old),
        (params, opt_state),
        (state.params, state.opt_state),
    )
    skipped = 1 - finite.astype(jnp.int32)
    one, taken = jnp.ones((), jnp.float32), finite.astype(jnp.float32)
    metrics = {
        **metrics,
        # The mean is over the updates taken: a skipped one is counted, not averaged in.
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
    return state, metrics


def _split(tree, num_parts):
    """[B, ...] -> [num_parts, B / num_parts, ...]; None leaves stay None."""

    def cut(x):
        if x.shape[0] % num_parts:
            raise ValueError(
                f"num_microbatches={num_parts} does not divide the {x.shape[0]} rows of a batch"
            )
        return x.reshape(num_parts, x.shape[0] // num_parts, *x.shape[1:])

    return jax.tree.map(cut, tree)
