"""Low-rank adapters: frozen matrices W, beside each of which two narrow ones, A and B, are trained.

y = x · W + s · (x · A) · B, with A [in, r], B [r, out] and s = α / r, or α / √r with `rslora` (Hu
et al. 2021, arXiv:2106.09685; Kalajdzievski 2023, arXiv:2312.03732). B begins at zero, so training
begins at the model's own policy; with `init="pissa"` A · B begins as the r largest singular parts
of W, and W as the rest (Meng et al. 2024, arXiv:2404.02948).

The adapter is a tree of its own, in the structure of the parameters, with {"a", "b"} where an
adapted kernel is. `composed` puts both into the tree that a forward pass reads.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from luspo_jax import sharding
from luspo_jax.models.quantised import Quantised

# The names of the linear layers in Hugging Face's modules → ours.
MODULES = {
    "q_proj": "query",
    "k_proj": "key",
    "v_proj": "value",
    "o_proj": "out",
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
}
INITS = ("kaiming", "gaussian", "pissa")
BASES = ("bfloat16", "float32")
_STACKED = ("layers", "experts")  # leading axes of a kernel: it is one matrix for each


@dataclasses.dataclass(frozen=True)
class Adapter:
    """Which matrices are adapted, and how; static under jit.

    Attributes:
      rank: r.
      alpha: α.
      targets: names of MODULES.
      experts: whether those of a mixture's experts are adapted too.
      vision: whether all linear layers of an image tower are.
      rslora: whether s is α / √r.
      init: how A and B begin, one of INITS.
      base: what the frozen matrices are stored as, one of BASES.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] = tuple(MODULES)
    experts: bool = False
    vision: bool = False
    rslora: bool = False
    init: str = "kaiming"
    base: str = "bfloat16"

    @property
    def scale(self) -> float:
        """Returns s."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("base", "a", "b"), meta_fields=("scale",)
)
@dataclasses.dataclass(frozen=True)
class LowRank:
    """A frozen matrix and its adapter, in the place of a kernel.

    Attributes:
      base: W, or its Quantised. The first field: Flax compares its shape.
      a: A, [..., in, r] with the axes of W that a product sums over.
      b: B, [..., r, out] with those that it keeps.
      scale: s; static.
    """

    base: Any
    a: jax.Array
    b: jax.Array
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        """Returns the shape of the matrix."""
        return self.base.shape


@dataclasses.dataclass(frozen=True)
class Place:
    """An adapted kernel: its logical axes, of which the first `lead` stack matrices and the next
    `contracted` are summed over."""

    axes: tuple[str | None, ...]
    lead: int
    contracted: int

    @property
    def adapter_axes(self) -> dict[str, tuple[str | None, ...]]:
        """Returns the axes of A and B, which lie as their kernel does."""
        inner, outer = low_rank_axes(self.axes[self.lead :], self.contracted)
        stacked = self.axes[: self.lead]
        return {"a": (*stacked, *inner), "b": (*stacked, *outer)}

    def adapter_shapes(self, shape: tuple[int, ...], rank: int) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of A and B."""
        end = self.lead + self.contracted
        return {"a": (*shape[:end], rank), "b": (*shape[: self.lead], rank, *shape[end:])}

    def sizes(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Returns how many inputs and outputs each matrix has."""
        end = self.lead + self.contracted
        return math.prod(shape[self.lead : end]), math.prod(shape[end:])


def low_rank_axes(
    axes: tuple[str | None, ...] | None, contracted: int
) -> tuple[tuple[str | None, ...] | None, tuple[str | None, ...] | None]:
    """Returns the logical axes of A and B of a kernel of these."""
    if axes is None:
        return None, None
    return (*axes[:contracted], None), (None, *axes[contracted:])


def places(axes_tree: Mapping[str, Any], adapter: Adapter) -> dict[tuple[str, ...], Place]:
    """Returns path → Place of each kernel that is adapted.

    Args:
      axes_tree: of the whole parameters, `decoder.param_axes`.
      adapter: which are.
    """
    found = {}
    flat = jax.tree_util.tree_leaves_with_path(
        axes_tree, is_leaf=lambda node: isinstance(node, tuple)
    )
    for keys, axes in flat:
        path = tuple(key.key for key in keys)
        if path[-1] == "kernel" and _is_adapted(path, axes, adapter):
            lead = sum(axis in _STACKED for axis in axes)
            found[path] = Place(axes, lead, 2 if path[-3:-1] == ("attention", "out") else 1)
    return found


def _is_adapted(path, axes, adapter):
    if path[0] == "vision":
        return adapter.vision and path[1] != "patch"
    if "router" in path or ("experts" in axes and not adapter.experts):
        return False
    return path[-2] in {MODULES[name] for name in adapter.targets}


def adapter_axes(axes_tree: Mapping[str, Any], adapter: Adapter) -> dict[str, Any]:
    """Returns the logical axes of an adapter, as a tree of tuples."""
    return _nested({p: place.adapter_axes for p, place in places(axes_tree, adapter).items()})


def abstract_adapter(
    abstract: Mapping[str, Any], axes_tree: Mapping[str, Any], adapter: Adapter
) -> dict[str, Any]:
    """Returns shapes and types of an adapter of parameters of these shapes."""
    shapes = {
        path: place.adapter_shapes(at(abstract, path).shape, adapter.rank)
        for path, place in places(axes_tree, adapter).items()
    }
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        _nested(shapes),
        is_leaf=lambda node: isinstance(node, tuple),
    )


def begun(
    key: jax.Array,
    params: Mapping[str, Any],
    axes_tree: Mapping[str, Any],
    adapter: Adapter,
    layout: sharding.Layout | None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns (base, adapter): frozen weights and A and B in float32, as training begins with them.

    A is uniform in ±1/√in (kaiming) or normal with deviation 1/r (gaussian), as PEFT draws it.

    Args:
      key: of the draws; the mesh does not change what is drawn.
      params: the model's weights.
      axes_tree: their logical axes.
      adapter: what to make.
      layout: where all of it lies.
    """
    made, base = {}, dict(_flat(params))
    for index, (path, place) in enumerate(sorted(places(axes_tree, adapter).items())):
        program = _beginning(place, adapter, layout)
        rest, made[path] = program(jax.random.fold_in(key, index), base[path])
        base[path] = base[path] if rest is None else rest
    frozen = {path: _frozen(path, x, axes_tree, adapter.base, layout) for path, x in base.items()}
    return _nested(frozen), _nested(made)


@functools.cache
def _beginning(place, adapter, layout):
    """Returns the program (key, kernel) → (kernel that is left, or None; its A and B)."""

    def begin(key, kernel):
        shapes = place.adapter_shapes(kernel.shape, adapter.rank)
        if adapter.init == "pissa":
            return _principal(kernel, shapes, place, adapter)
        if adapter.init == "kaiming":
            bound = place.sizes(kernel.shape)[0] ** -0.5
            a = jax.random.uniform(key, shapes["a"], jnp.float32, -bound, bound)
        else:
            a = jax.random.normal(key, shapes["a"], jnp.float32) / adapter.rank
        return None, {"a": a, "b": jnp.zeros(shapes["b"], jnp.float32)}

    if layout is None:
        return jax.jit(begin)
    rest = layout.sharding(place.axes) if adapter.init == "pissa" else None
    return jax.jit(begin, out_shardings=(rest, sharding.shardings(place.adapter_axes, layout)))


def _principal(kernel, shapes, place, adapter):
    """Splits W = U S V into s · A · B of its r largest parts and what is left."""
    inputs, outputs = place.sizes(kernel.shape)
    matrices = kernel.astype(jnp.float32).reshape(-1, inputs, outputs)
    left, values, right = jnp.linalg.svd(matrices, full_matrices=False)
    root = jnp.sqrt(values[:, : adapter.rank] / adapter.scale)
    a = left[:, :, : adapter.rank] * root[:, None]
    b = root[:, :, None] * right[:, : adapter.rank]
    rest = matrices - adapter.scale * jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
    return rest.reshape(kernel.shape), {"a": a.reshape(shapes["a"]), "b": b.reshape(shapes["b"])}


def float_type(adapter: Adapter) -> Any:
    """Returns the floating type of the weights beside those that are quantised."""
    return jnp.dtype(adapter.base)


def _frozen(path, x, axes_tree, kind, layout):
    """Casts a parameter to what it is frozen as; a router stays float32."""
    del axes_tree, layout
    return x if "router" in path else jnp.asarray(x).astype(kind)


def base_axes(axes_tree: Mapping[str, Any], adapter: Adapter) -> Any:
    """Returns the logical axes of the frozen weights."""
    del adapter
    return axes_tree


def abstract_base(abstract: Mapping[str, Any], adapter: Adapter) -> dict[str, Any]:
    """Returns shapes and types of the frozen weights of parameters of these shapes."""
    return _nested(
        {
            path: jax.eval_shape(lambda x, p=path: _frozen(p, x, None, adapter.base, None), leaf)
            for path, leaf in _flat(abstract)
        }
    )


def composed(base: Mapping[str, Any], trained: Mapping[str, Any], scale: float) -> dict[str, Any]:
    """Returns the parameters that a forward pass reads: `base`, with LowRank where adapted."""
    found = dict(base)
    for name, part in trained.items():
        if name == "kernel":
            found[name] = LowRank(base[name], part["a"], part["b"], scale)
        else:
            found[name] = composed(base[name], part, scale)
    return found


def is_composed(params: Any) -> bool:
    """Whether any parameter is a LowRank."""
    leaves = jax.tree.leaves(params, is_leaf=lambda node: isinstance(node, LowRank))
    return any(isinstance(leaf, LowRank) for leaf in leaves)


def merged(kernel: LowRank) -> jax.Array:
    """Returns W + s · A · B in float32."""
    dense = kernel.base.astype(jnp.float32)
    contracted = kernel.a.ndim - 1
    lead = kernel.a.ndim + kernel.b.ndim - 2 - dense.ndim
    contracted -= lead
    stacked = dense.shape[:lead]
    a = kernel.a.astype(jnp.float32).reshape(*stacked, -1, kernel.a.shape[-1])
    b = kernel.b.astype(jnp.float32).reshape(*stacked, kernel.a.shape[-1], -1)
    product = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
    return dense + kernel.scale * product.reshape(dense.shape)


def merged_tree(params: Any) -> Any:
    """Merges every LowRank of a tree, in float32, and leaves the other parameters."""
    return jax.tree.map(
        lambda x: merged(x) if isinstance(x, LowRank) else x,
        params,
        is_leaf=lambda node: isinstance(node, LowRank),
    )


def _flat(tree):
    return [
        (tuple(key.key for key in path), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(
            tree, is_leaf=lambda node: isinstance(node, Quantised)
        )
    ]


def _nested(by_path):
    tree = {}
    for path, value in by_path.items():
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = value
    return tree


def at(tree: Any, path: tuple[str, ...]) -> Any:
    """Returns what a nested dict holds at a path."""
    for name in path:
        tree = tree[name]
    return tree
