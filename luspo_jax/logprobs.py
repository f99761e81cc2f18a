"""Token log-probabilities and entropies of training rows: the model, then the chunked head."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from luspo_jax import sharding
from luspo_jax.models import decoder, vision
from luspo_jax.models.experts import check_ids
from luspo_jax.models.forward import Forward
from luspo_jax.ops.attention import inverse_ring_order, ring_order
from luspo_jax.ops.head_logprobs import head_logprobs
from luspo_jax.types import TokenBatch


@dataclasses.dataclass(frozen=True)
class LogprobRule:
    """How log-probabilities are computed; static under jit.

    Attributes:
      how: how the model's forward pass is.
      temperature: of the rollout; log-probabilities of any other temperature would make
        the importance ratio wrong by several nats.
      head_chunk_tokens: tokens (rows × positions) whose logits exist at one time on a device; the
        head always accumulates in float32.
      replay: which recorded experts stand in for the routers' choice, a key of REPLAYS; rows
        without that record are routed as the policy does.
      freeze_vision: no gradient goes to the vision tower.
    """

    how: Forward
    temperature: float = 1.0
    head_chunk_tokens: int = 2048
    replay: str = "none"
    freeze_vision: bool = False


# Router replay: "old" is R2 and "sampler" R3 of arXiv:2512.01374.
REPLAYS = ("none", "old", "sampler")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RouterPass:
    """What the routers did in a pass over rows; counts are over real tokens, prompts included.

    Attributes:
      expert_ids: [rows, T, L, K] the routers' own choice at each token of the rows that the model
        read, packed ones where there are, whatever was replayed; None where it is not kept.
      load_LE: float32 tokens that each expert was sent.
      mass_LE: float32 sums of the routers' probabilities.
      tokens: float32 real tokens.
      agreement: record → float32 share of a token's K experts that both chose, mean over layers,
        summed over real tokens.
    """

    expert_ids: jax.Array | None
    load_LE: jax.Array
    mass_LE: jax.Array
    tokens: jax.Array
    agreement: dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scored:
    """Log-probs ≤ 0 and entropies ≥ 0 of the response tokens in nats, float32; 0 elsewhere.

    `router` is None without experts.
    """

    logprobs_BT: jax.Array
    entropy_BT: jax.Array
    router: RouterPass | None = None


def token_logprobs(
    params: Mapping[str, Any], rows: TokenBatch, *, rule: LogprobRule
) -> tuple[jax.Array, jax.Array]:
    """(logprobs_BT, entropy_BT) of `scored`."""
    result = scored(params, rows, rule=rule)
    return result.logprobs_BT, result.entropy_BT


def scored(params: Mapping[str, Any], rows: TokenBatch, *, rule: LogprobRule) -> Scored:
    """Log-probs and entropies of the response tokens of rows, and what routers did.

    Of packed rows, one micro-batch at a time: the model and the head read the dense rows, and what
    they say of each token goes to where it stands in `rows`.
    """
    packed = rows.packed
    if packed is None:
        return _scored(
            params,
            rows.tokens_BT,
            rows.positions_BT,
            rows.segment_ids_BT,
            rows.response_mask_BT,
            rows.experts,
            _images(params, rows, rows.units_BT, rule),
            rule,
        )
    of_rows = _scored(
        params,
        packed.tokens_RT,
        packed.positions_RT,
        packed.segment_ids_RT,
        packed.response_mask_RT,
        packed.experts,
        _images(params, rows, packed.units_RT, rule),
        rule,
    )
    unpacked = (
        _unpacked(x_RT, rows, rule.how.layout) for x_RT in (of_rows.logprobs_BT, of_rows.entropy_BT)
    )
    return Scored(*unpacked, of_rows.router)


def _images(params, rows, units_BT, rule):
    """(embeddings of the rows' images [U, D], the one at each token or −1); None without any."""
    if rows.images is None:
        return None
    tower = params["vision"]
    units_IUD = vision.encode(
        jax.lax.stop_gradient(tower) if rule.freeze_vision else tower,
        rows.images.patches_ISC,
        rows.images.positions_IS2,
        rows.images.valid_IS,
        how=rule.how,
    )
    return units_IUD.reshape(-1, units_IUD.shape[-1]), units_BT


def _scored(
    params, tokens_BT, positions_BT, segment_ids_BT, response_mask_BT, experts, images, rule
):
    layout = rule.how.layout
    recorded = {} if experts is None else vars(experts)
    recorded = {name: ids for name, ids in recorded.items() if ids is not None}
    for name, ids in recorded.items():
        check_ids(ids, tokens_BT, rule.how.model, f"experts.{name}")
    order, back = _ring(tokens_BT.shape[1], layout)
    replayed = recorded.get(rule.replay)
    hidden_BTD, routed = decoder.forward(
        params,
        order(tokens_BT),
        order(positions_BT),
        order(segment_ids_BT),
        how=rule.how,
        replayed_BTLK=None if replayed is None else order(replayed),
        units_UD=None if images is None else images[0],
        index_BT=None if images is None else order(images[1]),
    )
    # The state at t−1 predicts token t. Predictions are made where they stand (index t−1) and
    # moved to the token they score, which is the alignment law of types.py. A segment begins with
    # a prompt: nothing that is scored is predicted across a border.
    logprobs_BT, entropy_BT = head_logprobs(
        hidden_BTD,
        decoder.head_kernel(params),
        order(jnp.roll(tokens_BT, -1, axis=1)),
        order(_shift_left(response_mask_BT)),
        temperature=rule.temperature,
        chunk_tokens=rule.head_chunk_tokens,
        layout=layout,
    )
    router = None if routed is None else _router_pass(routed, back, segment_ids_BT > 0, recorded)
    return Scored(_shift_right(back(logprobs_BT)), _shift_right(back(entropy_BT)), router)


def _router_pass(routed, back, real_BT, recorded):
    ids = back(routed.expert_ids)
    agreement = {}
    for name, others in recorded.items():
        shared = jnp.any(ids[..., :, None] == others[..., None, :], axis=-1)
        share_BT = jnp.mean(shared.astype(jnp.float32), axis=(-2, -1))
        agreement[name] = jnp.sum(jnp.where(real_BT, share_BT, 0))
    return RouterPass(
        expert_ids=ids,
        load_LE=routed.load_LE,
        mass_LE=routed.mass_LE,
        tokens=jnp.sum(real_BT, dtype=jnp.float32),
        agreement=agreement,
    )


def _ring(length, layout):
    """Functions on [B, T, ...] into the order of attention over cut rows, padded to it, and back.

    What they move is a number a token, or the ids of its experts.
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


def _unpacked(x_RT, rows, layout):
    """[R, T] -> [B, T'], masked. A sequence is one slice: cheaper than a place for every token."""
    x_RT = sharding.constrain(x_RT, (None, None), layout)
    width = rows.response_mask_BT.shape[1]
    flat = jnp.pad(x_RT.reshape(-1), (0, width))  # a slice may run past the last row
    x_BT = jax.vmap(lambda start: jax.lax.dynamic_slice(flat, (start,), (width,)))(
        rows.packed.starts_B
    )
    return jnp.where(rows.response_mask_BT, x_BT, 0.0)


def _shift_left(x_BT):
    return jnp.pad(x_BT[:, 1:], ((0, 0), (0, 1)))


def _shift_right(x_BT):
    return jnp.pad(x_BT[:, :-1], ((0, 0), (1, 0)))
