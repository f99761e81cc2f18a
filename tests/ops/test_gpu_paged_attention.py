"""The GPU kernel, interpreted on CPU, and compiled for cards where jax's CUDA plugin is.

Its values are compared in `test_paged_attention.py`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from luspo_jax.ops import gpu_paged_attention as module
from luspo_jax.ops import pages
from tests.ops import paged_cases as cases

pytestmark = pytest.mark.usefixtures("strict_dtypes")


_TRITON = jax.export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")


@pytest.fixture
def _interpreted(monkeypatch):
    monkeypatch.setattr(module, "_INTERPRET", True)


@pytest.mark.usefixtures("_interpreted")
def test_the_gpu_shares_a_row_among_programs(monkeypatch):
    """Some have no tile, one a part of one."""
    for splits in (2, 8):
        monkeypatch.setattr(module, "_splits", lambda *_, splits=splits: splits)
        rows = cases.rows_of((1, 64, 65, 0, 300, 1000))
        cases.assert_plain(rows, module.attend(rows.query, rows.pool, cases.LAYER, *rows[4:]))


@pytest.mark.parametrize(("rows", "entries", "splits"), [(256, 33280, 16), (64, 33280, 32),
                         (1, 512, 2), (3, 64, 1), (8192, 33280, 1), (300, 33280, 8)])  # fmt: skip
def test_programs_of_a_row_on_gpu_fill_the_card_but_have_work(rows, entries, splits):
    assert module._splits(rows, entries) == splits


@pytest.mark.usefixtures("_interpreted")
def test_the_gpu_does_not_even_load_what_lies_past_a_row():
    rows = cases.rows_of(cases.S16, garbage=np.nan)
    cases.assert_plain(rows, cases.attended("gpu", rows))


def test_a_pool_whose_addresses_would_wrap_is_refused():
    """Numbers of int8 between 2 and 4 GiB; scales and other types never come near."""
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)

    def attended(P):
        pool = jax.eval_shape(lambda: pages.zeros((2, 28, P, 64, 128), jnp.int8))
        query = shape((5, 4, 128), dtype=jnp.bfloat16)
        return jax.eval_shape(module.attend, query, pool, shape(()), shape((5, 40)), shape((5,)))

    for P in (4600, 9500):
        assert attended(P).out.shape == (5, 4, 128)
    for P in (4700, 9300):
        with pytest.raises(ValueError, match=r"cannot be addressed .* fewer than 2 GiB or more"):
            attended(P)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.int8])
@pytest.mark.parametrize(("G", "H", "S"), [(7, 128, 64), (1, 80, 48), (3, 64, 16)])
def test_it_lowers_for_cuda(G, H, S, dtype):
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    pool = jax.eval_shape(lambda: pages.zeros((2, 3, 9, S, H), dtype))
    query = shape((5, 2 * G, H), dtype=jnp.bfloat16 if dtype == jnp.int8 else dtype)
    arrays = query, pool, shape(()), shape((5, 40)), shape((5,))
    export = jax.export.export(
        jax.jit(module.attend), platforms=["cuda"], disabled_checks=[_TRITON]
    )
    try:
        exported = export(*arrays)
    except RuntimeError as error:  # jax ≥ 0.11
        if "No supported GPU devices found" not in str(error):
            raise
        pytest.skip("this jax lowers Triton kernels only where there is a GPU")
    assert "paged_attention" in exported.mlir_module()


@pytest.mark.slow
def test_no_pool_is_copied_on_a_card():
    pytest.importorskip("jax_cuda13_plugin")
    found = cases.temporaries_of(
        [
            ("h100:1x1", "gpu", {}),
            ("h100:1x1", "gpu", cases.PAGES_OF_64),
            ("h100:1x1", "gpu", {"H": 64, "S": 16, "M": 2080}),
            ("h100:1x1", "gpu", {"dtype": "int8", "tokens": 8000}),
            ("a100-80g:1x1", "gpu", {}),
        ],
        JAX_SKIP_CUDA_CONSTRAINTS_CHECK="1", CUDA_VISIBLE_DEVICES="-1", JAX_PLATFORMS="cpu,cuda",
    )  # fmt: skip
    assert [round(pool) for _, pool in found] == [14000, 14000, 7000, 14438, 14000]
    assert max(temporary for temporary, _ in found) < 16  # measured 14.3: sums of 16 programs a row
