"""The sampler's matrices as int8, with a scale for each output channel.

W ≈ q · s with s = max |W| / 127 over the axes that a product sums over, and q = round(W / s) in
−127 … 127. Then x · W ≈ (x · q) · s: q is exact in bfloat16 and float32, so activations keep their
type and s multiplies the result. |W − q · s| ≤ s / 2, and no larger for one device than for many.

int8 are all matrices that a decode step reads whole: projections, MLPs, experts' kernels and the
head. Biases, norms, the image tower and an embedding of its own are bfloat16, routers float32. An
embedding that is also the head is stored once, as the head: its rows are looked up as q · s.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from luspo_jax.ops.precision import wide, wide_type

_LARGEST = 127
# The axes that a product sums over, counted from the last, by the name of the kernel's module.
_CONTRACTED = {
    "query": (-3,),
    "key": (-3,),
    "value": (-3,),
    "out": (-3, -2),
    "gate": (-2,),
    "up": (-2,),
    "down": (-2,),
}
_ACTIVATIONS = {"int8": "bfloat16"}  # weights → activations, where the two differ


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantised:
    """A matrix as int8; in a tree of axes, the axes of both.

    Attributes:
      values: int8, in the shape of the matrix. The first field: Flax compares its shape.
      scales: float32, of the axes that a product keeps.
    """

    values: Any
    scales: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Returns the shape of the matrix."""
        return self.values.shape


def activation_type(kind: str) -> str:
    """Returns the type of activations and cache of a sampler whose weights are of this type."""
    return _ACTIVATIONS.get(kind, kind)


def is_quantised(dtype: Any) -> bool:
    """Whether matrices of this type have scales."""
    return jnp.dtype(dtype) == jnp.int8


def quantise(kernel: jax.Array, contracted: tuple[int, ...]) -> Quantised:
    """Rounds a matrix to int8, with one scale for all entries along the axes `contracted`."""
    wide = kernel.astype(jnp.float32)
    largest = jnp.max(jnp.abs(wide), axis=contracted, keepdims=True)
    # A channel of zeros, or of numbers below float32's normal ones, has the smallest scale.
    scales = jnp.maximum(largest, _LARGEST * jnp.finfo(jnp.float32).tiny) / _LARGEST
    values = jnp.round(wide / scales).astype(jnp.int8)
    return Quantised(values, jnp.squeeze(scales, contracted))


def dense(kernel: Quantised, contracted: tuple[int, ...]) -> jax.Array:
    """Returns q · s in float32, of a matrix whose axes `contracted` a product sums over."""
    return kernel.values.astype(jnp.float32) * jnp.expand_dims(kernel.scales, contracted)


def quantise_tree(params: Any) -> Any:
    """Rounds the matrices of a decoder to int8, and leaves those that are, and what is no matrix.

    Raises:
      ValueError: naming a kernel that it does not know.
    """

    def one(path, x):
        if isinstance(x, Quantised):
            return x
        contracted = _contracted(path, "head" not in params)
        return x if contracted is None else quantise(x, contracted)

    return jax.tree_util.tree_map_with_path(
        one, params, is_leaf=lambda node: isinstance(node, Quantised)
    )


def quantised_axes(axes_tree: Any) -> Any:
    """Returns the logical axes of a decoder whose matrices are int8; a scale lies as its channel.

    Raises:
      ValueError: naming a kernel that it does not know.
    """

    def one(path, axes):
        contracted = _contracted(path, "head" not in axes_tree)
        if contracted is None:
            return axes
        kept = [i for i in range(len(axes)) if i - len(axes) not in contracted]
        return Quantised(axes, tuple(axes[i] for i in kept))

    return jax.tree_util.tree_map_with_path(
        one, axes_tree, is_leaf=lambda node: isinstance(node, tuple)
    )


def split(kernel: Any) -> tuple[jax.Array, jax.Array | None]:
    """Returns a matrix's (values, scales); None for one without."""
    return (kernel.values, kernel.scales) if isinstance(kernel, Quantised) else (kernel, None)


def scaled(y: jax.Array, scales: jax.Array | None) -> jax.Array:
    """Multiplies products by the scales of their channels, the last axes, in float32; y if None."""
    if scales is None:
        return y
    over = scales.reshape((1,) * (y.ndim - scales.ndim) + scales.shape)
    return (wide(y) * over.astype(wide_type(y))).astype(y.dtype)


def looked_up(table_VD: Any, tokens: jax.Array) -> jax.Array:
    """Looks up rows of an embedding, in float32 if it is int8; a token beyond it has its last."""
    taken = jax.tree.map(lambda x: jnp.take(x, tokens, axis=0, mode="clip"), table_VD)
    if isinstance(taken, Quantised):
        return taken.values.astype(jnp.float32) * taken.scales[..., None]
    return taken


def _contracted(path, tied):
    """Returns the axes that a product sums over; None for what is not quantised."""
    names = [key.key for key in path]
    if names[0] == "vision" or "router" in names:
        return None
    if names[-1] == "head" or (names[-1] == "embedding" and tied):
        return (-1,)
    if names[-1] != "kernel":
        return None
    if names[-2] not in _CONTRACTED:
        raise ValueError(f"int8 covers no kernel {'/'.join(names)!r}")
    return _CONTRACTED[names[-2]]
