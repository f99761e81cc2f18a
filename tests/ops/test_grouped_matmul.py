"""The front, and the two implementations that run anywhere."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from luspo_jax.ops.grouped_matmul import (
    IMPLEMENTATIONS,
    grouped_matmul,
    grouped_outer,
    resolve,
    row_multiple,
)
from tests.ops import grouped_cases as cases

pytestmark = pytest.mark.usefixtures("strict_dtypes")
_ANYWHERE = ("reference", "blocks")


@pytest.mark.parametrize("name", cases.SIZES)
@pytest.mark.parametrize("implementation", _ANYWHERE)
def test_groups_match_a_loop_in_float64(implementation, name):
    cases.assert_groups_are_right(implementation, name, 24, 40)


@pytest.mark.parametrize("implementation", _ANYWHERE)
@pytest.mark.parametrize("seed", range(3))
def test_random_groups_of_many_sizes(implementation, seed):
    """From fewer rows than the smallest piece to several of the largest."""
    sizes = np.random.default_rng(seed).permutation([0, 1, 5, 16, 17, 33, 70, 129, 150, 0, 64, 31])
    arrays = cases.inputs(sizes, 1, 8, 12, spare=seed * 20, seed=seed)
    got = cases.computed(implementation, *arrays)
    assert cases.error(got, cases.expected(*arrays)) < 1e-6


@pytest.mark.parametrize("implementation", _ANYWHERE)
def test_bfloat16_sums_in_float32(implementation):
    arrays = cases.inputs([100, 0, 300], 1, 256, 24, jnp.bfloat16)
    out, back, outer = cases.computed(implementation, *arrays)
    want = cases.expected(*arrays)
    assert cases.error((out, back), want[:2]) < 0.004  # half a unit in the last place of bfloat16
    assert cases.error((outer,), want[2:]) < 1e-5


@pytest.mark.parametrize("implementation", _ANYWHERE)
@pytest.mark.parametrize(("dtype", "most"), [(jnp.float32, 1e-6), (jnp.bfloat16, 0.004)])
def test_kernels_of_int8(implementation, dtype, most):
    cases.assert_int8_kernels_are_right(implementation, dtype, most)


@pytest.mark.parametrize("implementation", _ANYWHERE)
@pytest.mark.usefixtures("x64")
def test_float64_stays(implementation):
    arrays = cases.inputs([3, 0, 40], 1, 8, 12, jnp.float64)
    assert cases.error(cases.computed(implementation, *arrays), cases.expected(*arrays)) < 1e-14


# ---------------------------------------------------------------- derivatives


def _loss(product, x_MD, kernel_EDF):
    """Not linear in either, and its derivative reaches every product of a backward pass."""
    return jnp.sum(jnp.sin(product(jnp.tanh(x_MD), kernel_EDF) * 2.0))


def _second(product, outer):
    """Gradient of the square of a gradient that is stated with the two functions."""

    def squared(x_MD, kernel_EDF):
        y_MF = product(x_MD, kernel_EDF)
        grad_MF = jnp.cos(y_MF)
        return jnp.sum(outer(x_MD, grad_MF) ** 2) + jnp.sum(
            jax.grad(lambda x: _loss(product, x, kernel_EDF))(x_MD) ** 2
        )

    return jax.jit(jax.grad(squared, argnums=(0, 1)))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("implementation", _ANYWHERE)
def test_reverse_over_reverse_matches_a_dense_formula(implementation):
    x_MD, kernel_EDF, _, sizes_E = cases.inputs([3, 0, 5, 1], 1, 6, 7, jnp.float64, spare=0)
    one_hot_ME = jax.nn.one_hot(np.repeat(np.arange(4), sizes_E), 4, dtype=jnp.float64)
    dense = _second(
        lambda x, kernel: jnp.einsum("md,edf,me->mf", x, kernel, one_hot_ME),
        lambda x, grad: jnp.einsum("md,mf,me->edf", x, grad, one_hot_ME),
    )
    ours = _second(
        lambda x, kernel: grouped_matmul(x, kernel, sizes_E, implementation=implementation),
        lambda x, grad: grouped_outer(x, grad, sizes_E, implementation=implementation),
    )
    want = [np.asarray(a) for a in dense(x_MD, kernel_EDF)]
    assert cases.error([np.asarray(a) for a in ours(x_MD, kernel_EDF)], want) < 1e-13


@pytest.mark.parametrize("implementation", _ANYWHERE)
def test_garbage_after_the_last_group_has_no_derivative(implementation):
    x_MD, kernel_EDF, grad_MF, sizes_E = cases.inputs([3, 0, 5], 1, 6, 7)
    rows = int(sizes_E.sum())

    def loss(x_MD, kernel_EDF, grad_MF):
        how = {"implementation": implementation}
        y_MF = grouped_matmul(x_MD, kernel_EDF, sizes_E, **how)[:rows]
        sums_EDF = grouped_outer(x_MD, grad_MF, sizes_E, **how)
        return jnp.sum(jnp.sin(y_MF)) + jnp.sum(sums_EDF**3)

    def norm(*arrays):
        return sum(jnp.sum(a[:rows] ** 2) for a in jax.grad(loss, argnums=(0, 1, 2))(*arrays))

    arrays = x_MD, kernel_EDF, grad_MF
    for function in (loss, norm):
        for grad in jax.jit(jax.grad(function, argnums=(0, 1, 2)))(*arrays):
            assert np.isfinite(np.asarray(grad)).all()
            assert np.asarray(grad)[:3].any()


def test_second_derivatives_keep_no_rows_of_every_group():
    E, M, D, F = 8, 320, 20, 24
    x, kernel = jnp.ones((M, D)), jnp.ones((E, D, F))
    sizes = jnp.full((E,), M // E, jnp.int32)
    second = _second(
        lambda x, kernel: grouped_matmul(x, kernel, sizes),
        lambda x, grad: grouped_outer(x, grad, sizes),
    )
    text = second.lower(x, kernel).as_text()
    assert f"tensor<{E}x{D}x{F}xf32>" in text
    for width in (D, F):
        assert f"tensor<{E}x{M}x{width}x" not in text


# ---------------------------------------------------------------- the front


def test_auto_is_by_platform():
    names = {platform: resolve("auto", platform=platform) for platform in
             ("cpu", "tpu", "cuda", "gpu", "rocm", "metal")}  # fmt: skip
    assert names == {
        "cpu": "blocks",
        "tpu": "megablox",
        "cuda": "grouped_gpu",
        "gpu": "grouped_gpu",
        "rocm": "grouped_gpu",
        "metal": "reference",
    }
    assert set(names.values()) == set(IMPLEMENTATIONS)
    for name in _ANYWHERE:
        assert all(resolve(name, platform=platform) == name for platform in names)


@pytest.mark.parametrize(
    ("name", "platform", "message"),
    [
        ("megablox", "cpu", r"'megablox' runs on tpu, not on cpu; there 'reference', 'blocks' do"),
        ("megablox", "cuda", r"not on cuda; there 'reference', 'blocks', 'grouped_gpu' do"),
        ("grouped_gpu", "tpu", r"runs on gpu or cuda or rocm, not on tpu"),
        ("ragged", "cpu", r"'ragged' is unknown; use 'auto' or one of \['blocks'"),
    ],
)
def test_what_does_not_run_is_refused(name, platform, message):
    with pytest.raises(ValueError, match=message):
        resolve(name, platform=platform)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"implementation": "auto"}, "resolve chooses"),
        ({"x": jnp.ones((4, 5))}, r"kernels must be \[groups, 5, any\]"),
        ({"x": jnp.ones((4, 5)), "transposed": True}, r"kernels must be \[groups, any, 5\]"),
        ({"x": jnp.ones((4, 2, 3))}, r"a matrix \[M, D\], not \[4, 2, 3\]"),
        ({"sizes": jnp.array([4, 0, 0], jnp.int32)}, "2 kernels of a grouped matmul for 3 group"),
        ({"sizes": jnp.array([4.0, 0.0])}, r"int32 vector, not float32\[2\]"),
        ({"x": jnp.ones((4, 3), jnp.bfloat16)}, "bfloat16 rows with float32 kernels: cast"),
    ],
)
def test_a_matmul_that_cannot_be_is_refused(change, message):
    arguments = {"x": jnp.ones((4, 3)), "sizes": jnp.array([4, 0], jnp.int32), **change}
    x, sizes = arguments.pop("x"), arguments.pop("sizes")
    with pytest.raises(ValueError, match=message):
        grouped_matmul(x, jnp.ones((2, 3, 6)), sizes, **arguments)


def test_an_outer_product_that_cannot_be_is_refused():
    sizes = jnp.array([4, 0], jnp.int32)
    with pytest.raises(ValueError, match=r"rows float32\[4, 3\] with float32\[5, 3\]"):
        grouped_outer(jnp.ones((4, 3)), jnp.ones((5, 3)), sizes)
    with pytest.raises(ValueError, match="'none' is unknown"):
        grouped_outer(jnp.ones((4, 3)), jnp.ones((4, 3)), sizes, implementation="none")


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("implementation", ["megablox", "grouped_gpu"])
def test_kernels_refuse_float64(implementation):
    with pytest.raises(ValueError, match="does not take float64; use 'blocks'"):
        grouped_matmul(jnp.ones((4, 3)), jnp.ones((1, 3, 2)), jnp.array([4], jnp.int32),
                       implementation=implementation)  # fmt: skip


def test_row_multiples():
    for name in _ANYWHERE:
        assert row_multiple(name, 4096, 16) == 1
    with pytest.raises(ValueError, match="'none' is unknown"):
        row_multiple("none", 4096, 16)


# ---------------------------------------------------------------- time


def _fastest_ratio(function, arrays, dense, dense_arrays, tries):
    """Least time of one over that of the other, both run in turns."""
    times = [], []
    for _ in range(tries):
        for kept, run, inputs in zip(times, (function, dense), (arrays, dense_arrays), strict=True):
            start = time.perf_counter()
            jax.block_until_ready(run(*inputs))
            kept.append(time.perf_counter() - start)
    return min(times[0]) / min(times[1])


@pytest.mark.slow
@pytest.mark.parametrize(("tokens", "D", "F"), [(2048, 256, 512), (1024, 512, 1024)])
def test_blocks_take_at_most_twice_a_dense_product(tokens, D, F):
    """E 16, top-2, balanced, float32, forward."""
    E, M = 16, tokens * 2
    sizes_E = jnp.full((E,), M // E, jnp.int32)
    x_MD, kernel_EDF, _, _ = cases.inputs([M // E] * E, 1, D, F, spare=0)
    blocks = jax.jit(lambda *a: grouped_matmul(*a, implementation="blocks"))
    arrays = x_MD, kernel_EDF, sizes_E
    dense = jax.jit(jnp.matmul)
    ratio = min(_fastest_ratio(blocks, arrays, dense, (x_MD, kernel_EDF[0]), 20) for _ in range(5))
    assert ratio <= 2.0
