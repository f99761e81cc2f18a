"""The decoder's arithmetic as functions of arrays, each with the backward pass that suits it."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from luspo_jax.ops.precision import wide, wide_type

# The element-wise functions keep their inputs only and are computed again in the backward pass:
# less memory than the intermediate arrays, and no slower. Inside a scan nothing can merge the
# two computations, so no barrier against it is needed.
_recomputed = functools.partial(jax.checkpoint, prevent_cse=False)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def project(x, kernel, contracted=1):
    """x · kernel over the last `contracted` axes of x and the first of the kernel, in x's type.

    The kernel's gradient is summed in float32 and has the kernel's own type, so float32 master
    weights under bfloat16 activations lose nothing to rounding.
    """
    axes = (tuple(range(x.ndim - contracted, x.ndim)), tuple(range(contracted)))
    return lax.dot_general(x, kernel.astype(x.dtype), (axes, ((), ())))


def _project_forward(x, kernel, contracted):
    return project(x, kernel, contracted), (x, kernel)


def _project_backward(contracted, residuals, grad):
    x, kernel = residuals
    lead = x.ndim - contracted
    outputs = (tuple(range(lead, grad.ndim)), tuple(range(contracted, kernel.ndim)))
    dx = lax.dot_general(grad, kernel.astype(grad.dtype), (outputs, ((), ())))
    # As plain matrices: XLA on CPU has no bfloat16 product with float32 sums for other layouts.
    rows = math.prod(x.shape[:lead])
    dkernel = lax.dot_general(
        x.reshape(rows, -1),
        grad.reshape(rows, -1),
        (((0,), (0,)), ((), ())),
        preferred_element_type=wide_type(x),
    )
    return dx, dkernel.reshape(kernel.shape).astype(kernel.dtype)


project.defvjp(_project_forward, _project_backward)


@functools.partial(_recomputed, static_argnums=(2,))
def rms_norm(x, scale, eps):
    """x / √(mean x² + ε) · scale over the last axis, in float32 (Zhang & Sennrich 2019)."""
    normed = wide(x)
    normed = normed * lax.rsqrt(jnp.mean(jnp.square(normed), axis=-1, keepdims=True) + eps)
    return (normed * along_last_axes(scale.astype(normed.dtype), x.ndim)).astype(x.dtype)


@_recomputed
def swiglu(gate, up):
    """silu(gate) ⊙ up (Shazeer 2020)."""
    return jax.nn.silu(gate) * up


def rotation_of(positions, head_dim, theta):
    """(cos, sin) of position · θ^(−2i/H), float32, shaped positions.shape + (1, H/2)."""
    # On the host and in float32 steps, as the checkpoints' own code does it: another rounding of
    # a frequency, 1e-7 of it, is an angle of 0.003 at position 32,768.
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = np.float32(1) / np.power(np.float32(theta), exponents)
    angles = positions.astype(jnp.float32)[..., None, None] * along_last_axes(
        frequencies, positions.ndim + 2
    )
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x, rotation):
    """Rotary position embedding of the pairs (i, i + H/2), in float32 (Su et al. 2021)."""
    cos, sin = (turn.astype(wide_type(x)) for turn in rotation)
    first, second = jnp.split(wide(x), 2, axis=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def along_last_axes(weights, ndim):
    """`weights` with leading axes of size 1, to broadcast against `ndim` axes."""
    return weights.reshape((1,) * (ndim - weights.ndim) + weights.shape)
