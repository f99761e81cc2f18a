"""Meshes, and the mesh axes over which each logical axis of an array is sharded.

Arrays name their dimensions ("batch", "length", "embed" …); one table for training and one for the
rollout map these names to mesh axes. Only this file uses partition specs. Every function that takes
a `layout` also takes None: one device, nothing sharded.

In training, rows are sharded over data, fsdp and expert, positions in a row over context, and
heads, mlp and vocabulary over tensor. Weights and optimizer state are sharded along the embedding
over every axis but data and tensor, and gathered one layer at a time. In the rollout every process
works on its own devices: weights are sharded over tensor (and experts over expert) only, so that a
decode step gathers none, and a cache larger than a device's memory is sharded along its positions
over context.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from luspo_jax.hosts.values import ConfigError

# Slowest links first: neighbours in a mesh row are neighbours in the machine.
MESH_AXES = ("data", "fsdp", "expert", "context", "tensor")

_SHARED = {"heads": ("tensor",), "kv_heads": ("tensor",), "mlp": ("tensor",), "vocab": ("tensor",),
           "experts": ("expert",), "layers": (), "head_dim": (), "norm": ()}  # fmt: skip
TABLES = {
    "train": {
        **_SHARED,
        "copies": ("data",),
        "batch": ("data", "fsdp", "expert"),
        "length": ("context",),
        "embed": ("fsdp", "context", "expert"),
    },
    "rollout": {
        **_SHARED,
        "batch": ("data", "fsdp", "expert"),
        "length": (),
        "cache_length": ("context",),
        "pages": ("data", "fsdp", "expert", "context"),
        "embed": (),
    },
}
# Halfway between the two: sharded as in the rollout, and along the embedding over the other axes.
# Each slice has its own copies (`Layout.halfway`).
TABLES["handover"] = {**TABLES["rollout"], "embed": ("fsdp", "expert", "context")}
# What processes tell each other: a row each, on a device each.
TABLES["processes"] = {"process": ("process",)}

Axes = tuple[str | None, ...]  # logical axis of each dimension; None is not sharded


class MeshError(ConfigError):
    """A mesh that does not fit the devices or the model; the message names the numbers."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh and the table that shards logical axes over it; hashable, static under jit.

    Under `vmapped`, arrays lack the dimension that `mapped` names, and no axis is sharded over it.
    """

    mesh: Mesh
    table: str
    mapped: str | None = None

    def axis_names(self, axis: str | None) -> tuple[str, ...]:
        """Returns the mesh axes over which a logical axis is sharded, without those of size 1."""
        if axis is None:
            return ()
        names = [name for name in TABLES[self.table][axis] if name != self.mapped]
        return tuple(name for name in names if self.mesh.shape[name] > 1)

    def size(self, axis: str | None) -> int:
        """Returns the number of parts into which a logical axis is sharded."""
        return math.prod(self.mesh.shape[name] for name in self.axis_names(axis))

    def cuts(self, axes: Axes) -> tuple[tuple[str, ...], ...]:
        """Returns the mesh axes that shard each dimension; each axis goes to the first user."""
        used, parts = set(), []
        for axis in axes:
            names = tuple(name for name in self.axis_names(axis) if name not in used)
            used.update(names)
            parts.append(names)
        return tuple(parts)

    def spec(self, axes: Axes) -> PartitionSpec:
        """Returns the partition spec of an array."""
        return PartitionSpec(*(names or None for names in self.cuts(axes)))

    def sharding(self, axes: Axes) -> NamedSharding:
        """Returns the sharding of an array."""
        return NamedSharding(self.mesh, self.spec(axes))

    def halfway(self) -> "Layout":
        """Returns the layout of a rollout's weights halfway from their layout in training.

        Every slice shards them over all its devices, so that gathering them stays within a slice.
        """
        data, fsdp, *rest = self.mesh.devices.shape
        slices = num_slices(self.mesh.devices.flat)
        if data % slices:  # slices without as many copies each
            slices = 1
        grid = self.mesh.devices.reshape(slices, data // slices * fsdp, *rest)
        return Layout(Mesh(grid, MESH_AXES), "handover")


def mesh_sizes(sizes: Mapping[str, int], num_devices: int, mesh: str = "mesh") -> dict[str, int]:
    """Returns the sizes of all mesh axes; one may be −1, for the remaining devices.

    `mesh` is its name in error messages.

    Raises:
      MeshError: the product of sizes is not the number of devices.
    """
    named = {name: sizes.get(name, 1) for name in MESH_AXES}
    free = [name for name, size in named.items() if size == -1]
    asked = ", ".join(f"{name} {size}" for name, size in named.items() if size != 1) or "all 1"
    if len(free) > 1 or any(size < 1 for size in named.values() if size != -1):
        raise MeshError(f"{mesh} axes ({asked}) must be at least 1, and one of them may be -1")
    fixed = math.prod(size for size in named.values() if size != -1)
    if free and num_devices % fixed == 0:
        named[free[0]] = num_devices // fixed
    elif free or fixed != num_devices:
        raise MeshError(
            f"the {mesh} ({asked}) takes {'a multiple of ' if free else ''}{fixed} devices and "
            f"there are {num_devices}: change the sizes, or set one of them to -1"
        )
    return named


def layout(
    table: str, sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None
) -> Layout | None:
    """Returns a table's layout over `devices` (default: `available_devices`); None for one device,
    if that is the one on which arrays are by default.

    Raises:
      MeshError: the sizes do not match the number of devices.
    """
    devices = available_devices() if devices is None else list(devices)
    named = mesh_sizes(sizes, len(devices), f"{table} mesh")
    if len(devices) == 1 and not _is_apart(devices[0]):
        return None
    shape = tuple(named.values())
    if table == "train":
        _check_slices(named["data"], devices)
    if table == "train" and devices[0].platform == "tpu":
        grid = _by_links(shape, devices)
    else:  # slice by slice, and process by process, as `on_own_devices` requires
        by_process = sorted(devices, key=lambda one: (slice_of(one), one.process_index))
        grid = np.array(by_process).reshape(shape)
    return Layout(Mesh(grid, MESH_AXES), table)


def slice_of(device: jax.Device) -> int:
    """Returns the number of a device's TPU slice; between slices there is only a network.

    Others are in slice 0, as are TPUs that do not tell: jax numbers hosts of GPUs in the same way.
    """
    return getattr(device, "slice_index", 0) if device.platform == "tpu" else 0


def num_slices(devices: Sequence[jax.Device]) -> int:
    """Returns the number of TPU slices that devices are in."""
    return len({slice_of(device) for device in devices})


def _check_slices(data, devices):
    """Checks that only "data" spans slices, and slices have as many devices each."""
    counts = collections.Counter(map(slice_of, devices))
    if len(set(counts.values())) > 1:
        raise MeshError(
            f"the devices that train are {', '.join(map(str, counts.values()))} of {len(counts)} "
            "slices: they must be as many of each; let rollout_mesh.apart be whole slices"
        )
    slices = len(counts)
    if data % slices:
        raise MeshError(
            f"the devices are in {slices} slices, and only rows and sums of gradients should cross "
            f"the network between them: mesh.data={data} must be {slices} or a multiple of it; set "
            f"mesh.data={slices} and leave the other axes to the {len(devices) // slices} devices "
            "of a slice"
        )


def _by_links(shape, devices):
    """A grid of TPUs along their links; several slices are the outer part of "data"."""
    slices = num_slices(devices)
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    data, *rest = shape
    return mesh_utils.create_hybrid_device_mesh(
        (data // slices, *rest),
        (slices, *[1] * len(rest)),
        devices,
        allow_split_physical_axes=True,
    )


def available_devices() -> list[jax.Device]:
    """Returns all devices of all processes, or the one that `jax_default_device` names."""
    chosen = jax.config.jax_default_device
    return [chosen] if isinstance(chosen, jax.Device) else jax.devices()


def _is_apart(device):
    """Whether arrays are elsewhere by default; a device of an absent machine is never."""
    local = jax.local_devices()
    chosen = jax.config.jax_default_device
    default = chosen if isinstance(chosen, jax.Device) else local[0]
    return device in local and device != default


@functools.cache
def across(members: tuple[int, ...]) -> Layout:
    """Returns the layout of rows that processes exchange: axis "process", one device of each."""
    first: dict[int, jax.Device] = {}
    for device in sorted(jax.devices(), key=lambda device: device.id):
        first.setdefault(device.process_index, device)
    return Layout(Mesh(np.array([first[i] for i in members]), ("process",)), "processes")


def stacked(row: jax.Array | np.ndarray, members: tuple[int, ...]) -> jax.Array:
    """Returns the rows of the calling processes, the same shape on each: [process, …], sharded."""
    layout = across(members)
    own = jax.device_put(row[None], layout.mesh.local_devices[0])
    shape, axes = (len(members), *row.shape), ("process", *(None for _ in row.shape))
    return jax.make_array_from_single_device_arrays(shape, layout.sharding(axes), [own])


def constrain(x: jax.Array, axes: Axes, layout: Layout | None) -> jax.Array:
    """Constrains the sharding of `x` by its logical axes; for use under jit."""
    if layout is None:
        return x
    return jax.lax.with_sharding_constraint(x, layout.sharding(axes))


def shard_map(
    function: Callable, layout: Layout | None, in_axes: Sequence[Axes], out_axes: Any
) -> Callable:
    """Runs `function` on each device's own part; without a layout, returns `function` itself.

    `in_axes` has the logical axes of each argument; `out_axes` those of the result, or a tuple of
    them for a tuple of results. Those of a NamedTuple of arrays, or of a dataclass, are the same of
    axes.
    """
    if layout is None:
        return function
    many = not out_axes or isinstance(out_axes[0], tuple)
    return jax.shard_map(
        function,
        mesh=layout.mesh,
        in_specs=tuple(_specs(axes, layout) for axes in in_axes),
        out_specs=_each_spec(out_axes, layout) if many else layout.spec(out_axes),
        check_vma=False,
    )


def vmapped(function: Callable, in_axes: Any) -> Callable:
    """Maps over "copies", a leading dimension sharded over data: each part of it works alone.

    `function` is to use `dataclasses.replace(layout, mapped="data")`.
    """
    return jax.vmap(function, in_axes, spmd_axis_name="data")


def _specs(axes, layout):
    if not isinstance(axes, tuple):
        return jax.tree.map(layout.spec, axes, is_leaf=lambda node: isinstance(node, tuple))
    return _each_spec(axes, layout) if hasattr(axes, "_fields") else layout.spec(axes)


def _each_spec(many, layout):
    """Returns the specs of a tuple of axes, as a tuple of the same kind."""
    specs = [_specs(axes, layout) for axes in many]
    return type(many)(*specs) if hasattr(many, "_fields") else tuple(specs)


def summed_over_rows(part: jax.Array, axes: Axes, layout: Layout | None) -> jax.Array:
    """Sums a parameter's gradient over all devices' rows and positions, within `shard_map`.

    `part` is whole along "embed"; the sum is sharded along it like the parameter. It does not sum
    over devices that hold other parts of the parameter along other dimensions (other experts).
    """
    if layout is None:
        return part
    cuts = layout.cuts(axes)
    cut = cuts[axes.index("embed")] if "embed" in axes else ()
    if cut:
        dimension = axes.index("embed")
        part = jax.lax.psum_scatter(part, cut, scatter_dimension=dimension, tiled=True)
    rows = {*layout.axis_names("batch"), *layout.axis_names("length")}
    rest = rows - {name for names in cuts for name in names}
    return jax.lax.psum(part, tuple(sorted(rest))) if rest else part


def shardings(axes_tree: Any, layout: Layout | None) -> Any:
    """Maps a tree of logical axes (tuples) to shardings; None without a layout."""
    if layout is None:
        return None
    return jax.tree.map(layout.sharding, axes_tree, is_leaf=lambda node: isinstance(node, tuple))


def constrain_tree(tree: Any, shardings_tree: Any) -> Any:
    """Constrains a tree to a tree of shardings, if not None; for use under jit."""
    if shardings_tree is None:
        return tree
    return jax.lax.with_sharding_constraint(tree, shardings_tree)


def moved(tree: Any, memory: str) -> Any:
    """Copies arrays to "device" or "pinned_host" memory, with the same sharding."""
    where = jax.tree.map(lambda x: x.sharding.with_memory_kind(memory), tree)
    return jax.device_put(tree, where)


def put(x: Any, axes: Axes, layout: Layout | None) -> jax.Array:
    """Puts one host array, the same on all processes, onto the mesh: each process its own part."""
    if layout is None:
        return x
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, layout.sharding(axes), lambda index: x[index])


@functools.cache
def on_own_devices(layout: Layout | None) -> Layout | None:
    """Returns the part of a rollout layout over all processes that is on this process's devices.

    In a process that does not sample, it is the part of the first that does: all have one size.

    Raises:
      MeshError: one copy of the weights would span several processes.
    """
    if layout is None:
        return None
    devices = list(layout.mesh.devices.flat)
    samples = {device.process_index for device in devices}
    which = jax.process_index() if jax.process_index() in samples else min(samples)
    own = [device for device in devices if device.process_index == which]
    _, *rest = layout.mesh.devices.shape
    if len(own) % math.prod(rest):
        raise MeshError(
            f"the rollout mesh spreads one copy over {math.prod(rest)} devices and a process has "
            f"{len(own)}: every process samples on its own devices, so the product of "
            "rollout_mesh.fsdp, expert, context and tensor must divide the devices of a process"
        )
    if len(own) == 1 and not _is_apart(own[0]):
        return None
    grid = np.array(own).reshape(len(own) // math.prod(rest), *rest)
    return Layout(Mesh(grid, MESH_AXES), layout.table)


def own_part(tree: Any, axes_tree: Any, layout: Layout) -> Any:
    """Views arrays over all processes' devices as arrays over this process's, without copying."""
    own = on_own_devices(layout)

    def part(x, axes):
        pieces = [shard.data for shard in x.addressable_shards]
        if own is None:
            return pieces[0]
        return jax.make_array_from_single_device_arrays(x.shape, own.sharding(axes), pieces)

    return jax.tree.map(part, tree, axes_tree)


def whole_on_each(x: jax.Array) -> NamedSharding | None:
    """Returns the sharding of `x` with a copy on each device of its mesh; None without a mesh."""
    mesh = getattr(x.sharding, "mesh", None)
    return None if mesh is None else NamedSharding(mesh, PartitionSpec())


def same_order(sharding: jax.sharding.Sharding, layout: Layout) -> bool:
    """Whether one program may read the one and write the other: same device order."""
    devices = getattr(sharding, "mesh", None)
    return devices is not None and list(devices.devices.flat) == list(layout.mesh.devices.flat)


def in_order_of(layout: Layout, tree: Any) -> Any:
    """Returns shardings that shard arrays as they are, with devices in the order of a layout."""

    def place(x):
        old = x.sharding.mesh
        mesh = Mesh(layout.mesh.devices.reshape(old.devices.shape), old.axis_names)
        return NamedSharding(mesh, x.sharding.spec)

    return jax.tree.map(place, tree)


def misfits(layout: Layout | None, sizes: Mapping[str, tuple[str, int]]) -> list[str]:
    """Describes sizes that do not divide evenly; `sizes` has name → (logical axis, size)."""
    if layout is None:
        return []
    problems = []
    for name, (axis, size) in sizes.items():
        if size % layout.size(axis):
            across = " × ".join(f"{n} {layout.mesh.shape[n]}" for n in layout.axis_names(axis))
            problems.append(
                f"{name} = {size} is cut into {layout.size(axis)} parts by the {layout.table} mesh "
                f"({across}), which does not divide it"
            )
    return problems
