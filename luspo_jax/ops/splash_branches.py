"""Splash attention for rows with branches, whose kernels compare segment ids for equality alone.

A branch sees two segments, so the kernels run twice: for the keys of every query's own segment, and
for those of the trunk. Both are joined as the blocks of a ring are, so that twice the time of
attention is the price of computing each trunk once.
"""

import jax.numpy as jnp

from luspo_jax.ops import splash_attention as splash
from luspo_jax.ops.attention_blocks import Inputs, Results
from luspo_jax.ops.precision import wide
from luspo_jax.ops.ring_attention import joined
from luspo_jax.ops.segments import BRANCH, trunk

_NOTHING = -2  # the id of no key; padding of whole tiles has another


def forward_block(inputs, *, causal):
    """Returns Results, float32."""
    parts = [
        Results(wide(found.out), found.lse)
        for part in (inputs, _of_trunks(inputs))
        for found in [splash.forward_block(part, causal=causal)]
    ]
    return joined(*parts)


def backward_block(inputs, results, grad_BTNH, *, causal):
    """Returns gradients (dq, dk, dv), float32."""
    own, of_trunks = (
        splash.backward_block(part, results, grad_BTNH, causal=causal)
        for part in (inputs, _of_trunks(inputs))
    )
    return tuple(wide(a) + wide(b) for a, b in zip(own, of_trunks, strict=True))


def _of_trunks(inputs: Inputs) -> Inputs:
    """Returns inputs whose branches see their trunks' keys, and whose other queries see none."""
    ids = inputs.segments
    return inputs._replace(segments=jnp.where(ids >= BRANCH, trunk(ids), _NOTHING))
