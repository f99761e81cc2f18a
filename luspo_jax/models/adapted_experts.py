"""The experts of a mixture in training with a low-rank adapter: frozen, and maybe adapted.

Each layer's matrices are made whole in the type of the activations, W + s · A · B of all experts at
once, and multiplied as ever; the gradients of A and B come from that of the whole matrices. Nothing
of it is kept for the backward pass, which makes them again: a layer's experts are in memory once.
"""

import functools
from typing import Any

import jax

from luspo_jax.models.experts import EXPERT_AXES, expert_mlp
from luspo_jax.models.low_rank import QUANTISED, LowRank, dequantised, merged
from luspo_jax.sharding import Layout, constrain


def adapted_mlp(
    x: jax.Array,
    ids: jax.Array,
    weights: jax.Array,
    kernels: tuple[Any, Any, Any],
    implementation: str,
    layout: Layout | None,
) -> jax.Array:
    """Computes `expert_mlp`, with kernels that may be LowRank or frozen in few bits."""
    if not any(isinstance(kernel, (LowRank, *QUANTISED)) for kernel in kernels):
        return expert_mlp(x, ids, weights, kernels, implementation, layout)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def run(x, ids, weights, kernels):
        whole = tuple(map(functools.partial(_whole, x.dtype, layout), kernels, EXPERT_AXES))
        return expert_mlp(x, ids, weights, whole, implementation, layout)

    return run(x, ids, weights, kernels)


def _whole(dtype, layout, kernel, axes):
    if isinstance(kernel, LowRank):
        kernel = merged(kernel)
    elif isinstance(kernel, QUANTISED):
        kernel = dequantised(kernel, 1, 1)
    return constrain(kernel.astype(dtype), axes, layout)
