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
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from luspo_jax import sharding
from luspo_jax.models import nf4
from luspo_jax.models.nf4 import Nf4
from luspo_jax.models.quantised import Quantised, dense, quantise

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
BASES = ("bfloat16", "float32", "int8", "nf4")
QUANTISED = (Quantised, Nf4)
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
      base: W, or its Quantised or Nf4. The first field: Flax compares its shape.
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
            found[path] = _place(path, axes)
    return found


def _place(path, axes):
    lead = sum(axis in _STACKED for axis in axes)
    return Place(axes, lead, num_contracted(path))


def num_contracted(path: Sequence[str]) -> int:
    """Returns how many axes of the kernel at a path a product sums over."""
    return 2 if tuple(path[-3:-1]) == ("attention", "out") else 1


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
    params: dict[str, Any],
    axes_tree: Mapping[str, Any],
    adapter: Adapter,
    layout: sharding.Layout | None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns (base, adapter): frozen weights and A and B in float32, as training begins with them.

    A is uniform in ±1/√in (kaiming) or normal with deviation 1/r (gaussian), as PEFT draws it.

    Args:
      key: of the draws; the mesh does not change what is drawn.
      params: the model's weights; emptied, so that each is freed when it has been rounded.
      axes_tree: their logical axes.
      adapter: what to make.
      layout: where all of it lies.
    """
    made, base = {}, _taken(params)
    for index, (path, place) in enumerate(sorted(places(axes_tree, adapter).items())):
        program = _beginning(place, adapter, layout)
        rest, made[path] = program(jax.random.fold_in(key, index), base[path])
        base[path] = base[path] if rest is None else rest
    axes_of, frozen = dict(flat(axes_tree)), {}
    for path in list(base):  # one after another
        axes = axes_of[path]
        where = sharding.shardings(_frozen_axes(path, axes, adapter.base), layout)
        frozen[path] = _freezing(path, axes, adapter.base, where)(base.pop(path))
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
    return jnp.dtype("bfloat16" if adapter.base in ("int8", "nf4") else adapter.base)


@functools.cache
def _freezing(path, axes, kind, where):
    return jax.jit(functools.partial(_frozen, path, axes, kind), out_shardings=where)


def _frozen(path, axes, kind, x):
    """Rounds a parameter to what it is frozen as; a router stays float32."""
    if "router" in path:
        return x
    if not _is_quantised(path, kind):
        return x.astype("bfloat16" if kind in ("int8", "nf4") else kind)
    place = _place(path, axes)
    if kind == "nf4":
        return nf4.quantise(x, place.contracted, place.lead)
    return quantise(x, tuple(range(place.lead, place.lead + place.contracted)))


def _frozen_axes(path, axes, kind):
    if not _is_quantised(path, kind):
        return axes
    place = _place(path, axes)
    if kind == "nf4":
        return nf4.nf4_axes(axes, place.contracted, place.lead)
    return Quantised(axes, (*axes[: place.lead], *axes[place.lead + place.contracted :]))


def _is_quantised(path, kind):
    """Whether a parameter has fewer bits: kernels of the decoder's layers, routers aside."""
    stacked = path[0] not in ("vision", "embedding", "head")
    return kind in ("int8", "nf4") and stacked and path[-1] == "kernel" and "router" not in path


def base_axes(axes_tree: Mapping[str, Any], adapter: Adapter) -> Any:
    """Returns the logical axes of the frozen weights."""
    return _nested({path: _frozen_axes(path, axes, adapter.base) for path, axes in flat(axes_tree)})


def abstract_base(
    abstract: Mapping[str, Any], axes_tree: Mapping[str, Any], adapter: Adapter
) -> dict[str, Any]:
    """Returns shapes and types of the frozen weights of parameters of these shapes."""
    axes_of = dict(flat(axes_tree))
    frozen = {
        path: jax.eval_shape(functools.partial(_frozen, path, axes_of[path], adapter.base), leaf)
        for path, leaf in flat(abstract)
    }
    return _nested(frozen)


def composed(base: Mapping[str, Any], trained: Mapping[str, Any], scale: float) -> dict[str, Any]:
    """Returns the parameters that a forward pass reads: `base`, with LowRank where adapted."""
    found = dict(base)
    for name, part in trained.items():
        if name == "kernel":
            found[name] = LowRank(base[name], part["a"], part["b"], scale)
        else:
            found[name] = composed(base[name], part, scale)
    return found


def difference(
    trained: Mapping[str, Any], begun: Mapping[str, Any], adapter: Adapter
) -> tuple[Any, Adapter]:
    """Returns s · A · B − s · A₀ · B₀ as an adapter of twice the rank, and what it is."""
    made = {}
    old = dict(flat(begun))
    for path, x in flat(trained):
        if path[-1] == "a":
            made[path] = jnp.concatenate([x, old[path]], axis=-1)
        else:
            b_axis = x.ndim - _kept(path[-3]) - 1
            made[path] = jnp.concatenate([x, -old[path]], axis=b_axis)
    rank = 2 * adapter.rank
    return _nested(made), dataclasses.replace(
        adapter, rank=rank, alpha=adapter.scale * rank, rslora=False
    )


def is_composed(params: Any) -> bool:
    """Whether any parameter is a LowRank."""
    leaves = jax.tree.leaves(params, is_leaf=lambda node: isinstance(node, LowRank))
    return any(isinstance(leaf, LowRank) for leaf in leaves)


def merged(kernel: LowRank) -> jax.Array:
    """Returns W + s · A · B in float32."""
    lead = kernel.a.ndim + kernel.b.ndim - 2 - len(kernel.shape)
    base = dequantised(kernel.base, lead, kernel.a.ndim - 1 - lead)
    stacked = base.shape[:lead]
    a = kernel.a.astype(jnp.float32).reshape(*stacked, -1, kernel.a.shape[-1])
    b = kernel.b.astype(jnp.float32).reshape(*stacked, kernel.a.shape[-1], -1)
    product = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
    return base + kernel.scale * product.reshape(base.shape)


def dequantised(kernel: Any, lead: int, contracted: int) -> jax.Array:
    """Returns a frozen matrix in float32; its first axes stack, the next are summed over."""
    if isinstance(kernel, Nf4):
        return nf4.dense(kernel)
    if isinstance(kernel, Quantised):
        return dense(kernel, tuple(range(lead, lead + contracted)))
    return kernel.astype(jnp.float32)


def merged_tree(params: Any) -> Any:
    """Merges every LowRank of a tree, in float32, and leaves the other parameters.

    Beside a LowRank, frozen matrices of fewer bits are made float32 too.
    """
    if not is_composed(params):
        return params
    return _nested({path: whole_kernel(path, x) for path, x in flat(params)})


def whole_kernel(path: Sequence[str], x: Any) -> Any:
    """Returns a parameter, or a part of its stack, in float32 if it is a LowRank or of few bits."""
    if isinstance(x, LowRank):
        return merged(x)
    if not isinstance(x, QUANTISED):
        return x
    contracted = num_contracted(path)
    return dequantised(x, len(x.shape) - _kept(path[-2]) - contracted, contracted)


def _kept(module):
    """Returns how many axes a product with a module's kernel keeps."""
    return {"query": 2, "key": 2, "value": 2, "qkv": 3}.get(module, 1)


def is_rounded(params: Any) -> bool:
    """Whether any matrix, adapted or not, is of few bits."""
    return any(isinstance(getattr(x, "base", x), QUANTISED) for _, x in flat(params))


def flat(tree: Any) -> list[tuple[tuple[str, ...], Any]]:
    """Returns (path, parameter) of a nested dict; of axes, (path, their tuple)."""
    return [
        (tuple(key.key for key in path), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(
            tree, is_leaf=lambda node: isinstance(node, (tuple, LowRank, *QUANTISED))
        )
    ]


def _taken(tree):
    """Returns path → parameter of a nested dict, which is empty then."""
    found = dict(flat(tree))
    tree.clear()
    return found


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
