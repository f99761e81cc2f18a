"""The front: which implementation is meant, what is refused, and a mesh without a cut length."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from luspo_jax.ops.attention import IMPLEMENTATIONS, attention, resolve
from luspo_jax.sharding import Layout
from tests.ops import attention_cases as cases

pytestmark = pytest.mark.usefixtures("strict_dtypes")

TRAINING = {"packed": True, "head_dim": 128}


@pytest.mark.parametrize(
    ("needs", "expected"),
    [
        ({"platform": "cpu"}, "reference"),
        ({"platform": "tpu"}, "splash"),
        ({"platform": "tpu", "context": 8}, "splash"),
        ({"platform": "gpu"}, "flash_gpu"),
        ({"platform": "gpu", "packed": False}, "cudnn"),
        ({"platform": "gpu", "packed": False, "context": 2}, "flash_gpu"),
        ({"platform": "gpu", "packed": False, "dtype": "float32"}, "flash_gpu"),
        ({"platform": "gpu", "head_dim": 8}, "reference"),
        ({"platform": "tpu", "second_derivatives": True}, "reference"),
        ({"platform": "metal"}, "reference"),
    ],
    ids=str,
)
def test_auto_takes_what_fits(needs, expected):
    assert resolve("auto", **{**TRAINING, **needs}) == expected


@pytest.mark.parametrize(
    ("name", "needs", "message"),
    [
        ("splash", {"platform": "cpu"}, r"'splash' runs on tpu, not on cpu; here 'reference'"),
        ("flash_gpu", {"platform": "tpu"}, r"runs on gpu or cuda or rocm, not on tpu.*'splash'"),
        ("cudnn", {"platform": "gpu"}, r"lengths and not segment ids.*here 'flash_gpu' does"),
        ("cudnn", {"platform": "gpu", "packed": False, "context": 4}, r"over 4 context devices"),
        ("cudnn", {"platform": "gpu", "packed": False, "dtype": "float32"}, r"not float32"),
        ("cudnn", {"platform": "gpu", "packed": False, "head_dim": 100}, r"multiples of 8, not 1"),
        ("flash_gpu", {"platform": "gpu", "head_dim": 8}, r"head sizes of 16 to 128, not 8"),
        ("splash", {"platform": "tpu", "second_derivatives": True}, r"length pressure"),
        ("splash", {"platform": "tpu", "dtype": "float64"}, r"not take float64"),
        ("flash", {"platform": "gpu"}, r"'flash' is unknown; use 'auto' or one of"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_by_name(name, needs, message):
    with pytest.raises(ValueError, match=message):
        resolve(name, **{**TRAINING, **needs})


def test_what_fits_is_kept():
    assert resolve("reference", platform="tpu", **TRAINING) == "reference"
    assert resolve("splash", platform="tpu", **TRAINING) == "splash"


@pytest.mark.parametrize("name", ["flash", "auto"])
def test_an_unknown_implementation_is_refused(name):
    query, key, value, segments = cases.inputs(1, 2, 1, 1, 2)
    with pytest.raises(
        ValueError, match=rf"'{name}' is unknown; use one of \['cudnn', 'flash_gpu'"
    ):
        attention(query, key, value, segment_ids_BT=segments, implementation=name)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 4}, r"over 6 rows: the mesh cuts them in 4 parts \(data\)"),
        ({"tensor": 8}, r"over 4 query heads: the mesh cuts them in 8 parts \(tensor\)"),
        ({"tensor": 4}, r"over 2 key heads: the mesh cuts them in 4 parts \(tensor\)"),
    ],
)
def test_sizes_that_a_mesh_does_not_divide_are_refused(sizes, message):
    query, key, value, segments = cases.inputs(6, 8, 4, 2, 4)
    with pytest.raises(ValueError, match=message):
        attention(query, key, value, segment_ids_BT=segments, layout=cases.layout_of(**sizes))


def test_cudnn_refuses_a_cut_length():
    query, key, value, segments = cases.inputs(1, 8, 2, 2, 8)
    settings = {"implementation": "cudnn", "layout": cases.layout_of(context=2)}
    with pytest.raises(ValueError, match=r"'cudnn' cannot cut a row over 2 context devices"):
        attention(query, key, value, segment_ids_BT=segments, **settings)


@pytest.mark.parametrize("sizes", [{"data": 2, "tensor": 2}, {"fsdp": 4}], ids=str)
def test_each_device_works_on_its_own_rows_and_heads(sizes):
    arrays = cases.inputs(4, 12, 4, 2, 8)
    grad = cases.cotangent(arrays[0])
    layout = cases.layout_of(**sizes)
    ours = cases.computed(arrays, grad, layout=layout)
    assert cases.error(ours, cases.dense(*arrays, grad)) < 1e-6
    # In the rollout a row is whole on every device of the context axis.
    rollout = Layout(cases.layout_of(**sizes, context=2).mesh, "rollout")
    assert cases.error(cases.computed(arrays, grad, layout=rollout), ours) < 1e-6


@pytest.mark.parametrize(
    "sizes", [None, {"data": 2, "tensor": 2}, {"context": 4}, {"fsdp": 2, "context": 2}], ids=str
)
def test_without_order_a_query_sees_all_of_its_segment(sizes):
    arrays = cases.inputs(4, 24, 4, 2, 8)
    grad = cases.cotangent(arrays[0])
    layout = sizes and cases.layout_of(**sizes)
    ours = cases.computed(arrays, grad, layout=layout, causal=False)
    assert cases.error(ours, cases.dense(*arrays, grad, causal=False)) < 1e-6


@pytest.mark.parametrize("name", ["splash", "flash_gpu"])
def test_kernels_need_no_order(name, monkeypatch):
    module = importlib.import_module(f"luspo_jax.ops.{IMPLEMENTATIONS[name]}")
    monkeypatch.setattr(module, "_INTERPRET", True)
    arrays = cases.inputs(2, 150, 2, 2, 20)
    grad = cases.cotangent(arrays[0])
    with jax.numpy_dtype_promotion("standard"):  # jax's own kernels promote
        ours = cases.computed(arrays, grad, name, causal=False)
    assert cases.error(ours, cases.dense(*arrays, grad, causal=False)) < 1e-6


def test_no_layout_is_the_reference_itself_and_a_layout_sends_nothing():
    arrays = [jnp.asarray(x) for x in cases.inputs(4, 12, 4, 2, 8)]
    layout = cases.layout_of(data=2, tensor=2)

    def text(layout):
        function = lambda q, k, v, s: attention(q, k, v, segment_ids_BT=s, layout=layout)  # noqa: E731
        return jax.jit(function).lower(*arrays)

    assert "sdy" not in text(None).as_text()
    compiled = text(layout).compile().as_text()
    for operation in ("all-gather", "all-to-all", "all-reduce", "collective-permute"):
        assert operation not in compiled


def test_the_pullback_has_a_derivative_in_its_cotangent():
    """Length pressure transposes the backward pass: on a mesh as on one device."""
    query, key, value, segments = (jnp.asarray(x) for x in cases.inputs(4, 8, 4, 2, 4))
    direction = tuple(jnp.asarray(cases.cotangent(x)) for x in (query, key, value))

    @functools.partial(jax.jit, static_argnums=0)
    def along(layout):
        function = lambda *x: attention(*x, segment_ids_BT=segments, layout=layout)  # noqa: E731
        out, pull = jax.vjp(function, query, key, value)
        return jax.vjp(pull, jnp.zeros_like(out))[1](direction)[0]

    on_mesh, alone = (np.asarray(along(x)) for x in (cases.layout_of(data=2, tensor=2), None))
    assert np.abs(alone).max() > 0.1
    assert cases.error([on_mesh], [alone]) < 1e-6


def test_every_implementation_has_its_blocks():
    """Names in the table are modules with the two functions that the front calls."""
    from luspo_jax.ops import attention as front  # the module; the name above is its function

    for name in IMPLEMENTATIONS:
        module = front.blocks(name)
        assert callable(module.forward_block)
        assert callable(module.backward_block)
