"""No program of a step plans memory that grows with the square of a row, or with T × V."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from luspo_jax.logprobs import LogprobRule, token_logprobs

from luspo_jax import objectives, optimizer, update
from luspo_jax.length import pressure
from luspo_jax.models import decoder
from luspo_jax.models.decoder_config import DecoderConfig
from luspo_jax.models.forward import Forward
from luspo_jax.types import TokenBatch, TrainBatch

CONFIG = DecoderConfig(
    "qwen3", 512, 1, 16, 32, 2, 1, 8, 1e4, 1e-6, False, True, False, 8192
)  # fmt: skip
LOGPROBS = LogprobRule(Forward(CONFIG, remat="full"), head_chunk_tokens=64)


def _rows(b, t):
    ints = jax.ShapeDtypeStruct((b, t), jnp.int32)
    return TokenBatch(ints, ints, ints, jax.ShapeDtypeStruct((b, t), jnp.bool_))


def _step_bytes(t, b=2):
    floats = jax.ShapeDtypeStruct((b, t), jnp.float32)
    row = jax.ShapeDtypeStruct((b,), jnp.float32)
    batch = TrainBatch(
        _rows(b, t), row, jax.ShapeDtypeStruct((b,), jnp.int32), None, None, None, floats
    )
    adam = optimizer.adamw(b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0)
    rule = update.UpdateRule(LOGPROBS, objectives.preset("luspo"), adam, 1, 1.0)
    program = update.update_step.lower(
        update.abstract_state(rule), batch, np.float32(1e-6), rule=rule
    )
    return program.compile().memory_analysis().temp_size_in_bytes


def _pressure_bytes(t, b=4):
    row = jax.ShapeDtypeStruct((b,), jnp.float32)
    ints, flags = (jax.ShapeDtypeStruct((b,), kind) for kind in (jnp.int32, jnp.bool_))
    half = pressure.Half(_rows(b, t), jax.ShapeDtypeStruct((b, t), jnp.bool_), row, ints, flags)

    def measured(params, half_a, half_b):
        return pressure.cross_fitted(
            lambda p, rows: token_logprobs(p, rows, rule=LOGPROBS)[0],
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
