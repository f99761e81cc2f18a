"""The decoder's arithmetic as functions of arrays, each with a suitable backward pass."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from luspo_jax import sharding
from luspo_jax.models.low_rank import QUANTISED, LowRank, dequantised, low_rank_axes
from luspo_jax.models.quantised import Quantised, looked_up, scaled
from luspo_jax.ops.precision import wide, wide_type

# The element-wise functions keep only their inputs and are recomputed in the backward pass: less
# memory than the intermediate arrays, and no slower. Inside a scan nothing can merge the two
# computations, so no barrier against it is needed.
_recomputed = functools.partial(jax.checkpoint, prevent_cse=False)


# Of float32 operands, rounded to bfloat16 for the product, whose sums are float32.
BFLOAT16_PRODUCTS = lax.DotAlgorithmPreset.BF16_BF16_F32


def _product(x, y, dims, precision, preferred=None):
    """Computes `lax.dot_general`; XLA on CPU knows BFLOAT16_PRODUCTS by their operands alone."""
    if precision is BFLOAT16_PRODUCTS and x.dtype == jnp.float32:
        x, y, precision, preferred = (*(a.astype(jnp.bfloat16) for a in (x, y)), None, jnp.float32)
    return lax.dot_general(
        x, y, (dims, ((), ())), precision=precision, preferred_element_type=preferred
    )


def project(x, kernel, contracted=1, axes=None, layout=None, precision=None):
    """Computes x · kernel over the last `contracted` axes of x and the first of the kernel.

    The result has x's type. The kernel's gradient is summed in float32 and has the kernel's own
    type, so float32 master weights under bfloat16 activations lose nothing to rounding. With a
    layout, a kernel of logical `axes` is sharded over the mesh: it is gathered in x's type for use,
    and its gradient returns in the same sharding. `precision` is that of the products, a
    `lax.Precision` or BFLOAT16_PRODUCTS. A Quantised kernel's products are summed and scaled in
    float32, an Nf4 one is used in x's type; neither has a gradient. A LowRank one gives
    x · W + s · (x · A) · B in x's type, or x · (W + s · A · B) in float32 without a layout, and A
    and B have gradients.
    """
    if isinstance(kernel, QUANTISED):
        return _project_frozen(x, kernel, contracted, axes, layout, precision)
    if not isinstance(kernel, LowRank):
        return _project(x, kernel, contracted, axes, layout, precision)
    if layout is None and x.dtype == jnp.float32:
        return _project_merged(x, kernel, contracted, precision)
    inner, outer = low_rank_axes(axes, contracted)
    low = _project(x, kernel.a, contracted, inner, layout, precision)
    added = _project(low, kernel.b, 1, outer, layout, precision)
    y = _project_frozen(x, kernel.base, contracted, axes, layout, precision)
    return y + kernel.scale * added


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def _project(x, kernel, contracted, axes, layout, precision):
    dims = (tuple(range(x.ndim - contracted, x.ndim)), tuple(range(contracted)))
    if isinstance(kernel, Quantised):
        values = gathered(kernel.values, x.dtype, axes, layout)
        y = lax.dot_general(x, values, (dims, ((), ())), preferred_element_type=wide_type(x))
        return scaled(y, kernel.scales).astype(x.dtype)
    whole = frozen(kernel, x.dtype, contracted, axes, layout)
    return _product(x, whole, dims, precision)


def frozen(kernel, dtype, contracted, axes, layout):
    """Returns a kernel in `dtype`, gathered; one of few bits travels as it is stored."""
    if not isinstance(kernel, QUANTISED):
        return gathered(kernel, dtype, axes, layout)
    lead = 0 if axes is None else sum(axis == "experts" for axis in axes)
    values = gathered(kernel.values, kernel.values.dtype, axes, layout)
    return dequantised(dataclasses.replace(kernel, values=values), lead, contracted).astype(dtype)


def gathered(kernel, dtype, axes, layout):
    """Casts a parameter to `dtype` and gathers it along the axis over which weights are sharded."""
    if layout is None:
        return kernel.astype(dtype)
    # Cast first: it halves the traffic.
    kernel = sharding.constrain(kernel.astype(dtype), axes, layout)
    whole = tuple(None if axis == "embed" else axis for axis in axes)
    return sharding.constrain(kernel, whole, layout)


def _project_forward(x, kernel, contracted, axes, layout, precision):
    return _project(x, kernel, contracted, axes, layout, precision), (x, kernel)


def _project_backward(contracted, axes, layout, precision, residuals, grad):
    x, kernel = residuals
    lead = x.ndim - contracted
    dx = _input_gradient(kernel, grad, contracted, axes, layout, precision)
    local = functools.partial(_kernel_gradient, contracted, axes, layout, precision)
    if layout is not None:
        # Each device computes its own rows and positions: XLA would gather whole rows of
        # activations if their positions are sharded.
        rows = ("batch", "length")[:lead]
        inner = tuple(None if axis == "embed" else axis for axis in axes)
        inputs = (*rows, *inner[:contracted]), (*rows, *inner[contracted:])
        local = sharding.shard_map(local, layout, inputs, axes)
    return dx, local(x, grad).astype(kernel.dtype)


def _input_gradient(kernel, grad, contracted, axes, layout, precision):
    kept = len(kernel.shape) - contracted
    outputs = (
        tuple(range(grad.ndim - kept, grad.ndim)),
        tuple(range(contracted, contracted + kept)),
    )
    whole = frozen(kernel, grad.dtype, contracted, axes, layout)
    return _product(grad, whole, outputs, precision)


def _kernel_gradient(contracted, axes, layout, precision, x, grad):
    """Sums x ⊗ grad over rows and positions, in float32, sharded like the kernel."""
    lead = x.ndim - contracted
    shape, rows = (*x.shape[lead:], *grad.shape[lead:]), math.prod(x.shape[:lead])
    # As plain matrices: XLA on CPU has no bfloat16 product with float32 sums for other shapes. A
    # result of few columns costs up to ten times one of few rows there, so a narrow one is computed
    # transposed, which XLA would undo without the barrier.
    ends = x.reshape(rows, -1), grad.reshape(rows, -1)
    narrow = 8 * ends[1].shape[1] <= ends[0].shape[1]
    ordered = ends[::-1] if narrow else ends
    product = _product(*ordered, ((0,), (0,)), precision, wide_type(x))
    dkernel = (lax.optimization_barrier(product).T if narrow else product).reshape(shape)
    return sharding.summed_over_rows(dkernel, axes, layout)


_project.defvjp(_project_forward, _project_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def _project_frozen(x, kernel, contracted, axes, layout, precision):
    """Computes the same for a kernel without gradient, whose outer products cost nothing then."""
    return _project(x, kernel, contracted, axes, layout, precision)


def _frozen_forward(x, kernel, contracted, axes, layout, precision):
    return _project(x, kernel, contracted, axes, layout, precision), kernel


def _frozen_backward(contracted, axes, layout, precision, kernel, grad):
    return _input_gradient(kernel, grad, contracted, axes, layout, precision), None


_project_frozen.defvjp(_frozen_forward, _frozen_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _project_merged(x, kernel, contracted, precision):
    """Computes x · (W + s · A · B): in float32 the sum loses nothing that training would notice.

    Two products with all rows fewer than x · W + s · (x · A) · B, in each direction.
    """
    return _project(x, _merged(kernel, contracted, precision), contracted, None, None, precision)


def _merged(kernel, contracted, precision):
    added = _project(kernel.a, kernel.b, 1, None, None, precision)
    return frozen(kernel.base, jnp.float32, contracted, None, None) + kernel.scale * added


def _merged_forward(x, kernel, contracted, precision):
    return _project_merged(x, kernel, contracted, precision), (x, kernel)


def _merged_backward(contracted, precision, residuals, grad):
    x, kernel = residuals
    whole = _merged(kernel, contracted, precision)
    dx = _input_gradient(whole, grad, contracted, None, None, precision)
    low = _project(x, kernel.a, contracted, None, None, precision)
    dlow = kernel.scale * _input_gradient(kernel.b, grad, 1, None, None, precision)
    da = _kernel_gradient(contracted, None, None, precision, x, dlow)
    db = kernel.scale * _kernel_gradient(1, None, None, precision, low, grad)
    return dx, dataclasses.replace(kernel, base=None, a=da, b=db)


_project_merged.defvjp(_merged_forward, _merged_backward)


@jax.custom_vjp
def add_bias(y, bias):
    """Adds a bias over the last axes, in y's type; the bias's gradient is summed in float32."""
    return y + along_last_axes(bias.astype(y.dtype), y.ndim)


def _add_bias_backward(bias, grad):
    lead = tuple(range(grad.ndim - bias.ndim))
    return grad, jnp.sum(grad, axis=lead, dtype=wide_type(grad)).astype(bias.dtype)


add_bias.defvjp(lambda y, bias: (add_bias(y, bias), bias), _add_bias_backward)


def embed(table_VD, tokens, dtype, layout):
    """Looks up rows of the embedding by token, in `dtype`.

    With a layout the table stays in place: each device looks up its part of the embedding for the
    tokens of all devices that share its rows, and the parts are exchanged. So activations travel,
    not the table.
    """
    if layout is None:
        return looked_up(table_VD, tokens).astype(dtype)
    if tokens.ndim == 1:
        return embed(table_VD, tokens[:, None], dtype, layout)[:, 0]
    cut, of_length = layout.axis_names("embed"), layout.axis_names("length")
    vocab = layout.axis_names("vocab")

    def local(table_VD, tokens_BT):
        for name in cut:
            along = 1 if name in of_length else 0
            tokens_BT = lax.all_gather(tokens_BT, name, axis=along, tiled=True)
        if vocab:
            tokens_BT = tokens_BT - lax.axis_index(vocab) * table_VD.shape[0]
        x_BTD = looked_up(table_VD, tokens_BT)
        if vocab:
            own_BT = (tokens_BT >= 0) & (tokens_BT < table_VD.shape[0])
            x_BTD = lax.psum(jnp.where(own_BT[..., None], x_BTD, 0), vocab)
        x_BTD = x_BTD.astype(dtype)
        for name in reversed(cut):  # the axis gathered last is the outermost
            along = 1 if name in of_length else 0
            x_BTD = lax.all_to_all(x_BTD, name, split_axis=along, concat_axis=2, tiled=True)
        return x_BTD

    rows = ("batch", "length")
    of_table = ("vocab", "embed")
    if isinstance(table_VD, Quantised):
        of_table = Quantised(of_table, ("vocab",))
    spread = sharding.shard_map(local, layout, [of_table, rows], (*rows, None))
    return spread(table_VD, tokens)


@functools.partial(_recomputed, static_argnums=(2,))
def rms_norm(x, scale, eps):
    """Computes x / √(mean x² + ε) · scale over the last axis, float32 (Zhang & Sennrich 2019)."""
    normed = wide(x)
    normed = normed * lax.rsqrt(jnp.mean(jnp.square(normed), axis=-1, keepdims=True) + eps)
    return (normed * along_last_axes(scale.astype(normed.dtype), x.ndim)).astype(x.dtype)


@_recomputed
def swiglu(gate, up):
    """Computes silu(gate) ⊙ up (Shazeer 2020)."""
    return jax.nn.silu(gate) * up


def replaced(x_BTD, units_UD, index_BT, layout):
    """Replaces each row of `x_BTD` whose index is not −1 by row `index_BT` of `units_UD`.

    With a layout, every device has all rows of `units_UD` during its lookup.
    """
    units_UD = sharding.constrain(units_UD.astype(x_BTD.dtype), (None, None), layout)
    # Text reads beyond the last row, so that it adds to no row's gradient.
    beyond_BT = jnp.where(index_BT >= 0, index_BT, units_UD.shape[0])
    found_BTD = jnp.take(units_UD, beyond_BT, axis=0, mode="fill", fill_value=0)
    if layout is not None:
        found_BTD = sharding.constrain(found_BTD, ("batch", "length", None), layout)
    return jnp.where(index_BT[..., None] >= 0, found_BTD, x_BTD)


def rotation_of(positions, frequencies, sections=(), factor=1.0):
    """Returns (cos, sin) of position · frequency, float32, shape positions.shape + (1, H/2).

    With `sections`, a token has one position per section, on the last axis of `positions`: the
    first `sections[0]` of the H/2 angles use the first position, and so on (M-RoPE; Wang et al.
    2024, arXiv:2409.12191). `factor` multiplies both (YaRN).
    """
    which = np.repeat(np.arange(len(sections)), sections) if sections else None
    positions = positions.astype(jnp.float32)[..., None, which]
    angles = positions * along_last_axes(frequencies, positions.ndim)
    if factor == 1:
        return jnp.cos(angles), jnp.sin(angles)
    return jnp.cos(angles) * jnp.float32(factor), jnp.sin(angles) * jnp.float32(factor)


def rotate(x, rotation):
    """Applies rotary position embedding to the pairs (i, i + H/2), in float32 (Su et al. 2021)."""
    cos, sin = (turn.astype(wide_type(x)) for turn in rotation)
    first, second = jnp.split(wide(x), 2, axis=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def along_last_axes(weights, ndim):
    """Reshapes `weights` with leading axes of size 1, to broadcast against `ndim` axes."""
    return weights.reshape((1,) * (ndim - weights.ndim) + weights.shape)
