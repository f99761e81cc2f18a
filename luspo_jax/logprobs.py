"""Token log-probabilities and entropies of training rows: the model, then the chunked head."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from luspo_jax import sharding
from luspo_jax.models import decoder
from luspo_jax.models.decoder_config import DecoderConfig
from luspo_jax.ops.attention import inverse_ring_order, ring_order
from luspo_jax.ops.head_logprobs import head_logprobs
from luspo_jax.sharding import Layout
from luspo_jax.types import TokenBatch


@dataclasses.dataclass(frozen=True)
class Scoring:
    """How log-probabilities are computed; static under jit.

    Attributes:
      model: the decoder's configuration.
      temperature: of the rollout; log-probabilities of any other temperature would make
        the importance ratio wrong by several nats.
      dtype: name of the compute dtype; the head always accumulates in float32.
      remat: what of a layer is kept for the backward pass, a key of `decoder.REMAT`.
      attention: name of the implementation in `ops.attention`.
      head_chunk_tokens: tokens (rows × positions) whose logits exist at one time on a device.
      layout: where parameters, rows and positions lie; None on one device.
    """

    model: DecoderConfig
    temperature: float = 1.0
    dtype: str = "float32"
    remat: str = "none"
    attention: str = "reference"
    head_chunk_tokens: int = 2048
    layout: Layout | None = None


def token_logprobs(
    params: Mapping[str, Any], rows: TokenBatch, *, scoring: Scoring
) -> tuple[jax.Array, jax.Array]:
    """(logprobs_BT ≤ 0, entropy_BT ≥ 0) of the response tokens in nats, float32; 0 elsewhere.

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
            scoring,
        )
    scored_RT = _scored(
        params,
        packed.tokens_RT,
        packed.positions_RT,
        packed.segment_ids_RT,
        packed.response_mask_RT,
        scoring,
    )
    logprobs_BT, entropy_BT = (_unpacked(x_RT, rows, scoring.layout) for x_RT in scored_RT)
    return logprobs_BT, entropy_BT


def _scored(params, tokens_BT, positions_BT, segment_ids_BT, response_mask_BT, scoring):
    layout = scoring.layout
    order, back = _ring(tokens_BT.shape[1], layout)
    hidden_BTD = decoder.hidden_states(
        params,
        order(tokens_BT),
        order(positions_BT),
        order(segment_ids_BT),
        config=scoring.model,
        dtype=jnp.dtype(scoring.dtype),
        remat=scoring.remat,
        attention=scoring.attention,
        layout=layout,
    )
    # The state at t−1 predicts token t. Predictions are made where they stand (index t−1) and
    # moved to the token they score, which is the alignment law of types.py. A segment begins with
    # a prompt: nothing that is scored is predicted across a border.
    logprobs_BT, entropy_BT = head_logprobs(
        hidden_BTD,
        decoder.head_kernel(params),
        order(jnp.roll(tokens_BT, -1, axis=1)),
        order(_shift_left(response_mask_BT)),
        temperature=scoring.temperature,
        chunk_tokens=scoring.head_chunk_tokens,
        layout=layout,
    )
    return _shift_right(back(logprobs_BT)), _shift_right(back(entropy_BT))


def _ring(length, layout):
    """Functions on [B, T] into the order of attention over cut rows, padded to it, and back.

    What they move is a number a token.
    """
    count = layout.size("length") if layout else 1
    if count == 1:
        return (lambda x_BT: x_BT), (lambda x_BT: x_BT)
    padded = length + -length % (2 * count)
    order, inverse = ring_order(padded, count), inverse_ring_order(padded, count)

    def into(x_BT):
        return jnp.pad(x_BT, ((0, 0), (0, padded - length)))[:, order]

    def back(x_BT):
        return sharding.constrain(x_BT, ("batch", None), layout)[:, inverse][:, :length]

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
