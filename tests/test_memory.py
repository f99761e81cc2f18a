"""No program of a step plans memory that grows with the square of a row, or with T × V."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from luspo_jax import objectives
from luspo_jax.learner import optimizer
from luspo_jax.learner.logprobs import LogprobRule, microbatch_logprobs, of_responses
from luspo_jax.learner.state import UpdateRule, abstract_state
from luspo_jax.learner.step import update_step
from luspo_jax.length import pressure
from luspo_jax.models import decoder
from luspo_jax.models.decoder_config import DecoderConfig
from luspo_jax.models.forward import Forward
from luspo_jax.types import ResponseRows, TokenRows, TrainBatch

CONFIG = DecoderConfig(
    "qwen3", 512, 1, 16, 32, 2, 1, 8, 1e4, 1e-6, False, True, False, 8192
)  # fmt: skip
LOGPROBS = LogprobRule(Forward(CONFIG, remat="full"), head_chunk_tokens=64)


def _rows(b, t):
    ints = jax.ShapeDtypeStruct((b, t), jnp.int32)
    return TokenRows(ints, ints, ints, jax.ShapeDtypeStruct((b, t), jnp.bool_), b)


def _step_bytes(t, b=2):
    ints = jax.ShapeDtypeStruct((b,), jnp.int32)
    responses = ResponseRows(
        starts_B=ints,
        response_mask_BT=jax.ShapeDtypeStruct((b, t), jnp.bool_),
        advantages_B=jax.ShapeDtypeStruct((b,), jnp.float32),
        group_ids_B=ints,
        sampler_logprobs_BT=jax.ShapeDtypeStruct((b, t), jnp.float32),
    )
    adam = optimizer.adamw(b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0)
    rule = UpdateRule(LOGPROBS, objectives.preset("luspo"), adam, 1.0)
    batch = TrainBatch(_rows(b, t), responses)
    program = update_step.lower(abstract_state(rule), batch, np.float32(1e-6), rule=rule)
    return program.compile().memory_analysis().temp_size_in_bytes


def _logprobs(params, part):
    rows, starts_B, mask_BT = part
    found = microbatch_logprobs(params, rows, rule=LOGPROBS)
    return of_responses(found.logprobs_RT, starts_B, mask_BT, None)


def _pressure_bytes(t, b=4):
    ints, flags, row = (
        jax.ShapeDtypeStruct((b,), kind) for kind in (jnp.int32, jnp.bool_, jnp.float32)
    )
    mask = jax.ShapeDtypeStruct((b, t), jnp.bool_)
    half = pressure.Half((_rows(b, t), ints, mask), mask, row, ints, flags)

    def measured(params, half_a, half_b):
        return pressure.cross_fitted(
            _logprobs,
            params,
            half_a,
            half_b,
            objectives=[("luspo", objectives.preset("luspo"))],
        )

    program = jax.jit(measured).lower(decoder.abstract_params(CONFIG), half, half)
    return program.compile().memory_analysis().temp_size_in_bytes


def test_a_step_grows_with_the_length():
    assert _step_bytes(2048) < 5 * _step_bytes(512)  # 4 where linear, 16 where square


@pytest.mark.slow  # compiles for a minute
def test_length_pressure_grows_with_the_length():
    assert _pressure_bytes(2048) < 5 * _pressure_bytes(512)
