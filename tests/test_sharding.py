"""Meshes are resolved or refused with their numbers; tables cut arrays as they say."""

import itertools
import types

import jax
import numpy as np
import pytest

from luspo_jax import sharding
from luspo_jax.sharding import MeshError


def _layout(table="train", **sizes):
    return sharding.layout(table, sizes, jax.devices())


def test_one_size_may_be_left_open():
    assert sharding.mesh_sizes({"data": 2, "fsdp": -1}, 8)["fsdp"] == 4
    assert sharding.mesh_sizes({}, 1) == dict.fromkeys(sharding.MESH_AXES, 1)


@pytest.mark.parametrize(
    ("sizes", "named"),
    [
        ({"fsdp": 4}, r"the train mesh \(fsdp 4\) takes 4 devices and there are 8"),
        ({"fsdp": 3, "data": -1}, "a multiple of 3 devices and there are 8"),
        ({"fsdp": -1, "data": -1}, "one of them may be -1"),
        ({"tensor": 0}, "at least 1"),
    ],
)
def test_a_mesh_that_does_not_fit_the_devices_is_refused(sizes, named):
    with pytest.raises(MeshError, match=named):
        sharding.layout("train", sizes, jax.devices())


def test_a_mesh_axis_is_used_once_an_array():
    layout = _layout(fsdp=4, expert=2)
    shape = layout.sharding(("experts", "embed", "mlp")).shard_shape((2, 8, 3))
    assert shape == (1, 2, 3)


def test_one_device_needs_no_layout():
    assert sharding.layout("train", {}, jax.devices()[:1]) is None
    x = np.ones(3)
    assert sharding.constrain(x, ("batch",), None) is x
    assert sharding.layout("train", {"fsdp": -1}) is None  # the suite's default device alone


def test_sizes_that_cannot_be_cut_are_named():
    layout = _layout(fsdp=4, tensor=2)
    problems = sharding.misfits(layout, {"num_attention_heads": ("heads", 3), "d": ("embed", 8)})
    assert len(problems) == 1
    assert "num_attention_heads = 3 is cut into 2 parts by the train mesh (tensor 2)" in problems[0]


def test_arrays_are_put_part_by_part():
    layout = _layout(data=2, context=4)
    x = np.arange(32).reshape(4, 8)
    placed = sharding.put(x, ("batch", "length"), layout)
    assert placed.addressable_shards[0].data.shape == (2, 2)
    np.testing.assert_array_equal(placed, x)


def test_a_process_that_does_not_sample_sees_the_part_of_the_first_that_does(monkeypatch):
    layout = sharding.layout("rollout", {"data": 2, "tensor": 2}, jax.devices()[4:8])
    monkeypatch.setattr(sharding.jax, "process_index", lambda: 3)
    part = sharding.on_own_devices.__wrapped__(layout)
    assert list(part.mesh.devices.flat) == jax.devices()[4:8]
    assert dict(part.mesh.shape) == dict(layout.mesh.shape)


class _Chip(types.SimpleNamespace):
    """A stand-in for a TPU chip: what jax asks of one when it lays out a mesh."""

    __hash__ = object.__hash__


def _slices(count, topology):
    places = itertools.product(range(count), *map(range, topology[::-1]))
    return [
        _Chip(id=i, process_index=i // 4, slice_index=slice_, coords=place[::-1], core_on_chip=0,
              platform="tpu", device_kind="TPU v5")
        for i, (slice_, *place) in enumerate(places)
    ]  # fmt: skip


@pytest.mark.parametrize(
    "sizes",
    [{"data": 2, "fsdp": -1}, {"data": 4, "fsdp": 4, "tensor": 2}, {"data": 2, "expert": 16}],
)
def test_slices_are_the_outer_part_of_data(sizes):
    """Along it slices are whole blocks; along the other axes, neighbours are in one slice."""
    chips = _slices(2, (2, 2, 4))
    grid = sharding.layout("train", sizes, chips).mesh.devices
    assert grid.size == len({chip.id for chip in grid.flat}) == 32
    of_slice = np.vectorize(lambda chip: chip.slice_index)(grid)
    half = np.arange(grid.shape[0]) >= grid.shape[0] // 2
    expected = half.reshape(-1, *[1] * (grid.ndim - 1))
    np.testing.assert_array_equal(of_slice, np.broadcast_to(expected, grid.shape))


@pytest.mark.parametrize("sizes", [{"fsdp": -1}, {"data": 2, "fsdp": 3}])
def test_other_axes_stay_within_a_slice(sizes):
    with pytest.raises(MeshError, match=r"mesh.data=\d must be 6 or a multiple of it; set") as told:
        sharding.layout("train", sizes, _slices(6, (1, 1, 1)))
    assert "\n" not in str(told.value)


def test_parts_of_slices_must_be_as_large():
    with pytest.raises(MeshError, match="are 8, 4 of 2 slices: they must be as many of each"):
        sharding.layout("train", {"data": 2, "fsdp": 6}, _slices(2, (2, 2, 2))[:12])


def test_a_rollout_takes_slices_one_after_another():
    chips = _slices(2, (2, 2, 2))
    layout = sharding.layout("rollout", {"data": 4, "tensor": 4}, chips[::-1])
    assert [chip.slice_index for chip in layout.mesh.devices.flat] == [0] * 8 + [1] * 8
    halfway = layout.halfway()
    assert dict(halfway.mesh.shape) == {**layout.mesh.shape, "data": 2, "fsdp": 2}
    assert list(halfway.mesh.devices.flat) == list(layout.mesh.devices.flat)
    assert halfway.axis_names("embed") == ("fsdp",)


def test_only_tpus_are_in_slices():
    gpu = types.SimpleNamespace(platform="gpu", slice_index=3)  # a host's number
    alone = types.SimpleNamespace(platform="tpu")
    assert [sharding.slice_of(one) for one in (gpu, alone, *_slices(2, (1, 1, 1)))] == [0, 0, 0, 1]
