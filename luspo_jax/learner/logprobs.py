"""Token log-probs and entropies of training rows: the model, then the chunked head."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from luspo_jax import sharding
from luspo_jax.learner import rows as training_rows
from luspo_jax.learner.routers import RouterPass, router_pass
from luspo_jax.models import decoder, vision
from luspo_jax.models.decoder_config import DecoderConfig
from luspo_jax.models.experts import check_ids
from luspo_jax.models.forward import Forward
from luspo_jax.ops.attention import inverse_ring_order, ring_order
from luspo_jax.ops.head_logprobs import head_logprobs
from luspo_jax.sharding import Layout
from luspo_jax.types import RowImages, TokenRows


@dataclasses.dataclass(frozen=True)
class LogprobRule:
    """How log-probabilities are computed; static under jit.

    Attributes:
      how: the model's forward pass.
      temperature: of the rollout; any other temperature would make the importance ratio wrong by
        several nats.
      head_chunk_tokens: tokens (rows × positions) whose logits exist at once on a device; the head
        always accumulates in float32.
      replay: which recorded expert ids replace the routers' choice, a key of REPLAYS; rows without
        that record are routed by the policy.
      freeze_vision: no gradient reaches the vision tower.
      collision: also compute Σ_v π_v² at each token; nothing then carries a gradient.
    """

    how: Forward
    temperature: float = 1.0
    head_chunk_tokens: int = 2048
    replay: str = "none"
    freeze_vision: bool = False
    collision: bool = False


def of_reference(rule: LogprobRule) -> LogprobRule:
    """Returns the rule of the reference policy, whose routers choose for themselves."""
    return dataclasses.replace(rule, replay="none")


# Router replay: "old" is R2 and "sampler" R3 of arXiv:2512.01374.
REPLAYS = ("none", "old", "sampler")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenLogprobs:
    """Log-probs ≤ 0 and entropies ≥ 0 of the masked tokens in nats, float32; 0 elsewhere.

    `router` is None without experts, `collision_RT` unless the rule asks for Σ_v π_v².
    """

    logprobs_RT: jax.Array
    entropy_RT: jax.Array
    router: RouterPass | None = None
    collision_RT: jax.Array | None = None


def microbatch_logprobs(
    params: Mapping[str, Any], rows: TokenRows, *, rule: LogprobRule
) -> TokenLogprobs:
    """Computes log-probs and entropies of the masked tokens of one micro-batch; differentiable."""
    shown = rows.images is not None
    units_UD = _units(params, rows.images.images, rule) if shown else None
    return _logprobs(params, rows, units_UD, rule=rule)


def microbatch_logprobs_of_copies(
    copies: Mapping[str, Any], rows: TokenRows, *, rule: LogprobRule, base: Any = None
) -> TokenLogprobs:
    """Computes the same with a copy of the weights, [copies, …], for each part of the rows.

    Each part of the mesh's data axis works alone, so the gradient by `copies` is each one's own,
    and no sum crosses that axis. The image tower has no copies.

    Args:
      copies: from `learner.copies`.
      rows: of one micro-batch, a multiple of the copies.
      rule: with a layout.
      base: the frozen weights of an adapter, which have no copies.
    """
    layout, count = rule.how.layout, rule.how.layout.size("copies")
    units_UD = None
    if rows.images is not None:
        tower = decoder.whole_params(base, copies, rule.how)
        units_UD = _units(tower, rows.images.images, rule)
        rows = dataclasses.replace(rows, images=RowImages(None, rows.images.units_RT))
    own_rule = dataclasses.replace(
        rule, how=dataclasses.replace(rule.how, layout=dataclasses.replace(layout, mapped="data"))
    )

    def parted(x):
        x = x.reshape(count, x.shape[0] // count, *x.shape[1:])
        return sharding.constrain(x, ("copies", "batch", *[None] * (x.ndim - 2)), layout)

    def joined(x):
        x = x.reshape(-1, *x.shape[2:])
        return sharding.constrain(x, ("batch", *[None] * (x.ndim - 1)), layout)

    copies = {name: x for name, x in copies.items() if name != "vision"}

    def of_one(copy, base, rows, units_UD):
        params = decoder.whole_params(base, copy, rule.how)
        return _logprobs(params, rows, units_UD, rule=own_rule)

    own = sharding.vmapped(of_one, (0, None, 0, None))
    found = own(copies, base, jax.tree.map(parted, rows), units_UD)
    router = found.router
    if router is not None:
        ids = router.expert_ids
        sums = jax.tree.map(
            lambda x: jnp.sum(x, axis=0), dataclasses.replace(router, expert_ids=None)
        )
        router = dataclasses.replace(sums, expert_ids=None if ids is None else joined(ids))
    return TokenLogprobs(joined(found.logprobs_RT), joined(found.entropy_RT), router)


def _logprobs(params, rows, units_UD, *, rule):
    """Log-probs of rows; `units_UD` are the embeddings of their images."""
    layout = rule.how.layout
    recorded = {} if rows.expert_ids is None else vars(rows.expert_ids)
    recorded = {name: ids for name, ids in recorded.items() if ids is not None}
    for name, ids in recorded.items():
        check_ids(ids, rows.tokens_RT, rule.how.model, f"expert_ids.{name}")
    order, back = _ring(rows.tokens_RT.shape[1], layout)
    replayed = recorded.get(rule.replay)
    hidden_RTD, routed = decoder.forward(
        params,
        order(rows.tokens_RT),
        order(rows.positions_RT),
        order(rows.segment_ids_RT),
        how=rule.how,
        replayed_BTLK=None if replayed is None else order(replayed),
        images=None if units_UD is None else (units_UD, order(rows.images.units_RT)),
        sequences=rows.sequences,
    )
    if rule.how.rounds_products:
        hidden_RTD = hidden_RTD.astype(jnp.bfloat16)
    # The state at t−1 predicts token t. Predictions are made at index t−1 and moved to the token
    # that they predict, by the alignment law of types.py. A segment begins with a prompt, so no
    # prediction that is used crosses a segment border.
    found = head_logprobs(
        hidden_RTD,
        decoder.head_kernel(params),
        order(jnp.roll(rows.tokens_RT, -1, axis=1)),
        order(_shift_left(rows.response_mask_RT)),
        temperature=rule.temperature,
        chunk_tokens=rule.head_chunk_tokens,
        layout=layout,
        collision=rule.collision,
    )
    real_RT = rows.segment_ids_RT > 0
    router = None if routed is None else router_pass(routed, back, real_RT, recorded)
    logprobs_RT, entropy_RT, *collision = (_shift_right(back(x_RT)) for x_RT in found)
    return TokenLogprobs(logprobs_RT, entropy_RT, router, *collision)


def _units(params, images, rule):
    """Returns the embeddings of the images of a micro-batch [U, D]."""
    tower = params["vision"]
    units_IUD = vision.encode(
        jax.lax.stop_gradient(tower) if rule.freeze_vision else tower,
        images.patches_ISC,
        images.positions_IS2,
        images.valid_IS,
        how=rule.how,
    )
    return units_IUD.reshape(-1, units_IUD.shape[-1])


@functools.partial(jax.jit, static_argnames=("rule", "record_experts"))
def row_logprobs(
    params: Any, rows: TokenRows, *, rule: LogprobRule, record_experts: bool = False
) -> TokenLogprobs:
    """Computes log-probs of rows without gradients, one micro-batch at a time.

    Log-probs and entropies [R, T] end on every device. With `record_experts`, `router.expert_ids`
    are [micro-batches, rows, T, L, K]. They take L · K bytes per token (384 in Qwen3-30B-A3B,
    against 8 for log-prob and entropy), so they stay sharded with the rows, and
    `routers.sequence_ids` fetches them.
    """

    def compute(carry, part):
        found = microbatch_logprobs(params, part, rule=rule)
        if found.router is not None and not record_experts:
            router = dataclasses.replace(found.router, expert_ids=None)
            found = dataclasses.replace(found, router=router)
        return carry, found

    parts = training_rows.split(rows, rows.num_microbatches, rule.how.layout)
    step = unless_empty(compute, lambda part: part, rule.how.model)
    _, result = jax.lax.scan(step, None, parts)

    def whole(x):  # on every process, because the host reads them
        x = x.reshape(-1, *x.shape[2:])
        return sharding.constrain(x, (None,) * x.ndim, rule.how.layout)

    router = result.router
    if router is not None:
        ids = router.expert_ids
        sums = dataclasses.replace(router, expert_ids=None)
        sums = jax.tree.map(lambda x: jnp.sum(x, axis=0), sums)
        if ids is not None:
            axes = (None, "batch", *[None] * (ids.ndim - 2))
            ids = sharding.constrain(ids, axes, rule.how.layout)
        router = dataclasses.replace(sums, expert_ids=ids)
    return TokenLogprobs(
        whole(result.logprobs_RT),
        whole(result.entropy_RT),
        router,
        None if result.collision_RT is None else whole(result.collision_RT),
    )


def of_responses(
    values_RT: jax.Array, starts_B: jax.Array, mask_BT: jax.Array, layout: Layout | None
) -> jax.Array:
    """Rearranges values of a micro-batch's rows to one row per response, [R, T] -> [B, T'], masked.

    A sequence is one slice: cheaper than an index for every token. What it shares with others is
    never wanted, and may lie elsewhere: a slice then begins before its own tokens.
    """
    values_RT = sharding.constrain(values_RT, (None, None), layout)
    width = mask_BT.shape[1]
    # A slice may run past the last row, and begin before the first.
    flat = jnp.pad(values_RT.reshape(-1), (width, width))
    values_BT = jax.vmap(lambda start: jax.lax.dynamic_slice(flat, (start,), (width,)))(
        starts_B + width
    )
    return jnp.where(mask_BT, values_BT, 0.0)


def unless_empty(
    step: Callable[[Any, Any], Any], rows_of: Callable[[Any], TokenRows], model: DecoderConfig
) -> Callable[[Any, Any], Any]:
    """Makes a scan's `step` skip micro-batches of which no log-prob is wanted.

    A plan rounds the number of micro-batches up so that few programs are compiled; the added ones
    are not computed. Results of a skipped micro-batch are zeros, as those of a masked one are.
    Router metrics count every token: with experts, only a micro-batch without tokens is skipped.
    """

    def step_or_skip(carry, part):
        def skip(carry, part):
            _, result = jax.eval_shape(step, carry, part)
            return carry, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), result)

        rows = rows_of(part)
        some = rows.segment_ids_RT > 0 if model.num_experts else rows.response_mask_RT
        return jax.lax.cond(jnp.any(some), step, skip, carry, part)

    return step_or_skip


def _ring(length, layout):
    """Returns functions that permute [B, T, ...] to ring attention's order, padded, and back.

    The arrays hold one number per token, or the ids of its experts.
    """
    count = layout.size("length") if layout else 1
    if count == 1:
        return (lambda x_BT: x_BT), (lambda x_BT: x_BT)
    padded = length + -length % (2 * count)
    order, inverse = ring_order(padded, count), inverse_ring_order(padded, count)

    def into(x_BT):
        widths = ((0, 0), (0, padded - length), *[(0, 0)] * (x_BT.ndim - 2))
        return jnp.pad(x_BT, widths)[:, order]

    def back(x_BT):
        axes = ("batch", *[None] * (x_BT.ndim - 1))
        return sharding.constrain(x_BT, axes, layout)[:, inverse][:, :length]

    return into, back


def _shift_left(x_BT):
    return jnp.pad(x_BT[:, 1:], ((0, 0), (0, 1)))


def _shift_right(x_BT):
    return jnp.pad(x_BT[:, :-1], ((0, 0), (1, 0)))
