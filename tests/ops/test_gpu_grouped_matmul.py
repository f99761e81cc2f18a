"""The GPU kernels of groups, interpreted on CPU, lowered for CUDA, and compiled for a card."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from luspo_jax.ops import gpu_grouped_matmul as module
from luspo_jax.ops.grouped_matmul import grouped_matmul, grouped_outer, row_multiple
from tests.ops import grouped_cases as cases

_TRITON = jax.export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")


@pytest.fixture
def _interpreted(monkeypatch):
    monkeypatch.setattr(module, "_INTERPRET", True)


pytestmark = pytest.mark.usefixtures("strict_dtypes")


@pytest.mark.usefixtures("_interpreted")
@pytest.mark.parametrize("name", cases.SIZES)
def test_groups_match_a_loop_in_float64(name):
    cases.assert_groups_are_right("grouped_gpu", name, 24, 40)


@pytest.mark.usefixtures("_interpreted")
def test_groups_of_several_tiles():
    """With columns that are no whole number of tiles, and rows that are none either."""
    arrays = cases.inputs([90, 0, 129, 33, 1], 1, 72, 136, spare=5)
    assert module._tile_rows(arrays[0].shape[0], 5) == 16
    assert cases.error(cases.computed("grouped_gpu", *arrays), cases.expected(*arrays)) < 1e-6


@pytest.mark.usefixtures("_interpreted")
def test_a_tile_writes_rows_of_its_group_only():
    """Programs run at once, so none mends another's; what none writes is NaN when interpreted."""
    x_MD, kernel_EDF, _, sizes_E = cases.inputs([5, 9], 1, 24, 40, spare=40)
    how = {"implementation": "grouped_gpu"}
    y_MF = np.asarray(grouped_matmul(x_MD, kernel_EDF, sizes_E, **how))
    assert np.isfinite(y_MF[:14]).all()
    assert np.isnan(y_MF[14:]).all()
    grad_MD = jax.grad(lambda x: jnp.sum(grouped_matmul(x, kernel_EDF, sizes_E, **how)[:14]))(x_MD)
    assert not np.asarray(grad_MD)[14:].any()


@pytest.mark.usefixtures("_interpreted")
def test_bfloat16_sums_in_float32():
    arrays = cases.inputs([100, 0, 300], 1, 256, 24, jnp.bfloat16)
    out, back, outer = cases.computed("grouped_gpu", *arrays)
    want = cases.expected(*arrays)
    assert cases.error((out, back), want[:2]) < 0.004
    assert cases.error((outer,), want[2:]) < 1e-5


@pytest.mark.usefixtures("_interpreted")
@pytest.mark.parametrize(("dtype", "most"), [(jnp.float32, 1e-6), (jnp.bfloat16, 0.004)])
def test_kernels_of_int8(dtype, most):
    cases.assert_int8_kernels_are_right("grouped_gpu", dtype, most)


@pytest.mark.parametrize("rows", [16, 128])
def test_tiles_cover_each_group(rows):
    """Against a list that is made group by group."""
    sizes = np.array([0, 130, 16, 0, 1, 128, 0], np.int32)
    count = 300 // rows + len(sizes)
    group_T, first_T, end_T = (
        np.asarray(a) for a in module._tiles(jnp.asarray(sizes), rows, count)
    )
    want, start = [], 0
    for e, size in enumerate(sizes):
        want += [(e, start + at, start + size) for at in range(0, size, rows)]
        start += size
    needed = first_T < end_T
    got = zip(group_T[needed], first_T[needed], end_T[needed], strict=True)
    assert [tuple(map(int, one)) for one in got] == [tuple(map(int, one)) for one in want]


def test_rows_of_a_tile_follow_the_share_of_a_group():
    assert row_multiple("grouped_gpu", 4096, 16) == 1
    sizes = {(2**18, 128): 128, (4096, 16): 64, (512, 128): 16, (8, 1): 16, (1024, 1): 128}
    assert {case: module._tile_rows(*case) for case in sizes} == sizes


def _all_three(x_MD, kernel_EDF, grad_MF, sizes_E):
    how = {"implementation": "grouped_gpu"}
    return (
        grouped_matmul(x_MD, kernel_EDF, sizes_E, **how),
        grouped_matmul(grad_MF, kernel_EDF, sizes_E, transposed=True, **how),
        grouped_outer(x_MD, grad_MF, sizes_E, **how),
    )


def _lowered_for_cuda(function, *arrays):
    export = jax.export.export(jax.jit(function), platforms=["cuda"], disabled_checks=[_TRITON])
    try:
        return export(*arrays).mlir_module()
    except RuntimeError as error:  # jax ≥ 0.11
        if "No supported GPU devices found" not in str(error):
            raise
        pytest.skip("this jax lowers Triton kernels only where there is a GPU")


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_it_lowers_for_cuda(dtype):
    x, kernel, grad = (
        jax.ShapeDtypeStruct(dims, dtype) for dims in ((300, 80), (4, 80, 96), (300, 96))
    )
    sizes = jax.ShapeDtypeStruct((4,), jnp.int32)
    text = _lowered_for_cuda(_all_three, x, kernel, grad, sizes)
    assert text.count("grouped_matmul") >= 2
    assert "grouped_outer" in text


def test_kernels_of_int8_lower_for_cuda_and_are_not_cast_before():
    x = jax.ShapeDtypeStruct((300, 80), jnp.bfloat16)
    kernel = jax.ShapeDtypeStruct((4, 80, 96), jnp.int8)
    sizes = jax.ShapeDtypeStruct((4,), jnp.int32)
    product = functools.partial(grouped_matmul, implementation="grouped_gpu")
    text = _lowered_for_cuda(product, x, kernel, sizes)
    assert "grouped_matmul" in text
    assert "tensor<4x80x96xi8>" in text
    assert "tensor<4x80x96xbf16>" not in text


_FOR_A_CARD = """
import jax, jax.numpy as jnp
from experiments.rehearsal.topologies import topology
from tests.ops.test_gpu_grouped_matmul import _all_three

def temporaries(card, M, E, D, F, dtype=jnp.bfloat16):
    sharding = jax.sharding.SingleDeviceSharding(topology(card).devices[0])
    def shape(*dims, dtype=dtype):
        return jax.ShapeDtypeStruct(dims, dtype, sharding=sharding)
    arrays = shape(M, D), shape(E, D, F), shape(M, F), shape(E, dtype=jnp.int32)
    compiled = jax.jit(_all_three).lower(*arrays).compile()
    return compiled.memory_analysis().temp_size_in_bytes

M = 32768 * 8
for case in [("h100:1x8", M, 128, 2048, 768), ("h100:1x8", M, 128, 2048, 192),
             ("h100:1x8", 4 * M, 16, 2048, 768), ("h100:1x8", 512, 128, 2048, 768),
             ("h100:1x8", 4096, 16, 256, 512, jnp.float32), ("a100-80g:1x8", M, 128, 2048, 768)]:
    print(case, temporaries(*case), flush=True)
"""


@pytest.mark.slow
def test_it_compiles_for_a_card():
    """At the shapes of Qwen3-30B-A3B, its experts whole, cut, and spread; with no GPU."""
    pytest.importorskip("jax_cuda13_plugin")
    settings = {
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
        "CUDA_VISIBLE_DEVICES": "-1",
        "JAX_PLATFORMS": "cpu,cuda",
    }
    ran = subprocess.run(
        [sys.executable, "-c", _FOR_A_CARD], env={**os.environ, **settings},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-2000:]
    temporaries = [int(line.split()[-1]) for line in ran.stdout.splitlines()]
    assert len(temporaries) == 6
    assert max(temporaries) < 2**20  # no copy of rows or kernels
