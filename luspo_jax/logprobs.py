"""Token log-probabilities and entropies of training rows: the model, then the chunked head."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from luspo_jax.models import decoder
from luspo_jax.models.decoder_config import DecoderConfig
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
    """(logprobs_BT ≤ 0, entropy_BT ≥ 0) of the response tokens in nats, float32; 0 elsewhere."""
    dtype = jnp.dtype(scoring.dtype)
    hidden_BTD = decoder.hidden_states(
        params,
        rows.tokens_BT,
        rows.positions_BT,
        rows.segment_ids_BT,
        config=scoring.model,
        dtype=dtype,
        remat=scoring.remat,
        attention=scoring.attention,
        layout=scoring.layout,
    )
    # The state at t−1 predicts token t. Predictions are made where they stand (index t−1) and
    # moved to the token they score, which is the alignment law of types.py.
    logprobs_BT, entropy_BT = head_logprobs(
        hidden_BTD,
        decoder.head_kernel(params),
        jnp.roll(rows.tokens_BT, -1, axis=1),
        _shift_left(rows.response_mask_BT),
        temperature=scoring.temperature,
        chunk_tokens=scoring.head_chunk_tokens,
        layout=scoring.layout,
    )
    return _shift_right(logprobs_BT), _shift_right(entropy_BT)


def _shift_left(x_BT):
    return jnp.pad(x_BT[:, 1:], ((0, 0), (0, 1)))


def _shift_right(x_BT):
    return jnp.pad(x_BT[:, :-1], ((0, 0), (1, 0)))
